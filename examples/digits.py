"""Digits read row by row: RNN, LSTM and GRU side by side.

An image of 8 x 8 pixels is a sequence of 8 rows; the state after the last says which digit it is. The pictures held
out for the test were drawn by other people than those in the training.

    python examples/digits.py            # a few seconds
    python examples/digits.py --device cuda --steps 2000
"""

from argparse import Namespace

import torch
import torch.nn.functional as F
from torch import Tensor

from data import digits
from fastseq.models import SequenceToVector
from run import Run, command_line, picture, result

HELD_OUT = 397  # of 1797 images, the last ones


def train(cell: str, images: Tensor, labels: Tensor, options: Namespace) -> tuple[SequenceToVector, list[float]]:
    torch.manual_seed(options.seed)
    model = SequenceToVector(8, 64, 10, cell).to(options.device)
    run = Run(options, model, torch.optim.Adam(model.parameters(), lr=3e-3), name=cell)
    for _ in run:
        chosen = torch.randint(len(images), (64,), generator=run.generator)
        loss = F.cross_entropy(model(images[chosen]), labels[chosen])
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.report(loss)
    return model, run.losses


def main() -> None:
    options = command_line(__doc__, steps=500).parse_args()
    images, labels = (t.to(options.device) for t in digits())
    curves, accuracy = {}, {}
    for cell in ("rnn", "lstm", "gru"):
        model, curves[cell] = train(cell, images[:-HELD_OUT], labels[:-HELD_OUT], options)
        with torch.no_grad():
            right = model(images[-HELD_OUT:]).argmax(-1) == labels[-HELD_OUT:]
        accuracy[cell] = right.float().mean().item()
        print(f"{cell}: {accuracy[cell]:.3f} of the digits held out are read rightly")
    picture(options.output / "digits.png", curves, title="Digits, row by row", xlabel="step", ylabel="loss")
    result("lowest accuracy", min(accuracy.values()))


if __name__ == "__main__":
    main()
