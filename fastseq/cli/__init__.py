"""The command line: `fastseq compare`, `fastseq bench`, `fastseq info`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import torch

import fastseq
from fastseq.cli import bench, compare, info, language
from fastseq.cli.show import Mistake, say

__all__ = ["main"]

EQUAL, MISMATCH, MISTAKE, INTERRUPTED = 0, 1, 2, 130  # exit codes; 130 is what shells give for Ctrl-C


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 on a mismatch, 2 on a user's mistake, 130 on Ctrl-C.

    >>> from fastseq.cli import main
    >>> main(["compare", "no_colon.py"])
    2
    """
    try:
        arguments = _parser().parse_args(argv)
        return EQUAL if _run(arguments) else MISMATCH
    except Mistake as mistake:
        say(f"fastseq: error: {' '.join(str(mistake).split())}")
        return MISTAKE
    except KeyboardInterrupt:
        say("fastseq: interrupted")
        return INTERRUPTED


def _run(arguments: argparse.Namespace) -> bool:
    """Run one command; the result says whether everything agreed."""
    if arguments.command == "info":
        info.info(as_json=arguments.json)
        return True
    device = _device(arguments.device)
    settings = compare.Settings(device, arguments.implementation, arguments.threads, arguments.tf32)
    if arguments.command == "bench":
        return bench.bench(arguments.names, settings, budget_s=arguments.budget, as_json=arguments.json)
    if arguments.target is None:
        cell, steps = arguments.cell or "lstm", arguments.steps or language.STEPS
        return language.language(cell, steps, settings, arguments.output)
    for option in ("cell", "steps"):
        if getattr(arguments, option) is not None:
            raise Mistake(f"--{option} belongs to the built-in model, not to {arguments.target}")
    return compare.compare(arguments.target, settings, arguments.output)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise Mistake(message)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="fastseq", description="Drop-in sequence modules for PyTorch.")
    parser.add_argument("--version", action="version", version=f"fastseq {fastseq.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="compare|bench|info")

    running = _Parser(add_help=False)
    running.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="default: %(default)s"
    )
    running.add_argument(
        "--implementation", choices=("auto", "triton", "torch", "reference"), default="auto",
        help="which implementation runs on fastseq's side (default: %(default)s)",
    )  # fmt: skip
    running.add_argument(
        "--threads", type=_positive, default=torch.get_num_threads(),
        help="torch threads, pinned for both sides (default: %(default)s)",
    )  # fmt: skip
    running.add_argument("--tf32", action="store_true", help="allow TF32 to both sides (default: neither)")

    command = commands.add_parser(
        "compare", parents=[running], help="swap a model, prove it equal, time both side by side, plot it",
        description="Without an argument: trains a character language model on the prose of Python's own"
        " help pages, with torch.nn and swapped, from the same seed. With FILE.py:factory: your own model.",
    )  # fmt: skip
    command.add_argument("target", nargs="?", metavar="FILE.py:factory", help="a function that returns (model, inputs)")
    command.add_argument("--cell", choices=tuple(language.LAYERS), help="built-in model's (default: lstm)")
    command.add_argument("--steps", type=_positive, help=f"training steps (default: {language.STEPS})")
    command.add_argument(
        "--output", type=Path, default=Path("fastseq-compare"),
        help="folder for record.json and the plot (default: ./%(default)s)",
    )  # fmt: skip

    command = commands.add_parser("bench", parents=[running], help="time operations against torch.nn")
    command.add_argument("names", nargs="*", metavar="NAME", help=f"{', '.join(bench.CASES)} (default: all)")
    command.add_argument("--json", action="store_true", help="print JSON instead of a table")
    command.add_argument("--budget", type=float, default=2.0, help="seconds per row (default: %(default)s)")

    command = commands.add_parser("info", help="versions, devices, and which implementation would run where")
    command.add_argument("--json", action="store_true", help="print JSON instead of tables")
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {number}")
    return number


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise Mistake(f"--device {name}: torch knows no such device") from None
    if device.type == "cpu":
        return device
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is None or accelerator.type != device.type:
        raise Mistake(f"--device {name}: torch sees no such device here")
    if device.index is not None and device.index >= torch.accelerator.device_count():
        raise Mistake(f"--device {name}: torch sees {torch.accelerator.device_count()} of them")
    return device
