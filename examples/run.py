"""What the examples share: a command line, a progress bar, checkpoints, a picture and a last line."""

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


def command_line(about: str, steps: int) -> argparse.ArgumentParser:
    """The options of every example; the example adds its own."""
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--steps", type=int, default=steps, help="of training (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, ... (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("examples-output"), help="folder of the pictures")
    parser.add_argument("--checkpoint", type=Path, help="file to go on from, if it is there, and to leave behind")
    return parser


class Run:
    """The steps of one training: counted, shown, and resumed from a checkpoint as if there had been no break.

    ``generator`` is for the example's own draws, of batches for instance, so that they too go on where they stopped.
    """

    every = 100  # steps from checkpoint to checkpoint

    def __init__(
        self, options: argparse.Namespace, model: torch.nn.Module, optimizer: torch.optim.Optimizer, name: str = ""
    ) -> None:
        self.steps, self.device, self.name = options.steps, options.device, name
        self.model, self.optimizer = model, optimizer
        self.generator = torch.Generator().manual_seed(options.seed)
        self.losses: list[float] = []
        self.state: Any = None  # what else goes on from step to step: tensors in tuples, lists or dicts
        self.file = options.checkpoint
        if self.file is not None and name:
            self.file = self.file.with_stem(f"{self.file.stem}-{name}")
        if self.file is not None and self.file.exists():
            self._load()

    def __iter__(self) -> Iterator[int]:
        """The number of each step that is still to be taken; the body reports its loss."""
        console = Console(stderr=True)
        columns = (TextColumn(self.name or "training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, TextColumn("{task.fields[loss]}"), console=console) as bars:
            bar = bars.add_task("", total=self.steps, completed=len(self.losses), loss="")
            while len(self.losses) < self.steps:
                step = len(self.losses)
                yield step
                if len(self.losses) != step + 1:
                    raise RuntimeError(f"step {step}: expected one loss to be reported, got {len(self.losses) - step}")
                bars.update(bar, advance=1, loss=f"loss {self.losses[-1]:.3f}")
                if self.file is not None and (len(self.losses) % self.every == 0 or len(self.losses) == self.steps):
                    self._save()

    def report(self, loss: torch.Tensor) -> None:
        """The loss of this step."""
        self.losses.append(loss.item())

    def _save(self) -> None:
        state: dict[str, Any] = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "losses": self.losses,
            "state": self.state,
            "generator": self.generator.get_state(),
            "torch": torch.get_rng_state(),  # of dropout
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        self.file.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.file.with_suffix(".fresh")  # an interrupt leaves the old one whole
        torch.save(state, fresh)
        fresh.replace(self.file)

    def _load(self) -> None:
        state = torch.load(self.file, weights_only=True, map_location=self.device)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses, self.state = state["losses"], state["state"]
        self.generator.set_state(state["generator"].cpu())
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"]:
            torch.cuda.set_rng_state_all([each.cpu() for each in state["cuda"]])


def picture(file: Path, curves: dict[str, list[float]], **labels: Any) -> None:
    """Curves as a PNG; ``labels`` are matplotlib's for axes: title, xlabel, ylabel, yscale."""
    try:
        from matplotlib.figure import Figure  # not pyplot, which would look for a window
    except ImportError:
        print(f"no {file.name}: matplotlib is not installed")
        return
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(values, label=name, linewidth=1)
    axes.set(**labels)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=120)
    print(f"picture: {file}")


def result(metric: str, value: float) -> None:
    """The last line of an example, the same in all."""
    print(f"{metric} = {value:.4f}")
