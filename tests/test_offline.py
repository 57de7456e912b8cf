"""Laws about what the compiler makes of the kernels that we ship, for GPUs that need not be there."""

import json
import os
from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("triton")

import triton
import triton.language as tl

from .support import offline

TOYS = ["tests.test_offline"]  # this module, imported again by the process that compiles


@triton.jit(do_not_specialize=["T"])
def product_kernel(x_ptr, w_ptr, y_ptr, T, H: tl.constexpr, B: tl.constexpr, OTHERS: tl.constexpr):
    """A time loop around one product; OTHERS more tiles stay alive across it."""
    offs_h, offs_b = tl.arange(0, H), tl.arange(0, B)
    w = tl.load(w_ptr + offs_h[:, None] * H + offs_h[None, :])
    y = tl.zeros([H, B], tl.float32)
    others = ()
    for n in tl.static_range(OTHERS):
        tile = tl.load(x_ptr + n * H * B + offs_h[:, None] * B + offs_b[None, :])
        others = others + (tile.to(tl.float32),)  # noqa: RUF005  (jit functions know no unpacking)
    for _ in range(T):
        y = tl.dot(w, y.to(w.dtype))
        for n in tl.static_range(OTHERS):
            y += others[n] * y
        tl.debug_barrier()
    tl.store(y_ptr + offs_h[:, None] * B + offs_b[None, :], y.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def sum_kernel(x_ptr, y_ptr, T, H: tl.constexpr):
    """A time loop without a product."""
    offs_h = tl.arange(0, H)
    y = tl.zeros([H], tl.float32)
    for t in range(T):
        y += tl.load(x_ptr + t * H + offs_h).to(tl.float32)
    tl.store(y_ptr + offs_h, y.to(y_ptr.dtype.element_ty))


@triton.jit(do_not_specialize=["T"])
def strided_kernel(x_ptr, stride_xt, y_ptr, T, scale, H: tl.constexpr):
    """Rows that lie a stride apart; ``exp2`` takes no integer, so the scale is a float or nothing compiles."""
    offs_h = tl.arange(0, H)
    y = tl.zeros([H], tl.float32)
    for t in range(T):
        y += tl.load(x_ptr + t * stride_xt + offs_h).to(tl.float32) * tl.exp2(scale)
    tl.store(y_ptr + offs_h, y.to(y_ptr.dtype.element_ty))


def configurations() -> Iterator[offline.Configuration]:
    """Kernels whose figures are known beforehand: one to please every check, and one to fail each of them."""

    def product(name: str, dtype: str = "bf16", **sizes: int) -> offline.Configuration:
        constexprs = {"H": 64, "B": 16, "OTHERS": 0} | sizes
        pointers = dict.fromkeys(("x_ptr", "w_ptr", "y_ptr"), f"*{dtype}")
        signature = {**pointers, "T": "i32", **dict.fromkeys(constexprs, "constexpr")}
        kernel = {"fn": product_kernel, "signature": signature, "constexprs": constexprs}
        return {"name": name, **kernel, "num_warps": 4, "num_stages": 1}

    yield product("good")
    yield product("spilling", B=64, OTHERS=12)
    yield product("too large", "fp32", H=256)
    yield {
        "name": "no product",
        "fn": sum_kernel,
        "signature": {"x_ptr": "*bf16", "y_ptr": "*bf16", "T": "i32", "H": "constexpr"},
        "constexprs": {"H": 512},
        "num_warps": 4,
        "num_stages": 1,
    }
    yield {
        "name": "strided",
        "fn": strided_kernel,
        "signature": {
            "x_ptr": "*bf16",
            "stride_xt": "i32",
            "y_ptr": "*bf16",
            "T": "i32",
            "scale": "i32",
            "H": "constexpr",
        },
        "constexprs": {"H": 1024},
        "num_warps": 4,
        "num_stages": 1,
    }
    yield product("broken", H=48)  # not a power of two


@pytest.fixture(scope="module")
def toys() -> dict[str, offline.Figures]:
    return offline.in_clean_process(TOYS)["rows"]


@pytest.fixture(scope="module")
def shipped() -> dict[str, Any]:
    """What the compiler makes of our kernels: by default the representative configurations of each kernel and cell.

    With FASTSEQ_OFFLINE=all of every configuration, as ``python benchmarks/offline.py`` does.
    """
    return offline.in_clean_process(offline.KERNELS, subset=os.environ.get("FASTSEQ_OFFLINE") != "all")


@pytest.fixture(scope="module")
def table() -> dict[str, offline.Figures]:
    if not offline.TABLE.exists():
        pytest.skip(f"no checked-in table for triton {triton.__version__}: budgets only")
    return json.loads(offline.TABLE.read_text())["rows"]


def complaints(rows: dict[str, offline.Figures], name: str) -> dict[str, list[str]]:
    """What is wrong with a configuration, by target; targets where nothing is are left out."""
    names = {target: f"{name} {target}" for target in offline.TARGETS}
    return {target: wrong for target, row in names.items() if (wrong := offline.violations(row, rows[row]))}


def test_every_kernel_keeps_its_budget(shipped: dict[str, Any]) -> None:
    """It compiles for every target; spills in no loop, fits in shared memory, multiplies on tensor cores."""
    assert shipped["rows"]
    broken = [sentence for row in shipped["rows"].items() for sentence in offline.violations(*row)]
    assert not broken, "\n".join(broken)


def test_figures_are_those_of_the_table(shipped: dict[str, Any], table: dict[str, offline.Figures]) -> None:
    """The same Triton brings the same assembler, so every figure is equal; a change shows in a diff."""
    changed = [
        f"{row}: {figure} {table[row].get(figure, 0)} in the table, now {value}"
        for row, figures in shipped["rows"].items()
        for figure, value in figures.items()
        if row in table and table[row].get(figure, 0) != value  # zeros are left out of the table
    ]
    assert not changed, "\n".join([*changed, "if this is meant: python benchmarks/offline.py"])


def test_table_lists_what_is_shipped(shipped: dict[str, Any], table: dict[str, offline.Figures]) -> None:
    assert table.keys() == set(shipped["expected"]), "run python benchmarks/offline.py"


def test_a_good_kernel_passes(toys: dict[str, offline.Figures]) -> None:
    assert not complaints(toys, "good")
    for row in ("sm_80 hmma", "sm_90 hgmma", "sm_100 utcmma", "gfx942 mfma"):
        target, instruction = row.split()
        assert toys[f"good {target}"][f"loop_{instruction}"]


def test_spills_are_caught(toys: dict[str, offline.Figures]) -> None:
    wrong = complaints(toys, "spilling")
    assert wrong.keys() == {"sm_80", "sm_90"}
    assert all("spills in a loop" in sentence for (sentence,) in wrong.values())


def test_strides_and_numbers_are_compiled_as_launched(toys: dict[str, offline.Figures]) -> None:
    """Rows of a stride that Triton may look at are read 16 bytes at a time; what is no integer is a float."""
    assert toys["strided sm_90"]["ldg128"]


def test_spills_before_the_loop_are_not_held_against_it() -> None:
    listing = """
.text.kernel:
        /*0000*/              LDL R2, [R1] ;
        /*0010*/              BSSY B0, `(.L_x_1) ;
        /*0020*/         @!P0 CALL.REL.NOINC `(.L_x_3) ;
.L_x_0:
        /*0030*/              HMMA.16816.F32 R4, R8, R12, R4 ;
        /*0040*/          @P1 BRA `(.L_x_2) ;
.L_x_1:
        /*0050*/              CALL.REL.NOINC `($divide) ;
        /*0060*/          @P0 BRA `(.L_x_0) ;
.L_x_3:
        /*0070*/              STL [R1], R2 ;
        /*0080*/              EXIT ;
.L_x_2:
        /*0090*/              LDL R3, [R1+0x4] ;
        /*00a0*/              BSYNC B0 ;
        .weak           $divide
$divide:
        /*00b0*/              MUFU.RCP R5, R6 ;
        /*00c0*/              RET.REL.NODEC R20 `(kernel) ;
        /*00d0*/              NOP;
"""
    code, labels = offline.parse_sass(listing)
    repeated = [code[i].opcode for i in sorted(offline.loops(code, labels))]
    loop, behind, function = "HMMA.16816.F32 BRA CALL.REL.NOINC BRA", "LDL BSYNC", "MUFU.RCP RET.REL.NODEC"
    assert repeated == f"{loop} {behind} {function}".split()


def test_a_computed_branch_is_refused() -> None:
    code, labels = offline.parse_sass("        /*0000*/                   BRX R2 -0x10 ;\n")
    with pytest.raises(ValueError, match="computed branch"):
        offline.loops(code, labels)


def test_too_much_shared_memory_is_caught(toys: dict[str, offline.Figures]) -> None:
    wrong = complaints(toys, "too large")
    assert all("bytes of shared memory" in wrong[target][-1] for target in ("sm_80", "sm_90", "sm_100"))
    assert toys["too large gfx942"]["too_large"]  # said there, for the planner to refuse


def test_idle_tensor_cores_are_caught(toys: dict[str, offline.Figures]) -> None:
    idle = dict.fromkeys(offline.TENSOR_CORES, 0)
    ampere, hopper = toys["good sm_80"] | idle, toys["good sm_90"] | idle | {"hmma": 4}
    assert "none on tensor cores" in offline.violations("good sm_80", ampere)[0]
    assert "none done so" in offline.violations("good sm_90", hopper)[0]
    assert "single warps" in offline.violations("good sm_90", toys["good sm_90"] | {"hmma": 4})[0]


def test_a_kernel_without_a_product_uses_no_tensor_cores(toys: dict[str, offline.Figures]) -> None:
    for target in offline.TARGETS:
        figures = toys[f"no product {target}"]
        assert figures["dots"] == 0
        assert not any(figures.get(kind) for kind in offline.TENSOR_CORES)
    assert not complaints(toys, "no product")


def test_a_kernel_that_does_not_compile_is_caught(toys: dict[str, offline.Figures]) -> None:
    wrong = complaints(toys, "broken")
    assert wrong.keys() == offline.TARGETS.keys()
    assert "power of 2" in wrong["sm_90"][0]
