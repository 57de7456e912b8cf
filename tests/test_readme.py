"""README is executed: its Python blocks run, its names exist, its relative links lead somewhere."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_block_runs(number: int, tmp_path: Path) -> None:
    file = tmp_path / "block.py"
    file.write_text(BLOCKS[number])
    done = subprocess.run(
        [sys.executable, file], capture_output=True, text=True, cwd=ROOT, env=_environment(), check=False
    )
    assert done.returncode == 0, done.stderr


def _environment() -> dict[str, str]:
    import os

    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    return {**kept, "PYTHONPATH": str(ROOT)}


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 3


def test_relative_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", TEXT):
        assert (ROOT / target).exists(), target


def test_continuous_integration_runs_the_two_commands_verbatim() -> None:
    commands = re.findall(r"```sh\n(.*?)```", TEXT, re.DOTALL)[0].strip().splitlines()
    assert len(commands) == 2
    script = (ROOT / ".ci" / "run").read_text()
    assert "README.md" in script, "the script takes the commands from README itself"
