"""The cases of the attention benchmarks: the function, decoding, and the modules, against torch's own ways.

Letters: B batch, N heads, M key heads (0: as many), Q and K queries and keys, D width of a head, E that of a value
(0: as wide). Features are words joined by ``+``: ``causal``, ``padding`` (a bool mask of keys), ``dense`` (a
constant float mask), ``bias`` (learned: it gets a gradient), ``t5`` and ``xl`` (T5's and Transformer-XL's relative
positions, learned too), ``dropout``, ``weights`` (returned, averaged over the heads), ``window``, ``softcap``.
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import attention_ways as ways
import torch
from attention_ways import Inputs
from contest import MODES, Contest, flat, implementations_of, random
from torch import Tensor, nn

import fastseq
from fastseq import functional

WORDS = ("causal", "padding", "dense", "bias", "t5", "xl", "dropout", "weights", "window", "softcap")
SOFTCAP = 5.0  # low enough to bend scores of order 1 by more than a rounding
DROPOUT = 0.1
FLEX_FROM = 1024  # keys: compiling FlexAttention takes seconds for each case, and below it has no users


@dataclass(frozen=True)
class Attention:
    """One benchmark: ``kind`` is ``attention``, ``decode`` (few queries, many keys), ``mha`` or ``encoder``."""

    kind: str
    B: int
    N: int
    Q: int
    K: int
    D: int
    feature: str = "plain"
    dtype: str = "float32"
    mode: str = "forward"
    M: int = 0
    E: int = 0

    @property
    def name(self) -> str:
        heads = f"N{self.N}" + (f":{self.M}" if self.M else "")
        width = f"D{self.D}" + (f":{self.E}" if self.E else "")
        lengths = f"S{self.Q}" if self.Q == self.K else f"Q{self.Q}-K{self.K}"
        return "-".join([self.kind, self.feature, f"B{self.B}", heads, lengths, width, self.dtype, self.mode])

    @property
    def steps(self) -> int:
        return 1

    @property
    def features(self) -> frozenset[str]:
        return frozenset(self.feature.split("+")) & frozenset(WORDS)

    @property
    def window(self) -> int:
        """Keys to the left, and without ``causal`` to the right as well."""
        return min(256, max(1, self.K // 4))

    @property
    def band(self) -> tuple[int, int]:
        left = self.window if "window" in self.features else -1
        return left, 0 if "causal" in self.features else left

    @property
    def flops(self) -> float:
        """Of the products with scores that the band shows, half of all when causal, as is the custom; padding counts.

        A backward pass of attention counts as 2.5 forward ones: it makes the scores again. The projections and
        the feed-forward network of the modules are added, with a backward pass of two.
        """
        left, right = self.band
        share = 0.5 if left < 0 and right == 0 else 1.0
        if left >= 0:
            share = min(1.0, (left + 1 + max(right, 0)) / self.K)
        of_scores = self.D * (2 if "xl" in self.features else 1)
        scores = 2.0 * self.B * self.N * self.Q * self.K * share * (of_scores + (self.E or self.D))
        width = self.N * self.D
        products = 2.0 * self.B * self.Q * width**2 * {"mha": 4, "encoder": 12}.get(self.kind, 0)
        return scores * 3.5 + products * 3 if self.mode == "train" else scores + products

    @property
    def moved(self) -> float:
        """Keys and values, which decoding reads once; padding counts."""
        if self.kind != "decode":
            return 0.0
        size = getattr(torch, self.dtype).itemsize
        return float(self.B * (self.M or self.N) * self.K * (self.D + (self.E or self.D)) * size)

    @property
    def family(self) -> str:
        return f"{self.kind}-{self.feature}-D{self.D}"

    @property
    def needs(self) -> frozenset[str]:
        more = {"attention_decode"} if self.kind == "decode" else set()
        more |= {"relative"} if self.features & {"t5", "xl"} else set()
        return frozenset({"attention_forward", *more} | ({"attention_backward"} if self.mode == "train" else set()))

    @property
    def flexed(self) -> bool:
        """Whether FlexAttention takes part on a GPU, if it can do the case."""
        return self.kind in ("attention", "decode") and self.dtype == "bfloat16" and self.K >= FLEX_FROM

    def compiled(self) -> "Attention":
        if self.kind == "decode":  # the number of keys decides how it is split
            return self
        many = 256 if self.Q > 64 else self.Q
        groups = self.N // (self.M or self.N)
        return replace(self, B=2, N=2 * groups, M=2 if self.M else 0, Q=many, K=many if self.Q == self.K else self.K)

    def contest(self, device: str = "cpu", implementations: tuple[str, ...] = ("auto",)) -> Contest:
        """Torch's own ways, and ours once per implementation (``auto`` is called ``fastseq``)."""
        torch.manual_seed(self.K + self.B)
        build = _module if self.kind in _MODULES else _function
        return build(self, device, implementations)


