"""LSTM layers of other libraries, on the same weights and inputs, each to be timed in a process of its own.

`python -m experiments.peers NAME` is such a process: it reads one question a line from standard input, as JSON, and
answers each in a line. `experiments.benchmark` asks.
"""

import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import numpy as np

Shape = tuple[int, int, int, int]  # T, B, I, H
Arrays = dict[str, np.ndarray]


class Layer(NamedTuple):
    """A layer with weights and inputs set: what is timed, and how to read its results."""

    forward: Callable[[], Any]  # ys
    gradient: Callable[[], Any] | None  # of Σ ys · weight, by the weights and by xs
    read: Callable[
        [Any, Any], Arrays
    ]  # (ys, gradient) -> ys [T,B,H], and d_w_ih, d_w_hh, d_b, d_xs as jaxlstm has them
    compiled: Any = None  # the gradient as JAX compiled it


def problem(shape: Shape) -> Arrays:
    """Draw weights as layers start with, inputs and a random cotangent; the same in every process."""
    num_steps, batch, input_size, hidden = shape
    rng, bound = np.random.default_rng(0), hidden**-0.5
    draw = {
        "w_ih": rng.uniform(-bound, bound, (input_size, 4 * hidden)),
        "w_hh": rng.uniform(-bound, bound, (hidden, 4 * hidden)),
        "b": rng.uniform(-bound, bound, 4 * hidden),
        "xs": rng.normal(size=(num_steps, batch, input_size)),
        "weight": rng.normal(size=(num_steps, batch, hidden)),
    }
    return {name: value.astype(np.float32) for name, value in draw.items()}


def of_jax(
    apply: Callable[[Any, Any], Any], params: Any, given: Arrays, back: Callable[[Any], Any], batch_major: bool = False
) -> Layer:
    """Make a layer of `apply(params, xs) -> ys`, compiled; `back` turns its gradients into (d_w_ih, d_w_hh, d_b)."""
    import jax

    axes = (lambda v: v.swapaxes(0, 1)) if batch_major else (lambda v: v)
    arguments = jax.device_put((params, axes(given["xs"]), axes(given["weight"])))
    forward = jax.jit(lambda p, x, w: apply(p, x)).lower(*arguments).compile()
    loss = lambda p, x, w: (apply(p, x) * w).sum()
    gradient = jax.jit(jax.grad(loss, (0, 1))).lower(*arguments).compile()
    done = lambda run: lambda: jax.block_until_ready(run(*arguments))

    def read(ys: Any, gradients: Any) -> Arrays:
        d_params, d_xs = jax.tree.map(np.asarray, gradients)
        weights = zip(("d_w_ih", "d_w_hh", "d_b"), back(d_params), strict=True)
        return {"ys": axes(np.asarray(ys)), "d_xs": axes(d_xs), **dict(weights)}

    return Layer(done(forward), done(gradient), read, gradient)


def jaxlstm(given: Arrays, gradient: Literal["bulk", "scan"]) -> Layer:
    import jax

    from jaxlstm import LSTM, LSTMParams, unroll

    params = LSTMParams(*(jax.numpy.asarray(given[name]) for name in ("w_ih", "w_hh", "b")))
    run = lambda params, xs: unroll(LSTM, params, xs, gradient=gradient)[1]
    return of_jax(run, params, given, tuple)


def linen(given: Arrays, cell: str) -> Layer:
    from flax import linen as nn

    layer = nn.RNN(getattr(nn, cell)(given["w_hh"].shape[0]), time_major=True)
    gates = [np.split(given[name], 4, axis=-1) for name in ("w_ih", "w_hh", "b")]
    params: dict[str, Any] = {}
    for gate, w_ih, w_hh, b in zip("ifgo", *gates, strict=True):
        params |= {f"i{gate}": {"kernel": w_ih}, f"h{gate}": {"kernel": w_hh, "bias": b}}

    def back(d: Any) -> Any:
        d = d["params"]["cell"]
        join = lambda prefix, name: np.concatenate([d[prefix + gate][name] for gate in "ifgo"], -1)
        return join("i", "kernel"), join("h", "kernel"), join("h", "bias")

    return of_jax(layer.apply, {"params": {"cell": params}}, given, back)


