"""Weights of other frameworks: pure functions between their arrays and parameters of this library.

    layers = from_torch(LSTM, torch_lstm.state_dict())          # a list of layers, as `init_stack` makes them
    _, ys = unroll_stack(LSTM, layers, xs)
    torch_lstm.load_state_dict({name: torch.from_numpy(value) for name, value in to_torch(LSTM, layers).items()})

No framework is imported. Where a framework stores a stack in one object, as torch does, its functions convert a list of
layers; the others convert one layer. A layer in both directions is a `Bidirectional` pair. `from_...` takes arrays of
any kind and returns JAX arrays of the same dtype; `to_...` returns NumPy arrays. To another framework and back, nothing
is rounded, except Haiku's forget bias, from which Haiku subtracts 1.

Weights do not show activations, clipping or the direction of time: choose a cell that has the same ones.

A framework with two biases adds them up, so here they become one. For inference that is the same. If you train on with
SGD, two biases move twice as fast as one. For the same reason, these functions do not convert gradients.
"""

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxlstm import Bidirectional, Cell, GRUParams, LSTMParams, RNNParams
from jaxlstm.variants import PeepholeParams, ProjectedParams

__all__ = [  # noqa: RUF022
    "from_torch", "to_torch", "from_jax_rnn", "to_jax_rnn", "from_keras", "to_keras", "from_linen", "to_linen",
    "from_nnx", "to_nnx", "from_equinox", "to_equinox", "from_haiku", "to_haiku", "from_onnx", "to_onnx_initializers",
    "read_safetensors", "write_safetensors",
]  # fmt: skip


class Kind(NamedTuple):
    """What a cell's parameters are, and the gates in the order of their columns; u is torch's z."""

    params: Any
    gates: str


KINDS = {
    "LSTM": Kind(LSTMParams, "ifgo"),
    "ProjectedLSTM": Kind(ProjectedParams, "ifgo"),
    "PeepholeLSTM": Kind(PeepholeParams, "ifgo"),
    "CoupledLSTM": Kind(LSTMParams, "igo"),
    "GRU": Kind(GRUParams, "run"),
    "RNN": Kind(RNNParams, "h"),
}


# torch, and the flat vector of jax.experimental.rnn, which has torch's layout.


def from_torch(cell: Cell[Any, Any], state_dict: Mapping[str, Any], *, prefix: str = "") -> list[Any]:
    """Return the layers of a `torch.nn.LSTM`, with or without `proj_size`, `GRU` or `RNN`; of an `LSTMCell`, one layer.

    Args:
      cell: `LSTM`, `ProjectedLSTM`, `GRU` or `RNN`.
      state_dict: arrays or tensors, such as `weight_ih_l0`: [4·hidden, input].
      prefix: of the module's names in a larger model, such as "encoder.lstm.".

    Raises:
      ValueError: an entry is missing, unexpected, or of a wrong shape or dtype; the message names it.
    """
    kind = _kind("from_torch", cell, "LSTM", "ProjectedLSTM", "GRU", "RNN")
    entries = Entries("from_torch", state_dict, prefix)
    has_bias = any("bias_" in name for name in entries)
    directions = ("", "_reverse") if "weight_ih_l0_reverse" in entries else ("",)
    layers: list[Any] = []
    input_size = None
    if "weight_ih" in entries:  # of an LSTMCell, GRUCell or RNNCell
        layers.append(_from_torch(kind, entries, "", None, has_bias))
    while not layers or f"weight_ih_l{len(layers)}" in entries:
        suffixes = [f"_l{len(layers)}{direction}" for direction in directions]
        halves = [_from_torch(kind, entries, suffix, input_size, has_bias) for suffix in suffixes]
        layers.append(_layer(f"from_torch: layer {len(layers)}", halves))
        input_size = sum(half.w_hh.shape[0] for half in halves)
    entries.check_empty()
    return layers


def _from_torch(kind: Kind, entries: "Entries", suffix: str, input_size: int | None, has_bias: bool) -> Any:
    w_ih = entries.take(f"weight_ih{suffix}", None, input_size)
    rows = w_ih.shape[0]
    hidden = entries.hidden_size(f"weight_ih{suffix}", rows, kind)
    rest, out = {}, hidden
    if kind.params is ProjectedParams:
        rest["w_hr"] = entries.take(f"weight_hr{suffix}", None, hidden).T
        out = rest["w_hr"].shape[1]
    w_hh = entries.take(f"weight_hh{suffix}", rows, out)
    biases = [entries.take(f"{name}{suffix}", rows) if has_bias else jnp.zeros(rows, w_ih.dtype) for name in BIASES]
    return kind.params(w_ih=w_ih.T, w_hh=w_hh.T, **_one_bias(kind, *biases), **rest)