def inputs_of(case: Attention, device: str) -> Inputs:
    """Tensors as modules make them: heads are a view of ``[B, T, N, D]``. Rows are half to fully unpadded."""
    B, N, M, Q, K, D = case.B, case.N, case.M or case.N, case.Q, case.K, case.D
    train = case.mode == "train"

    def heads(T: int, N: int, D: int) -> Tensor:
        return random(case.dtype, device, B, T, N, D).transpose(1, 2).requires_grad_(train)

    def asked(word: str) -> bool:
        return word in case.features

    def learned(word: str, *shape: int) -> Tensor | None:
        return random(case.dtype, device, *shape).requires_grad_(train) if asked(word) else None

    E = case.E or D
    left, right = case.band
    return Inputs(
        heads(Q, N, D), heads(K, M, D), heads(K, M, E), heads(Q, N, E).detach(),
        padding=_padding(B, K, device)[:, None, None] if asked("padding") else None,
        dense=random(case.dtype, device, B, 1, Q, K) if asked("dense") else None,
        bias=learned("bias", 1, N, Q, K), table=learned("t5", 32, N),
        r=learned("xl", K, N, D), u=learned("xl", N, D), w=learned("xl", N, D),
        seed=torch.tensor([1], device=device) if asked("dropout") else None,
        left=left, right=right,
        softcap=SOFTCAP if asked("softcap") else 0.0,
        dropout_p=DROPOUT if asked("dropout") else 0.0,
        weights=asked("weights"),
    )  # fmt: skip


def _padding(B: int, K: int, device: str) -> Tensor:
    """Bool ``[B, K]``, true for tokens: rows of K/2 to K of them, the first one the shortest."""
    lengths = torch.linspace(K / 2, K, B, device=device).ceil()
    return torch.arange(K, device=device) < lengths[:, None]


def _function(case: Attention, device: str, names: tuple[str, ...]) -> Contest:
    inputs, train = inputs_of(case, device), case.mode == "train"
    default = ways.sdpa(inputs)
    torch_runs = "formula"
    if default is not None:
        with torch.set_grad_enabled(train):
            torch_runs = ways.chosen_backend(inputs)
    sides = {"torch": ways.trained(inputs, default or ways.formula(inputs), train)}
    setups: dict[str, Callable[[], object]] = {}
    cannot: dict[str, str] = {}
    if device != "cpu":
        if default is not None:
            setups["torch"] = lambda: ways.enable(*ways.ENABLED)
            for backend in ways.BACKENDS:
                sides[backend], setups[backend] = sides["torch"], lambda backend=backend: ways.enable(backend)
        if case.flexed:
            run = ways.flex(inputs, compiled=True)
            if run is not None:
                sides["flex"] = ways.trained(inputs, run, train)
        for side in [side for side in sides if side != "torch"]:
            reason = _reason_not_to_run(sides[side], setups.get(side), train)
            if reason is not None:
                cannot[side] = reason
                del sides[side]
        setups.get("torch", lambda: None)()
    mine = implementations_of(ways.trained(inputs, _ours(case, inputs), train), names)
    stand_in = None
    if inputs.dropout_p:
        stand_in = lambda: ways.in_pieces(inputs, inputs.query.dtype, train)  # noqa: E731  (as short as it gets)
    return Contest(
        case, sides | mine,
        exact=lambda: ways.in_pieces(inputs, torch.float64, train),
        explain=lambda: functional.choose_attention(inputs.query, inputs.value, bool(case.features)),
        ours=tuple(mine), setups=setups, cannot=cannot, stand_in=stand_in,
        rounding=2.0**-10 if device != "cpu" and torch.backends.cuda.matmul.allow_tf32 else 0.0,
        facts={"torch_runs": torch_runs},
    )  # fmt: skip


def run_flex(case: Attention) -> None:
    """Compile FlexAttention for a case, to find it in the compiler's cache later."""
    inputs, train = inputs_of(case, "cuda"), case.mode == "train"
    run = ways.flex(inputs, compiled=True)
    if run is not None:
        with torch.set_grad_enabled(train):
            ways.trained(inputs, run, train)()
        torch.cuda.synchronize()


