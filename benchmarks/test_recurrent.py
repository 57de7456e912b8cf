"""Layers: fastseq.RNN, LSTM and GRU beside torch.nn's, forward and forward plus backward."""

from contest import MODES
from recurrent_cases import Recurrent, grid

SIDES = ("torch", "fastseq")
DEFAULT = [
    *(
        Recurrent("layer", cell, B, T, H, mode=mode)
        for cell in ("rnn", "lstm", "gru")
        for B, T, H in ((1, 32, 128), (16, 128, 128), (16, 32, 512))
        for mode in MODES
    ),
    *(
        Recurrent("layer", cell, 16, 32, 128, mode=mode, layers=2, directions=2)
        for cell in ("lstm", "gru")
        for mode in MODES
    ),
    *(Recurrent("layer", cell, 16, 32, 128, "bfloat16", mode) for cell in ("lstm", "gru") for mode in MODES),
]
SIZES = {"H": (64, 128, 256, 512, 768, 1024), "B": (1, 16, 64, 128), "T": (128, 1024)}
FULL = [
    *grid("layer", **SIZES, dtype=("float32", "bfloat16", "float16"), layers=(1, 2), directions=(1, 2)),
    *grid("layer", H=(64, 256, 512), B=(1, 16, 64), T=(32,)),
]


def test_layer(race, case: Recurrent, side: str) -> None:
    race(case, side)
