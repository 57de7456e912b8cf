"""Combinations of the options of attention modules, the masks that go with them, and torch.nn as their oracle."""

import copy
import itertools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .modules_cases import Named

DTYPES = (torch.float32, torch.float64, torch.bfloat16)
ATTN_MASKS = ("none", "bool", "bool per head", "float", "float per head", "causal bool", "causal float")
PADDINGS = ("none", "bool", "float")


def cover(strength: int, values: dict[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Combinations among which any ``strength`` values of different options meet; the same ones every time."""
    draw = random.Random(0)
    left = {
        tuple(zip(names, chosen, strict=True))
        for names in itertools.combinations(values, strength)
        for chosen in itertools.product(*(values[name] for name in names))
    }
    while left:
        best: dict[str, Any] = {}
        met: set[Any] = set()
        wanted = min(left, key=str) if len(left) < 50 else draw.choice(tuple(itertools.islice(left, 50)))
        for _ in range(10):
            options = {name: draw.choice(some) for name, some in values.items()} | dict(wanted)
            meets = left.intersection(itertools.combinations(options.items(), strength))
            if len(meets) > len(met):
                best, met = options, meets
        left -= met
        yield best


def draw_mask(kind: str, B: int, N: int, L: int, S: int) -> Tensor | None:
    """What torch.nn.MultiheadAttention takes for attn_mask; no query loses sight of the first key."""
    if kind == "none":
        return None
    if kind.startswith("causal"):
        hidden = torch.ones(L, S, dtype=torch.bool).triu(1)
        return hidden if kind.endswith("bool") else torch.zeros(L, S).masked_fill(hidden, -torch.inf)
    shape = (B * N, L, S) if kind.endswith("per head") else (L, S)
    hidden = torch.rand(shape) < 0.4
    hidden[..., 0] = False
    return hidden if kind.startswith("bool") else rounded(shape).masked_fill(hidden, -torch.inf)


def draw_padding(kind: str, B: int, S: int) -> Tensor | None:
    """What torch.nn.MultiheadAttention takes for key_padding_mask: rows of unequal length, never of none."""
    if kind == "none":
        return None
    hidden = torch.arange(S) > torch.arange(B)[:, None] % S
    hidden[0] = False
    return hidden if kind == "bool" else rounded((B, S)).masked_fill(hidden, -torch.inf)


def rounded(shape: Sequence[int]) -> Tensor:
    """Values that bfloat16 holds exactly, so that all dtypes see the same."""
    return torch.randn(tuple(shape)).bfloat16().float()


def run(module: nn.Module, leaves: Named, call: Callable[[nn.Module, Named], Any]) -> Named:
    """The outputs of the call and the gradients of its floating leaves and the parameters, by name."""
    like = next(module.parameters())
    own = {k: t.detach().to(like).requires_grad_() if t.is_floating_point() else t for k, t in leaves.items()}
    result = call(module, own)
    pair = result if isinstance(result, tuple) else (result,)
    outputs = {k: t for k, t in zip(("output", "weights"), pair, strict=False) if t is not None}
    wanted = {k: t for k, t in own.items() if t.requires_grad} | dict(module.named_parameters())
    torch.manual_seed(2)
    cotangents = [rounded(o.shape).to(o) for o in outputs.values()]
    found = torch.autograd.grad(list(outputs.values()), list(wanted.values()), cotangents, allow_unused=True)
    gradients = {f"gradient of {k}": g for k, g in zip(wanted, found, strict=True) if g is not None}
    return {k: t.detach() for k, t in (outputs | gradients).items()}


def exact_and_peer(module: nn.Module, leaves: Named, call: Callable[[nn.Module, Named], Any]) -> tuple[Named, Named]:
    """torch in float64, and torch in the module's dtype, whose error the budget goes by.

    torch's own rounding in float64 cannot be seen from float64: it is that of float32, less by the ratio of the
    units of rounding.
    """
    exact = run(copy.deepcopy(module).double(), leaves, call)
    if next(module.parameters()).dtype != torch.float64:
        return exact, run(module, leaves, call)
    ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
    single = run(copy.deepcopy(module).float(), leaves, call)
    return exact, {k: e + (single[k].double() - e) * ratio for k, e in exact.items()}