def to_torch(
    cell: Cell[Any, Any], layers: Sequence[Any], *, prefix: str = "", bias: bool = True
) -> dict[str, np.ndarray]:
    """Return the state dict of a `torch.nn.LSTM`, `GRU` or `RNN`; all of b is in `bias_ih`, but b_hn in `bias_hh`.

    Args:
      cell: `LSTM`, `ProjectedLSTM`, `GRU` or `RNN`.
      layers: as `init_stack` makes them, all with the same number of units and directions.
      prefix: comes before every name.
      bias: False for a module without biases; they must be 0.

    Raises:
      TypeError: `layers` is not a list of this cell's parameters.
      ValueError: torch has no such stack; or `bias` is False and a bias is not 0.
    """
    kind = _kind("to_torch", cell, "LSTM", "ProjectedLSTM", "GRU", "RNN")
    stack = checked_stack("to_torch", cell, layers)
    if len({(len(halves), halves[0].w_hh.shape) for halves in stack}) > 1:
        raise ValueError("to_torch: torch's layers all have the same number of units and directions, these do not.")
    state_dict: dict[str, np.ndarray] = {}
    for depth, halves in enumerate(stack):
        for params, direction in zip(halves, ("", "_reverse"), strict=False):
            entries = {"weight_ih": params.w_ih.T, "weight_hh": params.w_hh.T}
            if bias:
                entries |= dict(zip(BIASES, _two_biases(params), strict=True))
            else:
                _check_no_bias("to_torch", params)
            if kind.params is ProjectedParams:
                entries["weight_hr"] = params.w_hr.T
            state_dict |= {f"{prefix}{name}_l{depth}{direction}": value for name, value in entries.items()}
    return _contiguous(state_dict)


BIASES = ("bias_ih", "bias_hh")


def from_jax_rnn(
    cell: Cell[Any, Any],
    weights: Any,
    *,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    bidirectional: bool = False,
) -> list[Any]:
    """Return the layers of the flat vector that `jax.experimental.rnn.lstm` takes.

    Raises:
      ValueError: a size is not positive, or the vector has another length.

    >>> from jaxlstm import LSTM, init_stack
    >>> layers = init_stack(jax.random.key(0), LSTM, 5, [7, 7])
    >>> flat = to_jax_rnn(LSTM, layers)
    >>> flat.shape, len(from_jax_rnn(LSTM, flat, input_size=5, hidden_size=7, num_layers=2))
    ((840,), 2)
    """
    _kind("from_jax_rnn", cell, "LSTM")
    if min(input_size, hidden_size, num_layers) < 1:
        raise ValueError("from_jax_rnn: input_size, hidden_size and num_layers must be positive.")
    weights = _array("from_jax_rnn", "weights", weights)
    shapes = list(_jax_rnn_shapes(input_size, hidden_size, num_layers, 2 if bidirectional else 1))
    ends = np.cumsum([int(np.prod(shape)) for _, shape in shapes])
    if weights.shape != (ends[-1],):
        raise ValueError(f"from_jax_rnn: weights must be [{ends[-1]}] for these sizes, got {list(weights.shape)}.")
    parts = zip(shapes, jnp.split(weights, ends[:-1]), strict=True)
    return from_torch(cell, {name: part.reshape(shape) for (name, shape), part in parts})


def to_jax_rnn(cell: Cell[Any, Any], layers: Sequence[Any]) -> np.ndarray:
    """Return the flat vector that `jax.experimental.rnn.lstm` takes.

    Raises:
      TypeError, ValueError: as `to_torch`.

    >>> from jaxlstm import LSTM
    >>> to_jax_rnn(LSTM, [LSTM.init(jax.random.key(0), 5, 7)]).shape  # 5·28 + 7·28, and two biases of 28
    (392,)
    """
    _kind("to_jax_rnn", cell, "LSTM")
    entries = to_torch(cell, layers)
    weights_then_biases = sorted(entries, key=lambda name: name.startswith(BIASES))  # stable
    return np.concatenate([entries[name].ravel() for name in weights_then_biases])


