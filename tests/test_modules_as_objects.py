"""Drop-in: our modules are built, stored, copied, moved, hooked, traced and wrapped as those of torch.nn are."""

import copy
import inspect
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils.rnn import PackedSequence

import fastseq

from .support.modules_cases import CONSTRUCTIONS, WAYS, Case, every, gradients, outputs_of, tensors

pytestmark = pytest.mark.filterwarnings("ignore:LSTM with projections is not supported with oneDNN")

KINDS = ("RNN", "LSTM", "GRU", "RNNCell", "LSTMCell", "GRUCell")
T, B, I, H = 4, 2, 3, 5  # noqa: E741  (the field's letter)


def pair(name: str, **keywords: Any) -> list[Any]:
    """The same module of torch.nn and ours, in evaluation, with different parameters."""
    kind, options = CONSTRUCTIONS[name]
    return [getattr(library, kind)(I, H, **options, **keywords).eval() for library in (torch.nn, fastseq)]


def twins(kind: str, **options: Any) -> list[Any]:
    """The same module of torch.nn and ours, with the same parameters."""
    theirs, ours = (getattr(library, kind)(I, H, **options) for library in (torch.nn, fastseq))
    ours.load_state_dict(theirs.state_dict())
    return [theirs, ours]


def draw(module: nn.Module) -> Tensor:
    torch.manual_seed(1)
    x = torch.randn((B, I) if isinstance(module, nn.RNNCellBase) else (T, B, I))
    return x.to(next(module.parameters()).dtype)


def feed(module: Any, **keywords: Any) -> list[Tensor]:
    """All outputs for the same input."""
    return tensors(module(draw(module), **keywords))


def learn(module: Any) -> list[Tensor]:
    """All outputs and all gradients for the same input."""
    x = draw(module).requires_grad_()
    outputs = tensors(module(x))
    return outputs + list(torch.autograd.grad(sum(o.sum() for o in outputs), [x, *module.parameters()]))


def same(got: list[Tensor], expected: list[Tensor]) -> bool:
    return all(torch.equal(g, e) and g.dtype == e.dtype for g, e in zip(got, expected, strict=True))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_same_seed_gives_the_same_module(name: str) -> None:
    kind, options = CONSTRUCTIONS[name]
    for keywords in ({}, {"dtype": torch.float64}, {"device": "meta"}):
        made, after = [], []
        for library in (torch.nn, fastseq):
            torch.manual_seed(7)
            made.append(getattr(library, kind)(I, H, **options, **keywords))
            after.append(torch.rand(3))
        theirs, ours = made
        assert isinstance(ours, type(theirs))
        assert repr(ours) == repr(theirs)
        assert list(ours.state_dict()) == list(theirs.state_dict())
        assert ours.__dict__.keys() == theirs.__dict__.keys()
        assert torch.equal(*after)
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert p.shape == q.shape
            assert p.dtype == q.dtype
            assert p.device == q.device
            assert p.is_meta or torch.equal(p, q)


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_state_dict_loads_both_ways(name: str) -> None:
    for assign in (False, True):
        theirs, ours = pair(name)
        assert not same(feed(ours), feed(theirs))
        ours.load_state_dict(theirs.state_dict(), assign=assign)
        assert same(feed(ours), feed(theirs))
        theirs, ours = pair(name)
        file = io.BytesIO()
        torch.save(ours.state_dict(), file)
        file.seek(0)
        theirs.load_state_dict(torch.load(file, weights_only=True), assign=assign)
        assert same(feed(theirs), feed(ours))


def pickled(module: nn.Module) -> Any:
    return pickle.loads(pickle.dumps(module))


def saved(module: nn.Module) -> Any:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_copy_behaves_the_same(name: str, copied: Callable[[nn.Module], Any]) -> None:
    original = pair(name)[1]
    original.note = "kept"
    other = copied(original)
    assert type(other) is type(original)
    assert other.note == "kept"
    assert repr(other) == repr(original)
    assert not other.training
    for implementation in ("auto", "reference"):
        with fastseq.use(implementation):
            assert same(feed(other), feed(original))
    if isinstance(other, nn.RNNBase):
        assert same(feed(other, recompute=True), feed(original, recompute=True))
    with torch.no_grad():  # two modules, not one
        next(other.parameters()).add_(1)
    assert not same(feed(other), feed(original))


