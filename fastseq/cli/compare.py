"""`fastseq compare FILE.py:factory`: a user's own model with torch.nn and swapped."""

from __future__ import annotations

import copy
import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import nn

import fastseq
from fastseq.cli import plot
from fastseq.cli.equality import Call, compare_models, describe, weighted_sum
from fastseq.cli.show import Mistake, folder, say, show_race, show_table, show_text, write_record
from fastseq.stopwatch import Race, provenance, race
from fastseq.swap import Report

__all__ = ["Settings", "compare", "load", "swapped_pair", "switches"]

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
        words = [str(self.device), f"{self.threads} threads", f"implementation {self.implementation}"]
        return ", ".join([*words, "TF32 allowed"] if self.tf32 else words)

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
        equality = compare_models(peer, ours, call, settings.implementation)
        describe(equality)
        record["equality"] = equality.record()
        if equality.passed:  # no speed on a mismatch
            races = _races(peer, ours, call, settings)
            record["times"] = {name: result.record() for name, result in races.items()}
            record["memory"] = _memory(peer, ours, call, settings)
            plot.save_plot(plot.model_figure(equality, races), out / "compare.png")
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
    with _on_path(path.resolve().parent):
        _theirs(f"importing {name}", path, lambda: spec.loader.exec_module(module))  # type: ignore[union-attr]
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
    try:
        ours = copy.deepcopy(model)
    except Exception as error:
        raise Mistake(f"the model cannot be copied: {type(error).__name__}: {error}") from error
    fastseq.restore(model)
    report = fastseq.swap(ours)
    if not len(report):
        raise Mistake(f"nothing to compare; {'; '.join(str(report).splitlines())}")
    return model, ours, report


@contextmanager
def switches(settings: Settings) -> Iterator[None]:
    """Pin torch's threads and TF32 switches, and put them back."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = torch.get_num_threads(), cudnn.allow_tf32, matmul.allow_tf32
    try:
        torch.set_num_threads(settings.threads)
        cudnn.allow_tf32 = matmul.allow_tf32 = settings.tf32
        yield
    finally:
        torch.set_num_threads(before[0])
        cudnn.allow_tf32, matmul.allow_tf32 = before[1:]


def training_step(model: nn.Module, call: Call, implementation: str = "auto") -> Callable[[], object]:
    """Return a function that runs forward and backward once, leaving gradients of parameters and inputs."""
    call = call.fresh()

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with fastseq.use(implementation):
            loss = weighted_sum(model(*call.args, **call.kwargs))
            if loss is not None and loss.requires_grad:
                loss.backward()  # type: ignore[no-untyped-call]

    return step


def forward(model: nn.Module, call: Call, implementation: str = "auto") -> Callable[[], object]:
    """Return a function that runs forward once, without gradients."""

    def step() -> None:
        with torch.no_grad(), fastseq.use(implementation):
            model(*call.args, **call.kwargs)

    return step


def _races(peer: nn.Module, ours: nn.Module, call: Call, settings: Settings) -> dict[str, Race]:
    races: dict[str, Race] = {}
    for title, step in (("forward", forward), ("forward and backward", training_step)):
        say(f"timing {title}, at most {BUDGET_S:g} s")
        races[title] = race(
            {"torch": step(peer, call), "fastseq": step(ours, call, settings.implementation)},
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
    for name, step in {
        "torch": training_step(peer, call), "fastseq": training_step(ours, call, settings.implementation)
    }.items():  # fmt: skip
        step()  # gradients of the first call stay allocated in the second: both sides count the same
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
        lines = [frame.lineno for frame in trace if frame.filename == str(path)]
        where = f" (line {lines[-1]})" if lines else ""
        raise Mistake(f"{what} raised {type(error).__name__}: {error}{where}") from error


@contextmanager
def _on_path(folder: Path) -> Iterator[None]:
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        sys.path.remove(str(folder))


def _kind(value: object) -> str:
    if isinstance(value, tuple):
        return f"({', '.join(type(entry).__name__ for entry in value)})"
    return type(value).__name__
