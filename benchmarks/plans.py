"""Choose how persistent kernels are cut: compile the ways there are, read what each costs, and model a step.

    python benchmarks/plans.py                      # needs no GPU
    python benchmarks/plans.py --measure lstm bf16 768 16   # on a GPU: the ways of a size, timed

The first writes ``kernels/recurrent/plans.py``, all that the planner reads, and ``results/plans/<target>.json`` with
every way that was compiled, and why it was passed over; ``plans.md`` beside it has the chosen ones and the floor. A
measured time, once there is one, takes the place of the modelled one in the table; the results keep both.

The search goes through the ways of a size in the order of a bound that needs no compiler, and ends when no bound is
under the best way so far. A way is out if its time loop spills or leaves the tensor cores idle, or if a program does
not fit. ``ROOM`` keeps wide tiles from taking the whole device for one of them.

The model
---------
A step is latency, so its parts add up: cycles of one program from its h being known to that of the next step.

handshake  ``CROSSINGS`` ways through the L2 cache: the writes of h are acknowledged, the counter is counted up, the
           last one's count is seen, and the others' h is read: four, each of ``l2_latency``
exchange   what a program reads of the others, over its share of the L2 cache's bandwidth, 64 bytes a cycle at most
products   the larger of: ``mma`` cycles for each of the matrix instructions that wait for one another, counted in the
           machine code by the registers they add up in; and all bytes that the time loop moves to and from shared
           memory, over ``shared_port``. A warp group's instruction reads its left tile there, and pipelines
           its sums: ``wgmma`` cycles each
pointwise  ``POINTWISE`` cycles: two nonlinearities that follow one another, of an exponential and a quotient each
issue      the instructions of the time loop, one per cycle for each of the four schedulers

and not less than ``traffic``: what all programs read and write in the memory of the device, over its bandwidth.

Constants, of which none was measured here:

clock, shared_port, l2, memory: table 3 of PMC10448217 (A100 and H100: 1.410 and 1.755 GHz; 23,101 and 32,348 GB/s
           over 128 and 144 multiprocessors are 128 bytes per cycle; L2 7,219 and 8,986 GB/s are 5,120 bytes per
           cycle; 1,555 and 3,352 GB/s)
l2_latency 200 cycles in the same table; 260 is taken, for half of the cache is far away
mma        33 cycles: 64 dependent products of 16 are 1.2 µs
wgmma      16 cycles: 64 rows of 32 bytes from shared memory
POINTWISE  an estimate: 2 x (exponential 40, quotient 60, additions 20)

The floor beside a modelled time is a model as well, of H100, LSTM, bf16, forward (``FLOOR``): latency of one exchange
plus the products of a step on all multiprocessors. Between its sizes it is interpolated, in the logarithm of the size.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from itertools import pairwise, product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # run as a script, so it is not there yet
if __name__ == "__main__":
    os.environ.pop("TRITON_INTERPRET", None)  # under which there is nothing to compile

import networkx  # noqa: E402  (needs the path above, as do the next)
import torch  # noqa: E402

from fastseq.kernels.limits import LIMITS  # noqa: E402
from fastseq.kernels.recurrent.plan import Plan, Tiles, padded  # noqa: E402
from fastseq.kernels.recurrent.steps import STEPS  # noqa: E402
from tests.support import offline  # noqa: E402

COMMAND = "python benchmarks/plans.py"
TABLE = ROOT / "kernels" / "recurrent" / "plans.py"
RESULTS = ROOT / "benchmarks" / "results" / "plans"
TARGETS = ("sm_90", "sm_80")
CELLS = ("lstm", "gru")
TYPES = {"bf16": torch.bfloat16, "tf32": torch.float32}
HIDDEN = (256, 512, 768, 1024)
ROOM = {8: 1, 16: 1, 32: 2}  # tiles of the batch, by their width, that should find room on the device together
UNITS = (8, 16, 32, 64)
WARPS = (4, 8)

CROSSINGS = 4
POINTWISE = 240
ENOUGH = 1  # ways of a size and a width that hold, from which the best is taken
FLOOR = {
    256: {1: 0.9, 16: 0.9, 64: 1.0, 256: 1.3},
    512: {1: 0.9, 16: 1.1, 64: 1.3, 256: 2.4},
    1024: {1: 1.0, 16: 1.5, 64: 2.6, 256: 8.0},
    2048: {1: 1.6, 16: 3.4, 64: 10.9, 256: 41.0},
}


class Device(NamedTuple):
    """The constants of the model, in cycles and in bytes per cycle; of one multiprocessor but for ``l2``."""

    clock: float  # GHz
    memory: float  # GB/s
    l2: int = 5120  # of all multiprocessors together
    l2_port: int = 64
    l2_latency: int = 260
    shared_port: int = 128
    mma: int = 33
    wgmma: int = 16


DEVICES = {"sm_90": Device(1.755, 3352), "sm_80": Device(1.410, 1555)}


class Way(NamedTuple):
    """One way to cut a size."""

    cell: str
    kind: str  # of TYPES
    H: int
    block_b: int
    units: int
    num_warps: int

    @property
    def slices(self) -> int:
        return -(-self.H // self.units)

    @property
    def plan(self) -> Plan:
        reads = "tf32" if self.kind == "tf32" else "ieee"
        return Plan("persistent", "a way", self.block_b, padded(self.H), self.num_warps, reads, self.units)


def floor(H: int, B: int) -> float:
    """The floor's µs of a step, for the sizes between its own along the logarithms."""

    def between(table: dict[int, float], at: int) -> float:
        if at <= min(table):
            return table[min(table)]
        low, high = next((low, high) for low, high in pairwise(table) if low <= at <= high)
        part = math.log(at / low) / math.log(high / low)
        return table[low] ** (1 - part) * table[high] ** part

    return between({size: between(row, B) for size, row in FLOOR.items()}, H)


