"""`fastseq compare`: a character language model, trained with torch.nn and swapped from the same seed."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path

import torch
from torch import Tensor

from fastseq.cli import plot
from fastseq.cli.characters import LAYERS, RATES, SEED, Characters, Corpus, Sizes, Training, sample
from fastseq.cli.compare import Settings, swapped_pair, switches
from fastseq.cli.equality import Call, compare_models, describe, nudge_
from fastseq.cli.show import folder, progress, show_race, show_text, write_record
from fastseq.stopwatch import Race, provenance, race

__all__ = ["LAYERS", "STEPS", "Verdict", "language", "verdict"]

STEPS = 300
WARMUP = 5  # steps that count for the loss but not for the time
SLACK = 8.0  # the nudged run samples the effect of rounding once; this is its safety margin
NUDGED = "torch, nudged"


@dataclass(frozen=True)
class Verdict:
    """Whether two loss curves agree: at each step, within the tolerance of that step."""

    rule: str
    max_difference: float
    tolerance: tuple[float, ...]
    reasons: tuple[str, ...]

    def record(self) -> dict[str, object]:
        """Return everything as plain data for a JSON file."""
        return asdict(self) | {"passed": not self.reasons}


def verdict(ours: Sequence[float], peer: Sequence[float], nudged: Sequence[float], rounding: float) -> Verdict:
    """Hold two loss curves against what rounding alone may do.

    Training magnifies rounding, so no fixed number can be the tolerance. `nudged` is the peer's run repeated
    with every weight moved by one rounding before each step; eight times as far as it has strayed is allowed.
    """
    strayed = accumulate((abs(a - b) for a, b in zip(nudged, peer, strict=True)), max)
    tolerance = tuple(SLACK * (s + rounding * abs(b)) for s, b in zip(strayed, peer, strict=True))
    gaps = [abs(a - b) for a, b in zip(ours, peer, strict=True)]
    # Not `gap > limit`: NaN must fail.
    failed = [k for k, (gap, limit) in enumerate(zip(gaps, tolerance, strict=True)) if not gap <= limit]
    reasons = []
    if not all(math.isfinite(loss) for curve in (ours, peer, nudged) for loss in curve):
        reasons.append("a loss is not finite")
    if failed:
        k = failed[0]
        reasons.append(
            f"losses differ at {len(failed)} of {len(gaps)} steps, first at step {k}:"
            f" by {gaps[k]:.2e}, tolerance {tolerance[k]:.2e}"
        )
    rule = (
        f"at each step at most {SLACK:g} x (how far torch.nn's own loss has strayed so far when every weight"
        f" is moved by one rounding, {rounding:.1e}, before each step, plus one rounding of the loss)"
    )
    return Verdict(rule, max(gaps), tolerance, tuple(reasons))


def language(cell: str, steps: int, settings: Settings, output: Path) -> bool:
    """Train the model on both sides, compare and time them; the result says whether they agree."""
    out, sizes, corpus = folder(output), Sizes(), Corpus()
    batches = corpus.batches(sizes, settings.device)
    torch.manual_seed(SEED)
    peer, ours, report = swapped_pair(Characters(cell, len(corpus.vocabulary), sizes).to(settings.device))
    show_text(
        f"{cell.upper()} {sizes.embedding} → {sizes.hidden}, T = {sizes.time}, B = {sizes.batch},"
        f" {steps} steps on {len(corpus.text):,} characters; {settings}"
    )
    show_text(str(report))
    show_text()

    record: dict[str, object] = {
        "settings": {
            "model": {"cell": cell, "vocabulary": len(corpus.vocabulary), **asdict(sizes)},
            "training": {"seed": SEED, "learning_rate": RATES[cell]},
            "text": {"source": "pydoc_data.topics", "characters": len(corpus.text)},
            "steps": steps, **settings.record(),
        },
        "swap": str(report).splitlines(),
    }  # fmt: skip
    with switches(settings):
        record["provenance"] = provenance(settings.device)
        equality = compare_models(peer, ours, Call((batches[0, :, :-1],)))
        describe(equality)
        record["equality"] = equality.record()
        reasons = equality.reasons()
        if equality.passed:  # no training and no speed on a mismatch
            losses, times = train(peer, ours, batches, steps, sizes, settings)
            judged = verdict(losses["fastseq"], losses["torch"], losses[NUDGED], settings.rounding)
            reasons += judged.reasons
            written = sample(ours, corpus)
            _show(losses, judged, times, written)
            title = f"{cell.upper()} character model, {settings}"
            plot.save_plot(plot.loss_figure(losses, judged.tolerance, times, title), out / "loss.png")
            record |= {"losses": losses, "loss_check": judged.record()}
            record |= {"times": times.record(), "sample": written}
    record["verdict"] = {"equal": not reasons, "reasons": reasons}
    write_record(out / "record.json", record)
    if not reasons:
        show_text("Equal: outputs, gradients and loss curves agree.", style="bold green")
    return not reasons


def train(
    peer: Characters, ours: Characters, batches: Tensor, steps: int, sizes: Sizes, settings: Settings
) -> tuple[dict[str, list[float]], Race]:
    """Train both models, and torch's once more under nudges, in turns; return losses and times."""
    runs = {
        "torch": Training(peer, batches, sizes),
        "fastseq": Training(ours, batches, sizes),
        NUDGED: Training(copy.deepcopy(peer), batches, sizes),
    }
    nudged = runs[NUDGED]
    warmup = min(WARMUP, steps - 1)
    with progress("training", steps) as advance:
        # The nudged run does the same work as torch's, so its times are also the measure of noise.
        times = race(
            {name: run.step for name, run in runs.items()},
            rounds=steps - warmup, calls=1, warmup=warmup, again=False, threads=settings.threads,
            setup={NUDGED: lambda: nudge_(nudged.model, SEED + len(nudged.losses), settings.rounding)},
            after_round=lambda k: advance(warmup + k + 1, f"loss {runs['torch'].losses[-1].item():.3f}"),
        )  # fmt: skip
    return {name: run.curve() for name, run in runs.items()}, times


def _show(losses: dict[str, list[float]], judged: Verdict, times: Race, written: str) -> None:
    show_race("Time per training step", times)
    first, last = losses["fastseq"][0], losses["fastseq"][-1]
    gap = judged.max_difference
    agreement = f"differ by up to {gap:.2e}" if gap else "are identical"
    show_text(f"Loss {first:.3f} → {last:.3f}; the two curves {agreement}.")
    show_text(f"Tolerance: {judged.rule}; at the end {judged.tolerance[-1]:.2e}.")
    for reason in judged.reasons:
        show_text(f"mismatch: {reason}", style="bold red")
    show_text()
    show_text("The swapped model writes:", style="bold")
    show_text(written)
    show_text()
