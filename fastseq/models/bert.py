"""BERT (Devlin et al. 2018): a Transformer encoder that reads a text in both directions, and the heads on it."""

from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..nn import TransformerEncoder, TransformerEncoderLayer
from .names import Rule, under
from .pretrained import Pretrained, activation


@dataclass
class BertConfig:
    """What BERT's ``config.json`` says, by its names; the defaults are those of BERT base.

    ``id2label`` names the classes, and so says how many there are; ``classifier_dropout`` is ``hidden_dropout_prob``
    if None.

    Example:
        >>> from fastseq.models import BertConfig
        >>> BertConfig(id2label={0: "sad", 1: "so so", 2: "glad"}).hidden_size
        768
    """

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    hidden_dropout_prob: float = 0.1
    attention_probs_dropout_prob: float = 0.1
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    classifier_dropout: float | None = None
    id2label: dict[int, str] = field(default_factory=lambda: {0: "LABEL_0", 1: "LABEL_1"})
    label2id: dict[str, int] = field(init=False)

    def __post_init__(self) -> None:
        self.id2label = {int(number): label for number, label in self.id2label.items()}  # JSON has no integer keys
        self.label2id = {label: number for number, label in self.id2label.items()}


class BertOutput(NamedTuple):
    """``last_hidden_state`` ``[B, T, E]``, and ``pooler_output`` ``[B, E]`` of the first token, None without pooler."""

    last_hidden_state: Tensor
    pooler_output: Tensor | None


class BertEmbeddings(torch.nn.Module):
    """The sum of what stands for a word, its position and its text (the first or the second), normalised."""

    def __init__(self, config: BertConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        E, kind = config.hidden_size, {"device": device, "dtype": dtype}
        self.word = torch.nn.Embedding(config.vocab_size, E, padding_idx=config.pad_token_id, **kind)
        self.position = torch.nn.Embedding(config.max_position_embeddings, E, **kind)
        self.token_type = torch.nn.Embedding(config.type_vocab_size, E, **kind)
        self.norm = torch.nn.LayerNorm(E, config.layer_norm_eps, **kind)
        self.dropout = torch.nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor, token_type_ids: Tensor | None, position_ids: Tensor | None) -> Tensor:
        T, longest = input_ids.shape[1], self.position.num_embeddings
        if position_ids is None and longest < T:
            raise ValueError(f"input_ids: expected at most max_position_embeddings={longest} tokens, got {T}")
        kind = self.token_type.weight[0] if token_type_ids is None else self.token_type(token_type_ids)
        place = self.position.weight[:T] if position_ids is None else self.position(position_ids)
        x: Tensor = self.dropout(self.norm(self.word(input_ids) + kind + place))
        return x


class _Bert(Pretrained):
    """What all of BERT's models state."""

    Config = BertConfig
    model_type = "bert"
    prefix = "bert."
    ignored = ("embeddings.position_ids", "bert.embeddings.position_ids")
    spelled: ClassVar = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
    fixed: ClassVar = Pretrained.fixed | {"position_embedding_type": "absolute", "tie_word_embeddings": True}
    # Left over in the files of some published BERTs from the program that trained them.
    unused = frozenset(
        ("directionality", "pooler_fc_size", "pooler_num_attention_heads", "pooler_num_fc_layers",
         "pooler_size_per_head", "pooler_type")
    )  # fmt: skip