@pytest.mark.parametrize("name", CONSTRUCTIONS)
def test_a_moved_module_goes_on(name: str) -> None:
    theirs, ours = pair(name)
    ours.load_state_dict(theirs.state_dict())
    for dtype in (torch.float64, torch.bfloat16, torch.float32):
        assert same(feed(ours.to(dtype)), feed(theirs.to(dtype)))
        if isinstance(ours, nn.RNNBase):
            assert [t.dtype for t in feed(ours, recompute=True)] == [dtype] * len(feed(theirs))
    shape = draw(ours).shape
    theirs, ours = theirs.to("meta"), ours.to("meta")
    expected = [(t.shape, t.dtype, t.device) for t in tensors(theirs(torch.empty(shape, device="meta")))]
    found = tensors(ours(torch.empty(shape, device="meta")))
    assert [(t.shape, t.dtype, t.device) for t in found] == expected
    ours = ours.to_empty(device="cpu")
    ours.reset_parameters()
    assert all(t.isfinite().all() for t in feed(ours))


@pytest.mark.parametrize("kind", KINDS)
def test_every_way_knows_its_shapes_without_values(kind: str) -> None:
    """On the meta device, for those who plan memory before they have any."""
    theirs, ours = twins(kind)
    x = draw(ours)
    expected = [(t.shape, t.dtype) for t in tensors(theirs(x))]
    ours, x = ours.to("meta"), x.to("meta")
    ways: list[tuple[str, dict[str, Any]]] = [("auto", {}), ("torch", {}), ("reference", {})]
    ways += [("auto", {"reset": torch.zeros(x.shape[:-1], dtype=torch.bool, device="meta")})]
    if isinstance(ours, nn.RNNBase):
        ways += [("auto", {"recompute": True}), ("auto", {"lengths": torch.tensor([3, 1])})]
    for implementation, keywords in ways:
        with fastseq.use(implementation):
            found = tensors(ours(x, **keywords))
        assert [(t.shape, t.dtype) for t in found] == expected, (implementation, list(keywords))
        assert all(t.is_meta for t in found)


# ----------------------------------------------------------------------------------------------------------- the call


@pytest.mark.parametrize("kind", KINDS)
def test_signature_is_torchs_and_more_by_keyword(kind: str) -> None:
    theirs, ours = (inspect.signature(getattr(library, kind).forward).parameters for library in (torch.nn, fastseq))
    assert list(ours)[:3] == ["self", "input", "hx"]
    assert all(p.kind is p.KEYWORD_ONLY and p.default in (None, False) for p in list(ours.values())[3:])
    assert list(theirs) in (["self", "input", "hx"], ["self", "args", "kwargs"]) or theirs.keys() <= ours.keys()
    theirs, ours = twins(kind)
    assert same(tensors(ours(input=draw(ours), hx=None)), tensors(theirs(input=draw(theirs), hx=None)))


WHOLE = [
    Case("rnn_tanh", hx=True),
    Case("rnn_relu", num_layers=2, hx=True, batch_first=True),
    Case("lstm", bidirectional=True, hx=True),
    Case("lstm_proj", hx=True),
    Case("gru", num_layers=2, batch_first=True, hx=True),
]


def strided(t: Tensor) -> list[Tensor]:
    """The same values in other memory: transposed, with gaps, backwards in memory, from an odd address."""
    gaps = torch.stack([t, torch.full_like(t, torch.nan)], -1)[..., 0]
    turned = t.transpose(0, -1).contiguous().transpose(0, -1)
    offset = torch.cat([t.new_zeros(1), t.flatten()])[1:].view(t.shape)
    return [gaps, turned, offset]


