"""Checkpoints that detect damage. Each one is a folder:

    step-00000300/
      arrays/        the state's leaves, saved by Orbax under their paths, such as `params.layers.0.w_hh`
      about.json     the run, the step, the score, and the dtype and shape of every leaf
      SHA256SUMS     the checksum of every other file, in the format of `sha256sum -c`

A checkpoint is written under a temporary name (`.part`), flushed to disk, and renamed. A process that is killed at any
moment therefore leaves all older checkpoints intact, and never a partial one under its final name.
"""

import contextlib
import errno
import functools
import hashlib
import json
import logging
import math
import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp

from experiments.harness import devices

PyTree = Any
SUMS = "SHA256SUMS"

log = logging.getLogger("checkpoints")


class Checkpoint(NamedTuple):
    """A checkpoint whose files match their checksums."""

    path: Path
    step: int
    score: float  # lower is better; infinite if the run was not evaluated at this step
    leaves: dict[str, str]  # path -> dtype and shape: `float32[128, 512]`


class Damaged(Exception):
    """The files on disk differ from what was saved, or cannot be read."""

    kind = "damaged"


class Foreign(Damaged):
    """The checkpoint belongs to another run."""

    kind = "of another run"


class Mismatch(ValueError):
    """A checkpoint's tree differs from the requested one."""


def save(folder: Path, state: PyTree, *, step: int, keep: int, score: float | None = None, run: str = "") -> Path:
    """Save a state, then delete all checkpoints up to this step except the newest `keep` and the best one.

    Args:
      folder: an existing folder for the run's checkpoints.
      state: any pytree of arrays. A typed key is saved as its data, with the name of its implementation.
      step: the step of the state.
      keep: how many of the newest checkpoints to keep.
      score: ranks checkpoints, lower being better; None if the run was not evaluated at this step.
      run: names the run that the state belongs to.

    Returns:
      The checkpoint's folder.

    Raises:
      OSError: the state could not be saved. Older checkpoints are untouched.
    """
    path = folder / f"step-{step:08d}"
    beside = path.with_suffix(".part")
    for leftover in folder.glob("step-*.part"):
        _delete(leftover)
    beside.mkdir()  # without parents, so that a run whose folder was deleted fails
    try:
        leaves = _leaves(state)
        # Orbax refuses arrays without elements. `restore` makes them from their shape.
        arrays = {name: np.asarray(_data(leaf)) for name, leaf in leaves.items() if leaf.size}
        _try_room(beside, sum(array.nbytes + 4096 for array in arrays.values()) + 32 * 4096)
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(beside.absolute() / "arrays", arrays)
        described = {name: _describe(leaf) for name, leaf in leaves.items()}
        about = {"run": run, "step": step, "score": score, "leaves": described}
        (beside / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        (beside / SUMS).write_bytes(_sums(beside))
        for item in (beside, *beside.rglob("*")):
            _sync(item)
        if path.exists():  # it is damaged, or the run would not have returned to an earlier step
            path.rename(path.with_suffix(".old.part"))
        beside.rename(path)
        _sync(folder)
    except Exception as error:  # Orbax raises many types
        with contextlib.suppress(OSError):
            _delete(beside)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise OSError(f"{path} could not be saved: {reason}") from error

    upto = [old for old in _paths(folder) if _step(old) <= step and not _is_foreign(old, run)]
    scores = sorted((_score(old), old) for old in upto)
    best = next((old for score, old in scores if score < math.inf and _is_intact(old)), None)
    for old in upto[:-keep]:
        if old != best:
            _delete(old)
    for replaced in folder.glob("step-*.old.part"):
        _delete(replaced)
    return path


def intact(folder: Path, run: str = "") -> Iterator[Checkpoint]:
    """Yield the intact checkpoints of a folder, newest first; log a warning for each damaged one.

    If a run is named, skip the checkpoints of all other runs likewise.
    """
    for path in reversed(_paths(folder)):
        try:
            yield verify(path, run)
        except Damaged as damage:
            warn(path, damage)


def warn(path: Path, damage: Damaged) -> None:
    """Log that a checkpoint was skipped, and why."""
    log.warning("checkpoint %s is %s and was skipped: %s.", path, damage.kind, damage)


def verify(path: Path, run: str = "") -> Checkpoint:
    """Compare every file of a checkpoint with its checksum, and its run with the one named.

    Returns:
      The checkpoint.

    Raises:
      Damaged: a file is missing, changed, or was added, or cannot be read. The message names it.
      Foreign: the checkpoint belongs to another run.
    """
    try:
        for item in path.rglob("*"):
            if not (item.is_file() or item.is_dir()):  # reading a pipe would wait forever
                raise Damaged(f"{item.relative_to(path).as_posix()!r} is not a file")
        if (noted := (path / SUMS).read_bytes()) != (found := _sums(path)):
            raise Damaged(_difference(noted, found))
        about = json.loads((path / "about.json").read_bytes())
        checkpoint = Checkpoint(path, int(about["step"]), _finite(about["score"]), dict(about["leaves"]))
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from error
    except (ValueError, TypeError, LookupError) as error:
        raise Damaged(f"'about.json' does not describe a checkpoint: {type(error).__name__}: {error}") from error
    if run and (about.get("run") or run) != run:
        raise Foreign("its run has other settings than this one")
    if about["step"] != _step(path):
        raise Damaged(f"it is the checkpoint of step {about['step']}, renamed")
    return checkpoint


def restore(checkpoint: Checkpoint, like: PyTree, *, partial: bool = False) -> PyTree:
    """Restore the state in a verified checkpoint.

    Args:
      checkpoint: a checkpoint from `intact` or `verify`.
      like: a pytree of arrays or of `jax.ShapeDtypeStruct` with the shapes, dtypes and shardings to restore to.
      partial: allow `like` to have only some of the saved leaves.

    Returns:
      A pytree with the structure of `like`.

    Raises:
      Damaged: Orbax cannot decode the arrays, or they differ from their description.
      Mismatch: the trees differ. The message lists every difference in a line of its own.
    """
    wanted = _leaves(like)
    described = {name: _describe(leaf) for name, leaf in wanted.items()}
    saved = {name: leaf for name, leaf in checkpoint.leaves.items() if name in wanted or not partial}
    if lines := [
        f"  {name}: saved {saved.get(name, 'nothing')}, expected {described.get(name, 'nothing')}"
        for name in sorted(saved.keys() | described.keys())
        if saved.get(name) != described.get(name)
    ]:
        raise Mismatch("\n".join([f"{checkpoint.path} does not contain the requested state:", *lines]))

    targets = {name: _data(leaf) for name, leaf in wanted.items() if leaf.size}
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in targets}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:
        try:
            arrays = checkpointer.restore(
                checkpoint.path.absolute() / "arrays",
                args=ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=partial),
            )
        except Exception as error:  # Orbax raises many types
            reason = (str(error).splitlines() or [""])[0]
            raise Damaged(f"'arrays' cannot be decoded: {type(error).__name__}: {reason}") from error
    for name, target in targets.items():
        if (arrays[name].shape, arrays[name].dtype) != (target.shape, target.dtype):
            raise Damaged(f"{name!r} is not what 'about.json' says")
    restored = [
        _placed(arrays[name], leaf) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Tell Orbax not to wait for other processes, since only the first one saves."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )


# Leaves by path. A typed key is saved as its data and the name of its implementation.


def _leaves(tree: PyTree) -> dict[str, Any]:
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    if len(leaves) < len(jax.tree.leaves(tree)):
        raise ValueError(
            "checkpoints: two leaves of this tree have the same path; do not use dots in the keys of a dict."
        )
    return leaves


_name = functools.partial(jax.tree_util.keystr, simple=True, separator=".")


def _is_key(leaf: Any) -> bool:
    return bool(jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key))


