"""XLNet (Yang et al. 2019): Transformer-XL trained to guess the words of a text in any order."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import SinusoidalEmbedding, XLNetAttention
from . import decoding
from .names import Rule, under
from .pretrained import Pretrained, activation


@dataclass
class XLNetConfig:
    """What XLNet's ``config.json`` says, by its names; the defaults are those of XLNet large."""

    vocab_size: int = 32000
    d_model: int = 1024
    n_layer: int = 24
    n_head: int = 16
    d_inner: int = 4096
    d_head: int | None = None  # d_model / n_head
    ff_activation: str = "gelu"
    attn_type: str = "bi"  # "uni": a token sees none after itself
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    dropout: float = 0.1
    mem_len: int | None = 512  # the most tokens in a memory; None or 0: all there were
    reuse_len: int | None = None  # the most tokens of a text that go into the memory, its first ones
    clamp_len: int = -1  # a longer distance counts as this one; -1: none does
    same_length: bool = False  # with "uni": a token sees as many others as the memory has

    def __post_init__(self) -> None:
        if self.d_head is None:
            self.d_head = self.d_model // self.n_head
        if self.attn_type not in ("bi", "uni"):
            raise ValueError(f"attn_type: expected 'bi' or 'uni', got {self.attn_type!r}")


class XLNetOutput(NamedTuple):
    """States ``[B, T, E]``, or logits ``[B, T, vocab_size]``, of guesses ``[B, P, ...]`` if any; and the memory."""

    output: Tensor
    memory: list[Tensor]


