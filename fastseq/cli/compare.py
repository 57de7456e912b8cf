"""`fastseq compare FILE.py:factory`: a user's own model with torch.nn and swapped."""

from __future__ import annotations

import copy
import functools
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

import fastseq
from fastseq.cli import plot
from fastseq.cli.equality import Call, backward, compare_models, describe, weights_for
from fastseq.cli.show import Mistake, folder, say, show_race, show_table, show_text, write_record
from fastseq.stopwatch import Race, provenance, race
from fastseq.swap import Report

__all__ = ["RUNS", "Settings", "compare", "load", "share_weights", "swapped_pair", "switches"]

ROUNDS = 30
BUDGET_S = 10.0  # per race; a race of slow models ends after three rounds

_M = TypeVar("_M", bound=nn.Module)


@dataclass(frozen=True)
class Settings:
    """How to run a comparison, whatever is compared."""

    device: torch.device
    implementation: str
    threads: int
    tf32: bool

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        words = [str(self.device), threads, f"implementation {self.implementation}"]
        return ", ".join([*words, "TF32 allowed"] if self.tf32 else words)

    @property
    def rounding(self) -> float:
        """The relative rounding of an fp32 product: TF32 keeps ten bits."""
        return 2.0**-10 if self.tf32 and self.device.type == "cuda" else torch.finfo(torch.float32).eps

    def record(self) -> dict[str, object]:
        """Return what a record must say of them."""
        return {
            "device": str(self.device), "implementation": self.implementation, "threads": self.threads,
            "tf32": self.tf32,
        }  # fmt: skip


def compare(target: str, settings: Settings, output: Path) -> bool:
    """Compare and time the model of `FILE.py:factory`; the result says whether both sides agree."""
    out = folder(output)
    model, call = load(target)
    call = call.to(settings.device)
    peer, ours, report = swapped_pair(model.to(settings.device))
    show_text(f"{target}; {settings}")
    show_text(str(report))
    show_text()

    record: dict[str, object] = {
        "settings": {"target": target, **settings.record()},
        "swap": str(report).splitlines(),
    }
    with switches(settings):
        record["provenance"] = provenance(settings.device)
        equality = compare_models(peer, ours, call)
        describe(equality)
        record["equality"] = equality.record()
        if equality.passed:  # no speed on a mismatch
            races = _races(peer, ours, call, settings)
            record["times"] = {name: result.record() for name, result in races.items()}
            record["memory"] = _memory(peer, ours, call, settings)
            plot.save_plot(plot.model_figure(equality, races), out / "compare.png")
        elif any(
            isinstance(m, (nn.RNNBase, nn.MultiheadAttention)) and m.training and m.dropout > 0 for m in peer.modules()
        ):
            show_text("note: the model drops out inside a module, where implementations may draw differently;")
            show_text("      let the factory return model.eval()")
    record["verdict"] = {"equal": equality.passed, "reasons": equality.reasons()}
    write_record(out / "record.json", record)
    if equality.passed:
        show_text(f"Equal: {len(equality.checks)} outputs and gradients agree.", style="bold green")
    return equality.passed


def load(target: str) -> tuple[nn.Module, Call]:
    """Return what the factory of `FILE.py:factory` gives: `(model, inputs)`, its inputs a tensor, a tuple of
    arguments, or `(args, kwargs)` with a tuple and a dict.
    """
    name, colon, function = target.rpartition(":")
    path = Path(name)
    if not colon or not function.isidentifier():
        raise Mistake(f"{target}: expected FILE.py:factory")
    if not path.is_file():
        raise Mistake(f"{name}: no such file")
    spec = importlib.util.spec_from_file_location(f"fastseq_compare_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise Mistake(f"{name}: not a Python file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses and pickling look their module up
    sys.path.insert(0, str(path.resolve().parent))  # as `python FILE.py` does, for imports from next to it
    _theirs(f"importing {name}", path, functools.partial(spec.loader.exec_module, module))
    factory = getattr(module, function, None)
    if not callable(factory):
        raise Mistake(f"{name}: no function {function!r}")
    made = _theirs(target, path, factory)
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module)):
        raise Mistake(f"{target}: expected (model, inputs), got {_kind(made)}")
    model, inputs = made
    if torch.is_tensor(inputs) or isinstance(inputs, nn.utils.rnn.PackedSequence):
        return model, Call((inputs,))
    if not isinstance(inputs, tuple):
        raise Mistake(f"{target}: inputs: expected a tensor, a tuple or (args, kwargs), got {_kind(inputs)}")
    if len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return model, Call(*inputs)
    return model, Call(inputs)


