"""Lets ``torch.compile`` trace into our recurrent modules without a graph break.

Dynamo refuses instances of ``torch.nn.RNN``, ``LSTM`` and ``GRU``, subclasses included, before it looks at what
they do (``torch._dynamo.config.allow_rnn``; pytorch/pytorch#158007, #167275), because PyTorch's own operators
would unroll over time. Ours are opaque operators that trace in one node. The permission is given to our types
alone and nothing else is changed; Dynamo takes seconds to import, so it is given when somebody imports it.
"""

import importlib.abc
import importlib.machinery
import importlib.util
import sys
import weakref
from collections.abc import Iterable, Sequence
from types import ModuleType
from typing import Any

import torch

_BUILDER = "torch._dynamo.variables.builder"
_types: weakref.WeakSet[type[torch.nn.Module]] = weakref.WeakSet()  # parametrisations make classes by the dozen


def trace(cls: type[torch.nn.Module]) -> None:
    """Have Dynamo trace into this type: now if it is loaded, else as soon as it is."""
    _types.add(cls)
    builder = sys.modules.get(_BUILDER)
    if builder is not None:
        _permit(builder, [cls])


def _permit(builder: Any, types: Iterable[type[torch.nn.Module]]) -> None:
    def wrap(self: Any, value: torch.nn.Module) -> Any:
        import torch._dynamo.config

        with torch._dynamo.config.patch(allow_rnn=True):
            return self.wrap_module(value)

    builder.VariableBuilder._type_dispatch().update(dict.fromkeys(types, wrap))


class _Loader(importlib.abc.Loader):
    """The module's own loader, and our permission after it."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self.loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        _permit(module, _types)


class _Watch(importlib.abc.MetaPathFinder):
    """Waits for the one module to be imported, then is gone."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != _BUILDER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader)
        return spec


if _BUILDER not in sys.modules:
    sys.meta_path.insert(0, _Watch())