def _jax_rnn_shapes(
    input_size: int, hidden: int, num_layers: int, num_directions: int
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Return the name in torch and the shape of every part of the vector: first all weights, then all biases."""
    suffixes = [f"_l{depth}{way}" for depth in range(num_layers) for way in ("", "_reverse")[:num_directions]]
    for suffix in suffixes:
        reads = input_size if "_l0" in suffix else num_directions * hidden
        yield f"weight_ih{suffix}", (4 * hidden, reads)
        yield f"weight_hh{suffix}", (4 * hidden, hidden)
    for suffix in suffixes:
        yield from ((name + suffix, (4 * hidden,)) for name in BIASES)


# Keras.

KERAS = {"LSTM": "ifgo", "GRU": "urn", "RNN": "h"}
KERAS_NAMES = ("kernel", "recurrent_kernel", "bias")


def from_keras(cell: Cell[Any, Any], weights: Sequence[Any], *, bidirectional: bool = False) -> Any:
    """Return the parameters of a Keras `LSTM`, `GRU` or `SimpleRNN`, or of a `Bidirectional` around one.

    Args:
      cell: `LSTM`, `GRU` or `RNN`.
      weights: `layer.get_weights()`: kernel, recurrent_kernel and, if the layer has one, bias.
      bidirectional: the layer is a `Bidirectional`, which has all of them twice.

    Raises:
      ValueError: the list has another length, an array has the wrong shape or dtype, or a GRU was built with
        `reset_after=False`, which is another cell. (Without a bias, the weights do not show which one it is.)
    """
    kind = _kind("from_keras", cell, *KERAS)
    if not isinstance(weights, Sequence):
        raise TypeError(
            f"from_keras: weights must be a list, such as layer.get_weights(), got {type(weights).__name__}."
        )
    directions = ("forward ", "backward ") if bidirectional else ("",)
    size, rest = divmod(len(weights), len(directions))
    if size not in (2, 3) or rest:
        each = " for each direction" if bidirectional else ""
        raise ValueError(
            f"from_keras: weights must be kernel, recurrent_kernel, bias{each}, got {len(weights)} arrays."
        )
    halves = []
    for place, direction in enumerate(directions):
        own = dict(zip(KERAS_NAMES, weights[place * size : (place + 1) * size], strict=False))
        entries = Entries("from_keras", {direction + name: value for name, value in own.items()}, direction)
        w_ih = entries.take("kernel", None, None)
        columns = w_ih.shape[1]
        hidden = entries.hidden_size("kernel", columns, kind)
        w_hh = entries.take("recurrent_kernel", hidden, columns)
        zeros = jnp.zeros(columns, w_ih.dtype)
        b_ih, b_hh = zeros, zeros
        if "bias" in entries and kind.params is GRUParams:
            if np.ndim(own["bias"]) == 1:
                raise ValueError("from_keras: bias is of a GRU with reset_after=False, another cell than this GRU.")
            b_ih, b_hh = entries.take("bias", 2, columns)
        elif "bias" in entries:
            b_ih = entries.take("bias", columns)
        arrays = [_reorder(array, KERAS[_name(cell)], kind.gates) for array in (w_ih, w_hh, b_ih, b_hh)]
        halves.append(kind.params(w_ih=arrays[0], w_hh=arrays[1], **_one_bias(kind, *arrays[2:])))
    return _layer("from_keras", halves)


def to_keras(cell: Cell[Any, Any], params: Any, *, bias: bool = True) -> list[np.ndarray]:
    """Return what `layer.set_weights` of a Keras `LSTM`, `GRU` or `SimpleRNN` takes, or a `Bidirectional` of one.

    Args:
      cell: `LSTM`, `GRU` or `RNN`.
      params: of one layer.
      bias: False for a layer with `use_bias=False`; the biases must be 0.

    Raises:
      TypeError: `params` are not this cell's.
      ValueError: `bias` is False and a bias is not 0.
    """
    kind = _kind("to_keras", cell, *KERAS)
    weights = []
    for half in _halves(params):
        own = _numpy("to_keras", kind, half)
        b_ih, b_hh = _two_biases(own)
        if not bias:
            _check_no_bias("to_keras", own)
        biases = [np.stack([b_ih, b_hh]) if kind.params is GRUParams else b_ih] if bias else []
        weights += [_reorder(array, kind.gates, KERAS[_name(cell)]) for array in (own.w_ih, own.w_hh, *biases)]
    return [np.ascontiguousarray(array) for array in weights]


# Flax.

LINEN = {"LSTM": ("ifgo", "", "ifgo"), "GRU": ("rzn", "rzn", "n")}  # the gates; those with a bias on x, and on h


def from_linen(cell: Cell[Any, Any], tree: Mapping[str, Any]) -> Any:
    """Return the parameters of an `nn.LSTMCell`, `nn.OptimizedLSTMCell` or `nn.GRUCell`.

    Args:
      cell: `LSTM` or `GRU`.
      tree: the parameters of the cell, of a module that holds nothing else, such as an `nn.RNN`, or of an
        `nn.Bidirectional`, with the entries `forward_rnn` and `backward_rnn`.

    Raises:
      ValueError: an entry is missing, unexpected, or of a wrong shape or dtype; the message names it.
    """
    kind = _kind("from_linen", cell, *LINEN)
    tree = _inner("from_linen", tree)
    if "forward_rnn" in tree or "backward_rnn" in tree:
        parts = Entries("from_linen", tree)
        halves = [parts.subtree(way) for way in ("forward_rnn", "backward_rnn")]
        parts.check_empty()
        return _layer("from_linen", [from_linen(cell, half) for half in halves])
    flat = _by_path("from_linen", tree)
    return _from_dense(kind, Entries("from_linen", flat), *LINEN[_name(cell)])


def to_linen(cell: Cell[Any, Any], params: Any) -> dict[str, Any]:
    """Return the parameters of an `nn.LSTMCell`, `nn.OptimizedLSTMCell` or `nn.GRUCell`.

    Put them under "cell" for an `nn.RNN`. A `Bidirectional` pair becomes the tree of an `nn.Bidirectional`.

    Raises:
      TypeError: `params` are not this cell's.
    """
    kind = _kind("to_linen", cell, *LINEN)
    if isinstance(params, Bidirectional):
        return {f"{way}_rnn": {"cell": to_linen(cell, half)} for way, half in params._asdict().items()}
    return _to_dense(_numpy("to_linen", kind, params), *LINEN[_name(cell)])


def from_nnx(cell: Cell[Any, Any], tree: Mapping[str, Any]) -> Any:
    """Return the parameters of an `nnx.LSTMCell`, `nnx.OptimizedLSTMCell` or `nnx.GRUCell`, which has no b_hn.

    Args:
      cell: `LSTM` or `GRU`.
      tree: `nnx.state(module, nnx.Param)` of the cell or of an `nnx.RNN` around it, or that state as nested dicts.

    Raises:
      ValueError: an entry is missing, unexpected, or of a wrong shape or dtype; the message names it.
    """
    kind = _kind("from_nnx", cell, "LSTM", "GRU")
    flat = _by_path("from_nnx", _inner("from_nnx", tree))
    if kind.params is LSTMParams and not any(name.startswith("dense_") for name in flat):
        flat = {name.replace("if_/", "if/"): value for name, value in flat.items()}
        return _from_dense(kind, Entries("from_nnx", flat), *LINEN["LSTM"])
    entries = Entries("from_nnx", flat)
    w_ih = entries.take("dense_i/kernel", None, None)
    columns = w_ih.shape[1]
    w_hh = entries.take("dense_h/kernel", entries.hidden_size("dense_i/kernel", columns, kind), columns)
    b = entries.take("dense_h/bias" if kind.params is LSTMParams else "dense_i/bias", columns)
    entries.check_empty()
    return kind.params(w_ih=w_ih, w_hh=w_hh, **_one_bias(kind, b, jnp.zeros_like(b)))


def to_nnx(cell: Cell[Any, Any], params: Any, *, optimized: bool = True) -> dict[str, Any]:
    """Return the parameters of an `nnx.OptimizedLSTMCell` or `nnx.GRUCell`, for `nnx.update(module, tree)`.

    Args:
      cell: `LSTM` or `GRU`.
      params: of one layer in one direction.
      optimized: False for an `nnx.LSTMCell`, which stores one matrix per gate.

    Raises:
      TypeError: `params` are not this cell's.
      ValueError: b_hn of a GRU is not 0.
    """
    own = _numpy("to_nnx", _kind("to_nnx", cell, "LSTM", "GRU"), params)
    if isinstance(own, GRUParams):
        if np.any(own.b_hn):
            raise ValueError("to_nnx: nnx.GRUCell has no b_hn, and params.b_hn is not 0.")
        return {"dense_i": {"kernel": own.w_ih, "bias": own.b}, "dense_h": {"kernel": own.w_hh}}
    if optimized:
        return {"dense_i": {"kernel": own.w_ih}, "dense_h": {"kernel": own.w_hh, "bias": own.b}}
    tree = _to_dense(own, *LINEN["LSTM"])
    return {"if_" if name == "if" else name: dense for name, dense in tree.items()}


def _from_dense(kind: Kind, entries: "Entries", gates: str, of_x: str, of_h: str) -> Any:
    """Join one matrix per gate, such as `ii/kernel`; `of_x` and `of_h` are the gates with a bias on x and on h."""
    first = entries.take(f"i{gates[0]}/kernel", None, None)
    input_size, hidden = first.shape
    w_ih = [first, *(entries.take(f"i{gate}/kernel", input_size, hidden) for gate in gates[1:])]
    w_hh = [entries.take(f"h{gate}/kernel", hidden, hidden) for gate in gates]
    zeros = jnp.zeros(hidden, first.dtype)
    b_ih = [entries.take(f"i{gate}/bias", hidden) if gate in of_x else zeros for gate in gates]
    b_hh = [entries.take(f"h{gate}/bias", hidden) if gate in of_h else zeros for gate in gates]
    entries.check_empty()
    joined = [jnp.concatenate(blocks, -1) for blocks in (w_ih, w_hh, b_ih, b_hh)]
    return kind.params(w_ih=joined[0], w_hh=joined[1], **_one_bias(kind, *joined[2:]))


def _to_dense(params: Any, gates: str, of_x: str, of_h: str) -> dict[str, dict[str, np.ndarray]]:
    b, second = _two_biases(params)
    b_ih, b_hh = (b, second) if of_x else (second, b)  # a cell without biases on x has all of b on h
    tree: dict[str, dict[str, np.ndarray]] = {}
    for side, w, bias, biased in (("i", params.w_ih, b_ih, of_x), ("h", params.w_hh, b_hh, of_h)):
        for gate, kernel, b_gate in zip(gates, *(np.split(v, len(gates), -1) for v in (w, bias)), strict=True):
            tree[side + gate] = _contiguous({"kernel": kernel} | ({"bias": b_gate} if gate in biased else {}))
    return tree


# Equinox.


def from_equinox(cell: Cell[Any, Any], fields: Mapping[str, Any]) -> Any:
    """Return the parameters of an `eqx.nn.LSTMCell` or `eqx.nn.GRUCell`.

    Args:
      cell: `LSTM` or `GRU`.
      fields: `vars(module)`: weight_ih [gates·hidden, input], weight_hh, bias, and bias_n of a GRU.

    Raises:
      ValueError: an entry is missing, unexpected, or of a wrong shape or dtype; the message names it.
    """
    kind = _kind("from_equinox", cell, "LSTM", "GRU")
    static = ("input_size", "hidden_size", "use_bias")
    entries = Entries("from_equinox", fields)
    entries.left = {name: value for name, value in entries.left.items() if name not in static and value is not None}
    w_ih = entries.take("weight_ih", None, None)
    rows = w_ih.shape[0]
    hidden = entries.hidden_size("weight_ih", rows, kind)
    w_hh = entries.take("weight_hh", rows, hidden)
    has_bias = "bias" in entries or "bias_n" in entries
    b = entries.take("bias", rows) if has_bias else jnp.zeros(rows, w_ih.dtype)
    rest = {}
    if kind.params is GRUParams:
        rest["b_hn"] = entries.take("bias_n", hidden) if has_bias else jnp.zeros(hidden, w_ih.dtype)
    entries.check_empty()
    return kind.params(w_ih=w_ih.T, w_hh=w_hh.T, b=b, **rest)


def to_equinox(cell: Cell[Any, Any], params: Any, *, bias: bool = True) -> dict[str, np.ndarray]:
    """Return the arrays of an `eqx.nn.LSTMCell` or `eqx.nn.GRUCell` by field, for `eqx.tree_at`.

    Args:
      cell: `LSTM` or `GRU`.
      params: of one layer in one direction.
      bias: False for a cell with `use_bias=False`; the biases must be 0.

    Raises:
      TypeError: `params` are not this cell's.
      ValueError: `bias` is False and a bias is not 0.
    """
    own = _numpy("to_equinox", _kind("to_equinox", cell, "LSTM", "GRU"), params)
    fields = {"weight_ih": own.w_ih.T, "weight_hh": own.w_hh.T}
    if not bias:
        _check_no_bias("to_equinox", own)
        return _contiguous(fields)
    fields |= {"bias": own.b} | ({"bias_n": own.b_hn} if isinstance(own, GRUParams) else {})
    return _contiguous(fields)


# Haiku.


def from_haiku(cell: Cell[Any, Any], linear: Mapping[str, Any]) -> LSTMParams:
    """Return the parameters of an `hk.LSTM`. Haiku adds 1 to the forget bias when it runs; here that 1 is in `b`.

    Args:
      cell: `LSTM`.
      linear: `params["lstm/linear"]`: w [input+hidden, 4·hidden] and b, columns in the order i, g, f, o.

    Raises:
      ValueError: an entry is missing, unexpected, or of a wrong shape or dtype; the message names it. An `hk.GRU`
        resets h before its matmul: it is another cell.
    """
    if {"w_i", "w_h"} <= set(linear):
        raise ValueError("from_haiku: w_i and w_h are of an hk.GRU, which resets h before the matmul: another cell.")
    kind = _kind("from_haiku", cell, "LSTM")
    entries = Entries("from_haiku", linear)
    w = entries.take("w", None, None)
    hidden = entries.hidden_size("w", w.shape[1], kind)
    if w.shape[0] <= hidden:
        raise ValueError(f"from_haiku: w must be [input+{hidden}, {4 * hidden}], got {list(w.shape)}.")
    b = entries.take("b", 4 * hidden)
    entries.check_empty()
    w, b = _reorder(w, "igfo", "ifgo"), _reorder(b, "igfo", "ifgo")
    return LSTMParams(w[:-hidden], w[-hidden:], b.at[hidden : 2 * hidden].add(1))


def to_haiku(cell: Cell[Any, Any], params: LSTMParams) -> dict[str, np.ndarray]:
    """Return the parameters of an `hk.LSTM`: what belongs under "lstm/linear".

    Raises:
      TypeError: `params` are not the LSTM's.
    """
    own = _numpy("to_haiku", _kind("to_haiku", cell, "LSTM"), params)
    hidden, b = own.w_hh.shape[0], own.b
    b[hidden : 2 * hidden] -= 1
    w = np.concatenate([own.w_ih, own.w_hh])
    return {"w": _reorder(w, "ifgo", "igfo"), "b": _reorder(b, "ifgo", "igfo")}


# ONNX.

ONNX = {"LSTM": "iofg", "PeepholeLSTM": "iofg", "CoupledLSTM": "iofg", "GRU": "urn", "RNN": "h"}


def from_onnx(
    cell: Cell[Any, Any], initializers: Mapping[str, Any], *, linear_before_reset: int = 0, input_forget: int = 0
) -> Any:
    """Return the parameters of an ONNX `LSTM`, `GRU` or `RNN` operator.

    Args:
      cell: `LSTM`, `PeepholeLSTM`, `CoupledLSTM`, `GRU` or `RNN`.
      initializers: the operator's inputs W [directions, gates·hidden, input], R, and if it has them B and P.
      linear_before_reset: the attribute of a GRU; with ONNX's default of 0, it is another cell.
      input_forget: the attribute of an LSTM; 1 for `CoupledLSTM`, 0 for the others.

    Returns:
      The parameters, or a `Bidirectional` pair of them for two directions.

    Raises:
      ValueError: an entry is missing, unexpected, or of a wrong shape or dtype; the message names it.
    """
    kind, order = _kind("from_onnx", cell, *ONNX), ONNX[_name(cell)]
    if kind.params is GRUParams and linear_before_reset != 1:
        raise ValueError("from_onnx: a GRU with linear_before_reset=0 is another cell; pass 1 if the operator says so.")
    if input_forget != (cell.name == "CoupledLSTM"):
        raise ValueError(f"from_onnx: an LSTM with input_forget={input_forget} is another cell than {cell.name}.")
    entries = Entries("from_onnx", initializers)
    w_ih = entries.take("W", None, None, None)
    directions, rows, _ = w_ih.shape
    if directions not in (1, 2):
        raise ValueError(f"from_onnx: W must have 1 or 2 directions, got {directions}.")
    hidden = entries.hidden_size("W", rows, kind, len(order))
    w_hh = entries.take("R", directions, rows, hidden)
    has_bias, has_peepholes = "B" in entries, kind.params is PeepholeParams
    b = entries.take("B", directions, 2 * rows) if has_bias else jnp.zeros((directions, 2 * rows), w_ih.dtype)
    p = entries.take("P", directions, 3 * hidden) if has_peepholes else jnp.zeros((directions, 0), w_ih.dtype)
    entries.check_empty()
    halves = []
    for w_ih_k, w_hh_k, b_k, p_k in zip(w_ih, w_hh, b, p, strict=True):
        arrays = [_reorder(array, order, kind.gates) for array in (w_ih_k.T, w_hh_k.T, *jnp.split(b_k, 2))]
        rest = {"p": _reorder(p_k, "iof", "ifo")} if has_peepholes else {}
        halves.append(kind.params(w_ih=arrays[0], w_hh=arrays[1], **_one_bias(kind, *arrays[2:]), **rest))
    return _layer("from_onnx", halves)


def to_onnx_initializers(cell: Cell[Any, Any], params: Any) -> dict[str, np.ndarray]:
    """Return W, R, B and for peepholes P of the ONNX operator; `adapters.onnx.to_onnx` writes the whole model.

    A `CoupledLSTM` has no forget gate of its own: ONNX, with `input_forget=1`, does not read the zeros in its place.

    Raises:
      TypeError: `params` are not this cell's.

    >>> from jaxlstm import LSTM
    >>> found = to_onnx_initializers(LSTM, LSTM.init(jax.random.key(0), 5, 7))
    >>> {name: array.shape for name, array in found.items()}
    {'W': (1, 28, 5), 'R': (1, 28, 7), 'B': (1, 56)}
    """
    kind = _kind("to_onnx_initializers", cell, *ONNX)
    return initializers_of(cell, [_numpy("to_onnx_initializers", kind, half) for half in _halves(params)])


def initializers_of(cell: Cell[Any, Any], halves: Sequence[Any]) -> dict[str, np.ndarray]:
    """Return W, R, B and P of one layer's directions, which are NumPy arrays already."""
    kind, order = KINDS[_name(cell)], ONNX[_name(cell)]
    initializers: dict[str, list[np.ndarray]] = {}
    for own in halves:
        arrays = [_reorder(array, kind.gates, order) for array in (own.w_ih, own.w_hh, *_two_biases(own))]
        entries = {"W": arrays[0].T, "R": arrays[1].T, "B": np.concatenate(arrays[2:])}
        entries |= {"P": _reorder(own.p, "ifo", "iof")} if isinstance(own, PeepholeParams) else {}
        for name, value in entries.items():
            initializers.setdefault(name, []).append(value)
    return {name: np.stack(values) for name, values in initializers.items()}


# Files.


def read_safetensors(path: str | os.PathLike[str], *, like: Any = None) -> Any:
    """Return the arrays of a safetensors file. It holds arrays only: reading it runs no code.

    Args:
      path: the file.
      like: a pytree with the structure, shapes and dtypes that `write_safetensors` wrote, such as new parameters, or
        what `jax.eval_shape` returns for them.

    Returns:
      NumPy arrays by name, a dict. With `like`, the pytree again, with JAX arrays as its leaves.

    Raises:
      ValueError: the file is truncated, or is not a safetensors file, such as a pickle that `torch.save` wrote; or an
        array is not as in `like`, or has 64 bits where JAX has 32.
    """
    import safetensors
    import safetensors.numpy

    try:
        arrays = safetensors.numpy.load_file(path)
    except safetensors.SafetensorError as error:
        cure = "Convert a pickle where it was made, with safetensors.torch.save_file."
        raise ValueError(f"read_safetensors: {path} is not a whole safetensors file: {error}. {cure}") from None
    if like is None:
        return arrays
    expected, found = (
        {name: f"{leaf.dtype}{list(leaf.shape)}" for name, leaf in tree.items()}
        for tree in (_by_path("read_safetensors", like), arrays)
    )
    for name in [*expected, *found]:
        want, got = (shapes.get(name, "absent") for shapes in (expected, found))
        if want != got:
            raise ValueError(f"read_safetensors: {name} is {got} in {path}, but {want} in `like`.")
    leaves = {name: jnp.asarray(arrays[name]) for name in expected}
    for name, leaf in leaves.items():
        if leaf.dtype != arrays[name].dtype:
            cure = "Turn on jax_enable_x64, or leave `like` out."
            raise ValueError(f"read_safetensors: {name} is {arrays[name].dtype}, which JAX would round. {cure}")
    return jax.tree.unflatten(jax.tree.structure(like), list(leaves.values()))


def write_safetensors(path: str | os.PathLike[str], arrays: Any) -> None:
    """Write a pytree of arrays to a safetensors file, under names such as "layers/0/w_ih" or "cell/ii/kernel".

    Raises:
      ValueError: two arrays would have one name.
    """
    import safetensors.numpy

    safetensors.numpy.save_file(_contiguous(_by_path("write_safetensors", arrays)), path)


# What the functions above share.


class Entries:
    """A framework's arrays by name, each to be taken once; the errors name the function and the entry."""

    def __init__(self, function: str, arrays: Mapping[str, Any], prefix: str = ""):
        if not isinstance(arrays, Mapping):
            raise TypeError(f"{function}: expected arrays by name, such as a dict, got {type(arrays).__name__}.")
        self.function, self.prefix = function, prefix
        self.left = {name[len(prefix) :]: value for name, value in arrays.items() if name.startswith(prefix)}
        self.dtype: Any = None

    def __iter__(self) -> Iterator[str]:
        return iter(self.left)

    def take(self, name: str, *shape: int | None) -> Array:
        """Return an array of this shape, where None stands for any size, and of the dtype of those before it."""
        array = _array(self.function, self.prefix + name, self.subtree(name))
        if array.ndim != len(shape) or any(n is not None and n != m for n, m in zip(shape, array.shape, strict=True)):
            expected = ", ".join("any" if n is None else str(n) for n in shape)
            raise self.error(name, f"must be [{expected}], got {list(array.shape)}")
        self.dtype = array.dtype if self.dtype is None else self.dtype
        if array.dtype != self.dtype:
            raise self.error(name, f"is {array.dtype}, unlike the entries before it, which are {self.dtype}")
        return array

    def subtree(self, name: str) -> Any:
        """Return an entry as it is."""
        if name not in self.left:
            found = ", ".join(sorted(self.left)) or "nothing"
            raise self.error(name, f"is missing; the entries left are {found}")
        return self.left.pop(name)

    def hidden_size(self, name: str, size: int, kind: Kind, gates: int | None = None) -> int:
        """Return the units of a cell whose blocks together have this size."""
        gates = len(kind.gates) if gates is None else gates
        if size % gates:
            raise self.error(name, f"has {size} numbers for {gates} gates: it is another cell's")
        return size // gates

    def check_empty(self) -> None:
        """Refuse what nothing has taken."""
        for name in self.left:
            raise self.error(name, "is unexpected: this cell and its number of layers do not have it")

    def error(self, name: str, what: str) -> ValueError:
        return ValueError(f"{self.function}: entry {self.prefix}{name} {what}.")


def _array(function: str, name: str, value: Any) -> Array:
    """Return a floating JAX array without loss, or name the entry."""
    try:
        if not isinstance(value, jax.Array):  # a variable of nnx, or anything that NumPy can read
            value = value.__jax_array__() if hasattr(value, "__jax_array__") else np.asarray(value)
    except (TypeError, ValueError, RuntimeError) as error:  # a tensor on a GPU, or of a type that NumPy lacks
        cure = "pass a NumPy array, such as tensor.float().cpu().numpy()"
        raise ValueError(f"{function}: entry {name} cannot be read as an array: {error}; {cure}.") from None
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise ValueError(f"{function}: entry {name} must be a floating array, got {value.dtype}.")
    if jax.dtypes.canonicalize_dtype(value.dtype) != value.dtype:
        cure = 'call jax.config.update("jax_enable_x64", True) first, or cast it'
        raise ValueError(f"{function}: entry {name} is {value.dtype}, which JAX would round; {cure}.")
    return jnp.asarray(value)


def _by_path(function: str, tree: Any) -> dict[str, Any]:
    """Return the leaves of a pytree by path, such as "layers/0/w_ih", in JAX's order."""
    leaves = jax.tree.leaves_with_path(tree, is_leaf=lambda value: hasattr(value, "dtype"))  # a variable of nnx
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in leaves]
    if len(set(names)) < len(names):
        raise ValueError(f"{function}: two arrays would have one name, among {', '.join(names)}.")
    return dict(zip(names, (leaf for _, leaf in leaves), strict=True))


