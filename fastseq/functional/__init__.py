"""Check, choose, call: fastseq's operators as functions, with PyTorch's own signatures and ours by keyword."""

from ..ops.crossover import engine as engine
from ..ops.crossover import trained as trained
from ..ops.recurrent import explained as explained
from .attention import choose_attention as choose_attention
from .attention import scaled_dot_product_attention as scaled_dot_product_attention
from .attention import varlen_attn as varlen_attn
from .recurrent import check_lengths as check_lengths
from .recurrent import check_reset as check_reset
from .recurrent import choose_sequence as choose_sequence
from .recurrent import choose_single as choose_single
from .recurrent import gru as gru
from .recurrent import gru_cell as gru_cell
from .recurrent import lstm as lstm
from .recurrent import lstm_cell as lstm_cell
from .recurrent import rnn as rnn
from .recurrent import rnn_cell as rnn_cell
from .recurrent import sequence as sequence
from .recurrent import single as single

__all__ = [
    "gru",
    "gru_cell",
    "lstm",
    "lstm_cell",
    "rnn",
    "rnn_cell",
    "scaled_dot_product_attention",
    "varlen_attn",
]
