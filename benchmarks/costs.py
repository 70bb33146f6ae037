"""Costs of a jaxlstm layer besides its time: memory, compile time, growth with T, training steps, and two devices.

`python -m benchmarks.costs N` is a process with N CPU devices. It reads one JSON question per line from standard input
and answers each in one line. `benchmarks.benchmark` asks the questions.
"""

import contextlib
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import AxisType

from benchmarks.peers import Shape, measure, scan_lstm
from experiments.harness import devices
from jaxlstm import (
    LSTM,
    Bulk,
    Chunked,
    Scan,
    fit,
    init_stack,
    init_train_state,
    length_mask,
    make_train_step,
    step_stack,
    sweep,
    unroll,
    unroll_stack,
)
from jaxlstm.adapters.weights import to_linen

Loss = Callable[..., jax.Array]
SMALLEST: Shape = (1, 1, 1, 1)
METHODS: dict[str, Bulk | Scan | Chunked] = {"bulk": Bulk(), "scan": Scan(), "chunked": Chunked()}


def layer(shape: Shape, method: str = "bulk") -> tuple[Loss, Any, jax.Array]:
    """Return a loss of (params, xs), params, and xs."""
    num_steps, batch, input_size, hidden = shape
    params_key, xs_key = jax.random.split(jax.random.key(0))

    def loss(params: Any, xs: jax.Array) -> jax.Array:
        return (unroll(LSTM, params, xs, gradient=METHODS[method])[1] ** 2).sum()

    return loss, LSTM.init(params_key, input_size, hidden), jax.random.normal(xs_key, (num_steps, batch, input_size))


def linen_layer(shape: Shape) -> tuple[Loss, Any, jax.Array]:
    """Return the same for a layer of Flax linen."""
    *_, xs = layer(shape)
    rnn = nn.RNN(nn.OptimizedLSTMCell(shape[-1]), time_major=True)

    def loss(params: Any, xs: jax.Array) -> Any:
        return (rnn.apply(params, xs) ** 2).sum()

    return loss, rnn.init(jax.random.key(1), xs), xs


def gradient(shape: Shape, method: str = "bulk") -> tuple[Any, Any]:
    """Return the gradient of `layer`'s loss, and its argument shapes, without allocating arrays of that size."""
    return jax.grad(layer(SMALLEST, method)[0], (0, 1)), jax.eval_shape(lambda: layer(shape, method)[1:])


