"""Compile kernels for accelerators that are not there, and read in the machine code what they will cost.

No kernel runs here. Triton compiles for any target on any host, and its package carries NVIDIA's
disassembler, so registers, spills, shared memory and tensor-core instructions are known beforehand. Measuring
needs a process of its own (``in_clean_process``): under ``TRITON_INTERPRET=1`` there is nothing to compile.
"""

import argparse
import hashlib
import importlib
import inspect
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import networkx  # torch depends on it, so it is there wherever we are
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from fastseq.kernels.jit import OPTIONS
from fastseq.kernels.limits import LIMITS

ROOT = Path(__file__).resolve().parents[2]
CACHE = ROOT / ".pytest_cache" / "d" / "offline"
RELEASE = triton.__version__.split("+")[0]
VERSION = tuple(int(part) for part in RELEASE.split(".")[:2])
TABLE = ROOT / "benchmarks" / "results" / "offline" / f"triton-{RELEASE}.json"
# Each has configurations(), which yields dicts: name, fn, signature, constexprs, num_warps, num_stages.
KERNELS = [
    *(f"fastseq.kernels.recurrent.{name}" for name in ("sequence", "pointwise", "cell")),
    "tests.support.persistent_rows",
    *(f"fastseq.kernels.attention.{name}" for name in ("forward", "backward", "decode")),
]
WORKERS = 2

Configuration = dict[str, Any]
Figures = dict[str, Any]


@dataclass(frozen=True)
class Target:
    """An architecture to compile for, and the shared memory (bytes) one program may have there."""

    gpu: GPUTarget
    shared: int
    # Where a spill or an oversized tile is an error; elsewhere it is reported and the planner has to refuse.
    no_spills: bool = False
    must_fit: bool = True


TARGETS = {
    "sm_80": Target(GPUTarget("cuda", 80, 32), 163 * 1024, no_spills=True),
    "sm_90": Target(GPUTarget("cuda", 90, 32), 227 * 1024, no_spills=True),
    "sm_100": Target(GPUTarget("cuda", 100, 32), 227 * 1024),
    "gfx942": Target(GPUTarget("hip", "gfx942", 64), 64 * 1024, must_fit=False),
}


# --- compiling ---


def source(configuration: Configuration) -> ASTSource:
    """What the launcher would compile: pointers and strides divisible by 16, no other specialisation.

    Integers that vary per call are strides by their name, or never specialised; what is neither is a float.
    """
    fn, signature = configuration["fn"], {}
    for parameter in fn.params:  # Triton reads them in order
        name, kind = parameter.name, configuration["signature"][parameter.name]
        whole = kind != "i32" or name.startswith("stride_") or parameter.do_not_specialize
        signature[name] = kind if whole else "fp32"
    aligned = [
        i for i, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") or (kind == "i32" and name.startswith("stride_"))
    ]  # fmt: skip
    return ASTSource(
        fn,
        signature=signature,
        constexprs=configuration["constexprs"],
        attrs={(i,): [["tt.divisibility", 16]] for i in aligned},
    )


def figures_of(configuration: Configuration, target_name: str, more: Callable[[Any], Figures] | None = None) -> Figures:
    """Figures of one configuration on one target, or ``{"error": ...}`` with the compiler's last words.

    ``more`` reads further figures off a compiled kernel.
    """
    target, options = TARGETS[target_name], {name: configuration[name] for name in ("num_warps", "num_stages")}
    src = source(configuration)
    readers = [reading(), *([inspect.getsource(more)] if more else [])]
    key = json.dumps([src.hash(), target_name, options | OPTIONS, triton.__version__, *readers])
    kept = CACHE / f"{hashlib.sha256(key.encode()).hexdigest()}.json"
    if kept.exists():
        figures = json.loads(kept.read_text())
    else:
        try:
            kernel = triton.compile(src, target=target.gpu, options=options | OPTIONS)
        except Exception as error:  # every way in which a compiler fails is a row of the table
            return {"error": f"{type(error).__name__}: {error}".strip().splitlines()[-1]}
        figures = read_amdgcn(kernel) if target.gpu.backend == "hip" else read_cubin(kernel)
        figures |= more(kernel) if more else {}
        CACHE.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps(figures))
        partial.replace(kept)  # at once, for the other worker
    too_large = figures["shared"] > target.shared
    return options | figures | {"kernel": configuration["fn"].__name__, "too_large": too_large}


@cache
def reading() -> str:
    """What a kept figure depends on beside the kernel: how machine code is read here."""
    readers = (read_cubin, read_amdgcn, count, dots, parse_sass, loops, named, called, successors, parse_amdgcn)
    return repr(INSTRUCTIONS) + "".join(inspect.getsource(reader) for reader in readers)


