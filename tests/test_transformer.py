"""The Transformer modules: torch.nn's numbers, in training and in evaluation, and the laws of what they add."""

import copy
import inspect
import io
import pickle
from typing import Any

import pytest
import torch
import torch.nn.functional as F
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

B, S, T, E, N, FF = 3, 7, 5, 16, 4, 24

pytestmark = [
    pytest.mark.filterwarnings("ignore:Support for mismatched"),
    pytest.mark.filterwarnings("ignore:enable_nested_tensor is True"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors"),
]

KINDS = (
    "TransformerEncoderLayer",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerDecoder",
    "Transformer",
)
kinds = pytest.mark.parametrize("kind", KINDS)


def build(library: Any, kind: str, **options: Any) -> Any:
    """Two layers where there is a stack; no dropout unless asked for."""
    torch.manual_seed(0)
    options = {"dropout": 0.0} | options
    if kind == "Transformer":
        return library.Transformer(E, N, 2, 2, FF, **options)
    layer = getattr(library, kind if kind.endswith("Layer") else f"{kind}Layer")(E, N, FF, **options)
    if kind.endswith("Layer"):
        return layer
    return getattr(library, kind)(layer, 2, nn.LayerNorm(E, dtype=options.get("dtype"), device=options.get("device")))


def twins(kind: str, **options: Any) -> tuple[Any, Any]:
    return build(nn, kind, **options), build(fastseq, kind, **options)


def draw(length: int = T) -> Tensor:
    return torch.randn(B, length, E)


def inputs(kind: str) -> tuple[Tensor, ...]:
    """What the module is called with, batch first."""
    return {"E": (draw(),), "D": (draw(), draw(S)), "": (draw(S), draw())}[kind.removeprefix("Transformer")[:1]]


def close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


# What torch has


@kinds
@pytest.mark.parametrize("options", [{}, {"bias": False, "norm_first": True, "batch_first": True}], ids=str)
def test_construction_is_torchs(kind: str, options: dict[str, Any]) -> None:
    theirs, ours = twins(kind, **options)
    assert isinstance(ours, getattr(nn, kind))
    assert repr(ours) == repr(theirs)
    assert vars(ours).keys() == vars(theirs).keys()
    for (a, p), (b, q) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        assert a == b
        assert torch.equal(p, q)
    assert all(type(m) is fastseq.MultiheadAttention for m in ours.modules() if isinstance(m, nn.MultiheadAttention))
    for source, target in ((theirs, ours), (ours, theirs)):
        with torch.no_grad():
            next(source.parameters()).add_(1)
        target.load_state_dict(source.state_dict())
        assert all(torch.equal(p, q) for p, q in zip(ours.parameters(), theirs.parameters(), strict=True))


@kinds
def test_signatures_are_torchs_and_more_by_keyword(kind: str) -> None:
    for name in ("__init__", "forward"):
        theirs, ours = (inspect.signature(getattr(getattr(lib, kind), name)).parameters for lib in (nn, fastseq))
        assert list(ours)[: len(theirs)] == list(theirs)
        assert all(ours[k].default == p.default for k, p in theirs.items())
        more = list(ours.values())[len(theirs) :]
        assert all(p.kind is p.KEYWORD_ONLY and p.default is None for p in more)


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


OPTIONS: dict[str, Any] = {
    "norm_first": (False, True),
    "activation": ("relu", "gelu", swish),
    "bias": (True, False),
    "layout": ("batch first", "batch second", "unbatched"),
    "own mask": ATTN_MASKS,
    "memory mask": ("none", "bool", "float per head"),
    "padding": PADDINGS,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@kinds
def test_every_two_options_compute_what_torch_computes(kind: str, dtype: torch.dtype) -> None:
    """Outputs and all gradients, in training mode, where torch has one path."""
    failures, errors = [], Errors()
    for o in cover(2, OPTIONS):
        options = {k: o[k] for k in ("norm_first", "activation", "bias")}
        options |= {"batch_first": o["layout"] == "batch first", "layer_norm_eps": 1e-3}
        theirs, ours = (m.to(dtype) for m in twins(kind, **options))
        batch = 1 if o["layout"] == "unbatched" else B

        def placed(t: Tensor, o: Any = o) -> Tensor:
            return {"batch first": t, "batch second": t.transpose(0, 1), "unbatched": t[0]}[o["layout"]]

        leaves = {"tgt": placed(rounded((batch, T, E)))}
        if kind != "TransformerEncoder" and not kind.startswith("TransformerEncoderL"):
            leaves["memory"] = placed(rounded((batch, S, E)))
        found = {
            "tgt_mask": draw_mask(o["own mask"], batch, N, T, T),
            "memory_mask": draw_mask(o["memory mask"], batch, N, T, S),
            "src_mask": draw_mask(o["own mask"], batch, N, S, S),
            "tgt_key_padding_mask": draw_padding(o["padding"], batch, T),
            "memory_key_padding_mask": draw_padding(o["padding"], batch, S),
        }
        if o["layout"] == "unbatched":
            found = {k: m[0] if m is not None and k.endswith("padding_mask") else m for k, m in found.items()}
        hint = o["own mask"].startswith("causal")

        def call(module: nn.Module, given: dict[str, Tensor], found: Any = found, hint: bool = hint) -> Any:
            x, memory = given["tgt"], given.get("memory")
            f = {k: m.to(x.dtype) if m is not None and m.is_floating_point() else m for k, m in found.items()}
            if kind == "TransformerEncoderLayer":
                return module(x, f["tgt_mask"], f["tgt_key_padding_mask"], hint)
            if kind == "TransformerEncoder":
                return module(x, f["tgt_mask"], f["tgt_key_padding_mask"])
            masks = (f["tgt_mask"], f["memory_mask"], f["tgt_key_padding_mask"], f["memory_key_padding_mask"])
            if kind == "TransformerDecoderLayer":
                return module(x, memory, *masks, hint)
            if kind == "TransformerDecoder":
                return module(x, memory, *masks)
            paddings = {"src_key_padding_mask": masks[3], "tgt_key_padding_mask": masks[2]}
            return module(memory, x, f["src_mask"], *masks[:2], memory_key_padding_mask=masks[3], **paddings)

        exact, peer = exact_and_peer(theirs, leaves, call)
        got = run(ours, leaves, call)
        failures += [f"{o}: {f}" for f in beyond_budget(got, exact, peer)]
        errors.add("auto", got, exact, peer)
    failures += errors.beyond(1.5)
    assert not failures, report(failures)


@kinds
@pytest.mark.parametrize("norm_first", [False, True])
def test_training_and_evaluation_agree_bitwise(kind: str, norm_first: bool) -> None:
    module = build(fastseq, kind, batch_first=True, norm_first=norm_first)
    x = inputs(kind)
    name = next(k for k in inspect.signature(module.forward).parameters if k.endswith("key_padding_mask"))
    padding = draw_padding("bool", B, x[0].shape[1])
    training = module(*x, **{name: padding})
    with torch.no_grad():
        assert torch.equal(module.eval()(*x, **{name: padding}), training)


@pytest.mark.parametrize("options", [{}, {"enable_nested_tensor": False}, {"mask_check": False}], ids=str)
@torch.no_grad()
def test_pytorch_97111_padding_all_sequences_share_cuts_nothing(options: dict[str, Any]) -> None:
    """Where every sequence ends before the batch does, evaluation gives as many steps as training, and the same."""
    layer = fastseq.TransformerEncoderLayer(E, N, FF, dropout=0.0, batch_first=True)
    encoder = fastseq.TransformerEncoder(layer, 2, **options)
    padding = torch.arange(S).expand(B, S) >= torch.tensor([[3], [5], [2]])
    x = draw(S)
    training = encoder(x, src_key_padding_mask=padding)
    evaluation = encoder.eval()(x, src_key_padding_mask=padding)
    assert evaluation.shape == (B, S, E)
    assert torch.equal(evaluation, training)
    theirs = nn.TransformerEncoder(build(nn, "TransformerEncoderLayer", batch_first=True), 2).train()
    theirs.load_state_dict(encoder.state_dict())
    close(evaluation, theirs(x, src_key_padding_mask=padding))


def test_pytorch_41508_sequence_of_padding_alone_stays_finite() -> None:
    model = build(fastseq, "Transformer", batch_first=True)
    padding = torch.zeros(B, S, dtype=torch.bool)
    padding[0] = True
    out = model(draw(S), draw(), src_key_padding_mask=padding, memory_key_padding_mask=padding)
    out.sum().backward()
    assert out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_hooks_fire_in_evaluation() -> None:
    layer, fired = build(fastseq, "TransformerEncoderLayer", batch_first=True).eval(), []
    layer.self_attn.register_forward_hook(lambda *_: fired.append("attention"))
    with torch.no_grad():
        layer(draw())
    assert fired == ["attention"]


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("kind", KINDS[:2])
def test_dropout_is_where_torch_has_it(kind: str, norm_first: bool) -> None:
    """Each in turn drops everything, which needs no chance."""
    x, models = inputs(kind), twins(kind, norm_first=norm_first, batch_first=True)
    places = [name for name, module in models[0].named_modules() if isinstance(module, nn.Dropout)]
    assert len(places) == (3 if kind == "TransformerEncoderLayer" else 4)
    plain = models[0](*x)
    for place in places:
        for module in models:
            module.get_submodule(place).p = 1.0
        expected, got = (module(*x) for module in models)
        close(got, expected)
        assert not torch.allclose(expected, plain)
        for module in models:
            module.get_submodule(place).p = 0.0


@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerEncoder"])
def test_nested_is_each_sequence_by_itself(kind: str, train: bool, layout: torch.layout) -> None:
    module = build(fastseq, kind, batch_first=True).train(train)
    rows = [torch.randn(n, E) for n in (3, 5, 1)]
    out = module(torch.nested.nested_tensor(rows, layout=layout))
    assert out.is_nested
    for got, row in zip(out.unbind(), rows, strict=True):
        close(got, module(row))
    with pytest.raises(AssertionError):
        module(torch.nested.nested_tensor(rows), src_key_padding_mask=torch.zeros(3, 5, dtype=torch.bool))


BAD: dict[str, tuple[str, dict[str, Any]]] = {
    "integer mask": ("TransformerEncoder", {"mask": torch.zeros(T, T, dtype=torch.int64)}),
    "integer mask of a layer": ("TransformerEncoderLayer", {"src_mask": torch.zeros(T, T, dtype=torch.int64)}),
    "integer padding": ("TransformerEncoder", {"src_key_padding_mask": torch.zeros(B, T, dtype=torch.uint8)}),
    "mask too long": ("TransformerEncoder", {"mask": torch.zeros(T + 1, T + 1)}),
    "hint without a mask": ("TransformerEncoder", {"is_causal": True}),
    "hint without a mask, decoder": ("TransformerDecoder", {"tgt_is_causal": True}),
    "padding of the memory too short": (
        "TransformerDecoder",
        {"memory_key_padding_mask": torch.zeros(B, S - 1, dtype=torch.bool)},
    ),
    "mask of the memory too short": ("TransformerDecoderLayer", {"memory_mask": torch.zeros(T, S - 1)}),
    "other batches": ("Transformer", {"tgt": torch.zeros(B + 1, T, E)}),
    "other widths": ("Transformer", {"tgt": torch.zeros(B, T, E + 1)}),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_has_torchs_type_of_error(case: str) -> None:
    kind, wrong = BAD[case]
    theirs, ours = twins(kind, batch_first=True)
    names = list(inspect.signature(ours.forward).parameters)
    arguments = dict(zip(names, inputs(kind), strict=False)) | wrong
    with pytest.raises(Exception) as expected:  # noqa: PT011  (whatever torch raises)
        theirs(**arguments)
    with pytest.raises(expected.type) as got:
        ours(**arguments)
    assert got.type is expected.type


# Causal masks


def recorded(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, Any, Any]]:
    """The mask, is_causal and bias of every attention from here on."""
    calls: list[tuple[Any, Any, Any]] = []
    inner = functional.scaled_dot_product_attention

    def record(*args: Any, **keywords: Any) -> Any:
        calls.append((args[3], args[5], keywords["bias"]))
        return inner(*args, **keywords)

    monkeypatch.setattr(functional, "scaled_dot_product_attention", record)
    return calls


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
@pytest.mark.parametrize("batch_first", [False, True])
def test_causal_mask_is_recognised_and_not_read(
    monkeypatch: pytest.MonkeyPatch, batch_first: bool, dtype: torch.dtype
) -> None:
    model = build(fastseq, "Transformer", batch_first=batch_first)
    mask = nn.Transformer.generate_square_subsequent_mask(T, dtype=dtype)
    src, tgt = (t if batch_first else t.transpose(0, 1) for t in (draw(T), draw(T)))
    expected = model(src, tgt, mask, mask, src_is_causal=False, tgt_is_causal=False)
    calls = recorded(monkeypatch)
    close(model(src, tgt, mask, mask), expected)
    own = [calls[i] for i in (0, 1, 2, 4)]  # two of the encoder, then own and memory's by turns
    assert own == [(None, True, None)] * 4
    learned = torch.zeros(T, T).masked_fill(mask != 0, -torch.inf).requires_grad_()
    model.encoder(src, learned).sum().backward()
    assert learned.grad is not None


def test_mask_that_is_almost_causal_is_read() -> None:
    theirs, ours = twins("TransformerEncoder", batch_first=True)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    mask[0, -1] = 0.0
    x = draw()
    close(ours(x, mask), theirs(x, mask))


@pytest.mark.parametrize("kind", KINDS[:4])
def test_causal_needs_no_mask(kind: str) -> None:
    module, x = build(fastseq, kind, batch_first=True), inputs(kind)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    name = next(k for k in inspect.signature(module.forward).parameters if k.endswith("mask"))
    close(module(*x, causal="upper_left"), module(*x, **{name: mask}))


# Options of the attention, and decoding


@pytest.mark.parametrize("options", [{}, {"num_kv_heads": 2, "rotary": 100.0}, {"window": (2, 0)}], ids=str)
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("kind", KINDS[:4])
@torch.no_grad()
def test_decoding_with_a_cache_is_the_whole_pass(kind: str, batch_first: bool, options: dict[str, Any]) -> None:
    module, at = build(fastseq, kind, batch_first=batch_first, **options), 0 if batch_first else 1
    x, *memory = (t.transpose(0, at) for t in inputs(kind))
    whole = module(x, *memory, causal="upper_left")
    cache, found = module.new_cache(max_length=T), []
    for part in x.split([2, 1, 2], dim=1 - at):
        found.append(module(part, *memory, cache=cache))
        memory = [torch.full_like(t, torch.nan) for t in memory]  # projected by the first call alone
    close(torch.cat(found, 1 - at), whole)


def test_stacks_want_a_cache_for_each_layer() -> None:
    encoder = build(fastseq, "TransformerEncoder", batch_first=True)
    with pytest.raises(ValueError, match="one for each of 2 layers, got 1"):
        encoder(draw(), cache=encoder.new_cache(8)[:1])


def test_options_reach_the_attention() -> None:
    options = {"num_kv_heads": 2, "window": (3, 0), "rotary": 100.0}
    for kind in ("TransformerEncoderLayer", "TransformerDecoderLayer"):
        layer = build(fastseq, kind, batch_first=True, **options)
        attention = layer.self_attn
        assert (attention.num_kv_heads, attention.window, attention.rotary.base) == (2, (3, 0), 100.0)
        assert "num_kv_heads=2, window=(3, 0)" in repr(layer)
    memory = layer.multihead_attn
    assert (memory.num_kv_heads, memory.window, memory.rotary) == (2, None, None)


# Swaps, copies, tracers


def whole_model() -> nn.Transformer:
    torch.manual_seed(0)
    return nn.Transformer(E, N, 2, 1, FF, dropout=0.0, batch_first=True)


def test_swap_takes_a_whole_transformer_and_restore_gives_it_back() -> None:
    model = whole_model()
    x = inputs("Transformer")
    types = [type(m) for m in model.modules()]
    expected, text = model(*x), repr(model)
    states = [dict(vars(m)) for m in model.modules()]
    report = fastseq.swap(model)
    assert [name for name, *_ in report.swapped] == [
        "", "encoder", "encoder.layers.0", "encoder.layers.0.self_attn", "encoder.layers.1",
        "encoder.layers.1.self_attn", "decoder", "decoder.layers.0", "decoder.layers.0.self_attn",
        "decoder.layers.0.multihead_attn",
    ]  # fmt: skip
    assert all(after is getattr(fastseq, before.__name__) for _, before, after in report.swapped)
    assert not report.kept
    assert [vars(m) for m in model.modules()] == states
    assert repr(model) == text
    close(model(*x), expected)
    assert torch.equal(model(*x), build_from(model)(*x))
    assert len(fastseq.restore(model)) == 10
    assert [type(m) for m in model.modules()] == types
    assert torch.equal(model(*x), expected)


def build_from(model: nn.Module) -> nn.Module:
    """The like of a swapped model, built as fastseq's."""
    ours = fastseq.Transformer(E, N, 2, 1, FF, dropout=0.0, batch_first=True)
    ours.load_state_dict(model.state_dict())
    return ours


class Custom(nn.TransformerEncoderLayer):
    """What users write: a block of their own, with torch's arguments."""

    def _sa_block(self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False) -> Tensor:
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal) * 2


class OnOurs(fastseq.TransformerEncoderLayer):
    def _sa_block(  # type: ignore[override]
        self, x: Tensor, attn_mask: Any, key_padding_mask: Any, is_causal: bool = False
    ) -> Tensor:
        return super()._sa_block(x, attn_mask, key_padding_mask, is_causal) * 2


@pytest.mark.parametrize("train", [False, True])
def test_layers_of_the_users_own_stay_theirs(train: bool) -> None:
    torch.manual_seed(0)
    theirs = nn.TransformerEncoder(Custom(E, N, FF, 0.0, batch_first=True, norm_first=True), 2)
    ours = copy.deepcopy(theirs)
    report = fastseq.swap(ours)
    assert [entry.name for entry in report.swapped] == ["", "layers.0.self_attn", "layers.1.self_attn"]
    assert all("subclass of torch.nn.TransformerEncoderLayer" in entry.reason for entry in report.kept)
    derived = fastseq.TransformerEncoder(OnOurs(E, N, FF, 0.0, batch_first=True, norm_first=True), 2)
    derived.load_state_dict(theirs.state_dict())
    x, padding = draw(), draw_padding("bool", B, T)
    expected = theirs.train()(x, src_key_padding_mask=padding)
    for module in (ours, derived):
        close(module.train(train)(x, src_key_padding_mask=padding), expected)


@torch.no_grad()
def test_our_layers_serve_a_stack_of_torchs_that_nests() -> None:
    """A stack that swap left alone takes its fast path, which hands nested tensors to its layers."""

    class Stack(nn.TransformerEncoder):
        pass

    stack = Stack(build(nn, "TransformerEncoderLayer", batch_first=True), 2).eval()
    x, padding = draw(S), torch.arange(S).expand(B, S) >= torch.tensor([[7], [5], [2]])
    expected = stack(x, src_key_padding_mask=padding)
    assert len(fastseq.swap(stack)) == 4
    close(stack(x, src_key_padding_mask=padding), expected)


def test_custom_stacks_are_left_as_they_are() -> None:
    encoder = build(nn, "TransformerEncoder", batch_first=True)
    model = fastseq.Transformer(E, N, 1, 1, FF, custom_encoder=encoder, batch_first=True)
    assert type(model.encoder) is nn.TransformerEncoder
    assert type(model.encoder.layers[0]) is nn.TransformerEncoderLayer
    assert type(model.decoder.layers[0]) is fastseq.TransformerDecoderLayer


@kinds
def test_copies_and_pickles(kind: str) -> None:
    module, x = build(fastseq, kind, batch_first=True), inputs(kind)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    expected = module(*x)
    for again in (copy.deepcopy(module), pickle.loads(pickle.dumps(module)), torch.load(file, weights_only=False)):
        assert [type(m) for m in again.modules()] == [type(m) for m in module.modules()]
        assert torch.equal(again(*x), expected)


@kinds
def test_autocast_is_torchs(kind: str) -> None:
    x = inputs(kind)
    with torch.autocast("cpu", torch.bfloat16):
        expected, got = (m(*x) for m in twins(kind, batch_first=True))
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore")
@kinds
def test_older_tracers_see_torchs_modules(kind: str) -> None:
    x = inputs(kind)
    ours = build(fastseq, kind, batch_first=True)
    graph = torch.fx.symbolic_trace(nn.Sequential(ours)) if len(x) == 1 else None
    if graph is not None:
        assert [str(n.target) for n in graph.graph.nodes if n.op == "call_module"] == ["0"]
        close(graph(*x), ours(*x))
    scripted = torch.jit.script(build(fastseq, kind, batch_first=True))
    close(scripted(*x), ours(*x))


@pytest.mark.parametrize("kind", ["TransformerEncoderLayer", "TransformerDecoder"])
def test_compiles_whole(kind: str) -> None:
    torch._dynamo.reset()
    module, x = build(fastseq, kind, batch_first=True), inputs(kind)
    mask = nn.Transformer.generate_square_subsequent_mask(T)
    name = next(k for k in inspect.signature(module.forward).parameters if k.endswith("mask"))
    compiled = torch.compile(module, backend="aot_eager", fullgraph=True)
    close(compiled(*x, **{name: mask}), module(*x, **{name: mask}))


def test_exports() -> None:
    module = build(fastseq, "TransformerEncoder", batch_first=True).eval()
    x, padding = draw(), draw_padding("bool", B, T)
    program = torch.export.export(module, (x,), {"src_key_padding_mask": padding})
    close(program.module()(x, src_key_padding_mask=padding), module(x, src_key_padding_mask=padding))


@kinds
def test_explain_says_what_runs(kind: str) -> None:
    module, x = build(fastseq, kind, batch_first=True), inputs(kind)
    assert fastseq.explain(module, *x).name == "torch"
    with fastseq.use("reference"):
        assert fastseq.explain(module, *x).name == "reference"
        close(module(*x), build(nn, kind, batch_first=True)(*x))


@kinds
def test_learns_step_for_step_as_torch_does(kind: str) -> None:
    x = inputs(kind)
    losses = []
    for module in twins(kind, batch_first=True):
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        found = []
        for _ in range(3):
            optimizer.zero_grad()
            loss = F.mse_loss(module(*x), torch.zeros(()).expand(B, T, E))
            loss.backward()
            optimizer.step()
            found.append(loss.detach())
        losses.append(torch.stack(found))
    close(*losses)
