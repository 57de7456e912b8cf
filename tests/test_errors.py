"""Errors: the type that torch.nn raises for the same mistake, and sentences about what torch does not know."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.utils.rnn import pack_padded_sequence

import fastseq

T, B, I, H = 4, 3, 5, 6  # noqa: E741  (the field's letter)
SEQUENCES = ("RNN", "LSTM", "GRU")
STEPS = ("RNNCell", "LSTMCell", "GRUCell")

Call = Callable[[Any], Any]  # what a library's user does wrong, given torch.nn or fastseq


def zeros(*shape: int, **options: Any) -> Tensor:
    return torch.zeros(shape, **options)


def packed(width: int = I, **options: Any) -> Any:
    return pack_padded_sequence(zeros(T, B, width, **options), torch.tensor([4, 3, 1]))


CONSTRUCTIONS: dict[str, Call] = {
    "no sizes": lambda nn: nn.LSTM(),
    "one size": lambda nn: nn.GRU(I),
    "input size 0": lambda nn: nn.LSTM(0, H),
    "input size negative": lambda nn: nn.RNN(-1, H),
    "input size a float": lambda nn: nn.GRU(5.0, H),
    "input size a string": lambda nn: nn.GRU("5", H),
    "hidden size 0": lambda nn: nn.RNN(I, 0),
    "hidden size negative": lambda nn: nn.LSTM(I, -6),
    "hidden size a float": lambda nn: nn.LSTM(I, 6.0),
    "no layers": lambda nn: nn.GRU(I, H, num_layers=0),
    "layers a string": lambda nn: nn.GRU(I, H, num_layers="2"),
    "layers a float": lambda nn: nn.GRU(I, H, num_layers=1.5),
    "dropout above 1": lambda nn: nn.LSTM(I, H, num_layers=2, dropout=1.5),
    "dropout negative": lambda nn: nn.GRU(I, H, num_layers=2, dropout=-0.1),
    "dropout a bool": lambda nn: nn.RNN(I, H, num_layers=2, dropout=True),
    "dropout a string": lambda nn: nn.RNN(I, H, num_layers=2, dropout="much"),
    "bias an integer": lambda nn: nn.LSTM(I, H, bias=1),
    "batch_first an integer": lambda nn: nn.LSTM(I, H, batch_first=1),
    "projection of an RNN": lambda nn: nn.RNN(I, H, proj_size=2),
    "projection of a GRU": lambda nn: nn.GRU(I, H, proj_size=2),
    "projection negative": lambda nn: nn.LSTM(I, H, proj_size=-1),
    "projection as wide as the state": lambda nn: nn.LSTM(I, H, proj_size=H),
    "nonlinearity unknown": lambda nn: nn.RNN(I, H, nonlinearity="sigmoid"),
    "keyword unknown": lambda nn: nn.LSTM(I, H, layers=2),
    "dtype of integers": lambda nn: nn.GRU(I, H, dtype=torch.int64),
    "device unknown": lambda nn: nn.LSTM(I, H, device="nowhere"),
    "cell: no sizes": lambda nn: nn.LSTMCell(),
    "cell: hidden size negative": lambda nn: nn.GRUCell(I, -1),
    "cell: sizes as strings": lambda nn: nn.RNNCell("5", "6"),
    "cell: keyword unknown": lambda nn: nn.GRUCell(I, H, num_layers=2),
    "state dict of another size": lambda nn: nn.LSTM(I, H).load_state_dict(nn.LSTM(I, H + 1).state_dict()),
    "state dict of another cell": lambda nn: nn.GRU(I, H).load_state_dict(nn.LSTM(I, H).state_dict()),
    "state dict with a layer missing": lambda nn: nn.GRU(I, H, 2).load_state_dict(nn.GRU(I, H).state_dict()),
    "state dict with projection missing": lambda nn: nn.LSTM(I, H, proj_size=2).load_state_dict(
        nn.LSTM(I, H).state_dict()
    ),
}


@pytest.mark.parametrize("mistake", CONSTRUCTIONS)
def test_construction_fails_as_torchs(mistake: str) -> None:
    with pytest.raises(Exception) as theirs:  # noqa: PT011  (whatever torch raises is what we want to know)
        CONSTRUCTIONS[mistake](torch.nn)
    with pytest.raises(theirs.type) as ours:
        CONSTRUCTIONS[mistake](fastseq)
    assert str(ours.value) == str(theirs.value)


@pytest.mark.filterwarnings("ignore:dropout option adds dropout:UserWarning")
def test_dropout_in_one_layer_warns_as_torchs() -> None:
    with pytest.warns(UserWarning, match="dropout option adds dropout"):
        fastseq.GRU(I, H, dropout=0.5)


# What is given to a module instead of (input, hx): for each kind of module, options and arguments. `S` makes the
# state of a kind from shapes: h alone, or (h, c).
def S(kind: str, *shape: int, **options: Any) -> Any:  # noqa: N802
    h = zeros(*shape, **options)
    return (h, h.clone()) if "LSTM" in kind else h


Wrong = Callable[[str], tuple[dict[str, Any], tuple[Any, ...]]]

CALLS: dict[str, Wrong] = {
    "input 0-D": lambda kind: ({}, (zeros(),)),
    "input 1-D": lambda kind: ({}, (zeros(I),)),
    "input 4-D": lambda kind: ({}, (zeros(1, T, B, I),)),
    "input of another width": lambda kind: ({}, (zeros(T, B, I + 1),)),
    "input of no width": lambda kind: ({}, (zeros(T, B, 0),)),
    "input of another width, batch_first": lambda kind: ({"batch_first": True}, (zeros(B, T, I - 1),)),
    "input of another width, unbatched": lambda kind: ({}, (zeros(T, I + 1),)),
    "input of another width, packed": lambda kind: ({}, (packed(I + 1),)),
    "input of no steps": lambda kind: ({}, (zeros(0, B, I),)),
    "input of no steps, batch_first": lambda kind: ({"batch_first": True}, (zeros(B, 0, I),)),
    "input of no steps, unbatched": lambda kind: ({}, (zeros(0, I),)),
    "input of no steps, two layers": lambda kind: ({"num_layers": 2}, (zeros(0, B, I), S(kind, 2, B, H))),
    "input of doubles": lambda kind: ({}, (zeros(T, B, I, dtype=torch.float64),)),
    "input of integers": lambda kind: ({}, (zeros(T, B, I, dtype=torch.int64),)),
    "input of bools": lambda kind: ({}, (zeros(T, B, I, dtype=torch.bool),)),
    "input of complex numbers": lambda kind: ({}, (zeros(T, B, I, dtype=torch.complex64),)),
    "input of bfloat16, packed": lambda kind: ({}, (packed(dtype=torch.bfloat16),)),
    "input of bfloat16, unbatched": lambda kind: ({}, (zeros(T, I, dtype=torch.bfloat16),)),
    "input for a module of doubles": lambda kind: ({"dtype": torch.float64}, (zeros(T, B, I),)),
    "input a list": lambda kind: ({}, ([[[0.0] * I] * B] * T,)),
    "input None": lambda kind: ({}, (None,)),
    "input a number": lambda kind: ({}, (1.0,)),
    "input missing": lambda kind: ({}, ()),
    "hx of another width": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, B, H + 1))),
    "hx of another batch": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, B + 1, H))),
    "hx of one row": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, 1, H))),
    "hx batch first": lambda kind: ({"batch_first": True}, (zeros(B, T, I), S(kind, B, 1, H))),
    "hx of too few layers": lambda kind: ({"num_layers": 2}, (zeros(T, B, I), S(kind, 1, B, H))),
    "hx of one direction": lambda kind: ({"bidirectional": True}, (zeros(T, B, I), S(kind, 1, B, H))),
    "hx of too many layers": lambda kind: ({}, (zeros(T, B, I), S(kind, 2, B, H))),
    "hx 2-D for a batch": lambda kind: ({}, (zeros(T, B, I), S(kind, B, H))),
    "hx 4-D for a batch": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, 1, B, H))),
    "hx 3-D for unbatched input": lambda kind: ({}, (zeros(T, I), S(kind, 1, 1, H))),
    "hx 1-D for unbatched input": lambda kind: ({}, (zeros(T, I), S(kind, H))),
    "hx of another width, unbatched": lambda kind: ({}, (zeros(T, I), S(kind, 1, H + 1))),
    "hx of another batch, packed": lambda kind: ({}, (packed(), S(kind, 1, B - 1, H))),
    "hx of another width, packed": lambda kind: ({}, (packed(), S(kind, 1, B, H - 1))),
    "hx 2-D, packed": lambda kind: ({}, (packed(), S(kind, B, H))),
    "hx of too few layers, packed": lambda kind: ({"num_layers": 3}, (packed(), S(kind, 1, B, H))),
    "hx of doubles": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, B, H, dtype=torch.float64))),
    "hx of doubles, packed": lambda kind: ({}, (packed(), S(kind, 1, B, H, dtype=torch.float64))),
    "hx of integers": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, B, H, dtype=torch.int64))),
    "hx a string": lambda kind: ({}, (zeros(T, B, I), "zeros")),
    "hx a number": lambda kind: ({}, (zeros(T, B, I), 0)),
    "hx numbers": lambda kind: ({}, (zeros(T, B, I), (0.0, 0.0))),
    "hx on another device": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, B, H, device="meta"))),
    "input on another device": lambda kind: ({}, (zeros(T, B, I, device="meta"),)),
    "too many arguments": lambda kind: ({}, (zeros(T, B, I), S(kind, 1, B, H), None)),
}
FOR_LSTM: dict[str, Wrong] = {
    "hx one tensor": lambda kind: ({}, (zeros(T, B, I), zeros(1, B, H))),
    "hx a tuple of one": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H),))),
    "hx an empty tuple": lambda kind: ({}, (zeros(T, B, I), ())),
    "hx a triple": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H),) * 3)),
    "hx a triple, packed": lambda kind: ({}, (packed(), (zeros(1, B, H),) * 3)),
    "hx stacked": lambda kind: ({}, (zeros(T, B, I), zeros(2, 1, B, H))),
    "c_0 of doubles, packed": lambda kind: ({}, (packed(), (zeros(1, B, H), zeros(1, B, H).double()))),
    "c_0 missing": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H), None))),
    "c_0 of another width": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H + 1)))),
    "c_0 of another batch": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H), zeros(1, 1, H)))),
    "c_0 of another width, packed": lambda kind: ({}, (packed(), (zeros(1, B, H), zeros(1, B, 1)))),
    "c_0 2-D": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H), zeros(B, H)))),
    "c_0 3-D for unbatched input": lambda kind: ({}, (zeros(T, I), (zeros(1, H), zeros(1, 1, H)))),
    "c_0 of doubles": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H, dtype=torch.float64)))),
    "h_0 unprojected": lambda kind: ({"proj_size": 2}, (zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H)))),
    "c_0 projected": lambda kind: ({"proj_size": 2}, (zeros(T, B, I), (zeros(1, B, 2), zeros(1, B, 2)))),
}
FOR_ONE_STATE: dict[str, Wrong] = {
    "hx a pair": lambda kind: ({}, (zeros(T, B, I), (zeros(1, B, H), zeros(1, B, H)))),
}
FOR_CELLS: dict[str, Wrong] = {
    "cell: input 0-D": lambda kind: ({}, (zeros(),)),
    "cell: input 3-D": lambda kind: ({}, (zeros(T, B, I),)),
    "cell: input of another width": lambda kind: ({}, (zeros(B, I + 1),)),
    "cell: input of another width, unbatched": lambda kind: ({}, (zeros(I - 1),)),
    "cell: input of another width, with hx": lambda kind: ({}, (zeros(B, I + 1), S(kind, B, H))),
    "cell: input of doubles": lambda kind: ({}, (zeros(B, I, dtype=torch.float64),)),
    "cell: input of integers": lambda kind: ({}, (zeros(B, I, dtype=torch.int64), S(kind, B, H))),
    "cell: input None": lambda kind: ({}, (None,)),
    "cell: input a list": lambda kind: ({}, ([0.0] * I,)),
    "cell: input missing": lambda kind: ({}, ()),
    "cell: hx 3-D": lambda kind: ({}, (zeros(B, I), S(kind, 1, B, H))),
    "cell: hx 0-D": lambda kind: ({}, (zeros(B, I), S(kind))),
    "cell: hx 1-D for a batch": lambda kind: ({}, (zeros(B, I), S(kind, H))),
    "cell: hx 2-D for unbatched input": lambda kind: ({}, (zeros(I), S(kind, 1, H))),
    "cell: hx of another width": lambda kind: ({}, (zeros(B, I), S(kind, B, H + 1))),
    "cell: hx of another batch": lambda kind: ({}, (zeros(B, I), S(kind, B + 1, H))),
    "cell: hx of one row": lambda kind: ({}, (zeros(B, I), S(kind, 1, H))),
    "cell: hx of another width, unbatched": lambda kind: ({}, (zeros(I), S(kind, H - 1))),
    "cell: hx of doubles": lambda kind: ({}, (zeros(B, I), S(kind, B, H, dtype=torch.float64))),
    "cell: hx of integers": lambda kind: ({}, (zeros(B, I), S(kind, B, H, dtype=torch.int64))),
    "cell: hx a string": lambda kind: ({}, (zeros(B, I), "zeros")),
    "cell: hx on another device": lambda kind: ({}, (zeros(B, I), S(kind, B, H, device="meta"))),
}
FOR_LSTM_CELL: dict[str, Wrong] = {
    "cell: hx one tensor": lambda kind: ({}, (zeros(B, I), zeros(B, H))),
    "cell: hx a tuple of one": lambda kind: ({}, (zeros(B, I), (zeros(B, H),))),
    "cell: hx an empty tuple": lambda kind: ({}, (zeros(B, I), ())),
    "cell: hx a triple": lambda kind: ({}, (zeros(B, I), (zeros(B, H),) * 3)),
    "cell: hx stacked": lambda kind: ({}, (zeros(B, I), zeros(2, B, H))),
    "cell: c of another width": lambda kind: ({}, (zeros(B, I), (zeros(B, H), zeros(B, 1)))),
    "cell: c of another batch": lambda kind: ({}, (zeros(B, I), (zeros(B, H), zeros(1, H)))),
    "cell: c 3-D": lambda kind: ({}, (zeros(B, I), (zeros(B, H), zeros(1, B, H)))),
    "cell: c missing": lambda kind: ({}, (zeros(B, I), (zeros(B, H), None))),
}
MISTAKES: dict[str, tuple[str, Wrong]] = {
    f"{kind}: {name}".replace(f"{kind}: cell: ", f"{kind}: "): (kind, wrong)
    for kinds, table in (
        (SEQUENCES, CALLS),
        (("LSTM",), FOR_LSTM),
        (("RNN", "GRU"), FOR_ONE_STATE),
        (STEPS, FOR_CELLS),
        (("LSTMCell",), FOR_LSTM_CELL),
    )
    for kind in kinds
    for name, wrong in table.items()
}


def attempt(library: Any, mistake: str, implementation: str = "auto", **keywords: Any) -> Exception | None:
    """What the call raises, None if it goes through."""
    kind, wrong = MISTAKES[mistake]
    options, arguments = wrong(kind)
    module = getattr(library, kind)(I, H, **options)
    try:
        with fastseq.use(implementation):
            module(*arguments, **keywords)
    except Exception as error:  # returned: the test compares it with the other library's
        return error
    return None


@pytest.mark.parametrize("mistake", MISTAKES)
def test_call_fails_as_torchs(mistake: str) -> None:
    theirs = attempt(torch.nn, mistake)
    assert theirs is not None, "torch takes this: not a mistake"
    ways: list[tuple[str, dict[str, Any]]] = [("auto", {}), ("torch", {}), ("reference", {})]
    if MISTAKES[mistake][0] in SEQUENCES:
        ways += [("torch", {"recompute": True}), ("reference", {"recompute": True}), ("auto", {"return_cells": True})]
    failures = []
    for implementation, keywords in ways:
        ours = attempt(fastseq, mistake, implementation, **keywords)
        if not isinstance(ours, type(theirs)):
            failures.append(f"{implementation} {keywords}: {type(ours).__name__}({ours})")
    assert not failures, "\n".join([f"expected {type(theirs).__name__}({theirs})", *failures])


# -------------------------------------------------------------------------------------------------- what torch lacks


def sequence(**options: Any) -> Any:
    return fastseq.GRU(I, H, **options)


def mask(*shape: int, **options: Any) -> Tensor:
    return zeros(*shape, dtype=torch.bool, **options)


x, unbatched = zeros(T, B, I), zeros(T, I)
whole = torch.full((B,), T)

# The mistake, the type of the error, and what its text must say: the argument, what was wanted, what was got.
OURS: dict[str, tuple[Callable[[], Any], type[Exception], tuple[str, ...]]] = {
    "reset a list": (lambda: sequence()(x, reset=[True] * T), TypeError, ("reset", "bool", "[T, B]", "list")),
    "reset a bool": (lambda: sequence()(x, reset=True), TypeError, ("reset", "bool", "got bool")),
    "reset of integers": (lambda: sequence()(x, reset=zeros(T, B).long()), TypeError, ("reset", "bool", "int64")),
    "reset of floats": (lambda: sequence()(x, reset=zeros(T, B)), TypeError, ("reset", "bool", "float32")),
    "reset of one row": (lambda: sequence()(x, reset=mask(T, 1)), ValueError, ("reset", "[4, 3]", "[4, 1]")),
    "reset 1-D": (lambda: sequence()(x, reset=mask(T)), ValueError, ("reset", "[T, B]", "[4, 3]", "[4]")),
    "reset 3-D": (lambda: sequence()(x, reset=mask(T, B, 1)), ValueError, ("reset", "[4, 3]", "[4, 3, 1]")),
    "reset time first": (
        lambda: sequence(batch_first=True)(zeros(B, T, I), reset=mask(T, B)),
        ValueError,
        ("reset", "[B, T]", "[3, 4]", "[4, 3]"),
    ),
    "reset batch first": (lambda: sequence()(x, reset=mask(B, T)), ValueError, ("reset", "[4, 3]", "[3, 4]")),
    "reset 2-D, unbatched": (
        lambda: sequence()(unbatched, reset=mask(T, 1)),
        ValueError,
        ("reset", "[T]", "[4]", "[4, 1]"),
    ),
    "reset too short, unbatched": (
        lambda: sequence()(unbatched, reset=mask(T - 1)),
        ValueError,
        ("reset", "[4]", "[3]"),
    ),
    "reset too short, packed": (
        lambda: sequence()(packed(), reset=mask(T - 1, B)),
        ValueError,
        ("reset", "[4, 3]", "[3, 3]"),
    ),
    "reset a list, packed": (lambda: sequence()(packed(), reset=[[False]]), TypeError, ("reset", "bool", "list")),
    "reset on another device": (
        lambda: sequence()(x, reset=mask(T, B, device="meta")),
        ValueError,
        ("reset", "cpu", "meta"),
    ),
    "lengths a list": (lambda: sequence()(x, lengths=[4, 3, 1]), TypeError, ("lengths", "integer", "[B]", "list")),
    "lengths a number": (lambda: sequence()(x, lengths=4), TypeError, ("lengths", "integer", "got int")),
    "lengths of floats": (lambda: sequence()(x, lengths=zeros(B)), TypeError, ("lengths", "integer", "float32")),
    "lengths of bools": (lambda: sequence()(x, lengths=mask(B)), TypeError, ("lengths", "integer", "bool")),
    "lengths of complex numbers": (
        lambda: sequence()(x, lengths=zeros(B, dtype=torch.complex64)),
        TypeError,
        ("lengths", "integer", "complex64"),
    ),
    "lengths too few": (lambda: sequence()(x, lengths=whole[:2]), ValueError, ("lengths", "[B] = [3]", "[2]")),
    "lengths 2-D": (lambda: sequence()(x, lengths=whole[None]), ValueError, ("lengths", "[3]", "[1, 3]")),
    "lengths 1-D, unbatched": (
        lambda: sequence()(unbatched, lengths=whole[:1]),
        ValueError,
        ("lengths", "[]", "[1]"),
    ),
    "length above T": (lambda: sequence()(x, lengths=whole + 1), ValueError, ("lengths", "0 to T = 4", "5 to 5")),
    "length negative": (
        lambda: sequence()(x, lengths=torch.tensor([4, -1, 2])),
        ValueError,
        ("lengths", "0 to T = 4", "-1 to 4"),
    ),
    "length above T, unbatched": (
        lambda: sequence()(unbatched, lengths=torch.tensor(5)),
        ValueError,
        ("lengths", "0 to T = 4", "5"),
    ),
    "lengths and a PackedSequence": (
        lambda: sequence()(packed(), lengths=whole),
        ValueError,
        ("lengths", "PackedSequence"),
    ),
    "reset by position": (lambda: sequence()(x, None, mask(T, B)), TypeError, ("positional",)),
    "keyword unknown": (lambda: sequence()(x, resets=mask(T, B)), TypeError, ("resets",)),
    "cell: reset of integers": (
        lambda: fastseq.LSTMCell(I, H)(x[0], reset=torch.zeros(B).long()),
        TypeError,
        ("reset", "bool", "[B]", "int64"),
    ),
    "cell: reset a list": (
        lambda: fastseq.RNNCell(I, H)(x[0], reset=[True] * B),
        TypeError,
        ("reset", "bool", "list"),
    ),
    "cell: reset too long": (
        lambda: fastseq.GRUCell(I, H)(x[0], reset=mask(B + 1)),
        ValueError,
        ("reset", "[3]", "[4]"),
    ),
    "cell: reset 1-D, unbatched": (
        lambda: fastseq.GRUCell(I, H)(x[0, 0], reset=mask(1)),
        ValueError,
        ("reset", "[]", "[1]"),
    ),
    "cell: reset on another device": (
        lambda: fastseq.GRUCell(I, H)(x[0], reset=mask(B, device="meta")),
        ValueError,
        ("reset", "cpu", "meta"),
    ),
    "cell: lengths": (lambda: fastseq.GRUCell(I, H)(x[0], lengths=whole), TypeError, ("lengths",)),
    "use of nothing known": (lambda: fastseq.use("cudnn"), ValueError, ("'auto'", "'reference'", "'cudnn'")),
    "use of None": (lambda: fastseq.use(None), ValueError, ("name", "None")),
    "explain torch's": (
        lambda: fastseq.explain(torch.nn.LSTM(I, H), x),
        TypeError,
        ("module", "fastseq module", "LSTM", "fastseq.swap"),
    ),
    "explain no module": (lambda: fastseq.explain("LSTM"), TypeError, ("module", "fastseq module", "str")),
    "functional: nonlinearity unknown": (
        lambda: fastseq.functional.rnn_cell(x[0], zeros(B, H), zeros(H, I), zeros(H, H), nonlinearity="sigmoid"),
        ValueError,
        ("nonlinearity", "'tanh'", "'relu'", "'sigmoid'"),
    ),
    "functional: reset of integers": (
        lambda: fastseq.functional.gru_cell(
            x[0], zeros(B, H), zeros(3 * H, I), zeros(3 * H, H), reset=torch.zeros(B).long()
        ),
        TypeError,
        ("reset", "bool", "int64"),
    ),
}


@pytest.mark.parametrize("implementation", ["auto", "torch", "reference"])
@pytest.mark.parametrize("mistake", OURS)
def test_our_own_arguments_are_checked(mistake: str, implementation: str) -> None:
    call, kind, words = OURS[mistake]
    with fastseq.use(implementation), pytest.raises(kind) as error:
        call()
    missing = [word for word in words if word not in str(error.value)]
    assert not missing, f"{error.value} does not say {missing}"
    assert type(error.value) is kind


def double_module() -> Any:
    return sequence(dtype=torch.float64), zeros(T, B, I).double()


def double_cell() -> Any:
    return fastseq.LSTMCell(I, H, dtype=torch.float64), zeros(B, I).double()


def on_meta() -> Any:
    return sequence(device="meta"), zeros(T, B, I, device="meta")


@pytest.mark.parametrize("make", [double_module, double_cell, on_meta])
def test_named_implementation_refuses_with_a_sentence(make: Callable[[], Any]) -> None:
    module, x = make()
    with fastseq.use("triton"):
        for ask in (lambda: module(x), lambda: fastseq.explain(module, x)):
            with pytest.raises(fastseq.Unsupported, match=r"^triton: \w+.* .* ") as refusal:
                ask()
            assert isinstance(refusal.value, RuntimeError)
    assert fastseq.explain(module, x).name != "triton"  # without the name it falls back


def test_an_error_leaves_the_choice_as_it_was() -> None:
    before = str(fastseq.explain(sequence(), x))
    with pytest.raises(RuntimeError, match="size"), fastseq.use("reference"):
        sequence()(zeros(T, B, I + 1))
    assert str(fastseq.explain(sequence(), x)) == before


@pytest.mark.parametrize("batch_first", [False, True])
def test_functions_check_as_the_modules_do(batch_first: bool) -> None:
    module = torch.nn.LSTM(I, H)
    x, hx = zeros(*((B, T) if batch_first else (T, B)), I), (zeros(1, B, H), zeros(1, B, H))

    def call(**keywords: Any) -> Any:
        settings = (module._flat_weights, True, 1, 0.0, False, False, batch_first)
        return fastseq.functional.lstm(x, hx, *settings, **keywords)

    mask = zeros(*x.shape[:2], dtype=torch.bool)
    call(reset=mask, lengths=torch.tensor([T, 0, 1]))
    for error, name, keywords in (
        (TypeError, "reset", {"reset": mask.float()}),
        (ValueError, "reset", {"reset": mask.t()}),
        (TypeError, "lengths", {"lengths": zeros(B)}),
        (ValueError, "lengths", {"lengths": torch.tensor([1, 2])}),
        (ValueError, "lengths", {"lengths": torch.tensor([T + 1, 2, 3])}),
    ):
        with pytest.raises(error, match=f"^{name}: expected"):
            call(**keywords)
