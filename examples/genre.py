"""Comedy or tragedy? The mood of a passage, by words alone, in plays that were never seen.

A bidirectional layer reads a passage of up to 100 words, and the largest value of each of its units over the passage
decides. Words count that half of the plays have, so that no name gives a play away.

    python examples/genre.py             # half a minute
    python examples/genre.py --cell gru --summary mean --device cuda
"""

import re
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import plays
from fastseq.models import SequenceToVector
from run import Run, command_line, picture, result

HELD_OUT = {"much-ado-about-nothing", "twelfth-night", "hamlet", "othello"}
WORDS = 100  # of a passage


def passages(play: str) -> list[list[str]]:
    """What is spoken in a play, without the speakers' names and the directions, in pieces."""
    spoken = re.sub(r"\*\*.*?\*\*|_.*?_|^#.*$", "", play, flags=re.MULTILINE)
    words = re.findall(r"[a-z]+(?:'[a-z]+)?", spoken.lower())
    return [words[at : at + WORDS] for at in range(0, len(words), WORDS)]


class Reader(torch.nn.Module):
    """Words ``[B, T]`` and lengths ``[B]`` to logits ``[B, 2]``."""

    def __init__(self, vocabulary: int, cell: str, summary: str) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, 32)
        self.dropout = torch.nn.Dropout(0.5)
        self.reader = SequenceToVector(32, 32, 2, cell, summary=summary, bidirectional=True)

    def forward(self, words: Tensor, lengths: Tensor) -> Tensor:
        return self.reader(self.dropout(self.embedding(words)), lengths)


def main() -> None:
    parser = command_line(__doc__, steps=300)
    parser.add_argument("--cell", choices=["rnn", "lstm", "gru"], default="lstm")
    parser.add_argument("--summary", choices=["last", "mean", "max"], default="max")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    kinds = plays()
    texts = {
        title: (passages(text), kind == "comedies")
        for kind in ("comedies", "tragedies", "roman")
        for title, text in kinds[kind].items()
    }
    seen = Counter(word for title in texts.keys() - HELD_OUT for word in {w for p in texts[title][0] for w in p})
    known = sorted(word for word, count in seen.items() if count >= len(texts) // 2)
    number = {word: i for i, word in enumerate(known, start=1)}  # 0: any other

    def batch(titles: set[str]) -> tuple[Tensor, Tensor, Tensor]:
        chosen = [(p, comic) for title in sorted(titles) for p in texts[title][0] for comic in [texts[title][1]]]
        words = pad_sequence([torch.tensor([number.get(w, 0) for w in p]) for p, _ in chosen], batch_first=True)
        lengths, comic = torch.tensor([len(p) for p, _ in chosen]), torch.tensor([int(comic) for _, comic in chosen])
        return words.to(options.device), lengths.to(options.device), comic.to(options.device)

    words, lengths, comic = batch(texts.keys() - HELD_OUT)
    model = Reader(len(known) + 1, options.cell, options.summary).to(options.device)
    run = Run(options, model, torch.optim.Adam(model.parameters(), lr=2e-3, weight_decay=1e-4))
    weight = 1 / torch.bincount(comic)  # the plays of a kind together count the same
    for _ in run:
        chosen = torch.randint(len(words), (64,), generator=run.generator)
        loss = F.cross_entropy(model(words[chosen], lengths[chosen]), comic[chosen], weight)
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.report(loss)

    model.eval()
    words, lengths, comic = batch(HELD_OUT)
    with torch.no_grad():
        right = (model(words, lengths).argmax(-1) == comic).float()
    rates = [right[comic == kind].mean().item() for kind in (0, 1)]
    print(f"of {len(words)} passages from {', '.join(sorted(HELD_OUT))}:")
    print(f"rightly called tragic {rates[0]:.3f}, comic {rates[1]:.3f}; {len(known)} words known")
    picture(options.output / "genre.png", {"training": run.losses}, title="Comedy?", xlabel="step", ylabel="loss")
    result("balanced accuracy", sum(rates) / 2)


if __name__ == "__main__":
    main()
