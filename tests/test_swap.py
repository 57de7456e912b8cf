"""The laws of swap and restore: nothing about a model changes but the class of some of its modules."""

import copy
import importlib
import io
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize, prune, weight_norm

import fastseq
from fastseq.nn import REPLACEMENTS

T, B, I, H = 5, 3, 4, 6  # noqa: E741  (the field's letters)

BUILDERS: dict[str, Callable[[], nn.Module]] = {
    "rnn_tanh": lambda: nn.RNN(I, H),
    "rnn_relu": lambda: nn.RNN(I, H, nonlinearity="relu", bias=False),
    "lstm": lambda: nn.LSTM(I, H),
    "lstm_deep": lambda: nn.LSTM(I, H, num_layers=2, batch_first=True, dropout=0.5, bidirectional=True),
    "lstm_projection": lambda: nn.LSTM(I, H, proj_size=2),
    "gru": lambda: nn.GRU(I, H, num_layers=2),
    "rnn_cell": lambda: nn.RNNCell(I, H),
    "lstm_cell": lambda: nn.LSTMCell(I, H),
    "gru_cell": lambda: nn.GRUCell(I, H),
}


# Of the attention modules, which compute the same numbers but not bit for bit, tests/test_modules_attention.py and
# tests/test_transformer.py tell the laws of a swap.
RECURRENT = {kind: ours for kind, ours in REPLACEMENTS.items() if issubclass(kind, (nn.RNNBase, nn.RNNCellBase))}


class MyLSTM(nn.LSTM):
    """What users write: a subclass that computes something of its own."""

    def forward(self, x: Tensor, hx: Any = None) -> Any:
        y, state = super().forward(x, hx)
        return y + 1, state


@pytest.fixture(autouse=True)
def _one_thread_one_seed() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(params=BUILDERS)
def module(request: pytest.FixtureRequest) -> nn.Module:
    return BUILDERS[request.param]()


def example_input(module: nn.Module, **options: Any) -> Tensor:
    return torch.randn(*((B, I) if isinstance(module, nn.RNNCellBase) else (T, B, I)), **options)


def tensors(tree: Any) -> list[Tensor]:
    return [tree] if isinstance(tree, Tensor) else [leaf for part in tree for leaf in tensors(part)]


def run(module: nn.Module, x: Tensor) -> list[Tensor]:
    """All outputs, then the gradients of their squares' sum with respect to the input and every parameter."""
    x = x.clone().requires_grad_()
    torch.manual_seed(1)  # dropout
    outputs = tensors(module(x))
    wanted = [x, *(p for p in module.parameters() if p.requires_grad)]
    return outputs + list(torch.autograd.grad(sum(y.square().sum() for y in outputs), wanted))


def assert_same(got: list[Tensor], expected: list[Tensor]) -> None:
    assert len(got) == len(expected)
    for index, (a, b) in enumerate(zip(got, expected, strict=True)):
        assert a.dtype == b.dtype
        assert torch.equal(a, b), f"tensor {index} differs by {(a - b).abs().max()}"


def assert_swap_is_invisible(build: Callable[[], nn.Module]) -> None:
    """Run the model that ``build`` makes before the swap, after it and after restore."""
    torch.manual_seed(2)
    model = build()
    x = example_input(model)
    expected = run(model, x)
    assert fastseq.swap(model)
    assert_same(run(model, x), expected)
    if not getattr(model, "dropout", 0):  # the path that does not go through torch.nn's own forward
        with fastseq.use("reference"):
            torch.testing.assert_close(run(model, x), expected)
    assert fastseq.restore(model)
    assert_same(run(model, x), expected)


# What stays the same


@pytest.mark.parametrize("case", BUILDERS)
def test_outputs_and_gradients_stay_bitwise_equal(case: str) -> None:
    assert_swap_is_invisible(BUILDERS[case])


def test_class_is_the_only_change(module: nn.Module) -> None:
    module.eval()
    next(module.parameters()).requires_grad_(False)
    before, text, state = dict(vars(module)), repr(module), [(k, id(p)) for k, p in module.named_parameters()]
    kind = type(module)
    report = fastseq.swap(module)
    assert type(module) is REPLACEMENTS[kind]
    assert isinstance(module, kind)
    assert report.swapped == (("", kind, REPLACEMENTS[kind]),)
    assert vars(module).keys() == before.keys()
    assert all(vars(module)[key] is value for key, value in before.items())
    assert [(k, id(p)) for k, p in module.named_parameters()] == state
    assert repr(module) == text


@pytest.mark.parametrize("kind", RECURRENT, ids=lambda kind: kind.__name__)
def test_replacement_adds_no_instance_state(kind: type[nn.Module]) -> None:
    ours = REPLACEMENTS[kind]
    assert issubclass(ours, kind)
    assert vars(ours(I, H)).keys() == vars(kind(I, H)).keys()


