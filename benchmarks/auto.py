"""Is ``auto`` never slower than torch on this CPU? ``python benchmarks/auto.py``: table, JSON, exit code.

``auto.py recurrent``: B 1, 16, 64, T 32, 128, H 64, 256, 512, in inference and training, and single steps of the
cells, beside torch.nn. ``auto.py training``: GRU and RNN in training over a finer grid, and ``lengths=`` beside
PackedSequence. ``auto.py attention``: the function with every feature, beside what a torch user writes for
the same (``attention_ways.py``), decoding, MultiheadAttention and TransformerEncoderLayer. The speed of ``auto``
(torch's time over ours, the median over interleaved rounds) must be at least 0.97.

The rule. Every round times torch, ours and torch again, in an order that turns and reverses; torch against
itself is the noise of the race. A case that is not ``ok`` is measured again, later and for twice as long, at
most three times while time is left; the last measurement counts, all of them are in the JSON. A case is

- ``slow``    below 0.97 by more than the noise: exit code 1,
- ``busy``    anywhere else with a noise above 0.05: no verdict, exit code 2; run it on a quiet machine,
- ``even``    below 0.97 by less than the noise: no evidence that it is slower, and it is counted as such,
- ``ok``      at 0.97 or more.

Results are compared before anything is timed; a case that disagrees is ``red``, untimed: exit code 1.
"""

import argparse
import json
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import attention_cases
import measure
import model_cases
import recurrent_cases
import torch
from attention_cases import Attention
from contest import MODES, Case

from fastseq import stopwatch

Row = dict[str, Any]

FLOOR = 0.97
TOO_NOISY = 0.05
RETRIES = 3
ROUNDS, LEAST_S, LEAST_ROUNDS = 150, 0.6, 5


@dataclass(frozen=True)
class Suite:
    """What is measured, and what of it is only shown, in about how many minutes; the JSON's title and name."""

    cases: tuple[Case, ...]
    minutes: float
    title: str
    file: str
    shown_only: frozenset[str] = frozenset()


def recurrent() -> Suite:
    steps = recurrent_cases.grid("step", H=(64, 256, 512), B=(1, 16, 64), T=(1,))
    # A layer of eight units over one step is nothing but the cost of a call: shown, not part of the verdict.
    calls = tuple(recurrent_cases.grid("layer", H=(8,), T=(1,), B=(1,)))
    layers = recurrent_cases.grid("layer", H=(64, 256, 512), T=(32, 128), B=(1, 16, 64))
    names = frozenset(case.name for case in calls)
    return Suite((*steps, *calls, *layers), 7, "auto beside torch.nn on the CPU", "auto", names)


def training() -> Suite:
    """The numbers of ``fastseq/ops/crossover.py``: training of GRU and RNN, and lengths beside packing."""
    sizes = {"B": (1, 4, 16, 64), "T": (32, 128), "H": (64, 128, 256, 512)}
    layers = recurrent_cases.grid("layer", ("rnn", "relu", "gru"), ("train",), **sizes)
    lengths = recurrent_cases.grid("lengths", ("lstm",), ("train",), **sizes | {"B": (4, 16, 64)})
    shorter = recurrent_cases.grid("lengths", ("lstm", "gru"), **sizes | {"B": (16, 64), "H": (128,)})
    stacks = tuple(
        recurrent_cases.Recurrent("layer", cell, 16, 128, 128, mode="train", layers=layers, directions=directions)
        for cell in ("rnn", "gru")
        for layers, directions in ((2, 1), (1, 2))
    )
    cases = dict.fromkeys((*layers, *stacks, *lengths, *shorter))
    return Suite(tuple(cases), 10, "training in place and lengths, beside torch.nn on the CPU", "training")


