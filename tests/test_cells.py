"""The layers that torch.nn lacks, the options of all of them, and cells of a user's own."""

import copy
import pickle
import re
import runpy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn.functional import layer_norm
from torch.testing import assert_close

import fastseq
from fastseq.nn.cells import Recurrent
from fastseq.reference.recurrent import CELLS
from fastseq.testing import check_cell

from .support.budget import assert_within_budget

README = Path(__file__).parents[1] / "README.md"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
T, B, I, H = 4, 3, 3, 5  # noqa: E741  (the field's letter)
NEW = {
    "peephole_lstm": fastseq.PeepholeLSTM,
    "layer_norm_lstm": fastseq.LayerNormLSTM,
    "layer_norm_gru": fastseq.LayerNormGRU,
    "mgu": fastseq.MGU,
    "slstm": fastseq.SLSTM,
}
STOCK = {"rnn": fastseq.RNN, "lstm": fastseq.LSTM, "gru": fastseq.GRU}
OPTIONS: dict[str, dict[str, Any]] = {
    "recurrent_dropout": {"recurrent_dropout": 0.4},
    "weight_drop": {"weight_drop": 0.4},
    "zoneout": {"zoneout": 0.4},
    "learn_initial_state": {"learn_initial_state": True},
}


def flat(outputs: Any) -> list[Tensor]:
    return [outputs] if isinstance(outputs, Tensor) else [t for part in outputs for t in flat(part)]


def double(cls: Any, **options: Any) -> Any:
    return cls(I, H, dtype=torch.double, **options)


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.double)