def _inner(function: str, tree: Any) -> Mapping[str, Any]:
    """Return the first tree with more than one entry: modules around a cell have one."""
    while isinstance(tree, Mapping) and len(tree) == 1 and isinstance(inner := next(iter(tree.values())), Mapping):
        tree = inner
    return Entries(function, tree).left


def _name(cell: Cell[Any, Any]) -> str:
    return cell.name.partition("(")[0]


def _kind(function: str, cell: Any, *names: str) -> Kind:
    """Return what the cell's parameters are; refuse a cell that the other side does not have."""
    if not isinstance(cell, Cell):
        raise TypeError(f"{function}: cell must be a Cell such as LSTM, got {type(cell).__name__}.")
    if _name(cell) not in names:
        raise ValueError(f"{function}: cell must be one of {', '.join(names)}, got {cell.name}.")
    return KINDS[_name(cell)]


def _numpy(function: str, kind: Kind, params: Any) -> Any:
    """Return parameters as NumPy arrays."""
    if not isinstance(params, kind.params):
        raise TypeError(f"{function}: expected {kind.params.__name__}, got {type(params).__name__}.")
    return kind.params(*map(np.array, params))  # copies: torch warns about arrays that it cannot write to


def check_list(function: str, layers: Any) -> None:
    """Raise an error unless `layers` is a list, rather than the parameters of a single layer."""
    if not isinstance(layers, list | tuple) or hasattr(layers, "_fields") or not layers:
        raise TypeError(f"{function}: layers must be a list with one entry per layer, got {type(layers).__name__}.")