class BertModel(_Bert):
    """BERT without a head, as transformers' ``BertModel``: the same mathematics, arguments and files.

    Args:
        config: the sizes.
        pooler: whether the first token's state is also turned, by a linear layer and tanh, into that of the text.

    The call takes ``input_ids`` int64 ``[B, T]`` and, as tokenizers make them, ``attention_mask`` ``[B, T]`` (0 or
    False for padding), ``token_type_ids`` ``[B, T]`` (all 0 if None) and ``position_ids`` ``[B, T]`` (0 to T-1 if
    None), and returns a :class:`BertOutput`. What stands at padding has no influence on the rest.

    Raises:
        ValueError: more tokens than ``max_position_embeddings``, or an activation that is not known.

    Example:
        >>> import torch
        >>> from fastseq.models import BertConfig, BertModel
        >>> bert = BertModel(BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=2, num_attention_heads=2))
        >>> padding = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
        >>> states, pooled = bert(torch.randint(100, (2, 4)), attention_mask=padding)
        >>> states.shape, pooled.shape
        (torch.Size([2, 4, 16]), torch.Size([2, 16]))
    """

    architecture = "BertModel"
    names = (
        Rule("embeddings.word", "embeddings.word_embeddings"),
        Rule("embeddings.position", "embeddings.position_embeddings"),
        Rule("embeddings.token_type", "embeddings.token_type_embeddings"),
        Rule("embeddings.norm", "embeddings.LayerNorm"),
        *(
            Rule(
                f"encoder.layers.{{}}.self_attn.in_proj_{kind}",
                tuple(f"encoder.layer.{{}}.attention.self.{part}.{kind}" for part in ("query", "key", "value")),
            )
            for kind in ("weight", "bias")
        ),
        Rule("encoder.layers.{}.self_attn.out_proj", "encoder.layer.{}.attention.output.dense"),
        Rule("encoder.layers.{}.norm1", "encoder.layer.{}.attention.output.LayerNorm"),
        Rule("encoder.layers.{}.linear1", "encoder.layer.{}.intermediate.dense"),
        Rule("encoder.layers.{}.linear2", "encoder.layer.{}.output.dense"),
        Rule("encoder.layers.{}.norm2", "encoder.layer.{}.output.LayerNorm"),
        Rule("pooler", "pooler.dense"),
    )

    def __init__(self, config: BertConfig, device: Any = None, dtype: Any = None, *, pooler: bool = True) -> None:
        super().__init__(config)
        E, kind = config.hidden_size, {"device": device, "dtype": dtype}
        self.embeddings = BertEmbeddings(config, **kind)
        layer = TransformerEncoderLayer(
            E, config.num_attention_heads, config.intermediate_size, config.hidden_dropout_prob,
            activation("hidden_act", config.hidden_act), config.layer_norm_eps, batch_first=True, **kind,
        )  # fmt: skip
        layer.self_attn.dropout = config.attention_probs_dropout_prob
        layer.dropout.p = 0.0  # BERT has none within the feed-forward network
        self.encoder = TransformerEncoder(layer, config.num_hidden_layers, enable_nested_tensor=False)
        self.pooler = torch.nn.Linear(E, E, **kind) if pooler else None
        self._initialise(config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> BertOutput:
        padding = None if attention_mask is None else attention_mask == 0
        x = self.embeddings(input_ids, token_type_ids, position_ids)
        x = self.encoder(x, src_key_padding_mask=padding)
        return BertOutput(x, None if self.pooler is None else self.pooler(x[:, 0]).tanh())


class BertForMaskedLM(_Bert):
    """BERT that guesses the words behind a mask; the words' embeddings are the weight of the last layer as well.

    The call takes what :class:`BertModel` takes and returns logits ``[B, T, vocab_size]``. The loss is torch's
    cross-entropy over the masked positions.

    Raises:
        ValueError: as :class:`BertModel`.

    Example:
        >>> import torch
        >>> from fastseq.models import BertConfig, BertForMaskedLM
        >>> config = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> BertForMaskedLM(config)(torch.randint(100, (2, 4))).shape
        torch.Size([2, 4, 100])
    """

    architecture = "BertForMaskedLM"
    names = (
        *under("bert.", BertModel.names),
        Rule("dense", "cls.predictions.transform.dense"),
        Rule("norm", "cls.predictions.transform.LayerNorm"),
        Rule("bias", "cls.predictions.bias"),
    )
    tied: ClassVar = {
        "cls.predictions.decoder.weight": "bert.embeddings.word_embeddings.weight",
        "cls.predictions.decoder.bias": "cls.predictions.bias",
    }

    def __init__(self, config: BertConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        E, kind = config.hidden_size, {"device": device, "dtype": dtype}
        self.bert = BertModel(config, **kind, pooler=False)
        self.dense = torch.nn.Linear(E, E, **kind)
        self.activation = activation("hidden_act", config.hidden_act)
        self.norm = torch.nn.LayerNorm(E, config.layer_norm_eps, **kind)
        self.bias = torch.nn.Parameter(torch.zeros(config.vocab_size, **kind))
        self._initialise(config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        x, _ = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        x = self.norm(self.activation(self.dense(x)))
        return F.linear(x, self.bert.embeddings.word.weight, self.bias)


class _Classifier(_Bert):
    """A linear layer over the classes, for a text or for each of its tokens."""

    names = under("bert.", BertModel.names)
    of_text: bool

    def __init__(self, config: BertConfig, device: Any = None, dtype: Any = None) -> None:
        super().__init__(config)
        kind = {"device": device, "dtype": dtype}
        self.bert = BertModel(config, **kind, pooler=self.of_text)
        dropout = config.classifier_dropout
        self.dropout = torch.nn.Dropout(config.hidden_dropout_prob if dropout is None else dropout)
        self.classifier = torch.nn.Linear(config.hidden_size, len(config.id2label), **kind)
        self._initialise(config.initializer_range)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        states, pooled = self.bert(input_ids, attention_mask, token_type_ids, position_ids)
        logits: Tensor = self.classifier(self.dropout(pooled if self.of_text else states))
        return logits


class BertForSequenceClassification(_Classifier):
    """BERT that tells classes of texts apart.

    The call takes what :class:`BertModel` takes and returns logits ``[B, len(config.id2label)]``. A folder without
    such a head is read with ``from_pretrained(folder, fresh=["classifier"])``.

    Raises:
        ValueError: as :class:`BertModel`.

    Example:
        >>> import torch
        >>> from fastseq.models import BertConfig, BertForSequenceClassification
        >>> config = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> BertForSequenceClassification(config)(torch.randint(100, (2, 4))).shape
        torch.Size([2, 2])
    """

    architecture = "BertForSequenceClassification"
    of_text = True


class BertForTokenClassification(_Classifier):
    """BERT that tells classes of tokens apart, names from other words for instance.

    The call takes what :class:`BertModel` takes and returns logits ``[B, T, len(config.id2label)]``.

    Raises:
        ValueError: as :class:`BertModel`.

    Example:
        >>> import torch
        >>> from fastseq.models import BertConfig, BertForTokenClassification
        >>> config = BertConfig(vocab_size=100, hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
        >>> BertForTokenClassification(config)(torch.randint(100, (2, 4))).shape
        torch.Size([2, 4, 2])
    """

    architecture = "BertForTokenClassification"
    of_text = False