def called(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Compile a function and call it once; return a function that calls it again and waits for the result."""
    compiled = jax.jit(function).lower(*arguments).compile()

    def call() -> Any:
        return jax.block_until_ready(compiled(*arguments))

    call()
    return call


def matmul(seconds: float) -> dict[str, float]:
    """Measure the rate of a large float32 matmul in operations per second: the best of five."""
    size = 2048
    x, y = jax.random.normal(jax.random.key(0), (2, size, size))
    call = called(jnp.matmul, x, y)
    return {"rate": 2 * size**3 / min(measure(call, seconds / 5) for _ in range(5))}


def temporaries(batch: int, input_size: int, hidden: int, lengths: list[int]) -> dict[str, list[int]]:
    """Return the size of the compiled gradient's temporaries in bytes for each method and sequence length."""
    shapes = [(num_steps, batch, input_size, hidden) for num_steps in lengths]

    def size(shape: Shape, method: str) -> int:
        function, arguments = gradient(shape, method)
        return _size_of_temporaries(function, *arguments)

    return {method: [size(shape, method) for shape in shapes] for method in METHODS}


def _size_of_temporaries(function: Callable[..., Any], *arguments: Any) -> int:
    compiled: Any = jax.jit(function).lower(*arguments).compile()
    return int(compiled.memory_analysis().temp_size_in_bytes)


def compiling(batch: int, input_size: int, hidden: int, lengths: list[int], repeats: int) -> dict[str, list[float]]:
    """Return the median seconds from Python to a compiled gradient for each method and sequence length."""

    def once(shape: Shape, method: str) -> float:
        function, arguments = gradient(shape, method)
        return _seconds_to_compile(function, *arguments)

    shapes = [(num_steps, batch, input_size, hidden) for num_steps in lengths]
    times = {method: [[once(shape, method) for shape in shapes] for _ in range(repeats)] for method in METHODS}
    return {name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in times.items()}


def masked_layers(shape: Shape) -> dict[str, tuple[Loss, Any]]:
    """Return a loss of two layers with a mask of lengths, and its parameters, for jaxlstm and two peers."""
    num_steps, batch, input_size, hidden = shape
    lengths, mask = _lengths(batch, num_steps)
    _, _, xs = layer(shape)
    params = init_stack(jax.random.key(0), LSTM, input_size, [hidden, hidden])
    rnn = nn.RNN(nn.OptimizedLSTMCell(hidden), time_major=True, return_carry=True)

    def ours(params: Any) -> jax.Array:
        carries, _ = unroll_stack(LSTM, params, xs, mask=mask)
        return (carries[-1].h ** 2).sum()

    def by_scan(params: Any) -> jax.Array:
        hs = xs
        for own in params:
            hs = scan_lstm(own, hs, mask)
        return (hs[-1] ** 2).sum()

    def of_flax(variables: Any) -> jax.Array:
        hs: Any = xs
        for own in variables:
            (_, last), hs = rnn.apply(own, hs, seq_lengths=lengths)
        return (last**2).sum()

    of_linen = [{"params": {"cell": to_linen(LSTM, own)}} for own in params]
    return {"jaxlstm": (ours, params), "fifteen lines": (by_scan, params), "Flax linen": (of_flax, of_linen)}


def compiling_a_step(shape: Shape, repeats: int) -> dict[str, float]:
    """Return the median seconds from Python to a compiled Adam step of `masked_layers`."""
    optimizer = optax.adam(1e-3)

    def once(loss: Loss, params: Any) -> float:
        def step(params: Any, state: Any) -> Any:
            updates, state = optimizer.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        return _seconds_to_compile(step, params, optimizer.init(params))

    losses = masked_layers(shape)
    rows = [[once(*own) for own in losses.values()] for _ in range(repeats)]
    return dict(zip(losses, map(statistics.median, zip(*rows, strict=True)), strict=True))


def _seconds_to_compile(function: Callable[..., Any], *arguments: Any) -> float:
    jax.clear_caches()
    start = time.perf_counter()
    jax.jit(function).lower(*arguments).compile()
    return time.perf_counter() - start


def _lengths(batch: int, num_steps: int) -> tuple[jax.Array, jax.Array]:
    """Return lengths from all steps down to half of them, and their mask."""
    lengths = num_steps - jnp.arange(batch) * num_steps // (2 * batch)
    return lengths, length_mask(lengths, num_steps)


def doubling(shape: Shape, rounds: int, seconds: float) -> dict[str, float]:
    """Return the time for twice as many time steps divided by the time for T steps."""
    num_steps, *rest = shape
    ratios = {}
    for kind in ("forward", "gradient"):
        calls = []
        for steps in (num_steps, 2 * num_steps):
            loss, *arguments = layer((steps, *rest))  # type: ignore[arg-type]
            calls.append(called(loss if kind == "forward" else jax.grad(loss, (0, 1)), *arguments))
        once, twice = zip(*[[measure(call, seconds) for call in calls] for _ in range(rounds)], strict=True)
        ratios[kind] = statistics.median(twice) / statistics.median(once)
    return ratios


def masked(shape: Shape, rounds: int, seconds: float) -> dict[str, float]:
    """Return the median seconds of a gradient, without and with a mask of lengths."""
    num_steps, batch, _, _ = shape
    _, mask = _lengths(batch, num_steps)
    _, params, xs = layer(shape)

    def loss(params: Any, xs: jax.Array, mask: Any) -> jax.Array:
        return (unroll(LSTM, params, xs, mask=mask)[1] ** 2).sum()

    calls = {name: called(jax.grad(loss, (0, 1)), params, xs, own) for name, own in (("without", None), ("with", mask))}
    return _medians(calls, rounds, seconds)


def ensemble(shape: Shape, members: int, rounds: int, seconds: float) -> dict[str, dict[str, float]]:
    """Return the median seconds of the gradients of several nets, and the megabytes of their temporaries."""
    *_, input_size, hidden = shape
    _, _, xs = layer(shape)
    nets = jax.vmap(lambda key: LSTM.init(key, input_size, hidden))(jax.random.split(jax.random.key(1), members))

    def ours(params: Any) -> jax.Array:
        return (unroll(LSTM, params, xs)[1] ** 2).sum()

    def theirs(params: Any) -> jax.Array:
        return (scan_lstm(params, xs) ** 2).sum()

    programs: dict[str, Callable[..., Any]] = {
        "sweep": functools.partial(sweep, jax.grad(ours)),
        "vmap": jax.vmap(jax.grad(ours)),
        "lax.map": functools.partial(jax.lax.map, jax.grad(ours)),
        "fifteen lines, vmap": jax.vmap(jax.grad(theirs)),
        "fifteen lines, lax.map": functools.partial(jax.lax.map, jax.grad(theirs)),
    }
    sizes = {name: _size_of_temporaries(program, nets) / 1e6 for name, program in programs.items()}
    return {
        "seconds": _medians({name: called(program, nets) for name, program in programs.items()}, rounds, seconds),
        "megabytes": sizes,
    }


def _medians(calls: dict[str, Callable[[], Any]], rounds: int, seconds: float) -> dict[str, float]:
    """Return the median time of each call; they take turns in every round."""
    rows = [[measure(call, seconds) for call in calls.values()] for _ in range(rounds)]
    return dict(zip(calls, map(statistics.median, zip(*rows, strict=True)), strict=True))


def training(shape: Shape, rounds: int, seconds: float, steps: int = 10) -> dict[str, float]:
    """Return the seconds of an optimizer step: called alone, and as one of `steps` in a call of `fit`."""
    loss, params, xs = layer(shape)

    def loss_fn(params: Any, xs: jax.Array, carry: Any, key: jax.Array) -> Any:
        return loss(params, xs), (carry, {})

    train_step = make_train_step(loss_fn, optax.adam(1e-3))
    state = init_train_state(params, optax.adam(1e-3), jax.random.key(1))
    calls = {
        "a call each": called(train_step, state, xs),
        "fit": called(functools.partial(fit, train_step), state, jnp.stack([xs] * steps)),
    }
    times = _medians(calls, rounds, seconds)
    return {**times, "fit": times["fit"] / steps}


def streaming(input_size: int, hidden: int, seconds: float, streams: list[int]) -> dict[str, dict[str, float]]:
    """Return the median and p99 latency, in seconds, of one time step for each number of streams.

    One call advances all streams by one time step and resets some of them, so a step's latency is the call's.
    """

    def latencies(number: int) -> list[float]:
        step, layers, carries, x = stream(input_size, hidden, number)
        begun = jax.random.bernoulli(jax.random.key(1), 0.01, (number,))
        times: list[float] = []
        while sum(times) < seconds or len(times) < 20:
            start = time.perf_counter()
            carries, _ = jax.block_until_ready(step(layers, carries, x, reset=begun))
            times.append(time.perf_counter() - start)
        return times[len(times) // 10 :]  # the first calls compile and warm up

    measured = {number: latencies(number) for number in streams}
    return {
        str(number): {"median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[-1]}
        for number, times in measured.items()
    }


def stream(input_size: int, hidden: int, number: int) -> tuple[Callable[..., Any], Any, Any, jax.Array]:
    """Return a jitted step that donates its carries, the layers' parameters, the carries, and one step's input."""
    layers = init_stack(jax.random.key(0), LSTM, input_size, [hidden])
    carries = [LSTM.initial_carry(layer, (number,)) for layer in layers]
    step = jax.jit(functools.partial(step_stack, LSTM), donate_argnums=1)
    return step, layers, carries, jnp.ones((number, input_size))


def sharded(shape: Shape, library: str, seconds: float) -> dict[str, float]:
    """Return the seconds of a gradient with the batch sharded over all devices of this process."""
    loss, params, xs = {"jaxlstm": layer, "Flax linen": linen_layer}[library](shape)
    with contextlib.ExitStack() as stack:
        if jax.device_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), (devices.AXIS,), (AxisType.Auto,))
            stack.enter_context(jax.set_mesh(mesh))
            params, xs = devices.place(params, mesh), devices.place(xs, mesh, batch_axis=1)
        return {"seconds": measure(called(jax.grad(loss, (0, 1)), params, xs), seconds)}


QUESTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function
    for function in (
        matmul,
        temporaries,
        compiling,
        compiling_a_step,
        doubling,
        masked,
        ensemble,
        training,
        streaming,
        sharded,
    )
}


def main(num_devices: int) -> None:
    """Answer questions: {"measure": the name of a function above, and its arguments}."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    print(json.dumps({"version": jax.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(QUESTIONS[asked.pop("measure")](**asked)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
