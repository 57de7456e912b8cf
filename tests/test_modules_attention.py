"""MultiheadAttention: torch.nn's in every respect, without its surprises, and the laws of what it adds."""

import copy
import inspect
import io
import itertools
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastseq
from fastseq import functional

from .support.attention_cases import (
    ATTN_MASKS,
    DTYPES,
    PADDINGS,
    cover,
    draw_mask,
    draw_padding,
    exact_and_peer,
    rounded,
    run,
)
from .support.modules_cases import Errors, beyond_budget, report

B, L, S, E, N = 3, 5, 7, 16, 4

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

CONSTRUCTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "no bias": {"bias": False},
    "learned key": {"add_bias_kv": True},
    "zero key": {"add_zero_attn": True, "batch_first": True},
    "other widths": {"kdim": 6, "vdim": 9},
    "all": {"add_bias_kv": True, "add_zero_attn": True, "kdim": 6, "bias": False, "dropout": 0.5},
}
constructions = pytest.mark.parametrize("options", CONSTRUCTIONS.values(), ids=CONSTRUCTIONS)


def build(library: Any, **options: Any) -> Any:
    torch.manual_seed(0)
    return library.MultiheadAttention(E, N, **options)


def twins(**options: Any) -> tuple[Any, Any]:
    return build(nn, **options), build(fastseq, **options)


def draw(length: int = L, width: int = E, batch: int = B) -> Tensor:
    return torch.randn(batch, length, width)


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# What torch has


@constructions
def test_construction_is_torchs(options: dict[str, Any]) -> None:
    theirs, ours = twins(**options)
    assert isinstance(ours, nn.MultiheadAttention)
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b
        assert torch.equal(p, q)
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            next(source.parameters()).add_(1)
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


def test_signatures_are_torchs_and_more_by_keyword() -> None:
    for name in ("__init__", "forward"):
        theirs, ours = (
            inspect.signature(getattr(library.MultiheadAttention, name)).parameters for library in (nn, fastseq)
        )
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[k].default == p.default for k, p in theirs.items())
        more = list(ours.values())[len(theirs) :]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in more)


