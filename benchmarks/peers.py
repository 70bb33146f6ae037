"""LSTM layers of other libraries on the same weights and inputs.

`python -m benchmarks.peers NAME` is a process that times one of them. It reads one JSON question per line from standard
input and answers each in one line. `benchmarks.benchmark` asks the questions.
"""

import functools
import importlib.metadata
import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Shape = tuple[int, int, int, int]  # T, B, I, H
Arrays = dict[str, np.ndarray]


class Layer(NamedTuple):
    """A layer with weights and inputs in place: the calls to time, and how to read their results."""

    forward: Callable[[], Any]  # returns ys
    gradient: Callable[[], Any] | None  # of Σ ys · weight with respect to the parameters and xs
    # (ys, gradient) -> ys [T,B,H], d_w_ih, d_w_hh, d_b and d_xs in jaxlstm's layout
    read: Callable[[Any, Any], Arrays]
    compiled: Any = None  # the gradient compiled by JAX


def problem(shape: Shape) -> Arrays:
    """Draw typical initial weights, inputs and a cotangent: the same ones in every process."""
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


def params_of(given: Arrays) -> Any:
    """Return the weights of a problem as `LSTMParams`."""
    import jax.numpy as jnp

    from jaxlstm import LSTMParams

    return LSTMParams(*(jnp.asarray(given[name]) for name in ("w_ih", "w_hh", "b")))


def of_jax(
    apply: Callable[[Any, Any], Any], params: Any, given: Arrays, back: Callable[[Any], Any], batch_major: bool = False
) -> Layer:
    """Compile a layer of a JAX library.

    Args:
      apply: `(params, xs) -> ys`.
      params: the library's parameters, made from the weights in `given`.
      given: the arrays from `problem`.
      back: converts the gradient with respect to `params` to (d_w_ih, d_w_hh, d_b).
      batch_major: xs and ys are [B,T,...] instead of [T,B,...].

    Returns:
      The layer.
    """
    import jax

    def axes(value: np.ndarray) -> np.ndarray:
        return value.swapaxes(0, 1) if batch_major else value

    def run(params: Any, xs: Any, weight: Any) -> Any:
        return apply(params, xs)

    def loss(params: Any, xs: Any, weight: Any) -> Any:
        return (apply(params, xs) * weight).sum()

    def compiled(function: Callable[..., Any]) -> Any:
        return jax.jit(function).lower(*arguments).compile()

    def call(program: Any) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(program(*arguments))

    def read(ys: Any, gradients: Any) -> Arrays:
        d_params, d_xs = jax.tree.map(np.asarray, gradients)
        weights = zip(("d_w_ih", "d_w_hh", "d_b"), back(d_params), strict=True)
        return {"ys": axes(np.asarray(ys)), "d_xs": axes(d_xs), **dict(weights)}

    arguments = jax.device_put((params, axes(given["xs"]), axes(given["weight"])))
    forward, gradient = compiled(run), compiled(jax.grad(loss, (0, 1)))
    return Layer(call(forward), call(gradient), read, gradient)


def jaxlstm(given: Arrays, scan: bool) -> Layer:
    """Make a layer of jaxlstm, differentiated by its rule or by autodiff of the scan."""
    from jaxlstm import LSTM, Bulk, Scan, unroll

    def apply(params: Any, xs: Any) -> Any:
        return unroll(LSTM, params, xs, gradient=Scan() if scan else Bulk())[1]

    return of_jax(apply, params_of(given), given, tuple)


def scan_lstm(params: Any, xs: Any, mask: Any = None) -> Any:
    """Run the LSTM that everyone writes at first, without a library: fifteen lines around a `lax.scan`.

    Where `mask` [time, batch] is False, the carry stays as it is.
    """
    import jax
    import jax.numpy as jnp

    w_ih, w_hh, b = params

    def step(carry: Any, inputs: Any) -> Any:
        (h, c), (x, real) = carry, inputs
        z_i, z_f, z_g, z_o = jnp.split(x @ w_ih + h @ w_hh + b, 4, axis=-1)
        i, f, o = jax.nn.sigmoid(z_i), jax.nn.sigmoid(z_f), jax.nn.sigmoid(z_o)
        c = f * c + i * jnp.tanh(z_g)
        h = o * jnp.tanh(c)
        if real is not None:
            h, c = (jnp.where(real[:, None], new, old) for new, old in zip((h, c), carry, strict=True))
        return (h, c), h

    zero = jnp.zeros((xs.shape[1], w_hh.shape[0]), xs.dtype)
    return jax.lax.scan(step, (zero, zero), (xs, mask))[1]


