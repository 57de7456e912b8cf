"""fastseq: drop-in sequence modules for PyTorch, on fused Triton kernels where there is a GPU."""

from . import bias as bias
from . import functional as functional
from . import huggingface as huggingface
from . import nn as nn
from . import testing as testing
from .cells import cell as cell
from .flash import register_flash_attention as register_flash_attention
from .implementation import Choice as Choice
from .implementation import Unsupported as Unsupported
from .implementation import explain as explain
from .implementation import use as use
from .nn import GRU as GRU
from .nn import LSTM as LSTM
from .nn import MGU as MGU
from .nn import RNN as RNN
from .nn import SLSTM as SLSTM
from .nn import GRUCell as GRUCell
from .nn import KVCache as KVCache
from .nn import LayerNormGRU as LayerNormGRU
from .nn import LayerNormLSTM as LayerNormLSTM
from .nn import LearnedEmbedding as LearnedEmbedding
from .nn import LSTMCell as LSTMCell
from .nn import MultiheadAttention as MultiheadAttention
from .nn import PeepholeLSTM as PeepholeLSTM
from .nn import RelativeMultiheadAttention as RelativeMultiheadAttention
from .nn import RNNCell as RNNCell
from .nn import RotaryEmbedding as RotaryEmbedding
from .nn import SinusoidalEmbedding as SinusoidalEmbedding
from .nn import T5Attention as T5Attention
from .nn import Transformer as Transformer
from .nn import TransformerDecoder as TransformerDecoder
from .nn import TransformerDecoderLayer as TransformerDecoderLayer
from .nn import TransformerEncoder as TransformerEncoder
from .nn import TransformerEncoderLayer as TransformerEncoderLayer
from .nn import XLNetAttention as XLNetAttention
from .swap import restore as restore
from .swap import swap as swap

__version__ = "0.1.0"