class XLNetLayer(torch.nn.Module):
    """Attention and a feed-forward network, each added to what comes in and normalised; both streams alike."""

    def __init__(self, config: XLNetConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        E, kind = config.d_model, {"device": device, "dtype": dtype}
        self.attention = XLNetAttention(E, config.n_head, config.dropout, config.d_head, **kind)
        self.norm1 = torch.nn.LayerNorm(E, config.layer_norm_eps, **kind)
        self.linear1 = torch.nn.Linear(E, config.d_inner, **kind)
        self.linear2 = torch.nn.Linear(config.d_inner, E, **kind)
        self.norm2 = torch.nn.LayerNorm(E, config.layer_norm_eps, **kind)
        self.activation = activation("ff_activation", config.ff_activation)
        self.dropout = torch.nn.Dropout(config.dropout)

    def forward(
        self, h: Tensor, g: Tensor | None, positions: Tensor, memory: Tensor | None, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor | None]:
        of_h, of_g = self.attention(h, positions, memory, g=g, **options)
        return self._rest(h, of_h), None if g is None else self._rest(g, of_g)

    def _rest(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.norm1(x + self.dropout(attended))
        y = self.dropout(self.linear2(self.dropout(self.activation(self.linear1(x)))))
        return self.norm2(x + y)  # type: ignore[no-any-return]


class _XLNet(Pretrained):
    """What all of XLNet's models state."""

    Config = XLNetConfig
    model_type = "xlnet"
    prefix = "transformer."
    fixed = {**Pretrained.fixed, "bi_data": False, "tie_word_embeddings": True, "untie_r": True}  # noqa: RUF012
    # The sizes of other heads, and when transformers returns a memory, which is always here.
    unused = frozenset(("end_n_top", "start_n_top", "use_mems_eval", "use_mems_train")) | frozenset(
        f"summary_{key}" for key in ("activation", "last_dropout", "type", "use_proj")
    )

    def _initialise(self, std: float) -> None:
        super()._initialise(std)
        for module in self.modules():
            if isinstance(module, XLNetAttention):
                for each in (module.in_proj_weight, module.u, module.w, module.s, module.segment_embed):
                    torch.nn.init.normal_(each, std=std)


class XLNetModel(_XLNet):
    """XLNet without a head, as transformers' ``XLNetModel``: the same mathematics and files.

    The call takes ``input_ids`` int64 ``[B, T]`` and returns an :class:`XLNetOutput`. Besides:

    - ``attention_mask`` ``[B, T]``: 0 or False for padding, which no token sees.
    - ``memory``: what the call before returned, of the text before: one ``[B, M, E]`` for each layer, without
      gradients. (In transformers ``mems``, ``[M, B, E]``.)
    - ``order`` ``[B, T]``: the places of the tokens in the order of prediction; a token sees those at its own place
      and before, a guess those before. :func:`permutation` draws one.
    - ``perm_mask`` ``[B, T, T]``: instead of an order, 1 where the first index may not see the second; a token sees
      itself, a guess only where this is 0. It costs memory with the square of T, an order does not.
    - ``target_mapping``: which tokens are guessed: their places int64 ``[B, P]``, or as in transformers float
      ``[B, P, T]``, 1 at the place of each; the output is then that of the guesses. None: that of the tokens.
    - ``token_type_ids`` ``[B, T]``: the texts that tokens are of; memory is of text 0.

    With a perm_mask every number is that of transformers. With an attention_mask and no perm_mask transformers lets
    padding see itself, so what stands at padding, which means nothing, differs. A guess that sees no token at all is
    made from nothing here; there from the mean of all values, hidden ones included.

    Raises:
        ValueError: both an order and a perm_mask; shapes that do not fit together; an unknown activation.

    Example:
        >>> import torch
        >>> from fastseq.models import XLNetConfig, XLNetModel, permutation
        >>> xlnet = XLNetModel(XLNetConfig(vocab_size=100, d_model=16, n_layer=2, n_head=2, d_inner=32))
        >>> order, targets = permutation(2, 6, 3)
        >>> states, memory = xlnet(torch.randint(100, (2, 6)), order=order, target_mapping=targets)
        >>> states.shape, memory[1].shape
        (torch.Size([2, 3, 16]), torch.Size([2, 6, 16]))
    """

    architecture = "XLNetModel"
    names = (
        Rule("word", "word_embedding"),
        Rule(
            "layers.{}.attention.in_proj_weight", tuple(f"layer.{{}}.rel_attn.{each}" for each in "qkv"),
            transposed=True, head_width="d_head",
        ),
        Rule("layers.{}.attention.r_proj.weight", "layer.{}.rel_attn.r", transposed=True, head_width="d_head"),
        Rule("layers.{}.attention.out_proj.weight", "layer.{}.rel_attn.o", head_width="d_head"),
        Rule("layers.{}.attention.u", "layer.{}.rel_attn.r_w_bias"),
        Rule("layers.{}.attention.w", "layer.{}.rel_attn.r_r_bias"),
        Rule("layers.{}.attention.s", "layer.{}.rel_attn.r_s_bias"),
        Rule("layers.{}.attention.segment_embed", "layer.{}.rel_attn.seg_embed"),
        Rule("layers.{}.norm1", "layer.{}.rel_attn.layer_norm"),
        Rule("layers.{}.linear1", "layer.{}.ff.layer_1"),
        Rule("layers.{}.linear2", "layer.{}.ff.layer_2"),
        Rule("layers.{}.norm2", "layer.{}.ff.layer_norm"),
    )  # fmt: skip

    def __init__(self, config: XLNetConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        kind = {"device": device, "dtype": dtype}
        self.word = torch.nn.Embedding(config.vocab_size, config.d_model, **kind)
        self.mask_emb = torch.nn.Parameter(torch.empty(1, 1, config.d_model, **kind))  # what a guess starts from
        self.positions = SinusoidalEmbedding(config.d_model, interleaved=False)
        self.layers = torch.nn.ModuleList(XLNetLayer(config, **kind) for _ in range(config.n_layer))
        self.dropout = torch.nn.Dropout(config.dropout)
        self._initialise(config.initializer_range)
        torch.nn.init.normal_(self.mask_emb, std=config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        memory: Sequence[Tensor] | None = None,
        perm_mask: Tensor | None = None,
        target_mapping: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        order: Tensor | None = None,
    ) -> XLNetOutput:
        if order is not None and perm_mask is not None:
            raise ValueError("order, perm_mask: expected one of the two, which say the same, got both")
        B, T = input_ids.shape
        M = 0 if memory is None else memory[0].shape[1]
        causal = self.config.attn_type == "uni"
        options: dict[str, Any] = {"order": order, "targets": target_mapping, "causal": causal}
        if causal and self.config.same_length:
            options["window"] = (M, 0)
        if token_type_ids is not None:
            options["segments"] = token_type_ids, F.pad(token_type_ids, (M, 0))
        padding = None if attention_mask is None else attention_mask == 0
        if perm_mask is not None:
            hidden = perm_mask > 0
            options["attn_mask"] = F.pad(hidden if padding is None else hidden | padding[:, None], (M, 0))
        elif padding is not None:
            options["key_padding_mask"] = F.pad(padding, (M, 0))

        h = self.dropout(self.word(input_ids))
        g = None
        if target_mapping is not None:
            g = self.dropout(self.mask_emb.expand(B, target_mapping.shape[1], -1))
        far, near = M + T - 1, 0 if causal else T - 1
        if self.config.clamp_len > 0:
            far, near = min(far, self.config.clamp_len), min(near, self.config.clamp_len)
        options["zero"] = far
        positions = self.positions.at(torch.arange(far, -near - 1, -1, device=h.device)).to(h.dtype)
        positions = self.dropout(positions)
        kept = []
        for number, layer in enumerate(self.layers):
            past = None if memory is None else memory[number]
            kept.append(self._remembered(h, past))
            h, g = layer(h, g, positions, past, options)
        return XLNetOutput(self.dropout(h if g is None else g), kept)

    def _remembered(self, h: Tensor, memory: Tensor | None) -> Tensor:
        """What the next text may see of a layer's input."""
        if self.config.reuse_len:
            h = h[:, : self.config.reuse_len]
        h = h.detach()
        kept = h if memory is None else torch.cat([memory, h], 1)
        return kept[:, -self.config.mem_len :] if self.config.mem_len else kept


class XLNetLMHeadModel(_XLNet):
    """XLNet that guesses words; the words' embeddings are the weight of the last layer as well.

    The call takes what :class:`XLNetModel` takes and returns an :class:`XLNetOutput`. The loss of permutation
    language modelling is torch's cross-entropy between the guesses and the tokens at their places.

    Raises:
        ValueError: as :class:`XLNetModel`.

    Example:
        >>> import torch
        >>> from fastseq.models import XLNetConfig, XLNetLMHeadModel, permutation
        >>> xlnet = XLNetLMHeadModel(XLNetConfig(vocab_size=100, d_model=16, n_layer=2, n_head=2, d_inner=32))
        >>> ids, (order, targets) = torch.randint(100, (2, 6)), permutation(2, 6, 3)
        >>> logits, _ = xlnet(ids, order=order, target_mapping=targets)
        >>> torch.nn.functional.cross_entropy(logits.mT, ids.gather(1, targets)).shape
        torch.Size([])
    """

    architecture = "XLNetLMHeadModel"
    names = (*under("transformer.", XLNetModel.names), Rule("bias", "lm_loss.bias"))
    tied = {"lm_loss.weight": "transformer.word_embedding.weight"}  # noqa: RUF012

    def __init__(self, config: XLNetConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        self.transformer = XLNetModel(config, device, dtype)
        self.bias = torch.nn.Parameter(torch.zeros(config.vocab_size, device=device, dtype=dtype))

    def forward(self, input_ids: Tensor, *arguments: Any, **options: Any) -> XLNetOutput:
        states, kept = self.transformer(input_ids, *arguments, **options)
        return XLNetOutput(F.linear(states, self.transformer.word.weight, self.bias), kept)

    @torch.no_grad()
    def generate(self, input_ids: Tensor, *, max_new_tokens: int, **options: Any) -> Tensor:
        """Continue the texts, int64 ``[B, t]`` without padding to ``[B, t + n]``, as transformers does.

        The guess stands at a place after the text that no token sees. Of the text before, all but the last token is
        in the memory, as it was before the tokens after it were known. The options are those of
        :func:`fastseq.models.generate`: ``end``, ``temperature``, ``top_p``, ``beams`` and more.
        """
        memory: list[Tensor] | None = None
        last = input_ids[:, :0]

        def step(tokens: Tensor) -> Tensor:
            nonlocal memory, last
            known = torch.cat([last, tokens], 1)
            order = F.pad(torch.zeros_like(known), (0, 1), value=1)
            place = torch.full_like(known[:, :1], known.shape[1])
            logits, kept = self(F.pad(known, (0, 1)), memory=memory, order=order, target_mapping=place)
            memory, last = [each[:, :-2] for each in kept], known[:, -1:]
            return logits[:, -1]  # type: ignore[no-any-return]

        def reorder(rows: Tensor) -> None:
            nonlocal memory, last
            memory, last = None if memory is None else [each[rows] for each in memory], last[rows]

        return decoding.generate(step, input_ids, max_new_tokens=max_new_tokens, reorder=reorder, **options)


def permutation(
    B: int, T: int, targets: int, generator: torch.Generator | None = None, device: Any = None
) -> tuple[Tensor, Tensor]:
    """Draw what permutation language modelling guesses, and in which order (Yang et al. 2019, section 2.3).

    It returns the order int64 ``[B, T]``, in which what is not guessed comes first, all at place 0, and the others
    one after the other; and their places in the text, int64 ``[B, targets]``. More targets than T: ValueError.

    Example:
        >>> import torch
        >>> from fastseq.models import permutation
        >>> order, targets = permutation(1, 5, 2)
        >>> order.gather(1, targets), order.sum()
        (tensor([[1, 2]]), tensor(3))
    """
    if not 0 <= targets <= T:
        raise ValueError(f"targets: expected at most T={T}, got {targets}")
    places = torch.rand(B, T, generator=generator, device=device).argsort(1)[:, :targets]
    turn = torch.arange(1, targets + 1, device=device).expand(B, -1)
    return torch.zeros(B, T, dtype=torch.int64, device=device).scatter(1, places, turn), places