def attention() -> Suite:
    grid = attention_cases.grid
    bert = ((1, 12, 128, 64), (8, 12, 128, 64), (32, 12, 128, 64), (1, 12, 512, 64), (8, 12, 512, 64))
    some, long = ((8, 12, 128, 64), (2, 12, 512, 64)), ((1, 12, 2048, 64),)
    rest = ("dense", "bias", "bias+padding", "dropout", "weights", "weights+padding", "window", "causal+window",
            "softcap")  # fmt: skip
    modules = ((1, 12, 128, 64), (8, 12, 128, 64), (2, 12, 512, 64))
    return Suite(
        (
            *grid("attention", ("plain", "causal", "padding", "causal+padding"), bert + long),
            *grid("attention", ("padding",), ((32, 12, 512, 64),)),
            *grid("attention", rest, some + long),
            *grid("attention", ("plain", "causal+padding", "bias"), ((2, 8, 512, 128),)),
            *grid("attention", ("plain", "padding"), ((2, 12, 512, 64),), E=128),
            *grid("attention", ("causal", "causal+padding"), ((2, 12, 512, 64),), M=4),
            *(
                Attention("decode", B, 32, 1, K, 128, feature, M=8)
                for feature in ("plain", "padding")
                for B, K in ((1, 2048), (8, 1024), (1, 16384))
            ),
            *grid("mha", ("plain", "padding", "causal", "weights"), modules),
            *grid("encoder", ("plain", "padding", "causal"), modules),
        ),
        20,
        "auto beside torch's own way on the CPU, attention",
        "attention",
    )


def relative() -> Suite:
    """T5's and Transformer-XL's attention, table and embeddings learned, beside the formula with a matrix of biases."""
    sizes = ((8, 12, 128, 64), (2, 12, 512, 64), (1, 12, 2048, 64))
    cases = attention_cases.grid("attention", ("t5", "t5+padding", "causal+xl"), sizes)
    return Suite(tuple(cases), 5, "auto beside torch's own way on the CPU, relative positions", "relative")


def of_models() -> Suite:
    cases = model_cases.grid((("bert", 1, 128), ("bert", 4, 128), ("gpt2", 1, 128), ("gpt2", 2, 256)))
    return Suite(tuple(cases), 5, "BERT and GPT-2 beside transformers with sdpa on the CPU", "models")


SUITES = {
    "recurrent": recurrent,
    "training": training,
    "attention": attention,
    "relative": relative,
    "models": of_models,
}


def main() -> int:
    options = _options()
    torch.set_num_threads(options.threads)
    suite = SUITES[options.suite]()
    cases = [case for case in suite.cases if options.only in case.name]
    minutes = options.minutes or suite.minutes
    started, deadline = time.monotonic(), time.monotonic() + 60 * minutes
    ceilings = measure.ceilings("cpu", ["float32"], options.threads)
    _print_header()
    rows: dict[Case, Row] = {}
    for case in cases:
        rows[case] = _row(case, options.threads, ceilings, attempt=0)
        _print_row(rows[case])
    for attempt in range(1, RETRIES + 1):
        again = [case for case in cases if rows[case]["verdict"] not in ("ok", "red")]
        if again:
            print(f"\nmeasured again, {2**attempt} times as long ({len(again)} cases):")
        for case in again:
            if time.monotonic() < deadline:
                earlier = rows[case]
                rows[case] = _row(case, options.threads, ceilings, attempt)
                rows[case]["earlier"] = [*earlier.pop("earlier", []), earlier]
                _print_row(rows[case])
        if time.monotonic() >= deadline:
            print(f"no time left after {minutes:g} minutes: the last measurements count")
            break
    return _finish(list(rows.values()), suite, options, time.monotonic() - started, ceilings)


def _row(case: Case, threads: int, ceilings: dict[str, float], attempt: int) -> Row:
    contest = case.contest("cpu", ("auto",))
    with contest.context():
        choice = contest.explain()
    facts = {"implementation": choice.name, "why": choice.reason}
    wrong = contest.disagreement("fastseq")
    if wrong is not None:
        return {"name": case.name, "verdict": "red", "wrong": wrong, **facts}
    longer = 2**attempt
    race = measure.time_sides(
        contest,
        rounds=ROUNDS * longer,
        least_s=LEAST_S * longer,
        least_rounds=LEAST_ROUNDS * longer,
        threads=threads,
    )
    row = measure.row(contest, race, ceilings, **facts)
    speed = _speed(row, "fastseq")
    row["verdict"] = _verdict(speed, row["noise"])
    return row


def _verdict(speed: float, noise: float) -> str:
    if speed + noise < FLOOR:
        return "slow"
    if noise > TOO_NOISY:
        return "busy"
    return "ok" if speed >= FLOOR else "even"


