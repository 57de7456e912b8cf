"""Laws of split-key attention: under the interpreter, or on a GPU with the same tests."""

import inspect
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from fastseq.kernels.attention import decode
from fastseq.kernels.attention.decode import LEAST, ROWS, decode_forward, splits
from fastseq.kernels.attention.plan import DTYPES, relative
from fastseq.kernels.jit import NAMES, OPTIONS
from fastseq.kernels.limits import limits
from fastseq.reference.attention import attention as reference

from .support.budget import assert_within_budget
from .support.poison import poisoned_buffers

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# fp32 products are exact under the interpreter whatever it is told, and the tiles for TF32 are the larger family.
ALLOW_TF32 = DEVICE.type == "cpu"
SEED = torch.tensor([-0x123456789ABCDEF], device=DEVICE)
PLAIN: dict[str, Any] = {"left": -1, "right": -1, "lower_right": False, "softcap": 0.0, "dropout_p": 0.0}
FEATURES: dict[str, tuple[Any, ...]] = {
    "heads": ((4, 2), (2, 2), (6, 2), (8, 1)),
    "Q": (1, 5, 2),
    "right": (-1, 0, 3, -1),
    "left": (-1, 40, 120),
    "lower_right": (True, True, False),
    "softcap": (0.0, 2.0),
    "dropout_p": (0.0, 0.0, 0.3),
    "bias": (None, "BNQK", "11QK", "B11K", "1NQ1"),
    "mask": (None, "B11K", "BNQK", "1NQ1", "111K"),
    "parts": (3, 1, 4, 20),
}


@pytest.fixture(autouse=True)
def _poison() -> Iterator[None]:
    with poisoned_buffers():
        yield


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, device=DEVICE).to(dtype)


def qkv(
    B: int = 2, N: int = 4, M: int = 2, Q: int = 2, K: int = 200, D: int = 16, E: int = 16, dtype: Any = torch.float32
) -> list[Tensor]:
    return [draw(B, N, Q, D, dtype=dtype), draw(B, M, K, D, dtype=dtype), draw(B, M, K, E, dtype=dtype)]


def broadcast(letters: str, sizes: dict[str, int]) -> list[int]:
    return [sizes.get(letter, 1) for letter in letters]


def run(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, mask: Any = None, parts: int = 3, **options: Any) -> Any:
    given = PLAIN | {"scale": q.shape[-1] ** -0.5, "allow_tf32": ALLOW_TF32} | options
    seed = SEED if given["dropout_p"] else None
    return decode_forward(q, k, v, bias, mask, seed, terms=relative(q), splits=parts, **given)


def define(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, mask: Any = None, **options: Any) -> Any:
    given = PLAIN | {"scale": q.shape[-1] ** -0.5} | options
    return reference(q, k, v, bias, mask=mask, seed=SEED, **given)[:2]


def check(q: Tensor, k: Tensor, v: Tensor, bias: Any = None, mask: Any = None, parts: int = 3, **options: Any) -> None:
    out, lse = run(q, k, v, bias, mask, parts, **options)
    exact, exact_lse = define(
        q.double(), k.double(), v.double(), None if bias is None else bias.double(), mask, **options
    )
    # How far torch is off is luck, too: of two orders in which it may sum, the one that is further off counts.
    peers = [define(a, b, v, bias, mask, **options) for a, b in ((q, k), (q.flip(-1), k.flip(-1)))]
    blind = exact_lse.isneginf()
    peer = max((out for out, _ in peers), key=lambda t: (t - exact).abs().max() if t.numel() else 0)
    peer_lse = max((lse for _, lse in peers), key=lambda t: (t - exact_lse).masked_fill(blind, 0.0).abs().max())
    assert out.transpose(1, 2).is_contiguous()
    assert_within_budget(out, exact, peer, "out")
    assert torch.equal(lse.isneginf(), blind)
    assert not out[blind].any()
    assert_within_budget(*(t.masked_fill(blind, 0.0) for t in (lse, exact_lse, peer_lse)), "lse")