def _describe(leaf: Any) -> str:
    return f"{f'key<{jax.random.key_impl(leaf)}>' if _is_key(leaf) else leaf.dtype}{list(leaf.shape)}"


def _data(leaf: Any) -> Any:
    return jax.random.key_data(leaf) if _is_key(leaf) else leaf


def _placed(data: np.ndarray, like: Any) -> Any:
    """Put restored data on the devices of the leaf it replaces."""
    sharding = getattr(_data(like), "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = devices.put(data, sharding)
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like)) if _is_key(like) else placed


# Folders and their files.


def _paths(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _is_foreign(path: Path, run: str) -> bool:
    return bool(run) and (_about(path).get("run") or run) != run


def _score(path: Path) -> float:
    try:
        return _finite(_about(path)["score"])
    except (LookupError, TypeError):
        return math.inf


def _about(path: Path) -> dict[str, Any]:
    """Return what about.json says, without checking anything; nothing if it cannot be read."""
    try:
        about = json.loads((path / "about.json").read_bytes()) if (path / "about.json").is_file() else {}
    except (OSError, ValueError):
        return {}
    return about if isinstance(about, dict) else {}


def _finite(score: float | None) -> float:
    return math.inf if score is None or math.isnan(score) else float(score)


def _is_intact(path: Path) -> bool:
    try:
        return verify(path) is not None
    except Damaged:
        return False


def _sums(path: Path) -> bytes:
    files = {file.relative_to(path).as_posix(): file for file in path.rglob("*") if file.is_file()}
    files.pop(SUMS, None)
    return "".join(f"{_sha256(files[name])}  {name}\n" for name in sorted(files)).encode(errors="surrogateescape")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _difference(noted: bytes, found: bytes) -> str:
    """Name the files on which two SHA256SUMS disagree."""
    before, now = _digests(noted), _digests(found)
    changes = [
        f"{name!r} {'is missing' if name not in now else 'has changed' if name in before else 'was added'}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return ", ".join(changes[:3]) + more or f"{SUMS} has changed"


def _digests(sums: bytes) -> dict[str, str]:
    lines = [line.partition("  ") for line in sums.decode(errors="replace").split("\n")]
    return {name: digest for digest, _, name in lines}


def _try_room(folder: Path, size: int) -> None:
    """Raise an OSError if the disk has no room for `size` bytes; Orbax's threads would print tracebacks instead."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # any other error means that this file system cannot tell


def _sync(path: Path) -> None:
    """Flush a file, or the names in a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete a file or a folder. A folder is renamed first: a kill halfway must not leave a partial checkpoint."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".part":
            path = path.rename(path.with_suffix(".old.part"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