def _finish(
    rows: list[Row], suite: Suite, options: argparse.Namespace, seconds: float, ceilings: dict[str, float]
) -> int:
    """Print the verdict, write the JSON and return the exit code."""
    judged = [row for row in rows if row["name"] not in suite.shown_only]
    bad = [row["name"] for row in judged if row["verdict"] in ("slow", "red")]
    busy = [row["name"] for row in judged if row["verdict"] == "busy"]
    even = [row["name"] for row in judged if row["verdict"] == "even"]
    code = 1 if bad else 2 if busy else 0

    print(f"\n{len(rows)} cases in {seconds / 60:.1f} minutes, {options.threads} threads")
    for side, title in (("fastseq", "speed of auto"), ("torch again", "torch vs itself")):
        speeds = [_speed(row, side) for row in judged if "sides" in row]
        if speeds:
            of = stopwatch.Spread.of(speeds)
            spread = f"median {of.median:.3f}  quartiles {of.lower:.3f} {of.upper:.3f}  least {min(speeds):.3f}"
            print(f"{title:<16} {spread}")
    means = _geometric_means([row for row in judged if "sides" in row])
    for title, (mean, number) in means.items():
        print(f"geometric mean of the speed, {title} ({number} cases): {mean:.3f}")
    for title, names in (("slow or red", bad), ("busy (no verdict)", busy), ("even", even)):
        print(f"{title}: {len(names)}" + "".join(f"\n  {name}" for name in names))

    provenance = stopwatch.provenance("cpu") | {"threads": options.threads}
    record = {
        "what": suite.title,
        "provenance": provenance,
        "rule": {"floor": FLOOR, "retries": RETRIES, "too_noisy": TOO_NOISY},
        "ceilings": ceilings,
        "geometric_means": {title: mean for title, (mean, _) in means.items()},
        "seconds": seconds,
        "exit_code": code,
        "rows": rows,
    }
    if not options.only or options.output:  # a part of the cases must not replace the results of all
        results = Path(__file__).parent / "results" / measure.slug(str(provenance["device"]))
        folder = Path(options.output or results)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{suite.file}-threads{options.threads}.json"
        path.write_text(json.dumps(record, indent=1) + "\n")
        print(f"written: {path}")
    return code


def _geometric_means(rows: list[Row]) -> dict[str, tuple[float, int]]:
    """Of the speed over all cases, each kind, and those where torch holds all scores; with the number of cases."""
    groups = {
        "all": rows,
        **{kind: [row for row in rows if _kind(row) == kind] for kind in sorted({_kind(row) for row in rows})},
        "where torch falls to the math path": [row for row in rows if row.get("torch_runs") in ("math", "formula")],
    }
    return {
        title: (math.exp(sum(math.log(_speed(row, "fastseq")) for row in members) / len(members)), len(members))
        for title, members in groups.items()
        if members
    }


def _kind(row: Row) -> str:
    words = row["name"].split("-")
    return " ".join((*words[:2], *(mode for mode in MODES if mode in words)))


def _speed(row: Row, side: str) -> float:
    return float(row["sides"][side]["speed"]["median"])


def _print_header() -> None:
    print("speed: torch's time over ours; A/A: torch's over its own second run; diff: ours less torch's")
    columns = f"{'torch µs':>12}{'auto µs':>12}{'diff µs':>10}{'speed':>8}{'A/A':>7}{'noise':>7}"
    print(f"{'case':<58}{columns}  verdict, ran")


def _print_row(row: Row) -> None:
    if row["verdict"] == "red":
        print(f"{row['name']:<58} RED {row['wrong']}")
        return
    ran = row.get("torch_runs")
    torch_us, ours_us = (1e3 * row["sides"][side]["ms"]["median"] for side in ("torch", "fastseq"))
    print(
        f"{row['name']:<58}{torch_us:>12.1f}{ours_us:>12.1f}{ours_us - torch_us:>+10.1f}"
        f"{_speed(row, 'fastseq'):>8.3f}{_speed(row, 'torch again'):>7.3f}{row['noise']:>7.3f}"
        f"  {row['verdict']}, {row['implementation']}" + (f" against {ran}" if ran else ""),
        flush=True,
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("suite", nargs="?", choices=tuple(SUITES), default="recurrent", help="default: %(default)s")
    add("--threads", type=int, default=torch.get_num_threads(), help="torch's threads (default: its own)")
    add("--minutes", type=float, help="no repeats are begun after this (default: 5 to 20, by suite)")
    add("--only", default="", metavar="TEXT", help="cases whose name contains this; no JSON without --output")
    add("--output", metavar="FOLDER", help="of the JSON; default benchmarks/results/<device>")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
