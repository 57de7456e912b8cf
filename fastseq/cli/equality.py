"""Whether two models compute the same: outputs and all gradients, within a computed budget."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

# torch has no public name for its trees yet; torch.func and torch.export are built on this one.
from torch.utils import _pytree as pytree

import fastseq
from fastseq.cli.show import Mistake, show_table, show_text

__all__ = ["Call", "Check", "Equality", "backward", "compare_models", "describe", "nudge_", "weights_for"]

SLACK = 2.0  # error against float64, as a multiple of torch's own
NUDGE_SLACK = 8.0  # one nudged run samples the effect of rounding once; this is its safety margin
SELF_SLACK = 100.0  # roundings by which torch may differ from itself (atomic adds in some CUDA kernels)
SEED = 0
ROWS_SHOWN = 12

Values = dict[str, Tensor | None]
_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True)
class Call:
    """What a model is called with."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)

    def map(self, change: Callable[[Tensor], Tensor]) -> Call:
        """Return a call with every tensor changed."""
        args, kwargs = pytree.tree_map_only(Tensor, change, (self.args, self.kwargs))
        return Call(args, kwargs)

    def to(self, device: torch.device) -> Call:
        """Return a call on a device; a PackedSequence moves as one: its batch sizes stay on the CPU."""
        args, kwargs = pytree.tree_map(
            # A PackedSequence types its `to` for dtypes only, but takes what a tensor takes.
            lambda leaf: leaf.to(device) if isinstance(leaf, (Tensor, PackedSequence)) else leaf,  # type: ignore[arg-type]
            (self.args, self.kwargs),
            is_leaf=lambda leaf: isinstance(leaf, PackedSequence),
        )
        return Call(args, kwargs)

    def tensors(self) -> list[Tensor]:
        """Return all tensors."""
        return [leaf for leaf in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(leaf, Tensor)]

    def fresh(self) -> Call:
        """Return a call with new tensors, all floating ones asking for a gradient."""
        return self.map(lambda t: t.detach().clone().requires_grad_(t.is_floating_point()))


@dataclass(frozen=True)
class Check:
    """One tensor of both sides: the largest difference, and what was allowed."""

    name: str
    difference: float  # max |fastseq - torch|
    error: float  # what the budget is for: max |fastseq - float64|, or the difference if there is no float64
    budget: float

    @property
    def identical(self) -> bool:
        return self.difference == 0.0

    @property
    def passed(self) -> bool:
        # NaN compares false, and an infinite budget (torch overflowed) allows nothing: both do not pass.
        return self.identical or self.error <= self.budget < math.inf


@dataclass(frozen=True)
class Equality:
    """The checks of all tensors, the rule of their budget, and complaints that are no matter of degree."""

    rule: str
    checks: tuple[Check, ...] = ()
    complaints: tuple[str, ...] = ()

    @property
    def passed(self) -> bool:
        return not self.complaints and all(check.passed for check in self.checks)

    def reasons(self) -> list[str]:
        """Return a sentence for everything that went wrong."""
        off = [f"{c.name}: off by {c.error:.2e}, budget {c.budget:.2e}" for c in self.checks if not c.passed]
        return [*self.complaints, *off]

    def record(self) -> dict[str, object]:
        """Return everything as plain data for a JSON file."""
        checks = [asdict(check) | {"passed": check.passed} for check in self.checks]
        verdict = {"passed": self.passed, "complaints": list(self.complaints)}
        return {"rule": self.rule, **verdict, "checks": checks}


