"""Which component of an LSTM matters?

The variants of Greff et al., LSTM: a search space odyssey, 2017, on music (JSB Chorales): the peephole LSTM, which the
paper calls V, with one component taken away or added, and the plain LSTM with g = σ(z_g). Every variant has the same
number of units. All learning rates and seeds of a variant train in one program; the validation loss selects the rate,
and the test set is evaluated once.
"""

import logging
from typing import Any, NamedTuple

import jax
import numpy as np
from scipy import stats

from experiments import chorales, plots
from experiments.harness import intervals, rows, runs
from jaxlstm import LSTM, Cell, variants


class Variant(NamedTuple):
    """A cell, what distinguishes it from another variant, and that variant."""

    cell: Cell[Any, Any]
    change: str
    base: str = "V"


VARIANTS = {
    "V": Variant(variants.PeepholeLSTM, "with peepholes"),
    "NIG": Variant(variants.NoInputGateLSTM, "no input gate"),
    "NFG": Variant(variants.NoForgetGateLSTM, "no forget gate"),
    "NOG": Variant(variants.NoOutputGateLSTM, "no output gate"),
    "NIAF": Variant(variants.NoInputActivationLSTM, "no input activation"),
    "NOAF": Variant(variants.NoOutputActivationLSTM, "no output activation"),
    "CIFG": Variant(variants.CoupledLSTM, "f = 1 − i, no peepholes", base="NP"),
    "NP": Variant(LSTM, "no peepholes: the plain LSTM"),
    "NP, g = σ": Variant(variants.make_lstm(candidate=jax.nn.sigmoid), "its candidate in (0, 1)", base="NP"),
    "FGR": Variant(variants.FullGateRecurrenceLSTM, "gates also read gates"),
}

log = logging.getLogger("odyssey")


def main(
    *,
    data: str = "JSB_Chorales.mat",
    names: tuple[str, ...] = tuple(VARIANTS),
    units: int = 36,
    learning_rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2, 3e-2),
    seeds: int = 10,
    epochs: int = 500,
    patience: int = 60,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all variants, write the result and a picture, and log the table.

    Args:
      data: the file JSB_Chorales.mat; `experiments/chorales.py` says where to look for it.
      names: the variants to train; V and NP are always among them, to compare with.
      units: units per variant.
      learning_rates: of Adam; the validation loss selects one for each variant.
      seeds: number of seeds per variant and learning rate.
      epochs: the largest number of epochs.
      patience: training stops after so many epochs without a better validation loss. Cells with peepholes rest on a
        plateau for longer than the 15 epochs of `chorales.py`.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    runs.check_names("names", names, VARIANTS)
    parts = chorales.load(data)
    config["sha256"] = chorales.hash_of(data)

    def measure(variant: str) -> dict[str, Any]:
        recipe = chorales.Recipe(units, epochs=epochs, patience=patience)
        return chorales.train_and_choose(VARIANTS[variant].cell, [recipe], parts, learning_rates, seeds)

    plans = [{"variant": name} for name in VARIANTS if name in {"V", "NP", *names}]
    folder, result = rows.collect("odyssey", config, plans, measure, workdir=workdir, resume=resume)
    changes = {name: variant.change for name, variant in VARIANTS.items()}
    picture = plots.odyssey(folder / "odyssey.png", result["rows"], changes)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def difference(row: dict[str, Any], base: dict[str, Any], comparisons: int) -> tuple[float, float, float]:
    """Return how much larger a variant's test loss is than its base's, and an interval by Welch's t.

    All intervals of a table together hold with 95 % (Bonferroni). They cover the seeds, not the choice of the data.
    """
    compared = stats.ttest_ind(row["test"], base["test"], equal_var=False)
    low, high = compared.confidence_interval(1 - 0.05 / comparisons)
    return float(np.mean(row["test"]) - np.mean(base["test"])), float(low), float(high)


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: the mean of the seeds, and the difference from the base."""
    found = {row["variant"]: row for row in result["rows"]}
    compared = [name for name in found if VARIANTS[name].base != name]
    lines = ["| variant | parameters | learning rate | test | difference |", "|---|---|---|---|---|"]
    for name, row in found.items():
        rate = row["tried"][row["chosen"]]["learning_rate"]
        apart, base = "", VARIANTS[name].base
        if name in compared:
            shown = "{:+.2f} ({:+.2f} to {:+.2f})".format(*difference(row, found[base], len(compared)))
            apart = f"{shown} from {base}"
        lines.append(
            f"| {name}: {VARIANTS[name].change} | {row['parameters']:,} | {rate:g} | {intervals.shown(row['test'])} "
            f"| {apart} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("odyssey", main, quick={"names": ("CIFG",), "learning_rates": (3e-3,), "seeds": 2, "epochs": 2})