def _ours(case: Attention, inputs: Inputs) -> Callable[[], Any]:
    options: dict[str, Any] = {
        "attn_mask": inputs.dense if inputs.padding is None else inputs.padding,
        "dropout_p": inputs.dropout_p,
        "is_causal": "causal" in case.features,
        "enable_gqa": inputs.grouped,
    }
    more = {
        "bias": inputs.dense if inputs.bias is None and inputs.padding is not None else inputs.bias,
        "window": (inputs.left, inputs.right) if "window" in case.features else None,
        "softcap": inputs.softcap or None,
        "seed": inputs.seed,
        "return_weights": "mean" if inputs.weights else None,
    }
    options |= {name: value for name, value in more.items() if value is not None}
    if inputs.table is not None:
        options["bias"] = fastseq.bias.T5(inputs.table)
    if inputs.r is not None:
        options["bias"] = fastseq.bias.TransformerXL(inputs.r, inputs.u, inputs.w)
    return lambda: functional.scaled_dot_product_attention(inputs.query, inputs.key, inputs.value, **options)


def _reason_not_to_run(side: Callable[[], Any], setup: Callable[[], object] | None, train: bool) -> str | None:
    """What a backend says when asked for a case it has no kernel for, or no memory."""
    (setup or (lambda: None))()
    try:
        with torch.set_grad_enabled(train):
            side()
            torch.cuda.synchronize()
    except RuntimeError as refusal:
        torch.cuda.empty_cache()
        return f"{type(refusal).__name__}: {str(refusal).splitlines()[0]}"[:300]
    return None


_MODULES = {"mha": nn.MultiheadAttention, "encoder": nn.TransformerEncoderLayer}


def _module(case: Attention, device: str, names: tuple[str, ...]) -> Contest:
    """Modules on the same parameters, without dropout; ``forward`` is inference, so torch may take its fast path."""
    width, train = case.N * case.D, case.mode == "train"
    if case.kind == "mha":
        theirs: nn.Module = nn.MultiheadAttention(width, case.N, batch_first=True)
    else:
        theirs = nn.TransformerEncoderLayer(width, case.N, 4 * width, 0.0, "gelu", batch_first=True)
    theirs = theirs.to(device, getattr(torch, case.dtype)).train(train)
    ours = copy.deepcopy(theirs)
    assert len(fastseq.swap(ours)), f"{case.kind} was not swapped: torch would race against itself"
    for mine, other in zip(ours.modules(), theirs.modules(), strict=True):
        for name, parameter in other.named_parameters(recurse=False):
            setattr(mine, name, parameter)  # two copies of a weight differ in speed by where they lie
    x, dy = (random(case.dtype, device, case.B, case.Q, width) for _ in range(2))
    call = _keywords(case, device)

    def runner(module: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], Any]:
        inputs = (x, x, x) if case.kind == "mha" else (x,)
        if not train:
            return lambda: module(*inputs, **call)
        x = x.detach().requires_grad_()
        inputs, wanted = (x,) * len(inputs), [x, *module.parameters()]

        def both() -> Any:
            result = module(*inputs, **call)
            return result, torch.autograd.grad(result[0] if isinstance(result, tuple) else result, wanted, dy)

        return both

    def exact() -> Any:
        double = copy.deepcopy(theirs).double().train()  # no dropout; in training torch takes no fast path
        with torch.set_grad_enabled(train):
            return flat(runner(double, x.double(), dy.double())())

    mine = implementations_of(runner(ours, x, dy), names)
    inputs = (x, x, x) if case.kind == "mha" else (x,)
    return Contest(
        case, {"torch": runner(theirs, x, dy), **mine}, exact,
        explain=lambda: fastseq.explain(ours, *inputs, **call),
        ours=tuple(mine),
        rounding=2.0**-10 if device != "cpu" and torch.backends.cuda.matmul.allow_tf32 else 0.0,
        facts={"torch_runs": "module"},
    )  # fmt: skip


def _keywords(case: Attention, device: str) -> dict[str, Any]:
    """What the modules call masks: true is hidden."""
    mha = case.kind == "mha"
    call: dict[str, Any] = {"need_weights": "weights" in case.features} if mha else {}
    if "padding" in case.features:
        call["key_padding_mask" if mha else "src_key_padding_mask"] = ~_padding(case.B, case.K, device)
    if "causal" in case.features:
        call["attn_mask" if mha else "src_mask"] = torch.ones(case.Q, case.K, dtype=torch.bool, device=device).triu(1)
        call["is_causal"] = True
    return call


def grid(kind: str, features: tuple[str, ...], sizes: tuple[tuple[int, ...], ...], **more: Any) -> Iterator[Attention]:
    """Every feature at every size (B, N, S, D), inference and training."""
    for feature, (B, N, S, D), mode in product(features, sizes, MODES):
        yield Attention(kind, B, N, S, S, D, feature, mode=mode, **more)
