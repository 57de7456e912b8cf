"""Sinusoidal and learned positions: the formula, the offset of decoding, and what goes wrong."""

import math

import pytest
import torch

import fastseq


def exact(positions: list[float], dim: int, base: float, interleaved: bool) -> torch.Tensor:
    """The paper's two formulas, feature by feature."""
    table = torch.empty(len(positions), dim, dtype=torch.float64)
    for row, position in enumerate(positions):
        for p in range(dim // 2):
            angle = position / base ** (2 * p / dim)
            sine, cosine = (2 * p, 2 * p + 1) if interleaved else (p, p + dim // 2)
            table[row, sine], table[row, cosine] = math.sin(angle), math.cos(angle)
    return table


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("dim", "base"), [(2, 10000.0), (8, 10000.0), (30, 100.0)])
def test_sinusoids_are_those_of_the_paper(dim: int, base: float, interleaved: bool) -> None:
    positions = fastseq.SinusoidalEmbedding(dim, base, interleaved=interleaved)
    where = [0.0, 1.0, 2.0, 17.0, 500.0, 0.5, -3.0]
    expected = exact(where, dim, base, interleaved)
    got = positions.at(torch.tensor(where))
    assert got.dtype == torch.float32
    torch.testing.assert_close(got.double(), expected, atol=500 * 2**-23, rtol=0)  # the angle's own rounding
    torch.testing.assert_close(positions.at(torch.tensor(where, dtype=torch.float64)), expected, atol=1e-12, rtol=0)
    x = torch.randn(2, 3, 7, dim, dtype=torch.float64)
    torch.testing.assert_close(positions(x), x + exact(list(range(7)), dim, base, interleaved), atol=1e-12, rtol=0)


def test_positions_are_what_the_caller_says() -> None:
    positions = fastseq.SinusoidalEmbedding(6, interleaved=False)
    descending = positions.at(torch.arange(4, -1, -1))
    assert torch.equal(descending, positions.at(torch.arange(5)).flip(0))
    assert torch.equal(positions.at(torch.tensor([[3, 1], [0, 3]]))[1, 1], positions.at(torch.tensor(3)))


def test_moving_is_a_rotation_that_knows_no_position() -> None:
    """The paper's reason for sinusoids: position t + k is the same linear map of position t for every t."""
    positions, k = fastseq.SinusoidalEmbedding(8), 5
    pairs = positions.at(torch.arange(40, dtype=torch.float64)).unflatten(-1, (4, 2))
    angle = k * 10000.0 ** (torch.arange(0, 8, 2, dtype=torch.float64) / -8)
    sine, cosine = pairs.unbind(-1)
    moved = torch.stack([sine * angle.cos() + cosine * angle.sin(), cosine * angle.cos() - sine * angle.sin()], -1)
    torch.testing.assert_close(moved[:-k], pairs[k:], atol=1e-12, rtol=0)


@pytest.mark.parametrize("make", [lambda: fastseq.SinusoidalEmbedding(8), lambda: fastseq.LearnedEmbedding(9, 8)])
def test_offset_continues_the_sequence(make: type) -> None:
    positions, x = make(), torch.randn(2, 9, 8)
    whole = positions(x)
    steps = [positions(x[:, t : t + 1], offset=t) for t in range(9)]
    assert torch.equal(torch.cat(steps, 1), whole)
    assert torch.equal(positions(x[:, 4:], 4), whole[:, 4:])
    torch.testing.assert_close(positions.at(torch.arange(9)) + x, whole, atol=1e-6, rtol=0)


def test_half_precision_stays_and_is_rounded_once() -> None:
    x = torch.randn(1, 300, 8, dtype=torch.bfloat16)
    positions = fastseq.SinusoidalEmbedding(8)
    assert torch.equal(positions(x), x + positions.at(torch.arange(300)).bfloat16())


def test_learned_positions_get_their_gradient() -> None:
    positions = fastseq.LearnedEmbedding(6, 4)
    positions(torch.zeros(3, 2, 4), offset=3).sum().backward()
    expected = torch.zeros(6, 4)
    expected[3:5] = 3.0
    assert positions.weight.grad is not None
    assert torch.equal(positions.weight.grad, expected)
    assert positions.weight.std() < 0.05


def test_errors_name_what_is_wrong() -> None:
    with pytest.raises(ValueError, match="dim: expected an even number of features, got 7"):
        fastseq.SinusoidalEmbedding(7)
    for positions in (fastseq.SinusoidalEmbedding(8), fastseq.LearnedEmbedding(4, 8)):
        with pytest.raises(ValueError, match=r"x: expected \[..., T, dim=8\], got \[1, 2, 6\]"):
            positions(torch.zeros(1, 2, 6))
    with pytest.raises(ValueError, match="max_length=4, got 3 to 4"):
        fastseq.LearnedEmbedding(4, 8)(torch.zeros(1, 2, 8), offset=3)
    with pytest.raises(ValueError, match="max_length=4, got -1 to 0"):
        fastseq.LearnedEmbedding(4, 8)(torch.zeros(1, 2, 8), offset=-1)
    with pytest.raises(IndexError):
        fastseq.LearnedEmbedding(4, 8).at(torch.tensor([4]))


def test_repr_says_the_sizes() -> None:
    assert repr(fastseq.SinusoidalEmbedding(8)) == "SinusoidalEmbedding(8, base=10000)"
    assert "interleaved=False" in repr(fastseq.SinusoidalEmbedding(8, interleaved=False))
    assert repr(fastseq.LearnedEmbedding(4, 8)) == "LearnedEmbedding(4, 8)"
