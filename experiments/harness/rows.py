"""Results that are a list of rows: each row is measured in turn and saved at once; a resumed run skips those it has."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from experiments.harness import devices, runs
from experiments.harness.runs import Row


def collect(
    experiment: str,
    config: Row,
    plans: Sequence[Row],
    measure: Callable[..., Row],
    *,
    workdir: str | None,
    resume: bool,
) -> tuple[Path, Row]:
    """Measure one row for each plan and write result.json after each, so that Ctrl-C loses one row at most.

    Args:
      experiment: the experiment's name, used in messages.
      config: the run's flags.
      plans: what tells the rows apart, such as `{"cell": "LSTM", "units": 36}`.
      measure: `measure(**plan) -> dict`, what was measured; the row is the plan, this dict and the seconds it took.
      workdir, resume: as for `runs.open_folder`.

    Returns:
      The run's folder, and the result: configuration, versions, device and rows, each with its commit.
    """
    folder = runs.open_folder(experiment, workdir, config, resume=resume)
    path = folder / "result.json"
    rows: list[Row] = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    commit = runs.commit()  # now: files may change while this process runs
    result = {"config": config, "versions": runs.versions(), "device": devices.found(), "rows": rows}
    with tqdm(plans, unit="row", disable=None) as bar:
        for plan in bar:
            bar.set_postfix_str(", ".join(map(str, plan.values())))
            if any(plan.items() <= row.items() for row in rows):
                continue
            began = time.perf_counter()
            found = measure(**plan)
            seconds = round(time.perf_counter() - began, 1)
            rows.append({**plan, **found, "seconds": seconds, "commit": commit})
            runs.write_json(path, result)
    runs.write_json(path, result)
    return folder, result


def shown(value: float, digits: int = 3) -> str:
    """Return a number rounded to so many significant digits, without an exponent.

    >>> shown(1412.3), shown(0.7374), shown(231.0, 2)
    ('1,410', '0.737', '230')
    """
    return f"{float(f'{value:.{digits}g}'):,g}"


def rounded(values: Any) -> Any:
    """Return an array as nested lists of numbers with four digits after the point, to keep files small."""
    return np.round(np.asarray(values, np.float64), 4).tolist()
