"""A functional LSTM for JAX, with equations you can read and gradients you can check.

The top level holds what you need to build and train a model. More is in the submodules `jaxlstm.diagnostics` (compare,
check and take gradients apart), `jaxlstm.regularize`, `jaxlstm.rtrl` (learning forward in time),
`jaxlstm.initializers`, `jaxlstm.variants` (peepholes, coupled gates, projections and more), `jaxlstm.epochs` (batches
and early stopping), `jaxlstm.plots` and `jaxlstm.adapters` (Flax, ONNX, and weights of other frameworks).
"""

import contextlib

from jax import export

from jaxlstm import diagnostics, epochs, initializers, plots, regularize, rtrl, variants  # noqa: F401
from jaxlstm.baselines import GRU, RNN, GRUParams, GRUState, RNNParams, RNNState, make_rnn
from jaxlstm.bidirectional import Bidirectional, init_bidirectional, unroll_bidirectional
from jaxlstm.bptt import lstm_bptt
from jaxlstm.cell import Cell, num_params, summary
from jaxlstm.ensembles import sweep
from jaxlstm.gradients import Bulk, Chunked, Scan
from jaxlstm.layers import generate, init_stack, step_stack, unroll_stack
from jaxlstm.lstm import LSTM, LSTMGates, LSTMParams, LSTMState, split_gates
from jaxlstm.masks import length_mask, segment_resets
from jaxlstm.moved import MOVED
from jaxlstm.precision import low_precision
from jaxlstm.recurrence import unroll
from jaxlstm.train import TrainState, fit, init_train_state, make_train_step

__version__ = "0.2.0"

# fmt: off
__all__ = [  # noqa: RUF022
    "LSTM", "LSTMParams", "LSTMState", "LSTMGates", "split_gates",
    "GRU", "GRUParams", "GRUState", "RNN", "RNNParams", "RNNState", "make_rnn",
    "Cell", "low_precision", "num_params", "summary",
    "unroll", "length_mask", "segment_resets", "Bulk", "Scan", "Chunked", "lstm_bptt",
    "init_stack", "unroll_stack", "step_stack", "generate",
    "Bidirectional", "init_bidirectional", "unroll_bidirectional",
    "TrainState", "init_train_state", "make_train_step", "fit", "sweep",
    "diagnostics", "initializers", "regularize", "rtrl", "variants",
]
# fmt: on

# `jax.export` saves a NamedTuple only under a name registered for it.
for _kind in (
    *(LSTMParams, LSTMState, LSTMGates, GRUParams, GRUState, RNNParams, RNNState, Bidirectional, TrainState),
    *(regularize.Locked, regularize.Noisy, rtrl.RTRLState, rtrl.SnAp1Pattern, rtrl.OnlineState),
    *(diagnostics.Trace, diagnostics.CellStateTerms, diagnostics.ClosedLoopParams),
    *(variants.SLSTMGates, variants.SLSTMState),
    *(variants.PeepholeParams, variants.FullGateRecurrenceParams, variants.FullGateRecurrenceState),
    *(variants.LayerNormParams, variants.ProjectedParams, variants.LSTM1997State),
):
    with contextlib.suppress(ValueError):  # registered before this module was reloaded
        export.register_namedtuple_serialization(_kind, serialized_name=f"jaxlstm.{_kind.__name__}")


def __getattr__(name: str) -> object:
    if name in MOVED:  # an ImportError, because `from jaxlstm import name` would replace the text of any other
        raise ImportError(f"jaxlstm.{name} has moved: use {MOVED[name]}.")
    raise AttributeError(f"module 'jaxlstm' has no attribute {name!r}")
