"""Single steps: RNNCell, LSTMCell and GRUCell beside torch.nn's. The small ones show the cost of a call."""

from recurrent_cases import Recurrent, grid

SIDES = ("torch", "fastseq")
DEFAULT = [*grid("step", B=(1, 64), T=(1,), H=(64, 512)), *grid("layer", B=(1,), T=(1,), H=(8,))]
FULL = [
    *grid("step", B=(1, 16, 64, 128), T=(1,), H=(64, 128, 256, 512, 1024), dtype=("float32", "bfloat16")),
    *grid("layer", B=(1,), T=(1,), H=(8,)),
]


def test_step(race, case: Recurrent, side: str) -> None:
    race(case, side)
