"""The Transformer of 2017 against torch.nn.Transformer on the same weights; decoding, training and resuming."""

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.models import Transformer, TransformerConfig, generate, learning_rate, smoothed_loss

from .support.budget import assert_within_budget

SIZES: dict[str, Any] = {
    "vocab_size": 23, "d_model": 16, "nhead": 2, "num_encoder_layers": 2, "num_decoder_layers": 3,
    "dim_feedforward": 24, "dropout": 0.0,
}  # fmt: skip
S, T = 11, 9


def inputs() -> dict[str, Tensor]:
    mask, decoder_mask = torch.ones(3, S, dtype=torch.bool), torch.ones(3, T, dtype=torch.bool)
    mask[1, 6:], mask[2, :3], decoder_mask[1, 4:] = False, False, False
    return {
        "input_ids": torch.randint(3, 23, (3, S)),
        "decoder_input_ids": torch.randint(3, 23, (3, T)),
        "attention_mask": mask,
        "decoder_attention_mask": decoder_mask,
    }


def by_torch(model: Transformer, dtype: torch.dtype, given: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits and gradients by torch.nn.Transformer of the same weights, positions by the paper's formula."""
    config, names = model.config, dict(model.named_parameters())
    layers = torch.nn.Transformer(
        config.d_model, config.nhead, config.num_encoder_layers, config.num_decoder_layers, config.dim_feedforward,
        0.0, batch_first=True,
    )  # fmt: skip
    layers.load_state_dict(model.layers.state_dict())
    layers.to(dtype).train()  # in evaluation torch takes another path, which cuts padding off
    embedding = names["embedding.weight"].detach().to(dtype).requires_grad_()
    other = names.get("source_embedding.weight")
    source = embedding if other is None else other.detach().to(dtype).requires_grad_()

    def embedded(table: Tensor, ids: Tensor) -> Tensor:
        place = torch.arange(ids.shape[1], dtype=dtype)[:, None]
        angle = place / 10000.0 ** (torch.arange(0, config.d_model, 2, dtype=dtype) / config.d_model)
        return table[ids] * math.sqrt(config.d_model) + torch.stack([angle.sin(), angle.cos()], -1).flatten(1)

    hidden, decoder_hidden = ~given["attention_mask"], ~given["decoder_attention_mask"]
    out = layers(
        embedded(source, given["input_ids"]), embedded(embedding, given["decoder_input_ids"]),
        tgt_mask=torch.ones(T, T, dtype=torch.bool).triu(1), src_key_padding_mask=hidden,
        tgt_key_padding_mask=decoder_hidden, memory_key_padding_mask=hidden,
    )  # fmt: skip
    logits = out @ embedding.T
    logits.sin().sum().backward()
    gradients = {f"layers.{name}": parameter.grad for name, parameter in layers.named_parameters()}
    gradients |= {"embedding.weight": embedding.grad}
    if other is not None:
        gradients["source_embedding.weight"] = source.grad
    return logits.detach(), gradients  # type: ignore[return-value]


@pytest.mark.parametrize("source_vocab_size", [None, 31])
def test_it_is_torch_s_transformer(source_vocab_size: int | None) -> None:
    model, given = Transformer(TransformerConfig(**SIZES, source_vocab_size=source_vocab_size)), inputs()
    for parameter in model.layers.parameters():
        if parameter.dim() == 1:
            parameter.data.uniform_(0.5, 1.5)  # biases that are zero would hide an error
    logits = model(**given)
    logits.sin().sum().backward()
    exact, exact_gradients = by_torch(model, torch.float64, given)
    peer, peer_gradients = by_torch(model, torch.float32, given)
    assert_within_budget(logits.detach(), exact, peer, "logits")
    got = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert got.keys() == exact_gradients.keys()
    for name, gradient in got.items():
        assert gradient is not None
        assert_within_budget(gradient, exact_gradients[name], peer_gradients[name], name)


def test_future_and_padding_are_invisible() -> None:
    model, given = Transformer(TransformerConfig(**SIZES)).eval(), inputs()
    whole = model(**given)
    other = {name: tensor.clone() for name, tensor in given.items()}
    other["decoder_input_ids"][0, 6:] = 5
    other["input_ids"][~given["attention_mask"]] = 7
    changed = model(**other)
    assert torch.equal(changed[0, :6], whole[0, :6])
    assert torch.equal(changed[1, :4], whole[1, :4])
    assert not torch.equal(changed[0, 6:], whole[0, 6:])


def test_decoding_by_cache_is_the_whole_computation() -> None:
    model, given = Transformer(TransformerConfig(**SIZES)).eval(), inputs()
    ids, mask = given["decoder_input_ids"], given["attention_mask"]
    with torch.no_grad():
        memory, cache = model.encode(given["input_ids"], mask), model.new_cache(T)
        whole = model.decode(ids, memory, mask)
        steps = [model.decode(part, memory, mask, cache=cache) for part in ids.split([1, 1, 4, 1, 2], 1)]
    torch.testing.assert_close(torch.cat(steps, 1), whole, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("beams", [1, 4])
def test_generation_by_cache_is_that_without(beams: int) -> None:
    torch.manual_seed(3)
    model, given = Transformer(TransformerConfig(**SIZES)).eval(), inputs()
    ids, mask = given["input_ids"], given["attention_mask"]
    end = int(model.generate(ids, mask, max_new_tokens=8, end=None)[0, 5])
    got = model.generate(ids, mask, max_new_tokens=10, end=end, beams=beams)

    memory, memory_mask, held = model.encode(ids, mask), mask, torch.empty(3, 0, dtype=torch.int64)

    def step(tokens: Tensor) -> Tensor:
        nonlocal held
        held = torch.cat([held, tokens], 1)
        return model.decode(held, memory, memory_mask)[:, -1]

    def reorder(rows: Tensor) -> None:
        nonlocal held, memory, memory_mask
        held, memory, memory_mask = held[rows], memory[rows], memory_mask[rows]

    start = ids.new_full((3, 1), model.config.decoder_start_token_id)
    expected = generate(step, start, max_new_tokens=10, end=end, pad=0, beams=beams, reorder=reorder)
    assert got.tolist() == expected.tolist()
    assert len({tuple(row) for row in got.tolist()}) > 1, "every row the same shows nothing"


def test_smoothed_labels_are_believed_less() -> None:
    logits, labels = torch.randn(2, 3, 7, dtype=torch.float64), torch.tensor([[4, 2, 0], [6, 0, 0]])
    logs = logits.log_softmax(-1)
    losses = [-(0.9 * logs[b, t, labels[b, t]] + 0.1 * logs[b, t].mean()) for b, t in ((0, 0), (0, 1), (1, 0))]
    torch.testing.assert_close(smoothed_loss(logits, labels, pad=0), torch.stack(losses).mean())
    plain = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=0)
    torch.testing.assert_close(smoothed_loss(logits, labels, pad=0, smoothing=0.0), plain)


def test_learning_rate_rises_then_falls_as_a_root() -> None:
    rates = [learning_rate(step, 64, warmup=100) for step in range(1, 401)]
    assert max(rates) == rates[99] == pytest.approx((64 * 100) ** -0.5)
    assert rates[49] == pytest.approx(rates[99] / 2)
    assert rates[399] == pytest.approx(rates[99] / 2)


def test_folder_holds_all_of_it(tmp_path: Path) -> None:
    model, given = Transformer(TransformerConfig(**SIZES, source_vocab_size=31)).eval(), inputs()
    model.save_pretrained(tmp_path, safetensors=False)
    again = Transformer.from_pretrained(tmp_path)
    assert again.config == model.config
    assert torch.equal(again(**given), model(**given))


# Learning: a sequence of digits, said backwards.

FIRST, LENGTH, BATCH = 3, 5, 32  # below FIRST: padding, end, start


class Training:
    """All that a run has: what a checkpoint must hold."""

    def __init__(self, seed: int, dropout: float) -> None:
        torch.manual_seed(seed)
        sizes = {"d_model": 32, "nhead": 4, "dim_feedforward": 64, "num_encoder_layers": 1, "num_decoder_layers": 1}
        self.model = Transformer(TransformerConfig(FIRST + 10, dropout=dropout, **sizes))
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=1.0, betas=(0.9, 0.98), eps=1e-9)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(
            self.optimizer, lambda done: learning_rate(done + 1, d_model=32, warmup=100)
        )

    def step(self) -> float:
        ids, mask, labels = problems(BATCH)
        logits = self.model(ids, self.model.shifted(labels), mask)
        loss = smoothed_loss(logits, labels, pad=0)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()
        return loss.item()

    def checkpoint(self) -> dict[str, Any]:
        parts = (self.model, self.optimizer, self.schedule)
        return {"parts": [copy.deepcopy(part.state_dict()) for part in parts], "random": torch.get_rng_state()}

    def resume(self, checkpoint: dict[str, Any]) -> None:
        for part, state in zip((self.model, self.optimizer, self.schedule), checkpoint["parts"], strict=True):
            part.load_state_dict(state)
        torch.set_rng_state(checkpoint["random"])


