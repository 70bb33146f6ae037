"""Run folders: what a run was asked, what it measured, where it can go on, and how it is started and stopped."""

import contextlib
import fcntl
import functools
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, TextIO

import jax
import tyro

from experiments import checkpoints, devices

Row = dict[str, Any]
PyTree = Any
# Flags that say how a run is kept and shown, not what is computed: a resumed run may change them.
FREE = {
    "workdir",
    "resume",
    "save_every",
    "keep",
    "tensorboard",
    "mesh",
    "cluster",
    "corpus",
}  # a corpus is compared by its hash

log = logging.getLogger("runs")


# The command line.


def cli(experiment: str, main: Callable[..., Any], log_to: TextIO = sys.stdout) -> None:
    """Run an experiment's `main` with flags from the command line; with --resume, those of the run it goes on with.

    Ctrl-C, and whatever the system refuses, end it in one line.
    """
    logging.basicConfig(format="%(message)s", stream=log_to, force=True)
    for name in (experiment, "runs", "trainer"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax prints what it raises
    logging.raiseExceptions = False  # a reader that has gone, as `tee` after Ctrl-C, is no reason to stop
    try:
        tyro.cli(functools.partial(main, **_flags_of_the_run(main)))
    except KeyboardInterrupt:
        print(f"{experiment}: interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except OSError as error:
        sys.exit(f"{experiment}: {error}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # nobody reads it any more, and Python must not find that out at its end
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _flags_of_the_run(main: Callable[..., Any]) -> Row:
    """Return the flags that config.json holds, if --workdir and --resume are given."""
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args()
    if not (given.resume and given.workdir and (given.workdir / "config.json").exists()):
        return {}
    flags = inspect.signature(main).parameters.keys() - {"workdir", "resume", "cluster"}
    return {name: value for name, value in read_config(given.workdir).items() if name in flags}


def command(module: str, *args: str | Path) -> str:
    """Return the command that runs a module, as one can paste it here."""
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith("..") else python, "-m", module, *map(str, args)])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Note Ctrl-C and SIGTERM in the list instead of dying of them; a second one is no longer held back.

    A job in the background of a script, or under `nohup`, was told to ignore Ctrl-C and goes on doing so.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        restore()
        with contextlib.suppress(OSError):  # and not by print or logging: the signal may have come in the middle of one
            os.write(2, b"\nThe run saves and stops at the end of this block; once more stops it at once.\n")

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, note)
        yield received
    finally:
        restore()


# The folder.


