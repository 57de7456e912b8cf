"""Attention: the function, decoding and the modules beside what a torch user writes for the same."""

from attention_cases import Attention, grid

SIDES = ("torch", "fastseq")
FEATURES = ("plain", "causal", "padding", "causal+padding", "dense", "bias", "dropout", "weights", "window", "softcap",
            "t5", "causal+xl")  # fmt: skip
DECODE = [
    Attention("decode", B, 32, 1, K, 128, feature, M=8)
    for feature in ("plain", "padding")
    for B, K in ((1, 4096), (8, 1024))
]
DEFAULT = [
    *grid("attention", FEATURES, ((8, 12, 128, 64),)),
    *grid("attention", ("causal", "causal+padding", "bias"), ((1, 12, 512, 64),)),
    *DECODE,
    *grid("mha", ("padding", "weights"), ((8, 12, 128, 64),)),
    *grid("encoder", ("padding",), ((8, 12, 128, 64),)),
]
SIZES = tuple((B, 12, S, 64) for B in (1, 8, 32) for S in (128, 512))
LONG = ((1, 12, 2048, 64), (1, 16, 4096, 128))
FULL = [
    case
    for dtype in ("float32", "bfloat16", "float16")
    for case in (
        *grid("attention", FEATURES, SIZES + LONG, dtype=dtype),
        *grid("attention", ("plain", "padding"), SIZES, dtype=dtype, E=128),
        *grid("attention", ("causal", "causal+padding"), SIZES + LONG, dtype=dtype, M=4),
        *grid("mha", ("plain", "padding", "causal", "weights"), SIZES, dtype=dtype),
        *grid("encoder", ("plain", "padding", "causal"), SIZES, dtype=dtype),
    )
] + DECODE


def test_attention(race, case: Attention, side: str) -> None:
    race(case, side)
