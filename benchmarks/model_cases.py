"""BERT and GPT-2 of ``fastseq.models`` beside those of transformers on PyTorch's own attention, the same weights."""

import copy
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from contest import MODES, Contest, flat, implementations_of
from torch import Tensor, nn

import fastseq
from fastseq import models

WIDTH, HEADS, VOCABULARY = 768, 12, 2000  # those of the base models, but for the words


@dataclass(frozen=True)
class Model:
    """One benchmark: the states of a text without padding, and in training the gradients of all weights for them."""

    kind: str
    B: int
    T: int
    layers: int = 4
    dtype: str = "float32"
    mode: str = "forward"

    @property
    def name(self) -> str:
        return f"model-{self.kind}-B{self.B}-T{self.T}-L{self.layers}-{self.dtype}-{self.mode}"

    @property
    def steps(self) -> int:
        return 1

    @property
    def features(self) -> frozenset[str]:
        return frozenset({"causal"} if self.kind == "gpt2" else ())

    @property
    def flops(self) -> float:
        """Of the projections and feed-forward networks, and of attention, all of it even when causal."""
        products = 24.0 * self.B * self.T * WIDTH**2 + 4.0 * self.B * self.T**2 * WIDTH
        return self.layers * products * (3 if self.mode == "train" else 1)

    @property
    def moved(self) -> float:
        return 0.0

    @property
    def family(self) -> str:
        return f"model-{self.kind}"

    @property
    def needs(self) -> frozenset[str]:
        return frozenset({"attention_forward"} | ({"attention_backward"} if self.mode == "train" else set()))

    def compiled(self) -> "Model":
        return self

    def contest(self, device: str = "cpu", implementations: tuple[str, ...] = ("auto",)) -> Contest:
        """Transformers' model is called ``torch``: its attention is PyTorch's."""
        torch.manual_seed(self.T)
        theirs = _theirs(self).to(device, getattr(torch, self.dtype)).eval()  # no dropout, in training either
        with tempfile.TemporaryDirectory() as folder:
            theirs.save_pretrained(folder)
            ours = OURS[self.kind].from_pretrained(folder, device=device, dtype=getattr(torch, self.dtype))
        tokens = torch.randint(VOCABULARY, (self.B, self.T), device=device)
        dy = torch.randn(self.B, self.T, WIDTH, device=device).to(getattr(torch, self.dtype))
        train = self.mode == "train"
        mine = implementations_of(_runner(ours, tokens, dy, train), implementations)

        def exact() -> Any:
            with torch.set_grad_enabled(train):
                return flat(_runner(copy.deepcopy(theirs).double(), tokens, dy.double(), train)())

        return Contest(
            self, {"torch": _runner(theirs, tokens, dy, train), **mine}, exact,
            explain=lambda: fastseq.explain(_attention(ours), dy, dy, dy),
            ours=tuple(mine),
            rounding=2.0**-10 if device != "cpu" and torch.backends.cuda.matmul.allow_tf32 else 0.0,
            facts={"torch_runs": "transformers, sdpa"},
        )  # fmt: skip


OURS: dict[str, Any] = {"bert": models.BertModel, "gpt2": models.GPT2Model}


def _theirs(case: Model) -> Any:
    import transformers

    sdpa = {"vocab_size": VOCABULARY, "attn_implementation": "sdpa"}
    if case.kind == "bert":
        return transformers.BertModel(transformers.BertConfig(num_hidden_layers=case.layers, **sdpa))
    return transformers.GPT2Model(transformers.GPT2Config(n_layer=case.layers, **sdpa))


def _runner(model: nn.Module, tokens: Tensor, dy: Tensor, train: bool) -> Callable[[], Any]:
    """The states, and with gradients of all weights that of the first: the embeddings of words in both libraries."""
    # BERT's pooler is not part of the states.
    weights = [weight for name, weight in model.named_parameters() if "pooler" not in name]

    def states() -> Tensor:
        found: Any = model(tokens)
        return found if isinstance(found, Tensor) else found[0]

    def both() -> Any:
        y = states()
        return y, torch.autograd.grad(y, weights, dy)[0]

    return both if train else states


def _attention(model: nn.Module) -> nn.Module:
    return next(part for part in model.modules() if isinstance(part, fastseq.MultiheadAttention))


def grid(sizes: tuple[tuple[str, int, int], ...], **more: Any) -> Iterator[Model]:
    """Inference and training of every (kind, B, T)."""
    for (kind, B, T), mode in product(sizes, MODES):
        yield Model(kind, B, T, mode=mode, **more)
