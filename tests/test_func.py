"""torch.func on the recurrent modules: vmap and per-sample gradients equal a loop over the examples, in one call."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad, jacrev, stack_module_state, vjp, vmap

import fastseq
from fastseq.ops import loop

from .support.budget import assert_within_budget
from .support.gradients import flat, loss_of

E, T, B, I, H = 3, 3, 2, 2, 3  # noqa: E741  (the field's letter); E examples
WAYS = ("auto", "torch", "triton", "reference")
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "rnn": ("RNN", {}),
    "relu": ("RNN", {"nonlinearity": "relu", "bias": False}),
    "lstm": ("LSTM", {}),
    "gru": ("GRU", {}),
    "lstm-proj": ("LSTM", {"proj_size": 2}),
    "lstm-deep": ("LSTM", {"num_layers": 2, "bidirectional": True}),
    "gru-deep": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "peephole": ("PeepholeLSTM", {}),  # with parameters of its own
    "peephole-deep": ("PeepholeLSTM", {"num_layers": 2, "bidirectional": True}),
}
CELLS = ("RNNCell", "LSTMCell", "GRUCell")
CASES = [
    (shape, way)
    for shape, way in itertools.product((*SHAPES, *CELLS), WAYS)
    if way in ("auto", "torch")
    or (way == "triton" and shape not in ("relu", "peephole-deep"))
    or shape in ("lstm", "GRUCell")
]


@pytest.fixture(autouse=True)
def _quick() -> Iterator[None]:
    try:
        from .support.interpreter import quick_interpreter
    except ImportError:
        yield
        return
    with quick_interpreter():
        yield


def build(shape: str) -> Any:
    if shape in CELLS:
        return getattr(fastseq, shape)(I, H)
    kind, settings = SHAPES[shape]
    return getattr(fastseq, kind)(I, H, **settings)


def draw(module: Any) -> dict[str, Tensor]:
    """An input for each of E examples: x, states, and, of a sequence, reset and lengths."""
    if isinstance(module, torch.nn.RNNCellBase):
        drawn = {"x": torch.randn(E, B, I), "h": torch.randn(E, B, H)}
        if isinstance(module, torch.nn.LSTMCell):
            drawn["c"] = torch.randn(E, B, H)
        return drawn | {"reset": torch.rand(E, B) < 0.3}
    rows = module.num_layers * (1 + module.bidirectional)
    drawn = {"x": torch.randn(E, T, B, I), "h": torch.randn(E, rows, B, module.proj_size or H)}
    if isinstance(module, torch.nn.LSTM | fastseq.PeepholeLSTM):
        drawn["c"] = torch.randn(E, rows, B, H)
    return drawn | {"reset": torch.rand(E, T, B) < 0.3, "lengths": torch.randint(0, T + 1, (E, B))}


def as_function(module: Any) -> Callable[..., list[Tensor]]:
    """The module as a function of its weights and of what was drawn; returns all outputs."""

    def run(weights: dict[str, Tensor], given: dict[str, Tensor]) -> list[Tensor]:
        keywords: dict[str, Any] = {k: v for k, v in given.items() if k in ("reset", "lengths")}
        if "lengths" in keywords:
            keywords["return_cells"] = True
        hx = (given["h"], given["c"]) if "c" in given else given.get("h")
        return flat(functional_call(module, weights, (given["x"], hx), keywords))

    return run


def weights_of(module: Any) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in module.named_parameters()}


def wide(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.double() if t.is_floating_point() else t, tree)


def one_by_one(f: Callable[..., Any], dims: tuple[Any, ...], args: tuple[Any, ...]) -> Any:
    """What vmap means: f of each example, stacked; dims has an int or None for each argument, or each of its keys."""
    examples = []
    for i in range(E):
        chosen = []
        for arg, dim in zip(args, dims, strict=True):
            if isinstance(arg, dict):
                at = dim if isinstance(dim, dict) else dict.fromkeys(arg, dim)
                chosen.append({k: v if at[k] is None else v.select(at[k], i) for k, v in arg.items()})
            else:
                chosen.append(arg if dim is None else arg.select(dim, i))
        examples.append(f(*chosen))
    return torch.utils._pytree.tree_map(lambda *each: torch.stack(each), *examples)


def check(
    way: str,
    module: Any,
    make: Callable[[Any], Callable[..., Any]],
    dims: tuple[Any, ...],
    args: tuple[Any, ...],
) -> None:
    """``vmap(make(module))`` by this way, held to a loop of the reference over the examples in fp64 and in fp32."""
    with fastseq.use(way):
        got = vmap(make(module), in_dims=dims)(*args)
    with fastseq.use("reference"):
        peer = one_by_one(make(module), dims, args)
        exact = one_by_one(make(module.double()), dims, wide(args))
    module.float()
    leaves = [torch.utils._pytree.tree_leaves(tree) for tree in (got, exact, peer)]
    for index, (value, truth, other) in enumerate(zip(*leaves, strict=True)):
        assert_within_budget(value, truth, other, f"{index}")


def subsets(names: Sequence[str], way: str) -> list[tuple[str, ...]]:
    """Which inputs to map over: every combination by the loop, each alone and all together elsewhere."""
    if way == "torch":
        return [c for n in range(1, len(names) + 1) for c in itertools.combinations(names, n)]
    return [*((name,) for name in names), tuple(names)]


@pytest.mark.parametrize(("shape", "way"), CASES)
def test_a_map_over_any_inputs_is_a_loop(shape: str, way: str) -> None:
    module = build(shape)
    drawn, weights = draw(module), weights_of(module)
    few = shape.endswith("deep") or (way == "triton" and shape not in ("lstm", *CELLS))
    for mapped in [tuple(drawn)] if few else subsets(tuple(drawn), way):
        given = {k: v if k in mapped else v[0] for k, v in drawn.items()}
        dims = {k: 0 if k in mapped else None for k in drawn}
        check(way, module, as_function, (None, dims), (weights, given))


def gradients(module: Any) -> Callable[..., Any]:
    """Of a loss of all outputs, for the weights and whatever of the inputs has gradients."""
    run = as_function(module)

    def found(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Any:
        masks = {k: v for k, v in given.items() if not v.is_floating_point()}
        variables = {k: v for k, v in given.items() if v.is_floating_point()}
        return grad(lambda w, v: loss_of(run(w, v | masks)), argnums=(0, 1))(weights, variables)

    return found


@pytest.mark.parametrize("masked", [False, True], ids=["plain", "masked"])
@pytest.mark.parametrize(("shape", "way"), CASES)
def test_gradients_of_each_sample_are_a_loops(shape: str, masked: bool, way: str) -> None:
    module = build(shape)
    drawn = draw(module)
    given = drawn if masked else {"x": drawn["x"]}
    check(way, module, gradients, (None, 0), (weights_of(module), given))


@pytest.mark.parametrize("of", [as_function, gradients])
@pytest.mark.parametrize(
    ("shape", "way"),
    [
        *itertools.product(("lstm", "LSTMCell"), WAYS),
        ("gru-deep", "auto"),
        ("peephole-deep", "auto"),
        ("peephole", "triton"),
    ],
)
def test_an_ensemble_is_a_loop_over_its_members(shape: str, of: Any, way: str) -> None:
    members = [build(shape) for _ in range(E)]
    weights, _ = stack_module_state(members)
    weights = {k: v.detach() for k, v in weights.items()}
    drawn = draw(members[0])
    check(way, members[0], of, (0, 0), (weights, drawn))
    check(way, members[0], of, (0, None), (weights, {k: v[0] for k, v in drawn.items()}))


@pytest.mark.parametrize("of", [as_function, gradients])
@pytest.mark.parametrize(
    ("shape", "way"), [*itertools.product(("gru", "GRUCell"), WAYS), ("lstm", "auto"), ("peephole", "torch")]
)
def test_maps_nest(shape: str, of: Any, way: str) -> None:
    """The inner map over the second of two leading axes, of which only some inputs have the first."""
    module = build(shape)
    drawn = {k: torch.stack([v, v.flip(0)]) for k, v in draw(module).items()}
    drawn["h"] = drawn["h"][0]
    dims = {k: None if k == "h" else 0 for k in drawn}
    run = of(module)
    with fastseq.use(way):
        got = vmap(vmap(run, (None, 0)), (None, dims))(weights_of(module), drawn)
        for i in range(2):
            given = {k: v if k == "h" else v[i] for k, v in drawn.items()}
            expected = vmap(run, (None, 0))(weights_of(module), given)
            torch.testing.assert_close(torch.utils._pytree.tree_map(lambda t, i=i: t[i], got), expected)


def test_the_axis_of_the_examples_is_anywhere() -> None:
    rnn, x = fastseq.GRU(I, H), torch.randn(E, T, B, I)
    expected = vmap(lambda x: rnn(x)[0])(x)
    for at in (1, 2, -1):
        got = vmap(lambda x: rnn(x)[0], in_dims=at, out_dims=at)(x.movedim(0, at))
        torch.testing.assert_close(got.movedim(at, 0), expected)


@pytest.mark.parametrize("of", [as_function, gradients])
def test_a_map_is_one_call_of_more_rows(of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = []

    def noting(run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(cell: str, first: Tensor, *rest: Any, **keywords: Any) -> Any:
            rows.append(first.shape[1])
            return run(cell, first, *rest, **keywords)

        return noted

    for name in ("sequence_forward", "sequence_backward"):
        monkeypatch.setattr(loop, name, noting(getattr(loop, name)))
    module = build("lstm")
    vmap(of(module), (None, 0))(weights_of(module), draw(module))
    assert rows == [E * B] * (1 if of is as_function else 2)


@pytest.mark.parametrize(
    ("shape", "way"), [*itertools.product(("lstm", "GRUCell"), WAYS), ("gru", "auto"), ("peephole", "auto")]
)
def test_gradients_of_gradients_per_sample(shape: str, way: str) -> None:
    """By grad of grad in a map, and by grad, or autograd, of a map of grad: the three orders of the levels."""
    module = build(shape).double()
    drawn, weights = wide(draw(module)), wide(weights_of(module))

    def penalty(weights: dict[str, Tensor], given: dict[str, Tensor]) -> Tensor:
        found = gradients(module)(weights, given)
        return torch.stack([t.square().sum() for t in torch.utils._pytree.tree_leaves(found)]).sum()

    def total(weights: dict[str, Tensor]) -> Tensor:
        return vmap(penalty, (None, 0))(weights, drawn).sum()

    with fastseq.use("reference"):
        expected = one_by_one(grad(penalty), (None, 0), (weights, drawn))
    if way == "triton":
        module, weights, drawn = module.float(), *(narrow(tree) for tree in (weights, drawn))
    with fastseq.use(way):
        inside = vmap(grad(penalty), (None, 0))(weights, drawn)
        outside = grad(total)(weights)
        leaves = {k: w.requires_grad_() for k, w in weights.items()}
        by_autograd = torch.autograd.grad(total(leaves), list(leaves.values()))
    for index, (name, truth) in enumerate(expected.items()):
        rtol, atol = (1e-3, 1e-4) if way == "triton" else (1e-7, 1e-9)
        torch.testing.assert_close(inside[name].double(), truth, rtol=rtol, atol=atol)
        for value in (outside[name], by_autograd[index]):
            torch.testing.assert_close(value.double(), truth.sum(0), rtol=rtol, atol=atol)


def narrow(tree: Any) -> Any:
    return torch.utils._pytree.tree_map(lambda t: t.float() if t.is_floating_point() else t, tree)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["lstm", "gru", "rnn", *CELLS])
def test_forward_mode_is_right_or_refused(shape: str, way: str) -> None:
    """An operator that it cannot look into would return zeros without a word."""
    module = build(shape)
    given = {k: v[0] for k, v in draw(module).items()}
    weights = weights_of(module)

    def run(x: Tensor) -> Tensor:
        return as_function(module)(weights, given | {"x": x})[0]

    transforms: dict[str, Callable[[], Tensor]] = {
        "jvp": lambda: torch.func.jvp(run, (given["x"],), (given["x"].cos(),))[1],
        "jacfwd": lambda: torch.func.jacfwd(run)(given["x"]),
        "hessian": lambda: torch.func.hessian(lambda x: run(x).cos().sum())(given["x"]),
        "vmap": lambda: vmap(lambda t: torch.func.jvp(run, (given["x"],), (t,))[1])(torch.randn(E, *given["x"].shape)),
    }
    for name, transform in transforms.items():
        torch.manual_seed(1)
        with fastseq.use("reference"):
            expected = transform()
        torch.manual_seed(1)
        refused = way in ("torch", "triton") and not (way == "torch" and shape in CELLS and name == "jvp")
        with fastseq.use(way), pytest.raises(NotImplementedError, match="forward") if refused else nullcontext():
            torch.testing.assert_close(transform(), expected)
        assert expected.abs().max() > 0


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ["lstm", "gru", *CELLS])
def test_vjp_and_jacrev(shape: str, way: str) -> None:
    module = build(shape)
    given, weights = {k: v[0] for k, v in draw(module).items()}, weights_of(module)

    def run(weights: dict[str, Tensor], x: Tensor) -> Tensor:
        return as_function(module)(weights, given | {"x": x})[0]

    def both() -> Any:
        y, back = vjp(run, weights, given["x"])
        return back(y.detach().cos()), jacrev(run, argnums=(0, 1))(weights, given["x"])  # after vjp's level is gone

    with fastseq.use("reference"):
        expected = both()
    with fastseq.use(way):
        torch.testing.assert_close(both(), expected)


@pytest.mark.parametrize("kind", ["LSTM", "GRUCell"])
def test_autograd_goes_through_a_map(kind: str) -> None:
    """Weights that vmap does not touch, and inputs that it does, get their gradients from an ordinary backward."""
    module = build(kind if kind in CELLS else kind.lower())
    drawn = {k: v.requires_grad_(v.is_floating_point()) for k, v in draw(module).items()}
    leaves = [*module.parameters(), *(v for v in drawn.values() if v.requires_grad)]
    run, found = as_function(module), []
    for way in ("auto", "reference"):
        with fastseq.use(way):
            outputs = vmap(lambda given: run({}, given))(drawn)
        found.append(torch.autograd.grad(loss_of(outputs), leaves))
    torch.testing.assert_close(*found)


def test_dropout_differs_between_the_examples() -> None:
    rnn = fastseq.GRU(I, H, num_layers=2, dropout=0.5)
    x = torch.randn(T, B, I).expand(8, T, B, I)
    y = vmap(lambda x: rnn(x)[0], randomness="different")(x)
    assert len({tuple(example.flatten().tolist()) for example in y}) > 1
    with pytest.raises(RuntimeError, match="randomness"):
        vmap(lambda x: rnn(x)[0])(x)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("shape", ["lstm", "gru"])
def test_gradients_per_sample_compile(shape: str) -> None:
    module = build(shape)
    weights, x = weights_of(module), torch.randn(E, T, B, I)

    def run(weights: dict[str, Tensor], x: Tensor) -> Any:
        return vmap(gradients(module), (None, 0))(weights, {"x": x})

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(weights, x), run(weights, x))
