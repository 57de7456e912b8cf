"""BERT and GPT-2 beside transformers."""

import pytest
from model_cases import Model, grid

pytest.importorskip("transformers")

SIDES = ("torch", "fastseq")
DEFAULT = list(grid((("bert", 4, 128), ("gpt2", 2, 256))))
FULL = list(grid(tuple((kind, B, T) for kind in ("bert", "gpt2") for B in (1, 8) for T in (128, 512)), layers=12))


def test_models(race, case: Model, side: str) -> None:
    race(case, side)
