"""Drop-in: whatever is done to a module of torch.nn can be done to ours, and gives the same.

On the CPU our modules give torch.nn's own numbers, bit for bit. What cannot be bitwise (GRU and RNN in training on
longer sequences, the reference, the loop behind resets and lengths, the kernels) has a budget of rounding errors.
"""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fastseq

from .support.modules_cases import (
    CELLS,
    DTYPES,
    LAYOUTS,
    WAYS,
    Case,
    Errors,
    beyond_budget,
    every,
    exact_and_peer,
    gradients,
    outputs_of,
    pairwise,
    report,
    run,
    run_by,
    tensors,
    unequal,
    unlike_torch,
)

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

# One of each cell, with an option or two each; for laws that need no more.
SOME = [
    Case("rnn_tanh", num_layers=2, bidirectional=True, hx=True),
    Case("rnn_relu", bias=False, batch_first=True, hx=True),
    Case("lstm", num_layers=2, bidirectional=True, batch_first=True, hx=True),
    Case("lstm_proj", bidirectional=True, bias=False, hx=True),
    Case("gru", num_layers=2, hx=True),
]
some = pytest.mark.parametrize("case", SOME, ids=str)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", CELLS)
def test_every_combination_computes_what_torch_computes(cell: str, dtype: torch.dtype) -> None:
    """192 combinations of layers, directions, bias, batch_first, layout, hx, and dropout in evaluation.

    Each runs bitwise as it is; by the reference and one more way in float32, by one way in
    the other dtypes.
    """
    failures, errors, names = [], Errors(), list(WAYS)
    for index, case in enumerate(every(cell=cell, dtype=dtype)):
        drawn, theirs, ours = case.draw(), case.build(torch.nn), case.build(fastseq)
        exact, peer = exact_and_peer(theirs, case, drawn)
        failures += [f"auto: {case}: {f}" for f in unlike_torch(case, run(ours, case, drawn), exact, peer)]
        # Threes do not divide the powers of two that options repeat with, so each way meets each pair of options.
        ways = ["reference", names[1 + index % 3]] if dtype == torch.float32 else [names[index // 3 % 4]]
        for way in ways:
            got = run_by(way, ours, case, drawn)
            failures += [f"{way}: {case}: {f}" for f in beyond_budget(got, exact, peer)]
            errors.add(way, got, exact, peer)
    failures += errors.beyond(1.5)
    assert not failures, report(failures)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """Where kernels run: a GPU, without TF32 on either side, or the CPU under the interpreter."""
    before = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    yield torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.backends.cudnn.allow_tf32 = before


def test_kernels_compute_what_torch_computes(device: torch.device) -> None:
    """Every two options meet in some combination: the interpreter is too slow for all."""
    failures, errors, both = [], Errors(), (False, True)
    cases = pairwise(
        cell=CELLS, num_layers=(1, 2), bidirectional=both, bias=both, batch_first=both, layout=LAYOUTS, hx=both,
        dtype=(torch.float32, torch.bfloat16, torch.float16),
    )  # fmt: skip
    for index, case in enumerate(cases):
        drawn, theirs, ours = case.draw(), case.build(torch.nn).to(device), case.build(fastseq).to(device)
        exact, peer = exact_and_peer(theirs, case, drawn)
        _, keywords = case.way(("reference", "reset", "recompute")[index % 3])
        with fastseq.use("triton"):
            got = run(ours, case, drawn, **{k: v if v is True else v.to(device) for k, v in keywords.items()})
        failures += [f"{case} {list(keywords)}: {f}" for f in beyond_budget(got, exact, peer)]
        errors.add("triton", got, exact, peer)
    failures += errors.beyond(2.0)
    assert not failures, report(failures)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    case=st.builds(
        Case,
        cell=st.sampled_from(CELLS),
        num_layers=st.integers(1, 3),
        bidirectional=st.booleans(),
        bias=st.booleans(),
        batch_first=st.booleans(),
        layout=st.sampled_from(LAYOUTS),
        hx=st.booleans(),
        dtype=st.sampled_from(DTYPES),
        T=st.integers(1, 9),
        B=st.integers(1, 9),
        I=st.integers(1, 17),
        H=st.integers(2, 33),
    ),
    way=st.sampled_from(list(WAYS)),
)
def test_any_shape_computes_what_torch_computes(case: Case, way: str) -> None:
    drawn, theirs, ours = case.draw(), case.build(torch.nn), case.build(fastseq)
    exact, peer = exact_and_peer(theirs, case, drawn)
    failures = unlike_torch(case, run(ours, case, drawn), exact, peer)
    failures += beyond_budget(run_by(way, ours, case, drawn), exact, peer)
    assert not failures, report(failures)


@pytest.mark.parametrize("cell", CELLS)
def test_without_gradients_the_outputs_are_the_same(cell: str) -> None:
    """Under no_grad and inference_mode torch has other code, and so have we."""
    failures = []
    for index, case in enumerate(case for case in every(cell=cell) if case.num_layers < 3):
        drawn, theirs, ours = case.draw(), case.build(torch.nn), case.build(fastseq)
        with torch.inference_mode() if index % 3 else torch.no_grad():
            exact = outputs_of(case.call(copy.deepcopy(theirs).double(), [t.double() for t in drawn]))
            peer = outputs_of(case.call(theirs, drawn))
            failures += [f"auto: {case}: {f}" for f in unequal(outputs_of(case.call(ours, drawn)), peer)]
            for way in ("recompute", list(WAYS)[index % 3]):  # recompute: what no gradient needs falls away
                implementation, keywords = case.way(way)
                with fastseq.use(implementation):
                    got = outputs_of(case.call(ours, drawn, **keywords))
                failures += [f"{way}: {case}: {f}" for f in beyond_budget(got, exact, peer)]
    assert not failures, report(failures)


@some
def test_gradients_of_a_part_are_torchs(case: Case) -> None:
    """A loss may use one output alone, and want the gradient of one tensor alone."""
    failures, drawn = [], case.draw()
    for used, wanted in itertools.product(("y", "h_n", "c_n"), ("input", "h_0", "weight_hh_l0")):
        if used == "c_n" and case.kind != "LSTM":
            continue
        module = {library: case.build(library) for library in (torch.nn, fastseq)}
        found = {}
        for key in (torch.nn, torch.double, fastseq, *WAYS):
            m = module[torch.nn if key in (torch.nn, torch.double) else fastseq]
            m = copy.deepcopy(m).double() if key is torch.double else m
            leaves = [t.to(next(m.parameters()).dtype) for t in drawn]
            for p in m.parameters():
                p.requires_grad_(False)
            leaf = {"input": leaves[0], "h_0": leaves[1]}.get(wanted, m.weight_hh_l0)
            leaf.requires_grad_()
            implementation, keywords = case.way(key) if isinstance(key, str) else ("auto", {})
            with fastseq.use(implementation):
                outputs = outputs_of(case.call(m, leaves, **keywords))
            found[key] = gradients({used: outputs[used]}, {wanted: leaf})
            leaf.requires_grad_(False)
        auto = unlike_torch(case, found[fastseq], found[torch.double], found[torch.nn])
        failures += [f"auto: {used}: {f}" for f in auto]
        for way in WAYS:
            failures += [f"{way}: {used}: {f}" for f in beyond_budget(found[way], found[torch.double], found[torch.nn])]
    assert not failures, report(failures)


# ------------------------------------------------------------------------------------------------- the random numbers


@pytest.mark.parametrize("layout", LAYOUTS)
def test_dropout_draws_torchs_numbers(layout: str) -> None:
    failures = []
    for cell, num_layers, bidirectional in itertools.product(CELLS, (2, 3), (False, True)):
        case = Case(cell, num_layers, bidirectional, dropout=0.4, layout=layout, hx=True)
        drawn, found, after = case.draw(), [], []
        for library in (torch.nn, fastseq):
            module = case.build(library)
            torch.manual_seed(3)
            found.append(run(module, case, drawn))
            after.append(torch.rand(1))
        failures += [f"{case}: {f}" for f in unequal(*reversed(found))]
        failures += [f"{case}: the generator stands elsewhere"] if after[0] != after[1] else []
    assert not failures, report(failures)


def transparent(case: Case) -> Any:
    """A module whose output shows what dropout did: the first layer is constant, the last has no memory."""
    module = case.build(fastseq)
    gates = {"RNN": [0.0], "LSTM": [9.0, -1e4, 1.0, 9.0], "GRU": [0.0, -1e4, 1.0]}[case.kind]  # forget everything
    new = 2 if len(gates) > 1 else 0
    with torch.no_grad():
        for name, p in module.named_parameters():
            p.zero_()
            if name.startswith("bias_ih"):
                p.copy_(torch.tensor(gates).repeat_interleave(case.H))
                if len(gates) == 1 and "l0" in name:
                    p.fill_(1.0)
                if len(gates) > 1 and "l1" in name:
                    p[new * case.H : (new + 1) * case.H] = 0
            if name == "weight_ih_l1":
                p[new * case.H : (new + 1) * case.H] = torch.eye(case.H)
    return module


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_dropout_is_as_frequent_as_torchs(cell: str) -> None:
    """Not torch's numbers, where we run layer by layer, but its law: p of the values, each its own, the rest scaled."""
    p, case = 0.3, Case(cell, num_layers=2, dropout=0.3, T=20, B=16, H=16)
    module, x = transparent(case), torch.zeros(20, 16, case.I)
    by_torch = module(x)[0]
    for way in WAYS:
        implementation, keywords = case.way(way)
        with fastseq.use(implementation):
            y, again = (case.call(module, [x], **keywords)[0] for _ in range(2))
            still = case.call(module.eval(), [x], **keywords)[0]
            module.train()
        gone, n = y == 0, y.numel()
        assert abs(int(gone.sum()) - p * n) < 4 * (n * p * (1 - p)) ** 0.5, way
        assert not torch.equal(gone, again == 0), f"{way}: the same values every time"
        for dim in (0, 1, 2):
            assert gone.any(dim).any(), way
            assert not gone.all(dim).all(), way
            assert (gone != gone.narrow(dim, 0, 1)).any(), f"{way}: one mask for all of dimension {dim}"
        torch.testing.assert_close(y[~gone], by_torch.max().expand(n - int(gone.sum())))
        assert (still != 0).all(), f"{way}: dropout in evaluation"
        (dx,) = torch.autograd.grad(y.sum(), module.bias_ih_l0)
        assert dx.isfinite().all()


@pytest.mark.parametrize("way", WAYS)
def test_dropout_of_everything_leaves_the_last_layers_biases(way: str) -> None:
    case = Case("gru", num_layers=3, dropout=1.0, hx=True)
    drawn, theirs = case.draw(), case.build(torch.nn)
    exact, peer = exact_and_peer(theirs, case, drawn)
    assert not beyond_budget(run_by(way, case.build(fastseq), case, drawn), exact, peer)


# --------------------------------------------------------------------------------------------------------- the cells


def step(module: Any, drawn: list[torch.Tensor], **keywords: Any) -> dict[str, torch.Tensor]:
    """New states and the gradients of everything, by name, of a cell called with its input and maybe its states."""
    dtype = module.weight_ih.dtype
    leaves = [t.to(dtype).requires_grad_() for t in drawn]
    x, states = leaves[0], tuple(leaves[1:])
    hx = None if not states else states if isinstance(module, torch.nn.LSTMCell) else states[0]
    outputs = dict(zip(("h", "c"), tensors(module(x, hx, **keywords)), strict=False))
    wanted = dict(zip(("input", "hx", "cx"), leaves, strict=False)) | dict(module.named_parameters())
    return {k: t.detach() for k, t in (outputs | gradients(outputs, wanted)).items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "gru"])
