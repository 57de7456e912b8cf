"""Laws of the recurrent kernels: under the interpreter, or on a GPU with the same tests and larger shapes."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from fastseq.kernels.jit import NAMES, OPTIONS
from fastseq.kernels.limits import LIMITS
from fastseq.kernels.recurrent import cell as cell_kernels
from fastseq.kernels.recurrent import plan as planning
from fastseq.kernels.recurrent import pointwise, sequence
from fastseq.kernels.recurrent import stepwise as loops
from fastseq.kernels.recurrent.plan import DTYPES, Plan, plan, unsupported
from fastseq.kernels.recurrent.steps import STEPS, STOCK

from .support import kernels_recurrent as support
from .support.budget import assert_within_budget
from .support.kernels_recurrent import DEVICE, ON_GPU, Layer, by_kernels, by_reference, forward, layer

HIDDEN = (1, 7, 31, 33, 64, 100, 127, 128, 129)
T, B = (300, 33) if ON_GPU else (3, 3)


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    """What nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def stepwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the size, the regime for large ones."""
    monkeypatch.setattr(sequence, "plan", lambda *_: Plan("stepwise", "the test asks for it"))


def check(layer: Layer, dtype: torch.dtype) -> None:
    exact, peer = by_reference(layer, torch.float64), by_reference(layer, dtype)
    got = by_kernels(layer)
    assert got.keys() == exact.keys()
    for name, value in got.items():
        assert_within_budget(value, exact[name], peer[name], name)


def cases() -> list[Any]:
    """Every cell at every size in every type; directions and masks take turns, each meeting each."""
    turns = itertools.cycle(itertools.product((1, 2), (False, True)))
    everything = itertools.product(STOCK, HIDDEN, DTYPES)
    return [(cell, H, *turn, dtype) for (cell, H, dtype), turn in zip(everything, turns, strict=False)]


@pytest.mark.parametrize(("cell", "H", "D", "masked", "dtype"), cases())
def test_sequence_within_budget(cell: str, H: int, D: int, masked: bool, dtype: torch.dtype) -> None:
    check(layer(cell, T, B, H, dtype, D=D, masked=masked), dtype)


@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize(("cell", "dtype"), list(itertools.product(STOCK, DTYPES)))
def test_sequence_step_by_step_within_budget(cell: str, dtype: torch.dtype) -> None:
    check(layer(cell, T, B, 33, dtype, D=2, masked=True), dtype)
    if dtype == torch.float32:
        check(layer(cell, T, B, 7, dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_projection_within_budget(dtype: torch.dtype) -> None:
    check(layer("lstm", T, B, 33, dtype, P=7, D=2, masked=True), dtype)
    check(layer("lstm", T, B, 9, dtype, P=5), dtype)


def halves(whole: Layer, at: int) -> tuple[Layer, Layer]:
    first = Layer(whole.cell, whole.tensors | {"input": whole.tensors["input"][:at]}, None, None, [])
    _, h_n, c_n, *_ = forward(first)
    rest = whole.tensors | {"input": whole.tensors["input"][at:], "h0": h_n, "c0": c_n}
    return first, Layer(whole.cell, rest, None, None, [])


@pytest.mark.parametrize("regime", ["resident", "stepwise"])
@pytest.mark.parametrize("cell", STEPS)
def test_state_carries_over(cell: str, regime: str, request: pytest.FixtureRequest) -> None:
    if regime == "stepwise":
        request.getfixturevalue("stepwise")
    whole = layer(cell, 5, B, 16, torch.float32)
    y, h_n, *_ = forward(whole)
    first, second = (forward(half) for half in halves(whole, 2))
    assert torch.equal(y, torch.cat([first[0], second[0]]))
    assert torch.equal(h_n, second[1])


@pytest.mark.parametrize("regime", ["resident", "stepwise"])
@pytest.mark.parametrize("cell", STEPS)
def test_padding_cannot_be_seen(cell: str, regime: str, request: pytest.FixtureRequest) -> None:
    if regime == "stepwise":
        request.getfixturevalue("stepwise")
    padded = layer(cell, 4, B, 7, torch.float32, D=2, masked=True)
    past = torch.arange(4, device=DEVICE)[:, None] >= padded.lengths
    clean = by_kernels(padded)
    padded.tensors["input"] = padded.tensors["input"].masked_fill(past[..., None], float("nan"))
    padded.gradients[0] = padded.gradients[0].masked_fill(past[..., None], float("nan"))
    padded.reset = padded.reset | past
    seen = by_kernels(padded)
    assert not seen["y"][past].any()
    for name in clean.keys() - {"w_ih"}:  # whose product meets the NaN of the input itself
        assert torch.equal(clean[name], seen[name]), name


@pytest.mark.parametrize("cell", STEPS)
def test_batch_order_does_not_matter(cell: str) -> None:
    straight = layer(cell, 3, 11, 7, torch.float32, masked=True)  # more than one tile
    order = torch.randperm(11, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    shuffled = Layer(
        cell,
        straight.tensors | {k: straight.tensors[k][:, order] for k in ("input", "h0")},
        straight.reset[:, order].contiguous(),
        straight.lengths[order],
        [],
    )
    if STEPS[cell].cells:
        shuffled.tensors["c0"] = straight.tensors["c0"][:, order]
    # Not bit by bit: the library's product that makes the input gates depends on where a row stands.
    torch.testing.assert_close(forward(straight)[0][:, order], forward(shuffled)[0], atol=1e-6, rtol=0)


@pytest.mark.parametrize("cell", STEPS)
def test_a_step_that_resets_has_no_past(cell: str) -> None:
    whole = layer(cell, 4, B, 7, torch.float32)
    whole.reset = torch.zeros(4, B, dtype=torch.bool, device=DEVICE)
    whole.reset[2] = True
    y = forward(whole)[0]
    zeros = {k: None if whole.tensors[k] is None else torch.zeros_like(whole.tensors[k]) for k in ("h0", "c0")}
    rest = Layer(cell, whole.tensors | zeros | {"input": whole.tensors["input"][2:]}, None, None, [])
    assert torch.equal(y[2:], forward(rest)[0])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cell", STEPS)
def test_gates_can_be_computed_again(cell: str, dtype: torch.dtype) -> None:
    saved = layer(cell, 3, B, 33, dtype, D=2)
    y, _, _, cells, gates, x = forward(saved)
    t = saved.tensors
    h_prev = support.states_read(saved, y, t["h0"])
    c_prev = support.states_read(saved, cells, t["c0"].float()) if STEPS[cell].cells else None
    again, after = support.gates_again(saved, x, h_prev, c_prev)
    if cell == "slstm":  # the sign of f says which side of a maximum won: a rounding may decide
        again[..., 1, :].abs_(), gates[..., 1, :].abs_()
    # The product is rounded to the type before it is read again.
    torch.testing.assert_close(again, gates, atol=8 * torch.finfo(dtype).eps, rtol=0)
    if STEPS[cell].cells:
        torch.testing.assert_close(after, cells, atol=8 * torch.finfo(dtype).eps, rtol=0)


@pytest.mark.parametrize(
    ("B", "I", "H", "bias"),
    [(3, 5, 7, True), (17, 65, 33, False), (1, 1, 1, True), (5, 31, 129, True), (9, 128, 100, False)],
)
@pytest.mark.parametrize("cell", STOCK)
def test_cell_within_budget(cell: str, B: int, I: int, H: int, bias: bool) -> None:  # noqa: E741
    step = STEPS[cell]
    generator = torch.Generator().manual_seed(B)

    def draw(dtype: torch.dtype, *shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(DEVICE, dtype)

    for dtype in DTYPES:
        tensors = {
            "input": draw(dtype, B, I),
            "h": draw(dtype, B, H, scale=0.5),
            "c": draw(dtype, B, H, scale=0.5) if step.cells else None,
            "w_ih": draw(dtype, step.gates * H, I, scale=0.4),
            "w_hh": draw(dtype, step.gates * H, H, scale=H**-0.5),
            "b_ih": draw(dtype, step.gates * H, scale=0.4) if bias else None,
            "b_hh": draw(dtype, step.gates * H, scale=0.4) if bias else None,
        }
        gradients = [draw(dtype, B, H) for _ in range(1 + step.cells)]
        exact = support.cell_by_reference(cell, tensors, gradients, torch.float64)
        peer = support.cell_by_reference(cell, tensors, gradients, dtype)
        got = support.cell_by_kernels(cell, tensors, gradients)
        assert got.keys() == exact.keys()
        for name, value in got.items():
            assert_within_budget(value, exact[name], peer[name], f"{name} in {dtype}")


@pytest.mark.parametrize("target", LIMITS)
def test_what_fits_is_a_matter_of_size(target: str) -> None:
    limits = LIMITS[target]
    order = ("resident", "persistent", "stepwise")
    for cell, dtype, tf32 in itertools.product(STEPS, DTYPES, (True, False)):
        regimes = [order.index(plan(cell, H, H, dtype, tf32, limits, 16, 1).regime) for H in range(1, 1300, 11)]
        assert regimes == sorted(regimes), "a larger size fits where a smaller one does not"
        assert {0, 2} <= set(regimes)
        assert plan(cell, 8, 4, dtype, tf32, limits, 16, 1).regime == "stepwise"


def test_refusals_are_sentences() -> None:
    assert unsupported("lstm", torch.float32, DEVICE, 8, 8) is None
    assert "float64" in unsupported("lstm", torch.float64, DEVICE, 8)
    assert "zero" in unsupported("lstm", torch.float32, DEVICE, 8, 0)
    assert "meta" in unsupported("lstm", torch.float32, torch.device("meta"), 8)
    assert "'qrnn'" in unsupported("qrnn", torch.float32, DEVICE, 8)


def test_on_the_cpu_only_the_interpreter_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planning, "INTERPRETED", False)
    assert "TRITON_INTERPRET" in unsupported("lstm", torch.float32, torch.device("cpu"), 8)


KERNELS = [
    (sequence, "sequence_forward_kernel"),
    (sequence, "sequence_backward_kernel"),
    (cell_kernels, "cell_forward_kernel"),
    (cell_kernels, "cell_backward_kernel"),
    (loops, "step_forward_kernel"),
    (loops, "step_backward_kernel"),
    (loops, "project_forward_kernel"),
    (loops, "project_backward_kernel"),
]


class Recorder:
    """A kernel that writes down what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            self.launches.append(arguments)
            self.kernel[grid](**arguments)

        return launch