def compare_models(peer: nn.Module, ours: nn.Module, call: Call) -> Equality:
    """Compare outputs and gradients of two models with equal parameters; neither model is changed.

    The gradients are those of a weighted sum of all outputs, to every parameter and every floating input.
    Where the model also runs in float64, an error is measured against that and may be twice torch's own (plus
    one rounding of the largest value); else the difference from torch may be what nudging every weight and
    input by one rounding does, times eight.

    Raises Mistake where torch's own side fails, or where the implementation asked for refuses.
    """
    try:
        values = evaluate(peer, call)
        again = evaluate(peer, call)
    except Exception as error:
        raise Mistake(f"the model fails with torch.nn alone: {type(error).__name__}: {error}") from error
    if not any(name.startswith("output") for name in values):
        raise Mistake("the model returns no tensor that could be compared")
    try:
        got = evaluate(ours, call)
    except fastseq.Unsupported as refusal:
        raise Mistake(str(refusal)) from refusal
    except Exception as error:
        return Equality("", (), (f"the swapped model raised {type(error).__name__}: {error}",))

    exact, rule = _exact_values(peer, call, values)
    moved = {} if exact is not None else evaluate(nudge_(copy.deepcopy(peer), SEED), call.map(_nudged))
    checks, complaints = [], _structure(values, got)
    for name, value in values.items():
        own = got.get(name)
        if value is None or own is None or own.shape != value.shape or own.dtype != value.dtype:
            continue  # _structure has complained where it must
        itself = _largest(value, again.get(name))
        if not itself <= SELF_SLACK * _rounding(value):
            complaints.append(
                f"{name}: torch.nn differs from itself when run twice, by {itself:.2e}:"
                " a random model cannot be compared"
            )
        target = exact[name] if exact is not None else value
        assert target is not None  # same keys, same gaps: _exact_values has checked
        if not value.is_floating_point():
            budget = 0.0  # indices and lengths are the same or wrong
        elif exact is not None:
            budget = SLACK * (_largest(value, target) + _rounding(target, value.dtype))
        else:
            budget = NUDGE_SLACK * (_largest(value, moved.get(name)) + _rounding(value))
        checks.append(Check(name, _largest(own, value), _largest(own, target), budget))
    return Equality(rule, tuple(checks), tuple(complaints))


def evaluate(model: nn.Module, call: Call) -> Values:
    """Return outputs and gradients by name. Works on a copy: a forward may change buffers."""
    model = copy.deepcopy(model)
    model.zero_grad(set_to_none=True)
    call = call.fresh()
    torch.manual_seed(SEED)  # dropout then drops the same on both sides, where both draw the same way
    outputs = model(*call.args, **call.kwargs)
    values: Values = {name: value.detach() for name, value in _named("output", outputs).items()}
    if not _differentiable(outputs):
        return values
    backward(outputs, weights_for(outputs))
    for name, parameter in model.named_parameters():
        values[f"gradient of {name}"] = parameter.grad
    for name, value in _named("input", (*call.args, call.kwargs) if call.kwargs else call.args).items():
        if value.is_floating_point():
            values[f"gradient of {name}"] = value.grad
    return values


def weights_for(outputs: object) -> list[Tensor]:
    """Return weights of ±1/2 and ±1 for every differentiable output, the same for the same shapes.

    A plain sum would not see a softmax or a LayerNorm at the end; these weights are exact in every dtype.
    """
    generator = torch.Generator().manual_seed(SEED)
    levels = torch.tensor([-1.0, -0.5, 0.5, 1.0])
    return [levels[torch.randint(4, y.shape, generator=generator)].to(y) for y in _differentiable(outputs)]


def backward(outputs: object, weights: Sequence[Tensor]) -> None:
    """Backpropagate the weighted sum of all differentiable outputs."""
    torch.autograd.backward(_differentiable(outputs), weights)


@torch.no_grad()
def nudge_(model: _M, seed: int, rounding: float | None = None) -> _M:
    """Move every weight by one rounding, up or down at random: what this changes, rounding may change.

    `rounding` is relative; default: the eps of the weight's dtype.
    """
    for parameter in model.parameters():
        parameter.copy_(_nudged(parameter, seed, rounding))
    return model


def describe(equality: Equality) -> None:
    """Print the checks to stdout: those that failed, then those nearest to their budget."""
    if equality.checks:

        def share(check: Check) -> float:
            return check.error / check.budget if check.budget > 0 else 0.0

        ranked = sorted(equality.checks, key=lambda check: (check.passed, -share(check)))
        rows = [
            [c.name, f"{c.difference:.2e}", f"{c.error:.2e}", f"{c.budget:.2e}",
             "identical" if c.identical else "within" if c.passed else "MISMATCH"]
            for c in ranked[:ROWS_SHOWN]
        ]  # fmt: skip
        show_table("Outputs and gradients", ["", "max |fastseq − torch|", "error", "budget", ""], rows)
        if len(ranked) > len(rows):
            show_text(f"… and {len(ranked) - len(rows)} more, nearer to torch; all are in the record.")
        show_text(f"Budget: {equality.rule}.")
    for reason in equality.reasons():
        show_text(f"mismatch: {reason}", style="bold red")


