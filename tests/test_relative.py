"""Laws of the attention modules that go by distance: the published formulas, memory, padding, order."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

import fastseq

from .support.budget import assert_within_budget

B, T, M, E, N = 4, 7, 5, 12, 3
POSITIONS = fastseq.SinusoidalEmbedding(E, interleaved=False)


def shifted(x: Tensor) -> Tensor:
    """The paper's relative shift (appendix B): a column in front, rows read anew, the first one left out."""
    *lead, Q, K = x.shape
    padded = torch.cat([x.new_zeros(*lead, Q, 1), x], -1).view(*lead, K + 1, Q)
    return padded[..., 1:, :].reshape(*lead, Q, K)


def oracle(module: Any, x: Tensor, positions: Tensor, memory: Tensor | None, hidden: Tensor | None) -> Tensor:
    """Transformer-XL's formula with all matrices, of positions ``[M + T or more, E]`` as the shift wants them."""
    context = x if memory is None else torch.cat([memory, x], 1)
    rows = N * module.head_dim

    def heads(x: Tensor, part: int) -> Tensor:
        piece = slice(part * rows, (part + 1) * rows)
        bias = 0 if module.in_proj_bias is None else module.in_proj_bias[piece]
        return (x @ module.in_proj_weight[piece].T + bias).unflatten(2, (N, -1)).transpose(1, 2)

    q, k, v = heads(x, 0), heads(context, 1), heads(context, 2)
    r = (positions @ module.r_proj.weight.T).unflatten(1, (N, -1)).transpose(0, 1)
    scores = (q + module.u[:, None]) @ k.mT + shifted((q + module.w[:, None]) @ r.mT)[..., : k.shape[2]]
    scores = scores / module.head_dim**0.5
    if hidden is not None:
        scores = scores.masked_fill(hidden, -torch.inf)
    return module.out_proj((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


def built(kind: Any = fastseq.RelativeMultiheadAttention, **options: Any) -> Any:
    """A module none of whose parameters is zero."""
    module = kind(E, N, **options)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    return module


def results(module: Any, run: Any, *inputs: Tensor) -> list[Tensor]:
    """The output, and the gradients of inputs and parameters."""
    inputs = tuple(each.detach().clone().requires_grad_() for each in inputs)
    out = run(module, *inputs)
    wanted = [*inputs, *module.parameters()]
    torch.manual_seed(7)
    direction = torch.randn(out.shape, dtype=torch.float64).to(out.dtype)
    return [out, *torch.autograd.grad(out, wanted, direction, allow_unused=True)]


def assert_is_the_formula(module: Any, ours: Any, formula: Any, *inputs: Tensor) -> None:
    got, peer = results(module, ours, *inputs), results(module, formula, *inputs)
    exact = results(copy.deepcopy(module).double(), formula, *(each.double() for each in inputs))
    names = ["output", *(f"input {i}" for i in range(len(inputs))), *dict(module.named_parameters())]
    for name, *three in zip(names, got, exact, peer, strict=True):
        assert (three[0] is None) == (three[1] is None), name
        if three[0] is not None:
            assert_within_budget(*three, name)


@pytest.mark.parametrize("options", [{}, {"head_dim": 8, "bias": True}])
@pytest.mark.parametrize("remembered", [0, M])
def test_with_a_memory_it_is_the_papers_formula(options: dict[str, Any], remembered: int) -> None:
    module = built(**options)
    x, memory, length = torch.randn(B, T, E), torch.randn(B, remembered, E), remembered + T
    positions = POSITIONS.at(torch.arange(length - 1, -1, -1))
    later = torch.ones(T, length, dtype=torch.bool).triu(remembered + 1)
    assert_is_the_formula(
        module,
        lambda module, x, memory: module(x, positions.to(x.dtype), memory, causal=True)[0],
        lambda module, x, memory: oracle(module, x, positions.to(x.dtype), memory, later),
        x,
        memory,
    )


def test_with_zero_in_the_middle_it_is_the_conformers() -> None:
    module, x = built(bias=True), torch.randn(B, T, E)
    positions = POSITIONS.at(torch.arange(T - 1, -T, -1))
    assert_is_the_formula(
        module,
        lambda module, x: module(x, positions.to(x.dtype))[0],
        lambda module, x: oracle(module, x, positions.to(x.dtype), None, None),
        x,
    )


def test_masks_and_windows_hide() -> None:
    module, x = built(), torch.randn(B, T, E)
    positions = POSITIONS.at(torch.arange(T - 1, -T, -1))
    padding = torch.tensor([[False] * T, [False] * 4 + [True] * 3] * 2)
    forbidden = torch.rand(T, T) < 0.3
    far = ~torch.ones(T, T, dtype=torch.bool).tril(1).triu(-2)
    forbidden.fill_diagonal_(False)
    every = padding[:, None, None] | forbidden | far
    got, weights = module(x, positions, key_padding_mask=padding, attn_mask=forbidden, window=(2, 1), need_weights=True)
    rows = ~every.all(-1)[:, 0]
    torch.testing.assert_close(got[rows], oracle(module, x, positions, None, every)[rows], atol=1e-5, rtol=1e-5)
    assert not weights[every.expand_as(weights)].any()
    torch.testing.assert_close(weights.sum(-1)[:, 0][rows], torch.ones(int(rows.sum())))
    for_each, _ = module(x, positions, attn_mask=(every.expand(B, 1, T, T))[:, 0])
    torch.testing.assert_close(for_each, got)


def test_memory_split_is_memory_joined() -> None:
    module, x = built(), torch.randn(B, T + M, E)
    positions = POSITIONS.at(torch.arange(T + M - 1, -1, -1))
    whole, _ = module(x, positions, causal=True)
    last, _ = module(x[:, M:], positions, x[:, :M], causal=True)
    torch.testing.assert_close(last, whole[:, M:], atol=1e-5, rtol=1e-5)


def test_a_short_table_clamps_distances() -> None:
    module, x = built(), torch.randn(B, T, E)
    distances = torch.arange(T - 1, -T, -1)
    clamped, _ = module(x, POSITIONS.at(distances.clamp(-2, 3)))
    short, _ = module(x, POSITIONS.at(torch.arange(3, -3, -1)), zero=3)
    torch.testing.assert_close(short, clamped)


def test_where_a_text_begins_does_not_matter() -> None:
    module, x = built(), torch.randn(1, T, E)
    before = torch.cat([torch.randn(1, 3, E), x], 1)
    padding = torch.tensor([[True] * 3 + [False] * T])
    alone, _ = module(x, POSITIONS.at(torch.arange(T - 1, -1, -1)), causal=True)
    shifted, _ = module(before, POSITIONS.at(torch.arange(T + 2, -1, -1)), causal=True, key_padding_mask=padding)
    torch.testing.assert_close(shifted[:, 3:], alone)


def test_weights_are_dropped_in_training_only() -> None:
    module, x, positions = built(dropout=0.5), torch.randn(B, T, E), POSITIONS.at(torch.arange(T - 1, -1, -1))
    first, second = (module(x, positions, causal=True)[0] for _ in range(2))
    assert not torch.equal(first, second)
    module.eval()
    first, second = (module(x, positions, causal=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(B, T, E + 1)}, rf"x: expected \[B, T, {E}\] of one batch, got \[4, 7, 13\]"),
        ({"memory": torch.zeros(B + 1, M, E)}, r"memory: expected .* got \[5, 5, 12\]"),
        ({"positions": torch.zeros(1, T, E)}, rf"positions: expected \[L, {E}\], got \[1, 7, 12\]"),
        ({"key_padding_mask": torch.zeros(B, M, dtype=torch.bool)}, r"key_padding_mask: expected torch.bool \[4, 7\]"),
        ({"attn_mask": torch.zeros(T, T)}, r"attn_mask: expected torch.bool \[T, 7\]"),
    ],
)
def test_what_does_not_fit_is_named(change: dict[str, Any], message: str) -> None:
    arguments = {"x": torch.zeros(B, T, E), "positions": torch.zeros(T, E), **change}
    with pytest.raises(ValueError, match=message):
        built()(**arguments)