@pytest.mark.parametrize("case", WHOLE, ids=str)
def test_memory_layout_of_inputs_is_invisible(case: Case) -> None:
    theirs, ours, drawn = case.build(torch.nn), case.build(fastseq), case.draw()
    forms = [strided(t) for t in drawn]
    spread = [t[..., :1].expand_as(t) for t in drawn]  # a stride of zero
    for inputs in (*zip(*forms, strict=True), spread):
        plain = [t.contiguous() for t in inputs]
        assert same(tensors(case.call(ours, inputs)), tensors(case.call(theirs, inputs)))
        for way in WAYS:
            implementation, keywords = case.way(way)
            with fastseq.use(implementation):
                got, expected = (outputs_of(case.call(ours, given, **keywords)) for given in (inputs, plain))
            parameters = dict(ours.named_parameters())
            torch.testing.assert_close(got, expected)
            torch.testing.assert_close(gradients(got, parameters), gradients(expected, parameters))


@pytest.mark.parametrize("cell", ["rnn_tanh", "rnn_relu", "lstm", "lstm_proj", "gru"])
def test_batch_of_nobody(cell: str) -> None:
    for case in every(cell=cell, B=0):
        if case.layout != "padded" or case.num_layers > 2:
            continue
        theirs, ours = case.build(torch.nn), case.build(fastseq)
        x, *states = (t.requires_grad_() for t in case.draw())
        expected = outputs_of(case.call(theirs, [x, *states]))
        expected |= gradients(expected, {"input": x, **dict(theirs.named_parameters())})
        shapes = {k: (t.shape, t.dtype) for k, t in expected.items()}
        for implementation, keywords in (("auto", {}), *(case.way(way) for way in WAYS)):
            with fastseq.use(implementation):
                got = outputs_of(case.call(ours, [x, *states], **keywords))
            found = got | gradients(got, {"input": x, **dict(ours.named_parameters())})
            assert {k: (t.shape, t.dtype) for k, t in found.items()} == shapes, f"{case} {implementation} {keywords}"
            assert not any(t.any() for t in found.values()), f"{case} {implementation} {keywords}"


@pytest.mark.parametrize("kind", ["RNNCell", "LSTMCell", "GRUCell"])
def test_cell_for_nobody(kind: str) -> None:
    theirs, ours = twins(kind)
    for implementation in ("auto", "reference"):
        with fastseq.use(implementation):
            assert same(tensors(ours(torch.empty(0, I))), tensors(theirs(torch.empty(0, I))))


@pytest.mark.parametrize("kind", KINDS)
def test_output_dtypes_under_autocast_are_torchs(kind: str) -> None:
    """On the CPU LSTM, RNN and RNNCell run in bfloat16, and GRU, LSTMCell and GRUCell do not."""
    theirs, ours = twins(kind)
    low = torch.bfloat16 if kind in ("LSTM", "RNN", "RNNCell") else torch.float32
    x = draw(ours)
    sequence = isinstance(ours, nn.RNNBase)
    state = torch.zeros((1, B, H) if sequence else (B, H))
    ways: list[tuple[str, dict[str, Any]]] = [("auto", {}), ("reference", {})]
    ways += [("auto", {"reset": torch.zeros(x.shape[:-1], dtype=torch.bool)})]
    if sequence:
        ways += [("auto", {"recompute": True}), ("auto", {"lengths": torch.tensor([T, T])})]
    for hx, grad in itertools.product((None, (state, state) if "LSTM" in kind else state), (True, False)):
        with torch.autocast("cpu", torch.bfloat16), torch.set_grad_enabled(grad):
            expected = tensors(theirs(x, hx))
            assert {t.dtype for t in expected} == {low}  # the table itself
            for implementation, keywords in ways:
                with fastseq.use(implementation):
                    got = tensors(ours(x, hx, **keywords))
                assert [t.dtype for t in got] == [t.dtype for t in expected], (implementation, list(keywords))
                assert (implementation, keywords) != ("auto", {}) or same(got, expected)
                torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05)
                if grad:
                    (dw,) = torch.autograd.grad(got[0].float().sum(), next(ours.parameters()))
                    assert dw.dtype == torch.float32


