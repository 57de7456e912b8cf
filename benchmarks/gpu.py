"""Our kernels beside cuDNN: ``python benchmarks/gpu.py OUT`` (``gpu.sh`` runs it); torch and triton suffice.

The cases come most informative first, so that running out of time leaves the rows that matter. Each is
checked against float64, then timed, interleaved; its row is appended to ``OUT/rows.jsonl`` at once. A second
run on the same folder goes on where the first ended. ``--finish`` turns the rows into ``gpu.json`` and
``crossover.md``: where the kernel is faster than cuDNN, and where ``auto`` chose otherwise.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import measure
import report
import torch
from cases import MODES, Case, Contest, prepare

import fastseq
from fastseq import stopwatch

START_AGAIN = 75  # exit code: gpu.sh starts a new process, which passes over the case that hung or crashed
PATIENCE_S = 30  # a case that answers nothing for so long hangs: compiling takes seconds
RANKS: dict[str, dict[Any, int]] = {  # the lower the sum of a case's ranks, the earlier it is timed
    "cell": {"lstm": 0, "gru": 1, "rnn": 3},
    "dtype": {"bfloat16": 0, "float16": 1, "float32": 2},
    "H": {512: 0, 256: 1, 1024: 1, 128: 2, 768: 3, 64: 3},
    "B": {16: 0, 64: 1, 1: 1, 128: 2},
    "T": {1024: 0, 128: 2},
}
SHAPES = {(1, 1): 0, (2, 1): 3, (1, 2): 3}  # (layers, directions)


def every_case(smoke: bool) -> list[Case]:
    """All cases in the order of their information; forward and training of one case side by side."""
    ranked: list[tuple[int, Case]] = []
    for values in itertools.product(*RANKS.values()):
        sizes = dict(zip(RANKS, values, strict=True))
        rank = sum(RANKS[axis][value] for axis, value in sizes.items())
        for (layers, directions), more in SHAPES.items():
            ranked.append((rank + more, Case("layer", **sizes, layers=layers, directions=directions)))
        if sizes["T"] == 1024:
            ranked.append((rank + 2, Case("step", **sizes | {"T": 1})))
        if sizes["dtype"] == "bfloat16" and sizes["H"] in (256, 512):
            ranked.append((rank + 2, Case("reset", **sizes)))
    ranked.sort(key=lambda pair: pair[0])
    if smoke:
        kinds = {}
        for _, case in ranked:
            kinds.setdefault((case.kind, case.cell, case.layers, case.directions), case)
        ranked = [(0, dataclasses.replace(case, B=2, T=min(case.T, 4), H=8)) for case in kinds.values()]
    return [dataclasses.replace(case, mode=mode) for _, case in ranked for mode in MODES]


def main() -> int:
    options = _options()
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    if options.device == "cuda":  # fp32 means TF32 on both sides, as in the training of real models
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    if options.finish:
        return report.write(out)
    cases = every_case(options.smoke)
    if options.warm:
        return warm(cases, options.device, options.workers)
    barred, said = barred_timings(
        (out / "tests.log").read_text(errors="replace") if (out / "tests.log").exists() else ""
    )
    print(said)
    if options.smoke:
        barred = {}
    return time_all(cases, barred, said, options)


def time_all(cases: list[Case], barred: dict[tuple[str, str], str], tests: str, options: argparse.Namespace) -> int:
    """Append a row for every case not yet in ``rows.jsonl``, until the time is spent."""
    deadline = time.monotonic() + options.seconds
    rows = Path(options.output) / "rows.jsonl"
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {row["name"] for row in known if "name" in row}
    hung = {_like(row["case"]): row["name"] for row in known if "hung" in row}
    with rows.open("a") as file:

        def append(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        if not known:
            provenance = stopwatch.provenance(options.device)
            if provenance["commit"] is None and options.commit:
                provenance |= {"commit": options.commit, "modified": None}
            dtypes = sorted({case.dtype for case in cases})
            ceilings = {dtype: measure.ceiling_tflops(options.device, dtype) for dtype in dtypes}
            append({"provenance": provenance, "ceiling_tflops": ceilings, "tests": tests, "smoke": options.smoke})
            known = [{"ceiling_tflops": ceilings}]
        ceilings = known[0]["ceiling_tflops"]
        print(report.HEADER)
        for case in cases:
            if time.monotonic() > deadline:
                print(f"time is up: {len(done)} of {len(cases)} cases have a row")
                break
            if case.name in done:
                continue
            facts: dict[str, Any] = {"name": case.name, "case": dataclasses.asdict(case)}
            if (case.kind, case.cell) in barred:
                row = facts | {"barred": barred[case.kind, case.cell]}
            elif _like(facts["case"]) in hung:
                row = facts | {"barred": f"the like of it hung: {hung[_like(facts['case'])]}"}
            else:
                with watched(case, append):
                    row = facts | one(case, ceilings[case.dtype], options.device)
            append(row)
            done.add(case.name)
            print(report.line(row), flush=True)
            if "error" in row and not _device_alive(options.device):
                return START_AGAIN
    return 0


def _like(case: dict[str, Any]) -> tuple[Any, ...]:
    """What cases share when one that hung bars the others: to wait 30 s for each would leave no time."""
    return (case["kind"], case["cell"], case["H"])


def _device_alive(device: str) -> bool:
    """Whether the process can go on: an illegal access leaves CUDA unusable for the rest of it."""
    try:
        if device == "cuda":
            torch.cuda.synchronize()
            torch.zeros(1, device=device).item()
    except RuntimeError as problem:
        print(f"the device's context is lost: {str(problem).splitlines()[0]}", flush=True)
        return False
    return True


def one(case: Case, ceiling: float, device: str) -> dict[str, Any]:
    """Gate and time one case; an exception becomes the row's ``error``, and the others still get theirs."""
    try:
        return _gated_and_timed(case, ceiling, device)
    except Exception as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:2000]}


