"""From rows to ``gpu.json`` and ``crossover.md``: where our kernel wins, where ``auto`` chose wrong."""

import itertools
import json
from pathlib import Path
from typing import Any

HEADER = f"{'case':<60}{'torch ms':>10}{'kernel ms':>10}{'speed':>7}{'noise':>7}  auto would run; torch's best way"
Row = dict[str, Any]
TROUBLES = ("barred", "refused", "red", "hung", "error")  # why a row has no timing


def line(row: Row) -> str:
    """A row for people: a timing, or the reason why there is none."""
    for word in TROUBLES:
        if word in row:
            return f"{row['name']:<60}{word}: {row[word].splitlines()[0]}"
    peer, ours = row["sides"][_peer(row)], row["sides"][row["kernel"]]
    return (
        f"{row['name']:<60}{peer['ms']['median']:>10.3f}{ours['ms']['median']:>10.3f}"
        f"{ours['speed']['median']:>7.2f}{row['noise']:>7.3f}  {row['auto']}"
    ) + ("" if row["best"] == _peer(row) else f"; {row['best']} {ours['speed_beside_best']['median']:.2f}")


def write(out: Path) -> int:
    """Write ``gpu.json`` and ``crossover.md``; 1 if a case is untimed for any reason but a refusal."""
    path = out / "rows.jsonl"
    lines = [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []
    if not lines:
        print("no row was written")
        return 1
    about, rows = lines[0], lines[1:]
    (out / "gpu.json").write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n")
    text = crossover(about, rows)
    (out / "crossover.md").write_text(text)
    timed = [row for row in rows if "sides" in row]
    print(f"{len(timed)} of {len(rows)} rows timed; {about['tests']}")
    troubles = 0
    for word in TROUBLES:
        found = [row for row in rows if word in row]
        troubles += len(found) if word != "refused" else 0
        print(f"{word}: {len(found)}" + "".join(f"\n  {line(row)}" for row in found[:5]))
    print("\n".join(text.splitlines()[:60]))
    return 1 if troubles else 0


def crossover(about: Row, rows: list[Row]) -> str:
    """Tables of speed (torch's time over the kernel's): of layers H down and B across, of attention a line per case."""
    provenance = about["provenance"]
    said = [
        f"# {provenance['device']}, commit {provenance['commit']}, torch {provenance['torch']}, "
        f"triton {provenance['triton']}, cuDNN {provenance['cudnn']}, {provenance['date']}",
        "",
        f"{about['tests']}.",
        "",
        "Speed: torch's time over the kernel's, above 1 the kernel is faster; in brackets its time per",
        "step. `^`: it is faster and `auto` takes torch; `v`: it is slower and `auto` takes it; `~`: within",
        "the noise of 1; `-`: not timed.",
    ]
    timed = [row for row in rows if "sides" in row]
    attention = [row for row in timed if row["case"]["kind"] in ("attention", "decode", "mha", "encoder")]
    for (kind, dtype, mode), rows_of_one in itertools.groupby(sorted(attention, key=_sort), key=_sort):
        said += ["", f"## {kind} {dtype} {mode}", "", *_rivals(list(rows_of_one))]
    layers = [row for row in timed if row["case"]["kind"] == "layer"]
    layers.sort(key=_table)
    for table, members in itertools.groupby(layers, key=_table):
        cell, stacked, directions, dtype, mode, T = table
        title = f"{cell} {dtype} {mode} T={T}, layers={stacked}, directions={directions}"
        said += ["", f"## {title}", "", *_grid(list(members))]
    for kind, title in (("reset", "Resets beside the ways around them"), ("step", "Single steps")):
        members = [row for row in timed if row["case"]["kind"] == kind]
        if members:
            said += ["", f"## {title}", "", *_sides(members)]
    judged = [*attention, *layers]
    wrong = [row for row in judged if _mark(row) in ("^", "v")]
    said += ["", f"## Where `auto` is wrong: {len(wrong)} of {len(judged)}", ""]
    said += [f"- {row['name']}: {_speed(row):.2f}, auto took {row['auto']} ({row['why']})" for row in wrong]
    return "\n".join(said) + "\n"


def _sort(row: Row) -> tuple[str, str, str]:
    case = row["case"]
    return (case["kind"], case["dtype"], case["mode"])


def _rivals(members: list[Row]) -> list[str]:
    """A Markdown table of one (kind, dtype, mode) of attention, and what could not take part."""
    said = [
        "| case | torch ms | runs | best rival ms | kernel ms | speed | beside best | rate | of ceiling | MiB, torch |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in members:
        sides, best = row["sides"], row["best"]
        peer, ours = sides[_peer(row)], sides[row["kernel"]]
        rate = f"{ours['gb_per_s']:.0f} GB/s" if "gb_per_s" in ours else f"{ours['tflops']:.1f} TFLOP/s"
        memory = f"{ours['peak_mib']:.0f}, {peer['peak_mib']:.0f}" if "peak_mib" in ours else "-"
        name = row["name"].removeprefix(f"{row['case']['kind']}-").split(f"-{row['case']['dtype']}")[0]
        entries = [
            name, f"{peer['ms']['median']:.3f}", row["torch_runs"], f"{best} {sides[best]['ms']['median']:.3f}",
            f"{ours['ms']['median']:.3f}", f"{_speed(row):.2f}{_mark(row)}",
            f"{ours['speed_beside_best']['median']:.2f}", rate, f"{ours['percent_of_ceiling']:.0f} %", memory,
        ]  # fmt: skip
        said.append("| " + " | ".join(entries) + " |")
    reasons: dict[tuple[str, str], int] = {}
    for row in members:
        for side, reason in row.get("cannot", {}).items():
            reasons[side, reason] = reasons.get((side, reason), 0) + 1
    if reasons:
        said += ["", "Did not take part:", ""]
        said += [f"- {side}, {number} cases: {reason}" for (side, reason), number in reasons.items()]
    return said


def _grid(members: list[Row]) -> list[str]:
    """A Markdown table of one (cell, dtype, mode, T): H down, B across."""
    at = {(row["case"]["H"], row["case"]["B"]): row for row in members}
    widths = sorted({B for _, B in at})
    said = ["| H | " + " | ".join(f"B={B}" for B in widths) + " |", "|---" * (len(widths) + 1) + "|"]
    for H in sorted({H for H, _ in at}):
        entries = [_entry(at.get((H, B))) for B in widths]
        said.append(f"| {H} | " + " | ".join(entries) + " |")
    return said


def _entry(row: Row | None) -> str:
    if row is None:
        return "-"
    return f"{_speed(row):.2f}{_mark(row)} ({row['sides'][row['kernel']]['us_per_step']:.2f} µs)"


def _mark(row: Row) -> str:
    if abs(_speed(row) - 1) <= row["noise"]:
        return "~"
    faster, taken = _speed(row) > 1, row["auto"] == row["kernel"]
    return "" if faster == taken else "^" if faster else "v"


def _sides(members: list[Row]) -> list[str]:
    """A Markdown table of every side's milliseconds, first the case."""
    names = [name for name in members[0]["sides"] if not name.endswith(" again")]
    said = ["| case | " + " | ".join(f"{name} ms" for name in names) + " |", "|---" * (len(names) + 1) + "|"]
    for row in members:
        times = [f"{row['sides'][name]['ms']['median']:.4f}" for name in names]
        said.append(f"| {row['name']} | " + " | ".join(times) + " |")
    return said


def _speed(row: Row) -> float:
    return float(row["sides"][row["kernel"]]["speed"]["median"])


def _peer(row: Row) -> str:
    return str(next(iter(row["sides"])))


def _table(row: Row) -> tuple[Any, ...]:
    case = row["case"]
    return (case["cell"], case["layers"], case["directions"], case["dtype"], case["mode"], case["T"])