# ----------------------------------------------------------------------------------------------------- what is around


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_see_what_torchs_see(kind: str) -> None:
    logs: list[list[Any]] = []
    for module in twins(kind):
        log: list[Any] = []
        note = lambda *what, log=log: log.extend(tensors([w for w in what if w is not None]))  # noqa: E731
        module.register_forward_pre_hook(lambda m, args, note=note: note(args))
        module.register_forward_hook(lambda m, args, out, note=note: note(args, out))
        module.register_full_backward_pre_hook(lambda m, dy, note=note: note(dy))
        module.register_full_backward_hook(lambda m, dx, dy, note=note: note(dx, dy))
        x = draw(module).requires_grad_()
        sum(t.sum() for t in tensors(module(x))).backward()
        logs.append([*log, x.grad])
    assert len(logs[0]) > 6
    assert same(logs[1], logs[0])


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_fire_once_per_call_on_every_way(kind: str) -> None:
    module, calls = twins(kind)[1], []
    x = draw(module)
    module.register_forward_hook(lambda m, args, kwargs, out: calls.append(sorted(kwargs)), with_kwargs=True)
    reset = torch.zeros(x.shape[:-1], dtype=torch.bool)
    with fastseq.use("reference"):
        module(x)
    module(x, reset=reset)
    assert calls == [[], ["reset"]]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::torch.jit.TracerWarning")
def test_torchscript_gives_the_same(kind: str) -> None:
    theirs, ours = (nn.Sequential(module) for module in twins(kind))  # torch's are not callable, scripted by themselves
    x = draw(ours[0])
    for made in (torch.jit.script(ours), torch.jit.trace(ours, x), torch.jit.trace(ours[0], x)):
        file = io.BytesIO()
        torch.jit.save(made, file)
        file.seek(0)
        for each in (made, torch.jit.load(file)):
            assert same(tensors(each(x)), tensors(theirs(x)))
            fewer = x[:1] if isinstance(ours[0], nn.RNNCellBase) else x[:, :1]
            assert same(tensors(each(fewer)), tensors(theirs(fewer)))
    scripted = [set(dir(torch.jit.script(module[0]))) for module in (theirs, ours)]
    assert scripted[0] == scripted[1]


