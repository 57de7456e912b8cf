"""Who runs against whom, and the check that precedes the clock.

A case (``recurrent_cases.Recurrent``, ``attention_cases.Attention``) is a name and sizes. Its ``contest`` builds
torch's sides and ours over the same weights and inputs, and the exact result in float64. The pytest suites,
``auto.py`` and ``gpu.py`` all run these.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

import fastseq

Tensors = tuple[Tensor, ...]
MODES = ("forward", "train")


class Case(Protocol):
    """What the tools ask of a case, besides being a frozen dataclass of plain values."""

    kind: str
    dtype: str
    mode: str

    @property
    def name(self) -> str: ...

    @property
    def steps(self) -> int:
        """Steps in time that wait for one another; 1 where there are none."""

    @property
    def flops(self) -> float:
        """Multiplications and additions of the matrix products, those of the backward pass included."""

    @property
    def moved(self) -> float:
        """Bytes that must be read, where reading them is what costs; else 0."""

    @property
    def family(self) -> str:
        """What cases share when one that hangs on a GPU speaks for the others."""

    @property
    def needs(self) -> frozenset[str]:
        """Names of the kernels it runs, as ``barred.py`` calls them."""

    @property
    def features(self) -> frozenset[str]:
        """What it asks of these kernels; a test that fails with some of it bars those that ask for the same."""

    def compiled(self) -> "Case":
        """The smallest case for which the same kernels are compiled."""

    def contest(self, device: str, implementations: tuple[str, ...]) -> "Contest": ...


@dataclass
class Contest:
    """Callables that do the same work, torch's default first, and what they should compute.

    ``exact`` computes in float64 what a side returns, flattened. ``setups`` run before a side, untimed.
    ``cannot`` says of torch's other ways why they do not take part. Where torch's sides draw at random
    (dropout), ``stand_in`` is what torch's formula gives at the same dtype for our draw; then only ours is checked.
    ``facts`` go into the row.
    """

    case: Case
    sides: dict[str, Callable[[], Any]]
    exact: Callable[[], Tensors]
    explain: Callable[[], fastseq.Choice]
    ours: tuple[str, ...]
    setups: dict[str, Callable[[], object]] = field(default_factory=dict)
    cannot: dict[str, str] = field(default_factory=dict)
    stand_in: Callable[[], Any] | None = None
    rounding: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    _red: dict[str, str | None] = field(default_factory=dict)

    @property
    def peer(self) -> str:
        return next(iter(self.sides))

    @contextlib.contextmanager
    def context(self) -> Iterator[None]:
        """What every side runs in: entered around a whole race, so it is not part of the timing."""
        with torch.set_grad_enabled(self.case.mode == "train"):
            try:
                yield
            finally:
                self.set_up(self.peer)

    def set_up(self, side: str) -> None:
        if side in self.setups:
            self.setups[side]()

    def run(self, side: str) -> Any:
        """One call of a side, set up."""
        self.set_up(side)
        return self.sides[side]()

    def disagreement(self, side: str) -> str | None:
        """A sentence on where ``side`` misses the budget, or None: no side is timed before this says None."""
        if not self._red:
            checked = self.ours if self.stand_in else tuple(self.sides)
            self._red = dict.fromkeys(self.sides)
            with self.context():
                results = {name: flat(self.run(name)) for name in checked}
                peer = flat(self.stand_in()) if self.stand_in else results.pop(self.peer)
            exact = self.exact()
            self._red |= {name: outside_budget(result, exact, peer, self.rounding) for name, result in results.items()}
        return self._red[side]

    def drop_wrong_rivals(self) -> None:
        """Leave out, with the reason, what torch offers besides its default where it disagrees."""
        for name in [name for name in self.sides if name not in (*self.ours, self.peer)]:
            wrong = self.disagreement(name)
            if wrong is not None:
                self.cannot[name] = f"disagrees: {wrong}"
                del self.sides[name]


def outside_budget(
    got: Tensors, exact: Tensors, peer: Tensors, rounding: float = 0.0, slack: float = 2.0
) -> str | None:
    """Where ``got`` errs more than ``slack`` times what torch does at the same dtype plus one rounding.

    ``rounding`` is a relative one coarser than the dtype's, where products may be.
    """
    if len(got) != len(peer):
        return f"{len(got)} results, torch returns {len(peer)}"
    for i, (g, e, p) in enumerate(zip(got, exact, peer, strict=True)):
        if g.shape != p.shape or g.dtype != p.dtype:
            return f"result {i}: {g.dtype} {tuple(g.shape)}, torch {p.dtype} {tuple(p.shape)}"
        floor = max(rounding, torch.finfo(p.dtype).eps) * e.abs().max()
        theirs, error = (p.double() - e).abs().max(), (g.double() - e).abs().max()
        budget = slack * (theirs + floor)
        if not error <= budget:  # written so that NaN is outside
            return f"result {i}: off by {error:.2e}, torch by {theirs:.2e}, budget {budget:.2e}"
    return None


def flat(value: Any) -> Tensors:
    """The tensors of a nested result, detached, in order."""
    if isinstance(value, Tensor):
        return (value.detach(),)
    return tuple(t for v in value if v is not None for t in flat(v))


def implementations_of(run: Callable[[], Any], names: tuple[str, ...]) -> dict[str, Callable[[], Any]]:
    """Our sides: ``run`` under each implementation, where ``auto`` is called ``fastseq``."""
    return {
        ("fastseq" if name == "auto" else name): run if name == "auto" else fastseq.use(name)(run) for name in names
    }


def random(dtype: str, device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).to(getattr(torch, dtype))