WIDTHS = [(1, 1), (7, 16), (33, 64), (64, 33), (96, 96), (128, 128), (256, 40), (40, 256), (256, 256)]


@pytest.mark.parametrize(
    ("widths", "dtype"), [*zip(WIDTHS, itertools.cycle(DTYPES), strict=False), (WIDTHS[0], DTYPES[1])]
)
def test_every_width_within_budget(widths: tuple[int, int], dtype: torch.dtype) -> None:
    D, E = widths
    check(*qkv(B=1, Q=3, K=150, D=D, E=E, dtype=dtype), right=0, lower_right=True)


def turns() -> list[dict[str, Any]]:
    """The features take turns, each at its own pace."""
    wheels = {name: itertools.cycle(levels) for name, levels in FEATURES.items()}
    types = itertools.cycle(DTYPES)
    return [{name: next(wheel) for name, wheel in wheels.items()} | {"dtype": next(types)} for _ in range(20)]


@pytest.mark.parametrize("case", turns(), ids=lambda case: "-".join(str(level) for level in case.values()))
def test_every_feature_within_budget(case: dict[str, Any]) -> None:
    (N, M), Q, dtype = case.pop("heads"), case.pop("Q"), case.pop("dtype")
    sizes = {"B": 2, "N": N, "Q": Q, "K": 150}
    tensors = qkv(N=N, M=M, Q=Q, K=150, dtype=dtype)
    bias, mask = case.pop("bias"), case.pop("mask")
    bias = None if bias is None else draw(*broadcast(bias, sizes), dtype=dtype)
    mask = None if mask is None else draw(*broadcast(mask, sizes)) > -0.5
    check(*tensors, bias, mask, **case)


