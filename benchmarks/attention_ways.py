"""What a torch user writes for attention today, each as fast as we can write it.

What does not change from call to call is made once, outside the timing, as a model does it for all its layers:
masks combined into one, block masks, compiling. A learned bias changes, so what is added to it is in the timing.
"""

import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fastseq.reference.attention import band, dropout_keep

Tensors = tuple[Tensor, ...]
BACKENDS = ("flash", "mem_efficient", "cudnn", "math")  # as torch.backends.cuda.enable_*_sdp names them
ENABLED = tuple(name for name in BACKENDS if getattr(torch.backends.cuda, f"{name}_sdp_enabled")())
LARGEST = 2**26  # scores that are held at once in the exact result


@dataclass
class Inputs:
    """One attention: query ``[B, N, Q, D]``, key ``[B, M, K, D]``, value ``[B, M, K, E]``, gradient ``[B, N, Q, E]``.

    ``padding`` bool ``[B, 1, 1, K]``; ``dense`` float ``[B, 1, Q, K]``; ``bias`` learned ``[1, N, Q, K]``.
    ``table`` ``[32, N]`` is T5's; ``r`` ``[K, N, D]``, its last row for distance 0, with ``u`` and ``w`` ``[N, D]``
    Transformer-XL's.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    padding: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
    table: Tensor | None = None
    r: Tensor | None = None
    u: Tensor | None = None
    w: Tensor | None = None
    seed: Tensor | None = None
    left: int = -1
    right: int = -1
    softcap: float = 0.0
    dropout_p: float = 0.0
    weights: bool = False

    @property
    def grouped(self) -> bool:
        return self.query.shape[1] != self.key.shape[1]

    @property
    def wanted(self) -> Tensors:
        """What a backward pass is asked for."""
        return tuple(t for t in (self.query, self.key, self.value, *self.learned) if t is not None)

    @property
    def learned(self) -> tuple[Tensor | None, ...]:
        return self.bias, self.table, self.r, self.u, self.w

    @property
    def content(self) -> Tensor:
        """The query of the product with the keys."""
        return self.query if self.u is None else self.query + self.u[:, None]

    def added_by_learning(self) -> Tensor | None:
        """The learned bias, made anew for each call as a model does: ``[1 or B, N, Q, K]``."""
        if self.table is not None:
            return self.table[buckets(self.query.shape[2], self.key.shape[2], self.query.device)].permute(2, 0, 1)[None]
        if self.r is None or self.w is None:
            return self.bias
        products = (self.query + self.w[:, None]) @ self.r.permute(1, 2, 0) * self.query.shape[-1] ** -0.5
        B, N, Q, K = products.shape  # the shift of Dai et al. 2019: a column put in front, and read as rows one longer
        return F.pad(products, (1, 0)).view(B, N, K + 1, Q)[:, :, 1:].view(B, N, Q, K)

    def visible(self) -> Tensor | None:
        """Padding and band in one bool mask that broadcasts to the scores; None where all is seen."""
        if self.left < 0 and self.right < 0:
            return self.padding
        Q, K = self.query.shape[2], self.key.shape[2]
        seen = band(Q, K, self.left, self.right, False, self.query.device)[None, None]
        return seen if self.padding is None else seen & self.padding

    def added(self) -> Tensor | None:
        """All constant masks as one float mask, with -inf for what is not seen."""
        seen = self.visible()
        if seen is None:
            return self.dense
        zero = torch.zeros((), dtype=self.query.dtype, device=self.query.device) if self.dense is None else self.dense
        return torch.where(seen, zero, -torch.inf)


def bucket_of(rel: Tensor) -> Tensor:
    """T5's bucket of a distance, of 32 for both sides (Raffel et al. 2020)."""
    far = 8 + (torch.log(rel.abs().clamp(min=1) / 8) / math.log(128 / 8) * 8).long()
    return (rel > 0) * 16 + torch.where(rel.abs() < 8, rel.abs(), far.clamp(max=15))