def problems(batch: int) -> tuple[Tensor, Tensor, Tensor]:
    """Digits of 2 to LENGTH, padded; and the same backwards, with an end."""
    length = torch.randint(2, LENGTH + 1, (batch, 1))
    digits, place = torch.randint(FIRST, FIRST + 10, (batch, LENGTH)), torch.arange(LENGTH)
    mask = place < length
    backwards = digits.gather(1, (length - 1 - place).clamp(min=0)).masked_fill(~mask, 0)
    labels = torch.cat([backwards, backwards.new_zeros(batch, 1)], 1).scatter(1, length, 1)
    return digits.masked_fill(~mask, 0), mask, labels


def test_it_learns_to_say_a_sequence_backwards() -> None:
    run = Training(0, dropout=0.0)
    untrained = right(run.model)
    losses = [run.step() for _ in range(450)]
    assert all(math.isfinite(loss) for loss in losses)
    assert sum(losses[-20:]) < sum(losses[:20]) / 3
    assert untrained < 0.1
    for beams in (1, 3):
        assert right(run.model, beams) > 0.9, beams


@torch.no_grad()
def right(model: Transformer, beams: int = 1) -> float:
    """How many of 64 whole sequences are written without an error."""
    torch.manual_seed(99)
    ids, mask, labels = problems(64)
    model.eval()
    written = model.generate(ids, mask, max_new_tokens=LENGTH + 1, beams=beams)[:, 1:]
    model.train()
    written = torch.nn.functional.pad(written, (0, LENGTH + 1 - written.shape[1]))
    return float((written == labels).all(1).float().mean())


def test_resumed_training_is_the_same_to_the_bit(tmp_path: Path) -> None:
    run = Training(1, dropout=0.1)
    for _ in range(3):
        run.step()
    torch.save(run.checkpoint(), tmp_path / "checkpoint.pt")
    straight = [run.step() for _ in range(4)]
    resumed = Training(2, dropout=0.1)
    resumed.resume(torch.load(tmp_path / "checkpoint.pt", weights_only=True))
    assert [resumed.step() for _ in range(4)] == straight
    for (name, got), expected in zip(resumed.model.state_dict().items(), run.model.state_dict().values(), strict=True):
        assert torch.equal(got, expected), name