def fifteen_lines(given: Arrays) -> Layer:
    """Make a layer of `scan_lstm`."""
    return of_jax(scan_lstm, [given[name] for name in ("w_ih", "w_hh", "b")], given, tuple)


def linen(given: Arrays, cell: str) -> Layer:
    """Make a layer of Flax linen."""
    from flax import linen as nn

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    layer = nn.RNN(getattr(nn, cell)(given["w_hh"].shape[0]), time_major=True)
    own = {"params": {"cell": weights.to_linen(LSTM, params_of(given))}}
    return of_jax(layer.apply, own, given, lambda d: weights.from_linen(LSTM, d["params"]))


def nnx(given: Arrays, cell: str) -> Layer:
    """Make a layer of Flax nnx."""
    import jax.numpy as jnp
    from flax import nnx as library

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    input_size, hidden = given["w_ih"].shape[0], given["w_hh"].shape[0]
    rngs = library.Rngs(0)
    layer = library.RNN(getattr(library, cell)(input_size, hidden, rngs=rngs), time_major=True, rngs=rngs)
    library.update(layer.cell, weights.to_nnx(LSTM, params_of(given), optimized=cell == "OptimizedLSTMCell"))
    graph, params, rest = library.split(layer, library.Param, ...)

    def apply(params: Any, xs: Any) -> Any:
        zero = jnp.zeros((xs.shape[1], hidden))
        return library.merge(graph, params, rest)(xs, initial_carry=(zero, zero))

    return of_jax(apply, params, given, lambda d: weights.from_nnx(LSTM, d))


def equinox(given: Arrays) -> Layer:
    """Make a layer of Equinox: its cell in a scan."""
    import equinox as library
    import jax
    import jax.numpy as jnp

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    input_size, hidden = given["w_ih"].shape[0], given["w_hh"].shape[0]
    fields = weights.to_equinox(LSTM, params_of(given))
    cell = library.nn.LSTMCell(input_size, hidden, key=jax.random.key(0))
    cell = library.tree_at(lambda c: [getattr(c, name) for name in fields], cell, list(fields.values()))
    params, static = library.partition(cell, library.is_array)

    def apply(params: Any, xs: Any) -> Any:
        cell = library.combine(params, static)
        zero = jnp.zeros((xs.shape[1], hidden))

        def step(carry: Any, x: Any) -> Any:
            carry = jax.vmap(cell)(x, carry)
            return carry, carry[0]

        return jax.lax.scan(step, (zero, zero), xs)[1]

    return of_jax(apply, params, given, lambda d: weights.from_equinox(LSTM, vars(d)))


def haiku(given: Arrays) -> Layer:
    """Make a layer of Haiku."""
    import haiku as library

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    hidden = given["w_hh"].shape[0]

    def run(xs: Any) -> Any:
        core = library.LSTM(hidden)
        return library.dynamic_unroll(core, xs, core.initial_state(xs.shape[1]))[0]

    def back(d: Any) -> Any:
        w_ih, w_hh, b = weights.from_haiku(LSTM, d["lstm/linear"])
        return w_ih, w_hh, b.at[hidden : 2 * hidden].add(-1)  # the conversion of weights adds 1 to b_f

    apply = library.without_apply_rng(library.transform(run)).apply
    return of_jax(apply, {"lstm/linear": weights.to_haiku(LSTM, params_of(given))}, given, back)


def keras(given: Arrays) -> Layer:
    """Make a layer of Keras on JAX."""
    os.environ["KERAS_BACKEND"] = "jax"
    import keras as library

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    layer = library.layers.LSTM(given["w_hh"].shape[0], return_sequences=True)
    layer.build((None, None, given["w_ih"].shape[0]))
    layer.set_weights(weights.to_keras(LSTM, params_of(given)))
    own = [np.asarray(v.value) for v in layer.trainable_variables]
    rest = [v.value for v in layer.non_trainable_variables]

    def apply(params: Any, xs: Any) -> Any:
        return layer.stateless_call(params, rest, xs)[0]

    return of_jax(apply, own, given, lambda d: weights.from_keras(LSTM, d), batch_major=True)