def test_every_type_is_tested() -> None:
    assert {type(build()) for build in BUILDERS.values()} == set(RECURRENT)


@pytest.mark.parametrize("options", [{"dtype": torch.float64}, {"dtype": torch.bfloat16}, {"device": "meta"}])
def test_dtype_and_device_stay(module: nn.Module, options: dict[str, Any]) -> None:
    module.to(**options)
    x = example_input(module, **options)
    with torch.no_grad():
        expected = tensors(module.eval()(x))
        assert fastseq.swap(module)
        got = tensors(module(x))
    assert [(y.dtype, y.device, y.shape) for y in got] == [(y.dtype, y.device, y.shape) for y in expected]
    if x.device.type != "meta":
        assert_same(got, expected)


def test_state_dict_loads_both_ways(module: nn.Module) -> None:
    swapped = copy.deepcopy(module)
    fastseq.swap(swapped)
    ours, theirs = swapped.state_dict(), module.state_dict()
    assert list(ours) == list(theirs)
    assert ours._metadata == theirs._metadata  # type: ignore[attr-defined]
    for source, target in ((module, swapped), (swapped, module)):
        with torch.no_grad():
            next(source.parameters()).add_(1)
        target.load_state_dict(source.state_dict())
        x = example_input(module)
        assert_same(run(target, x), run(source, x))


def test_hooks_still_fire() -> None:
    def events_of(swap: bool) -> list[str]:
        events: list[str] = []
        model = nn.Sequential(nn.GRU(I, H))
        gru = model[0]

        def note(name: str) -> Callable[..., None]:
            return lambda *_args, **_keywords: events.append(name)

        gru.register_forward_pre_hook(note("forward pre"), with_kwargs=True)
        gru.register_forward_hook(note("forward"))
        gru.register_full_backward_pre_hook(note("backward pre"))
        gru.register_full_backward_hook(note("backward"))
        gru.register_state_dict_pre_hook(note("state_dict pre"))
        gru.register_state_dict_post_hook(note("state_dict post"))
        gru.register_load_state_dict_pre_hook(note("load pre"))
        gru.register_load_state_dict_post_hook(note("load post"))
        gru.weight_hh_l0.register_hook(note("parameter"))
        if swap:
            assert fastseq.swap(model)
        y, _ = model(torch.randn(T, B, I, requires_grad=True))
        y.sum().backward()
        model.load_state_dict(model.state_dict())
        return events

    assert events_of(swap=True) == events_of(swap=False)
    assert len(events_of(swap=True)) == 9


def test_tied_parameters_stay_tied() -> None:
    def build() -> nn.Module:
        model = nn.ModuleList([nn.LSTM(H, H), nn.LSTM(H, H)])
        model[1].weight_hh_l0 = model[0].weight_hh_l0
        return model

    theirs, ours = build(), build()
    ours.load_state_dict(theirs.state_dict())
    assert len(fastseq.swap(ours)) == 2
    assert ours[1].weight_hh_l0 is ours[0].weight_hh_l0
    x = torch.randn(T, B, H)
    gradients = []
    for model in (ours, theirs):
        model[1](model[0](x)[0])[0].sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert_same(*gradients)


def test_optimizer_made_before_the_swap_goes_on() -> None:
    weights = []
    x, target = torch.randn(T, B, I), torch.randn(T, B, H)
    for change in (None, fastseq.swap):
        torch.manual_seed(3)
        model = nn.LSTM(I, H)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.1)
        for step in range(4):
            if step == 2 and change is not None:
                assert change(model)
            optimizer.zero_grad()
            (model(x)[0] - target).square().mean().backward()
            optimizer.step()
        weights.append([p.detach() for p in model.parameters()])
    assert_same(*weights)


def test_copies_and_pickles_after_the_swap(module: nn.Module) -> None:
    fastseq.swap(module)
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    x = example_input(module)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(file, weights_only=False),
    ]
    for again in copies:
        assert type(again) is type(module)
        assert_same(run(again, x), run(module, x))


# Weights that are computed before every forward: the type stays torch's, so these modules are swapped


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("case", BUILDERS)
def test_hook_based_weight_norm_survives(case: str) -> None:
    name = "weight_hh" if case.endswith("cell") else "weight_hh_l0"
    assert_swap_is_invisible(lambda: weight_norm(BUILDERS[case](), name))


def test_pruning_survives() -> None:
    def build() -> nn.Module:
        return prune.l1_unstructured(nn.LSTM(I, H), "weight_hh_l0", amount=0.5)

    assert_swap_is_invisible(build)