def swapped_pair(model: _M) -> tuple[_M, _M, Report]:
    """Return the model with torch's modules, a copy with fastseq's, and the report of the swap."""
    fastseq.restore(model)  # it may have been built from fastseq's modules
    try:
        ours = copy.deepcopy(model)
    except Exception as error:
        raise Mistake(f"the model cannot be copied: {type(error).__name__}: {error}") from error
    report = fastseq.swap(ours)
    if not len(report):
        raise Mistake(f"nothing to compare; {'; '.join(str(report).splitlines())}")
    return model, ours, report


def share_weights(peer: nn.Module, ours: nn.Module) -> None:
    """Give both sides one set of parameters: where a copy happens to lie in memory can cost a step half its speed."""
    for theirs, mine in zip(peer.modules(), ours.modules(), strict=True):
        for name, parameter in theirs._parameters.items():
            setattr(mine, name, parameter)


@contextmanager
def switches(settings: Settings) -> Iterator[None]:
    """Choose the implementation, pin torch's threads and TF32 switches, and put all of it back.

    The choice concerns fastseq's modules only, so torch's side may run inside as well.
    """
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = torch.get_num_threads(), cudnn.allow_tf32, matmul.allow_tf32
    try:
        torch.set_num_threads(settings.threads)
        cudnn.allow_tf32 = matmul.allow_tf32 = settings.tf32
        with fastseq.use(settings.implementation):
            yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.allow_tf32, matmul.allow_tf32 = before[1:]


def forward(model: nn.Module, call: Call) -> Callable[[], object]:
    """Return a function that runs forward once, without gradients."""

    def step() -> None:
        with torch.no_grad():
            model(*call.args, **call.kwargs)

    return step


def forward_and_backward(model: nn.Module, call: Call) -> Callable[[], object]:
    """Return a function that runs forward and backward once, to fresh gradients of parameters and inputs."""
    call = call.fresh()
    leaves = [*model.parameters(), *call.tensors()]
    weights: list[Tensor] = []

    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        outputs = model(*call.args, **call.kwargs)
        if not weights:  # made in the first call, which is a warm-up
            weights.extend(weights_for(outputs))
        if weights:
            backward(outputs, weights)

    return step


RUNS = {"forward": forward, "forward and backward": forward_and_backward}


def _races(peer: nn.Module, ours: nn.Module, call: Call, settings: Settings) -> dict[str, Race]:
    share_weights(peer, ours)
    races: dict[str, Race] = {}
    for title, step in RUNS.items():
        say(f"timing {title}, at most {BUDGET_S:g} s")
        races[title] = race(
            {"torch": step(peer, call), "fastseq": step(ours, call)},
            rounds=ROUNDS, budget_s=BUDGET_S, threads=settings.threads,
        )  # fmt: skip
        show_race(title[0].upper() + title[1:], races[title])
    return races


def _memory(peer: nn.Module, ours: nn.Module, call: Call, settings: Settings) -> dict[str, object] | None:
    """Return and print the peak bytes that a forward and backward adds; None where torch keeps no peak."""
    device = settings.device
    if device.type != "cuda":
        show_text(f"Memory: not measured, torch keeps no peak on {device.type}.")
        return None
    peaks = {}
    for name, model in {"torch": peer, "fastseq": ours}.items():
        step = forward_and_backward(model, call)
        step()  # what is allocated once and kept does not count
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        peaks[name] = torch.cuda.max_memory_allocated(device) - before
    base = max(peaks["torch"], 1)
    rows = [[name, f"{peak / 2**20:.1f}", f"{peak / base:.3f}"] for name, peak in peaks.items()]
    show_table("Peak memory of forward and backward", ["", "MiB", "memory / torch"], rows)
    return {"peak_bytes": peaks, "of": "one forward and backward, beyond what was allocated before"}


def _theirs(what: str, path: Path, function: Callable[[], Any]) -> Any:
    """Run the user's code; an exception becomes one line that names the place in the user's file."""
    try:
        return function()
    except Exception as error:
        trace = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in trace if Path(frame.filename).resolve() == path.resolve()]
        where = f" (line {lines[-1]})" if lines else ""
        raise Mistake(f"{what} raised {type(error).__name__}: {error}{where}") from error


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(entry).__name__ for entry in value)})"
    return type(value).__name__
