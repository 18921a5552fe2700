"""jaxpack: packed sequences and recurrent layers for JAX, for batches whose sequences have different lengths."""

from jaxpack._cells.gru import gru_cell
from jaxpack._cells.ind_rnn import ind_rnn_cell
from jaxpack._cells.layer_norm_gru import layer_norm_gru_cell
from jaxpack._cells.layer_norm_lstm import layer_norm_lstm_cell
from jaxpack._cells.lstm import lstm_cell
from jaxpack._cells.mgu import mgu_cell
from jaxpack._cells.peephole import peephole_lstm_cell
from jaxpack._cells.rnn import rnn_cell
from jaxpack._deep.bidirectional import Bidirectional
from jaxpack._deep.deep_rnn import DeepRNN
from jaxpack._layers.layers import GRU, LSTM, RNN
from jaxpack._layers.regularization import Regularization
from jaxpack._layers.schemes import Chrono
from jaxpack._layers.variants import MGU, IndRNN, LayerNormGRU, LayerNormLSTM, PeepholeLSTM
from jaxpack._layers.weight_norm import join_weight_norm, split_weight_norm
from jaxpack._linear.lru import LRU
from jaxpack._linear.minimal import MinGRU, MinLSTM
from jaxpack._linear.rglru import RGLRU
from jaxpack._linear.scan import linear_scan
from jaxpack._matrix.functions import gated_delta_rule, linear_attention
from jaxpack._matrix.gated_delta_net import GatedDeltaNet
from jaxpack._matrix.mamba2 import Mamba2
from jaxpack._matrix.mlstm import MLSTM
from jaxpack._namespace import publish as _publish
from jaxpack._packed.attention import attention, rotary
from jaxpack._packed.conv import causal_conv
from jaxpack._packed.convert import (
    pack_padded_sequence,
    pack_sequence,
    pad_packed_sequence,
    pad_sequence,
    reverse_sequences,
    unpack_sequence,
    unpad_sequence,
)
from jaxpack._packed.dropout import dropout
from jaxpack._packed.masks import compact, scatter_back
from jaxpack._packed.packed_sequence import PackedSequence
from jaxpack._packed.pool import avg_pool, max_pool, stack_steps, subsample, sum_pool
from jaxpack._packed.reduce import (
    first,
    last,
    segment_argmax,
    segment_argmin,
    segment_logsumexp,
    segment_max,
    segment_mean,
    segment_min,
    segment_std,
    segment_sum,
    segment_var,
)
from jaxpack._packed.rows import Rows, from_rows, to_rows
from jaxpack._packed.scan import packed_scan
from jaxpack._packed.statistics import mean, std, var
from jaxpack._packed.steps import broadcast_to_steps, concatenate, softmax
from jaxpack._packed.upsample import repeat_steps
from jaxpack._packed.window_conv import conv
from jaxpack._plans.bucket_plan import BucketPlan
from jaxpack._plans.cost import CostModel
from jaxpack._plans.planners import plan_best, plan_buckets, plan_exact, plan_padded, plan_rows
from jaxpack._rollouts.resets import resets_from_dones
from jaxpack._stepped.cfc import CfC
from jaxpack._stepped.conv import ConvGRU, ConvLSTM
from jaxpack._stepped.gru_d import GRUD
from jaxpack._stepped.slstm import SLSTM
from jaxpack._stepped.time_decay import TimeDecay
from jaxpack._traced_checks import unchecked

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "GRUD",
    "LRU",
    "LSTM",
    "MGU",
    "MLSTM",
    "RGLRU",
    "RNN",
    "SLSTM",
    "Bidirectional",
    "BucketPlan",
    "CfC",
    "Chrono",
    "ConvGRU",
    "ConvLSTM",
    "CostModel",
    "DeepRNN",
    "GatedDeltaNet",
    "IndRNN",
    "LayerNormGRU",
    "LayerNormLSTM",
    "Mamba2",
    "MinGRU",
    "MinLSTM",
    "PackedSequence",
    "PeepholeLSTM",
    "Regularization",
    "Rows",
    "TimeDecay",
    "attention",
    "avg_pool",
    "broadcast_to_steps",
    "causal_conv",
    "compact",
    "concatenate",
    "conv",
    "dropout",
    "first",
    "from_rows",
    "gated_delta_rule",
    "gru_cell",
    "ind_rnn_cell",
    "join_weight_norm",
    "last",
    "layer_norm_gru_cell",
    "layer_norm_lstm_cell",
    "linear_attention",
    "linear_scan",
    "lstm_cell",
    "max_pool",
    "mean",
    "mgu_cell",
    "pack_padded_sequence",
    "pack_sequence",
    "packed_scan",
    "pad_packed_sequence",
    "pad_sequence",
    "peephole_lstm_cell",
    "plan_best",
    "plan_buckets",
    "plan_exact",
    "plan_padded",
    "plan_rows",
    "repeat_steps",
    "resets_from_dones",
    "reverse_sequences",
    "rnn_cell",
    "rotary",
    "scatter_back",
    "segment_argmax",
    "segment_argmin",
    "segment_logsumexp",
    "segment_max",
    "segment_mean",
    "segment_min",
    "segment_std",
    "segment_sum",
    "segment_var",
    "softmax",
    "split_weight_norm",
    "stack_steps",
    "std",
    "subsample",
    "sum_pool",
    "to_rows",
    "unchecked",
    "unpack_sequence",
    "unpad_sequence",
    "var",
]

_publish(__name__)
