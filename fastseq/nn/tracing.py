"""What the older tracers, torch.fx and TorchScript, need to treat a class of ours as they treat torch.nn's."""

from typing import Any

import torch
from torch.fx import Proxy


class Traced(torch.nn.Module):
    """A leaf to torch.fx, and the torch.nn module itself to TorchScript."""

    def _extras(self) -> tuple[str, ...]:
        """The options in use that torch.nn's class lacks, so that it cannot take this module's place."""
        return ()

    def __prepare_scriptable__(self) -> torch.nn.Module:
        """TorchScript cannot compile our keywords and needs none of them: it gets the torch.nn module."""
        if not type(self).__module__.startswith(f"{__package__}.") or self._extras():
            return self  # somebody's subclass with a forward of its own, or what torch.nn cannot do
        base: Any = next(c for c in type(self).__mro__ if c.__module__.startswith("torch.nn.modules."))
        plain: torch.nn.Module = base.__new__(base)
        plain.__dict__.update(self.__dict__)
        return plain

    def _leaf(self, proxy: Proxy, *args: Any, **keywords: Any) -> Any:
        """torch.fx does not look inside torch.nn's modules, nor should it inside ours."""
        tracer: Any = proxy.tracer
        return tracer.create_proxy("call_module", tracer.path_of_module(self), (proxy, *args), keywords)
