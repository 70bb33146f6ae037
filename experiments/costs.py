"""What a layer of jaxlstm costs beside its time: memory, compiling, growth with T, calls, and what more devices give.

`python -m experiments.costs N` is a process with N CPU devices that reads one question a line from standard input, as
JSON, and answers each in a line. `experiments.benchmark` asks.
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

from experiments import devices
from experiments.peers import Shape, measure
from jaxlstm import LSTM, fit, init_stack, init_train_state, make_train_step, step_stack, unroll, unroll_chunked

Loss = Callable[..., jax.Array]
SMALLEST: Shape = (1, 1, 1, 1)
RUNS: dict[str, Callable[..., Any]] = {
    "bulk": unroll,
    "scan": functools.partial(unroll, gradient="scan"),
    "chunked": unroll_chunked,
}


def layer(shape: Shape, run: str = "bulk") -> tuple[Loss, Any, jax.Array]:
    """Return the loss of (params, xs), both, and with it gradients as anybody would take them."""
    num_steps, batch, input_size, hidden = shape
    params_key, xs_key = jax.random.split(jax.random.key(0))
    loss = lambda params, xs: (RUNS[run](LSTM, params, xs)[1] ** 2).sum()
    return loss, LSTM.init(params_key, input_size, hidden), jax.random.normal(xs_key, (num_steps, batch, input_size))


def linen_layer(shape: Shape) -> tuple[Loss, Any, jax.Array]:
    """Return the same of a layer of Flax."""
    *_, xs = layer(shape)
    rnn = nn.RNN(nn.OptimizedLSTMCell(shape[-1]), time_major=True)
    loss = lambda params, xs: (rnn.apply(params, xs) ** 2).sum()
    return loss, rnn.init(jax.random.key(1), xs), xs


def gradient(shape: Shape, run: str = "bulk") -> tuple[Any, Any]:
    """Return the gradient of that loss, and what it is to be compiled for; no array is made."""
    return jax.grad(layer(SMALLEST, run)[0], (0, 1)), jax.eval_shape(lambda: layer(shape, run)[1:])


def called(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Compile a function and call it once; return what calls it and waits."""
    compiled = jax.jit(function).lower(*arguments).compile()
    call = lambda: jax.block_until_ready(compiled(*arguments))
    call()
    return call


def matmul(seconds: float) -> dict[str, float]:
    """Measure the rate of a large float32 matmul, in operations a second: the best of five."""
    size = 2048
    x, y = jax.random.normal(jax.random.key(0), (2, size, size))
    call = called(jnp.matmul, x, y)
    return {"rate": 2 * size**3 / min(measure(call, seconds / 5) for _ in range(5))}


def temporaries(batch: int, input_size: int, hidden: int, lengths: list[int]) -> dict[str, list[int]]:
    """Return the bytes of temporaries that the compiled gradient states, at some numbers of steps."""
    shapes = [(num_steps, batch, input_size, hidden) for num_steps in lengths]

    def size(shape: Shape, run: str) -> int:
        function, arguments = gradient(shape, run)
        compiled: Any = jax.jit(function).lower(*arguments).compile()
        return int(compiled.memory_analysis().temp_size_in_bytes)

    return {run: [size(shape, run) for shape in shapes] for run in RUNS}


def compiling(batch: int, input_size: int, hidden: int, lengths: list[int], repeats: int) -> dict[str, list[float]]:
    """Measure the seconds from Python to a compiled gradient, at some numbers of steps: medians."""

    def once(shape: Shape, run: str) -> float:
        function, arguments = gradient(shape, run)
        jax.clear_caches()
        start = time.perf_counter()
        jax.jit(function).lower(*arguments).compile()
        return time.perf_counter() - start

    shapes = [(num_steps, batch, input_size, hidden) for num_steps in lengths]
    times = {run: [[once(shape, run) for shape in shapes] for _ in range(repeats)] for run in RUNS}
    return {run: [statistics.median(column) for column in zip(*rows, strict=True)] for run, rows in times.items()}


def doubling(shape: Shape, rounds: int, seconds: float) -> dict[str, float]:
    """Measure how many times as long twice the steps take."""
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


def training(shape: Shape, rounds: int, seconds: float, steps: int = 10) -> dict[str, float]:
    """Measure an optimiser step, in seconds: each in a call of its own, and as one of `steps` in a `fit`."""
    loss, params, xs = layer(shape)
    train_step = make_train_step(lambda params, xs, carry, key: (loss(params, xs), (carry, {})), optax.adam(1e-3))
    state = init_train_state(params, optax.adam(1e-3), jax.random.key(1))
    one = called(train_step, state, xs)
    many = called(functools.partial(fit, train_step), state, jnp.stack([xs] * steps))
    times = [(measure(one, seconds), measure(many, seconds) / steps) for _ in range(rounds)]
    return dict(zip(("a call each", "fit"), map(statistics.median, zip(*times, strict=True)), strict=True))


def streaming(input_size: int, hidden: int, seconds: float, streams: list[int]) -> dict[str, dict[str, float]]:
    """Measure one step of some numbers of streams, each reset on its own: what a call takes, in seconds.

    The latency of a step is that of its call; as many steps are taken in it as there are streams.
    """

    def latencies(number: int) -> list[float]:
        step, layers, carries, x = stream(input_size, hidden, number)
        begun = jax.random.bernoulli(jax.random.key(1), 0.01, (number,))
        times: list[float] = []
        while sum(times) < seconds or len(times) < 20:
            start = time.perf_counter()
            carries, _ = jax.block_until_ready(step(layers, carries, x, reset=begun))
            times.append(time.perf_counter() - start)
        return times[len(times) // 10 :]  # compiling, and what follows it

    measured = {number: latencies(number) for number in streams}
    return {
        str(number): {"median": statistics.median(times), "p99": statistics.quantiles(times, n=100)[-1]}
        for number, times in measured.items()
    }


def stream(input_size: int, hidden: int, number: int) -> tuple[Callable[..., Any], Any, Any, jax.Array]:
    """Return a jitted step that uses its carries up, the parameters, the carries, and the input of one step."""
    layers = init_stack(jax.random.key(0), LSTM, input_size, [hidden])
    carries = [LSTM.initial_carry(layer, (number,)) for layer in layers]
    step = jax.jit(functools.partial(step_stack, LSTM), donate_argnums=1)
    return step, layers, carries, jnp.ones((number, input_size))


def sharded(shape: Shape, library: str, seconds: float) -> dict[str, float]:
    """Measure the gradient with the batch over all devices of this process."""
    loss, params, xs = {"jaxlstm": layer, "Flax linen": linen_layer}[library](shape)
    with contextlib.ExitStack() as stack:
        if jax.device_count() > 1:
            mesh = jax.make_mesh((jax.device_count(),), (devices.AXIS,), (AxisType.Auto,))
            stack.enter_context(jax.set_mesh(mesh))
            params, xs = devices.place(params, mesh), devices.place(xs, mesh, batch_axis=1)
        return {"seconds": measure(called(jax.grad(loss, (0, 1)), params, xs), seconds)}


QUESTIONS: dict[str, Callable[..., Any]] = {
    function.__name__: function for function in (matmul, temporaries, compiling, doubling, training, streaming, sharded)
}


def main(num_devices: int) -> None:
    """Answer questions: {"measure": one of the functions above, and its arguments}."""
    jax.config.update("jax_num_cpu_devices", num_devices)
    print(json.dumps({"version": jax.__version__}), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(json.dumps(QUESTIONS[asked.pop("measure")](**asked)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]))