@pytest.mark.parametrize("K", [1, 31, 64, 65, 129])
def test_every_length_within_budget(K: int) -> None:
    check(*qkv(B=1, K=K), left=K // 2, right=1, lower_right=True)
    check(*qkv(B=1, K=K, Q=1), left=K // 2, right=1, lower_right=True)


@pytest.mark.parametrize("rows", [(1, 16), (1, 17), (3, 11), (1, 64), (64, 1)])
def test_rows_of_a_group_fill_a_tile(rows: tuple[int, int]) -> None:
    Q, group = rows
    check(*qkv(N=2 * group, Q=Q, K=150), right=0, lower_right=True)


def test_number_of_parts_does_not_matter() -> None:
    tensors, options = qkv(B=1, N=2, M=1, K=1000, Q=3), {"right": 0, "lower_right": True, "softcap": 3.0}
    whole = run(*tensors, parts=1, **options)
    for parts in (2, 20):
        for got, one in zip(run(*tensors, parts=parts, **options), whole, strict=True):
            torch.testing.assert_close(got, one, rtol=1e-5, atol=1e-6)


def test_same_bits_every_time() -> None:
    tensors = qkv(B=1, K=400, dtype=torch.bfloat16)
    first = run(*tensors, parts=5)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(run(*tensors, parts=5), first, strict=True))


def test_cache_is_read_where_it_lies() -> None:
    q, k, v = qkv(Q=3)
    expected = run(q, k, v, right=0, lower_right=True)
    caches = []
    for t in (k, v):  # [T, B, M, D], longer than what is filled, as a cache may be
        cache = torch.full((333, 2, 2, 40), torch.nan, device=DEVICE)
        cache[50:250, :, :, 3:19] = t.permute(2, 0, 1, 3)
        caches.append(cache[50:250, :, :, 3:19].permute(1, 2, 0, 3))
    assert all(
        torch.equal(a, b) for a, b in zip(run(q, *caches, right=0, lower_right=True), expected, strict=True)
    )  # fmt: skip
    columns = [t.mT.contiguous().mT for t in (q, k, v)]
    assert all(torch.equal(a, b) for a, b in zip(run(*columns, right=0, lower_right=True), expected, strict=True))


def test_bias_and_mask_are_read_where_they_lie() -> None:
    tensors = qkv(Q=3)
    bias, mask = draw(2, 4, 3, 200), draw(2, 4, 3, 200) > 0
    expected = run(*tensors, bias, mask)
    wide = torch.full((3, 2, 4, 500), torch.nan, device=DEVICE)
    wide[..., 20:420:2] = bias.permute(2, 0, 1, 3)
    got = run(*tensors, wide[..., 20:420:2].permute(1, 2, 0, 3), mask.mT.contiguous().mT)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_who_sees_nothing_gets_zeros() -> None:
    for options in ({"K": 0}, {"right": 5, "lower_right": True, "Q": 5, "K": 3}, {"left": 3, "right": 0}):
        sizes = {name: options.pop(name) for name in ("K", "Q") if name in options}
        check(*qkv(**sizes), **options)
    q, k, v = qkv(K=0)
    out, lse = run(q, k, v)
    assert not out.any()
    assert lse.isneginf().all()
    assert run(q[:, :, :0], k, v)[0].shape == (2, 4, 0, 16)
    assert run(q[:0], k[:0], v[:0])[1].shape == (0, 4, 2)

    mask = torch.ones(2, 4, 2, 200, dtype=torch.bool, device=DEVICE)
    mask[1], mask[0, 1, 1] = False, False
    check(*qkv(), mask=mask)
    check(*qkv(), bias=torch.zeros(mask.shape, device=DEVICE).masked_fill(~mask, -torch.inf))


def test_the_least_number_is_a_bias() -> None:
    """With which some hide keys; a row of nothing else sees all alike."""
    mask = draw(1, 4, 2, 200) > 0
    mask[0, 1, 1] = False
    for dtype in DTYPES:
        bias = torch.zeros(mask.shape, dtype=dtype, device=DEVICE).masked_fill(~mask, torch.finfo(dtype).min)
        check(*qkv(B=1, dtype=dtype), bias=bias)


@pytest.mark.parametrize(("dtype", "bad"), [(torch.float32, torch.nan), (torch.bfloat16, torch.inf)])
def test_what_is_hidden_has_no_influence(dtype: torch.dtype, bad: float) -> None:
    q, k, v = qkv(Q=3, K=200, dtype=dtype)
    by_key = torch.arange(200, device=DEVICE) < 120
    by_query = by_key & (draw(2, 4, 3, 200) > 0)
    hiding = [{"mask": by_key.view(1, 1, 1, 200)}, {"mask": by_query}]
    hiding += [{"right": 119}, {"right": 119, "mask": by_query}]  # the last query alone sees to key 121
    for options in hiding:
        expected = run(q, k, v, **options)
        hidden_k, hidden_v = k.clone(), v.clone()
        hidden_k[:, :, 122:], hidden_v[:, :, 122:] = bad, bad
        got = run(q, hidden_k, hidden_v, **options)
        assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_who_sees_nan_gets_nan() -> None:
    q, k, v = qkv(Q=3, K=200)
    v[0, 0, 198, 5], k[1, 1, 199], q[0, 3, 1, 2] = torch.nan, torch.nan, torch.nan
    mask = draw(2, 4, 3, 200) > -0.5
    for options in ({"right": 0, "lower_right": True}, {"mask": mask}, {}):
        (out, lse), (exact, exact_lse) = run(q, k, v, **options), define(q, k, v, **options)
        assert torch.equal(out.isnan(), exact.isnan())
        assert torch.equal(lse.isnan(), exact_lse.isnan())
        torch.testing.assert_close(out, exact, rtol=1e-4, atol=1e-5, equal_nan=True)


def test_everything_dropped_is_zero() -> None:
    out, lse = run(*qkv(), dropout_p=1.0)
    assert not out.any()
    assert lse.isfinite().all()


def test_splits_fill_the_device_and_no_more() -> None:
    every = decode.multiprocessors(DEVICE)

    def of(B: int = 1, M: int = 8, Q: int = 1, N: int = 8, K: int = 8192, left: int = -1, right: int = -1) -> int:
        return splits(B, M, Q, N, K, left, right, True, DEVICE)

    assert of() == min(2 * every // 8, 8192 // LEAST)
    assert of(K=LEAST) == 1
    assert of(K=3 * LEAST) == 3
    assert of(B=2 * every) == 1
    assert of(B=2 * every, N=32) == 2  # the group's heads then read their keys together
    assert of(Q=ROWS) > 1
    assert of(Q=ROWS + 1) == of(Q=ROWS // 2, N=24) == 1
    assert of(left=4 * LEAST - 1, right=0) == of(K=4 * LEAST)  # keys out of sight do not count
    assert of(B=0) == of(K=0) == of(Q=0) == of(M=0, N=0) == 1
    for B, K in itertools.product((1, 2, 3, 8, 50), (1000, 5000, 100_000)):
        assert of(B=B, K=K) * B * 8 <= max(2 * every, B * 8)


class Recorder:
    """A kernel that notes what it is launched with."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, []

    def __getitem__(self, grid: Any) -> Any:
        def launch(**arguments: Any) -> None:
            self.launches.append(arguments)
            self.kernel[grid](**arguments)

        return launch


def test_configurations_are_what_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ("decode_forward_kernel", "decode_combine_kernel")
    recorders = {name: Recorder(getattr(decode, name)) for name in kernels}
    for name, recorder in recorders.items():
        monkeypatch.setattr(decode, name, recorder)
    run(*qkv(N=8, M=1, Q=1, D=64, E=64, dtype=torch.bfloat16))
    mask = torch.ones(2, 16, 8, 200, dtype=torch.bool, device=DEVICE)
    everything = {"left": 50, "right": 0, "lower_right": True, "softcap": 2.0, "dropout_p": 0.3}
    run(*qkv(N=16, Q=8, D=64, E=64, dtype=torch.bfloat16), draw(*mask.shape).bfloat16(), mask, **everything)
    monkeypatch.undo()

    published = list(decode.configurations(limits(DEVICE)))
    assert len({c["name"] for c in published}) == len(published)
    for recorder in recorders.values():
        varying = [p for p in inspect.signature(recorder.kernel.fn).parameters if not p.isupper()]
        for launch in recorder.launches:
            options = {name: launch[name] for name in ("num_warps", "num_stages") if name in launch}
            pointers = {
                p: "*" + NAMES[launch[p].dtype] for p in varying if isinstance(launch[p], Tensor)
            }  # fmt: skip
            constants = {p: x for p, x in launch.items() if p not in {*varying, *options, *OPTIONS, "N", "Q", "K", "S"}}
            constants |= {p: None for p in varying if launch[p] is None}
            assert any(
                c["fn"] is recorder.kernel
                and {p: kind for p, kind in c["signature"].items() if kind.startswith("*")} == pointers
                and constants.items() <= c["constexprs"].items()
                and options.items() <= c.items()
                for c in published
            ), constants


def test_lengths_are_not_compiled_in() -> None:
    """What varies from call to call is neither compile-time nor looked at; strides are looked at."""
    for kernel in (decode.decode_forward_kernel, decode.decode_combine_kernel):
        parameters = inspect.signature(kernel.fn).parameters
        never = kernel.kwargs["do_not_specialize"] if hasattr(kernel, "kwargs") else kernel.do_not_specialize
        looked_at = {n for n, p in parameters.items() if p.annotation is inspect.Parameter.empty} - set(never)
        floats = {"scale", "softcap", "log2_unit", "log_unit", "kept"}
        assert all(name.startswith("stride_") or name.endswith("_ptr") for name in looked_at - floats)