def test_every_cell_computes_what_torch_computes(cell: str, dtype: torch.dtype) -> None:
    failures, errors = [], Errors()
    kind = {"lstm": "LSTMCell", "gru": "GRUCell"}.get(cell, "RNNCell")
    options = {"nonlinearity": cell[4:]} if kind == "RNNCell" else {}
    both, sizes = (True, False), ((1, 1), (3, 5), (7, 33))
    for bias, batched, hx, (width, H) in itertools.product(both, both, both, sizes):
        name = f"{cell} bias={bias} batched={batched} hx={hx} I={width} H={H}"
        theirs, ours = (getattr(library, kind)(width, H, bias, **options) for library in (torch.nn, fastseq))
        ours.load_state_dict(theirs.state_dict())
        rows = (4,) if batched else ()
        shapes = [(*rows, width), *([(*rows, H)] * (hx * (1 + (cell == "lstm"))))]
        drawn = [torch.randn(shape).bfloat16() for shape in shapes]
        peer, single = step(theirs.to(dtype), drawn), step(copy.deepcopy(theirs).float(), drawn)
        exact = step(copy.deepcopy(theirs).double(), drawn)
        if dtype == torch.float64:  # as in exact_and_peer
            ratio = torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps
            peer = {k: e + (single[k].double() - e) * ratio for k, e in exact.items()}
        ours.to(dtype)
        stock = exact if dtype == torch.float64 else peer
        never = torch.zeros(rows, dtype=torch.bool)
        failures += [f"auto: {name}: {f}" for f in unequal(step(ours, drawn), stock)]
        ways = [("reset", "auto", {"reset": never}), ("reference", "reference", {})]
        ways += [("reference with reset", "reference", {"reset": never})]
        if dtype != torch.float64 and width == 3 and not torch.cuda.is_available():  # the interpreter is slow
            ways += [("triton", "triton", {}), ("triton with reset", "triton", {"reset": never})]
        for way, implementation, keywords in ways:
            with fastseq.use(implementation):
                got = step(ours, drawn, **keywords)
            failures += [f"{way}: {name}: {f}" for f in beyond_budget(got, exact, peer)]
            errors.add(way, got, exact, peer)
    failures += errors.beyond(1.5)
    assert not failures, report(failures)
