"""Write the table of what every kernel configuration compiles to, for GPUs that need not be there.

    python benchmarks/offline.py

compiles with the Triton of this interpreter and writes ``results/offline/triton-<version>.json``, a row per
configuration and target: ``git diff`` shows what a change costs, and ``tests/test_offline.py`` holds to it.
A summary is written beside it. Exits with 1 if a row breaks a budget; the table is written all the same.
"""

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, so it is not there yet

from tests.support import offline  # noqa: E402  (needs the path above)

COMMAND = "python benchmarks/offline.py"
COLUMNS = {
    "registers": "per thread; on gfx942 vector registers, accumulation registers included",
    "stack": "bytes per thread",
    "shared": "bytes per program, as asked for at launch",
    "too_large": "the target has less shared memory than that for one program",
    "spills": "loads and stores of spilled registers, counted in the code (LDL, STL; on gfx942 scratch)",
    "dots": "products that tensor cores could do; warp_group_dots: those that sm_90 could do by warp groups",
    "instructions": "in the whole kernel",
    "loop_": "the same, but only in code that runs more than once",
    "hgmma, hmma, utcmma, mfma": "tensor-core instructions of sm_90, sm_80 and later, sm_100, gfx942",
    "lds, ldsm, ldg128, bar": "reads of shared memory, 16-byte loads, barriers",
}


def table(report: dict[str, Any], ptxas: dict[str, str]) -> str:
    """The report as JSON, a row per line so that a diff shows what changed; zeros are left out."""
    header = {"regenerate": COMMAND, "triton": report["triton"], "ptxas": ptxas, "columns": COLUMNS}
    head = json.dumps(header, indent=1)[:-2]
    lines = []
    for name, row in sorted(report["rows"].items()):
        shown = {figure: value for figure, value in row.items() if value}
        lines.append(f"  {json.dumps(name)}: {json.dumps(shown, sort_keys=True)}")
    rows = ",\n".join(lines)
    return f'{head},\n "rows": {{\n{rows}\n }}\n}}\n'


def summary(report: dict[str, Any]) -> str:
    """A readable page: for each kernel and target the extremes over its configurations."""
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for name, figures in report["rows"].items():
        if "error" not in figures:
            groups[figures["kernel"], name.rsplit(" ", 1)[1]].append(figures)
    lines = [
        f"# What the kernels compile to under triton {report['triton']}",
        "",
        f"The extremes over all configurations; each has a row in the JSON file. Written by `{COMMAND}`.",
        "",
        "| kernel | target | rows | registers | shared KB | spill in a loop | do not fit | on tensor cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for (kernel, target), rows in sorted(groups.items()):
        registers, shared = [row["registers"] for row in rows], [row["shared"] / 1024 for row in rows]
        spilling = sum(row["loop_spills"] > 0 for row in rows)
        too_large = sum(row["too_large"] for row in rows)
        products = [row for row in rows if row["dots"]]
        tensor = sum(any(row.get(kind) for kind in offline.TENSOR_CORES) for row in products)
        lines.append(
            f"| {kernel} | {target} | {len(rows)} | {min(registers)}–{max(registers)} "
            f"| {min(shared):.0f}–{max(shared):.0f} | {spilling} | {too_large} "
            f"| {tensor} of {len(products)} |"
        )
    return "\n".join(lines) + "\n"


def main() -> int:
    started = time.time()
    report = offline.in_clean_process(offline.KERNELS)
    offline.TABLE.parent.mkdir(parents=True, exist_ok=True)
    offline.TABLE.write_text(table(report, offline.assemblers()))
    offline.TABLE.with_suffix(".md").write_text(summary(report))
    broken = [sentence for row in report["rows"].items() for sentence in offline.violations(*row)]
    print(*broken, sep="\n")
    seconds = time.time() - started
    print(f"{offline.TABLE}: {len(report['rows'])} rows, {len(broken)} over budget, {seconds:.0f} s")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