@functools.cache
def buckets(Q: int, K: int, device: torch.device) -> Tensor:
    """The bucket of each query and key, made once."""
    return bucket_of(torch.arange(K, device=device) - torch.arange(Q, device=device)[:, None])


def trained(inputs: Inputs, attend: Callable[[], Any], train: bool) -> Callable[[], Any]:
    """The call itself, or with it the gradients of its output for query, key, value and bias."""
    if not train:
        return attend

    def both() -> Any:
        result = attend()
        out = result[0] if isinstance(result, tuple) else result
        return result, torch.autograd.grad(out, inputs.wanted, inputs.gradient)

    return both


def sdpa(inputs: Inputs) -> Callable[[], Tensor] | None:
    """``F.scaled_dot_product_attention``, whose every mask has to be one; None for what it cannot do."""
    if inputs.softcap or inputs.weights:
        return None
    options: dict[str, Any] = {"dropout_p": inputs.dropout_p, "enable_gqa": inputs.grouped}
    if any(t is not None for t in inputs.learned):
        added = inputs.added()

        def attend() -> Tensor:
            bias = inputs.added_by_learning()
            mask = bias if added is None else bias + added
            return F.scaled_dot_product_attention(inputs.content, inputs.key, inputs.value, attn_mask=mask, **options)

        return attend
    call = (inputs.query, inputs.key, inputs.value)
    only_causal = inputs.right == 0 and inputs.left < 0 and inputs.padding is inputs.dense is None
    if only_causal:
        return lambda: F.scaled_dot_product_attention(*call, is_causal=True, **options)
    mask = inputs.visible() if inputs.dense is None else inputs.added()
    return lambda: F.scaled_dot_product_attention(*call, attn_mask=mask, **options)


def chosen_backend(inputs: Inputs) -> str:
    """The backend that ``F.scaled_dot_product_attention`` takes by itself; asked in the grad mode of the run."""
    bias = inputs.added_by_learning()
    mask = bias if bias is not None else inputs.added() if inputs.dense is not None else inputs.visible()
    causal = inputs.right == 0 and inputs.left < 0 and inputs.padding is inputs.dense is bias is None
    number = torch._fused_sdp_choice(
        inputs.query, inputs.key, inputs.value, None if causal else mask, inputs.dropout_p, causal,
        enable_gqa=inputs.grouped,
    )  # fmt: skip
    return {0: "math", 1: "flash", 2: "mem_efficient", 3: "cudnn"}.get(number, str(number))


def enable(*backends: str) -> None:
    """Let ``F.scaled_dot_product_attention`` take these backends and no other."""
    for backend in BACKENDS:
        getattr(torch.backends.cuda, f"enable_{backend}_sdp")(backend in backends)


def formula(inputs: Inputs) -> Callable[[], Any]:
    """Softmax and products written out: what is left where there is no operator."""
    added = inputs.added()

    def attend() -> Any:
        out, weights = _formula(inputs, added, None)
        return (out, weights.mean(1)) if inputs.weights else out

    return attend


def _formula(inputs: Inputs, added: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (inputs.key, inputs.value))
    scores = (inputs.content * inputs.query.shape[-1] ** -0.5) @ key.mT
    if inputs.softcap:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    for term in (inputs.added_by_learning(), added):
        scores = scores if term is None else scores + term
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * kept / (1 - inputs.dropout_p)
    return weights @ value, weights


