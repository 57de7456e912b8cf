"""Drop-in subclasses of ``torch.nn`` modules."""

import torch

from .attention import MultiheadAttention
from .cache import KVCache
from .cells import MGU, SLSTM, LayerNormGRU, LayerNormLSTM, PeepholeLSTM
from .position import LearnedEmbedding, RotaryEmbedding, SinusoidalEmbedding
from .recurrent import GRU, LSTM, RNN, GRUCell, LSTMCell, RNNCell
from .relative import RelativeMultiheadAttention, XLNetAttention
from .t5 import T5Attention
from .transformer import (
    Transformer,
    TransformerDecoder,
    TransformerDecoderLayer,
    TransformerEncoder,
    TransformerEncoderLayer,
)

__all__ = [
    "GRU",
    "LSTM",
    "MGU",
    "REPLACEMENTS",
    "RNN",
    "SLSTM",
    "GRUCell",
    "KVCache",
    "LSTMCell",
    "LayerNormGRU",
    "LayerNormLSTM",
    "LearnedEmbedding",
    "MultiheadAttention",
    "PeepholeLSTM",
    "RNNCell",
    "RelativeMultiheadAttention",
    "RotaryEmbedding",
    "SinusoidalEmbedding",
    "T5Attention",
    "Transformer",
    "TransformerDecoder",
    "TransformerDecoderLayer",
    "TransformerEncoder",
    "TransformerEncoderLayer",
    "XLNetAttention",
]

REPLACEMENTS: dict[type[torch.nn.Module], type[torch.nn.Module]] = {
    torch.nn.RNN: RNN,
    torch.nn.LSTM: LSTM,
    torch.nn.GRU: GRU,
    torch.nn.RNNCell: RNNCell,
    torch.nn.LSTMCell: LSTMCell,
    torch.nn.GRUCell: GRUCell,
    torch.nn.MultiheadAttention: MultiheadAttention,
    torch.nn.TransformerEncoderLayer: TransformerEncoderLayer,
    torch.nn.TransformerDecoderLayer: TransformerDecoderLayer,
    torch.nn.TransformerEncoder: TransformerEncoder,
    torch.nn.TransformerDecoder: TransformerDecoder,
    torch.nn.Transformer: Transformer,
}