# --- reading the time loop ---


def time_loop(kernel: Any) -> offline.Figures:
    """Of the largest loop: its instructions, the longest chain of products, and a warp's bytes of shared memory."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        code, labels = offline.parse_sass(offline.run("nvdisasm", "-c", "-ndf", cubin.name))
    flow = networkx.DiGraph()
    for i in range(len(code)):
        flow.add_edges_from((i, j) for j in offline.successors(i, code, labels) if j < len(code))
    loop = [code[i] for i in max(networkx.strongly_connected_components(flow), key=len)]
    chain, moved = dict[str, int](), 0
    for line in loop:
        name, *parts = line.opcode.split(".")
        if name in ("HMMA", "HGMMA"):
            into, left, *others = line.operands.split(", ")
            onto = [operand for operand in others if operand.startswith("R")][-1]
            chain[into] = 1 + chain.get(onto, 0)
        if name == "HGMMA":  # a warp reads its quarter of tiles 32 bytes wide
            rows, columns, _ = (int(size) for size in parts[0].split("x"))
            moved += 8 * (columns + rows * left.startswith("gdesc"))
        elif name in ("LDSM", "STSM"):
            moved += 128 * (int(parts[-1]) if parts[-1].isdigit() else 1)
        elif name in ("LDS", "STS"):
            moved += 512 if "128" in parts else 256 if "64" in parts else 128
    return {
        "step_instructions": len(loop),
        "step_chain": max(chain.values(), default=0),
        "step_shared": moved,
    }


# --- the model ---


def weight_bytes(way: Way) -> int:
    """What of the weight a program holds; its gates are padded to a power of two."""
    gates = 1 << (STEPS[way.cell].gates - 1).bit_length()
    return gates * way.units * padded(way.H) * TYPES[way.kind].itemsize


def exchanged_bytes(way: Way, backward: bool) -> int:
    """What a program reads of its group at every step: h, or the gradients of the recurrent gates."""
    return way.block_b * padded(way.H) * TYPES[way.kind].itemsize * (STEPS[way.cell].gates if backward else 1)


def traffic_bytes(way: Way, backward: bool) -> int:
    """What a group reads and writes of the layer's tensors at every step, in training."""
    step, size = STEPS[way.cell], TYPES[way.kind].itemsize
    if backward:
        each = size * (1 + step.saved + step.reads_h + step.gates * (1 + step.splits)) + 8 * step.cells
    else:
        each = size * (step.gates + step.saved + 1) + 4 * step.cells
    return each * way.H * way.block_b


