"""Checkpoints that notice damage. One is a folder, whole or not there:

    step-00000300/
      arrays/        the leaves of the state, by Orbax, under their paths: `params.layers.0.w_hh`
      about.json     step, score, and every leaf's dtype and shape
      SHA256SUMS     of every other file, as `sha256sum -c` reads it

It is written beside (`.part`), put on the disk, and renamed, so a process killed at any moment leaves the older ones.
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

from experiments import devices

PyTree = Any
SUMS = "SHA256SUMS"

log = logging.getLogger("checkpoints")


class Checkpoint(NamedTuple):
    """A checkpoint found whole."""

    path: Path
    step: int
    score: float  # lower is better; infinite where the run was not evaluated
    leaves: dict[str, str]  # path -> dtype and shape: `float32[128, 512]`


class Damaged(Exception):
    """What is on the disk is not what was saved."""


class Mismatch(ValueError):
    """A checkpoint holds another tree than the one asked for."""


def save(folder: Path, state: PyTree, *, step: int, keep: int, score: float | None = None) -> Path:
    """Save a state; then delete all but the last `keep` checkpoints up to this one and the one of the lowest score.

    Args:
      folder: where the checkpoints are; it is there.
      state: any pytree of arrays. A typed key is saved as its data, with the name of its implementation.

    Raises:
      OSError: it could not be saved. Whatever was there before is untouched.
    """
    path = folder / f"step-{step:08d}"
    beside = path.with_suffix(".part")
    for leftover in folder.glob("step-*.part"):
        _delete(leftover)
    beside.mkdir()  # and not its parents: a run whose folder has vanished must hear of it
    try:
        leaves = _leaves(state)
        # Orbax refuses arrays without elements; their shape says all.
        arrays = {name: np.asarray(_data(leaf)) for name, leaf in leaves.items() if leaf.size}
        _try_room(beside, sum(array.nbytes + 4096 for array in arrays.values()) + 32 * 4096)
        with ocp.StandardCheckpointer(multiprocessing_options=_alone()) as checkpointer:
            checkpointer.save(beside.absolute() / "arrays", arrays)
        about = {"step": step, "score": score, "leaves": {name: _describe(leaf) for name, leaf in leaves.items()}}
        (beside / "about.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
        (beside / SUMS).write_bytes(_sums(beside))
        for item in (beside, *beside.rglob("*")):
            _sync(item)
        if path.exists():  # damaged, since the run came by here again
            path.rename(path.with_suffix(".old.part"))
        beside.rename(path)
        _sync(folder)
    except Exception as error:  # whatever Orbax raises
        with contextlib.suppress(OSError):
            _delete(beside)
        reason = error.strerror if isinstance(error, OSError) else str(error).splitlines()[0]
        raise OSError(f"{path} could not be saved: {reason}") from error

    upto = [old for old in _paths(folder) if _step(old) <= step]
    scores = sorted((_score(old), old) for old in upto)
    best = next((old for score, old in scores if score < math.inf and _is_intact(old)), None)
    for old in upto[:-keep]:
        if old != best:
            _delete(old)
    for replaced in folder.glob("step-*.old.part"):
        _delete(replaced)
    return path


def intact(folder: Path) -> Iterator[Checkpoint]:
    """Yield the checkpoints of a folder that are what was saved, newest first; warn of every other one, by name."""
    for path in reversed(_paths(folder)):
        try:
            yield verify(path)
        except Damaged as damage:
            log.warning("checkpoint %s is damaged and passed over: %s.", path, damage)


def verify(path: Path) -> Checkpoint:
    """Compare every file of a checkpoint with its SHA-256.

    Raises:
      Damaged: naming what is missing, changed, or does not belong there.
    """
    try:
        if (noted := (path / SUMS).read_bytes()) != (found := _sums(path)):
            raise Damaged(_difference(noted, found))
        about = json.loads((path / "about.json").read_bytes())
    except OSError as error:
        raise Damaged(f"{Path(error.filename or path).name}: {error.strerror}") from error
    if about["step"] != _step(path):
        raise Damaged(f"it is the one of step {about['step']} under another name")
    return Checkpoint(path, about["step"], _finite(about["score"]), about["leaves"])


def restore(checkpoint: Checkpoint, like: PyTree, *, partial: bool = False) -> PyTree:
    """Restore a verified checkpoint.

    Args:
      like: a pytree of arrays or of `jax.ShapeDtypeStruct`: the shapes, dtypes and shardings to restore to.
      partial: `like` may ask for some of the leaves only.

    Raises:
      Mismatch: the trees differ; path by path, a line each.
    """
    wanted = _leaves(like)
    described = {name: _describe(leaf) for name, leaf in wanted.items()}
    saved = {name: leaf for name, leaf in checkpoint.leaves.items() if name in wanted or not partial}
    if lines := [
        f"  {name}: saved {saved.get(name, 'nothing')}, expected {described.get(name, 'nothing')}"
        for name in sorted(saved.keys() | described.keys())
        if saved.get(name) != described.get(name)
    ]:
        raise Mismatch("\n".join([f"{checkpoint.path} does not hold the state that is asked for:", *lines]))

    targets = {name: _data(leaf) for name, leaf in wanted.items() if leaf.size}
    restore_args = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in targets}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(), multiprocessing_options=_alone()) as checkpointer:
        arrays = checkpointer.restore(
            checkpoint.path.absolute() / "arrays",
            args=ocp.args.PyTreeRestore(targets, restore_args=restore_args, partial_restore=partial),
        )
    restored = [
        _placed(arrays[name], leaf) if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in wanted.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), restored)


def _alone() -> ocp.options.MultiprocessingOptions:
    """Tell Orbax not to wait for other processes."""
    own = jax.process_index()
    return ocp.options.MultiprocessingOptions(
        primary_host=own, active_processes={own}, barrier_sync_key_prefix=str(own)
    )


# Leaves, under their paths; a typed key is its data and the name of its implementation.


def _leaves(tree: PyTree) -> dict[str, Any]:
    leaves = {_name(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
    if len(leaves) < len(jax.tree.leaves(tree)):
        raise ValueError(
            "checkpoints: two leaves of this tree have one path; do not write dots into the keys of a dict."
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
    """Put what was read where the leaf is that it is for."""
    sharding = getattr(_data(like), "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = devices.put(data, sharding)
    return jax.random.wrap_key_data(placed, impl=jax.random.key_impl(like)) if _is_key(like) else placed


# Folders and their files.


def _paths(folder: Path) -> list[Path]:
    return sorted((path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name)), key=_step)


def _step(path: Path) -> int:
    return int(path.name.removeprefix("step-"))


def _score(path: Path) -> float:
    try:
        return _finite(json.loads((path / "about.json").read_bytes())["score"])
    except (OSError, ValueError, KeyError, TypeError):
        return math.inf


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
    """Say which files two SHA256SUMS disagree about."""
    lines = lambda sums: [line.partition("  ") for line in sums.decode(errors="replace").split("\n")]
    before, now = ({name: digest for digest, _, name in lines(sums)} for sums in (noted, found))
    said = [
        f"{name!r} {'is missing' if name not in now else 'has changed' if name in before else 'was not saved with it'}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]
    return ", ".join(said[:3]) + (f" and {len(said) - 3} more" if len(said) > 3 else "") or f"{SUMS} has changed"


def _try_room(folder: Path, size: int) -> None:
    """Raise an OSError if the disk will not take so many bytes: Orbax's threads print tracebacks when they find out."""
    if not hasattr(os, "posix_fallocate"):  # macOS
        return
    with tempfile.TemporaryFile(dir=folder) as file:
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
                raise  # anything else: this file system cannot say


def _sync(path: Path) -> None:
    """Ask the system to put a file, or the names in a folder, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _delete(path: Path) -> None:
    """Delete a file or a folder; a folder is renamed first, so that half of one is never taken for one."""
    if path.is_dir() and not path.is_symlink():
        if path.suffix != ".part":
            path = path.rename(path.with_suffix(".old.part"))
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