def test_a_number_of_heads_that_does_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match="num_heads: expected a divisor of embed_dim=12, got 5"):
        fastseq.RelativeMultiheadAttention(12, 5)


# --------------------------------------------------------------------------------------------------------- XLNet's


DISTANCES = POSITIONS.at(torch.arange(M + T - 1, -T, -1))
ZERO = M + T - 1


def two_streams(module: Any, h: Tensor, g: Tensor, memory: Tensor | None, hidden: Tensor, segments: Any) -> Tensor:
    """XLNet's formula with all matrices: what no token sees, hidden ``[B, T, M + T]``, is said for each stream."""
    context = h if memory is None else torch.cat([memory, h], 1)
    rows = N * module.head_dim
    k, v = (
        (context @ module.in_proj_weight[part * rows : (part + 1) * rows].T).unflatten(2, (N, -1)).transpose(1, 2)
        for part in (1, 2)
    )
    r = module.r_proj(DISTANCES.to(h.dtype)).unflatten(1, (N, -1))
    K = k.shape[2]
    at = torch.arange(K) - torch.arange(T)[:, None] - (K - T) + ZERO
    differs = (segments[0][:, :, None] != segments[1][:, None]).long()
    outs = []
    for x, unseen in ((h, hidden[0]), (g, hidden[1])):
        q = (x @ module.in_proj_weight[:rows].T).unflatten(2, (N, -1)).transpose(1, 2)
        of_distance = torch.einsum("bnid,ijnd->bnij", q + module.w[:, None], r[at])
        of_segment = torch.einsum("bnid,bijnd->bnij", q + module.s[:, None], module.segment_embed[differs])
        scores = ((q + module.u[:, None]) @ k.mT + of_distance + of_segment) / module.head_dim**0.5
        w = scores.masked_fill(unseen[:, None], -torch.inf).softmax(-1)
        outs.append(module.out_proj((w @ v).transpose(1, 2).flatten(2)))
    return torch.stack(outs)


