"""Laws of decoding, with models small enough to know every text they can write."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from fastseq.models import generate, probabilities

V = 4


class Memory:
    """A model with a cache: the next token's logits are drawn once for every text, and it keeps what it was told."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed
        self.held: Tensor | None = None
        self.sizes: list[int] = []

    def __call__(self, tokens: Tensor) -> Tensor:
        self.sizes.append(tokens.shape[1])
        self.held = tokens if self.held is None else torch.cat([self.held, tokens], 1)
        return torch.stack([self.logits(text) for text in self.held])

    def logits(self, text: Tensor) -> Tensor:
        number = hash((self.seed, *text.tolist())) % 2**31
        return torch.randn(V, generator=torch.Generator().manual_seed(number)) * 2

    def reorder(self, rows: Tensor) -> None:
        self.held = self.held[rows]

    def score(self, prompt: Tensor, new: tuple[int, ...]) -> float:
        """The log-probability of new tokens after the prompt."""
        total, text = 0.0, prompt
        for token in new:
            total += float(self.logits(text).log_softmax(-1)[token])
            text = torch.cat([text, torch.tensor([token])])
        return total


PROMPT = torch.tensor([[0, 1], [2, 3], [1, 1]])


def test_every_token_is_told_once() -> None:
    model = Memory()
    out = generate(model, PROMPT, max_new_tokens=5)
    assert model.sizes == [2, 1, 1, 1, 1]
    assert torch.equal(model.held, out[:, :-1])


def test_greedy_takes_the_likeliest() -> None:
    out = generate(Memory(), PROMPT, max_new_tokens=5)
    for row in out:
        for t in range(2, 7):
            assert row[t] == Memory().logits(row[:t]).argmax()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("length_penalty", [0.0, 1.0, -0.5])
def test_enough_beams_find_the_best_text(seed: int, length_penalty: float) -> None:
    end, new = 3, 3
    model = Memory(seed)
    out = generate(
        model, PROMPT, max_new_tokens=new, beams=V**new, end=end, pad=0, length_penalty=length_penalty,
        reorder=model.reorder,
    )  # fmt: skip
    for prompt, row in zip(PROMPT, out, strict=True):
        texts = [
            text
            for length in range(1, new + 1)
            for text in itertools.product(range(V), repeat=length)
            if end not in text[:-1] and (length == new or text[-1] == end)
        ]
        best = max(texts, key=lambda text: model.score(prompt, text) / len(text) ** length_penalty)
        assert tuple(row[2:].tolist()) == best + (0,) * (out.shape[1] - 2 - len(best))


def test_one_beam_is_greedy_and_more_are_no_worse() -> None:
    for seed in range(5):
        model = Memory(seed)
        greedy = generate(Memory(seed), PROMPT, max_new_tokens=4)
        wide = generate(model, PROMPT, max_new_tokens=4, beams=8, reorder=model.reorder)
        for prompt, a, b in zip(PROMPT, greedy, wide, strict=True):
            assert model.score(prompt, tuple(b[2:].tolist())) >= model.score(prompt, tuple(a[2:].tolist())) - 1e-6


def test_after_the_end_there_is_padding() -> None:
    def count(tokens: Tensor) -> Tensor:
        return torch.nn.functional.one_hot((tokens[:, -1] + 1) % 9, 9).float()

    prompt = torch.tensor([[3], [0], [4]])
    out = generate(count, prompt, max_new_tokens=20, end=5, pad=8)
    assert out.tolist() == [[3, 4, 5, 8, 8, 8], [0, 1, 2, 3, 4, 5], [4, 5, 8, 8, 8, 8]]
    assert generate(count, prompt, max_new_tokens=2, end=5)[2].tolist() == [4, 5, 5]
    assert generate(count, prompt, max_new_tokens=2).shape == (3, 3)


def test_draws_follow_the_probabilities() -> None:
    n, logits = 20_000, torch.tensor([0.0, 1.0, -1.0, 0.5])
    expected = probabilities(logits, 0.8, top_k=3)
    rng = torch.Generator().manual_seed(1)
    options: dict[str, Any] = {"max_new_tokens": 1, "temperature": 0.8, "top_k": 3}
    prompt = torch.zeros(n, 1, dtype=torch.int64)
    drawn = generate(lambda tokens: logits.expand(n, V), prompt, generator=rng, **options)[:, 1]
    share = torch.bincount(drawn, minlength=V) / n
    assert share[expected == 0].sum() == 0
    assert ((share - expected).abs() <= 5 * (expected * (1 - expected) / n).sqrt()).all()
    again = generate(lambda tokens: logits.expand(n, V), prompt, generator=rng.manual_seed(1), **options)[:, 1]
    assert torch.equal(drawn, again)


def test_who_remains_shares_what_was_taken() -> None:
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    torch.testing.assert_close(probabilities(logits, top_k=2), torch.tensor([4 / 7, 3 / 7, 0.0, 0.0]))
    torch.testing.assert_close(probabilities(logits, top_p=0.75), torch.tensor([4 / 9, 3 / 9, 2 / 9, 0.0]))
    torch.testing.assert_close(probabilities(logits, top_p=1e-9), torch.tensor([1.0, 0.0, 0.0, 0.0]))
    torch.testing.assert_close(probabilities(logits, top_k=9, top_p=1.0), logits.exp())
    assert probabilities(logits.half()).dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens: expected at least 1, got 0"),
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"top_k": 3}, "temperature: expected a number"),
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": 1.0, "top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p: expected a number above 0 and at most 1, got 1.5"),
        ({"temperature": 1.0, "beams": 2}, "temperature: expected None with beams, got 1.0"),
        ({"beams": 2}, "reorder: expected a function with beams, got None"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        generate(Memory(), PROMPT, **{"max_new_tokens": 3, **options})
    with pytest.raises(ValueError, match=r"prompt: expected .* got \[2, 0\]"):
        generate(Memory(), PROMPT[:2, :0], max_new_tokens=1)
