"""Turn the torch modules of any model into fastseq's, in place, and back.

A module of ``fastseq.nn`` adds methods to its ``torch.nn`` parent but no instance state, so a swap is a new
``__class__`` and nothing else. Parameters, tied weights, hooks, the training flag, device and dtype stay
because nothing touches them, and whoever holds the module (an optimizer, a DDP wrapper, another module) goes
on holding the same object. A compiled model recompiles by itself: Dynamo guards on the class.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch

from fastseq.nn import REPLACEMENTS
from fastseq.nn.tracing import Traced

__all__ = ["Kept", "Report", "Swapped", "restore", "swap"]

ModuleClass = type[torch.nn.Module]

_ORIGINALS = {ours: theirs for theirs, ours in REPLACEMENTS.items()}
_NAMES = frozenset(kind.__name__ for kind in REPLACEMENTS)


class Swapped(NamedTuple):
    """A module whose class was changed; named as in ``named_modules()``, so ``""`` is the model itself."""

    name: str
    before: ModuleClass
    after: ModuleClass


class Kept(NamedTuple):
    """A module that is akin to a replaceable one but was left alone, and why."""

    name: str
    type: ModuleClass
    reason: str


@dataclass(frozen=True)
class Report:
    """What :func:`swap` or :func:`restore` did: its length counts the changed modules, its text is a table.

    Modules that fastseq has nothing like (a ``Linear``, say) are not mentioned. A module that is reached by several
    names is mentioned once, by the first.

    Example:
        >>> import torch, fastseq
        >>> print(fastseq.swap(torch.nn.Sequential(torch.nn.GRU(2, 3))))
        0  torch.nn.GRU  -> fastseq.GRU
        1 swapped, 0 kept
    """

    swapped: tuple[Swapped, ...]
    kept: tuple[Kept, ...]

    def __len__(self) -> int:
        return len(self.swapped)

    def __str__(self) -> str:
        rows = [(name, _label(before), f"-> {_label(after)}") for name, before, after in self.swapped]
        rows += [(name, _label(kind), f"kept: {reason}") for name, kind, reason in self.kept]
        if not rows:
            return f"nothing to swap: no {', '.join(kind.__name__ for kind in REPLACEMENTS)}"
        rows = [(name or "(the model)", kind, outcome) for name, kind, outcome in rows]
        name_width, kind_width = (max(len(row[column]) for row in rows) for column in (0, 1))
        lines = [f"{name:{name_width}}  {kind:{kind_width}}  {outcome}" for name, kind, outcome in rows]
        return "\n".join([*lines, f"{len(self.swapped)} swapped, {len(self.kept)} kept"])


def swap(model: torch.nn.Module) -> Report:
    """Turn, in place, every module in ``model`` that fastseq has an equal of into fastseq's.

    Concerns modules whose type is exactly ``torch.nn.RNN``, ``LSTM``, ``GRU``, ``RNNCell``, ``LSTMCell``,
    ``GRUCell``, ``MultiheadAttention``, ``Transformer`` or one of its encoders, decoders and layers, wherever they
    are registered, ``model`` itself included. A ``Transformer`` is swapped part by part, so a custom layer stays
    what it is among swapped ones. Left alone, and reported with the reason: subclasses, which may compute something
    else (derive them from ``fastseq.LSTM`` and its siblings); classes that torch made for one module (swap before
    parametrising or ``fully_shard``); modules whose ``forward`` was replaced on the instance; TorchScript and
    quantised modules.

    ``isinstance(module, torch.nn.LSTM)`` stays true. :func:`restore` before tools that go by the exact type:
    ``torch.ao.quantization`` does not know a swapped module, ``torch.jit.script`` puts a torch module in its place.

    Args:
        model: any module, on any device, trained or not, compiled or not.

    Returns:
        A :class:`Report`: true if anything was swapped.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.

    Example:
        >>> import torch, fastseq
        >>> model = torch.nn.ModuleDict({"encoder": torch.nn.LSTM(8, 16), "head": torch.nn.Linear(16, 4)})
        >>> report = fastseq.swap(model)
        >>> [module.name for module in report.swapped], isinstance(model["encoder"], fastseq.LSTM)
        (['encoder'], True)
    """
    return _exchange(model, REPLACEMENTS)


def restore(model: torch.nn.Module) -> Report:
    """Give, in place, every fastseq module in ``model`` its torch class back: the inverse of :func:`swap`.

    Concerns modules whose type is exactly one that ``swap`` gives, those that were built as such included; left
    alone, and reported, are those built with an option that torch lacks (``rotary``, say), and what holds them.

    Args:
        model: any module.

    Returns:
        A :class:`Report`: true if anything was restored.

    Raises:
        TypeError: ``model`` is not a ``torch.nn.Module``.

    Example:
        >>> import torch, fastseq
        >>> model = fastseq.GRU(8, 16)
        >>> len(fastseq.restore(model)), type(model) is torch.nn.GRU
        (1, True)
    """
    return _exchange(model, _ORIGINALS)


def _exchange(model: torch.nn.Module, table: Mapping[ModuleClass, ModuleClass]) -> Report:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    changes: list[tuple[torch.nn.Module, Swapped]] = []
    kept: list[Kept] = []
    for name, module in model.named_modules():
        before = type(module)
        reason = _why_not(module, table)
        if reason is not None:
            kept.append(Kept(name, before, reason))
        elif before in table:
            changes.append((module, Swapped(name, before, table[before])))
    # The whole plan stands before the first assignment: a failure above leaves the model as it was.
    for module, change in changes:
        module.__class__ = change.after
    return Report(tuple(change for _, change in changes), tuple(kept))


def _why_not(module: torch.nn.Module, table: Mapping[ModuleClass, ModuleClass]) -> str | None:
    """Why ``module`` is left alone; None if nothing stands in the way, or if it is no kin of the table."""
    kind = type(module)
    if kind in table:
        # accelerate and make_graphed_callables do this: the instance would go on running the old function.
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        extras = {e for part in module.modules() if isinstance(part, Traced) for e in part._extras()}
        return f"torch.nn has no {', '.join(sorted(extras))}" if extras and kind in _ORIGINALS else None
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript: its code is fixed" if module.original_name in _NAMES else None
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "quantised: its weights and arithmetic differ"
    relative = next((base for base in kind.__mro__ if base in REPLACEMENTS or base in _ORIGINALS), None)
    if relative is None:
        return None
    if relative is kind:
        return "already fastseq's" if kind in _ORIGINALS else "already torch's"
    if kind.__module__.startswith("torch."):
        return f"a class made for this one module from {_label(relative)} by {kind.__module__}"
    return f"a subclass of {_label(relative)}, which may compute something else"


def _label(kind: ModuleClass) -> str:
    """The name under which a user imports the type."""
    if kind in REPLACEMENTS:
        return f"torch.nn.{kind.__name__}"
    if kind in _ORIGINALS:
        return f"fastseq.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
