"""Data parallelism: a run's processes, the mesh that shards its batch, and moving arrays onto and off that mesh.

`--mesh data=8` splits the batch into eight shards. The parameters are replicated, and JAX sums their gradients.
`--cluster` lets the devices belong to several processes. All of them compute; only the first one writes files.
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
SHUTDOWN = 15  # seconds that a finished process waits for the others


def start(experiment: str, mesh: str, cluster: str, *, batch_size: int) -> Mesh | None:
    """Join the other processes and set the mesh for the rest of the program.

    Args:
      experiment: the experiment's name, used in messages.
      mesh: `data=N` shards the batch over N devices. On a CPU, JAX simulates N devices, except with `--cluster auto`.
        Empty: one device.
      cluster: `auto` lets `jax.distributed.initialize` find the processes under Slurm, MPI, Kubernetes or on TPUs;
        `HOST:PORT,K/N` makes this process K of N, where process 0 listens at HOST:PORT. Empty: one process.
      batch_size: a multiple of N.

    Returns:
      The mesh, or None if `mesh` is empty.

    Raises:
      SystemExit: in one line, the flags do not fit together or do not match the devices.
    """
    if not mesh:
        if cluster:
            sys.exit(f"{experiment}: --cluster {cluster} needs --mesh {AXIS}=N, with N the devices of all processes.")
        return None
    if not (asked := re.fullmatch(rf"{AXIS}=([1-9]\d*)", mesh)):
        sys.exit(f"{experiment}: --mesh must be {AXIS}=N, with N the number of devices, got {mesh}.")
    size = int(asked[1])
    if batch_size % size:
        sys.exit(f"{experiment}: --batch-size must be a multiple of the {size} devices of --mesh, got {batch_size}.")
    num_processes = _join(experiment, cluster, size) if cluster else 1
    with contextlib.suppress(RuntimeError):  # JAX has already started, with the devices it found
        jax.config.update("jax_num_cpu_devices", size // num_processes)
    devices = jax.devices()
    if len(devices) < size or (cluster and len(devices) != size):
        sys.exit(f"{experiment}: --mesh {mesh} needs {size} devices; JAX finds {len(devices)}.")
    if not is_first():
        logging.disable(logging.WARNING)
    made = jax.make_mesh((size,), (AXIS,), (jax.sharding.AxisType.Auto,), devices=devices[:size])
    jax.set_mesh(made)
    return made


def _join(experiment: str, cluster: str, size: int) -> int:
    """Connect to the other processes; return how many there are."""
    jax.config.update("jax_enable_preemption_service", False)  # it would handle SIGTERM before `runs.stop_signals` can
    if cluster == "auto":
        try:
            jax.distributed.initialize(shutdown_timeout_seconds=SHUTDOWN)
        except (ValueError, RuntimeError) as error:
            sys.exit(f"{experiment}: --cluster auto: {str(error).splitlines()[0]}")
        return int(jax.process_count())
    if not (given := re.fullmatch(r"(\S+:\d+),(\d+)/([1-9]\d*)", cluster)) or int(given[2]) >= int(given[3]):
        sys.exit(f"{experiment}: --cluster must be auto or HOST:PORT,K/N, with process K from 0 to N-1, got {cluster}.")
    process, num_processes = int(given[2]), int(given[3])
    if size % num_processes:
        sys.exit(f"{experiment}: --mesh: {size} devices cannot be divided evenly among {num_processes} processes.")
    jax.distributed.initialize(
        given[1], num_processes, process, cluster_detection_method="deactivate", shutdown_timeout_seconds=SHUTDOWN
    )
    return num_processes


def found() -> str:
    """Describe the devices that a run uses."""
    mesh, device = jax.sharding.get_abstract_mesh(), jax.devices()[0]
    return f"{1 if mesh.empty else mesh.size} x {device.platform} ({device.device_kind})"


def is_first() -> bool:
    """Return whether this is the process that writes files."""
    return bool(jax.process_index() == 0)


def wait(what: str) -> None:
    """Wait until all processes reach this point; `what` names it."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def agree(number: int) -> int:
    """Return the largest number that any process has."""
    if jax.process_count() == 1:
        return number
    return int(multihost_utils.process_allgather(np.int32(number)).max())


def place(tree: PyTree, mesh: Mesh | None, batch_axis: int | None = None) -> PyTree:
    """Put a tree that every process holds on the mesh: sharded along its batch axis, or else replicated."""
    if mesh is None:
        return tree
    spec = PartitionSpec() if batch_axis is None else PartitionSpec(*[None] * batch_axis, AXIS)
    return jax.tree.map(lambda leaf: put(leaf, NamedSharding(mesh, spec)), tree)


def put(leaf: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """Put one array or typed key that every process holds on devices with the given sharding."""
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(put(jax.random.key_data(leaf), sharding), impl=jax.random.key_impl(leaf))
    value = np.asarray(leaf)
    return jax.make_array_from_callback(value.shape, sharding, value.__getitem__)


def gather(tree: PyTree, mesh: Mesh | None) -> PyTree:
    """Return a tree's global arrays in the memory of every process. All processes must call this."""
    return tree if mesh is None else jax.tree.map(_whole, tree)


def _whole(leaf: jax.Array) -> Any:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(_whole(jax.random.key_data(leaf)), impl=jax.random.key_impl(leaf))
    if leaf.is_fully_replicated:  # no communication needed; most of a state is replicated
        return np.asarray(leaf.addressable_data(0))
    return multihost_utils.process_allgather(leaf, tiled=True)
