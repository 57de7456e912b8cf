"""T5's attention as transformers builds it, its positions told by a table, not by a tensor as large as the scores."""

from typing import Any

import torch
from torch import Tensor
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5

from .. import bias
from . import NAME


class _ByTable(torch.nn.Module):
    """What ``fastseq.swap`` puts before transformers' class: the bias is an object that layers pass on to each other.

    As long as the model's attention is fastseq's, which alone can read it.
    """

    def _ours(self) -> bool:
        return bool(self.config._attn_implementation == NAME)  # type: ignore[union-attr]

    def forward(
        self,
        hidden_states: Tensor,
        mask: Tensor | None = None,
        key_value_states: Tensor | None = None,
        position_bias: Any = None,
        *arguments: Any,
        **keywords: Any,
    ) -> Any:
        if position_bias is None and not self.has_relative_attention_bias and self._ours():
            position_bias = 0.0  # transformers would make a tensor of zeros
        return super().forward(hidden_states, mask, key_value_states, position_bias, *arguments, **keywords)

    def compute_bias(self, query_length: int, key_length: int, device: Any = None, past_seen_tokens: Any = 0) -> Any:
        if not self._ours() or not isinstance(past_seen_tokens, int):  # a static cache counts in a tensor
            return super().compute_bias(query_length, key_length, device, past_seen_tokens)  # type: ignore[misc]
        return bias.T5(
            self.relative_attention_bias.weight,  # type: ignore[union-attr, arg-type]
            bidirectional=not self.is_decoder,
            max_distance=self.relative_attention_max_distance,  # type: ignore[arg-type]
            offset=past_seen_tokens,
        )


class T5Attention(_ByTable, modeling_t5.T5Attention):  # type: ignore[misc]
    """Of T5 (Raffel et al. 2020)."""


class MT5Attention(_ByTable, modeling_mt5.MT5Attention):  # type: ignore[misc]
    """Of mT5 (Xue et al. 2021), which computes the same."""
