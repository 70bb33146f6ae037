"""Write a stack as an ONNX model, for runtimes without JAX. Needs the extra `jaxlstm[onnx]`.

    model = to_onnx(LSTM, layers, lengths=True)
    onnx.save(model, "lstm.onnx")
    session = onnxruntime.InferenceSession("lstm.onnx")
    [ys] = session.run(["ys"], {"xs": xs, "lengths": lengths})

`jaxlstm.adapters.weights` reads the weights of an ONNX model; to run a model without its Python code but with JAX, use
`jax.export` (docs/deployment.md).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from jaxlstm import GRU, LSTM, Cell, make_rnn
from jaxlstm.adapters import weights
from jaxlstm.variants import CoupledLSTM, PeepholeLSTM


def _equations(cell: Cell[Any, Any]) -> Any:
    return cell.project, cell.recur, cell.gates


# The ONNX operator of a cell's equations, and its attributes.
OPERATORS: dict[Any, tuple[str, dict[str, Any]]] = {
    _equations(LSTM): ("LSTM", {}),
    _equations(PeepholeLSTM): ("LSTM", {}),
    _equations(CoupledLSTM): ("LSTM", {"input_forget": 1}),
    _equations(GRU): ("GRU", {"linear_before_reset": 1}),
    **{_equations(make_rnn(phi)): ("RNN", {"activations": [phi.capitalize()]}) for phi in ("tanh", "relu", "sigmoid")},
}
DTYPES = ("float16", "float32", "float64")
OPSET, IR_VERSION = 14, 8  # later versions of these operators only add dtypes


def to_onnx(
    cell: Cell[Any, Any],
    layers: Sequence[Any],
    *,
    lengths: bool = False,
    initial_carries: bool = False,
    readout: tuple[Any, Any] | None = None,
) -> onnx.ModelProto:
    """Return an ONNX model of `unroll_stack`, for any number of steps and any batch.

    The inputs are `xs` [time, batch, input] and those that the options add. The outputs are `ys` [time, batch,
    features], and of every layer the carry after the sequence, `layer_0.h_n` and, of an LSTM, `layer_0.c_n`, each
    [directions, batch, hidden].

    Args:
      cell: `LSTM`, `GRU`, an RNN, `PeepholeLSTM` or `CoupledLSTM`.
      layers: as `init_stack` makes them, of float32, or another dtype that your runtime supports (ONNX Runtime: none).
      lengths: add the input `lengths` [batch], int32, each at least 1; outputs beyond a length are 0.
      initial_carries: add the inputs `layer_0.h` and, for an LSTM, `layer_0.c`, and so on; otherwise they are 0.
      readout: (w [features, outputs], b [outputs]): ys become ys w + b, at every step.

    Raises:
      TypeError: `layers` is not a list of this cell's parameters.
      ValueError: ONNX has no such cell, or opset 14 no such dtype.
    """
    if not isinstance(cell, Cell) or _equations(cell) not in OPERATORS:
        names = "LSTM, GRU, RNN, PeepholeLSTM or CoupledLSTM"
        raise ValueError(f"to_onnx: cell must be {names}, unmodified, got {getattr(cell, 'name', cell)}.")
    stack = weights.checked_stack("to_onnx", cell, layers)
    arrays = [weights.initializers_of(cell, halves) for halves in stack]
    dtype, input_size = arrays[0]["W"].dtype, arrays[0]["W"].shape[2]
    if dtype.name not in DTYPES:
        raise ValueError(f"to_onnx: layers must be of {', '.join(DTYPES)}, got {dtype}; cast them.")
    graph = _Graph(dtype)
    ys = graph.add_input("xs", "time", "batch", input_size)
    if lengths:
        graph.inputs.append(helper.make_tensor_value_info("lengths", onnx.TensorProto.INT32, ["batch"]))
    features = 0
    for depth, of_layer in enumerate(arrays):
        given = ("lengths" if lengths else "", initial_carries)
        ys, features = _add_layer(graph, OPERATORS[_equations(cell)], of_layer, f"layer_{depth}", ys, *given)
    if readout is not None:
        if not isinstance(readout, tuple | list) or len(readout) != 2:
            raise TypeError(f"to_onnx: readout must be a pair (w, b), got {type(readout).__name__}.")
        w, b = (np.asarray(value) for value in readout)
        if w.ndim != 2 or w.shape[0] != features or b.shape != w.shape[1:] or {w.dtype, b.dtype} != {dtype}:
            got = f"{w.dtype}{list(w.shape)} and {b.dtype}{list(b.shape)}"
            raise ValueError(f"to_onnx: readout must be ([{features}, outputs], [outputs]) of {dtype}, got {got}.")
        product = graph.add("MatMul", [ys, graph.add_constant("readout.w", w)], "readout.product")
        ys, features = graph.add("Add", [product, graph.add_constant("readout.b", b)], "readout.ys"), w.shape[1]
    graph.add("Identity", [ys], "ys")
    graph.add_output("ys", "time", "batch", features)
    return graph.model()


def _add_layer(
    graph: "_Graph",
    operator: tuple[str, dict[str, Any]],
    arrays: dict[str, np.ndarray],
    layer: str,
    xs: str,
    lengths: str,
    initial_carries: bool,
) -> tuple[str, int]:
    """Add a layer that reads `xs`; return the name of its outputs [time, batch, features], and their features."""
    (kind, attributes), (directions, _, hidden) = operator, arrays["R"].shape
    carry = [f"{layer}.{state}" for state in ("hc" if kind == "LSTM" else "h")]
    for name in carry:
        if initial_carries:
            graph.add_input(name, directions, "batch", hidden)
        graph.add_output(f"{name}_n", directions, "batch", hidden)
    # An absent input is an empty name. The peepholes P, which come last, are simply left out.
    names = {name: graph.add_constant(f"{layer}.{name}", value) for name, value in arrays.items()}
    inputs = [xs, names["W"], names["R"], names["B"], lengths, *(name if initial_carries else "" for name in carry)]
    inputs += [names["P"]] if "P" in names else []
    if "activations" in attributes:  # one for each direction
        attributes = {"activations": directions * attributes["activations"]}
    direction = "bidirectional" if directions == 2 else "forward"
    outputs = [f"{layer}.outputs", *(f"{name}_n" for name in carry)]
    graph.add(kind, inputs, *outputs, hidden_size=hidden, direction=direction, **attributes)
    # [time, directions, batch, hidden] -> [time, batch, directions·hidden]
    if directions == 1:
        axis = graph.add_constant(f"{layer}.axis", np.array([1]))
        return graph.add("Squeeze", [outputs[0], axis], f"{layer}.ys"), hidden
    swapped = graph.add("Transpose", outputs[:1], f"{layer}.swapped", perm=[0, 2, 1, 3])
    shape = graph.add_constant(f"{layer}.shape", np.array([0, 0, -1]))  # 0 keeps a size
    return graph.add("Reshape", [swapped, shape], f"{layer}.ys"), directions * hidden


class _Graph:
    """An ONNX graph while it grows; its inputs and outputs are of one dtype."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = helper.np_dtype_to_tensor_dtype(dtype)
        self.nodes: list[Any] = []
        self.inputs: list[Any] = []
        self.outputs: list[Any] = []
        self.constants: list[Any] = []

    def add(self, operator: str, inputs: list[str], *outputs: str, **attributes: Any) -> str:
        """Add a node; return the name of its first output."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, **attributes))
        return outputs[0]

    def add_input(self, name: str, *shape: int | str) -> str:
        self.inputs.append(helper.make_tensor_value_info(name, self.dtype, shape))
        return name

    def add_output(self, name: str, *shape: int | str) -> None:
        self.outputs.append(helper.make_tensor_value_info(name, self.dtype, shape))

    def add_constant(self, name: str, value: np.ndarray) -> str:
        self.constants.append(numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def model(self) -> onnx.ModelProto:
        """Return the checked model."""
        graph = helper.make_graph(self.nodes, "jaxlstm", self.inputs, self.outputs, self.constants)
        opsets = [helper.make_opsetid("", OPSET)]
        model = helper.make_model(graph, producer_name="jaxlstm", opset_imports=opsets, ir_version=IR_VERSION)
        onnx.checker.check_model(model, full_check=True)
        return model