@pytest.mark.parametrize("cell", STEPS)
def test_configurations_are_what_is_launched(cell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each launch is one of the published configurations, but for sizes and for options left out."""
    published = [*sequence.configurations(), *cell_kernels.configurations(), *pointwise.configurations()]
    recorders = {name: Recorder(getattr(module, name)) for module, name in KERNELS}
    for module, name in KERNELS:
        monkeypatch.setattr(module, name, recorders[name])
    by_kernels(layer(cell, 1, 1, 16, torch.bfloat16, D=2, masked=True))
    by_kernels(layer(cell, 1, 1, 300, torch.bfloat16, D=2, masked=True))
    if cell == "lstm":
        by_kernels(layer(cell, 1, 1, 16, torch.bfloat16, P=8, D=2, masked=True))
    by_kernels(layer(cell, 1, 1, 16, torch.bfloat16, scaled=True, stay="masks"))
    by_kernels(layer(cell, 1, 1, 300, torch.bfloat16, scaled=True, stay="masks"))
    if cell in STOCK:
        one = layer(cell, 1, 1, 8, torch.bfloat16)
        tensors = {k: t if t is None else t[0] for k, t in one.tensors.items() if k not in ("w_hr", "params")}
        tensors = {k.removesuffix("0"): t for k, t in tensors.items()}
        support.cell_by_kernels(cell, tensors, [g[0] for g in one.gradients[1:3]])

    sizes = {"D", "H", "P", "I", "BLOCK_B", "BLOCK_H", "BLOCK_P", "BLOCK_N"}
    for name, recorder in recorders.items():
        assert recorder.launches or "project" in name or (cell not in STOCK and "cell" in name)
        for launch in recorder.launches:
            signature = {}
            constants = {}
            for argument, value in launch.items():
                if isinstance(value, torch.Tensor):
                    signature[argument] = "*" + NAMES[value.dtype]
                elif argument in ("s", "T", "B"):
                    signature[argument] = "i32"
                elif argument not in OPTIONS.keys() | {"num_warps", "num_stages"}:
                    signature[argument] = "constexpr"
                    constants[argument] = value
            same = [
                c for c in published
                if c["fn"] is recorder.kernel
                and c["signature"] == signature
                and all(c["constexprs"][k] == v for k, v in constants.items() if k not in sizes)
            ]  # fmt: skip
            assert same, f"{name}: no configuration for {signature}"


def test_names_of_configurations_are_unique() -> None:
    for module in (sequence, cell_kernels, pointwise):
        names = [c["name"] for c in module.configurations()]
        assert len(names) == len(set(names))


def test_nothing_compiles_again_when_time_and_batch_change() -> None:
    """The key under which Triton keeps a compiled kernel is the same for every T, B and step."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import make_backend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    backend = make_backend(GPUTarget("cuda", 90, 32))
    for module, name in KERNELS:
        kernel = getattr(module, name)
        if not isinstance(kernel, JITFunction):  # the interpreter's, which knows no key
            kernel = JITFunction(kernel.fn, do_not_specialize=kernel.kwargs["do_not_specialize"])
        bind = create_function_from_signature(kernel.signature, kernel.params, backend)
        numbers = {p.name for p in kernel.params if p.name in ("s", "T", "B")}
        assert "B" in numbers
        keys = set()
        for number in (1, 2, 16, 17):
            arguments = {p.name: number if p.name in numbers else None for p in kernel.params}
            keys.add(str(bind(**arguments)[1]))
        assert len(keys) == 1, f"{name}: {keys}"


@pytest.mark.gpu
@pytest.mark.parametrize("cell", STEPS)
def test_backward_gives_the_same_bits_every_time(cell: str) -> None:
    case = layer(cell, 64, 65, 64, torch.bfloat16, D=2, masked=True)
    first = by_kernels(case)
    for _ in range(100):
        for name, value in by_kernels(case).items():
            assert torch.equal(value, first[name]), name


@pytest.mark.gpu
@pytest.mark.usefixtures("stepwise")
@pytest.mark.parametrize("cell", STEPS)
def test_steps_fit_in_a_cuda_graph(cell: str) -> None:
    case = layer(cell, 16, 5, 33, torch.float32, D=2, masked=True)
    expected = forward(case)[0]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward(case)[0]
    graph.replay()
    assert torch.equal(y, expected)
