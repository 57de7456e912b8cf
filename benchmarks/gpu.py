"""Our kernels beside cuDNN's, SDPA's and FlexAttention: ``python benchmarks/gpu.py OUT`` (``gpu.sh`` runs it).

Torch and triton suffice. The cases come most informative first, so that running out of time leaves the rows that
matter. Each is checked against float64, then timed, interleaved; its row is appended to ``OUT/rows.jsonl`` at
once. A second run on the same folder goes on where the first ended. ``--finish`` turns the rows into ``gpu.json`` and
``crossover.md``: where the kernel is faster than torch, and where ``auto`` chose otherwise.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import json
import multiprocessing
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import attention_cases
import barred
import measure
import ranks
import report
import torch
from contest import Case, Contest

import fastseq
from fastseq import stopwatch

START_AGAIN = 75  # exit code: gpu.sh starts a new process, which passes over the case that hung or crashed
PATIENCE_S = 45  # a case that answers nothing for so long hangs: compiling takes seconds


def main() -> int:
    options = _options()
    out = Path(options.output)
    out.mkdir(parents=True, exist_ok=True)
    allow_tf32()
    if options.finish:
        return report.write(out)
    cases: list[Case] = ranks.every_case(options.smoke)
    if options.warm:
        return warm(cases, options.device, options.workers)
    log = out / "tests.log"
    bars, said = barred.bars(log.read_text(errors="replace") if log.exists() else "")
    print(said)
    return time_all(cases, [] if options.smoke else bars, said, options)


def allow_tf32() -> None:
    """On a GPU fp32 means TF32 on both sides, as in the training of real models."""
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


def time_all(cases: list[Case], bars: list[barred.Bar], tests: str, options: argparse.Namespace) -> int:
    """Append a row for every case not yet in ``rows.jsonl``, until the time is spent."""
    deadline = time.monotonic() + options.seconds
    rows = Path(options.output) / "rows.jsonl"
    known = [json.loads(line) for line in rows.read_text().splitlines()] if rows.exists() else []
    done = {row["name"] for row in known if "name" in row}
    family = {case.name: case.family for case in cases}
    hung = {family.get(row["name"]): row["name"] for row in known if "hung" in row}
    with rows.open("a") as file:

        def append(row: dict[str, Any]) -> None:
            file.write(json.dumps(row) + "\n")
            file.flush()

        if not known:
            provenance = stopwatch.provenance(options.device)
            if provenance["commit"] is None and options.commit:
                provenance |= {"commit": options.commit, "modified": None}
            dtypes = sorted({case.dtype for case in cases})
            ceilings = measure.ceilings(options.device, dtypes)
            append({"provenance": provenance, "ceilings": ceilings, "tests": tests, "smoke": options.smoke})
            known = [{"ceilings": ceilings}]
        ceilings = known[0]["ceilings"]
        print(report.HEADER)
        for case in cases:
            if time.monotonic() > deadline:
                print(f"time is up: {len(done)} of {len(cases)} cases have a row")
                break
            if case.name in done:
                continue
            facts: dict[str, Any] = {"name": case.name, "case": dataclasses.asdict(case)}
            forbidden = barred.reason(bars, case)
            if forbidden is not None:
                row = facts | {"barred": forbidden}
            elif case.family in hung:  # to wait for each of its like would leave no time
                row = facts | {"barred": f"the like of it hung: {hung[case.family]}"}
            else:
                with watched(case, append):
                    row = facts | one(case, ceilings, options.device)
            append(row)
            done.add(case.name)
            print(report.line(row), flush=True)
            if "error" in row and not _device_alive(options.device):
                return START_AGAIN
    return 0


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


def one(case: Case, ceilings: dict[str, float], device: str) -> dict[str, Any]:
    """Gate and time one case; an exception becomes the row's ``error``, and the others still get theirs."""
    try:
        return _gated_and_timed(case, ceilings, device)
    except Exception as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:2000]}


def _gated_and_timed(case: Case, ceilings: dict[str, float], device: str) -> dict[str, Any]:
    """Torch, our kernel by name, and ``auto`` where the cost of a call is the question."""
    kernel = _kernel(device)
    names = (kernel, "auto") if case.kind in ("step", "decode") else (kernel,)
    contest = case.contest(device, names)
    facts = _choices(contest, kernel)
    if "refused" in facts:
        return facts
    contest.drop_wrong_rivals()
    for name in contest.sides:
        wrong = contest.disagreement(name)
        if wrong is not None:
            return facts | {"red": f"{name}: {wrong}"}
    race = measure.time_sides(contest, rounds=30, least_s=0.15, least_rounds=5)
    peaks = measure.peak_mib(contest) if device == "cuda" else {}
    return measure.row(contest, race, ceilings, peaks, kernel=kernel, **facts)


def _kernel(device: str) -> str:
    """What is timed as our kernel. Without a GPU the reference stands in, so that all of this code can be run."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return "triton" if device == "cuda" or interpreted else "reference"


def _choices(contest: Contest, kernel: str) -> dict[str, Any]:
    """What ``auto`` would run and why, and the sentence with which the kernel refuses, if it does."""
    with contest.context():
        choice = contest.explain()
    facts: dict[str, Any] = {"auto": choice.name, "why": choice.reason}
    try:
        with contest.context(), fastseq.use(kernel):
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


def warm(cases: list[Case], device: str, workers: int) -> int:
    """Run every kernel once, in parallel processes: that fills the compiler's cache on disk."""
    os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # FlexAttention's; the processes are parallel already
    context = multiprocessing.get_context("spawn")  # CUDA does not survive a fork
    problems = 0
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        todo: dict[tuple[Case, bool], None] = {}
        for case in cases:
            todo[case.compiled(), False] = None
            if device == "cuda" and isinstance(case, attention_cases.Attention) and case.flexed:
                todo[case, True] = None
        jobs = {pool.submit(_compile, case, device, flex): case for case, flex in todo}
        for job in concurrent.futures.as_completed(jobs):
            problem = job.result()
            if problem is not None:
                problems += 1
                if problems <= 10:
                    print(f"{jobs[job].name}: {problem}", flush=True)
    print(f"{len(jobs)} cases compiled, {problems} with a problem (their timings will say more)")
    return 0


def _compile(case: Case, device: str, flex: bool) -> str | None:
    """Run one case once; what goes wrong is returned as text (the timing meets it again and reports it)."""
    torch.set_num_threads(1)
    allow_tf32()
    kernel = _kernel(device)
    try:
        if flex:
            attention_cases.run_flex(case)
            return None
        contest = case.contest(device, (kernel,))
        with contest.context():
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