def modelled(way: Way, target: str, figures: offline.Figures, backward: bool) -> dict[str, float]:
    """The parts of a step in µs and their sum, of one group on rows that fill it, as the module's docstring says."""
    of = DEVICES[target]
    each = of.wgmma if figures.get("hgmma") else of.mma
    cycles = {
        "handshake": CROSSINGS * of.l2_latency,
        "exchange": exchanged_bytes(way, backward) / min(of.l2_port, of.l2 / way.slices),
        "products": max(figures["step_chain"] * each, figures["step_shared"] * way.num_warps / of.shared_port),
        "pointwise": POINTWISE,
        "issue": figures["step_instructions"] * way.num_warps / 4,
    }
    parts = {part: n / of.clock / 1000 for part, n in cycles.items()}
    parts["traffic"] = traffic_bytes(way, backward) / of.memory / 1000
    parts["us"] = max(sum(parts.values()) - parts["traffic"], parts["traffic"])
    return {part: round(us, 3) for part, us in parts.items()}


def guess(way: Way, target: str) -> float:
    """What the model may come to, in cycles, before anything is compiled: the weight is read by all warps that need it.

    And so much is arithmetic. Warps beyond one for 16 rows multiply the same again for other rows of the batch.
    """
    of, gates = DEVICES[target], 1 << (STEPS[way.cell].gates - 1).bit_length()
    again = max(1, way.num_warps * 16 / (gates * way.units))
    products = again * weight_bytes(way) / of.shared_port
    exchange = sum(exchanged_bytes(way, backward) for backward in (False, True)) / min(of.l2_port, of.l2 / way.slices)
    return exchange + 2 * (products + way.units * way.block_b + 75 * way.num_warps)


# --- the search ---


class Row(NamedTuple):
    """A way that was compiled: its figures and modelled times, and why it is out, if it is."""

    way: Way
    out: str  # or ""
    forward: dict[str, Any]
    backward: dict[str, Any]

    @property
    def us(self) -> float:
        return self.forward["us"] + self.backward["us"]


def crowded(way: Way, target: str) -> bool:
    """Whether as many tiles of the batch as should find room do not."""
    return way.slices * ROOM[way.block_b] > LIMITS[target].sms


def ways(cell: str, kind: str, H: int, block_b: int, target: str) -> list[Way]:
    """The ways of a size that arithmetic does not rule out: those that leave room, the most promising first."""
    limits = LIMITS[target]
    every = [Way(cell, kind, H, block_b, units, warps) for units, warps in product(UNITS, WARPS)]
    able = [way for way in every if way.slices <= limits.sms and weight_bytes(way) < limits.shared]
    return sorted(able, key=lambda way: (crowded(way, target), guess(way, target)))


def compiled(way: Way, target: str) -> Row:
    from fastseq.kernels.recurrent.persistent import configurations_for

    pair = configurations_for(way.cell, way.H, TYPES[way.kind], way.kind == "tf32", way.plan)
    figures = [offline.figures_of(configuration, target, time_loop) for configuration in pair]
    out = ""
    for name, found in zip(("forward", "backward"), figures, strict=True):
        if "error" in found:
            out = out or f"{name} does not compile: {found['error']}"
        elif found["loop_spills"]:
            out = out or f"{name} spills: {found['loop_spills']} in the time loop"
        elif found["shared"] > LIMITS[target].shared:
            out = out or f"{name} needs {found['shared']} bytes, {target} has {LIMITS[target].shared}"
        elif not found["loop_hgmma"] + found["loop_hmma"]:
            out = out or f"{name} leaves the tensor cores idle"
    timed = [
        {"us": math.inf} if "error" in found else found | modelled(way, target, found, i == 1)
        for i, found in enumerate(figures)
    ]
    return Row(way, out, *timed)