def nnx(given: Arrays, cell: str) -> Layer:
    import jax.numpy as jnp
    from flax import nnx as library

    input_size, hidden = given["w_ih"].shape[0], given["w_hh"].shape[0]
    rngs = library.Rngs(0)
    layer = library.RNN(getattr(library, cell)(input_size, hidden, rngs=rngs), time_major=True, rngs=rngs)
    graph, params, rest = library.split(layer, library.Param, ...)
    flat = dict(library.to_flat_state(params))
    path = lambda layer, name: ("cell", layer, name)
    if cell == "OptimizedLSTMCell":
        own = {
            path("dense_i", "kernel"): given["w_ih"],
            path("dense_h", "kernel"): given["w_hh"],
            path("dense_h", "bias"): given["b"],
        }
        back = lambda d: tuple(d[name] for name in own)
    else:
        dense = ["i", "f", "g", "o"]
        inputs = [path("if_" if gate == "f" else f"i{gate}", "kernel") for gate in dense]
        kernels, biases = ([path(f"h{gate}", name) for gate in dense] for name in ("kernel", "bias"))
        names = (inputs, kernels, biases)
        gates = [np.split(given[name], 4, axis=-1) for name in ("w_ih", "w_hh", "b")]
        own = {
            name: value
            for group, values in zip(names, gates, strict=True)
            for name, value in zip(group, values, strict=True)
        }
        back = lambda d: tuple(np.concatenate([d[name] for name in group], -1) for group in names)
    for name, value in own.items():
        flat[name] = flat[name].replace(value)
    params = library.from_flat_state(flat)
    zero = lambda xs: (jnp.zeros((xs.shape[1], hidden)),) * 2
    apply = lambda params, xs: library.merge(graph, params, rest)(xs, initial_carry=zero(xs))
    values = lambda d: {name: np.asarray(leaf[...]) for name, leaf in library.to_flat_state(d)}
    return of_jax(apply, params, given, lambda d: back(values(d)))


def equinox(given: Arrays) -> Layer:
    import equinox as library
    import jax
    import jax.numpy as jnp

    input_size, hidden = given["w_ih"].shape[0], given["w_hh"].shape[0]
    cell = library.nn.LSTMCell(input_size, hidden, key=jax.random.key(0))
    cell = library.tree_at(
        lambda c: (c.weight_ih, c.weight_hh, c.bias), cell, (given["w_ih"].T, given["w_hh"].T, given["b"])
    )
    params, static = library.partition(cell, library.is_array)

    def apply(params: Any, xs: Any) -> Any:
        cell = library.combine(params, static)
        zero = jnp.zeros((xs.shape[1], hidden))

        def step(carry: Any, x: Any) -> Any:
            carry = jax.vmap(cell)(x, carry)
            return carry, carry[0]

        return jax.lax.scan(step, (zero, zero), xs)[1]

    return of_jax(apply, params, given, lambda d: (d.weight_ih.T, d.weight_hh.T, d.bias))


def haiku(given: Arrays) -> Layer:
    import haiku as library

    input_size, hidden = given["w_ih"].shape[0], given["w_hh"].shape[0]

    def run(xs: Any) -> Any:
        core = library.LSTM(hidden)
        return library.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))[0]

    def swap(value: np.ndarray) -> np.ndarray:  # i f g o <-> i g f o
        i, f, g, o = np.split(value, 4, axis=-1)
        return np.concatenate([i, g, f, o], -1)

    apply = library.without_apply_rng(library.transform(run)).apply
    b = given["b"].copy()
    b[hidden : 2 * hidden] -= 1  # which it adds when it runs
    own = {"lstm/linear": {"w": swap(np.concatenate([given["w_ih"], given["w_hh"]])), "b": swap(b)}}

    def back(d: Any) -> Any:
        w, b = (swap(d["lstm/linear"][name]) for name in ("w", "b"))
        return w[:input_size], w[input_size:], b

    return of_jax(apply, own, given, back)


def keras(given: Arrays) -> Layer:
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as library

    layer = library.layers.LSTM(given["w_hh"].shape[0], return_sequences=True)
    layer.build((None, None, given["w_ih"].shape[0]))
    layer.set_weights([given["w_ih"], given["w_hh"], given["b"]])
    own = [np.asarray(v.value) for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]
    apply = lambda params, xs: layer.stateless_call(params, rest, xs)[0]
    return of_jax(apply, own, given, tuple, batch_major=True)