def places() -> tuple[Tensor, Tensor]:
    """An order of prediction, and what it hides from content and guesses ``[2, B, T, M + T]``."""
    order = torch.stack([torch.randperm(T) for _ in range(B)])
    before = order[:, None] < order[:, :, None]
    seen = torch.stack([before | torch.eye(T, dtype=torch.bool), before])
    return order, torch.nn.functional.pad(~seen, (M, 0), value=False)


@pytest.mark.parametrize("told", ["by order", "by a mask"])
def test_two_streams_are_the_papers_formula(told: str) -> None:
    module = built(fastseq.XLNetAttention)
    h, g, memory = torch.randn(B, T, E), torch.randn(B, T, E), torch.randn(B, M, E)
    segments = torch.randint(3, (B, T)), torch.randint(3, (B, M + T))
    order, hidden = places()
    how = {"order": order} if told == "by order" else {"attn_mask": hidden[1]}

    def ours(module: Any, h: Tensor, g: Tensor, memory: Tensor) -> Tensor:
        return torch.stack(module(h, DISTANCES.to(h.dtype), memory, g=g, segments=segments, zero=ZERO, **how))

    def formula(module: Any, h: Tensor, g: Tensor, memory: Tensor) -> Tensor:
        return two_streams(module, h, g, memory, hidden, segments)

    assert_is_the_formula(module, ours, formula, h, g, memory)


