"""The models that courses on sequences name, one readable file each, on fastseq's own parts.

``import fastseq`` does not bring them; ``import fastseq.models`` does.
"""

from .bert import BertConfig as BertConfig
from .bert import BertForMaskedLM as BertForMaskedLM
from .bert import BertForSequenceClassification as BertForSequenceClassification
from .bert import BertForTokenClassification as BertForTokenClassification
from .bert import BertModel as BertModel
from .bert import BertOutput as BertOutput
from .decoding import generate as generate
from .decoding import probabilities as probabilities
from .encoder_decoder import EncoderDecoder as EncoderDecoder
from .gpt import GPT2Config as GPT2Config
from .gpt import GPT2LMHeadModel as GPT2LMHeadModel
from .gpt import GPT2Model as GPT2Model
from .gradients import gradient_by_distance as gradient_by_distance
from .names import Rule as Rule
from .pretrained import Pretrained as Pretrained
from .recurrent import SequenceToVector as SequenceToVector
from .recurrent import VectorToSequence as VectorToSequence
from .seq2seq import Seq2Seq as Seq2Seq
from .seq2seq import Seq2SeqConfig as Seq2SeqConfig
from .t5 import T5 as T5
from .t5 import T5Config as T5Config
from .transformer import Transformer as Transformer
from .transformer import TransformerConfig as TransformerConfig
from .transformer import learning_rate as learning_rate
from .transformer import smoothed_loss as smoothed_loss
from .transformer_xl import TransformerXL as TransformerXL
from .transformer_xl import TransformerXLConfig as TransformerXLConfig
from .transformer_xl import TransformerXLOutput as TransformerXLOutput
from .xlnet import XLNetConfig as XLNetConfig
from .xlnet import XLNetLMHeadModel as XLNetLMHeadModel
from .xlnet import XLNetModel as XLNetModel
from .xlnet import XLNetOutput as XLNetOutput
from .xlnet import permutation as permutation
