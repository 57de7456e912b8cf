"""Who may know whom, and what an import may cost; design rules as tests."""

import ast
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = ROOT / "fastseq"

# For each room the rooms it may import at module level; within a function (inside the call) see LAZILY.
MAY_KNOW = {
    "__init__": {"bias", "cells", "flash", "functional", "huggingface", "implementation", "nn", "swap", "testing"},
    "__main__": {"cli"},
    "cli": {"__init__", "functional", "implementation", "nn", "stopwatch", "swap"},
    "models": {"bias", "functional", "nn"},
    "swap": {"bias", "functional", "huggingface", "nn"},
    "testing": {"implementation", "nn"},
    "cells": {"nn", "reference"},
    "nn": {"bias", "dynamo", "functional", "implementation", "reference"},
    "flash": {"implementation", "ops"},
    "functional": {"bias", "implementation", "ops", "reference"},
    "bias": set(),
    "huggingface": {"bias", "functional", "implementation"},
    "ops": {"implementation", "reference"},
    "implementation": set(),
    "reference": set(),
    "dynamo": set(),
    "stopwatch": {"__init__"},
}
LAZILY = {"ops": {"kernels"}, "implementation": {"kernels"}, "cells": {"kernels"}, "cli": {"__init__"}}


def room_of(path: Path) -> str:
    return path.relative_to(ROOMS).parts[0].removesuffix(".py")


def sources() -> list[Path]:
    return sorted(p for p in ROOMS.rglob("*.py") if "kernels" not in p.relative_to(ROOMS).parts)


def imported(path: Path, at_call: bool) -> set[str]:
    """The rooms of ours that a file imports, at module level or inside its functions."""
    tree = ast.parse(path.read_text())
    inside = {
        node for f in ast.walk(tree) if isinstance(f, ast.FunctionDef | ast.AsyncFunctionDef) for node in ast.walk(f)
    }
    package = ("fastseq", *path.relative_to(ROOMS).parts[:-1])
    rooms = set()
    for node in ast.walk(tree):
        if (node in inside) != at_call:
            continue
        names: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = (*base, *(node.module.split(".") if node.module else ()))
            names = [(*module, alias.name) for alias in node.names]
        for name in names:
            if name[0] == "fastseq":
                known = name[1] if len(name) > 1 else "__init__"
                rooms.add(known if known in MAY_KNOW or known == "kernels" else "__init__")
    return rooms - {room_of(path)}


@pytest.mark.parametrize("path", sources(), ids=lambda p: str(p.relative_to(ROOMS)))
def test_rooms_look_down_only(path: Path) -> None:
    room = room_of(path)
    assert imported(path, at_call=False) <= MAY_KNOW[room]
    assert imported(path, at_call=True) <= MAY_KNOW[room] | LAZILY.get(room, set())


@pytest.mark.parametrize("path", sorted((ROOT / "kernels").rglob("*.py")), ids=lambda p: p.name)
def test_kernels_know_torch_and_triton_only(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            assert {a.name.split(".")[0] for a in node.names} <= {"torch", "triton", *sys.stdlib_module_names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            assert (node.module or "").split(".")[0] in {"torch", "triton", *sys.stdlib_module_names}


def test_kernels_is_a_namespace() -> None:
    """A regular top-level package `kernels` would shadow a PyPI package of that name."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOMS / "kernels").is_symlink()


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, cwd=ROOT, check=False
    )


def test_everything_runs_without_triton() -> None:
    done = run("""
        import sys
        sys.modules["triton"] = None          # import triton raises
        import torch, fastseq
        x, lengths, reset = torch.randn(5, 2, 4), torch.tensor([5, 3]), torch.rand(5, 2) < 0.3
        for cls in (fastseq.RNN, fastseq.LSTM, fastseq.GRU):
            rnn = cls(4, 8, num_layers=2, bidirectional=True)
            rnn(x)[0].sum().backward()
            rnn(x, lengths=lengths, reset=reset)[0].sum().backward()
        for cls in (fastseq.RNNCell, fastseq.LSTMCell, fastseq.GRUCell):
            cls(4, 8)(x[0])[0].sum().backward()
        with fastseq.use("triton"):
            try:
                fastseq.LSTM(4, 8)(x)
            except fastseq.Unsupported as refusal:
                print(refusal)
    """)
    assert done.returncode == 0, done.stderr
    assert "triton is not installed" in done.stdout or "CPU" in done.stdout


def test_import_is_light_and_loads_neither_triton_nor_dynamo() -> None:
    code = """
        import sys, time, torch
        start = time.process_time()  # not of what else the machine does
        import fastseq
        print(time.process_time() - start)
        assert "triton" not in sys.modules, "triton"
        assert "torch._dynamo" not in sys.modules, "torch._dynamo"
        assert "rich" not in sys.modules, "rich"
        assert "transformers" not in sys.modules, "transformers"
    """
    seconds = []
    while len(seconds) < 5 and min(seconds, default=1.0) >= 0.15:  # a busy machine slows single runs
        done = run(code)
        assert done.returncode == 0, done.stderr
        seconds.append(float(done.stdout))
    assert min(seconds) < 0.15
