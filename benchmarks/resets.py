"""``reset=`` beside the ways around it, interleaved: ``python benchmarks/resets.py``, a minute or two on a CPU.

The sides are those of ``test_resets.py`` (see ``workarounds.py``); what is compared is the output, and in
training its gradients. ``speed`` is the workaround's time over ours: above 1 ``reset=`` is faster. ``cost`` is our time
with resets over that without.
"""

import argparse
import json
from pathlib import Path

import measure
import torch
from recurrent_cases import Recurrent, reset_or_none

from fastseq import stopwatch

CASES = [
    Recurrent("reset", cell, B, 128, 128, mode=mode, density=density)
    for cell in ("lstm", "gru")
    for B, density in ((1, 0.02), (16, 0.02), (16, 0.2), (64, 0.02))
    for mode in ("forward", "train")
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="torch's (default: its own)")
    parser.add_argument("--output", metavar="FOLDER", help="of the JSON; default benchmarks/results/<device>")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    ceilings = measure.ceilings("cpu", ["float32"], options.threads)
    print(
        f"{'case, p resets per step':<48}{'ours ms':>9}  speed beside pad_and_split, stretches, python_loop (A/A) cost"
    )
    for case in CASES:
        contest = case.contest()
        choice = contest.explain()
        for side in contest.sides:
            wrong = contest.disagreement(side)
            assert wrong is None, f"{case.name}: {side}: {wrong}"
        race = measure.time_sides(contest, rounds=100, least_s=1.5, least_rounds=5, threads=options.threads)
        ours, again = race.ratio("fastseq"), race.noise()
        beside = {side: race.ratio(side).median / ours.median for side in contest.sides if side != "fastseq"}
        with contest.context():
            pair = stopwatch.race(reset_or_none(case), rounds=100, budget_s=1.0, threads=options.threads)
        cost = pair.ratio("reset").median
        facts = {"implementation": choice.name, "why": choice.reason, "speed_beside": beside, "cost": pair.record()}
        rows.append(measure.row(contest, race, ceilings, **facts))
        speeds = "".join(f"{speed:>9.2f}" for speed in beside.values())
        same = 1 / again.median if again else 1.0
        print(f"{case.name:<48}{race.time('fastseq').median:>9.2f}{speeds}  ({same:.3f}){cost:>6.2f}", flush=True)
    provenance = stopwatch.provenance("cpu") | {"threads": options.threads}
    results = Path(__file__).parent / "results" / measure.slug(str(provenance["device"]))
    folder = Path(options.output or results)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"resets-threads{options.threads}.json"
    path.write_text(json.dumps({"what": "reset= beside workarounds", "provenance": provenance, "rows": rows}, indent=1))
    print(f"written: {path}")


if __name__ == "__main__":
    main()
