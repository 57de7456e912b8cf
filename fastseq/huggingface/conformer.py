"""The Conformer's attention as transformers builds it, without a matrix of positions."""

from typing import Any

from torch import Tensor
from transformers.models.wav2vec2_conformer import modeling_wav2vec2_conformer

from ..bias import TransformerXL
from . import NAME, attention


class Wav2Vec2ConformerSelfAttention(modeling_wav2vec2_conformer.Wav2Vec2ConformerSelfAttention):  # type: ignore[misc]
    """Of the Conformer (Gulati et al. 2020), by relative positions; by rotary ones, or by none, it stays as it is."""

    def forward(
        self,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        relative_position_embeddings: Tensor | None = None,
        **keywords: Any,
    ) -> Any:
        """States ``[B, T, E]`` and embedded distances ``[1, 2T - 1, E]`` from T - 1 to -(T - 1)."""
        ours = self.config._attn_implementation == NAME and self.position_embeddings_type == "relative"
        if not ours or relative_position_embeddings is None:
            return super().forward(hidden_states, attention_mask, relative_position_embeddings, **keywords)

        def heads(x: Tensor) -> Tensor:
            return x.view(*x.shape[:-1], self.num_heads, self.head_size)

        linears = self.linear_q, self.linear_k, self.linear_v
        q, k, v = (heads(linear(hidden_states)).transpose(1, 2) for linear in linears)
        r = heads(self.linear_pos(relative_position_embeddings[0]))
        out, weights = attention(
            self, q, k, v, attention_mask, self.scaling, self.dropout.p if self.training else 0.0,
            position_bias=TransformerXL(r, self.pos_bias_u, self.pos_bias_v, zero=hidden_states.shape[1] - 1),
            **keywords,
        )  # fmt: skip
        return self.linear_out(out.flatten(2)), weights
