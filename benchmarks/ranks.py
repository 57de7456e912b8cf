"""What runs on a GPU, the most informative first: the lower the sum of a case's ranks, the earlier it is timed."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from attention_cases import Attention
from contest import MODES, Case
from recurrent_cases import Recurrent

RECURRENT: dict[str, dict[Any, int]] = {
    "cell": {"lstm": 0, "gru": 1, "rnn": 3},
    "dtype": {"bfloat16": 0, "float16": 1, "float32": 2},
    "H": {512: 0, 256: 1, 1024: 1, 128: 2, 768: 3, 64: 3},
    "B": {16: 0, 64: 1, 1: 1, 128: 2},
    "T": {1024: 0, 128: 2},
}
STACKS = {(1, 1): 0, (2, 1): 3, (1, 2): 3}  # (layers, directions)

DTYPES = {"bfloat16": 0, "float32": 2, "float16": 3}
FEATURES = {
    "causal": 0, "padding": 0, "plain": 1, "causal+padding": 1, "bias": 1, "bias+padding": 2, "dropout": 2,
    "dense": 2, "causal+window": 2, "weights": 3, "softcap": 3, "window": 4,
    "t5": 0, "causal+xl": 0, "t5+padding": 3,
}  # fmt: skip
# They hold a whole matrix of scores, or are checked as one.
QUADRATIC = {"bias", "bias+padding", "dense", "weights", "t5", "t5+padding", "causal+xl"}
SIZES = {  # (B, N, S, D): BERT's, and long ones
    (8, 12, 512, 64): 0, (4, 16, 4096, 128): 0, (32, 12, 128, 64): 1, (1, 16, 16384, 128): 1, (4, 16, 4096, 64): 2,
    (32, 12, 512, 64): 2, (1, 12, 512, 64): 2, (8, 16, 1024, 128): 3, (1, 12, 128, 64): 3, (1, 16, 16384, 64): 3,
}  # fmt: skip
LONGEST_QUADRATIC = 4096
GROUPED = {(4, 32, 4096, 128): 1, (8, 32, 1024, 128): 2}  # served by 8 key heads
UNEQUAL = {(2, 16, 4096, 192, 128): 3, (8, 12, 512, 64, 128): 4}  # (B, N, S, D, E)
DECODE = {  # (B, N, M, Q, K, D)
    (1, 32, 8, 1, 16384, 128): 0, (16, 32, 8, 1, 4096, 128): 1, (64, 32, 8, 1, 1024, 128): 2,
    (16, 16, 0, 1, 4096, 64): 3, (16, 32, 8, 4, 4096, 128): 3,
}  # fmt: skip
MODULES = {("mha", "padding"): 1, ("encoder", "padding"): 1, ("mha", "weights"): 2, ("encoder", "causal"): 3}
MODULE_SIZES = {(8, 12, 512, 64): 0, (32, 12, 128, 64): 1}


def every_case(smoke: bool) -> list[Case]:
    """All cases in the order of their information, both kinds in turn; inference and training side by side."""
    kinds = []
    for ranked in (_attention(), _recurrent()):
        ordered = [case for _, case in sorted(ranked, key=lambda pair: pair[0])]
        kinds.append(_tiny(ordered) if smoke else ordered)
    turns = itertools.chain.from_iterable(itertools.zip_longest(*kinds))
    return [
        replace(case, mode=mode)
        for case in turns
        if case is not None
        for mode in (MODES if case.kind != "decode" else ("forward",))
    ]


def _recurrent() -> Iterator[tuple[int, Recurrent]]:
    for values in itertools.product(*RECURRENT.values()):
        sizes = dict(zip(RECURRENT, values, strict=True))
        rank = sum(RECURRENT[axis][value] for axis, value in sizes.items())
        for (layers, directions), more in STACKS.items():
            yield rank + more, Recurrent("layer", **sizes, layers=layers, directions=directions)
        if sizes["T"] == 1024:
            yield rank + 2, Recurrent("step", **sizes | {"T": 1})
        if sizes["dtype"] == "bfloat16" and sizes["H"] in (256, 512):
            yield rank + 2, Recurrent("reset", **sizes)


def _attention() -> Iterator[tuple[int, Attention]]:
    for dtype, rank in DTYPES.items():
        for (feature, more), ((B, N, S, D), size) in itertools.product(FEATURES.items(), SIZES.items()):
            if S <= LONGEST_QUADRATIC or feature not in QUADRATIC:
                yield rank + more + size, Attention("attention", B, N, S, S, D, feature, dtype)
        for (B, N, S, D), size in GROUPED.items():
            yield rank + size, Attention("attention", B, N, S, S, D, "causal", dtype, M=8)
            yield rank + size + 1, Attention("attention", B, N, S, S, D, "causal+padding", dtype, M=8)
        for (B, N, S, D, E), size in UNEQUAL.items():
            yield rank + size, Attention("attention", B, N, S, S, D, "causal", dtype, E=E)
        for (B, N, M, Q, K, D), size in DECODE.items():
            yield rank + size, Attention("decode", B, N, Q, K, D, "plain", dtype, M=M)
            yield rank + size + 1, Attention("decode", B, N, Q, K, D, "padding", dtype, M=M)
        for ((kind, feature), more), ((B, N, S, D), size) in itertools.product(MODULES.items(), MODULE_SIZES.items()):
            yield rank + more + size, Attention(kind, B, N, S, S, D, feature, dtype)


def _tiny(cases: list[Any]) -> list[Any]:
    """One case of each sort, in sizes that run anywhere."""
    sorts: dict[tuple[Any, ...], Any] = {}
    for case in cases:
        if isinstance(case, Recurrent):
            small = replace(case, B=2, T=min(case.T, 4), H=8)
            sorts.setdefault((case.kind, case.cell, case.layers, case.directions), small)
        else:
            small = replace(case, B=2, N=4, M=2 if case.M else 0, Q=min(case.Q, 24), K=40 if case.Q < case.K else 24)
            small = replace(small, D=16, E=8 if case.E else 0)
            sorts.setdefault((case.kind, case.feature, bool(case.M), bool(case.E)), small)
    return list(sorts.values())
