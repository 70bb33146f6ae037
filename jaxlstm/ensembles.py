"""Many runs in one program: seeds, learning rates, members of an ensemble."""

from collections.abc import Callable

import jax
from jax import lax

from jaxlstm.cell import PyTree
from jaxlstm.checks import ArgumentValueError, as_arrays, border, check_function, describe, in_callback
from jaxlstm.structure import equations
from jaxlstm.tuning import on_devices, size_without_remainder

# On a CPU, a sweep runs as many entries at once as keep their largest array below this size, so that it stays in cache.
CACHED_BYTES = 2 << 20


@border("sweep")
def sweep(run: Callable[..., PyTree], *arguments: PyTree) -> PyTree:
    """Run a function for every entry along axis 0 of its arguments, as `jax.vmap` does, all at once or a few at a time.

    An accelerator runs all entries at once, and so does a CPU if they are small. Larger ones it runs a few at a time,
    or one by one, which keeps their arrays in cache and takes less memory. Entries sharded over devices run at once.

    Args:
      run: a pure function of one entry, such as a training run of a key and a learning rate.
      *arguments: pytrees of arrays with an axis 0 of the same length: keys, learning rates, stacked parameters.

    Returns:
      What `run` returns, stacked along axis 0. Call `sweep` inside `jax.jit`; elsewhere it may compile at every call.

    Raises:
      TypeError: `run` is not a function.
      ValueError: the arguments differ in axis 0.

    >>> import functools, jax, jaxlstm
    >>> keys = jax.random.split(jax.random.key(0), 8)
    >>> draw = functools.partial(jaxlstm.sweep, lambda key: jaxlstm.LSTM.init(key, 5, 7))
    >>> jax.jit(draw)(keys).w_ih.shape
    (8, 5, 28)
    """
    check_function("run", run)
    given = {f"argument {n}": argument for n, argument in enumerate(arguments)}
    arguments = tuple(as_arrays(**given))
    lengths = {leaf.shape[:1] for leaf in jax.tree.leaves(arguments)}
    if len(lengths) != 1 or lengths == {()}:
        got = describe(dict(zip(given, arguments, strict=True))) or "none"
        raise ArgumentValueError(f"arguments must share their first axis, one entry per run, got {got}.")
    ((num_runs,),) = lengths
    run = in_callback()(run)
    all_at_once = jax.vmap(run)
    program = jax.make_jaxpr(all_at_once)(*arguments)
    sizes = [v.aval.size * v.aval.dtype.itemsize for op in equations(program.jaxpr) for v in op.outvars]
    at_once = num_runs
    # `jax.export` may leave sizes unknown.
    if all(isinstance(size, int) for size in (num_runs, *sizes)) and not on_devices(arguments):
        at_once = size_without_remainder(num_runs, max(1, CACHED_BYTES * num_runs // max(1, *sizes)))
    if at_once >= num_runs:
        return all_at_once(*arguments)

    def few_at_once(*arguments: PyTree) -> PyTree:
        return lax.map(lambda entry: run(*entry), arguments, batch_size=at_once if at_once > 1 else None)

    return lax.platform_dependent(*arguments, cpu=few_at_once, default=all_at_once)
