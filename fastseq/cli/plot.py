"""The plots of `fastseq compare`. matplotlib is optional; without it one line says so."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fastseq.cli.equality import Equality
from fastseq.cli.show import show_text
from fastseq.stopwatch import Race

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["loss_figure", "model_figure", "save_plot"]

COLOURS = {"torch": "#7a7a7a", "fastseq": "#d1495b"}
AGAIN = "#c9c9c9"


def save_plot(draw: Callable[[], Figure], path: Path) -> bool:
    """Draw and save as PNG; the result says whether there is a plot."""
    try:
        figure = draw()
    except ImportError:
        show_text("plot: none, matplotlib is not installed (it is in the extra fastseq-kernels[bench])")
        return False
    figure.savefig(path, dpi=120)
    show_text(f"plot: {path}")
    return True


def loss_figure(
    losses: Mapping[str, Sequence[float]], tolerance: Sequence[float], race: Race, title: str
) -> Callable[[], Figure]:
    """Return a function that draws loss curves, their difference under the tolerance, and times per step."""

    def draw() -> Figure:
        figure, (curves, gaps, times) = _canvas(title, (5, 5, 3))
        curves.plot(losses["torch"], color=COLOURS["torch"], linewidth=4, alpha=0.5, label="torch")
        curves.plot(losses["fastseq"], color=COLOURS["fastseq"], linewidth=1, label="fastseq")
        curves.set(title="Loss", xlabel="step", ylabel="nats per character")
        curves.legend(frameon=False)

        gap = [abs(a - b) for a, b in zip(losses["fastseq"], losses["torch"], strict=True)]
        gaps.plot(tolerance, color="black", linestyle="--", linewidth=1, label="tolerance")
        if any(gap):
            gaps.plot(gap, color=COLOURS["fastseq"], linewidth=1, label="|fastseq − torch|")
        else:
            gaps.text(0.5, 0.5, "|fastseq − torch| = 0\nat every step", ha="center", transform=gaps.transAxes)
        gaps.set(title="Difference of the losses", xlabel="step", yscale="log")
        gaps.legend(frameon=False)

        _bars(times, race, "ms per training step")
        return figure

    return draw


def model_figure(equality: Equality, races: Mapping[str, Race]) -> Callable[[], Figure]:
    """Return a function that draws each tensor's error as a share of its budget, and the times."""

    def draw() -> Figure:
        figure, (shares, *rest) = _canvas("The swapped model against torch.nn", (5, *[3] * len(races)))
        values = sorted(check.error / check.budget if check.budget > 0 else 0.0 for check in equality.checks)
        shares.plot(values, marker=".", linestyle="none", color=COLOURS["fastseq"])
        shares.axhline(1.0, color="black", linestyle="--", linewidth=1)
        shares.set(title="Error / budget", xlabel="outputs and gradients, sorted", ylim=(0, None))
        for axes, (name, race) in zip(rest, races.items(), strict=True):
            _bars(axes, race, f"ms, {name}")
        return figure

    return draw


def _canvas(title: str, widths: Sequence[int]) -> tuple[Figure, list[Axes]]:
    # Not pyplot: that would choose a window system and keep the figure alive.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(sum(widths), 3.8), layout="constrained")
    figure.suptitle(title)
    grid = figure.add_gridspec(1, len(widths), width_ratios=list(widths))
    panels = [figure.add_subplot(grid[0, column]) for column in range(len(widths))]
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    return figure, panels


def _bars(axes: Axes, race: Race, title: str) -> None:
    """Draw median times with their quartiles and, as text, the ratio against the peer."""
    for position, row in enumerate(race.rows()):
        ms = row.ms
        errors = [[ms.median - ms.lower], [ms.upper - ms.median]]
        axes.bar(position, ms.median, 0.7, yerr=errors, color=COLOURS.get(row.name, AGAIN), capsize=4)
        if row.name != race.peer:
            axes.text(position, ms.median / 2, f"× {row.ratio.median:.2f}", ha="center", va="center")
    names = [row.name.replace(" ", "\n", 1) for row in race.rows()]
    axes.set_xticks(range(len(names)), names)
    axes.set_title(title)