def assemblers() -> dict[str, str]:
    """The versions of the assemblers that this Triton brings."""
    said = {name: run(name, "--version") for name in ("ptxas", "ptxas-blackwell")}
    return {name: re.search(r"V([\d.]+)", text)[1] for name, text in said.items()}


# --- reading machine code ---

INSTRUCTIONS = {
    "cuda": {
        "hgmma": r"HGMMA\b",
        "hmma": r"HMMA\b",
        "utcmma": r"UTC\w*MMA\b",
        "lds": r"LDS\b",
        "ldsm": r"LDSM\b",
        "ldg128": r"LDG\.E\.(\w+\.)*128\b",
        "bar": r"BAR\b",
    },
    "hip": {
        "mfma": r"v_mfma_",
        "lds": r"ds_read",
        "ldg128": r"(global|buffer)_load_dwordx4\b",
        "bar": r"s_barrier\b",
    },
}
TENSOR_CORES = ("hgmma", "hmma", "utcmma", "mfma")


@dataclass(frozen=True)
class Instruction:
    """One line of machine code: its opcode, its operands, and the predicate (or "") that may skip it."""

    opcode: str
    operands: str = ""
    predicate: str = ""


def run(name: str, *args: str) -> str:
    """Output of one of the NVIDIA tools that Triton brings."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    return subprocess.run([tool, *args], capture_output=True, text=True, check=True).stdout


def read_cubin(kernel: Any) -> Figures:
    """Figures of a kernel compiled for NVIDIA, from its disassembly."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        usage, listing = run("cuobjdump", "-res-usage", cubin.name), run("nvdisasm", "-c", "-ndf", cubin.name)
    resources = dict(re.findall(r"\b(REG|STACK):(\d+)", usage))
    code, labels = parse_sass(listing)
    return {
        "registers": int(resources["REG"]),
        "stack": int(resources["STACK"]),
        "shared": kernel.metadata.shared,
        **dots(kernel.asm["ttir"]),
        **count("cuda", code, loops(code, labels), spill=lambda line: line.opcode.startswith(("LDL", "STL"))),
    }


def read_amdgcn(kernel: Any) -> Figures:
    """Figures of a kernel compiled for AMD, from its assembly and the metadata at its end."""
    text = kernel.asm["amdgcn"]
    entries = re.findall(r"^\s+(?:- )?\.(\w+):\s+(\d+)$", text, re.MULTILINE)
    metadata = {key: int(value) for key, value in entries}
    code, inside = parse_amdgcn(text)
    return {
        "registers": metadata["vgpr_count"],
        "stack": metadata["private_segment_fixed_size"],
        "vgpr_spills": metadata["vgpr_spill_count"],
        "sgpr_spills": metadata["sgpr_spill_count"],
        # .group_segment_fixed_size is zero: Triton asks for its shared memory at launch.
        "shared": max(kernel.metadata.shared, metadata["group_segment_fixed_size"]),
        **dots(kernel.asm["ttir"]),
        **count("hip", code, inside, spill=lambda line: "Folded" in line.operands),
    }


def count(backend: str, code: list[Instruction], inside: set[int], spill: Any) -> Figures:
    """Count instructions in the whole kernel, and in its loops (``inside``: the indices of what repeats)."""
    counts = Counter[str]()
    for i, line in enumerate(code):
        kinds = [kind for kind, pattern in INSTRUCTIONS[backend].items() if re.match(pattern, line.opcode)]
        kinds += ["spills"] if spill(line) else []
        counts.update(kinds)
        if i in inside:
            counts.update(f"loop_{kind}" for kind in kinds if kind == "spills" or kind in TENSOR_CORES)
    tensor = [kind for kind in INSTRUCTIONS[backend] if kind in TENSOR_CORES]
    names = [*INSTRUCTIONS[backend], "spills", "loop_spills", *(f"loop_{kind}" for kind in tensor)]
    sizes = {"instructions": len(code), "loop_instructions": len(inside)}
    return sizes | {name: counts[name] for name in names}


def dots(ttir: str) -> Figures:
    """How many products tensor cores could do (``dots``), and how many a warp group could (``warp_group_dots``).

    float32 counts only where the kernel asked for TF32. The instruction of a warp group (sm_90) takes 64 rows;
    of the columns Triton 3.9 gives it 8 or more, 3.6 only 16 or more, and it leaves the rest to single warps.
    """
    columns_least = 8 if VERSION >= (3, 9) else 16
    shapes = []
    for line in re.findall(r"tt\.dot .*", ttir):
        left, right = re.search(r": tensor<([^>]*)> \* tensor<([^>]*)>", line).groups()
        rows, _, dtype = left.split("x")[-3:]
        if dtype in ("f16", "bf16") or (dtype == "f32" and "tf32" in line):
            shapes.append((int(rows), int(right.split("x")[-2])))
    wide = sum(rows % 64 == 0 and columns >= columns_least for rows, columns in shapes)
    return {"dots": len(shapes), "warp_group_dots": wide}