OPTIONS: dict[str, Any] = {
    "layout": ("batch first", "batch second", "unbatched"),
    "inputs": ("self", "memory", "three"),
    "widths": (False, True),
    "bias": (True, False),
    "add_bias_kv": (False, True),
    "add_zero_attn": (False, True),
    "attn_mask": ATTN_MASKS,
    "padding": PADDINGS,
    "weights": ("no", "mean", "each"),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_three_options_compute_what_torch_computes(dtype: torch.dtype) -> None:
    """Outputs, weights, and gradients of inputs, float masks and parameters, over all triples of options' values."""
    failures, errors, count = [], Errors(), 0
    for o in cover(3 if dtype == torch.float32 else 2, OPTIONS):
        count += 1
        kdim, vdim = (6, 9) if o["widths"] else (E, E)
        if o["widths"] and o["inputs"] != "three":
            kdim, vdim = (E, 9) if o["inputs"] == "self" else (6, 6)
        options = {k: o[k] for k in ("bias", "add_bias_kv", "add_zero_attn")}
        options |= {"kdim": kdim, "vdim": vdim, "batch_first": o["layout"] == "batch first"}
        theirs, ours = (m.to(dtype) for m in twins(**options))
        batch, at = (1, 0) if o["layout"] == "unbatched" else (B, {"batch first": 0, "batch second": 1}[o["layout"]])
        length = L if o["inputs"] == "self" else S
        leaves = {"query": rounded((batch, L, E))}
        if o["inputs"] != "self" or vdim != E:
            leaves["value"] = rounded((batch, length, vdim))
        if o["inputs"] == "three":
            leaves["key"] = rounded((batch, length, kdim))
        leaves = {k: t[0] if o["layout"] == "unbatched" else t.transpose(0, at) for k, t in leaves.items()}
        attn_mask = draw_mask(o["attn_mask"], batch, N, L, length)
        padding = draw_padding(o["padding"], batch, length)
        if padding is not None:
            leaves["padding"] = padding[0] if o["layout"] == "unbatched" else padding
        if attn_mask is not None:
            leaves["mask"] = attn_mask

        def call(module: nn.Module, given: dict[str, Tensor], o: Any = o) -> Any:
            query = given["query"]
            value = given.get("value", query)
            key = given.get("key", value if o["inputs"] == "memory" else query)
            # torch believes the hint only where that suits it, and then hides its own keys: it gets none.
            hint = {"is_causal": True} if o["attn_mask"].startswith("causal") else {}
            return module(
                query, key, value, given.get("padding"), o["weights"] != "no", given.get("mask"),
                o["weights"] == "mean", **(hint if type(module) is fastseq.MultiheadAttention else {}),
            )  # fmt: skip

        exact, peer = exact_and_peer(theirs, leaves, call)
        got = run(ours, leaves, call)
        if o["attn_mask"] == "causal float" and "gradient of mask" in exact and "gradient of mask" not in got:
            del exact["gradient of mask"], peer["gradient of mask"]  # a mask that is not read has none
        failures += [f"{o}: {f}" for f in beyond_budget(got, exact, peer)]
        errors.add("auto", got, exact, peer)
    failures += errors.beyond(1.5)
    assert not failures, report(failures)
    assert count >= (63 if dtype == torch.float32 else 21)  # the least that can do: 7 * 3 * 3, 7 * 3


@pytest.mark.parametrize("need_weights", [False, True])
@constructions
def test_training_and_evaluation_agree_bitwise(options: dict[str, Any], need_weights: bool) -> None:
    module = build(fastseq, **(options | {"dropout": 0.0, "batch_first": True}))
    query, key, value = draw(), draw(S, module.kdim), draw(S, module.vdim)
    padding = draw_padding("bool", B, S)
    training = module(query, key, value, padding, need_weights)
    with torch.no_grad():
        evaluation = module.eval()(query, key, value, padding, need_weights)
    assert torch.equal(training[0], evaluation[0])
    assert not need_weights or torch.equal(training[1], evaluation[1])


def test_output_is_contiguous_whichever_comes_first() -> None:
    """Callers of torch.nn.MultiheadAttention view its output."""
    x = draw()
    for batch_first in (False, True):
        assert build(fastseq, batch_first=batch_first)(x, x, x)[0].is_contiguous()


@pytest.mark.parametrize("shape", [(0, L, E), (B, 0, E)])
def test_nothing_in_nothing_out(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, requires_grad=True)
    module = build(fastseq, batch_first=True)
    out, weights = module(x, x, x)
    assert out.shape == shape
    assert weights.shape == (shape[0], shape[1], shape[1])
    out.sum().backward()


def test_no_memory_gives_the_bias() -> None:
    module = build(fastseq, batch_first=True)
    out, weights = module(draw(), draw(0), draw(0))
    assert weights.shape == (B, L, 0)
    assert torch.equal(out, module.out_proj.bias.expand(B, L, E))


def test_meta_tensors_have_the_shape() -> None:
    x = torch.empty(B, L, E, device="meta")
    out, weights = build(fastseq, batch_first=True, device="meta")(x, x, x)
    assert (out.device.type, out.shape, weights.shape) == ("meta", (B, L, E), (B, L, L))


# Masks


@pytest.mark.parametrize("weights", ["no", "mean", "each"])
@pytest.mark.parametrize("kind", ["padding bool", "padding float", "mask bool", "mask float", "between them"])
def test_pytorch_41508_row_that_sees_nothing_is_zero(kind: str, weights: str) -> None:
    """The whole first sequence of the batch is hidden: its attention is 0, not NaN, and so are its gradients."""
    module = build(fastseq, batch_first=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0] = True
    mask = torch.zeros(B * N, L, S, dtype=torch.bool)
    mask[:N] = True
    given: dict[str, Tensor] = {"key_padding_mask": padding} if kind.startswith("padding") else {"attn_mask": mask}
    if kind == "between them":
        padding[0, 3:], mask[:N, :, :3] = False, False
        given = {"key_padding_mask": padding, "attn_mask": mask}
    if kind.endswith("float"):
        given = {k: torch.zeros(m.shape).masked_fill(m, -torch.inf) for k, m in given.items()}
    query, memory = draw().requires_grad_(), draw(S).requires_grad_()
    out, shown = module(
        query, memory, memory, need_weights=weights != "no", average_attn_weights=weights == "mean", **given
    )
    assert torch.equal(out[0], module.out_proj.bias.expand(L, E))
    assert shown is None or bool((shown[0] == 0).all())
    close(out[1:], module(query[1:], memory[1:], memory[1:], need_weights=weights != "no")[0])
    out.sum().backward()
    for t in (query, memory, *module.parameters()):
        assert t.grad.isfinite().all()
    assert query.grad[0].count_nonzero() == memory.grad[0].count_nonzero() == 0


def test_what_padding_hides_may_be_nan() -> None:
    module = build(fastseq, batch_first=True)
    padding, query, memory = draw_padding("bool", B, S), draw(), draw(S)
    expected, _ = module(query, memory, memory, padding)
    memory[padding] = torch.nan
    assert torch.equal(module(query, memory, memory, padding)[0], expected)


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What functional.scaled_dot_product_attention is called with from here on."""
    calls: list[tuple[Any, ...]] = []
    inner = functional.scaled_dot_product_attention

    def record(*args: Any, **keywords: Any) -> Any:
        calls.append((args, keywords))
        return inner(*args, **keywords)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return calls


def test_masks_are_handed_on_as_small_as_they_come(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    module, x = build(fastseq, batch_first=True), draw(L)
    for attn, padding in itertools.product(("none", "bool", "float", "float per head"), ("none", "bool", "float")):
        module(x, x, x, draw_padding(padding, B, L), attn_mask=draw_mask(attn, B, N, L, L))
        args, keywords = calls[-1]
        for given, kind in ((args[3], "bool"), (keywords["bias"], "float")):
            shapes = []
            if attn.startswith(kind):
                shapes.append((B, N, L, L) if attn.endswith("head") else (1, 1, L, L))
            if padding == kind:
                shapes.append((B, 1, 1, L))
            expected = torch.broadcast_shapes(*shapes) if shapes else None
            assert (None if given is None else given.shape) == expected, (attn, padding)


def test_projections_are_one_product_and_no_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    for batch_first in (False, True):
        module, x, memory = build(fastseq, batch_first=batch_first), draw(), draw()
        module(x, x, x)
        q, k, v = calls[-1][0][:3]
        assert q._base is k._base is v._base
        module(x, memory, memory)
        q, k, v = calls[-1][0][:3]
        assert q._base is not k._base
        assert k._base is v._base
        assert q.shape == ((B, N, L, E // N) if batch_first else (L, N, B, E // N))


def test_hint_is_believed_and_the_mask_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = recorded(monkeypatch)
    module, x = build(fastseq, batch_first=True), draw()
    mask = nn.Transformer.generate_square_subsequent_mask(L)
    expected = module(x, x, x, attn_mask=mask)
    for padding in (None, torch.zeros(B, L, dtype=torch.bool)):
        for a, b in zip(module(x, x, x, padding, attn_mask=mask, is_causal=True), expected, strict=True):
            close(a, b)
        args, keywords = calls[-1]
        assert args[5] is True
        assert keywords["bias"] is None
        assert (args[3] is None) == (padding is None)


@pytest.mark.parametrize("kind", ["upper_left", "lower_right"])
@constructions
def test_causal_is_the_mask_it_names(options: dict[str, Any], kind: str) -> None:
    module = build(fastseq, **options).eval()
    inputs = [draw(n, width) for n, width in ((L, E), (S, module.kdim), (S, module.vdim))]
    query, key, value = (t if module.batch_first else t.transpose(0, 1) for t in inputs)
    mask = torch.ones(L, S, dtype=torch.bool).triu(1 if kind == "upper_left" else 1 + S - L)
    for a, b in zip(module(query, key, value, causal=kind), module(query, key, value, attn_mask=mask), strict=True):
        close(a, b)


# Dropout


def test_dropout_keeps_the_mean_and_is_off_in_evaluation() -> None:
    module = build(fastseq, dropout=0.25, batch_first=True)
    x = draw(4, batch=1).expand(4000, -1, -1)
    with torch.no_grad():
        out, weights = module(x, x, x, average_attn_weights=False)
        exact, undropped = module.eval()(x[:1], x[:1], x[:1], average_attn_weights=False)
        assert torch.equal(exact, build(fastseq, batch_first=True)(x[:1], x[:1], x[:1])[0])
    dropped = (weights == 0).double().mean()
    assert abs(dropped - 0.25) < 0.01
    kept = weights / undropped
    assert torch.allclose(kept[weights != 0], torch.tensor(4 / 3), rtol=1e-4)
    scale = out.std(0) / 4000**0.5
    assert ((out.mean(0) - exact[0]).abs() < 6 * scale).all()


def test_dropout_is_seeded() -> None:
    module, x, found = build(fastseq, dropout=0.5, batch_first=True), draw(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        found.append(module(x, x, x, need_weights=False)[0])
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


# Errors


def _tensor(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.zeros(shape, dtype=dtype)


X, MEMORY = _tensor(B, L, E), _tensor(B, S, E)
BAD: dict[str, tuple[dict[str, Any], tuple[Tensor, ...], dict[str, Any]]] = {
    "query 1-D": ({}, (X[0, 0], MEMORY, MEMORY), {}),
    "query 4-D": ({}, (X[None], MEMORY, MEMORY), {}),
    "key 2-D": ({}, (X, MEMORY[0], MEMORY), {}),
    "value 2-D": ({}, (X, MEMORY, MEMORY[0]), {}),
    "unbatched query with batched key": ({}, (X[0], MEMORY, MEMORY), {}),
    "query too wide": ({}, (_tensor(B, L, E + 1), MEMORY, MEMORY), {}),
    "key too wide": ({}, (X, _tensor(B, S, E + 1), _tensor(B, S, E + 1)), {}),
    "key longer than value": ({}, (X, MEMORY, X), {}),
    "key longer than value, other widths": ({"kdim": 6, "vdim": E}, (X, _tensor(B, S, 6), X), {}),
    "key not kdim wide": ({"kdim": 6}, (X, MEMORY, MEMORY), {}),
    "value not vdim wide": ({"vdim": 6}, (X, MEMORY, MEMORY), {}),
    "other batch": ({}, (X, MEMORY[:2], MEMORY[:2]), {}),
    "other dtype": ({}, (X.double(), MEMORY.double(), MEMORY.double()), {}),
    "key of other dtype": ({}, (X, MEMORY.double(), MEMORY.double()), {}),
    "integers": ({}, (X.long(), MEMORY.long(), MEMORY.long()), {}),
    "attn_mask too long": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(L, S + 1)}),
    "attn_mask of one query": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(1, S)}),
    "attn_mask 1-D": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(S)}),
    "attn_mask 4-D": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(B, N, L, S)}),
    "attn_mask per sequence": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(B, L, S)}),
    "attn_mask of integers": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(L, S, dtype=torch.int64)}),
    "attn_mask of other heads, unbatched": ({}, (X[0], MEMORY[0], MEMORY[0]), {"attn_mask": _tensor(N + 1, L, S)}),
    "attn_mask of another dtype": ({}, (X, MEMORY, MEMORY), {"attn_mask": _tensor(L, S).double()}),
    "padding too long": ({}, (X, MEMORY, MEMORY), {"key_padding_mask": _tensor(B, S + 1, dtype=torch.bool)}),
    "padding of another batch": ({}, (X, MEMORY, MEMORY), {"key_padding_mask": _tensor(B + 1, S, dtype=torch.bool)}),
    "padding 1-D": ({}, (X, MEMORY, MEMORY), {"key_padding_mask": _tensor(S, dtype=torch.bool)}),
    "padding 2-D, unbatched": ({}, (X[0], MEMORY[0], MEMORY[0]), {"key_padding_mask": _tensor(1, S, dtype=torch.bool)}),
    "padding of integers": ({}, (X, MEMORY, MEMORY), {"key_padding_mask": _tensor(B, S, dtype=torch.uint8)}),
    "is_causal without a mask": ({}, (X, X, X), {"is_causal": True}),
    "is_causal without a mask or weights": ({}, (X, X, X), {"is_causal": True, "need_weights": False}),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_torchs_type_of_error(case: str) -> None:
    options, inputs, masks = BAD[case]
    theirs, ours = twins(batch_first=True, **options)
    with pytest.raises(Exception) as expected:  # noqa: PT011  (whatever torch raises)
        theirs(*inputs, **masks)
    with pytest.raises(expected.type) as got:
        ours(*inputs, **masks)
    assert got.type is expected.type


@pytest.mark.parametrize(
    ("arguments", "options", "error"),
    [
        ((0, 1), {}, ValueError),
        ((E, 0), {}, ValueError),
        ((E, 5), {}, AssertionError),
        ((E, 4), {"num_kv_heads": 3}, ValueError),
        ((E, 4), {"num_kv_heads": 0}, ValueError),
        ((12, 4), {"rotary": 10000.0}, ValueError),
        ((E, 4), {"window": 3, "add_zero_attn": True}, ValueError),
    ],
)
def test_bad_construction_is_refused(arguments: Any, options: dict[str, Any], error: type[Exception]) -> None:
    with pytest.raises(error):
        fastseq.MultiheadAttention(*arguments, **options)


def test_bad_keywords_are_refused() -> None:
    module, x = build(fastseq, batch_first=True), draw()
    with pytest.raises(ValueError, match="causal: expected"):
        module(x, x, x, causal="left")
    with pytest.raises(ValueError, match="causal: with a cache"):
        module(x, x, x, causal="upper_left", cache=fastseq.KVCache(8))


# Nested tensors


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("train", [False, True])
def test_nested_is_each_sequence_by_itself(train: bool, layout: torch.layout) -> None:
    theirs, ours = (m.train(train) for m in twins(batch_first=True))
    rows = [torch.randn(n, E) for n in (3, 5, 1)]
    x = torch.nested.nested_tensor(rows, layout=layout, requires_grad=True)
    out, weights = ours(x, x, x)
    assert out.is_nested
    assert out.layout == layout
    for got, row in zip(out.unbind(), rows, strict=True):
        close(got, ours(row, row, row)[0])
    assert weights.shape == (3, 5, 5)
    out.to_padded_tensor(0.0).square().sum().backward()
    for got, row in zip(x.grad.unbind(), rows, strict=True):
        leaf = row.clone().requires_grad_()
        ours(leaf, leaf, leaf)[0].square().sum().backward()
        close(got, leaf.grad)
    if not train and layout == torch.strided:
        for average in (True, False):
            with torch.no_grad():
                (got, shown), (expected, weights) = (m(x, x, x, average_attn_weights=average) for m in (ours, theirs))
            close(shown, weights)
            close(got.to_padded_tensor(0.0), expected.to_padded_tensor(0.0))


def test_nested_is_refused_where_torch_refuses() -> None:
    x = torch.nested.nested_tensor([torch.randn(3, E), torch.randn(5, E)])
    padding = torch.zeros(2, 5, dtype=torch.bool)
    for module in twins(batch_first=True):
        for arguments in ((x, x, draw()), (x, x, x, padding)):
            with pytest.raises(AssertionError):
                module(*arguments)


# Autocast, copies, tracers


@pytest.mark.parametrize("need_weights", [False, True])
def test_autocast_is_torchs(need_weights: bool) -> None:
    theirs, ours = twins(batch_first=True, add_bias_kv=True)
    x, padding = draw(), draw_padding("bool", B, L)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (m(x, x, x, padding, need_weights) for m in (theirs, ours))
    assert got[0].dtype == expected[0].dtype == torch.bfloat16
    torch.testing.assert_close(got[0], expected[0], rtol=0.02, atol=0.02)
    if need_weights:
        assert got[1].dtype == expected[1].dtype
        torch.testing.assert_close(got[1], expected[1], rtol=0.02, atol=0.02)


def test_copies_and_pickles() -> None:
    module = build(fastseq, batch_first=True, num_kv_heads=2, window=(3, 0), rotary=500.0)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = draw()
    expected, _ = module(x, x, x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert repr(again) == repr(module)
        assert torch.equal(again(x, x, x)[0], expected)


def test_parametrised_and_functional_calls_use_the_weights_given() -> None:
    theirs, ours = twins(batch_first=True)
    x = draw()
    given = {k: torch.randn_like(p) / 4 for k, p in theirs.named_parameters()}
    close(*(torch.func.functional_call(m, given, (x, x, x))[0] for m in (ours, theirs)))
    for module in (theirs, ours):
        nn.utils.parametrizations.weight_norm(module, "in_proj_weight")
        with torch.no_grad():
            module.parametrizations.in_proj_weight.original0.mul_(2)
    close(ours(x, x, x)[0], theirs(x, x, x)[0])


class Model(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core = core

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.core(x, x, x, key_padding_mask=padding, need_weights=False)[0]  # type: ignore[no-any-return]


@pytest.mark.filterwarnings("ignore")
def test_older_tracers_see_torchs_module() -> None:
    x, padding = draw(), torch.zeros(B, L, dtype=torch.bool)
    theirs, ours = (Model(m) for m in twins(batch_first=True))
    graphs = [torch.fx.symbolic_trace(model) for model in (theirs, ours)]
    nodes = [[(n.op, str(n.target)) for n in graph.graph.nodes] for graph in graphs]
    assert nodes[0] == nodes[1]
    close(graphs[1](x, padding), theirs(x, padding))
    scripted = torch.jit.script(build(fastseq, batch_first=True))
    close(scripted(x, x, x, padding)[0], theirs(x, padding))


def test_compiles_whole_and_once() -> None:
    torch._dynamo.reset()
    module = build(fastseq, batch_first=True)
    compiled = torch.compile(Model(module), backend="aot_eager", fullgraph=True, dynamic=True)
    for length in (5, 6, 9):
        x, padding = draw(length).requires_grad_(), draw_padding("bool", B, length)
        with torch.compiler.set_stance("default" if length == 5 else "fail_on_recompile"):
            got = compiled(x, padding)
        expected = module(x, x, x, padding, need_weights=False)[0]
        close(got, expected)
        close(*(torch.autograd.grad(t.square().sum(), x)[0] for t in (got, expected)))


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "rotary": 100.0, "window": 2}, {"add_bias_kv": True}])
def test_compiles_with_every_option(options: dict[str, Any]) -> None:
    torch._dynamo.reset()
    module, x = build(fastseq, batch_first=True, **options), draw()
    mask = draw_mask("float", B, N, L, L)
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    for keywords in ({"attn_mask": mask}, {"causal": "upper_left", "average_attn_weights": False}):
        for a, b in zip(compiled(x, x, x, **keywords), module(x, x, x, **keywords), strict=True):
            close(a, b)


def test_exports() -> None:
    model = Model(build(fastseq, batch_first=True)).eval()
    x, padding = draw(), draw_padding("bool", B, L)
    time = torch.export.Dim("time", min=2, max=64)
    program = torch.export.export(model, (x, padding), dynamic_shapes=({1: time}, {1: time}))
    x, padding = draw(11), draw_padding("bool", B, 11)
    close(program.module()(x, padding), model(x, padding))


# What torch does not have


def heads_repeated(module: Any, times: int) -> nn.MultiheadAttention:
    """torch's module of as many key heads as query heads, that computes the same."""
    theirs = nn.MultiheadAttention(E, N, batch_first=True)
    D, M = E // N, N // times
    with torch.no_grad():
        for name, width in (("in_proj_weight", (E,)), ("in_proj_bias", ())):
            q, k, v = getattr(module, name).split([N * D, M * D, M * D])
            k, v = (t.view(M, D, *width).repeat_interleave(times, 0).flatten(0, 1) for t in (k, v))
            getattr(theirs, name).copy_(torch.cat([q, k, v]))
        theirs.out_proj.load_state_dict(module.out_proj.state_dict())
    return theirs


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_grouped_heads_are_heads_repeated(kv_heads: int) -> None:
    module = build(fastseq, batch_first=True, num_kv_heads=kv_heads)
    assert module.in_proj_weight.shape == ((N + 2 * kv_heads) * E // N, E)
    with torch.no_grad():
        module.in_proj_bias.normal_()
    theirs, query, memory = heads_repeated(module, N // kv_heads), draw(), draw(S)
    for inputs in ((query, query, query), (query, memory, memory), (query, memory, memory.clone())):
        for a, b in zip(module(*inputs), theirs(*inputs), strict=True):
            close(a, b)


def test_grouped_heads_with_other_widths_and_learned_keys() -> None:
    module = build(fastseq, num_kv_heads=2, kdim=6, vdim=9, add_bias_kv=True, add_zero_attn=True)
    assert [module.k_proj_weight.shape, module.v_proj_weight.shape] == [(8, 6), (8, 9)]
    assert module.bias_k.shape == (1, 1, 8)
    out, weights = module(torch.randn(L, B, E), torch.randn(S, B, 6), torch.randn(S, B, 9))
    assert out.shape == (L, B, E)
    assert weights.shape == (B, L, S + 2)
    out.sum().backward()
    assert all(p.grad is not None for p in module.parameters())


@pytest.mark.parametrize(("window", "left", "right"), [(1, 1, 1), ((2, 0), 2, 0), ((-1, 1), S, 1)])
def test_window_is_the_mask_it_names(window: Any, left: int, right: int) -> None:
    module, x = build(fastseq, batch_first=True, window=window), draw()
    offset = torch.arange(L) - torch.arange(L)[:, None]
    expected = build(nn, batch_first=True)(x, x, x, attn_mask=(offset < -left) | (offset > right))
    for a, b in zip(module(x, x, x), expected, strict=True):
        close(a, b)


@pytest.mark.parametrize("interleaved", [False, True])
def test_rotary_multiplies_by_complex_units(interleaved: bool) -> None:
    rotary = fastseq.RotaryEmbedding(6, base=100.0, interleaved=interleaved)
    x = torch.randn(2, 3, L, 8, dtype=torch.float64)
    pairs = x[..., :6].unflatten(-1, (3, 2)) if interleaved else x[..., :6].unflatten(-1, (2, 3)).mT
    angle = torch.arange(4, 4 + L)[:, None] * 100.0 ** (-torch.arange(3, dtype=torch.float64) / 3)
    turned = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * torch.polar(torch.ones_like(angle), angle))
    expected = (turned if interleaved else turned.mT).flatten(-2)
    got = rotary(x, offset=4)
    torch.testing.assert_close(got, torch.cat([expected, x[..., 6:]], -1))
    assert rotary(x.bfloat16()).dtype == torch.bfloat16
    assert not list(rotary.state_dict())


def test_rotary_attention_sees_distances_only() -> None:
    """Queries and keys may start anywhere together; a key moved alone is seen differently."""
    module, x = build(fastseq, batch_first=True, rotary=50.0), draw()
    whole, _ = module(x, x, x)
    assert not torch.allclose(whole, build(nn, batch_first=True)(x, x, x)[0], atol=1e-3)
    close(module(x[:, 2:], x, x, causal="lower_right")[0], module(x, x, x, causal="upper_left")[0][:, 2:])
    behind = torch.cat([torch.zeros(B, 3, E), x], 1)
    padding = torch.zeros(B, L + 3, dtype=torch.bool)
    padding[:, :3] = True
    close(module(behind, behind, behind, padding)[0][:, 3:], whole)


DECODERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "batch second": {"batch_first": False},
    "grouped": {"num_kv_heads": 2},
    "rotary": {"rotary": 100.0, "num_kv_heads": 1},
    "window": {"window": (2, 0)},
    "learned key": {"add_bias_kv": True, "add_zero_attn": True},
}


@pytest.mark.parametrize("steps", [[1] * 6, [3, 1, 2], [6]], ids=str)
@pytest.mark.parametrize("options", DECODERS.values(), ids=DECODERS)
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass(options: dict[str, Any], steps: list[int]) -> None:
    module = build(fastseq, **({"batch_first": True} | options))
    x, padding = draw(6), torch.zeros(B, 6, dtype=torch.bool)
    padding[1, :2] = True  # on the left, as decoders pad
    cache, end, found = fastseq.KVCache(8), 0, []
    for step in steps:
        end += step
        part = x[:, end - step : end].transpose(0, 0 if module.batch_first else 1)
        out, _ = module(part, part, part, padding[:, :end], cache=cache)
        found.append(out.transpose(0, 0 if module.batch_first else 1))
    assert cache.length == 6
    whole = x.transpose(0, 0 if module.batch_first else 1)
    expected, _ = module(whole, whole, whole, padding, causal="lower_right")
    close(torch.cat(found, 1), expected.transpose(0, 0 if module.batch_first else 1))


@torch.no_grad()
def test_cache_that_is_filled_once_projects_the_memory_once() -> None:
    module, memory, cache = build(fastseq, batch_first=True, num_kv_heads=2), draw(S), fastseq.KVCache()
    padding = draw_padding("bool", B, S)
    first, second = draw(), draw(2)
    expected = [module(query, memory, memory, padding)[0] for query in (first, second)]
    close(module(first, memory, memory, padding, cache=cache)[0], expected[0])
    unread = torch.full_like(memory, torch.nan)
    close(module(second, unread, unread, padding, cache=cache)[0], expected[1])
    assert cache.length == S


@torch.no_grad()
def test_cache_can_be_rewound_and_reordered() -> None:
    module, x = build(fastseq, batch_first=True, rotary=100.0), draw(4)
    cache = fastseq.KVCache(4)
    first, _ = module(x[:, :3], x[:, :3], x[:, :3], cache=cache)
    cache.length = 1
    part = x[:, 1:3]
    close(module(part, part, part, cache=cache)[0], first[:, 1:])
    rows = torch.tensor([2, 0, 0])
    cache.reorder(rows)
    last = x[rows, 3:]
    whole = x[rows]
    close(module(last, last, last, cache=cache)[0], module(whole, whole, whole, causal="upper_left")[0][:, 3:])


def test_cache_refuses_what_does_not_fit() -> None:
    module, x = build(fastseq, batch_first=True), draw()
    with pytest.raises(RuntimeError, match="no gradients"):
        module(x, x, x, cache=fastseq.KVCache(8))
    with torch.no_grad():
        cache = fastseq.KVCache(8)
        module(x, x, x, cache=cache)
        with pytest.raises(ValueError, match="5 do not fit"):
            module(x, x, x, cache=cache)
        with pytest.raises(ValueError, match="batch, heads and width"):
            module(x[:1, :1], x[:1, :1], x[:1, :1], cache=cache)
        with pytest.raises(AssertionError, match="key_padding_mask"):
            module(x[:, :1], x[:, :1], x[:, :1], torch.zeros(B, 1, dtype=torch.bool), cache=cache)
        assert repr(cache) == "KVCache(max_length=8, length=5)"
        keys, values = torch.randn(2, B, N, 2, 4)
        filled = fastseq.KVCache()
        filled.append(keys, values)
        with pytest.raises(ValueError, match="filled"):
            filled.append(keys, values)


# Choices and swaps


def test_every_implementation_computes_the_same() -> None:
    module, x, padding = build(fastseq, batch_first=True, num_kv_heads=2), draw(), draw_padding("bool", B, L)
    expected = module(x, x, x, padding)
    for name in ("torch", "reference"):
        with fastseq.use(name):
            for a, b in zip(module(x, x, x, padding), expected, strict=True):
                close(a, b)


def test_explain_says_what_runs() -> None:
    module, x = build(fastseq, batch_first=True), draw()
    assert fastseq.explain(module, x, x, x, need_weights=False).name == "torch"
    with fastseq.use("reference"):
        assert fastseq.explain(module, x, x, x).name == "reference"


@constructions
def test_swap_changes_the_class_alone_and_restore_undoes_it(options: dict[str, Any]) -> None:
    module = build(nn, **(options | {"dropout": 0.0}))
    before, text = dict(vars(module)), repr(module)
    inputs = [draw(n, width) for n, width in ((L, E), (S, module.kdim), (S, module.vdim))]
    inputs = [t if module.batch_first else t.transpose(0, 1) for t in inputs]
    expected = module(*inputs)
    assert fastseq.swap(module).swapped == (("", nn.MultiheadAttention, fastseq.MultiheadAttention),)
    assert vars(module) == before
    assert repr(module) == text
    for a, b in zip(module(*inputs), expected, strict=True):
        close(a, b)
    assert fastseq.restore(module)
    assert all(torch.equal(a, b) for a, b in zip(module(*inputs), expected, strict=True))


@pytest.mark.parametrize(
    "options", [{"num_kv_heads": 2}, {"window": 3}, {"rotary": 100.0}, {"num_kv_heads": N}], ids=str
)
def test_restore_leaves_what_torch_lacks(options: dict[str, Any]) -> None:
    layer = fastseq.TransformerEncoderLayer(E, N, 8, **options)
    report = fastseq.restore(nn.Sequential(layer))
    if options == {"num_kv_heads": N}:
        assert len(report) == 2
        assert type(layer) is nn.TransformerEncoderLayer
    else:
        assert [entry.reason for entry in report.kept] == [f"torch.nn has no {next(iter(options))}"] * 2
        assert type(layer) is fastseq.TransformerEncoderLayer


def test_masks_of_two_kinds_raise_no_warning() -> None:
    module, x = build(fastseq, batch_first=True), draw()
    mixed: Callable[..., Any] = lambda: module(  # noqa: E731
        x, x, x, draw_padding("bool", B, L), attn_mask=draw_mask("float", B, N, L, L)
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        mixed()