def by(way: str, rnn: Any, *args: Any, **keywords: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs, and the gradients of the first argument and all parameters, for the same draw and the same loss."""
    x = args[0].detach().requires_grad_()
    torch.manual_seed(7)
    with fastseq.use(way):
        outputs = flat(rnn(x, *args[1:], **keywords))
    into = [torch.linspace(-1, 1, o.numel(), dtype=torch.double).view(o.shape).to(o) for o in outputs]
    return outputs, list(torch.autograd.grad(outputs, [x, *rnn.parameters()], into))


@pytest.mark.parametrize("cell", NEW)
def test_the_laws_hold_on_every_implementation(cell: str) -> None:
    assert NEW[cell].cell == cell
    assert set(check_cell(cell).values()) == {"holds"}


@pytest.mark.parametrize("way", ["torch", "triton"])
@pytest.mark.parametrize("cell", NEW)
def test_half_precision_is_within_budget(cell: str, way: str) -> None:
    rnn = NEW[cell](I, 16, bidirectional=True, dtype=torch.bfloat16, device=DEVICE)
    exact_rnn = NEW[cell](I, 16, bidirectional=True, dtype=torch.double)
    exact_rnn.load_state_dict(rnn.state_dict())
    x = torch.randn(T, B, I, device=DEVICE).bfloat16()
    masks = {"reset": torch.rand(T, B) < 0.3, "lengths": torch.tensor([T, 2, 0])}
    there = {name: mask.to(DEVICE) for name, mask in masks.items()}
    exact = by("reference", exact_rnn, x.double().cpu(), **masks)
    for got, expected, peer in zip(by(way, rnn, x, **there), exact, by("reference", rnn, x, **there), strict=True):
        for index, (g, e, p) in enumerate(zip(got, expected, peer, strict=True)):
            assert_within_budget(g, e, p, f"{cell} {index}")


# ------------------------------------------------------------------------------------- against loops of another hand


def test_layer_norm_lstm_is_a_plain_loop() -> None:
    rnn, x = double(fastseq.LayerNormLSTM, forget_bias=1.0), draw(T, B, I)
    with torch.no_grad():
        for parameter in rnn.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    h = c = torch.zeros(B, H, dtype=torch.double)
    steps = []
    for x_t in x:
        of_x = layer_norm(x_t @ rnn.weight_ih_l0.T, (4 * H,), weight=rnn.gain_x_l0, bias=rnn.bias_l0)
        of_h = layer_norm(h @ rnn.weight_hh_l0.T, (4 * H,), weight=rnn.gain_h_l0)
        i, f, g, o = (of_x + of_h).split(H, dim=1)
        c = c * f.sigmoid() + g.tanh() * i.sigmoid()
        h = o.sigmoid() * torch.tanh(layer_norm(c, (H,), weight=rnn.gain_c_l0, bias=rnn.bias_c_l0))
        steps.append(h)
    y, final = rnn(x)
    assert_close(y, torch.stack(steps))
    assert_close(final, (h[None], c[None]))
    assert_close(
        torch.autograd.grad(y.cos().sum(), list(rnn.parameters())),
        torch.autograd.grad(torch.stack(steps).cos().sum(), list(rnn.parameters())),
    )


def stock_step(kind: str, rnn: Any, x: Tensor, h: Tensor, c: Tensor, entering: Tensor) -> tuple[Tensor, Tensor]:
    """torch's own cell of one step, with something else than h in the recurrent product."""
    weights = rnn.weight_ih_l0, rnn.weight_hh_l0, rnn.bias_ih_l0, rnn.bias_hh_l0
    if kind == "lstm":
        return torch.lstm_cell(x, (entering, c), *weights)
    if kind == "rnn":
        return torch.rnn_tanh_cell(x, entering, *weights), c
    new = torch.gru_cell(x, entering, *weights)  # reads h beside the product: put back what it should have read
    z = ((weights[0] @ x.T).T + weights[2] + (weights[1] @ entering.T).T + weights[3])[:, H : 2 * H].sigmoid()
    return new + z * (h - entering), c


@pytest.mark.parametrize("way", ["torch", "reference"])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", STOCK)
def test_zoneout_and_recurrent_dropout_are_a_plain_loop(kind: str, training: bool, way: str) -> None:
    pair = (0.3, 0.6) if kind == "lstm" else 0.3
    rnn = double(STOCK[kind], recurrent_dropout=0.5, zoneout=pair).train(training)
    x, state, share = draw(T, B, I), [draw(B, H), draw(B, H)], (0.3, 0.6)
    torch.manual_seed(7)
    factor: Any = 1.0
    if training:
        factor = torch.empty(1, B, H, dtype=torch.bool).bernoulli_(0.5)[0].double() / 0.5
        masks = [torch.empty(T, B, 1, 1, H, dtype=torch.bool).bernoulli_(p)[:, :, 0, 0] for p in share]
    steps = []
    h, c = state
    for t in range(T):
        new = stock_step(kind, rnn, x[t], h, c, h * factor)
        if training:
            h, c = (torch.where(m[t], old, n) for m, old, n in zip(masks, (h, c), new, strict=True))
        else:
            h, c = (p * old + (1 - p) * n for p, old, n in zip(share, (h, c), new, strict=True))
        steps.append(h)
    hx = (state[0][None], state[1][None]) if kind == "lstm" else state[0][None]
    torch.manual_seed(7)
    with fastseq.use(way):
        y, _ = rnn(x, hx)
    assert_close(y, torch.stack(steps), rtol=1e-6, atol=1e-6)  # the shares are float32 numbers


# --------------------------------------------------------------------------------------------------------- the options


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("cell", [*STOCK, "slstm", "layer_norm_gru"])
def test_options_are_the_same_on_every_implementation(cell: str, option: str) -> None:
    masks = {"reset": torch.rand(T, B) < 0.3, "lengths": torch.tensor([T, 2, 0])}
    rnn = ({**STOCK, **NEW}[cell])(I, H, bidirectional=True, num_layers=2, **OPTIONS[option]).bfloat16()
    exact_rnn, x = copy.deepcopy(rnn).double(), torch.randn(T, B, I).bfloat16()
    exact = by("reference", exact_rnn, x.double(), **masks)
    assert_close(by("torch", exact_rnn, x.double(), **masks), exact)
    if option in ("recurrent_dropout", "zoneout"):  # what kernels are told
        peer = by("reference", rnn.to(DEVICE), x.to(DEVICE), **masks)
        got = by("triton", rnn, x.to(DEVICE), **{name: mask.to(DEVICE) for name, mask in masks.items()})
        for g, e, p in zip([*got[0], *got[1]], [*exact[0], *exact[1]], [*peer[0], *peer[1]], strict=True):
            assert_within_budget(g, e, p, f"{cell} {option}")


@pytest.mark.parametrize("option", OPTIONS)
def test_options_act_in_training_alone_or_always(option: str) -> None:
    rnn, x = double(fastseq.LSTM, **OPTIONS[option]), draw(T, B, I)
    plain = double(fastseq.LSTM)
    plain.load_state_dict(rnn.state_dict(), strict=option != "learn_initial_state")
    random = option != "learn_initial_state"
    assert torch.equal(rnn(x)[0], rnn(x)[0]) != random
    assert torch.equal(rnn.eval()(x)[0], rnn(x)[0])
    assert torch.equal(rnn(x)[0], plain(x)[0]) == (option != "zoneout"), "zoneout blends in evaluation"


def test_recurrent_dropout_drops_the_same_units_at_every_step() -> None:
    rnn = double(fastseq.RNN, recurrent_dropout=0.5, bias=False)
    with torch.no_grad():
        rnn.weight_hh_l0.copy_(torch.eye(H))
        rnn.weight_ih_l0.zero_()
    y = rnn(torch.zeros(T, B, I).double(), torch.full((1, B, H), 0.5).double())[0]
    silent = y == 0
    assert 0 < silent.sum() < silent.numel()
    assert torch.equal(silent, silent[:1].expand_as(silent))


def test_weight_drop_is_dropout_of_the_weight() -> None:
    rnn, x = double(fastseq.GRU, weight_drop=0.5), draw(T, B, I)
    dropped = double(fastseq.GRU)
    dropped.load_state_dict(rnn.state_dict())
    torch.manual_seed(3)
    y, _ = rnn(x)
    torch.manual_seed(3)
    with torch.no_grad():
        dropped.weight_hh_l0.copy_(torch.nn.functional.dropout(rnn.weight_hh_l0, 0.5))
    assert torch.equal(y, dropped(x)[0])


@pytest.mark.parametrize("cell", [*STOCK, *NEW])
def test_learned_initial_states_stand_for_hx(cell: str) -> None:
    rnn = double({**STOCK, **NEW}[cell], learn_initial_state=True, num_layers=2)
    x = draw(T, B, I)
    rnn(x)[0].sum().backward()
    for state in rnn.initial_state:
        assert state.shape == (2, H)
    assert all(s.grad.any() for s in list(rnn.initial_state)[: 3 if cell == "slstm" else 4])
    with torch.no_grad():
        for state in rnn.initial_state:
            state.uniform_(0.5, 1.0)
    given = tuple(s.detach()[:, None].expand(-1, B, -1).contiguous() for s in rnn.initial_state)
    y, _ = rnn(x)
    assert_close(rnn(x, given if len(given) > 1 else given[0])[0], y)
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, torch.tensor([2, T, 1]), enforce_sorted=False)
    padded = torch.nn.utils.rnn.pad_packed_sequence(rnn(packed)[0])[0]
    assert_close(padded, rnn(x, lengths=torch.tensor([2, T, 1]))[0])
    rnn.reset_parameters()
    assert all(not s.any() for s in list(rnn.initial_state)[:2])


