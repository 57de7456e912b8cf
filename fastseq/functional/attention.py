"""Scaled dot-product attention as a function."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import forward_ad

from .. import implementation
from ..bias import Bias, taken_apart, terms
from ..implementation import Choice, chosen, gpu
from ..ops import attention as attention_ops
from ..ops import native
from ..ops.stock import Stock
from ..reference import attention as reference
from .autocast import autocasting, plainly

_PLAIN_TYPES = {Tensor, torch.nn.Parameter}
_STOCK = {"auto", "torch"}


class _Band(NamedTuple):
    """The keys a query may see: ``-left <= j - i - shift <= right``, negative for no limit."""

    left: int = -1
    right: int = -1
    lower_right: bool = False  # shift is K - Q rather than 0


_ALL, _CAUSAL = _Band(), _Band(right=0)


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    bias: Tensor | Bias | None = None,
    causal: str | None = None,
    window: int | tuple[int, int] | None = None,
    softcap: float | None = None,
    seed: int | Tensor | None = None,
    return_lse: bool = False,
    return_weights: bool | str = False,
) -> Any:
    """Attention (Vaswani et al. 2017), as ``torch.nn.functional.scaled_dot_product_attention``, and more by keyword.

    A query that sees no key gets output 0 and gradient 0. What a query may not see has no influence on it, NaN
    included. Memory beyond the results grows with Q + K, not with Q * K, for the gradients as well.

    Args:
        query: ``[..., N, Q, D]``, N heads; 2-D and 3-D as in torch.
        key: ``[..., M, K, D]``; M is N, or 1, or with ``enable_gqa`` any divisor of N.
        value: ``[..., M, K, E]``.
        attn_mask: bool (true: may attend) or float (added to the scores), broadcastable to ``[..., N, Q, K]``.
            Together with ``is_causal`` both apply.
        dropout_p: probability that a weight is dropped; drawn from (seed, batch, head, row, column) alone.
        is_causal: query i sees keys 0 to i.
        scale: of the products; 1/sqrt(D) if None.
        enable_gqa: let each key head serve N/M query heads.
        bias: added to the scores on top of a mask of either kind: a float Tensor that broadcasts, or what
            ``fastseq.bias`` offers (ALiBi, T5, TransformerXL, Segments, Order, Window), or a sum of them. What is
            learned gets its gradient. None of those makes a matrix of the size of the scores.
        causal: ``"upper_left"`` (as ``is_causal``), or ``"lower_right"``: the last query sees the last key.
        window: how many keys a query sees to its left and to its right, one number for both or a pair, -1 for no
            limit; counted from the diagonal that ``causal`` names, without it from the lower right one.
        softcap: bend the scores to ``softcap * tanh(score / softcap)``, before bias and mask (Gemma 2, 2024).
        seed: of the dropout, to replay it; drawn from torch's generator if None.
        return_lse: also return the log-sum-exp of the scores ``[..., N, Q]``, in float32 at least.
        return_weights: also return the weights that multiply the values, after dropout: True or ``"each"`` for
            ``[..., N, Q, K]``, ``"mean"`` for their mean over the heads ``[..., Q, K]``.

    Returns:
        output ``[..., N, Q, E]``; the weights and the log-sum-exp after it, in this order, if asked for.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit together, as in torch; in a bias too.
        ValueError: ``causal``, ``window``, ``softcap`` or ``return_weights`` is none of the above; or two of a kind,
            windows for one, come together in ``bias``.
        Unsupported: ``use`` names an implementation that cannot.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 2, 8, 10, 16)
        >>> padding = torch.tensor([[True] * 10, [True] * 7 + [False] * 3])[:, None, None]
        >>> out, lse = fastseq.functional.scaled_dot_product_attention(
        ...     q, k, v, padding, is_causal=True, return_lse=True)
        >>> out.shape, lse.shape
        (torch.Size([2, 8, 10, 16]), torch.Size([2, 8, 10]))
    """
    parts: Sequence[Bias] = ()
    if bias is not None and isinstance(bias, Bias):
        bias, of_bias, parts = taken_apart(bias)
        if of_bias is not None and window is not None:
            raise ValueError("window: expected one, got another in bias")
        window = window if of_bias is None else of_bias
    ours = not (
        bias is None
        and not parts
        and causal is None
        and window is None
        and softcap is None
        and seed is None
        and not return_lse
        and not return_weights
    )
    # Whether a query sees every key, with its weight as it is: then PyTorch's operator has no promise left to break.
    whole = not ours and attn_mask is None and not dropout_p and not is_causal
    band = _band(is_causal, causal, window)
    # No more than masks, which PyTorch's operator adds.
    if softcap is None and not return_lse and not return_weights and not parts:
        way = _way(query, key, value, attn_mask, bias, whole, bool(dropout_p), is_causal)
        if way == "stock" and not ours:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        if way == "native":
            out = native.attention(query, key, value, attn_mask, bias, band, scale)
            if out is not None:
                return out

    weights = _weights(return_weights)
    _check(query, key, value, attn_mask, bias)
    _check_numbers(scale, dropout_p, softcap)
    query, key, value, attn_mask, bias = _autocast(query, key, value, attn_mask, bias)
    (q, k, v), lead = _four_dimensional(query, key, value, enable_gqa)
    scores = (*lead, q.shape[1], q.shape[2], k.shape[2])
    mask = None
    if attn_mask is not None:
        attn_mask = _broadcastable("attn_mask", attn_mask, scores, query.dim(), k.dim())
    if bias is not None:
        bias = _broadcastable("bias", bias, scores, query.dim(), k.dim())
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        mask = attn_mask
    elif attn_mask is not None:
        bias = attn_mask if bias is None else attn_mask + bias
    with plainly(q.device.type):
        out, lse, shown = _attend(
            q, k, v, bias, mask, None, None, _seed(seed, dropout_p, q.device), parts,
            scale=scale, band=band, softcap=softcap, dropout_p=dropout_p, max_q=q.shape[2], max_k=k.shape[2],
            weights=weights, beyond=ours or attn_mask is not None or dropout_p > 0.0,
        )  # fmt: skip

    def shaped(t: Tensor, heads: int) -> Tensor:
        """The leading dimensions as the caller has them; with fewer than three dimensions there are no heads."""
        t = t if len(lead) == 1 else t.reshape(*lead, *t.shape[1:])
        return t[0] if heads and max(query.dim(), key.dim(), value.dim()) == 2 else t

    results = [shaped(out, 1)]
    if weights:
        results.append(shaped(shown, weights == "each"))
    if return_lse:
        results.append(shaped(lse, 1))
    return results[0] if len(results) == 1 else tuple(results)


def varlen_attn(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cu_seq_q: Tensor,
    cu_seq_k: Tensor,
    max_q: int,
    max_k: int,
    *,
    return_aux: Any = None,
    scale: float | None = None,
    window_size: tuple[int, int] = (-1, -1),
    enable_gqa: bool = False,
    softcap: float | None = None,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    bias: Bias | None = None,
) -> Any:
    """Attention within sequences packed one after the other, as ``torch.nn.attention.varlen.varlen_attn``.

    Args:
        query: ``[Tq, N, D]``, the tokens of all sequences.
        key, value: ``[Tk, M, D]`` and ``[Tk, M, E]``; M is N, or with ``enable_gqa`` a divisor of it.
        cu_seq_q, cu_seq_k: int32 ``[Z+1]``, where each of Z sequences begins; a sequence may be empty.
        max_q, max_k: the longest sequence's length, or more.
        return_aux: a ``torch.nn.attention.varlen.AuxRequest``; with its ``lse`` also return the log-sum-exp.
        scale, softcap, dropout_p, seed: as in :func:`scaled_dot_product_attention`.
        window_size: keys seen to the left and to the right of the lower right diagonal, -1 for no limit;
            ``(-1, 0)`` is causal.
        bias: ``fastseq.bias.ALiBi``, ``T5`` or ``TransformerXL``, or a sum of them, which each sequence has for itself.

    Returns:
        output ``[Tq, N, E]``, and if asked for the log-sum-exp ``[Tq, N]``. Both differentiate.

    Raises:
        ValueError: shapes do not fit together, or the bias is of another kind.
        TypeError: ``cu_seq_q`` or ``cu_seq_k`` is not int32, or ``bias`` not a bias.
        Unsupported: ``use`` names an implementation that cannot.

    Example:
        >>> import torch, fastseq
        >>> q, k, v = torch.randn(3, 12, 4, 16)
        >>> starts = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
        >>> fastseq.functional.varlen_attn(q, k, v, starts, starts, 7, 7, window_size=(-1, 0)).shape
        torch.Size([12, 4, 16])
    """
    left, right = _pair("window_size", window_size)
    for name, t in (("query", query), ("key", key), ("value", value)):
        if t.dim() != 3:
            raise ValueError(f"{name}: expected [tokens, heads, width], got {list(t.shape)}")
    N, M = query.shape[1], key.shape[1]
    if value.shape[1] != M or key.shape[0] != value.shape[0] or key.shape[2] != query.shape[2]:
        raise ValueError(
            f"query, key, value: expected [Tq, N, D], [Tk, M, D], [Tk, M, E], got {_shapes(query, key, value)}"
        )
    if M != N and (not enable_gqa or not M or N % M):
        raise ValueError(f"key: expected {N} heads, or with enable_gqa a divisor of {N}, got {M}")
    for name, t in (("cu_seq_q", cu_seq_q), ("cu_seq_k", cu_seq_k)):
        if not isinstance(t, Tensor) or t.dtype != torch.int32:
            raise TypeError(f"{name}: expected an int32 Tensor, got {getattr(t, 'dtype', type(t).__name__)}")
        if t.dim() != 1 or t.shape != cu_seq_q.shape or not t.shape[0]:
            raise ValueError(f"{name}: expected [sequences + 1] = {list(cu_seq_q.shape)}, got {list(t.shape)}")
    parts: Sequence[Bias] = ()
    if bias is not None:
        if not isinstance(bias, Bias):
            raise TypeError(f"bias: expected what fastseq.bias offers, got {type(bias).__name__}")
        parts = bias.parts
        for part in parts:
            if not part.packable:
                raise ValueError(
                    "bias: expected ALiBi, TransformerXL or T5 without an offset for packed sequences, "
                    f"got {type(part).__name__}"
                )
    _check(query, key, value, None, None)
    _check_numbers(scale, dropout_p, softcap)
    query, key, value, _, _ = _autocast(query, key, value, None, None)
    q, k, v = (t.transpose(0, 1)[None] for t in (query, key, value))
    with plainly(q.device.type):
        out, lse, _ = _attend(
            q, k, v, None, None, cu_seq_q, cu_seq_k, _seed(seed, dropout_p, q.device), parts,
            scale=scale, band=_Band(left, right, True), softcap=softcap, dropout_p=dropout_p,
            max_q=max_q, max_k=max_k, weights="", beyond=True,
        )  # fmt: skip
    out = out[0].transpose(0, 1)
    return (out, lse[0].transpose(0, 1)) if return_aux is not None and return_aux.lse else out


def choose_attention(query: Tensor, value: Tensor, beyond: bool, P: int | None = None) -> Choice:
    """Which implementation runs.

    ``beyond``: more is asked than PyTorch's operator does with every promise kept; P: the width of the products with
    relative positions, where there are any.
    """
    return attention_ops.choice(query, value, beyond, P)


# ----------------------------------------------------------------------------------------------- below the face


def _way(query: Any, key: Any, value: Any, mask: Any, bias: Any, whole: bool, drops: bool, is_causal: bool) -> str:
    """How a call of little more than torch's own arguments gets around an operator of ours: "stock", "native" or "".

    Straight code: on small tensors it is a good part of the time that a call takes.
    """
    plain = (
        type(query) in _PLAIN_TYPES
        and type(key) in _PLAIN_TYPES
        and type(value) in _PLAIN_TYPES
        and (mask is None or type(mask) in _PLAIN_TYPES)
        and (bias is None or type(bias) in _PLAIN_TYPES)
    )
    if torch.compiler.is_compiling():
        return "stock" if whole and not implementation.named else ""
    if chosen() not in _STOCK:
        return ""
    if not plain:
        return "stock"  # a subclass, a nested tensor, or no tensor: PyTorch knows
    if forward_ad._current_level >= 0:
        return ""  # PyTorch's fused operators have no forward-mode derivative
    if torch._C._are_functorch_transforms_active():
        return "" if mask is not None and is_causal else "stock"
    if whole and not (torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad)):
        return "stock"
    on_cpu = query.is_cpu and key.is_cpu and value.is_cpu and (mask is None or mask.is_cpu)
    on_cpu = on_cpu and (bias is None or bias.is_cpu)
    return "native" if on_cpu and not drops and not torch.is_autocast_enabled("cpu") else ""


def _transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks on, which see into compositions only."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    mask: Tensor | None,
    cu_q: Tensor | None,
    cu_k: Tensor | None,
    seed: Tensor | None,
    parts: Sequence[Bias],
    *,
    scale: float | None,
    band: _Band,
    softcap: float | None,
    dropout_p: float,
    max_q: int,
    max_k: int,
    weights: str,
    beyond: bool,
) -> Any:
    given = terms(parts, query, key, attention_ops.scaling(scale, query)) if parts else {}
    distance, distance_zero = given.get("distance", (None, 0))
    query, position_query, position_key, position_zero = given.get("position", (query, None, None, 0))
    segment, segment_q, segment_k = given.get("segment", (None, None, None))
    rank_q, rank_k = given.get("rank", (None, None))
    tensors = (
        query, key, value, bias, distance, position_query, position_key, segment,
        mask, cu_q, cu_k, seed, segment_q, segment_k, rank_q, rank_k,
    )  # fmt: skip
    settings: dict[str, Any] = {
        "scale": scale,
        **band._asdict(),
        "softcap": softcap or 0.0,
        "dropout_p": dropout_p,
        "weights": weights,
        "distance_zero": distance_zero,
        "position_zero": position_zero,
    }
    name = ""  # a compiled graph carries no choice: it is made when the graph runs
    if not torch.compiler.is_compiling():
        P = None if position_query is None else position_query.shape[-1]
        name = choose_attention(query, value, beyond, P).name
        if name == "reference" or (chosen() == "auto" and _transformed()):
            return reference.attention(*tensors, **settings | {"scale": attention_ops.scaling(scale, query)})
        if name == "torch" and gpu(query) and not beyond:
            out = Stock.apply(  # type: ignore[no-untyped-call]
                lambda q, k, v: (
                    F.scaled_dot_product_attention(q, k, v, is_causal=band.right == 0, scale=scale),
                ),
                lambda *t: reference.attention(*t, **settings | {"scale": attention_ops.scaling(scale, query)})[:1],
                *(t if t.shape[1] == query.shape[1] else t.repeat_interleave(query.shape[1] // t.shape[1], 1)
                  for t in (query, key, value)),
            )  # fmt: skip
            return out[0], None, None
    bias_gradient, distance_gradient = (
        t is not None and t.requires_grad and torch.is_grad_enabled() for t in (bias, distance)
    )
    return attention_ops.attention(
        scale, band.left, band.right, band.lower_right, settings["softcap"], dropout_p, max_q, max_k, weights,
        distance_zero, position_zero, bias_gradient, distance_gradient, *tensors, name,
    )  # fmt: skip


def _check(query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None) -> None:
    """The errors of torch's operator, in type."""
    for name, t in (("query", query), ("key", key), ("value", value), ("attn_mask", attn_mask), ("bias", bias)):
        required = name in ("query", "key", "value")
        if not isinstance(t, Tensor):
            if t is None and not required:
                continue
            raise TypeError(f"{name}: expected a Tensor, got {type(t).__name__}")
        if t.dim() < 2:
            kind = RuntimeError if required else IndexError
            raise kind(f"{name}: expected at least 2 dimensions, got {list(t.shape)}")
        if t.device != query.device:
            raise RuntimeError(f"{name}: expected device {query.device} as query, got {t.device}")
        if required and t.dtype != query.dtype and not autocasting(query.device.type):
            raise RuntimeError(f"{name}: expected {query.dtype} as query, got {t.dtype}")
    if not query.is_floating_point():
        raise RuntimeError(f"query: expected a floating dtype, got {query.dtype}")
    for name, t in (("attn_mask", attn_mask), ("bias", bias)):
        kinds = {torch.float32, query.dtype} | ({torch.bool} if name == "attn_mask" else set())
        if t is not None and t.dtype not in kinds and not (autocasting(query.device.type) and t.is_floating_point()):
            raise RuntimeError(f"{name}: expected {' or '.join(sorted(map(str, kinds)))}, got {t.dtype}")
    if query.shape[-1] != key.shape[-1]:
        raise RuntimeError(f"query, key: expected the same last dimension, got {_shapes(query, key, value)}")
    if key.shape[-2] != value.shape[-2]:
        raise RuntimeError(f"key, value: expected the same number of positions, got {_shapes(query, key, value)}")


