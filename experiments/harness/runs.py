"""Run folders: a run's settings, its metrics and checkpoints, and how a run starts, stops and resumes."""

import contextlib
import fcntl
import functools
import hashlib
import inspect
import json
import logging
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any, TextIO

import jax
import tyro

from experiments.harness import checkpoints, devices

Row = dict[str, Any]
PyTree = Any
# Flags that a resumed run may change: they say how a run is stored and shown, not what it computes.
FREE = {
    "workdir",
    "resume",
    "save_every",
    "keep",
    "tensorboard",
    "mesh",
    "cluster",
    "corpus",  # the config also holds the hash of the text or data, which is compared
    "data",
}
# Entries of a config that are not flags to compare: they are compared in another way, or follow from the flags.
DERIVED = {"versions", "devices", "symbols"}

log = logging.getLogger("runs")


# The command line.


class FlagError(ValueError):
    """A flag's value is wrong."""


def check_names(flag: str, given: Iterable[str], known: Iterable[str]) -> None:
    """Raise a `FlagError` if a flag gives a name that is not known."""
    if unknown := [name for name in given if name not in known]:
        raise FlagError(f"--{flag} must be one of {', '.join(map(repr, known))}, got {', '.join(map(repr, unknown))}")


def cli(experiment: str, main: Callable[..., Any], log_to: TextIO = sys.stdout, *, quick: Row | None = None) -> None:
    """Run an experiment's `main` with flags from the command line, or with the saved flags if --resume is given.

    Ctrl-C, operating system errors and `FlagError` end the run with a one-line message.

    Args:
      experiment: the experiment's name.
      main: a function with keywords only; they are the flags.
      log_to: where messages go.
      quick: the flags that --quick sets, for a run of less than a minute that shows that everything works. Other flags
        on the command line come after it and win.
    """
    logging.basicConfig(format="%(message)s", stream=log_to, force=True)
    for name in (experiment, "runs", "trainer"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax also prints the errors it raises
    logging.raiseExceptions = False  # Ctrl-C may kill the `tee` that reads this output; the run must save anyway
    try:
        flags, rest = _saved_flags(experiment, main, quick)
        about = inspect.cleandoc(main.__doc__ or "").partition("\n\nArgs:")[0]
        if quick:
            shorter = " ".join(f"--{name.replace('_', '-')} {_words(value)}" for name, value in quick.items())
            about += f"\n\n--quick stands for {shorter}: a run of less than a minute, whose figures say nothing."
        tyro.cli(
            functools.partial(main, **flags), prog=f"python -m {_module(experiment)}", args=rest, description=about
        )
    except KeyboardInterrupt:
        print(f"{experiment}: interrupted.", file=sys.stderr)
        sys.exit(128 + signal.SIGINT)
    except (OSError, FlagError) as error:
        sys.exit(f"{experiment}: {error}")
    finally:
        try:
            sys.stdout.flush()
        except OSError:  # the reader is gone; without this, Python flushes again at exit and prints a traceback
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _saved_flags(experiment: str, main: Callable[..., Any], quick: Row | None) -> tuple[Row, list[str]]:
    """Return the flags that the command line overrides, and the command line without --quick.

    With --resume they come from the config.json in --workdir, otherwise from --quick.
    """
    parser = ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--workdir", type=Path)
    parser.add_argument("--resume", action="store_true")
    given, _ = parser.parse_known_args()
    rest = [word for word in sys.argv[1:] if quick is None or word != "--quick"]
    if given.resume and not given.workdir:
        sys.exit(f"{experiment}: --resume needs --workdir, the folder of the run to continue.")
    if not (given.resume and (given.workdir / "config.json").exists()):
        return (quick or {}) if len(rest) < len(sys.argv) - 1 else {}, rest
    flags = inspect.signature(main).parameters.keys() - {"workdir", "resume", "cluster"}
    return {name: value for name, value in read_config(given.workdir).items() if name in flags}, rest


def _module(experiment: str) -> str:
    """Return the name of the module that runs, such as experiments.char_lm or benchmarks.benchmark."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return spec.name if spec and spec.name.endswith(f".{experiment}") else f"experiments.{experiment}"


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def command(module: str, *args: str | Path) -> str:
    """Return the shell command that runs a module, ready to paste in the current folder."""
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith("..") else python, "-m", module, *map(str, args)])


@contextlib.contextmanager
def stop_signals() -> Iterator[list[int]]:
    """Collect Ctrl-C and SIGTERM in a list instead of dying; a second signal takes effect at once.

    A job in the background of a script, or under `nohup`, inherits the setting to ignore Ctrl-C and still ignores it.
    """
    received: list[int] = []

    def note(number: int, _: Any) -> None:
        received.append(number)
        restore()
        with contextlib.suppress(OSError):  # os.write, since the signal may have interrupted a print or a log call
            os.write(2, b"\nThe run will save and stop at the end of this block; interrupt again to stop at once.\n")

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
    """Create the folder of a new run and write its config.json, or open the folder of a run to resume.

    If there are several processes, the first one creates the folder and the others compare their flags with it.

    Args:
      experiment: the experiment's name, used in messages and in the default folder.
      workdir: the folder; default runs/<experiment>/<time>-<process>.
      config: the run's flags; `versions` and `devices` are added.
      resume: open an existing folder.

    Returns:
      The folder.

    Raises:
      SystemExit: in one line, the folder belongs to another run, or the flags differ from those of the run to resume.
    """
    folder = Path(workdir or Path("runs", experiment, f"{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}"))
    if jax.process_count() > 1 and workdir is None:
        sys.exit(f"{experiment}: --cluster needs --workdir, a folder that all processes can see.")
    config = json.loads(json.dumps({**config, "versions": versions(), "devices": devices.found()}))
    if devices.is_first() and not resume:
        _make_folder(experiment, folder, config)
    devices.wait("the run's folder exists")
    if resume or not devices.is_first():
        if workdir is None or not (folder / "config.json").exists():
            sys.exit(f"{experiment}: --resume continues the run in --workdir, but {workdir} has no config.json.")
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
                os.link(beside, folder / "config.json")  # unlike a rename, a link never replaces another run's file
            except FileExistsError:
                foreign = ["config.json"]
            beside.unlink()
    except OSError as error:
        sys.exit(f"{experiment}: --workdir {folder} cannot be written: {error.strerror}; choose another folder.")
    if foreign:
        sys.exit(
            f"{experiment}: --workdir {folder} is not empty (it contains {min(foreign)}); "
            "choose a new folder, or continue the run in it with --resume."
        )


def _compare(experiment: str, folder: Path, before: Row, now: Row) -> None:
    """Refuse to resume a run with other flags; warn if versions or devices will change its bits."""
    changed = [
        f"{name} was {before.get(name)}, is {now.get(name)}"
        for name in now
        if name not in FREE | DERIVED and before.get(name) != now.get(name)
    ]
    if changed:
        sys.exit(
            f"{experiment}: --resume: the run in {folder} has other settings: {'; '.join(changed)}. "
            "Leave out the flags that the run already has, or start a new run."
        )
    for name in ("versions", "devices"):
        if before.get(name) != now[name]:
            log.warning(
                "%s changed from %s to %s: the run will not be bitwise identical to an uninterrupted one.",
                name, before.get(name), now[name],
            )  # fmt: skip


def read_config(folder: Path) -> Row:
    """Read config.json, or exit with one line that says why it cannot be read."""
    path = folder / "config.json"
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is not a file")
        config = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(config, dict) or not config:
            raise ValueError(f"it is damaged: expected a JSON object with the flags of a run, got {str(config)[:40]}")
    except (OSError, ValueError) as error:
        sys.exit(f"{folder} does not contain a readable run: config.json: {error}")
    return config


def identity(folder: Path) -> str:
    """Return a hash of all settings that change what a run computes; its checkpoints are labelled with it."""
    if not (folder / "config.json").exists():
        return ""
    config = read_config(folder)
    settings = {name: value for name, value in config.items() if name not in FREE | DERIVED}
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]


def intact(folder: Path) -> Iterator[checkpoints.Checkpoint]:
    """Yield a run's intact checkpoints, newest first; log a warning for each one that is damaged or of another run."""
    return checkpoints.intact(folder / "checkpoints", identity(folder))


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file to a temporary name and rename it, so that readers see a complete file or none."""
    beside = path.with_name(path.name + ".part")
    text = json.dumps(content, indent=1, ensure_ascii=False)
    # Put a list of numbers on one line. The pattern needs a line break, and JSON escapes those in strings.
    text = re.sub(r"\[\n[\s\d.,eE+-]+\]", lambda found: f"[{' '.join(found[0][1:-1].split())}]", text)
    beside.write_text(text + "\n", encoding="utf-8")
    beside.replace(path)


def versions() -> dict[str, str]:
    """Return the versions that a result depends on."""
    return {"python": python_version(), **{name: version(name) for name in ("jaxlstm", "jax", "jaxlib", "optax")}}


def commit() -> str | None:
    """Return the commit of this code, followed by + if files have changed; None outside a Git repository."""
    describe = ["git", "describe", "--always", "--exclude=*", "--dirty=+", "--abbrev=12"]
    try:
        found = subprocess.run(describe, cwd=Path(__file__).parent, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


# Metrics and checkpoints.


@contextlib.contextmanager
def metrics_writer(folder: Path, *, after: int, tensorboard: bool) -> Iterator[Callable[[list[Row]], None]]:
    """Yield a function that appends rows to metrics.jsonl, and their numbers to TensorBoard event files if asked.

    Args:
      folder: the run's folder.
      after: the step from which the run continues: rows of later steps, and a half-written row, are cut off first.
      tensorboard: also write event files.

    Raises:
      SystemExit: another process is writing to the run.
    """
    if not devices.is_first():
        yield lambda rows: None
        return
    path = folder / "metrics.jsonl"
    if path.exists() and not path.is_file():
        sys.exit(f"{path} is not a file; move it away to continue the run.")
    with contextlib.ExitStack() as stack:
        file = stack.enter_context(path.open("ab", buffering=0))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system drops it when this process ends or is killed
        except BlockingIOError:
            sys.exit(f"another process is writing to the run in {folder}; wait for it to finish, or stop it.")
        except OSError as error:
            log.warning("%s cannot be locked (%s): make sure that no other process writes to it.", path, error.strerror)
        _cut(path, after)
        events = None
        if tensorboard:
            from tensorboardX import SummaryWriter  # imported here, since it imports torch, which takes a second

            events = stack.enter_context(SummaryWriter(str(folder.resolve()), purge_step=after + 1))

        def write(rows: list[Row]) -> None:
            content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
            while content:
                content = content[file.write(content) :]  # a disk that fills up takes part of it before it raises
            os.fsync(file.fileno())  # or a crash could keep the checkpoint that follows and lose its rows
            for row in rows:
                for name, value in row.items():
                    if events and isinstance(value, float):
                        events.add_scalar(name, value, row["step"])

        yield write


def _cut(path: Path, after: int) -> None:
    """Cut metrics.jsonl after the last row that can be read and belongs to a step up to `after`."""
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
        log.warning("%s can be read up to step %d, but the checkpoint is from step %d; a copy was kept as %s.",
                    path, last, after, found)  # fmt: skip
    os.truncate(path, kept)


def read_metrics(folder: Path) -> list[Row]:
    """Read the rows of metrics.jsonl."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:  # splitlines() would split at U+2028 in a sample
        return [json.loads(line) for line in file]


def restore(folder: Path, state: PyTree) -> PyTree:
    """Return the state in a run's newest intact checkpoint, or `state` itself if nothing has been saved yet.

    Raises:
      SystemExit: no checkpoint is intact, or the checkpoint's tree differs from `state`.
    """
    try:
        for checkpoint in intact(folder):
            try:
                restored = checkpoints.restore(checkpoint, state)
            except checkpoints.Damaged as damage:
                checkpoints.warn(checkpoint.path, damage)
                continue
            log.info("resuming from %s", checkpoint.path)
            return restored
    except checkpoints.Mismatch as error:
        sys.exit(str(error))
    if any((folder / "checkpoints").glob("step-*[0-9]")):
        sys.exit(f"no checkpoint in {folder / 'checkpoints'} is intact; move them away to start again from step 0.")
    return state


def how_to_resume(experiment: str, folder: Path) -> str:
    """Name the newest intact checkpoint and the command that resumes from it."""
    resume = command(f"experiments.{experiment}", "--workdir", folder, "--resume")
    return f"{last_good(folder)}; resume with: {resume}"


def last_good(folder: Path) -> str:
    """Name the newest intact checkpoint."""
    last = next(intact(folder), None)
    return f"the last good checkpoint is {last.path}" if last else "no checkpoint has been saved"
