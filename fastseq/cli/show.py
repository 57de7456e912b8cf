"""What the commands print: rich on a terminal, plain elsewhere; results to stdout, progress to stderr."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich import box
from rich.console import Console, JustifyMethod
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from fastseq.stopwatch import Race, Spread

__all__ = [
    "Mistake", "folder", "interval", "milliseconds", "print_json", "progress", "say", "show_race",
    "show_table", "show_text", "write_record",
]  # fmt: skip

PLAIN_WIDTH = 160  # rich would break lines at 80 columns when it writes to a file or a pipe


class Mistake(Exception):  # noqa: N818  (the user's, not the program's)
    """Something the user can mend; shown as one line."""


def console(*, stderr: bool = False) -> Console:
    """Return a console that takes text literally: a `[` in a path is no markup."""
    out = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if not out.is_terminal:
        out.width = PLAIN_WIDTH
    return out


def say(line: str) -> None:
    """Print one line to stderr."""
    console(stderr=True).print(line, soft_wrap=True)


def show_text(text: str = "", *, style: str | None = None) -> None:
    """Print text to stdout."""
    console().print(text, style=style, soft_wrap=True)


def show_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: int = 1) -> None:
    """Print a table to stdout: the first `words` columns are words, the others figures."""
    out = console()
    table = Table(
        title=title, title_justify="left", title_style="bold", header_style="bold",
        box=box.SIMPLE_HEAD if out.is_terminal else None, pad_edge=False, padding=(0, 2, 0, 0),
    )  # fmt: skip
    for index, column in enumerate(columns):
        justify: JustifyMethod = "left" if index < words else "right"
        table.add_column(column, justify=justify, overflow="fold", no_wrap=index == 0)
    for row in rows:
        table.add_row(*row)
    out.print(table)
    out.print()


def show_race(title: str, race: Race) -> None:
    """Print the times of a race, each with its quartiles and its ratio against the peer."""
    rows = [[row.name, *milliseconds(row.ms), f"{row.ratio.median:.3f}", interval(row.ratio)] for row in race.rows()]
    show_table(title, ["", "ms", "quartiles", f"time / {race.peer}", "quartiles"], rows)


def milliseconds(ms: Spread) -> tuple[str, str]:
    """Return a time and its quartiles as text, four digits each."""
    return f"{ms.median:.4g}", f"{ms.lower:.4g} – {ms.upper:.4g}"


def interval(ratio: Spread) -> str:
    """Return the quartiles of a ratio as text."""
    return f"{ratio.lower:.3f} – {ratio.upper:.3f}"


def print_json(value: object) -> None:
    """Print JSON to stdout, unstyled and unwrapped."""
    print(_json(value))


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[[int, str], None]]:
    """Yield a function that shows on stderr how many of `total` are done, with a remark.

    A bar on a terminal, elsewhere a line at every tenth of the way.
    """
    out = console(stderr=True)
    if not out.is_terminal:
        shown = 0

        def line(done: int, remark: str) -> None:
            nonlocal shown
            if done * 10 // total > shown:
                shown = done * 10 // total
                say(f"{title} {done}/{total} {remark}".rstrip())

        yield line
        return

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    remark_column = TextColumn("{task.fields[remark]}")
    # No refreshing thread: it would run beside the code being timed.
    with Progress(*columns, remark_column, console=out, transient=True, auto_refresh=False) as bars:
        bar = bars.add_task(title, total=total, remark="")
        yield lambda done, remark: bars.update(bar, completed=done, remark=remark, refresh=True)


def folder(path: Path) -> Path:
    """Make the output folder, or say that it cannot be made."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Mistake(f"--output {path}: {error.strerror or error}") from error
    return path


def write_record(path: Path, record: object) -> None:
    """Write a JSON record and say where."""
    try:
        path.write_text(_json(record) + "\n", encoding="utf-8")
    except OSError as error:
        raise Mistake(f"--output {path}: {error.strerror or error}") from error
    show_text(f"record: {path}")


def _json(value: object) -> str:
    return json.dumps(_finite(value), indent=2, ensure_ascii=False, allow_nan=False)


def _finite(value: object) -> object:
    """Replace NaN and infinities by their names: JSON has no such numbers."""
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
