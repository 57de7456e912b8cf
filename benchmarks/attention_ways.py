"""What a torch user writes for attention today, each as fast as we can write it.

What does not change from call to call is made once, outside the timing, as a model does it for all its layers:
masks combined into one, block masks, compiling. A learned bias changes, so what is added to it is in the timing.
"""

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
    """

    query: Tensor
    key: Tensor
    value: Tensor
    gradient: Tensor
    padding: Tensor | None = None
    dense: Tensor | None = None
    bias: Tensor | None = None
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
        return tuple(t for t in (self.query, self.key, self.value, self.bias) if t is not None)

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
    call = (inputs.query, inputs.key, inputs.value)
    options: dict[str, Any] = {"dropout_p": inputs.dropout_p, "enable_gqa": inputs.grouped}
    only_causal = inputs.right == 0 and inputs.left < 0 and inputs.padding is inputs.dense is inputs.bias is None
    if only_causal:
        return lambda: F.scaled_dot_product_attention(*call, is_causal=True, **options)
    bias = inputs.bias
    if bias is not None:
        added = inputs.added()
        if added is None:
            return lambda: F.scaled_dot_product_attention(*call, attn_mask=bias, **options)
        return lambda: F.scaled_dot_product_attention(*call, attn_mask=bias + added, **options)
    mask = inputs.visible() if inputs.dense is None else inputs.added()
    return lambda: F.scaled_dot_product_attention(*call, attn_mask=mask, **options)


def chosen_backend(inputs: Inputs) -> str:
    """The backend that ``F.scaled_dot_product_attention`` takes by itself; asked in the grad mode of the run."""
    mask = inputs.bias if inputs.bias is not None else inputs.added() if inputs.dense is not None else inputs.visible()
    causal = inputs.right == 0 and inputs.left < 0 and inputs.padding is inputs.dense is inputs.bias is None
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
        out, weights = _formula(inputs, inputs.bias, added, None)
        return (out, weights.mean(1)) if inputs.weights else out

    return attend


def _formula(inputs: Inputs, bias: Tensor | None, added: Tensor | None, kept: Tensor | None) -> tuple[Tensor, Tensor]:
    groups = inputs.query.shape[1] // inputs.key.shape[1]
    key, value = (t.repeat_interleave(groups, 1) if groups > 1 else t for t in (inputs.key, inputs.value))
    scores = (inputs.query * inputs.query.shape[-1] ** -0.5) @ key.mT
    if inputs.softcap:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    for term in (bias, added):
        scores = scores if term is None else scores + term
    weights = scores.softmax(-1)
    if kept is not None:
        weights = weights * kept / (1 - inputs.dropout_p)
    return weights @ value, weights


def flex(inputs: Inputs, compiled: bool) -> Callable[[], Tensor] | None:
    """FlexAttention, its block mask made once; None for what it cannot do."""
    if inputs.dropout_p or inputs.weights:
        return None
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    Q, K = inputs.query.shape[2], inputs.key.shape[2]
    left, right, softcap, dense, bias = inputs.left, inputs.right, inputs.softcap, inputs.dense, inputs.bias
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
        return score if bias is None else score + bias[0, h, q, k]

    blocks = None
    if lengths is not None or left >= 0 or right >= 0:
        batch = None if lengths is None else inputs.query.shape[0]
        blocks = create_block_mask(seen, batch, None, Q, K, inputs.query.device)
    change = changed if softcap or dense is not None or bias is not None else None
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
        at = [(batch, heads), (batch, key_heads), (batch, key_heads), (slice(None), heads)]
        leaves = [t[place].to(dtype).requires_grad_(train) for t, place in zip(inputs.wanted, at, strict=False)]
        part = Inputs(*leaves[:3], inputs.gradient[batch, heads].to(dtype), **_options(inputs, batch))
        added = part.added()
        kept = None
        if inputs.seed is not None:
            numbers = torch.arange(B * N, device=inputs.query.device).view(B, N)[batch, heads]
            kept = dropout_keep(inputs.seed, numbers, Q, inputs.key.shape[2], inputs.dropout_p)
        with torch.set_grad_enabled(train):
            out, weights = _formula(part, leaves[3] if len(leaves) > 3 else None, added, kept)
        results[0][batch, heads] = out.detach()
        if inputs.weights:
            results[1][batch] += weights.detach().sum(1) / N
        if train:
            for gradient, piece, place in zip(
                gradients, torch.autograd.grad(out, leaves, part.gradient), at, strict=False
            ):
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
