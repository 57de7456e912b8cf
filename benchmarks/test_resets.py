"""``reset=`` beside the ways around it: pad-and-split, a call per stretch, a Python loop over cells."""

from recurrent_cases import Recurrent, grid

SIDES = ("pad_and_split", "stretches", "python_loop", "fastseq")
DEFAULT = list(grid("reset", cells=("lstm", "gru"), B=(16,), T=(128,), H=(128,)))
FULL = list(grid("reset", B=(1, 16, 64, 128), T=(128, 1024), H=(64, 256, 512), density=(0.002, 0.02, 0.2)))


def test_reset(race, case: Recurrent, side: str) -> None:
    race(case, side)
