"""Transformer-XL (Dai et al. 2019): a language model that remembers the states of the text before."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import RelativeMultiheadAttention, SinusoidalEmbedding
from . import decoding
from .names import Rule
from .pretrained import Pretrained


@dataclass
class TransformerXLConfig:
    """What Transformer-XL's ``config.json`` says, by its names; the defaults are the paper's base for WikiText-103.

    With ``adaptive`` the vocabulary, whose tokens are then to be numbered by falling frequency, is split at
    ``cutoffs``, and each part after the first gets ``div_val`` times fewer features than the one before (Grave et al.
    2017). The layout of such a file is our own, as the embeddings stay whole.
    """

    vocab_size: int = 267735
    d_model: int = 410
    d_embed: int | None = None  # d_model, which is all there is here
    n_head: int = 10
    d_head: int = 41
    d_inner: int = 2100
    n_layer: int = 16
    mem_len: int = 150  # the most tokens in a memory
    clamp_len: int = -1  # a longer distance counts as this one; -1: none does
    same_length: bool = False  # every token sees mem_len tokens, itself included, wherever in its segment it is
    dropout: float = 0.1
    dropatt: float = 0.0  # of the attention weights
    layer_norm_epsilon: float = 1e-5
    init_std: float = 0.02
    adaptive: bool = False
    cutoffs: tuple[int, ...] = ()
    div_val: float = 1.0

    def __post_init__(self) -> None:
        self.cutoffs = tuple(self.cutoffs)  # JSON has lists only
        if self.d_embed not in (None, self.d_model):
            raise ValueError(f"d_embed: expected d_model={self.d_model}, got {self.d_embed}")
        if self.same_length and self.mem_len < 1:
            raise ValueError(f"mem_len: expected at least 1 with same_length, got {self.mem_len}")


class TransformerXLOutput(NamedTuple):
    """Logits ``[B, T, vocab_size]`` (log-probabilities if adaptive), and what to remember."""

    logits: Tensor
    memory: list[Tensor]


class TransformerXLLayer(torch.nn.Module):
    """Attention and a feed-forward network, each added to what comes in and normalised."""

    def __init__(self, config: TransformerXLConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        E, kind = config.d_model, {"device": device, "dtype": dtype}
        self.attention = RelativeMultiheadAttention(E, config.n_head, config.dropatt, head_dim=config.d_head, **kind)
        self.norm1 = torch.nn.LayerNorm(E, config.layer_norm_epsilon, **kind)
        self.linear1 = torch.nn.Linear(E, config.d_inner, **kind)
        self.linear2 = torch.nn.Linear(config.d_inner, E, **kind)
        self.norm2 = torch.nn.LayerNorm(E, config.layer_norm_epsilon, **kind)
        self.dropout = torch.nn.Dropout(config.dropout)

    def forward(self, x: Tensor, positions: Tensor, memory: Tensor | None, window: tuple[int, int] | None) -> Tensor:
        y, _ = self.attention(x, positions, memory, causal=True, window=window)
        x = self.norm1(x + self.dropout(y))
        y = self.linear2(self.dropout(F.relu(self.linear1(x))))
        return self.norm2(x + self.dropout(y))  # type: ignore[no-any-return]


class TransformerXL(Pretrained):
    """Transformer-XL (Dai et al. 2019): segments of a text one after the other, each seeing the states of those before.

    The call takes ``input_ids`` int64 ``[B, T]``, a segment of each text, and ``memory``, which the call before
    returned, of the segment before, or None; it returns a :class:`TransformerXLOutput`. The memory is the input of
    each layer, ``[B, M, d_model]``, at most ``mem_len`` tokens of it, without gradients; the model keeps nothing. With
    n layers a token so depends on ``n * mem_len`` tokens before its segment. As long as nothing is dropped from the
    memory, segments one by one compute what they compute all at once; so they do, however they are cut, with
    ``same_length``.

    Folders have the layout that transformers wrote until version 4.

    Raises:
        ValueError: the memory is not that of this model; the configuration does not fit together.

    Example:
        >>> import torch
        >>> from fastseq.models import TransformerXL, TransformerXLConfig
        >>> config = TransformerXLConfig(50, d_model=16, n_head=2, d_head=8, d_inner=32, n_layer=2, mem_len=8)
        >>> model, text, memory = TransformerXL(config), torch.randint(50, (2, 12)), None
        >>> for segment in text.split(4, dim=1):
        ...     logits, memory = model(segment, memory)
        >>> logits.shape, memory[0].shape
        (torch.Size([2, 4, 50]), torch.Size([2, 8, 16]))
    """

    Config = TransformerXLConfig
    model_type = "transfo-xl"
    architecture = "TransfoXLLMHeadModel"
    names = (
        Rule("word", "transformer.word_emb.emb_layers.0"),
        Rule("layers.{}.attention.in_proj_weight", "transformer.layers.{}.dec_attn.qkv_net.weight"),
        Rule("layers.{}.attention.r_proj", "transformer.layers.{}.dec_attn.r_net"),
        Rule("layers.{}.attention.out_proj", "transformer.layers.{}.dec_attn.o_net"),
        Rule("layers.{}.attention.u", "transformer.layers.{}.dec_attn.r_w_bias"),
        Rule("layers.{}.attention.w", "transformer.layers.{}.dec_attn.r_r_bias"),
        Rule("layers.{}.norm1", "transformer.layers.{}.dec_attn.layer_norm"),
        Rule("layers.{}.linear1", "transformer.layers.{}.pos_ff.CoreNet.0"),
        Rule("layers.{}.linear2", "transformer.layers.{}.pos_ff.CoreNet.3"),
        Rule("layers.{}.norm2", "transformer.layers.{}.pos_ff.layer_norm"),
        Rule("bias", "crit.out_layers.0.bias"),
    )
    tied = {"crit.out_layers.0.weight": "transformer.word_emb.emb_layers.0.weight"}  # noqa: RUF012
    ignored = ("transformer.pos_emb.inv_freq",)
    fixed = {  # noqa: RUF012
        **Pretrained.fixed,
        "attn_type": 0,
        "ext_len": 0,
        "pre_lnorm": False,
        "sample_softmax": -1,
        "tie_word_embeddings": True,
        "untie_r": True,
    }
    # How weights began; the length it was tested with; projections of embeddings, which there are none of here.
    unused = frozenset(
        ("init", "init_range", "proj_init_std", "proj_share_all_but_first", "tgt_len", "tie_projs", "tie_weight")
    )

    def __init__(self, config: TransformerXLConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        E, kind = config.d_model, {"device": device, "dtype": dtype}
        self.word = torch.nn.Embedding(config.vocab_size, E, **kind)
        self.positions = SinusoidalEmbedding(E, interleaved=False)
        self.layers = torch.nn.ModuleList(TransformerXLLayer(config, **kind) for _ in range(config.n_layer))
        self.dropout = torch.nn.Dropout(config.dropout)
        self.adaptive: torch.nn.AdaptiveLogSoftmaxWithLoss | None = None
        self.bias: torch.nn.Parameter | None = None
        if config.adaptive:
            cutoffs = list(config.cutoffs)
            self.adaptive = torch.nn.AdaptiveLogSoftmaxWithLoss(E, config.vocab_size, cutoffs, config.div_val, **kind)
        else:
            self.bias = torch.nn.Parameter(torch.zeros(config.vocab_size, **kind))
        self._initialise(config.init_std)

    def _initialise(self, std: float) -> None:
        super()._initialise(std)
        for module in self.modules():
            if isinstance(module, RelativeMultiheadAttention):
                for parameter in (module.in_proj_weight, module.u, module.w):
                    torch.nn.init.normal_(parameter, std=std)

    def encode(self, input_ids: Tensor, memory: Sequence[Tensor] | None = None) -> tuple[Tensor, list[Tensor]]:
        """The last states ``[B, T, d_model]``, and what to remember."""
        config, (B, T) = self.config, input_ids.shape
        shapes = None if memory is None else {tuple(each.shape[:1] + each.shape[2:]) for each in memory}
        if memory is not None and (shapes != {(B, config.d_model)} or len(memory) != len(self.layers)):
            got = [list(each.shape) for each in memory]
            raise ValueError(f"memory: expected {len(self.layers)} of [{B}, M, {config.d_model}], got {got}")
        M = 0 if memory is None else memory[0].shape[1]
        far = M + T - 1
        if config.clamp_len > 0:
            far = min(far, config.clamp_len)
        x = self.dropout(self.word(input_ids) * config.d_model**0.5)
        positions = self.dropout(self.positions.at(torch.arange(far, -1, -1, device=x.device)).to(x.dtype))
        window = (config.mem_len - 1, 0) if config.same_length else None
        kept = []
        for layer, past in zip(self.layers, memory or repeat(None), strict=False):
            context = x.detach() if past is None else torch.cat([past, x.detach()], 1)
            kept.append(context[:, max(context.shape[1] - config.mem_len, 0) :])
            x = layer(x, positions, past, window)
        return self.dropout(x), kept

    def logits(self, x: Tensor) -> Tensor:
        """Of states ``[..., d_model]`` what they say of the next token, ``[..., vocab_size]``."""
        if self.adaptive is None:
            return F.linear(x, self.word.weight, self.bias)
        return self.adaptive.log_prob(x.flatten(0, -2)).view(*x.shape[:-1], -1)

    def forward(self, input_ids: Tensor, memory: Sequence[Tensor] | None = None) -> TransformerXLOutput:
        x, kept = self.encode(input_ids, memory)
        return TransformerXLOutput(self.logits(x), kept)

    def loss(
        self, input_ids: Tensor, targets: Tensor, memory: Sequence[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """The mean cross-entropy of the targets ``[B, T]``, the tokens that follow, and what to remember.

        If adaptive, only the parts of the vocabulary that targets are in are computed.
        """
        x, kept = self.encode(input_ids, memory)
        if self.adaptive is not None:
            return self.adaptive(x.flatten(0, 1), targets.flatten()).loss, kept
        return F.cross_entropy(self.logits(x).flatten(0, 1), targets.flatten()), kept

    @torch.no_grad()
    def generate(
        self, input_ids: Tensor, *, max_new_tokens: int, memory: Sequence[Tensor] | None = None, **options: Any
    ) -> Tensor:
        """Continue the texts, int64 ``[B, t]`` without padding to ``[B, t + n]``, with a memory instead of a cache.

        The options are those of :func:`fastseq.models.generate`: ``end``, ``temperature``, ``top_p``, ``beams`` and
        more; ``memory`` is that of the text before, if any.
        """

        def step(tokens: Tensor) -> Tensor:
            nonlocal memory
            x, memory = self.encode(tokens, memory)
            return self.logits(x[:, -1])

        def reorder(rows: Tensor) -> None:
            nonlocal memory
            memory = None if memory is None else [each[rows] for each in memory]

        return decoding.generate(step, input_ids, max_new_tokens=max_new_tokens, reorder=reorder, **options)
