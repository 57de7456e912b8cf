"""Which implementation runs: the user's choice, the automatic one, and the reason for either."""

import contextvars
import functools
import importlib.util
import inspect
from collections.abc import Callable
from contextlib import ContextDecorator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._C._functorch import TransformType
from torch.autograd import forward_ad

IMPLEMENTATIONS = ("triton", "torch", "reference")

_chosen: contextvars.ContextVar[str] = contextvars.ContextVar("fastseq.implementation", default="auto")
chosen = _chosen.get

# How many `use` blocks by name are open anywhere. Dynamo cannot read a context variable, but it can guard a number:
# a compiled graph asks this, and makes the choice itself, in its own context, when it runs.
named = 0

_T = TypeVar("_T")


class Unsupported(RuntimeError):  # noqa: N818  (a refusal, not a failure: the name says so)
    """Raised when the implementation named by :class:`use` cannot do what was asked; the text says why.

    Example:
        >>> import torch, fastseq
        >>> with fastseq.use("triton"):
        ...     try:
        ...         fastseq.LSTM(4, 8).double()(torch.randn(5, 2, 4).double())
        ...     except fastseq.Unsupported as refusal:
        ...         print("refused")
        refused
    """


class use(ContextDecorator):  # noqa: N801  (reads as a verb: `with fastseq.use("triton"):`)
    """Choose the implementation for the calls inside: ``"auto"``, ``"triton"``, ``"torch"`` or ``"reference"``.

    A named implementation is obeyed or refused with :class:`Unsupported`; only ``"auto"`` falls back. The choice
    is a context variable: local to a thread and to an asynchronous task, and nestable. Also a decorator.

    Raises:
        ValueError: the name is none of the four.

    Example:
        >>> import torch, fastseq
        >>> rnn, x = fastseq.GRU(4, 8), torch.randn(5, 2, 4)
        >>> with fastseq.use("reference"):
        ...     y, h = rnn(x)
    """

    def __init__(self, name: str) -> None:
        if name not in ("auto", *IMPLEMENTATIONS):
            raise ValueError(f"name: expected 'auto', 'triton', 'torch' or 'reference', got {name!r}")
        self.name = name
        self._tokens: list[contextvars.Token[str]] = []

    def __enter__(self) -> "use":
        global named
        named += self.name != "auto"
        self._tokens.append(_chosen.set(self.name))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        global named
        named -= self.name != "auto"
        _chosen.reset(self._tokens.pop())

    def __call__(self, function: _T) -> _T:
        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def awaited(*args: Any, **kwargs: Any) -> Any:
                with use(self.name):  # a task has a context of its own
                    return await function(*args, **kwargs)

            return awaited  # type: ignore[return-value]
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            raise TypeError("use: cannot decorate a generator, whose caller would share the choice; write it inside")

        @functools.wraps(function)  # type: ignore[arg-type]
        def inside(*args: Any, **kwargs: Any) -> Any:
            with use(self.name):  # an object of its own per call: threads may share the decorated function
                return function(*args, **kwargs)  # type: ignore[operator]

        return inside  # type: ignore[return-value]


@dataclass(frozen=True)
class Choice:
    """The implementation that runs, why, and why the others do not."""

    name: str
    reason: str
    others: tuple[tuple[str, str], ...] = ()

    def __str__(self) -> str:
        return "\n".join([f"{self.name}: {self.reason}", *(f"  not {name}: {why}" for name, why in self.others)])


def choose(refusals: dict[str, Callable[[], str | None]], fastest: Callable[[], tuple[str, str]]) -> Choice:
    """Obey the user's choice or refuse it; under ``auto`` take the fastest that does not refuse.

    ``refusals`` gives for each implementation a function that returns None or the sentence why it cannot;
    ``fastest`` returns the preferred implementation and the reason.
    """
    name = chosen()
    if name != "auto":
        refusal = refusals[name]()
        if refusal is not None:
            raise Unsupported(f"{name}: {refusal}")
        return Choice(name, f"asked for by use({name!r})")
    preferred, reason = fastest()
    others: list[tuple[str, str]] = []
    for candidate in (preferred, *(n for n in IMPLEMENTATIONS if n != preferred)):
        refusal = refusals[candidate]()
        if refusal is None:
            why = reason if candidate == preferred else "the fastest that can"
            return Choice(candidate, why, tuple(others))
        others.append((candidate, refusal))
    raise Unsupported("; ".join(f"{n}: {why}" for n, why in others))


@functools.cache
def _triton_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


def kernel_refusal(cell: str, *tensors: Tensor) -> str | None:
    """Why no recurrent kernel can run on these tensors, the input first; None if one can."""
    if not _triton_installed():
        return "triton is not installed"
    from .kernels.recurrent.plan import unsupported

    first = tensors[0]
    sizes = (size for tensor in tensors for size in tensor.shape)
    return unsupported(cell, first.dtype, first.device, *sizes)  # type: ignore[no-any-return]


def attention_refusal(query: Tensor, value: Tensor, P: int | None = None) -> str | None:
    """Why no attention kernel can run on these tensors, with relative positions of width P; None if one can."""
    if not _triton_installed():
        return "triton is not installed"
    from .kernels.attention.plan import unsupported

    return unsupported(query.dtype, query.device, query.shape[-1], value.shape[-1], P)  # type: ignore[no-any-return]


def gpu(tensor: Tensor) -> bool:
    """Whether the tensor lives where our kernels are compiled for: CUDA, or ROCm under the same name."""
    return tensor.device.type == "cuda"


def transformed() -> bool:
    """Whether torch.func or forward-mode differentiation looks on; costs a tenth of a microsecond."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def transforms() -> tuple[bool, bool]:
    """Whether torch.func maps here over examples, and whether forward mode differentiates."""
    forward = forward_ad._current_level >= 0
    if not torch._C._are_functorch_transforms_active():
        return False, forward
    kinds = [interpreter.key() for interpreter in torch._C._functorch.get_interpreter_stack() or ()]
    return TransformType.Vmap in kinds, forward or TransformType.Jvp in kinds


def _explain_default(*args: Any, **kwargs: Any) -> Choice:
    raise TypeError(
        f"module: expected a fastseq module, got {type(args[0]).__name__ if args else 'nothing'}"
        " (fastseq.swap turns a torch.nn module into one)"
    )


def explain(module: torch.nn.Module, *inputs: Any, **keywords: Any) -> Choice:
    """Say which implementation ``module(*inputs, **keywords)`` would run, and why; nothing is computed.

    Args:
        module: a fastseq module.
        inputs, keywords: what the module would be called with.

    Returns:
        A :class:`Choice`, whose text is a line for the choice and a line for each implementation passed over.

    Raises:
        TypeError: the module is not one of fastseq's.
        Unsupported: ``use`` names an implementation that refuses.

    Example:
        >>> import torch, fastseq
        >>> print(fastseq.explain(fastseq.LSTM(4, 8), torch.randn(5, 2, 4)))
        torch: on the CPU PyTorch's own operator is the fastest
    """
    method: Callable[..., Choice] = getattr(module, "_explain", functools.partial(_explain_default, module))
    return method(*inputs, **keywords)