def _shapes(*tensors: Tensor) -> str:
    return ", ".join(str(list(t.shape)) for t in tensors)


def _autocast(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """Under autocast everything is cast to its dtype, but for float64 and a bool mask."""
    device = query.device.type
    if not autocasting(device):
        return query, key, value, attn_mask, bias
    dtype = torch.get_autocast_dtype(device)

    def cast(t: Tensor | None) -> Any:
        return t.to(dtype) if t is not None and t.is_floating_point() and t.dtype != torch.float64 else t

    query, key, value, attn_mask, bias = (cast(t) for t in (query, key, value, attn_mask, bias))
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"query, key, value: expected one dtype, got {query.dtype}, {key.dtype}, {value.dtype}")
    return query, key, value, attn_mask, bias


def _four_dimensional(
    query: Tensor, key: Tensor, value: Tensor, enable_gqa: bool
) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[int, ...]]:
    """``[B, N, Q, D]``, ``[B, M, K, D]`` and ``[B, M, K, E]`` without a copy where views do, and what B stands for."""
    if query.dim() == key.dim() == value.dim() == 4 and query.shape[0] == key.shape[0] == value.shape[0]:
        N, M = query.shape[1], key.shape[1]
        if value.shape[1] == M and (N == M or (enable_gqa and M and N % M == 0)):
            return (query, key, value), (query.shape[0],)  # as in most calls there is nothing to broadcast
    q, k, v = (t if t.dim() > 2 else t[None] for t in (query, key, value))
    N, of_keys, of_values = q.shape[-3], k.shape[-3], v.shape[-3]
    try:
        lead = torch.broadcast_shapes(q.shape[:-3], k.shape[:-3], v.shape[:-3])
        if not enable_gqa:
            M = torch.broadcast_shapes((of_keys,), (of_values,))[0]
            N = torch.broadcast_shapes((N,), (M,))[0]
            q, k, v = q.expand(*q.shape[:-3], N, -1, -1), *(t.expand(*t.shape[:-3], M, -1, -1) for t in (k, v))
    except RuntimeError:
        raise RuntimeError(
            f"query, key, value: expected [..., N, Q, D], [..., M, K, D], [..., M, K, E], "
            f"got {_shapes(query, key, value)}"
        ) from None
    if enable_gqa and of_keys != N:
        if not of_keys or not of_values or N % of_keys or N % of_values:
            raise RuntimeError(f"key, value: expected a number of heads that divides {N}, got {of_keys}, {of_values}")
        if of_keys != of_values:  # as torch allows; the kernels serve both from one head
            k, v = (t.repeat_interleave(N // t.shape[-3], -3) for t in (k, v))
    if len(lead) == 1:
        q, k, v = (t if t.shape[:-3] == lead else t.expand(*lead, *t.shape[-3:]) for t in (q, k, v))
    else:
        q, k, v = (t.expand(*lead, *t.shape[-3:]).reshape(-1, *t.shape[-3:]) for t in (q, k, v))
    return (q, k, v), tuple(lead)


def _broadcastable(name: str, t: Tensor, scores: tuple[int, ...], of_query: int, of_key: int) -> Tensor:
    """A mask or bias as ``[B or 1, N or 1, Q or 1, K or 1]``."""
    full = t[(None,) * (len(scores) - t.dim())]
    fits = full.dim() == len(scores) and all(a in (1, b) for a, b in zip(full.shape, scores, strict=True))
    if not fits:
        raise RuntimeError(f"{name}: expected what broadcasts to {list(scores)}, got {list(t.shape)}")
    lead = scores[:-3]
    if len(lead) != 1:
        one = all(size == 1 for size in full.shape[: len(lead)])
        full = full.reshape(1, *full.shape[-3:]) if one else full.expand(*lead, -1, -1, -1).flatten(0, len(lead) - 1)
    return full


def _band(is_causal: bool, causal: str | None, window: int | tuple[int, int] | None) -> _Band:
    if causal is None and window is None:
        return _CAUSAL if is_causal else _ALL
    if causal not in (None, "upper_left", "lower_right"):
        raise ValueError(f"causal: expected 'upper_left', 'lower_right' or None, got {causal!r}")
    left, right = -1, -1
    if window is not None:
        left, right = _pair("window", (window, window) if isinstance(window, int) else window)
    if causal is None:
        return _Band(left, 0 if is_causal else right, window is not None and not is_causal)
    return _Band(left, 0, causal == "lower_right")


def _pair(name: str, window: Any) -> tuple[int, int]:
    fits = isinstance(window, (tuple, list)) and len(window) == 2
    if not fits or not all(isinstance(side, int) and side >= -1 for side in window):
        raise ValueError(f"{name}: expected whole numbers to the left and to the right, -1 or more, got {window!r}")
    return window[0], window[1]


def _check_numbers(scale: float | None, dropout_p: float, softcap: float | None) -> None:
    for name, number in (("scale", scale), ("dropout_p", dropout_p), ("softcap", softcap)):
        if isinstance(number, str):
            raise TypeError(f"{name}: expected a number, got {number!r}")
    if not 0.0 <= dropout_p <= 1.0:
        raise RuntimeError(f"dropout_p: expected a probability between 0 and 1, got {dropout_p}")
    if softcap is not None and not softcap > 0.0:
        raise ValueError(f"softcap: expected a positive number or None, got {softcap}")


def _weights(asked: bool | str) -> str:
    if asked not in (False, True, "each", "mean"):
        raise ValueError(f"return_weights: expected a bool, 'each' or 'mean', got {asked!r}")
    return "each" if asked is True else asked or ""


def _seed(seed: int | Tensor | None, dropout_p: float, device: torch.device) -> Tensor | None:
    if not dropout_p:
        return None
    if seed is None:
        return torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=device)
    if not isinstance(seed, (int, Tensor)):
        raise TypeError(f"seed: expected an int or an int64 Tensor, got {type(seed).__name__}")
    seed = torch.as_tensor(seed, dtype=torch.int64, device=device)
    if seed.numel() != 1:
        raise ValueError(f"seed: expected one number, got {list(seed.shape)}")
    return seed.reshape(1)