def test_targets_are_places_or_a_matrix() -> None:
    module, (order, _) = built(fastseq.XLNetAttention), places()
    h, g, memory, targets = torch.randn(B, T, E), torch.randn(B, T, E), torch.randn(B, M, E), torch.tensor([[4, 0, 2]])
    targets = targets.expand(B, 3)
    options = {"order": order, "zero": ZERO}
    of_all, all_guesses = module(h, DISTANCES, memory, g=g, **options)
    some = g.gather(1, targets[..., None].expand(-1, -1, E))
    matrix = torch.nn.functional.one_hot(targets, T).float()
    for how in (targets, matrix):
        of_h, guesses = module(h, DISTANCES, memory, g=some, targets=how, **options)
        torch.testing.assert_close(of_h, of_all)
        torch.testing.assert_close(guesses, all_guesses.gather(1, targets[..., None].expand(-1, -1, E)))
    alone, nothing = module(h, DISTANCES, memory, **options)
    torch.testing.assert_close(alone, of_all)
    assert nothing is None


def test_a_guess_does_not_see_its_token() -> None:
    """Nor those that come after it; the content stream does not either, but for itself."""
    module, (order, _) = built(fastseq.XLNetAttention), places()
    h, g = torch.randn(B, T, E), torch.randn(B, T, E)
    changed = h.clone()
    place = 3
    changed[:, place] += 1
    outs = [module(x, DISTANCES, g=g, order=order, zero=ZERO) for x in (h, changed)]
    turn = order[:, place, None]
    for stream, moved in enumerate((order >= turn, order > turn)):
        difference = (outs[0][stream] - outs[1][stream]).abs().amax(-1)
        assert torch.equal(difference > 0, moved)


def test_one_segment_is_no_segment_but_for_its_embedding() -> None:
    module, h = built(fastseq.XLNetAttention), torch.randn(B, T, E)
    ones = torch.ones(B, T, dtype=torch.int64)
    with_segments, _ = module(h, DISTANCES, segments=(ones, ones), zero=ZERO)
    without, _ = module(h, DISTANCES, zero=ZERO)
    torch.testing.assert_close(with_segments, without)  # a number that all scores of a row have changes no weight


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"g": torch.zeros(B, 2, E)}, r"g: expected \[4, 7, 12\], got \[4, 2, 12\]"),
        ({"g": torch.zeros(B, T, E), "targets": torch.zeros(B, 3, dtype=torch.int64)}, r"g: expected \[4, 3, 12\]"),
        ({"order": torch.arange(T)}, r"order: expected \[4, 7\], got \[7\]"),
    ],
)
def test_streams_that_do_not_fit_are_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        built(fastseq.XLNetAttention)(torch.zeros(B, T, E), DISTANCES, zero=ZERO, **change)


@pytest.mark.parametrize("kind", [fastseq.RelativeMultiheadAttention, fastseq.XLNetAttention])
def test_kernels_do_the_same(kind: Any) -> None:
    if not torch.cuda.is_available() and not pytest.importorskip("triton").knobs.runtime.interpret:
        pytest.skip("without a GPU kernels run only under TRITON_INTERPRET=1")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    module = built(kind, head_dim=16).to(device)
    x, memory = torch.randn(1, T, E, device=device), torch.randn(1, M, E, device=device)
    options: dict[str, Any] = {"zero": ZERO}
    if kind is fastseq.XLNetAttention:
        order, _ = places()
        segments = torch.randint(2, (1, M + T), device=device)
        options |= {"g": x.flip(1), "order": order[:1].to(device), "segments": (segments[:, M:], segments)}

    def run() -> list[Tensor]:
        outs = [out for out in module(x, DISTANCES.to(device), memory, **options) if out is not None]
        return [*outs, *torch.autograd.grad(sum(out.square().sum() for out in outs), list(module.parameters()))]

    expected = run()
    with fastseq.use("triton"):
        for got, other in zip(run(), expected, strict=True):
            assert (got - other).abs().max() <= 1e-5 * other.abs().max()
