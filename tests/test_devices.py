"""A batch sharded over two devices, in one process and in two processes."""

import functools
import itertools
import shutil
import signal
import socket
import subprocess
import time

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from experiments import char_lm
from experiments.harness import checkpoints, devices, runs
from jaxlstm import fit, init_train_state, make_train_step

from jobs import SMALL, UNCHECKED, bits, command, outcome, start, state_of, write_corpus

SYMBOLS, HIDDEN, BATCH, STEPS = 30, 16, 8, 100


@pytest.fixture
def mesh():
    return jax.make_mesh((2,), ("data",), (jax.sharding.AxisType.Auto,))


def train(mesh):
    """Train for a hundred steps; return the state, the losses and the number of traces."""
    traces = []

    def loss_fn(*args):
        traces.append(1)
        return char_lm.loss_fn(*args, dropout=0.1)

    optimizer = char_lm.make_optimizer(6e-3, STEPS, 1.0)
    model = char_lm.init_model(jax.random.key(0), SYMBOLS, HIDDEN, 2)
    state = init_train_state(model, optimizer, jax.random.key(1), carry=char_lm.initial_carries(model, BATCH))
    state = devices.place(state, mesh)._replace(carry=devices.place(state.carry, mesh, batch_axis=0))
    text = np.random.default_rng(0).integers(3, size=(STEPS, 1, BATCH)) * 10 + np.arange(13)[:, None] % 10
    batches = devices.place(text.astype(np.int32), mesh, batch_axis=2)
    state, metrics = jax.jit(functools.partial(fit, make_train_step(loss_fn, optimizer)))(state, batches)
    return state, np.asarray(metrics["loss"]), len(traces)


def distance(tree, other):
    flat = lambda tree: np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(tree)]).astype(np.float64)
    return np.linalg.norm(flat(tree) - flat(other)) / np.linalg.norm(flat(other))


@pytest.mark.documented  # in float32 throughout
@pytest.mark.ci
def test_a_hundred_steps_on_two_devices_agree_with_one_device(mesh):
    with jax.set_mesh(mesh):
        state, losses, traces = train(mesh)
    assert all(len(leaf.sharding.device_set) == 2 for leaf in jax.tree.leaves(state))
    assert all(leaf.sharding.spec == P("data") for leaf in jax.tree.leaves(state.carry))
    assert traces == 1
    want, want_losses, _ = train(None)
    assert want_losses[-1] < 0.9 * want_losses[0]  # it has learned something
    assert distance(state.params, want.params) <= 1e-6
    np.testing.assert_allclose(losses, want_losses, rtol=1e-5)


def test_gather_returns_the_bits_that_were_placed(mesh):
    tree = {"x": np.arange(12, dtype=np.float32).reshape(4, 3), "key": jax.random.key(3), "step": np.int32(7)}
    cut = {"x": np.arange(24).reshape(2, 4, 3)}
    assert bits(devices.gather(devices.place(tree, mesh), mesh)) == bits(tree)
    placed = devices.place(cut, mesh, batch_axis=1)
    assert [shard.data.shape for shard in placed["x"].addressable_shards] == [(2, 2, 3)] * 2
    assert bits(devices.gather(placed, mesh)) == bits(cut)


@pytest.mark.parametrize(
    "mesh, cluster, message",
    [
        ("two", "", "--mesh must be data=N, with N the number of devices, got two"),
        ("model=2", "", "--mesh must be data=N, with N the number of devices, got model=2"),
        ("data=3", "", "--batch-size must be a multiple of the 3 devices of --mesh, got 8"),
        ("data=4", "", "--mesh data=4 needs 4 devices; JAX finds 2."),
        ("", "auto", "--cluster auto needs --mesh data=N"),
        ("data=2", "here", "--cluster must be auto or HOST:PORT,K/N"),
        ("data=2", "localhost:1,2/2", "--cluster must be auto or HOST:PORT,K/N, with process K from 0 to N-1"),
        ("data=2", "localhost:1,0/3", "2 devices cannot be divided evenly among 3 processes"),
    ],
)
def test_flags_that_do_not_fit_together_are_reported_in_one_line(mesh, cluster, message):
    with pytest.raises(SystemExit) as refused:
        devices.start("char_lm", mesh, cluster, batch_size=8)
    (line,) = str(refused.value).splitlines()
    assert line.startswith("char_lm: ") and message in line


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Return a function that runs the small job on two devices, given a folder's name and more flags."""
    folder = tmp_path_factory.mktemp("devices")
    flags = ["--corpus", write_corpus(folder / "corpus.txt"), "--mesh", "data=2", *SMALL, "--steps=100", "--block=5"]

    def run(name, *more, begin=command, **options):
        new = [] if "--resume" in more else flags
        return begin("char_lm", "--workdir", folder / name, *new, *more, **options)

    run.folder = folder
    run.command = functools.partial(run, environment=UNCHECKED)
    assert run.command("whole").returncode == 0
    return run


def two_processes(run, *flags, second=()):
    """Start the job as two processes with one device each; `second` adds flags to the second one."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return [
        run(*flags, *own, "--cluster", f"{address},{k}/2", begin=start, **streams) for k, own in enumerate(((), second))
    ]


def ends(both):
    """Wait for two processes to end; return their exit codes and their output."""
    try:
        outputs = [process.communicate(timeout=120)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    return [process.returncode for process in both], outputs


@pytest.fixture(scope="module")
def stopped(run):
    """The folder of a run in two processes, stopped by a signal to the second one."""
    both = two_processes(run, "cut")
    metrics, deadline = run.folder / "cut" / "metrics.jsonl", time.monotonic() + 120
    while time.monotonic() < deadline and not (metrics.exists() and metrics.read_bytes().count(b"\n") >= 4):
        time.sleep(0.05)
    both[1].send_signal(signal.SIGTERM)
    codes, outputs = ends(both)
    assert codes == [128 + signal.SIGTERM] * 2, outputs
    assert "stopped after step" in outputs[0] and "stopped after step" not in outputs[1]  # only the first process logs
    return run.folder / "cut"


@pytest.mark.ci
def test_two_processes_stopped_and_resumed_are_bitwise_identical_to_one_process(run, stopped):
    codes, outputs = ends(two_processes(run, "cut", "--resume"))
    assert codes == [0, 0], outputs
    assert outcome(stopped) == outcome(run.folder / "whole")


@pytest.mark.slow
def test_processes_with_different_settings_are_refused(run):
    codes, outputs = ends(two_processes(run, "other", second=["--seed=1"]))
    assert 0 not in codes and "seed was 0, is 1" in outputs[1], outputs


@pytest.mark.slow
def test_a_run_from_two_devices_can_be_finished_on_one(run, stopped):
    shutil.copytree(stopped, run.folder / "on one")
    done = run.command("on one", "--resume", "--mesh", "data=1")
    assert done.returncode == 0 and "devices changed from 2 x cpu (cpu) to 1 x cpu (cpu)" in done.stdout
    whole, on_one = (
        {path: leaf for path, leaf in state_of(checkpoint).items() if path.startswith("params")}
        for name in ("whole", "on one")
        for checkpoint in itertools.islice(checkpoints.intact(run.folder / name / "checkpoints"), 1)
    )
    assert distance(on_one, whole) <= 1e-5
    assert runs.read_metrics(run.folder / "on one")[-1]["step"] == 100