def checked_stack(function: str, cell: Cell[Any, Any], layers: Any) -> list[list[Any]]:
    """Return the directions of every layer as NumPy arrays; check that each layer reads what the one below returns."""
    check_list(function, layers)
    kind = KINDS[_name(cell)]
    stack = [[_numpy(function, kind, half) for half in _halves(layer)] for layer in layers]
    reads, dtype = stack[0][0].w_ih.shape[0], stack[0][0].w_ih.dtype
    for depth, halves in enumerate(stack):
        for half in halves:
            got = (half.w_ih.dtype, half.w_ih.shape[0])
            if got != (dtype, reads):
                expected = f"{dtype} and {reads} features"
                raise ValueError(f"{function}: layer {depth} must read {expected}, got {got[0]} and {got[1]}.")
        reads = sum(half.w_hh.shape[0] for half in halves)
    return stack


def _layer(place: str, halves: list[Any]) -> Any:
    """Return one direction, or two of the same shapes as a pair."""
    if len(halves) == 1:
        return halves[0]
    for name in halves[0]._fields:
        forward, backward = (f"{v.dtype}{list(v.shape)}" for v in (getattr(half, name) for half in halves))
        if forward != backward:
            raise ValueError(f"{place}: {name} is {forward} forward and {backward} backward; both must be alike.")
    return Bidirectional(*halves)