def _gated_and_timed(case: Case, ceiling: float, device: str) -> dict[str, Any]:
    """Torch, our kernel by name, and ``auto`` where the cost of a call is the question."""
    kernel = _kernel(device)
    names = (kernel, "auto") if case.kind == "step" else (kernel,)
    contest = prepare(case, device, names)
    facts = _choices(contest, kernel)
    if "refused" in facts:
        return facts
    for name in contest.sides:
        wrong = contest.disagreement(name)
        if wrong is not None:
            return facts | {"red": f"{name}: {wrong}"}
    race = measure.time_sides(contest, rounds=30, least_s=0.15, least_rounds=5)
    return measure.row(case, race, ceiling, kernel=kernel, **facts)


def _kernel(device: str) -> str:
    """What is timed as our kernel. Without a GPU the reference stands in, so that all of this code can be run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if device == "cuda" or interpreted else "reference"


def _choices(contest: Contest, kernel: str) -> dict[str, Any]:
    """What ``auto`` would run and why, and the sentence with which the kernel refuses, if it does."""
    choice = contest.explain()
    facts: dict[str, Any] = {"auto": choice.name, "why": choice.reason}
    try:
        with fastseq.use(kernel):
            contest.explain()
    except fastseq.Unsupported as refusal:
        facts["refused"] = str(refusal)
    return facts


@contextlib.contextmanager
def watched(case: Case, append: Any) -> Iterator[None]:
    """End the process, leaving a row, if the body does not return: a waiting kernel cannot be stopped."""

    def give_up() -> None:
        append({"name": case.name, "case": dataclasses.asdict(case), "hung": f"no answer in {PATIENCE_S} s"})
        print(f"{case.name}: no answer in {PATIENCE_S} s, starting again without it", flush=True)
        os._exit(START_AGAIN)

    timer = threading.Timer(PATIENCE_S, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


CELLS = {"rnn_tanh": "rnn", "rnn_relu": "rnn", "rnn": "rnn", "lstm": "lstm", "gru": "gru"}
KINDS = {
    "attention": (),
    "cell": ("step",),
    "recurrent": ("layer", "reset", "step"),
    "sequence": ("layer", "reset"),
}


def barred_timings(log: str) -> tuple[dict[tuple[str, str], str], str]:
    """Which (kind, cell) may not be timed, and why, from the log of the kernel tests; and a sentence on it.

    A failing test bars the cells that its name mentions, or all of its file's kernels if it mentions none.
    A file that did not run (no test passed) bars them all; one cut short by its time limit, what had failed.
    """
    every = ("layer", "reset", "step")
    barred: dict[tuple[str, str], str] = {}
    said = []

    def bar(kinds: tuple[str, ...], text: str, why: str) -> None:
        named = {CELLS[word] for word in re.findall(r"rnn_tanh|rnn_relu|lstm|gru|rnn", text.lower())}
        for key in itertools.product(kinds, named or set(CELLS.values())):
            barred.setdefault(key, why)

    for part in re.split(r"^#file ", log, flags=re.MULTILINE)[1:]:
        name, _, body = part.partition("\n")
        kinds = next((KINDS[word] for word in KINDS if word in name), every)
        code = re.search(r"^#code (\d+)", body, flags=re.MULTILINE)
        passed = len(re.findall(r"::\S.* PASSED", body))
        failed = sorted(set(re.findall(r"::(\S.*?) (?:FAILED|ERROR)\b", body)))
        ended = int(code[1]) if code else None
        state = {0: "passed", 1: "failed", 124: "cut short", 137: "cut short", None: "cut short"}.get(
            ended, f"code {ended}"
        )
        said.append(f"{name}: {state}, {passed} tests passed, {len(failed)} failed")
        for test in failed:
            bar(kinds, test, f"{name}::{test} failed")
        if name == "marked_gpu":  # drop-in tests of all kinds: what fails there counts, what did not run does not
            continue
        if not passed or (state not in ("passed", "cut short") and not failed):
            bar(kinds, "", f"{name}: {state}, {passed} tests passed")
    if not said:
        bar(every, "", "no kernel test has run")
    return barred, "tests: " + ("; ".join(said) or "none has run")


def warm(cases: list[Case], device: str, workers: int) -> int:
    """Run every case once with two steps, in parallel processes: that fills the compiler's cache on disk."""
    seen = {dataclasses.replace(case, T=min(case.T, 2)): None for case in cases if case.kind != "reset"}
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    problems = 0
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        jobs = {pool.submit(_compile, case, device): case for case in seen}
        for job in concurrent.futures.as_completed(jobs):
            problem = job.result()
            if problem is not None:
                problems += 1
                if problems <= 10:
                    print(f"{jobs[job].name}: {problem}", flush=True)
    print(f"{len(jobs)} cases compiled, {problems} with a problem (their timings will say more)")
    return 0


def _compile(case: Case, device: str) -> str | None:
    """Run one case once; what goes wrong is returned as text (the timing meets it again and reports it)."""
    torch.set_num_threads(1)
    kernel = _kernel(device)
    contest = prepare(case, device, (kernel,))
    try:
        with contest.grad_mode():
            contest.sides[kernel]()
            if device == "cuda":
                torch.cuda.synchronize()
    except fastseq.Unsupported:
        return None
    except Exception as problem:  # another process's case must not end with this one's
        return f"{type(problem).__name__}: {str(problem).splitlines()[0] if str(problem) else ''}"
    return None


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", metavar="OUT", help="folder of rows.jsonl, gpu.json, crossover.md")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=300.0, help="no case is begun after this")
    parser.add_argument("--commit", help="recorded where the checkout came without its .git")
    parser.add_argument("--smoke", action="store_true", help="tiny sizes, to run this code without a GPU")
    parser.add_argument("--warm", action="store_true", help="only compile, in parallel")
    parser.add_argument("--workers", type=int, default=max(1, min(12, (os.cpu_count() or 2) - 2)))
    parser.add_argument("--finish", action="store_true", help="only turn the rows into gpu.json and crossover.md")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