def test_weight_set_from_outside_is_used() -> None:
    """AWD-LSTM's weight dropout: the parameter is moved away and a tensor is assigned before each call."""
    theirs, ours = nn.LSTM(I, H), nn.LSTM(I, H)
    ours.load_state_dict(theirs.state_dict())
    fastseq.swap(ours)
    x = torch.randn(T, B, I)
    for model in (theirs, ours):
        weight = model.weight_hh_l0
        del model._parameters["weight_hh_l0"]
        model.raw = weight
        model.weight_hh_l0 = weight * 0.5
    assert_same(run(ours, x), run(theirs, x))
    assert ours.weight_hh_l0.is_leaf is False


# Which modules are concerned


def test_modules_are_found_wherever_they_are_registered() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.towers = nn.ModuleDict({"left": nn.ModuleList([nn.Linear(I, I), nn.GRU(I, H)])})
            self.stack = nn.Sequential(nn.Sequential(nn.LSTMCell(I, H)))
            self.rnn = nn.RNN(I, H)
            self.again = self.rnn

    model = Model()
    report = fastseq.swap(model)
    assert [entry.name for entry in report.swapped] == ["towers.left.1", "stack.0.0", "rnn"]
    assert model.again is model.rnn
    assert type(model.again) is fastseq.RNN
    assert len(report) == 3
    assert report.kept == ()


def test_swap_is_idempotent() -> None:
    model = nn.Sequential(nn.LSTM(I, H), nn.GRUCell(I, H))
    assert len(fastseq.swap(model)) == 2
    again = fastseq.swap(model)
    assert not again
    assert again.kept == (
        ("0", fastseq.LSTM, "already fastseq's"),
        ("1", fastseq.GRUCell, "already fastseq's"),
    )


def test_restore_undoes_and_is_idempotent(module: nn.Module) -> None:
    kind = type(module)
    fastseq.swap(module)
    assert fastseq.restore(module).swapped == (("", REPLACEMENTS[kind], kind),)
    assert type(module) is kind
    assert fastseq.restore(module).kept == (("", kind, "already torch's"),)


def test_restore_takes_modules_that_were_built_as_ours() -> None:
    model = fastseq.LSTM(I, H)
    x = torch.randn(T, B, I)
    expected = run(model, x)
    assert fastseq.restore(model)
    assert type(model) is nn.LSTM
    assert_same(run(model, x), expected)


def test_model_with_nothing_to_swap_gives_an_empty_report() -> None:
    report = fastseq.swap(nn.Sequential(nn.Linear(8, 2), nn.ReLU()))
    assert not report
    assert report.kept == ()
    names = ", ".join(kind.__name__ for kind in REPLACEMENTS)
    assert names.startswith("RNN, LSTM, GRU, RNNCell, LSTMCell, GRUCell, MultiheadAttention, TransformerEncoderLayer")
    assert str(report) == f"nothing to swap: no {names}"


def test_report_reads_as_a_table() -> None:
    model = nn.ModuleDict({"encoder": nn.LSTM(I, H), "head": nn.Linear(H, 2), "own": MyLSTM(I, H)})
    lines = str(fastseq.swap(model)).splitlines()
    width = len(f"{MyLSTM.__module__}.MyLSTM")
    assert lines == [
        f"encoder  {'torch.nn.LSTM':{width}}  -> fastseq.LSTM",
        f"own      {MyLSTM.__module__}.MyLSTM  kept: a subclass of torch.nn.LSTM, which may compute something else",
        "1 swapped, 1 kept",
    ]
    root = "(the model)  torch.nn.GRU  -> fastseq.GRU\n1 swapped, 0 kept"
    assert str(fastseq.swap(nn.GRU(I, H))) == root


# What is left alone, and why


def reason(model: nn.Module) -> str:
    """The only entry of the report on a model in which nothing can be swapped."""
    kinds = [type(module) for module in model.modules()]
    report = fastseq.swap(model)
    assert not report
    assert [type(module) for module in model.modules()] == kinds
    (entry,) = report.kept
    return entry.reason


def test_subclass_is_left_alone() -> None:
    class Ours(fastseq.GRU):
        pass

    assert "subclass of torch.nn.LSTM" in reason(nn.Sequential(MyLSTM(I, H)))
    assert "subclass of fastseq.GRU" in reason(Ours(I, H))
    assert not fastseq.restore(Ours(I, H))


@pytest.mark.parametrize(("case", "name"), [("lstm", "weight_hh_l0"), ("gru_cell", "weight_hh")])
def test_parametrised_is_left_alone_but_swapped_can_be_parametrised(case: str, name: str) -> None:
    module = BUILDERS[case]()
    plain = copy.deepcopy(module)
    parametrizations.weight_norm(module, name)
    assert "torch.nn.utils.parametrize" in reason(module)
    fastseq.swap(plain)
    ours = type(plain)
    parametrizations.weight_norm(plain, name)
    x = example_input(module)
    for model in (module, plain):
        with torch.no_grad():
            model.parametrizations[name].original0.mul_(2)
    assert_same(run(plain, x), run(module, x))
    assert not fastseq.restore(plain)
    parametrize.remove_parametrizations(plain, name)
    assert type(plain) is ours


