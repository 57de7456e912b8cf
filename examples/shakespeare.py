"""Shakespeare, character by character: a language model by LSTM, GPT-2 or Transformer-XL.

The text is read in parallel streams, a stretch of each at every step. The LSTM's state and Transformer-XL's memory
go on from stretch to stretch; GPT-2 begins each anew.

    python examples/shakespeare.py                         # LSTM, a minute
    python examples/shakespeare.py --model gpt
    python examples/shakespeare.py --model transformer_xl --device cuda --steps 20000 --width 512 --layers 6 --time 256
"""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import fastseq
from data import plays
from fastseq.models import GPT2Config, GPT2LMHeadModel, TransformerXL, TransformerXLConfig, generate
from run import Run, command_line, picture, result

PROMPT = "The "
HELD_OUT = 100_000  # characters, the last


class Recurrent(torch.nn.Module):
    """Tokens ``[B, T]`` and a state to logits ``[B, T, V]`` and the next state."""

    def __init__(self, vocabulary: int, width: int, layers: int, time: int) -> None:
        super().__init__()
        self.embedding = torch.nn.Embedding(vocabulary, width)
        self.rnn = fastseq.LSTM(width, width, layers, batch_first=True, forget_bias=1.0)
        self.head = torch.nn.Linear(width, vocabulary)

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        y, state = self.rnn(self.embedding(tokens), state)
        return self.head(y), tuple(s.detach() for s in state)

    def write(self, prompt: Tensor, **options: Any) -> Tensor:
        state = None

        def step(tokens: Tensor) -> Tensor:
            nonlocal state
            logits, state = self(tokens, state)
            return logits[:, -1]

        return generate(step, prompt, **options)


class GPT(torch.nn.Module):
    """The same without a state: a Transformer that sees its own stretch."""

    def __init__(self, vocabulary: int, width: int, layers: int, time: int) -> None:
        super().__init__()
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        self.model = GPT2LMHeadModel(GPT2Config(vocabulary, time, width, layers, max(1, width // 32), **none))

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model(tokens), None

    def write(self, prompt: Tensor, **options: Any) -> Tensor:
        return self.model.generate(prompt, **options)


class XL(torch.nn.Module):
    """The same with a memory: a Transformer that sees the states of the stretch before, too."""

    def __init__(self, vocabulary: int, width: int, layers: int, time: int) -> None:
        super().__init__()
        heads = max(1, width // 32)
        sizes = {"d_model": width, "n_head": heads, "d_head": width // heads, "d_inner": 4 * width, "n_layer": layers}
        self.model = TransformerXL(TransformerXLConfig(vocabulary, **sizes, mem_len=time, dropout=0.0))

    def forward(self, tokens: Tensor, state: Any = None) -> tuple[Tensor, Any]:
        return self.model(tokens, state)

    def write(self, prompt: Tensor, **options: Any) -> Tensor:
        return self.model.generate(prompt, **options)


MODELS = {"lstm": (Recurrent, 4e-3), "gpt": (GPT, 2e-3), "transformer_xl": (XL, 2e-3)}


def streams(tokens: Tensor, rows: int, time: int) -> list[Tensor]:
    """A text ``[N]`` as stretches ``[rows, time + 1]``; each begins with the last token of the one before."""
    width = (len(tokens) - 1) // rows
    text = torch.stack([tokens[row * width : (row + 1) * width + 1] for row in range(rows)])
    return [text[:, at : at + time + 1] for at in range(0, width - time + 1, time)]


@torch.no_grad()
def bits(model: torch.nn.Module, stretches: list[Tensor]) -> float:
    """How many bits a character costs."""
    state, total = None, 0.0
    for stretch in stretches:
        logits, state = model(stretch[:, :-1], state)
        total += F.cross_entropy(logits.flatten(0, 1), stretch[:, 1:].flatten()).item()
    return total / len(stretches) / math.log(2)


def main() -> None:
    parser = command_line(__doc__, steps=300)
    parser.add_argument("--model", choices=list(MODELS), default="lstm")
    parser.add_argument("--width", type=int, default=128)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--time", type=int, default=64, help="characters of a stretch (default: %(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    text = "\n".join(re.sub(r"[*_#]|  $", "", play, flags=re.M) for kind in plays().values() for play in kind.values())
    vocabulary = sorted(set(text))
    number = {character: i for i, character in enumerate(vocabulary)}
    tokens = torch.tensor([number[character] for character in text], device=options.device)
    stretches = streams(tokens[:-HELD_OUT], options.batch, options.time)

    build, rate = MODELS[options.model]
    model = build(len(vocabulary), options.width, options.layers, options.time).to(options.device)
    run = Run(options, model, torch.optim.Adam(model.parameters(), lr=rate))
    for step in run:
        stretch = stretches[step % len(stretches)]
        logits, run.state = model(stretch[:, :-1], run.state if step % len(stretches) else None)
        loss = F.cross_entropy(logits.flatten(0, 1), stretch[:, 1:].flatten())
        run.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        run.optimizer.step()
        run.report(loss)

    model.eval()
    prompt = torch.tensor([[number[c] for c in PROMPT]], device=options.device)
    generator = torch.Generator(options.device).manual_seed(options.seed)
    said = model.write(prompt, max_new_tokens=options.time - len(PROMPT), temperature=0.7, generator=generator)
    print("".join(vocabulary[i] for i in said[0].tolist()))
    picture(
        options.output / f"shakespeare-{options.model}.png", {options.model: run.losses}, xlabel="step", ylabel="loss"
    )
    result("bits per character", bits(model, streams(tokens[-HELD_OUT:], 50, options.time)))


if __name__ == "__main__":
    main()