def parse_sass(listing: str) -> tuple[list[Instruction], dict[str, int]]:
    """Instructions of an nvdisasm listing, and for every label the index of the instruction after it."""
    code: list[Instruction] = []
    labels: dict[str, int] = {}
    for line in listing.splitlines():
        if label := re.match(r"([.$\w]+):$", line):
            labels[label[1]] = len(code)
        elif found := re.match(r"\s+/\*[0-9a-f]+\*/\s+(@!?\w+)?\s*([A-Z][\w.]*)\s*(.*?)\s*;", line):
            code.append(Instruction(found[2], found[3], found[1] or ""))
    while code and code[-1].opcode == "NOP":  # padding of the section
        code.pop()
    return code, labels


def loops(code: list[Instruction], labels: dict[str, int]) -> set[int]:
    """Indices of instructions that can run again: the cycles of the control flow and the functions they call.

    Not simply the span from a branch's target down to the branch: ptxas moves waiting loops behind the end of
    the kernel, so such spans would cover code that runs once.
    """
    flow = networkx.DiGraph()
    flow.add_nodes_from(range(len(code)))
    for i in range(len(code)):
        flow.add_edges_from((i, j) for j in successors(i, code, labels) if j < len(code))
    cycles = [cycle for cycle in networkx.strongly_connected_components(flow) if len(cycle) > 1]
    inside = set().union(*cycles)
    starts = sorted({at for name, at in labels.items() if name.startswith("$")} | {len(code)})
    for i in sorted(inside):
        for name in called(code[i]):
            start = labels[name]
            inside.update(range(start, next(end for end in starts if end > start)))
    return inside


def named(line: Instruction) -> list[str]:
    return re.findall(r"`\(([^)]+)\)", line.operands)


def called(line: Instruction) -> list[str]:
    """Functions that this line calls. ptxas also writes branches as a CALL; their labels begin with a dot."""
    return [name for name in named(line) if name.startswith("$")] if line.opcode.startswith("CALL") else []


def successors(i: int, code: list[Instruction], labels: dict[str, int]) -> Iterator[int]:
    """Where control may go after instruction ``i``."""
    line, (kind, *_) = code[i], code[i].opcode.split(".")
    if kind in ("BRX", "BRXU", "JMX", "JMXU"):
        raise ValueError(f"{line}: a computed branch, so the loops cannot be told from the listing")
    if kind == "BSYNC":  # goes to where its BSSY said; nearly always the next line
        barrier = line.operands.split()[0]
        joins = {
            labels[name]
            for other in code
            if other.opcode.startswith("BSSY") and other.operands.startswith(f"{barrier},")
            for name in named(other)
        }
        yield from [i + 1] if i + 1 in joins else [i + 1, *joins] if line.predicate else joins
        return
    if kind not in ("RET", "MOV", "LEPC"):
        yield from (labels[name] for name in named(line) if name in labels and not name.startswith("$"))
    ends = kind in ("EXIT", "RET", "JMP") or (kind == "BRA" and line.operands.startswith("`("))
    if not ends or line.predicate:
        yield i + 1


def parse_amdgcn(text: str) -> tuple[list[Instruction], set[int]]:
    """Instructions of LLVM's assembly, and the indices of those in a loop: LLVM notes it at every block."""
    code: list[Instruction] = []
    inside: set[int] = set()
    looping = False
    for line in text.splitlines():
        if re.match(r"\.LBB\w+:|; %bb\.\d+:", line):
            looping = " Loop" in line
        elif re.match(r"\s+;.* Loop", line):
            looping = True  # a block inside several loops names each on a line of its own
        elif found := re.match(r"\t([a-z]\w+)(.*)", line):
            if looping:
                inside.add(len(code))
            code.append(Instruction(found[1], found[2]))
    return code, inside


# --- judging ---