def test_forward_replaced_on_the_instance_is_left_alone() -> None:
    model = nn.LSTM(I, H)
    model.forward = model.forward  # what accelerate's hooks leave behind
    assert "forward" in reason(model)
    ours = fastseq.LSTM(I, H)
    ours.forward = ours.forward  # the old function needs the class it was written for
    assert "forward" in fastseq.restore(ours).kept[0].reason
    assert type(ours) is fastseq.LSTM


@pytest.mark.filterwarnings("ignore")
def test_torchscript_is_left_alone() -> None:
    assert "TorchScript" in reason(torch.jit.script(nn.Sequential(nn.LSTM(I, H))))
    assert "TorchScript" in reason(torch.jit.trace(nn.GRU(I, H), torch.randn(T, B, I)))


@pytest.mark.filterwarnings("ignore")
def test_restored_suits_tools_that_go_by_the_exact_type() -> None:
    model = nn.Sequential(nn.LSTM(I, H))
    x = torch.randn(T, B, I)
    expected, _ = model(x)
    fastseq.swap(model)
    fastseq.restore(model)
    assert torch.equal(torch.jit.script(model)(x)[0], expected)
    assert torch.equal(torch.fx.symbolic_trace(model)(x)[0], expected)


@pytest.mark.filterwarnings("ignore")
def test_quantised_is_left_alone() -> None:
    if "fbgemm" not in torch.backends.quantized.supported_engines:
        pytest.skip("no quantised kernels in this build of torch")
    model = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.LSTM(I, H)), {nn.LSTM})
    assert "quantised" in reason(model)


@pytest.mark.parametrize("change", [fastseq.swap, fastseq.restore])
@pytest.mark.parametrize("model", [nn.LSTM, [nn.LSTM(I, H)], None])
def test_what_is_no_module_is_refused(change: Callable[[Any], Any], model: Any) -> None:
    with pytest.raises(TypeError, match=rf"model: expected a torch.nn.Module, got {type(model).__name__}"):
        change(model)


def test_failure_leaves_the_model_as_it_was() -> None:
    class Broken(nn.Sequential):
        def named_modules(self, *args: Any, **keywords: Any) -> Iterator[tuple[str, nn.Module]]:
            yield from super().named_modules(*args, **keywords)
            raise RuntimeError("broken model")

    model = Broken(nn.LSTM(I, H))
    with pytest.raises(RuntimeError, match="broken model"):
        fastseq.swap(model)
    assert type(model[0]) is nn.LSTM


# In company


@pytest.mark.parametrize("where", ["wrapper", "in place"])
def test_compiled_model_notices_the_swap(monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    class Marked(nn.GRUCell):
        def forward(self, *args: Any) -> Tensor:
            return super().forward(*args) + 100

    # By its full name: the attribute `swap` of the package is the function.
    monkeypatch.setattr(importlib.import_module("fastseq.swap"), "REPLACEMENTS", {nn.GRUCell: Marked})
    torch._dynamo.reset()
    model: nn.Module = nn.Sequential(nn.GRUCell(I, H))
    if where == "wrapper":
        model = torch.compile(model, backend="eager")  # type: ignore[assignment]
    else:
        model.compile(backend="eager")
    x = torch.randn(B, I)
    before = model(x)
    assert len(fastseq.swap(model)) == 1
    torch.testing.assert_close(model(x), before + 100)


@pytest.fixture
def process_group() -> Iterator[None]:
    distributed = torch.distributed
    if not (distributed.is_available() and distributed.is_gloo_available()):
        pytest.skip("this build of torch has no gloo")
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
def test_inside_ddp() -> None:
    model = nn.parallel.DistributedDataParallel(nn.LSTM(I, H))
    x = torch.randn(T, B, I)
    gradients = []
    for changed in (False, True):
        if changed:
            assert [entry.name for entry in fastseq.swap(model).swapped] == ["module"]
        model.zero_grad()
        model(x)[0].square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    assert len(gradients[0]) == 4
    assert_same(*gradients)


@pytest.mark.usefixtures("process_group")
def test_fully_shard_before_is_left_alone_and_after_works() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    mesh = init_device_mesh("cpu", (1,))
    late, early = nn.GRU(I, H), nn.GRU(I, H)
    x = torch.randn(T, B, I)
    expected = early(x)[0]
    fully_shard(late, mesh=mesh)
    assert "torch.distributed" in reason(late)
    fastseq.swap(early)
    fully_shard(early, mesh=mesh)
    assert isinstance(early, FSDPModule)
    assert isinstance(early, fastseq.GRU)
    assert torch.equal(early(x)[0], expected)