@pytest.mark.parametrize(
    ("cls", "name"),
    [(fastseq.LSTM, "bias_ih"), (fastseq.PeepholeLSTM, "bias_ih"), (fastseq.LayerNormLSTM, "bias"),
     (fastseq.SLSTM, "bias_ih")],
)  # fmt: skip
def test_forget_bias_is_where_the_forget_gate_starts(cls: Any, name: str) -> None:
    rnn = cls(I, H, bidirectional=True, forget_bias=2.0)
    rows = slice(H, 2 * H)
    for suffix in ("l0", "l0_reverse"):
        assert (getattr(rnn, f"{name}_{suffix}")[rows] == 2.0).all()
        if name == "bias_ih":
            assert (getattr(rnn, f"bias_hh_{suffix}")[rows] == 0.0).all()
            assert getattr(rnn, f"bias_hh_{suffix}")[:H].any()


@pytest.mark.parametrize(
    ("cls", "options", "message"),
    [
        (fastseq.GRU, {"forget_bias": 1.0}, "GRU has no forget gate"),
        (fastseq.MGU, {"forget_bias": 1.0}, "MGU has no forget gate"),
        (fastseq.LSTM, {"forget_bias": 1.0, "bias": False}, "bias=True"),
        (fastseq.LSTM, {"zoneout": 1.5}, r"zoneout\[0\]: .* got 1.5"),
        (fastseq.LSTM, {"zoneout": (0.1, 0.2, 0.3)}, "one for the cells"),
        (fastseq.GRU, {"zoneout": (0.1, 0.2)}, "GRU has no cell"),
        (fastseq.LSTM, {"weight_drop": -0.1}, "weight_drop: expected a probability"),
        (fastseq.LSTM, {"proj_size": 2, "zoneout": 0.1}, "proj_size"),
        (fastseq.LayerNormLSTM, {"bias": False}, "LayerNormLSTM .* bias=False"),
    ],
)
def test_an_option_that_cannot_be_is_refused(cls: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cls(I, H, **options)


def test_options_are_seen_and_stay() -> None:
    rnn = fastseq.LSTM(I, H, zoneout=(0.1, 0.2), weight_drop=0.5)
    assert "weight_drop=0.5, zoneout=(0.1, 0.2)" in repr(rnn)
    assert repr(fastseq.LSTM(I, H)) == repr(torch.nn.LSTM(I, H))
    assert "torch.nn has no weight_drop, zoneout" in str(fastseq.restore(rnn))
    assert (
        fastseq.explain(rnn, torch.randn(T, B, I)).reason
        != fastseq.explain(fastseq.LSTM(I, H), torch.randn(T, B, I)).reason
    )
    swapped = torch.nn.LSTM(I, H)
    fastseq.swap(swapped)
    assert repr(swapped) == repr(torch.nn.LSTM(I, H))


# ------------------------------------------------------------------------------------------------ modules as objects


@pytest.mark.parametrize("cell", NEW)
def test_layers_are_good_modules(cell: str) -> None:
    rnn = NEW[cell](I, H, num_layers=2, bidirectional=True, batch_first=True, dropout=0.1, zoneout=0.1).eval()
    x = torch.randn(B, T, I)
    y, final = rnn(x)
    states = flat(final)
    assert y.shape == (B, T, 2 * H)
    assert [s.shape for s in states] == [(4, B, H)] * (1 + CELLS[cell].cells)
    for other in (copy.deepcopy(rnn), pickle.loads(pickle.dumps(rnn))):
        assert_close(other(x), (y, final))
    fresh = NEW[cell](I, H, num_layers=2, bidirectional=True, batch_first=True, zoneout=0.1).eval()
    fresh.load_state_dict(rnn.state_dict())
    assert_close(fresh(x), (y, final))
    assert not rnn(x, final)[0].equal(y)
    alone, final_alone = rnn(x[0])
    assert_close([alone, *flat(final_alone)], [y[0], *(s[:, 0] for s in states)])
    assert repr(rnn).startswith(f"{NEW[cell].__name__}({I}, {H}, num_layers=2, batch_first=True")
    names = {"weight_ih", "weight_hh", *CELLS[cell].parameters}
    names |= set() if cell.startswith("layer_norm") else {"bias_ih", "bias_hh"}
    assert set(rnn.state_dict()) == {f"{n}_l{k}{d}" for n in names for k in range(2) for d in ("", "_reverse")}
    assert rnn.double()(x.double())[0].dtype == torch.double
    assert fastseq.explain(rnn, x).name == "torch"


@pytest.mark.parametrize("cell", NEW)
def test_packed_and_every_cell(cell: str) -> None:
    rnn = double(NEW[cell], bidirectional=True)
    x, lengths, reset = draw(T, B, I), torch.tensor([2, T, 1]), torch.rand(T, B) < 0.3
    packed = torch.nn.utils.rnn.pack_padded_sequence(x, lengths, enforce_sorted=False)
    y, final, cells = rnn(x, lengths=lengths, reset=reset, return_cells=True)
    got, got_final, got_cells = rnn(packed, reset=reset, return_cells=True)
    unpack = torch.nn.utils.rnn.pad_packed_sequence
    assert_close(unpack(got)[0], y)
    assert_close(flat(got_final), flat(final))
    several = isinstance(cells, tuple)
    for packed_cells, each in zip(got_cells if several else [got_cells], flat(cells), strict=True):
        assert_close(unpack(packed_cells)[0], each)
    whole = rnn(x, return_cells=True)
    for last, every in zip(flat(whole[1])[1:], flat(whole[2]), strict=False):
        assert_close(every[-1, :, :H], last[0])
        assert_close(every[0, :, H:], last[1])


@pytest.mark.parametrize("cell", ["layer_norm_gru", "slstm"])
def test_one_graph(cell: str) -> None:
    torch._dynamo.reset()
    rnn = double(NEW[cell], recurrent_dropout=0.3, zoneout=0.3, weight_drop=0.3)
    compiled = torch.compile(rnn, fullgraph=True, backend="aot_eager", dynamic=True)
    for steps, batch in ((5, 4), (7, 6)):
        x = draw(steps, batch, I).requires_grad_()
        rnn.train()
        compiled(x, reset=torch.rand(steps, batch) < 0.3)[0].sum().backward()
        rnn.eval()
        assert_close(compiled(x), rnn(x))
    with fastseq.use("triton" if DEVICE == "cuda" else "torch"):
        compiled(draw(5, 4, I))


@pytest.mark.parametrize("cell", NEW)
def test_a_batch_of_nobody(cell: str) -> None:
    rnn = double(NEW[cell], bidirectional=True)
    y, final, cells = rnn(draw(T, 0, I), return_cells=True)
    torch.stack([t.sum() for t in flat((y, final, cells))]).sum().backward()
    assert y.shape == (T, 0, 2 * H)
    assert all(p.grad is not None and not p.grad.any() for p in rnn.parameters())


def test_wrong_states_are_refused() -> None:
    x = torch.randn(T, B, I)
    h = torch.zeros(1, B, H)
    with pytest.raises(TypeError, match="a tuple of 4 tensors"):
        fastseq.SLSTM(I, H)(x, (h, h))
    with pytest.raises(TypeError, match="a tensor h, got 2 tensors"):
        fastseq.MGU(I, H)(x, (h, h))
    with pytest.raises(RuntimeError, match=r"hx\[1\]"):
        fastseq.PeepholeLSTM(I, H)(x, (h, torch.zeros(1, B, H + 1)))


# ---------------------------------------------------------------------------------------------- a cell of one's own


def leaky(x: Tensor, h: Tensor, state: tuple[Tensor, ...], params: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A leaky integrator whose rate each unit learns."""
    rate = params[0].sigmoid()
    return ((1 - rate) * state[0] + rate * torch.tanh(x + h),)


@triton.jit
def leaky_forward(x, h, state, params, H: tl.constexpr):
    rate = 1.0 / (1.0 + tl.exp(-params[0]))
    new = 2.0 / (1.0 + tl.exp(-2.0 * (x[0] + h[0]))) - 1.0
    return (new,), ((1.0 - rate) * state[0] + rate * new,)


@triton.jit
def leaky_backward(saved, kept, dstate, params, H: tl.constexpr):
    rate = 1.0 / (1.0 + tl.exp(-params[0]))
    dgate = dstate[0] * rate * (1.0 - saved[0] * saved[0])
    drate = dstate[0] * (saved[0] - kept[0]) * rate * (1.0 - rate)
    return (dgate,), (dgate,), (dstate[0] * (1.0 - rate),), (drate,)


@triton.jit
def forgetful_backward(saved, kept, dstate, params, H: tl.constexpr):
    rate = 1.0 / (1.0 + tl.exp(-params[0]))
    dgate = dstate[0] * rate * (1.0 - saved[0] * saved[0])
    return (dgate,), (dgate,), (tl.zeros_like(dgate),), (tl.zeros_like(dgate),)


KERNEL: dict[str, Any] = {"forward": leaky_forward, "backward": leaky_backward, "saved": 1, "reads_h": True}
Leaky = fastseq.cell("Leaky", leaky, gates=1, parameters={"rate": (1, None)}, kernel=KERNEL)


def test_a_cell_of_ones_own_is_a_layer_like_all() -> None:
    assert set(check_cell("Leaky").values()) == {"holds"}
    rnn: Any = Leaky(I, H, num_layers=2, zoneout=0.2, learn_initial_state=True)
    assert rnn.rate_l0.shape == (H,)
    assert rnn.rate_l0.any(), "drawn like the weights"
    assert Leaky.__doc__ == leaky.__doc__
    assert_close(pickle.loads(pickle.dumps(rnn.eval()))(torch.ones(T, B, I)), rnn(torch.ones(T, B, I)))
    with fastseq.use("triton"):
        assert fastseq.explain(rnn, torch.ones(T, B, I, device=DEVICE)).name == "triton"
        with pytest.raises(fastseq.Unsupported, match="no kernel for the cell 'Plain'"):
            fastseq.cell("Plain", leaky, gates=1, parameters={"rate": (1, None)})(I, H)(torch.ones(T, B, I))
    assert "no kernel" in check_cell("Plain")["kernel"]


def doubled(x: Tensor, h: Tensor, state: tuple[Tensor, ...], params: Any) -> tuple[Tensor, ...]:
    return (torch.cat((x, h), dim=1),)


def blind(x: Tensor, h: Tensor, state: tuple[Tensor, ...], params: Any) -> tuple[Tensor, ...]:
    return (torch.tanh(x + h) * state[0].detach(),)


def mixed(x: Tensor, h: Tensor, state: tuple[Tensor, ...], params: Any) -> tuple[Tensor, ...]:
    return (torch.tanh(x + h - x.mean(0)),)


@pytest.mark.parametrize(
    ("step", "message"),
    [(blind, "gradient is not the derivative"), (mixed, "row of the batch depends on the others")],
)
def test_check_cell_finds_a_wrong_step(step: Callable[..., Any], message: str) -> None:
    made = fastseq.cell(step.__name__, step, gates=1, splits=True)
    with pytest.raises(AssertionError, match=message):
        check_cell(made)


def test_check_cell_finds_a_wrong_derivative() -> None:
    kernel = {**KERNEL, "backward": forgetful_backward}
    made = fastseq.cell("Forgetful", leaky, gates=1, parameters={"rate": (1, None)}, kernel=kernel)
    with pytest.raises(AssertionError, match=r"Forgetful: the gradient of .* by the kernel is off by"):
        check_cell(made)


@pytest.mark.parametrize(
    ("step", "options", "error", "message"),
    [
        (leaky, {"name": "lstm"}, ValueError, "there is a cell 'lstm' already"),
        (leaky, {"name": "Leaky"}, ValueError, "there is a cell 'Leaky' already"),
        (leaky, {"name": "two words"}, ValueError, "two words"),
        (leaky, {"gates": 0}, ValueError, "at least one gate"),
        (leaky, {"parameters": {"weight_hh": (1, None)}}, ValueError, "weight_hh"),
        (leaky, {"cells": 1}, ValueError, r"expected 2 states \[B, H\]"),
        (doubled, {}, ValueError, r"got \(torch.float64 \[2, 6\]\)"),
        (lambda x, h, s, p: s[0], {}, TypeError, "expected a tuple of 1 tensors"),
        (lambda x, h, s, p: (x * h,), {}, ValueError, "splits=True"),
        (leaky, {"kernel": {"forward": leaky_forward}}, ValueError, "expected forward, backward, saved"),
        (leaky, {"kernel": {**KERNEL, "backward": leaky}}, TypeError, "under triton.jit as backward, got function"),
    ],
)
def test_a_wrong_cell_is_refused(step: Any, options: dict[str, Any], error: Any, message: str) -> None:
    given = {"name": "Refused", "gates": 1, "parameters": {"rate": (1, None)}} | options
    with pytest.raises(error, match=message):
        fastseq.cell(given.pop("name"), step, **given)
    assert "Refused" not in CELLS


def test_readme_s_own_cell_runs_fused(tmp_path: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    (block,) = (b for b in blocks if "fastseq.cell(" in b)
    assert len(block.strip().splitlines()) < 40
    file = tmp_path / "block.py"
    file.write_text(block)
    made = runpy.run_path(str(file))["JANET"]
    assert issubclass(made, Recurrent)
    assert set(check_cell(made).values()) == {"holds"}
    with fastseq.use("triton"):
        assert made(I, H, device=DEVICE)(torch.randn(T, B, I, device=DEVICE))[0].shape == (T, B, H)