def torch(given: Arrays) -> Layer:
    """Make a layer of torch."""
    import torch as library

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    gpu = library.cuda.is_available()
    place = "cuda" if gpu else "cpu"
    layer = library.nn.LSTM(given["w_ih"].shape[0], given["w_hh"].shape[0])
    state_dict = weights.to_torch(LSTM, [params_of(given)])
    layer.load_state_dict({name: library.from_numpy(value) for name, value in state_dict.items()})
    layer.to(place)
    xs, weight = (library.from_numpy(given[name]).to(place) for name in ("xs", "weight"))
    xs.requires_grad_()
    wanted = (layer.weight_ih_l0, layer.weight_hh_l0, layer.bias_ih_l0, layer.bias_hh_l0, xs)

    def finished(result: Any) -> Any:
        if gpu:
            library.cuda.synchronize()
        return result

    def forward() -> Any:
        with library.no_grad():
            return finished(layer(xs)[0])

    def gradient() -> Any:
        return finished(library.autograd.grad((layer(xs)[0] * weight).sum(), wanted))

    def read(ys: Any, gradients: Any) -> Arrays:
        d_w_ih, d_w_hh, d_b, _, d_xs = (g.numpy(force=True) for g in gradients)
        return {"ys": ys.numpy(force=True), "d_w_ih": d_w_ih.T, "d_w_hh": d_w_hh.T, "d_b": d_b, "d_xs": d_xs}

    return Layer(forward, gradient, read)


def cudnn(given: Arrays) -> Layer:
    """Make a layer of `jax.experimental.rnn`, which calls cuDNN."""
    import jax
    import jax.numpy as jnp

    if jax.default_backend() != "gpu":
        raise ImportError("jax.experimental.rnn needs an NVIDIA GPU")
    from jax.experimental import rnn as library

    from jaxlstm import LSTM
    from jaxlstm.adapters import weights

    num_steps, batch, input_size = given["xs"].shape
    hidden = given["w_hh"].shape[0]
    zero, lengths = jnp.zeros((1, batch, hidden)), jnp.full(batch, num_steps, jnp.int32)

    def apply(params: Any, xs: Any) -> Any:
        return library.lstm(xs, zero, zero, params, lengths, input_size, hidden, 1, 0.0, False)[0]

    def back(d: Any) -> Any:
        w_ih, w_hh, b = weights.from_jax_rnn(LSTM, d, input_size=input_size, hidden_size=hidden)[0]
        return w_ih, w_hh, b / 2  # the sum of the gradients of its two biases

    own = weights.to_jax_rnn(LSTM, [params_of(given)])
    return of_jax(apply, own, given, back, batch_major=True)


def onnxruntime(given: Arrays) -> Layer:
    """Make a layer of ONNX Runtime on a CPU; it has no gradient."""
    import jax
    import onnxruntime as library

    if jax.default_backend() != "cpu":
        raise ImportError("it would run on the CPU")

    from jaxlstm import LSTM
    from jaxlstm.adapters.onnx import to_onnx

    model = to_onnx(LSTM, [params_of(given)])
    session = library.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])

    def forward() -> Any:
        return session.run(["ys"], {"xs": given["xs"]})[0]

    def read(ys: Any, _: None) -> Arrays:
        return {"ys": ys}

    return Layer(forward, None, read)


# Each peer's layer, and the package whose version is reported.
PEERS: dict[str, tuple[Callable[[Arrays], Layer], str]] = {
    "jaxlstm": (functools.partial(jaxlstm, scan=False), "jax"),
    "jaxlstm, scan": (functools.partial(jaxlstm, scan=True), "jax"),
    "fifteen lines": (fifteen_lines, "jax"),
    "Flax linen": (functools.partial(linen, cell="OptimizedLSTMCell"), "flax"),
    "Flax linen LSTMCell": (functools.partial(linen, cell="LSTMCell"), "flax"),
    "Flax nnx": (functools.partial(nnx, cell="OptimizedLSTMCell"), "flax"),
    "Flax nnx LSTMCell": (functools.partial(nnx, cell="LSTMCell"), "flax"),
    "Equinox": (equinox, "equinox"),
    "Haiku": (haiku, "dm-haiku"),
    "Keras": (keras, "keras"),
    "torch": (torch, "torch"),
    "cuDNN by JAX": (cudnn, "jax"),
    "ONNX Runtime": (onnxruntime, "onnxruntime"),
}
# The other JAX libraries.
OF_JAX = ("Flax linen", "Flax linen LSTMCell", "Flax nnx", "Flax nnx LSTMCell", "Equinox", "Haiku", "Keras")


def measure(run: Callable[[], Any], seconds: float) -> float:
    """Return the mean time of a call over as many calls as fit into `seconds`, at least one."""
    calls, start = 0, time.perf_counter()
    while calls == 0 or time.perf_counter() - start < seconds:
        run()
        calls += 1
    return (time.perf_counter() - start) / calls


def main(name: str) -> None:
    """Answer questions: {"shape"}, then {"results"} or {"kind", "seconds"} about the layer of that shape."""
    make, package = PEERS[name]

    def answer(**content: Any) -> None:
        print(json.dumps(content), flush=True)

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