def flex(inputs: Inputs, compiled: bool) -> Callable[[], Tensor] | None:
    """FlexAttention, its block mask made once; None for what it cannot do."""
    if inputs.dropout_p or inputs.weights or inputs.r is not None:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    Q, K = inputs.query.shape[2], inputs.key.shape[2]
    left, right, softcap, dense, bias = inputs.left, inputs.right, inputs.softcap, inputs.dense, inputs.bias
    table = inputs.table
    bucket = bucket_of(torch.arange(-Q, K, device=inputs.query.device))
    lengths = None if inputs.padding is None else inputs.padding.sum(-1).flatten()

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        visible = q >= 0
        if left >= 0:
            visible = visible & (k - q >= -left)
        if right >= 0:
            visible = visible & (k - q <= right)
        return visible if lengths is None else visible & (k < lengths[b])

    def changed(score: Tensor, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        if softcap:
            score = softcap * torch.tanh(score / softcap)
        if dense is not None:
            score = score + dense[b, 0, q, k]
        if table is not None:
            score = score + table[bucket[Q + k - q], h]
        return score if bias is None else score + bias[0, h, q, k]

    blocks = None
    if lengths is not None or left >= 0 or right >= 0:
        batch = None if lengths is None else inputs.query.shape[0]
        blocks = create_block_mask(seen, batch, None, Q, K, inputs.query.device)
    change = changed if softcap or any(t is not None for t in (dense, bias, table)) else None
    run = flex_attention
    if compiled:
        torch._dynamo.reset()  # or the cases before count as recompiles of this one
        run = torch.compile(flex_attention, dynamic=False)
    return lambda: run(inputs.query, inputs.key, inputs.value, change, blocks, enable_gqa=inputs.grouped)


def in_pieces(inputs: Inputs, dtype: torch.dtype, train: bool) -> Tensors:
    """What :func:`formula` and its gradients give in another dtype, for the dropout that ours draws.

    Head by head where all scores would not fit.
    """
    B, N, Q, _ = inputs.query.shape
    results = [torch.zeros(*inputs.gradient.shape, dtype=dtype, device=inputs.query.device)]
    if inputs.weights:
        results.append(torch.zeros(B, Q, inputs.key.shape[2], dtype=dtype, device=inputs.query.device))
    gradients = [torch.zeros_like(t, dtype=dtype) for t in inputs.wanted] if train else []
    for batch, heads, key_heads in _pieces(inputs):
        second, first = (slice(None), heads), (heads,)
        at = {"query": (batch, heads), "key": (batch, key_heads), "value": (batch, key_heads),
              "bias": second, "table": second, "r": second, "u": first, "w": first}  # fmt: skip
        at = {name: place for name, place in at.items() if getattr(inputs, name) is not None}
        leaves = {name: getattr(inputs, name)[place].to(dtype).requires_grad_(train) for name, place in at.items()}
        part = Inputs(**leaves, gradient=inputs.gradient[batch, heads].to(dtype), **_options(inputs, batch))
        added = part.added()
        kept = None
        if inputs.seed is not None:
            numbers = torch.arange(B * N, device=inputs.query.device).view(B, N)[batch, heads]
            kept = dropout_keep(inputs.seed, numbers, Q, inputs.key.shape[2], inputs.dropout_p)
        with torch.set_grad_enabled(train):
            out, weights = _formula(part, added, kept)
        results[0][batch, heads] = out.detach()
        if inputs.weights:
            results[1][batch] += weights.detach().sum(1) / N
        if train:
            found = torch.autograd.grad(out, tuple(leaves.values()), part.gradient)
            for gradient, piece, place in zip(gradients, found, at.values(), strict=True):
                gradient[place] += piece
    return (*results, *gradients)


def _pieces(inputs: Inputs) -> Iterator[tuple[slice, slice, slice]]:
    """Slices of the batch, of the heads, and of the key heads that serve them."""
    (B, N, Q, _), (M, K) = inputs.query.shape, inputs.key.shape[1:3]
    if B * N * Q * K <= LARGEST:
        yield slice(None), slice(None), slice(None)
        return
    for b in range(B):
        for m in range(M):
            yield slice(b, b + 1), slice(m * (N // M), (m + 1) * (N // M)), slice(m, m + 1)


def _options(inputs: Inputs, batch: slice) -> dict[str, Any]:
    masks = {
        name: None if mask is None else mask[batch]
        for name, mask in (("padding", inputs.padding), ("dense", inputs.dense))
    }
    return masks | {
        "left": inputs.left,
        "right": inputs.right,
        "softcap": inputs.softcap,
        "dropout_p": inputs.dropout_p,
    }