def _exact_values(peer: nn.Module, call: Call, values: Values) -> tuple[Values | None, str]:
    """Return torch's values in float64 and the rule they give, or None and the other rule."""
    if any(tensor.dtype == torch.float64 for tensor in (*peer.parameters(), *call.tensors())):
        why = "the model is in float64 already"
    else:
        try:
            doubled = call.map(lambda t: t.double() if t.is_floating_point() else t)
            exact = evaluate(copy.deepcopy(peer).double(), doubled)
            if not _structure(values, exact, dtypes=False):
                return exact, f"error against float64 at most {SLACK:g} x torch's own, plus one rounding"
            why = "in float64 its outputs have another shape"
        except Exception as error:  # any operator may lack float64; the reason goes into the record
            why = f"it does not run in float64 ({type(error).__name__}: {' '.join(str(error).split())[:120]})"
    return None, (
        f"difference from torch at most {NUDGE_SLACK:g} x the effect of nudging every weight and input by one"
        f" rounding, since {why}"
    )


def _structure(values: Values, got: Values, *, dtypes: bool = True) -> list[str]:
    """Return a sentence for every difference in names, shapes and dtypes."""
    complaints = [f"{name}: only torch.nn has it" for name in values if name not in got]
    complaints += [f"{name}: only the swapped model has it" for name in got if name not in values]
    for name in values.keys() & got.keys():
        value, own = values[name], got[name]
        if value is None or own is None:
            if value is not own:
                without = "torch.nn" if value is None else "the swapped model"
                complaints.append(f"{name}: {without} gives none")
        elif own.shape != value.shape:
            complaints.append(f"{name}: shape {list(own.shape)}, torch.nn gives {list(value.shape)}")
        elif dtypes and own.dtype != value.dtype:
            complaints.append(f"{name}: {own.dtype}, torch.nn gives {value.dtype}")
    return complaints


def _differentiable(outputs: object) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(outputs) if isinstance(leaf, Tensor) and leaf.requires_grad]


def _named(root: str, tree: object) -> dict[str, Tensor]:
    leaves, _ = pytree.tree_flatten_with_path(tree)
    return {root + pytree.keystr(path): leaf for path, leaf in leaves if isinstance(leaf, Tensor)}


def _largest(one: Tensor, other: Tensor | None) -> float:
    """Return max |one - other|, 0 for empty tensors, infinity where there is no other."""
    if other is None:
        return float("inf")
    one, other = one.detach().cpu().double(), other.detach().cpu().double()  # not every device has float64
    gap = (one - other).abs()
    # Equal infinities and NaN in the same place are agreement, not a NaN difference.
    gap = gap.masked_fill(torch.isclose(one, other, rtol=0, atol=0, equal_nan=True), 0.0)
    return gap.max().item() if gap.numel() else 0.0


def _rounding(value: Tensor, dtype: torch.dtype | None = None) -> float:
    """Return one rounding of the largest finite value, at the value's dtype unless another is given."""
    if not value.is_floating_point() or not value.numel():
        return 0.0
    finite = value.detach().cpu().double().nan_to_num(0.0, 0.0, 0.0)
    return torch.finfo(dtype or value.dtype).eps * finite.abs().max().item()


def _nudged(tensor: Tensor, seed: int = SEED, rounding: float | None = None) -> Tensor:
    if not tensor.is_floating_point():
        return tensor
    generator = torch.Generator(tensor.device).manual_seed(seed)
    up = torch.randint(2, tensor.shape, generator=generator, device=tensor.device)
    step = torch.finfo(tensor.dtype).eps if rounding is None else rounding
    return tensor * (1 + step * (2 * up - 1).to(tensor.dtype))