def open_folder(experiment: str, workdir: str | None, config: Row, *, resume: bool = False) -> Path:
    """Make the folder of a new run and write its config.json; or find that of the run to go on with, and compare.

    Of several processes the first makes it, and all others compare.

    Raises:
      SystemExit: in one line, if a new run would be written into another, or an old one asked for with other flags.
    """
    folder = Path(workdir or Path("runs", experiment, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
    if jax.process_count() > 1 and workdir is None:
        sys.exit(f"{experiment}: --cluster needs --workdir, a folder that all processes see.")
    config = json.loads(json.dumps({**config, "versions": versions(), "devices": devices.found()}))
    if devices.is_first() and not resume:
        _make_folder(experiment, folder, config)
    devices.wait("the folder of the run is there")
    if resume or not devices.is_first():
        if workdir is None or not (folder / "config.json").exists():
            sys.exit(f"{experiment}: --resume goes on with the run in --workdir; {workdir} has no config.json of one.")
        _compare(experiment, folder, read_config(folder), config)
        (folder / "checkpoints").mkdir(exist_ok=True)
    return folder


def _make_folder(experiment: str, folder: Path, config: Row) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        foreign = [path.name for path in folder.iterdir() if path.suffix != ".part" and path.name != "checkpoints"]
        foreign += [path.name for path in (folder / "checkpoints").glob("*")]
        beside = folder / f"config.json.{os.getpid()}.part"
        if not foreign:
            (folder / "checkpoints").mkdir(exist_ok=True)
            write_json(beside, config)
            try:
                os.link(beside, folder / "config.json")  # unlike a rename it never replaces that of another run
            except FileExistsError:
                foreign = ["config.json"]
            beside.unlink()
    except OSError as error:
        sys.exit(f"{experiment}: --workdir {folder} cannot be written: {error.strerror}; name another folder.")
    if foreign:
        sys.exit(
            f"{experiment}: --workdir {folder} is not empty (it has {min(foreign)}); "
            "name a new folder, so that no run is lost, or go on with the run in it by --resume."
        )


def _compare(experiment: str, folder: Path, before: Row, now: Row) -> None:
    """Refuse to go on with a run under other flags; warn if it will not end in the same bits."""
    changed = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in now
        if name not in FREE | {"versions", "devices", "symbols"} and before.get(name) != now.get(name)
    ]
    if changed:
        sys.exit(
            f"{experiment}: --resume: the run in {folder} is another one: {'; '.join(changed)}. "
            "Leave out the flags that it has, or begin a new run."
        )
    for name in ("versions", "devices"):
        if before.get(name) != now[name]:
            log.warning("%s were %s, are %s: the run will not end in the same bits.", name, before.get(name), now[name])


def read_config(folder: Path) -> Row:
    """Read config.json, or say in one line why it cannot be."""
    try:
        return dict(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        sys.exit(f"{folder} holds no run that can be read: config.json: {error}")


def write_json(path: Path, content: Any) -> None:
    """Write beside and rename: the file is whole or not there."""
    beside = path.with_name(path.name + ".part")
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # A list of numbers in one line; no string has a line break in it.
    text = re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {"python": python_version(), **{name: version(name) for name in ("jaxlstm", "jax", "jaxlib", "optax")}}


# Metrics and checkpoints.


@contextlib.contextmanager
def metrics_writer(folder: Path, *, after: int, tensorboard: bool) -> Iterator[Callable[[list[Row]], None]]:
    """Give a function that adds rows to metrics.jsonl, and their numbers to event files if asked.

    Args:
      after: the step from which the run goes on: rows of later steps, and half a row, are cut off first.

    Raises:
      SystemExit: another process is writing there.
    """
    if not devices.is_first():
        yield lambda rows: None
        return
    path = folder / "metrics.jsonl"
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("ab", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this process ends, however it ends
        except BlockingIOError:
            sys.exit(f"another process is running the run in {folder}; wait for its end, or stop it.")
        except OSError as error:
            log.warning("%s cannot be locked (%s): see to it that no other process writes there.", path, error.strerror)
        _cut(path, after)
        events = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # imports torch, where there is one: a second that few ask for

            events = stack.enter_context(SummaryWriter(str(folder.resolve()), purge_step=after + 1))

        def write(rows: list[Row]) -> None:
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            while content:
                content = content[file.write(content) :]  # on a full disk, half of it first
            os.fsync(file.fileno())  # a checkpoint that follows must not be there without its rows
            for row in rows:
                for name, value in row.items():
                    if events and isinstance(value, float):
                        events.add_scalar(name, value, row["step"])

        yield write


def _cut(path: Path, after: int) -> None:
    kept = last = 0
    with path.open("rb") as file:
        for line in file:
            try:
                step = json.loads(line)["step"]
                if step > after or step - last not in (0, 1) or not line.endswith(b"\n"):
                    break
            except (ValueError, TypeError, KeyError):
                break
            kept, last = kept + len(line), step
    if last < after:
        found = path.with_suffix(".jsonl.damaged")
        shutil.copyfile(path, found)
        log.warning("%s can be read up to step %d, the checkpoint is of step %d: what was found is kept as %s.",
                    path, last, after, found)  # fmt: skip
    os.truncate(path, kept)


def read_metrics(folder: Path) -> list[Row]:
    """Read the rows of metrics.jsonl."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:  # splitlines() would cut at U+2028 in a sample
        return [json.loads(line) for line in file]


def restore(folder: Path, state: PyTree) -> PyTree:
    """Return what the newest intact checkpoint of a run holds; before its first one, `state` itself.

    Raises:
      SystemExit: no checkpoint is intact, or it holds another tree than `state`.
    """
    try:
        for checkpoint in checkpoints.intact(folder / "checkpoints"):
            log.info("goes on from %s", checkpoint.path)
            return checkpoints.restore(checkpoint, state)
    except checkpoints.Mismatch as error:
        sys.exit(str(error))
    if any((folder / "checkpoints").glob("step-*[0-9]")):
        sys.exit(f"no checkpoint in {folder / 'checkpoints'} is intact; move them away to begin again at step 0.")
    return state


def go_on(experiment: str, folder: Path) -> str:
    """Say from what, and by which command, a run can go on."""
    return f"{last_good(folder)}; go on: {command(f'experiments.{experiment}', '--workdir', folder, '--resume')}"


def last_good(folder: Path) -> str:
    """Name the newest intact checkpoint."""
    last = next(checkpoints.intact(folder / "checkpoints"), None)
    return f"the last good checkpoint is {last.path}" if last else "no checkpoint has been saved"