def search(cell: str, kind: str, H: int, block_b: int, target: str) -> list[Row]:
    """Ways compiled, the most promising first, until ``ENOUGH`` of them hold."""
    rows: list[Row] = []
    for way in ways(cell, kind, H, block_b, target):
        if sum(not row.out for row in rows) == ENOUGH:
            break
        rows.append(compiled(way, target))
    return rows


# --- writing ---

COLUMNS = {
    "out": "why the way was passed over; what follows is forward's and backward's",
    "registers, shared, loop_spills, loop_hgmma, loop_hmma": "as in results/offline",
    "step_instructions, step_chain, step_shared": "of the time loop: instructions, products that wait for one another, "
    "bytes of shared memory a warp moves",
    "handshake, exchange, products, pointwise, issue, traffic, us": "the model, in µs",
}
KEPT = ("registers", "shared", "loop_spills", "loop_hgmma", "loop_hmma")
MODELLED = ("handshake", "exchange", "products", "pointwise", "issue", "traffic", "us")


def name_of(way: Way) -> str:
    return (
        f"{way.cell} {way.kind} H={way.H} rows {way.block_b} units {way.units} "
        f"warps {way.num_warps}"
    )  # fmt: skip


def written(row: Row) -> dict[str, Any]:
    def kept(found: dict[str, Any]) -> dict[str, Any]:
        return {figure: n for figure, n in found.items() if figure in (*KEPT, *MODELLED) or figure.startswith("step_")}

    out = {"out": row.out} if row.out else {}
    if row.forward["us"] == math.inf or row.backward["us"] == math.inf:
        return out
    return out | {"forward": kept(row.forward), "backward": kept(row.backward)}


def read_results(target: str) -> dict[str, Any]:
    path = RESULTS / f"{target}.json"
    return json.loads(path.read_text())["rows"] if path.exists() else {}


def write_results(target: str, rows: dict[str, Any]) -> None:
    header = {"regenerate": COMMAND, "triton": offline.RELEASE, "columns": COLUMNS}
    lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(row)}" for name, row in sorted(rows.items()))
    text = json.dumps(header, indent=1, ensure_ascii=False)[:-2]
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / f"{target}.json").write_text(f'{text},\n "rows": {{\n{lines}\n }}\n}}\n')


def way_of(name: str) -> Way:
    cell, kind, H, *numbers = name.split(" ")
    return Way(cell, kind, int(H.removeprefix("H=")), *(int(number) for number in numbers[1::2]))


def step_us(row: dict[str, Any]) -> float:
    """µs of a step, forward and backward: measured where that was done."""
    times = row.get("measured", row)
    return round(times["forward"]["us"] + times["backward"]["us"], 2)


def chosen(target: str) -> dict[tuple[str, str], dict[int, list[Tiles]]]:
    """Of the results the best way of each size and width."""
    rows = {way_of(name): row for name, row in read_results(target).items() if "out" not in row}
    table: dict[tuple[str, str], dict[int, list[Tiles]]] = {}
    for cell, kind, H, block_b in product(CELLS, TYPES, HIDDEN, ROOM):
        same = [way for way in rows if way[:4] == (cell, kind, H, block_b)]
        if same:
            way = min(same, key=lambda way: (crowded(way, target), step_us(rows[way])))
            shared = max(rows[way][pass_]["shared"] for pass_ in ("forward", "backward"))
            tiles = Tiles(way.block_b, way.units, way.num_warps, shared, step_us(rows[way]))
            table.setdefault((cell, kind), {}).setdefault(H, []).append(tiles)
    return table