def torch(given: Arrays) -> Layer:
    import torch as library

    layer = library.nn.LSTM(given["w_ih"].shape[0], given["w_hh"].shape[0])
    with library.no_grad():
        for name, value in (
            ("weight_ih_l0", given["w_ih"].T),
            ("weight_hh_l0", given["w_hh"].T),
            ("bias_ih_l0", given["b"]),
        ):
            getattr(layer, name).copy_(library.from_numpy(np.ascontiguousarray(value)))
        layer.bias_hh_l0.zero_()
    xs, weight = library.from_numpy(given["xs"]).requires_grad_(), library.from_numpy(given["weight"])
    wanted = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0, xs)

    def forward() -> Any:
        with library.no_grad():
            return layer(xs)[0]

    def read(ys: Any, gradients: Any) -> Arrays:
        d_w_ih, d_w_hh, d_b, _, d_xs = (g.numpy() for g in gradients)
        return {"ys": ys.numpy(), "d_w_ih": d_w_ih.T, "d_w_hh": d_w_hh.T, "d_b": d_b, "d_xs": d_xs}

    return Layer(forward, lambda: library.autograd.grad((layer(xs)[0] * weight).sum(), wanted), read)


def onnxruntime(given: Arrays) -> Layer:
    import onnxruntime as library
    from onnx import TensorProto, helper, numpy_helper

    hidden = given["w_hh"].shape[0]

    def rows(value: np.ndarray) -> np.ndarray:  # columns i f g o -> rows i o f c, for one direction
        i, f, g, o = np.split(value, 4, axis=-1)
        return np.ascontiguousarray(np.concatenate([i, o, f, g], -1).T[None])

    b = np.concatenate([rows(given["b"]), np.zeros((1, 4 * hidden), np.float32)], -1)
    constants = {"W": rows(given["w_ih"]), "R": rows(given["w_hh"]), "B": b}
    tensor = lambda name, value: helper.make_tensor_value_info(name, TensorProto.FLOAT, value)
    graph = helper.make_graph(
        [helper.make_node("LSTM", ["X", *constants], ["Y"], hidden_size=hidden)],
        "lstm",
        [tensor("X", given["xs"].shape)],
        [tensor("Y", (given["xs"].shape[0], 1, given["xs"].shape[1], hidden))],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    session = library.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    forward = lambda: session.run(None, {"X": given["xs"]})[0]
    return Layer(forward, None, lambda ys, _: {"ys": ys[:, 0]})


PEERS: dict[str, tuple[Callable[[Arrays], Layer], str]] = {
    "jaxlstm": (functools.partial(jaxlstm, gradient="bulk"), "jax"),
    "jaxlstm, scan": (functools.partial(jaxlstm, gradient="scan"), "jax"),
    "Flax linen": (functools.partial(linen, cell="OptimizedLSTMCell"), "flax"),
    "Flax linen LSTMCell": (functools.partial(linen, cell="LSTMCell"), "flax"),
    "Flax nnx": (functools.partial(nnx, cell="OptimizedLSTMCell"), "flax"),
    "Flax nnx LSTMCell": (functools.partial(nnx, cell="LSTMCell"), "flax"),
    "Equinox": (equinox, "equinox"),
    "Haiku": (haiku, "dm-haiku"),
    "Keras": (keras, "keras"),
    "torch": (torch, "torch"),
    "ONNX Runtime": (onnxruntime, "onnxruntime"),
}
OF_JAX = tuple(name for name in PEERS if name not in ("jaxlstm", "jaxlstm, scan", "torch", "ONNX Runtime"))


def measure(run: Callable[[], Any], seconds: float) -> float:
    """Return seconds per call, of as many calls as fill the time given."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def main(name: str) -> None:
    """Answer questions: {"shape"}, then {"results"} or {"kind", "seconds"} about the layer of that shape."""
    make, package = PEERS[name]
    answer = lambda **what: print(json.dumps(what), flush=True)
    try:
        version = importlib.metadata.version(package)
        make(problem((2, 1, 3, 4)))
    except ImportError as error:
        return answer(absent=str(error))
    answer(version=version)
    layer: Any = None
    for line in sys.stdin:
        asked = json.loads(line)
        if "shape" in asked:
            layer = make(problem(tuple(asked["shape"])))
            temporaries = layer.compiled.memory_analysis().temp_size_in_bytes if layer.compiled else None
            answer(temporaries=temporaries, gradient=layer.gradient is not None)
        elif "results" in asked:
            np.savez(asked["results"], **layer.read(layer.forward(), layer.gradient and layer.gradient()))
            answer()
        else:
            answer(seconds=measure(getattr(layer, asked["kind"]), asked["seconds"]))
    return None


if __name__ == "__main__":
    main(sys.argv[1])
