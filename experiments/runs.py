"""Run folders: what a run was asked, what it measured, and the weights it ends with."""

import contextlib
import json
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from platform import python_version
from typing import Any

import jax
import orbax.checkpoint as ocp
from tensorboardX import SummaryWriter

Row = dict[str, Any]


def create(experiment: str, workdir: str | None, config: dict[str, Any]) -> Path:
    """Make the folder of a new run and write its config.json; never into an older run."""
    folder = Path(workdir or Path("runs", experiment, time.strftime("%Y%m%d-%H%M%S")))
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        sys.exit(f"{experiment}: --workdir {folder} cannot be made: {error.strerror}; name another folder.")
    if any(folder.iterdir()):
        sys.exit(f"{experiment}: --workdir {folder} is not empty; name a new folder, so that no run is lost.")
    write_json(folder / "config.json", {**config, "versions": versions()})
    return folder


def write_json(path: Path, content: Any) -> None:
    """Write beside and rename: the file is whole or not there."""
    beside = path.with_name(path.name + ".part")
    beside.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    beside.replace(path)


@contextlib.contextmanager
def metrics_writer(folder: Path, tensorboard: bool) -> Iterator[Callable[[list[Row]], None]]:
    """Give a function that adds rows to metrics.jsonl, and their numbers to event files if asked."""
    with contextlib.ExitStack() as stack:
        file = stack.enter_context((folder / "metrics.jsonl").open("a", encoding="utf-8"))
        events = stack.enter_context(SummaryWriter(str(folder.resolve()))) if tensorboard else None

        def write(rows: list[Row]) -> None:
            file.write("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
            file.flush()
            for row in rows:
                for name, value in row.items():
                    if events and isinstance(value, float):
                        events.add_scalar(name, value, row["step"])

        yield write


def read_metrics(folder: Path) -> list[Row]:
    """Read the rows of metrics.jsonl."""
    with (folder / "metrics.jsonl").open(encoding="utf-8") as file:  # splitlines() would cut at U+2028 in a sample
        return [json.loads(line) for line in file]


def save_params(folder: Path, params: Any) -> None:
    """Save a pytree of parameters under params/."""
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder.resolve() / "params", params)


def restore_params(folder: Path, like: Any) -> Any:
    """Restore the parameters of a run; `like` is a pytree of their shapes and dtypes."""
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(folder.resolve() / "params", like)


def devices() -> str:
    """Say what JAX runs on."""
    found = jax.devices()
    return f"{len(found)} x {found[0].platform} ({found[0].device_kind})"


def versions() -> dict[str, str]:
    """Return the versions a result depends on."""
    return {"python": python_version(), **{name: version(name) for name in ("jaxlstm", "jax", "jaxlib", "optax")}}


def command(module: str, folder: Path) -> str:
    """Return the command that runs a module on a run's folder, as one can paste it here."""
    python = os.path.relpath(sys.executable)
    return shlex.join([sys.executable if python.startswith("..") else python, "-m", module, str(folder)])
