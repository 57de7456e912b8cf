"""XLNet's attention as transformers builds it, with the one function replaced that makes matrices of scores."""

from typing import Any

from torch import Tensor
from transformers.models.xlnet import modeling_xlnet

from ..bias import Bias, Segments, TransformerXL
from ..functional import scaled_dot_product_attention


class XLNetRelativeAttention(modeling_xlnet.XLNetRelativeAttention):  # type: ignore[misc]
    """Of XLNet (Yang et al. 2019): memories, both streams and returned weights as there.

    A guess that sees no token gets zeros; there the mean of all values, hidden ones included.
    """

    def rel_attn_core(
        self,
        q_head: Tensor,
        k_head_h: Tensor,
        v_head_h: Tensor,
        k_head_r: Tensor,
        seg_mat: Tensor | None = None,
        attn_mask: Tensor | None = None,
        output_attentions: bool = False,
    ) -> Any:
        """Heads ``[Q, B, N, D]`` and ``[K, B, N, D]``, positions ``[L, B, N, D]``, whose row K is distance 0.

        ``seg_mat`` ``[Q, K, B, 2]`` is one-hot, its second place for another segment; ``attn_mask`` ``[Q, K, 1 or B,
        1]`` is positive where a query may not look. The output is ``[Q, B, N, D]``, the weights ``[Q, K, B, N]``.
        """
        q, k, v = (t.permute(1, 2, 0, 3) for t in (q_head, k_head_h, v_head_h))
        bias: Bias = TransformerXL(k_head_r.transpose(0, 1), self.r_w_bias, self.r_r_bias, zero=k.shape[2])
        if seg_mat is not None:
            bias = bias + Segments(self.r_s_bias, self.seg_embed, *_segments(seg_mat))
        visible = None if attn_mask is None else attn_mask.permute(2, 3, 0, 1) <= 0
        result = scaled_dot_product_attention(
            q, k, v, visible, self.dropout.p if self.training else 0.0, scale=self.scale, bias=bias,
            return_weights=output_attentions,
        )  # fmt: skip
        if not output_attentions:
            return result.permute(2, 0, 1, 3)
        out, weights = result
        return out.permute(2, 0, 1, 3), weights.permute(2, 3, 0, 1)


def _segments(seg_mat: Tensor) -> tuple[Tensor, Tensor]:
    """A number for the segment of each query ``[B, Q]`` and key ``[B, K]``, of which the last Q are the queries.

    A key's segment goes by the first query of it; where there is none, as in a memory, no query will ask which it is.
    """
    same = seg_mat[..., 0].permute(2, 0, 1)  # [B, Q, K]
    most, first = same.max(1)
    of_keys = first.masked_fill(most <= 0, -1)
    return of_keys[:, same.shape[2] - same.shape[1] :], of_keys
