"""Who says the vowel? Nine men say /ae/, in 7 to 29 frames of 12 coefficients (Kudo et al. 1999).

Sequences of different lengths go through a bidirectional layer in one batch: ``lengths=`` says where each ends, and
the backward direction starts there.

    python examples/vowels.py            # a few seconds
    python examples/vowels.py --cell gru --summary max --device cuda
"""

import torch
import torch.nn.functional as F

from data import vowels
from fastseq.models import SequenceToVector
from run import Run, command_line, picture, result


def main() -> None:
    parser = command_line(__doc__, steps=300)
    parser.add_argument("--cell", choices=["rnn", "lstm", "gru"], default="lstm")
    parser.add_argument("--summary", choices=["last", "mean", "max"], default="last")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    x, lengths, speaker = (t.to(options.device) for t in vowels("TRAIN"))  # [270, 29, 12], [270], [270]

    model = SequenceToVector(12, 48, 9, options.cell, summary=options.summary, bidirectional=True).to(options.device)
    run = Run(options, model, torch.optim.Adam(model.parameters(), lr=3e-3, weight_decay=1e-4))
    for _ in run:
        chosen = torch.randint(len(x), (32,), generator=run.generator)
        loss = F.cross_entropy(model(x[chosen], lengths[chosen]), speaker[chosen])
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.report(loss)

    x, lengths, speaker = (t.to(options.device) for t in vowels("TEST"))
    with torch.no_grad():
        accuracy = (model(x, lengths).argmax(-1) == speaker).float().mean().item()
    picture(options.output / "vowels.png", {"training": run.losses}, title="Vowels", xlabel="step", ylabel="loss")
    result("accuracy", accuracy)


if __name__ == "__main__":
    main()
