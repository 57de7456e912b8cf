"""What hurt users of attention elsewhere: a test for each complaint, so that none of them comes back here."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fastseq

from .support.attention_problems import DEVICE, ON_GPU, Case, assert_right
from .support.poison import poisoned_buffers

pytest.importorskip("triton")

from fastseq.kernels.attention import backward as backward_kernels
from fastseq.kernels.attention import forward as forward_kernels
from fastseq.ops import blockwise

attention = fastseq.functional.scaled_dot_product_attention
IMPLEMENTATIONS = ("reference", "torch", "triton")


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


def draw(*shape: int, **options: Any) -> Tensor:
    return torch.randn(*shape, device=DEVICE, **options).requires_grad_()


class Allocations(TorchDispatchMode):
    """The sizes of all tensors that are made, in elements, views left out."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage().data_ptr() for t in torch.utils._pytree.tree_leaves(args) if isinstance(t, Tensor)}
        for t in torch.utils._pytree.tree_leaves(result):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in given:
                self.sizes.append(t.untyped_storage().nbytes() // t.element_size())
        return result


@pytest.fixture
def allocations(monkeypatch: pytest.MonkeyPatch) -> Allocations:
    """To be entered around a call; it sees what the engines allocate inside an operator, where no mode looks."""
    watch = Allocations()

    def watched(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            with watch:
                return function(*args, **options)

        return call

    for module, names in (
        (blockwise, ("attention_forward", "attention_backward")),
        (forward_kernels, ("attention_forward",)),
        (backward_kernels, ("attention_backward",)),
    ):
        for name in names:
            monkeypatch.setattr(module, name, watched(getattr(module, name)))
    return watch


@pytest.fixture
def no_gpu_needed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Tensors without memory on a device nobody has: the choice reads nothing but their types and sizes."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pain_1_masked_gradients_at_64_modulo_128(implementation: str, dtype: torch.dtype) -> None:
    """pytorch#196678: with a mask, the gradients of cuDNN are NaN where the length is 64 modulo 128."""
    for length in (64, 192):
        case = Case(dtype, (length, length), (64, 64), 1, (1, 1), mask="heads", outputs="out")
        assert_right(case, implementation)


@pytest.mark.parametrize("mask", ["heads", "batch", "-inf", "min"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pain_2_fully_masked_rows(implementation: str, mask: str) -> None:
    """pytorch#41508, #103963, #152028: a row, or a whole batch, of nothing but padding gives NaN."""
    assert_right(Case(mask=mask, causal="is_causal", outputs="each lse"), implementation)


S = 2048  # long enough that a matrix of scores would be the largest tensor by far
KEY_PADDING = {"attn_mask": torch.arange(S, device=DEVICE) < S - 100}
MASKED: dict[str, dict[str, Any]] = {
    "padding": {"attn_mask": KEY_PADDING["attn_mask"][None]},
    "padding and causal": {"attn_mask": KEY_PADDING["attn_mask"][None], "is_causal": True},
    "padding and lower right": {"attn_mask": KEY_PADDING["attn_mask"][None], "causal": "lower_right"},
    "bool": {"attn_mask": (torch.arange(S) % 3 > 0).expand(S, S).tril().to(DEVICE)},
    "float": {"attn_mask": torch.zeros(S, S).masked_fill(torch.ones(S, S).triu(1) > 0, -torch.inf).to(DEVICE)},
    "window": {"window": (100, 0)},
    "softcap": {"softcap": 5.0},
    "dropout": {"dropout_p": 0.1, "seed": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", MASKED)
def test_pain_3_a_mask_keeps_the_fast_path(kind: str, allocations: Allocations) -> None:
    """pytorch#107884: any mask or bias throws away flash attention, for the whole matrix of scores."""
    q, k, v = (draw(1, 2, S, 16) for _ in range(3))
    with allocations, fastseq.use("torch"):
        results = attention(q, k, v, **MASKED[kind])
        out = results if isinstance(results, Tensor) else results[0]
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(allocations.sizes) > 3
    assert max(allocations.sizes) <= S * S // 4


def test_pain_3_the_kernels_allocate_what_they_return(allocations: Allocations) -> None:
    length = 8192 if ON_GPU else 192
    q, k, v = (draw(1, 1, length, 16) for _ in range(3))
    mask = torch.ones(length, length, dtype=torch.bool, device=DEVICE).tril()
    with allocations, fastseq.use("triton"):
        out = attention(q, k, v, mask)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(allocations.sizes) > 3
    assert max(allocations.sizes) <= q.numel()


@pytest.mark.usefixtures("no_gpu_needed")
@pytest.mark.parametrize("given", ["attn_mask", "key_padding_mask", "both"])
def test_pain_3_explain_says_so(given: str) -> None:
    module = fastseq.MultiheadAttention(32, 4, batch_first=True)
    x = torch.empty(2, 10, 32, device="cuda")
    masks = {
        "attn_mask": torch.empty(10, 10, device="cuda"),
        "key_padding_mask": torch.empty(2, 10, dtype=torch.bool, device="cuda"),
    }
    wanted = masks if given == "both" else {given: masks[given]}
    assert fastseq.explain(module, x, x, x, need_weights=False, **wanted).name == "triton"


@pytest.mark.parametrize("shape", [(2, S, 1), (2, 1, S), (1, S, S)])
def test_pain_4_the_gradient_of_a_learned_bias(shape: tuple[int, ...], allocations: Allocations) -> None:
    """pytorch#145208, #146896: the gradient of a learned bias is not to be had, or costs the matrix of scores."""
    q, k, v, bias = draw(1, 2, S, 16), draw(1, 2, S, 16), draw(1, 2, S, 16), draw(*shape)
    with fastseq.use("torch"):
        (found,) = torch.autograd.grad(attention(q, k, v, bias).square().sum(), bias)
    returned = [size for size in allocations.sizes if size > S * S // 4]
    assert returned == [S * S] * (shape[-2:] == (S, S))
    (expected,) = torch.autograd.grad(F.scaled_dot_product_attention(q, k, v, bias).square().sum(), bias)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("lengths", [(5, 9), (9, 5), (1, 9), (9, 1)])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pain_6_is_causal_when_lengths_differ(implementation: str, lengths: tuple[int, int]) -> None:
    """pytorch#108108, #103082, #144858: nobody knows which corner ``is_causal`` begins in."""
    (Q, K), D = lengths, 8
    q, k, v = draw(2, 2, Q, D), draw(2, 2, K, D), draw(2, 2, K, D)
    corners = {"upper_left": 0, "lower_right": K - Q}
    for corner, diagonal in corners.items():
        visible = torch.ones(Q, K, dtype=torch.bool, device=DEVICE).tril(diagonal)
        sees = visible.any(-1)[:, None]
        exact = F.scaled_dot_product_attention(*(t.double() for t in (q, k, v)), visible | ~sees) * sees
        expected = torch.autograd.grad(exact.sum(), (q, k, v))
        ways = [{"causal": corner}, *[{"is_causal": True}] * (corner == "upper_left")]
        for way in ways:
            with fastseq.use(implementation):
                out = attention(q, k, v, **way)
            for x, y in zip((out, *torch.autograd.grad(out.sum(), (q, k, v))), (exact.float(), *expected), strict=True):
                torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("norm_first", [False, True])
def test_pain_7_an_encoder_says_the_same_in_train_and_eval(norm_first: bool) -> None:
    """pytorch#97111, #86120, #118628: in eval the padding at the end is cut off, and numbers change."""
    layer = fastseq.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = fastseq.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first).to(DEVICE)
    x = torch.randn(3, 9, 16, device=DEVICE)
    padding = torch.arange(9, device=DEVICE) >= torch.tensor([7, 4, 1], device=DEVICE)[:, None]  # 2 past the longest
    seen = {}
    for training in (True, False):
        encoder.train(training)
        for grad in (True, False):
            with torch.set_grad_enabled(grad):
                seen[training, grad] = encoder(x, src_key_padding_mask=padding).detach()
    first = seen[True, True]
    assert first.shape == x.shape
    assert first.isfinite().all()
    for other in seen.values():
        torch.testing.assert_close(other, first, atol=0, rtol=0)


@pytest.mark.parametrize("average", [True, False])
def test_pain_8_need_weights_stays_on_the_fast_engine(average: bool, allocations: Allocations) -> None:
    """pytorch#99878, #119811: asking for the weights silently turns to the slow path."""
    length, heads = 1024, 4
    module = fastseq.MultiheadAttention(32, heads, batch_first=True).to(DEVICE)
    x = draw(1, length, 32)
    with fastseq.use("torch"):
        out, weights = module(x, x, x, average_attn_weights=average)
        (found,) = torch.autograd.grad(out.square().sum() + weights.square().sum(), x)
    plane = length * length
    large = [size for size in allocations.sizes if size > plane // 2]
    assert large == [plane if average else heads * plane], "the weights that are returned, and nothing as large"
    expected, of_each = F.multi_head_attention_forward(
        *(x.transpose(0, 1),) * 3, 32, heads, module.in_proj_weight, module.in_proj_bias, None, None, False, 0.0,
        module.out_proj.weight, module.out_proj.bias, average_attn_weights=average,
    )  # fmt: skip
    torch.testing.assert_close(out, expected.transpose(0, 1), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(weights, of_each, atol=1e-5, rtol=1e-5)
    (gradient,) = torch.autograd.grad(expected.square().sum() + of_each.square().sum(), x)
    torch.testing.assert_close(found, gradient, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("no_gpu_needed")
def test_pain_8_explain_says_so() -> None:
    module, x = fastseq.MultiheadAttention(32, 4, batch_first=True), torch.empty(2, 10, 32, device="cuda")
    assert fastseq.explain(module, x, x, x, need_weights=True).name == "triton"


@pytest.mark.parametrize("mask", ["bool", "padding", "causal"])
def test_pain_10_masked_grouped_heads_repeat_nothing(mask: str, allocations: Allocations) -> None:
    """pytorch#139586: with a mask, grouped heads fall to the formula, 15.5 GiB for what takes 0.05."""
    N, D = 8, 16
    q, k, v = draw(1, N, S, D), draw(1, 1, S, D), draw(1, 1, S, D)
    options = {"bool": MASKED["bool"], "padding": MASKED["padding"], "causal": {"causal": "lower_right"}}[mask]
    with allocations, fastseq.use("torch"):
        out = attention(q, k, v, enable_gqa=True, **options)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert len(allocations.sizes) > 3
    assert max(allocations.sizes) <= S * S // 4


@pytest.mark.parametrize("implementation", ["reference", "torch"])
def test_pain_11_second_order(implementation: str) -> None:
    """pytorch#116350: fused attention has no second derivative."""
    q, k, v = (draw(1, 2, 3, 2, dtype=torch.float64) for _ in range(3))
    bias = draw(2, 3, 3, dtype=torch.float64)
    mask = torch.tensor([[True, False, True], [True, True, False], [False, False, False]], device=DEVICE)

    def run(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
        with fastseq.use(implementation):
            return attention(q, k, v, mask, bias=bias, softcap=2.0, dropout_p=0.3, seed=4)

    assert torch.autograd.gradcheck(run, (q, k, v, bias))
    assert torch.autograd.gradgradcheck(run, (q, k, v, bias))


def test_pain_11_second_order_of_the_kernels() -> None:
    """Whose own gradients are differentiated by the formula."""
    q, k, v = (draw(1, 2, 5, 4) for _ in range(3))
    found = []
    for implementation in ("triton", "reference"):
        with fastseq.use(implementation):
            out = attention(q, k, v, is_causal=True)
            first = torch.autograd.grad(out.square().sum(), (q, k, v), create_graph=True)
            found.append(torch.autograd.grad(sum(t.square().sum() for t in first), (q, k, v)))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