HEAD = '''"""How persistent kernels are cut, for each size: chosen and written by ``python benchmarks/plans.py``.

``PLANS[shared memory of a program][cell, type][H]``: rows of ``plan.Tiles``, one for each width of a tile of the
batch. fp16 is cut as bf16; tf32 is float32 where PyTorch's switches allow TF32.
"""

PLANS: dict[int, dict[tuple[str, str], dict[int, tuple[tuple[int, int, int, int, float], ...]]]] = {
    # rows of the batch, units, warps, bytes of shared memory, µs of a step forward and backward
'''


def write_table() -> None:
    lines = [HEAD]
    for target in TARGETS:
        lines.append(f"    {LIMITS[target].shared}: {{  # {target}\n")
        for (cell, kind), sizes in chosen(target).items():
            lines.append(f'        ("{cell}", "{kind}"): {{\n')
            for H, tiles in sizes.items():
                lines.append(f"            {H}: {tuple(tuple(row) for row in tiles)},\n")
            lines.append("        },\n")
        lines.append("    },\n")
    TABLE.write_text("".join([*lines, "}\n"]))


def summary() -> str:
    """A readable page: what the planner answers for each size, and the model beside the floor."""
    from fastseq.kernels.recurrent.plan import plan

    lines = [
        "# How persistent kernels are cut, and what the model says",
        "",
        f"Written by `{COMMAND}`; nothing here is measured. Times are µs of a step, in one direction, in training; x",
        "is the multiple of the floor, which is a model too, of an H100 in bf16. A size between those of the table has",
        "the time of the next larger one. Each way that was compiled has a row in the JSON files.",
    ]
    for target in TARGETS:
        rows = read_results(target)
        for cell, kind in product(CELLS, TYPES):
            lines += [
                "",
                f"## {cell}, {kind}, {target}",
                "",
                "| H | B | programs | rows x units | warps | shared KB | registers | chain | forward | floor | x "
                "| backward |",
                "|---|---|---|---|---|---|---|---|---|---|---|---|",
            ]
            for H, B in product((256, 384, 512, 700, 768, 1024), (1, 16, 64)):
                how = plan(cell, H, H, TYPES[kind], True, LIMITS[target], B, 1)
                if how.regime != "persistent":
                    lines.append(f"| {H} | {B} | {how.regime}: {how.why} |")
                    continue
                listed = min(size for size in HIDDEN if size >= H)
                row = rows[name_of(Way(cell, kind, listed, how.block_b, how.units, how.num_warps))]
                programs = -(-B // how.block_b) * -(-H // how.units)
                forward, backward, least = row["forward"], row["backward"], floor(H, B)
                lines.append(
                    f"| {H} | {B} | {programs} | {how.block_b} x {how.units} | {how.num_warps} "
                    f"| {forward['shared'] / 1024:.0f}, {backward['shared'] / 1024:.0f} "
                    f"| {forward['registers']}, {backward['registers']} "
                    f"| {forward['step_chain']}, {backward['step_chain']} "
                    f"| {forward['us']:.2f} | {least:.2f} | {forward['us'] / least:.1f} | {backward['us']:.2f} |"
                )
    return "\n".join(lines) + "\n"


# --- measuring ---


def timed(way: Way, steps: int) -> dict[str, dict[str, float]]:
    """µs of a step of forward and of backward, on rows that fill a tile: the median of calls on this device."""
    from fastseq import stopwatch
    from fastseq.kernels.recurrent.persistent import persistent_backward, persistent_forward

    step, dtype, B, H = STEPS[way.cell], TYPES[way.kind], way.block_b, way.H

    def draw(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.randn(*shape, dtype=dtype, device="cuda") / H**0.5

    x, w, h0 = draw(steps, B, 1, step.gates * H), draw(1, step.gates * H, H), draw(1, B, H)
    bias = draw(1, step.gates * H) if step.splits else None
    c0 = draw(1, B, step.cells * H) if step.cells else None
    nothing = dict.fromkeys(("params", "scale", "stay", "reset", "lengths"))

    def forward() -> Any:
        return persistent_forward(way.cell, x, w, b_hh=bias, h0=h0, c0=c0, **nothing, save=True, how=way.plan)

    y, _, _, cells, gates = forward()

    def backward() -> Any:
        return persistent_backward(
            way.cell, y, dh_n=h0, dc_n=c0, dcells=None, gates=gates, after=cells, h_prev=y, c_prev=cells, w_hh=w,
            **nothing, how=way.plan,
        )  # fmt: skip

    race = stopwatch.race({"forward": forward, "backward": backward}, rounds=20, again=False)
    return {name: {"us": round(1e3 * race.time(name).median / steps, 3)} for name in ("forward", "backward")}


def measure(cell: str, kind: str, H: int, block_b: int) -> int:
    """Times the ways of a size that hold, and keeps what was measured beside the model."""
    if not torch.cuda.is_available():
        print("--measure times kernels on the GPU it runs on, and there is none here")
        return 2
    from fastseq.stopwatch import provenance

    major, minor = torch.cuda.get_device_capability()
    target = f"sm_{major}{minor}"
    if target not in TARGETS:
        print(f"the table has {' and '.join(TARGETS)}; this GPU is {target}")
        return 2
    rows = read_results(target)
    for name, row in rows.items():
        if way_of(name)[:4] == (cell, kind, H, block_b) and "out" not in row:
            row["measured"] = timed(way_of(name), 512) | {"provenance": provenance("cuda")}
            print(f"{name}: modelled {step_us(row | {'measured': row})} µs, measured {step_us(row)} µs", flush=True)
    write_results(target, rows)
    write_table()
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--cells", nargs="+", default=CELLS, choices=CELLS)
    parser.add_argument("--kinds", nargs="+", default=list(TYPES), choices=TYPES)
    parser.add_argument("--targets", nargs="+", default=TARGETS, choices=TARGETS)
    parser.add_argument("--widths", nargs="+", default=list(ROOM), type=int, choices=ROOM)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--summary", action="store_true", help="print the page of what is chosen; nothing is compiled")
    parser.add_argument("--measure", nargs=4, metavar=("CELL", "KIND", "H", "ROWS"), help="time the ways of a size")
    asked = parser.parse_args()
    if asked.measure:
        cell, kind, H, block_b = asked.measure
        return measure(cell, kind, int(H), int(block_b))
    if asked.summary:
        print(summary(), end="")
        return 0
    sizes = list(product(asked.targets, asked.cells, asked.kinds, HIDDEN, asked.widths))
    with tempfile.TemporaryDirectory() as folder:
        os.environ |= {"TRITON_CACHE_DIR": folder, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        with ProcessPoolExecutor(asked.jobs, get_context("spawn")) as pool:
            found = {size: pool.submit(search, *size[1:], size[0]) for size in sizes}
            for (target, *size), rows in found.items():
                known = read_results(target)
                stale = [name for name in known if way_of(name)[:4] == tuple(size)]
                fresh = {name_of(row.way): written(row) for row in rows.result()}
                kept = {name: row for name, row in known.items() if name not in stale}
                measured = {
                    name: {"measured": known[name]["measured"]} for name in stale if "measured" in known[name]
                }  # fmt: skip
                write_results(target, kept | {name: row | measured.get(name, {}) for name, row in fresh.items()})
                print(target, *size, *(f"{row.us:.2f}{'!' if row.out else ''}" for row in rows.result()), flush=True)
    write_table()
    # A process of its own, that has read the table just written.
    (RESULTS / "plans.md").write_text(subprocess.check_output([sys.executable, __file__, "--summary"], text=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
