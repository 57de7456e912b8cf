"""How is it spoken? From the letters of a word to its phonemes, with attention, on words never seen in training.

python examples/g2p.py                                 # LSTM with attention (Bahdanau et al. 2015), half a minute
python examples/g2p.py --model transformer
python examples/g2p.py --device cuda --steps 20000 --hidden 512 --batch 512
"""

import argparse

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from data import edit_distance, pronunciations
from fastseq.models import Seq2Seq, Seq2SeqConfig, Transformer, TransformerConfig
from run import Run, command_line, picture, result

PAD, START, END = 0, 1, 2  # in both vocabularies
HELD_OUT = 2000  # words


class Vocabulary:
    """Symbols and their numbers."""

    def __init__(self, symbols: list[str]) -> None:
        self.symbols = ["<pad>", "<start>", "<end>", *symbols]
        self.numbers = {symbol: number for number, symbol in enumerate(self.symbols)}

    def encode(self, sequences: list[list[str]]) -> tuple[Tensor, Tensor]:
        """Padded sequences ``[B, T]``, each with its end, and their lengths ``[B]``."""
        rows = [torch.tensor([*(self.numbers[s] for s in sequence), END]) for sequence in sequences]
        return pad_sequence(rows, batch_first=True, padding_value=PAD), torch.tensor([len(row) for row in rows])

    def decode(self, tokens: Tensor) -> list[list[str]]:
        """The symbols of each row, up to its end."""
        rows = [row[: row.index(END)] if END in row else row for row in tokens.tolist()]
        return [[self.symbols[number] for number in row] for row in rows]


class Recurrent(torch.nn.Module):
    """An LSTM reads in both directions, another writes and looks back at what was read."""

    def __init__(self, letters: int, phonemes: int, hidden: int) -> None:
        super().__init__()
        config = Seq2SeqConfig(
            letters, phonemes, hidden // 2, hidden, bidirectional=True, context="transform", attention="bahdanau"
        )
        self.model = Seq2Seq(config)

    def forward(self, words: Tensor, lengths: Tensor, spoken: Tensor) -> Tensor:
        return self.model(words, F.pad(spoken[:, :-1], (1, 0), value=START), lengths)

    def speak(self, words: Tensor, lengths: Tensor, beams: int) -> Tensor:
        return self.model.generate(words, lengths, start=START, end=END, pad=PAD, max_new_tokens=24, beams=beams)


class Attending(torch.nn.Module):
    """The same by attention alone."""

    def __init__(self, letters: int, phonemes: int, hidden: int) -> None:
        super().__init__()
        config = TransformerConfig(
            phonemes, letters, hidden, 4, 2, 2, 4 * hidden, pad_token_id=PAD, eos_token_id=END,
            decoder_start_token_id=START,
        )  # fmt: skip
        self.model = Transformer(config)

    def forward(self, words: Tensor, lengths: Tensor, spoken: Tensor) -> Tensor:
        return self.model(words, F.pad(spoken[:, :-1], (1, 0), value=START), words != PAD)

    def speak(self, words: Tensor, lengths: Tensor, beams: int) -> Tensor:
        return self.model.generate(words, words != PAD, max_new_tokens=24, beams=beams)[:, 1:]


MODELS = {"lstm": (Recurrent, 4e-3), "transformer": (Attending, 1e-3)}  # and how fast each learns


def options_() -> argparse.Namespace:
    parser = command_line(__doc__, steps=300)
    parser.add_argument("--model", choices=list(MODELS), default="lstm")
    parser.add_argument("--hidden", type=int, default=128)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--beams", type=int, default=1)
    parser.add_argument("--words", type=int, default=HELD_OUT, help="held out and tried (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    options = options_()
    torch.manual_seed(options.seed)
    dictionary = pronunciations()
    words = list(dictionary)
    words = [words[i] for i in torch.randperm(len(words), generator=torch.Generator().manual_seed(0))]
    held_out, words = words[:HELD_OUT][: options.words], words[HELD_OUT:]
    letters = Vocabulary(sorted({letter for word in words for letter in word}))
    phonemes = Vocabulary(sorted({phone for each in dictionary.values() for said in each for phone in said}))

    build, rate = MODELS[options.model]
    model = build(len(letters.symbols), len(phonemes.symbols), options.hidden).to(options.device)
    run = Run(options, model, torch.optim.Adam(model.parameters(), lr=rate))
    for step in run:
        for group in run.optimizer.param_groups:
            group["lr"] = rate * min(1.0, (step + 1) / 30, (options.steps - step) / options.steps + 0.05)
        chosen = torch.randint(len(words), (options.batch,), generator=run.generator).tolist()
        spelled, lengths = letters.encode([list(words[i]) for i in chosen])
        spoken, _ = phonemes.encode([dictionary[words[i]][0] for i in chosen])
        spelled, lengths, spoken = (t.to(options.device) for t in (spelled, lengths, spoken))
        logits = model(spelled, lengths, spoken)
        loss = F.cross_entropy(logits.flatten(0, 1), spoken.flatten(), ignore_index=PAD)
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.report(loss)

    model.eval()
    errors = length = 0
    for first in range(0, len(held_out), 500):
        part = held_out[first : first + 500]
        spelled, lengths = (t.to(options.device) for t in letters.encode([list(word) for word in part]))
        said = phonemes.decode(model.speak(spelled, lengths, options.beams))
        for word, phones in zip(part, said, strict=True):
            wrong, right = min((edit_distance(phones, each), len(each)) for each in dictionary[word])
            errors, length = errors + wrong, length + right
    for word, phones in list(zip(part, said, strict=True))[:5]:
        print(f"{word}: {' '.join(phones)}")
    picture(options.output / "g2p.png", {options.model: run.losses}, title="Spelling", xlabel="step", ylabel="loss")
    result("phoneme error", errors / length)


if __name__ == "__main__":
    main()
