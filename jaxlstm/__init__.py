"""A functional LSTM in JAX: readable equations, gradients you can check, every transform."""

from jaxlstm.baselines import (
    GRU,
    RNN,
    GRUGates,
    GRUParams,
    GRUState,
    RNNParams,
    RNNState,
    init_gru,
    init_rnn,
    make_rnn,
)
from jaxlstm.bptt import LSTMResiduals, gradient_error, lstm_backward, lstm_bptt, lstm_forward
from jaxlstm.cell import Cell, num_params, summary
from jaxlstm.lstm import (
    LSTM,
    LSTMGates,
    LSTMParams,
    LSTMState,
    init_chrono,
    init_flax,
    init_glorot_orthogonal,
    init_keras,
    init_torch,
    join_gates,
    split_gates,
)
from jaxlstm.recurrence import length_mask, segment_resets, unroll, unroll_chunked
from jaxlstm.train import TrainState, TrainStep, fit, init_train_state, make_train_step

__version__ = "0.1.0"

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "Cell",
    "GRUGates",
    "GRUParams",
    "GRUState",
    "LSTMGates",
    "LSTMParams",
    "LSTMResiduals",
    "LSTMState",
    "RNNParams",
    "RNNState",
    "TrainState",
    "TrainStep",
    "fit",
    "gradient_error",
    "init_chrono",
    "init_flax",
    "init_glorot_orthogonal",
    "init_gru",
    "init_keras",
    "init_rnn",
    "init_torch",
    "init_train_state",
    "join_gates",
    "length_mask",
    "lstm_backward",
    "lstm_bptt",
    "lstm_forward",
    "make_rnn",
    "make_train_step",
    "num_params",
    "segment_resets",
    "split_gates",
    "summary",
    "unroll",
    "unroll_chunked",
]
