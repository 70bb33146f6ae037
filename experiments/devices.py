"""Many devices: the processes of a run, the mesh over which they spread its batch, and what lies where on it.

With `--mesh data=8` the batch is cut into eight; the parameters are on every device, and JAX adds up their gradients.
With `--cluster` the devices may belong to several processes. All of them compute; the first alone writes.
"""

import contextlib
import logging
import re
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

PyTree = Any
AXIS = "data"
SHUTDOWN = 15  # seconds that a process which ends waits for the others


def start(experiment: str, mesh: str, cluster: str, *, batch_size: int) -> Mesh | None:
    """Join the other processes, and use a mesh from here on; None if no mesh is asked for.

    Args:
      mesh: `data=2`: the batch over so many devices; on a CPU they are made, but for `auto`. Empty: one device.
      cluster: `auto`, as `jax.distributed.initialize` finds it under Slurm, MPI, Kubernetes or on TPUs; or
        `HOST:PORT,K/N`: process K of N, of which the first listens at HOST:PORT. Empty: one process.

    Raises:
      SystemExit: in one line, what of this does not fit together.
    """
    if not mesh:
        if cluster:
            sys.exit(f"{experiment}: --cluster {cluster} needs --mesh {AXIS}=N, N the devices of all processes.")
        return None
    if not (asked := re.fullmatch(rf"{AXIS}=([1-9]\d*)", mesh)):
        sys.exit(f"{experiment}: --mesh must be {AXIS}=N, N the number of devices, got {mesh}.")
    size = int(asked[1])
    if batch_size % size:
        sys.exit(f"{experiment}: --batch-size must be a multiple of the {size} devices of --mesh, got {batch_size}.")
    num_processes = _join(experiment, cluster, size) if cluster else 1
    with contextlib.suppress(RuntimeError):  # JAX is at work already, with the devices that it has
        jax.config.update("jax_num_cpu_devices", size // num_processes)  # of a CPU
    devices = jax.devices()
    if len(devices) < size or (cluster and len(devices) != size):
        sys.exit(f"{experiment}: --mesh {mesh} needs {size} devices; JAX finds {len(devices)}.")
    if not is_first():
        logging.disable(logging.WARNING)
    made = jax.make_mesh((size,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:size])
    jax.set_mesh(made)
    return made


def _join(experiment: str, cluster: str, size: int) -> int:
    """Meet the other processes; return how many there are."""
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM for itself
    if cluster == "auto":
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"{experiment}: --cluster auto: {str(error).splitlines()[0]}")
        return int(jax.process_count())
    if not (given := re.fullmatch(r"(\S+:\d+),(\d+)/([1-9]\d*)", cluster)) or int(given[2]) >= int(given[3]):
        sys.exit(f"{experiment}: --cluster must be auto or HOST:PORT,K/N, process K = 0 ... N-1 of N, got {cluster}.")
    process, num_processes = int(given[2]), int(given[3])
    if size % num_processes:
        sys.exit(f"{experiment}: --mesh: {size} devices cannot be spread evenly over {num_processes} processes.")
    jax.distributed.initialize(
        given[1], num_processes, process, cluster_detection_method="deactivate", shutdown_timeout_seconds=SHUTDOWN
    )
    return num_processes


def found() -> str:
    """Say what a run runs on."""
    mesh, device = jax.sharding.get_abstract_mesh(), jax.devices()[0]
    return f"{1 if mesh.empty else mesh.size} x {device.platform} ({device.device_kind})"


def is_first() -> bool:
    """Say whether this is the process that writes."""
    return bool(jax.process_index() == 0)


def wait(what: str) -> None:
    """Wait until all processes are here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(number: int) -> int:
    """Return the largest number that any process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def place(tree: PyTree, mesh: Mesh | None, batch_axis: int | None = None) -> PyTree:
    """Put a tree, which every process has whole, on the mesh: cut along its batch axis, or whole on every device."""
    if mesh is None:
        return tree
    spec = PartitionSpec() if batch_axis is None else PartitionSpec(*[None] * batch_axis, AXIS)
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, spec)), tree)


def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put one array, or typed key, where a sharding says; every process has it whole."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def gather(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Return a tree whole, in the memory of every process; all of them have to ask."""
    return tree if mesh is None else jax.tree.map(_whole, tree)


def _whole(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    return multihost_utils.process_allgather(leaf, tiled=True)
