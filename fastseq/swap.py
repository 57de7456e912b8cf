"""Turn the torch modules of any model into fastseq's, in place, and back.

A module of ``fastseq.nn`` adds methods to its ``torch.nn`` parent but no instance state, so a swap is a new
``__class__`` and nothing else. Parameters, tied weights, hooks, the training flag, device and dtype stay
because nothing touches them, and whoever holds the module (an optimizer, a DDP wrapper, another module) goes
on holding the same object. A compiled model recompiles by itself: Dynamo guards on the class.

A model that transformers built goes by the name of an attention implementation, which a swap changes; and some of its
modules make tensors as large as the scores before they ask for attention, or never ask: those get a class of
``fastseq.huggingface``. transformers is imported only if the model is one of its.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

import torch

from fastseq import huggingface
from fastseq.nn import REPLACEMENTS
from fastseq.nn.tracing import Traced

__all__ = ["Kept", "Report", "Swapped", "restore", "swap"]

ModuleClass = type[torch.nn.Module]

_ORIGINALS = {ours: theirs for theirs, ours in REPLACEMENTS.items()}
_NAMES = frozenset(kind.__name__ for kind in REPLACEMENTS)

# What transformers builds, by name, and the file of fastseq.huggingface where ours stands by the same name.
_REBUILT = {
    "transformers.models.mt5.modeling_mt5.MT5Attention": "t5",
    "transformers.models.t5.modeling_t5.T5Attention": "t5",
    "transformers.models.wav2vec2_conformer.modeling_wav2vec2_conformer.Wav2Vec2ConformerSelfAttention": "conformer",
    "transformers.models.xlnet.modeling_xlnet.XLNetRelativeAttention": "xlnet",
}
_BEFORE = "_attention_before_fastseq"  # the attribute of a swapped model that keeps the one it had


class Swapped(NamedTuple):
    """A module that was changed; named as in ``named_modules()``, so ``""`` is the model itself.

    Of a module whose class was changed the two classes, of a model of transformers, whose attention was, two texts:
    ``attention "sdpa"``.
    """

    name: str
    before: ModuleClass | str
    after: ModuleClass | str


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
    what it is among swapped ones.

    Of a model that transformers (5.15 or later) built the attention is set to fastseq's, as
    :func:`fastseq.huggingface.register` serves it, where the model lets it be chosen (BERT, GPT-2, Llama, T5 and most
    others); besides, T5 and mT5 get their position bias, and XLNet and the Wav2Vec2-Conformer their whole attention,
    without a tensor of positions as large as the scores.

    Left alone, and reported with the reason: subclasses, which may compute something else (derive them from
    ``fastseq.LSTM`` and its siblings); classes that torch made for one module (swap before parametrising or
    ``fully_shard``); modules whose ``forward`` was replaced on the instance; TorchScript and quantised modules; models
    of transformers that let no attention be chosen, or that need attention sinks.

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
    return _exchange(model, _ours, _to_fastseq)


def restore(model: torch.nn.Module) -> Report:
    """Give, in place, every fastseq module in ``model`` its former class back: the inverse of :func:`swap`.

    Concerns modules whose type is exactly one that ``swap`` gives, those that were built as such included; left
    alone, and reported, are those built with an option that torch lacks (``rotary``, say), and what holds them. A model
    of transformers gets back the attention that it had when it was swapped.

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
    return _exchange(model, _theirs, _from_fastseq)


_Counterpart = Callable[[ModuleClass], ModuleClass | None]
_Change = tuple[str, str, Callable[[], None]]  # before, after, the step


def _exchange(
    model: torch.nn.Module, counterpart: _Counterpart, of_attention: Callable[[Any], _Change | str | None]
) -> Report:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    changes: list[tuple[Swapped, Callable[[], None]]] = []
    kept: list[Kept] = []
    configurations: set[int] = set()  # one may serve a model and the model within it
    for name, module in model.named_modules():
        before, after = type(module), counterpart(type(module))
        reason = _why_not(module, counterpart)
        if reason is not None:
            kept.append(Kept(name, before, reason))
        elif after is not None:
            changes.append((Swapped(name, before, after), partial(setattr, module, "__class__", after)))
        elif _built_by_transformers(before) and id(module.config) not in configurations:
            configurations.add(id(module.config))
            change = of_attention(module)
            if isinstance(change, str):
                kept.append(Kept(name, before, change))
            elif change is not None:
                changes.append((Swapped(name, *change[:2]), change[2]))
    # The whole plan stands before the first assignment: a failure above leaves the model as it was.
    for _, step in changes:
        step()
    return Report(tuple(change for change, _ in changes), tuple(kept))