class Model(nn.Module):
    def __init__(self, core: nn.Module) -> None:
        super().__init__()
        self.core, self.head = core, nn.Linear(H, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.core(x)
        return self.head(y[0] if isinstance(self.core, (nn.RNNBase, nn.LSTMCell)) else y)


@pytest.mark.parametrize("kind", KINDS)
def test_fx_sees_a_leaf(kind: str) -> None:
    theirs, ours = (Model(module) for module in twins(kind))
    ours.head = theirs.head
    graphs = [torch.fx.symbolic_trace(model) for model in (theirs, ours)]
    nodes = [[(n.op, str(n.target)) for n in graph.graph.nodes] for graph in graphs]
    assert ("call_module", "core") in nodes[0]
    assert nodes[1] == nodes[0]
    assert type(graphs[1].core) is type(ours.core)
    assert torch.equal(graphs[1](draw(ours.core)), theirs(draw(ours.core)))


@pytest.mark.parametrize("kind", KINDS)
def test_functional_call_uses_the_parameters_given(kind: str) -> None:
    theirs, ours = twins(kind)
    given = {k: (torch.randn_like(p) / 2).requires_grad_() for k, p in theirs.named_parameters()}
    x, found = draw(ours), []
    for module in (theirs, ours):
        outputs = tensors(torch.func.functional_call(module, given, x))
        found.append(outputs + list(torch.autograd.grad(sum(o.sum() for o in outputs), given.values())))
    assert same(found[1], found[0])
    assert not same(found[1][:1], feed(ours)[:1])  # nothing of it stays
    with fastseq.use("reference"):
        by_reference = tensors(torch.func.functional_call(ours, given, x))
    torch.testing.assert_close(by_reference, found[0][: len(by_reference)])
    if isinstance(ours, nn.RNNBase):
        outputs = tensors(torch.func.functional_call(ours, given, x, {"recompute": True}))
        gradients = torch.autograd.grad(sum(o.sum() for o in outputs), given.values())
        torch.testing.assert_close([*outputs, *gradients], found[0])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("norm", ["weight_norm", "spectral_norm", "orthogonal", "hook_weight_norm"])
@pytest.mark.filterwarnings("ignore:.*weight_norm.*deprecated:FutureWarning")
def test_parametrised_after_construction(kind: str, norm: str) -> None:
    apply = nn.utils.weight_norm if norm == "hook_weight_norm" else getattr(parametrizations, norm)
    found = []
    for module in twins(kind):
        torch.manual_seed(2)  # spectral_norm starts at random
        apply(module, "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh")
        optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
        steps = []
        for _ in range(3):  # the weight is another tensor every time
            steps += learn(module)
            optimizer.zero_grad()
            sum(t.sum() for t in feed(module)).backward()
            optimizer.step()
        found.append(steps)
    assert same(found[1], found[0])
    expected = feed(module.eval())
    with fastseq.use("reference"):
        torch.testing.assert_close(feed(module), expected)
    if isinstance(module, nn.RNNBase):
        torch.testing.assert_close(feed(module, recompute=True), expected)
    if norm != "hook_weight_norm":
        assert isinstance(module, getattr(fastseq, kind))
        parametrize.remove_parametrizations(module, "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh")
        assert type(module) is getattr(fastseq, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_new_weights_are_used(kind: str) -> None:
    """However they come: another Parameter, other data, changed in place, or shared with another module."""
    found = []
    for module in twins(kind):
        steps, name = [], "weight_hh_l0" if isinstance(module, nn.RNNBase) else "weight_hh"
        torch.manual_seed(4)
        fresh = [torch.randn_like(getattr(module, name)) for _ in range(3)]
        feed(module)
        setattr(module, name, nn.Parameter(fresh[0]))
        steps += learn(module)
        getattr(module, name).data = fresh[1]
        steps += learn(module)
        with torch.no_grad():
            getattr(module, name).copy_(fresh[2])
        steps += learn(module)
        other = copy.deepcopy(module)
        setattr(other, name, getattr(module, name))
        with torch.no_grad():
            getattr(module, name).mul_(0.5)
        found.append(steps + feed(other))
    assert same(found[1], found[0])
    with fastseq.use("reference"):
        torch.testing.assert_close(feed(other), found[1][-len(feed(other)) :])


@pytest.mark.parametrize("kind", KINDS)
def test_function_transforms_are_torchs_and_more(kind: str) -> None:
    """grad, vmap, jvp and hessian give what PyTorch's own give, and a result where those refuse."""

    def attempt(transform: Callable[[Any], Any], module: nn.Module) -> Any:
        return tensors(transform(lambda x: tensors(module(x))[0].sum()))

    theirs, ours = twins(kind)
    x = draw(ours)
    for transform in (
        lambda f: torch.func.grad(f)(x),
        lambda f: torch.func.vmap(f)(torch.stack([x, 2 * x])),
        lambda f: torch.func.jvp(f, (x,), (torch.ones_like(x),)),
        lambda f: torch.autograd.functional.hessian(f, x),
    ):
        got = attempt(transform, ours)
        try:
            expected = attempt(transform, theirs)
        except (RuntimeError, NotImplementedError):
            with fastseq.use("reference"):
                expected = attempt(transform, ours)
        torch.testing.assert_close(got, expected)


def test_packed_output_pads_as_torchs() -> None:
    for layout, batch_first in itertools.product(("sorted", "unsorted"), (False, True)):
        case = Case("gru", bidirectional=True, layout=layout, batch_first=batch_first)
        theirs, ours, drawn = case.build(torch.nn), case.build(fastseq), case.draw()
        expected = case.call(theirs, drawn)[0]
        for implementation, keywords in (("auto", {}), *(case.way(way) for way in WAYS)):
            with fastseq.use(implementation):
                got = case.call(ours, drawn, **keywords)[0]
            assert isinstance(got, PackedSequence)
            pads = [nn.utils.rnn.pad_packed_sequence(p, batch_first) for p in (got, expected)]
            torch.testing.assert_close(pads[0], pads[1])