def _halves(layer: Any) -> tuple[Any, ...]:
    return tuple(layer) if isinstance(layer, Bidirectional) else (layer,)


def _reorder(array: Any, old: str, new: str) -> Any:
    """Reorder blocks of the last axis; a block that `old` lacks becomes 0."""
    numpy = array.__array_namespace__()  # NumPy or jax.numpy
    size = array.shape[-1] // len(old)
    blocks = {gate: array[..., k * size : (k + 1) * size] for k, gate in enumerate(old)}
    zeros = numpy.zeros_like(blocks[old[0]])
    return numpy.concatenate([blocks.get(gate, zeros) for gate in new], axis=-1)


def _one_bias(kind: Kind, b_ih: Array, b_hh: Array) -> dict[str, Array]:
    """Add two biases up, except where a GRU multiplies one of them by its reset gate."""
    if kind.params is not GRUParams:
        return {"b": b_ih + b_hh}
    r, u, n = jnp.split(b_hh, 3)
    return {"b": b_ih + jnp.concatenate([r, u, jnp.zeros_like(n)]), "b_hn": n}


def _two_biases(params: Any) -> tuple[np.ndarray, np.ndarray]:
    """Return all of b as the first bias; the second is 0, but for b_hn."""
    second = np.zeros_like(params.b)
    if isinstance(params, GRUParams):
        second[2 * len(params.b_hn) :] = params.b_hn
    return params.b, second


def _check_no_bias(function: str, params: Any) -> None:
    if np.any(params.b) or np.any(getattr(params, "b_hn", 0)):
        raise ValueError(f"{function}: bias=False, but the biases of params are not 0.")


def _contiguous(arrays: Mapping[str, Any]) -> dict[str, np.ndarray]:
    # Not `ascontiguousarray`, which gives a number an axis.
    return {name: np.asarray(value, order="C") for name, value in arrays.items()}