def _ours(kind: ModuleClass) -> ModuleClass | None:
    """The class that takes the place of this one."""
    file = _REBUILT.get(_full_name(kind))
    if file is None:
        return REPLACEMENTS.get(kind)
    return getattr(import_module(f"{huggingface.__name__}.{file}"), kind.__name__)  # type: ignore[no-any-return]


def _theirs(kind: ModuleClass) -> ModuleClass | None:
    """The class in whose place this one is."""
    if kind.__module__.startswith(f"{huggingface.__name__}."):
        return next(base for base in kind.__mro__ if _full_name(base) in _REBUILT)
    return _ORIGINALS.get(kind)


def _full_name(kind: type) -> str:
    return f"{kind.__module__}.{kind.__name__}"


def _built_by_transformers(kind: ModuleClass) -> bool:
    """Whether this is a model of transformers, which need not be installed."""
    return any(_full_name(base) == "transformers.modeling_utils.PreTrainedModel" for base in kind.__mro__)


def _to_fastseq(model: Any) -> _Change | str | None:
    """How the attention of a model of transformers becomes ours, or why it does not."""
    before = model.config._attn_implementation
    if before == huggingface.NAME:
        return "its attention is already fastseq's"
    if not model._can_set_attn_implementation():
        # XLNet's modules are turned one by one: then there is nothing to tell of the model.
        turned = any(_ours(type(part)) or _theirs(type(part)) for part in model.modules())
        return None if turned else "transformers lets no attention be chosen for it"
    if any("sinks" in part._parameters for part in model.modules()):
        return "attention sinks: not what fastseq's attention does"
    try:
        huggingface.register()
    except ImportError as too_old:
        return str(too_old)

    def step() -> None:
        setattr(model, _BEFORE, before)
        model.set_attn_implementation({"": huggingface.NAME})

    return _attention(before), _attention(huggingface.NAME), step


def _from_fastseq(model: Any) -> _Change | str | None:
    """How it gets back the attention that it had."""
    if model.config._attn_implementation != huggingface.NAME:
        return None
    before = vars(model).get(_BEFORE)
    if before is None:
        return "its attention was not set to fastseq's by a swap of this module"

    def step() -> None:
        model.set_attn_implementation({"": before})
        delattr(model, _BEFORE)

    return _attention(huggingface.NAME), _attention(before), step


def _attention(name: str) -> str:
    return f'attention "{name}"'


def _why_not(module: torch.nn.Module, counterpart: _Counterpart) -> str | None:
    """Why ``module`` is left alone; None if nothing stands in the way, or if it is no kin of what has a counterpart."""
    kind = type(module)
    if counterpart(kind) is not None:
        # accelerate and make_graphed_callables do this: the instance would go on running the old function.
        if "forward" in vars(module):
            return "its forward was replaced on the instance"
        extras = {e for part in module.modules() if isinstance(part, Traced) for e in part._extras()}
        return f"torch.nn has no {', '.join(sorted(extras))}" if extras and kind in _ORIGINALS else None
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript: its code is fixed" if module.original_name in _NAMES else None
    if kind.__module__.startswith("torch.ao.") and kind.__name__ in _NAMES:
        return "quantised: its weights and arithmetic differ"
    if _theirs(kind) is not None:
        return "already fastseq's"
    relative = next((base for base in kind.__mro__ if base in REPLACEMENTS or base in _ORIGINALS), None)
    if relative is None:
        return None
    if relative is kind:
        return "already torch's"
    if kind.__module__.startswith("torch."):
        return f"a class made for this one module from {_label(relative)} by {kind.__module__}"
    return f"a subclass of {_label(relative)}, which may compute something else"


def _label(kind: ModuleClass | str) -> str:
    """The name under which a user imports the type."""
    if isinstance(kind, str):
        return kind
    if kind in REPLACEMENTS:
        return f"torch.nn.{kind.__name__}"
    if kind in _ORIGINALS:
        return f"fastseq.{kind.__name__}"
    return f"{kind.__module__}.{kind.__qualname__}"