def violations(row: str, figures: Figures) -> list[str]:
    """What is wrong with a row of the table, a sentence each; an empty list where the budget holds."""
    if "error" in figures:
        return [f"{row}: does not compile: {figures['error']}"]
    name = row.rsplit(" ", 1)[1]
    target = TARGETS[name]
    wrong = []
    if target.no_spills and figures["loop_spills"]:
        wrong.append(f"{row}: {figures['loop_spills']} spills in a loop, {figures['stack']} bytes of stack")
    if target.must_fit and figures["too_large"]:
        wrong.append(f"{row}: {figures['shared']} bytes of shared memory, {name} has {target.shared}")
    if figures["dots"] and not any(figures.get(kind) for kind in TENSOR_CORES):
        wrong.append(f"{row}: {figures['dots']} products, none on tensor cores")
    if name == "sm_90" and figures["warp_group_dots"] and not figures["num_warps"] % 4:
        wide, alone = figures["warp_group_dots"], figures["hmma"]
        if not figures["hgmma"]:
            wrong.append(f"{row}: {wide} products for warp groups, none done so (HGMMA)")
        elif alone and wide == figures["dots"]:
            wrong.append(f"{row}: {wide} products for warp groups, but {alone} instructions of single warps (HMMA)")
    return wrong


# --- measuring ---


@cache
def published(module: str, target: str) -> dict[str, Configuration]:
    """The configurations that a module of kernels publishes for a target, by name."""
    configurations = importlib.import_module(module).configurations
    depends = inspect.signature(configurations).parameters  # on what the device has, for kernels that are planned
    listed = list(configurations(LIMITS[target]) if depends else configurations())
    by_name = {configuration["name"]: configuration for configuration in listed}
    if len(by_name) != len(listed):
        raise ValueError(f"{module}: names of configurations repeat: {Counter(c['name'] for c in listed)}")
    return by_name


def kind(configuration: Configuration) -> tuple[str, ...]:
    """Kernel and cell, which shows in the jit functions that the kernel was given; and whether it knows positions."""
    given = configuration["constexprs"].values()
    positions = [name for name, of in configuration["signature"].items() if "position" in name and of.startswith("*")]
    return configuration["fn"].__name__, *(v.__name__ for v in given if isinstance(v, JITFunction)), *positions


def representative(configurations: dict[str, Configuration], target: str) -> list[str]:
    """Of each kernel and cell a few names: the first of those that take the most tensors, or the fewest, or both.

    The most where a spill is an error, for there registers are short; the fewest where it is not, and on sm_90,
    where tensor cores may fall idle.
    """
    kinds: dict[tuple[str, ...], list[Configuration]] = {}
    for configuration in configurations.values():
        kinds.setdefault(kind(configuration), []).append(configuration)
    extremes = [max] * TARGETS[target].no_spills + [min] * (target == "sm_90" or not TARGETS[target].no_spills)
    return sorted({extreme(same, key=tensors)["name"] for same in kinds.values() for extreme in extremes})


def tensors(configuration: Configuration) -> int:
    return sum(argument.startswith("*") for argument in configuration["signature"].values())


def measure(modules: list[str], subset: bool) -> dict[str, Any]:
    """Rows of the table: every configuration of these modules on every target, or only the representative."""
    pairs = [(module, target) for module in modules for target in TARGETS]
    expected = [f"{name} {target}" for module, target in pairs for name in published(module, target)]
    jobs = [
        (module, name, target)
        for module, target in pairs
        for name in (representative(published(module, target), target) if subset else published(module, target))
    ]
    rows = {}
    with ProcessPoolExecutor(WORKERS, multiprocessing.get_context("spawn")) as pool:
        for done, (name, figures) in enumerate(pool.map(row, *zip(*jobs, strict=True)), 1):
            rows[name] = figures
            if done % 100 == 0:
                print(f"{done} of {len(jobs)} compiled", file=sys.stderr, flush=True)
    return {"triton": triton.__version__, "expected": expected, "rows": rows}


def row(module: str, name: str, target: str) -> tuple[str, Figures]:
    return f"{name} {target}", figures_of(published(module, target)[name], target)


def in_clean_process(modules: list[str], subset: bool = False) -> dict[str, Any]:
    """Measure in a fresh process: no interpreter, no TRITON_ settings of the caller, one thread a worker."""
    env = {name: value for name, value in os.environ.items() if not name.startswith("TRITON_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    with tempfile.TemporaryDirectory() as folder:
        env["TRITON_CACHE_DIR"] = folder  # of a kernel only its figures are kept: they are far smaller
        out = Path(folder) / "report.json"
        command = [sys.executable, __file__, "--out", str(out), *(["--subset"] if subset else []), *modules]
        subprocess.run(command, env=env, check=True)
        return json.loads(out.read_text())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("modules", nargs="+")
    parser.add_argument("--subset", action="store_true", help="of each kernel and cell only one")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    args.out.write_text(json.dumps(measure(args.modules, args.subset)))
