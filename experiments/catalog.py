"""Every experiment: what was published, and what the committed result measured."""

import ast
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

Row = dict[str, Any]
HERE = Path(__file__).parent


class Entry(NamedTuple):
    """One experiment. Its question is the first line of its file."""

    name: str
    minutes: str  # on two CPU cores; "rows": the rows of the result say it
    published: str
    measured: Callable[[Row], str]  # from its result.json
    flags: str = ""  # of the committed result
    folder: str = ""  # of the result; by default the name

    @property
    def question(self) -> str:
        source = (HERE / f"{self.name}.py").read_text(encoding="utf-8")
        return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]

    @property
    def command(self) -> str:
        return f"python -m experiments.{self.name} {self.flags}".strip()

    @property
    def result(self) -> Row | None:
        path = HERE / "results" / (self.folder or self.name) / "result.json"
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    @property
    def picture(self) -> str:
        """Where the main picture of the committed result is, from the top of the repository."""
        folder = HERE / "results" / (self.folder or self.name)
        own = folder / f"{self.name}.png"
        path = own if own.exists() else max(folder.glob("*.png"), default=None)
        return path.relative_to(HERE.parent).as_posix() if path else ""

    @property
    def answer(self) -> str:
        result = self.result
        return "no committed result" if result is None else self.measured(result)

    @property
    def time(self) -> str:
        """Minutes that the committed result took."""
        seconds = [row.get("seconds", 0) for row in (self.result or {}).get("rows", [])]
        measured = self.minutes == "rows" and seconds
        return f"{max(1, round(sum(seconds) / 60))}" if measured else self.minutes.replace("rows", "")


def _mean_of(values: Any, digits: int = 2) -> str:
    return f"{np.mean(values):.{digits}f}"


def _rows(result: Row, **wanted: Any) -> list[Row]:
    return [row for row in result["rows"] if wanted.items() <= row.items()]


def agreement(result: Row) -> str:
    """Accuracy at the longest distance."""
    last = list(result["number"])[-1]
    shown = ", ".join(f"{cell} {_mean_of(values)}" for cell, values in result["number"][last].items())
    return f"number right at {last} words: {shown}"


def autodiff_vs_analytic(result: Row) -> str:
    """The worst error of the four methods that do not take differences."""
    exact = [row["error"] for row in result["rows"] if row["dtype"] == "float64" and row["road"] != "differences"]
    return f"autodiff, the rule, by hand and RTRL: {max(exact):.0e} in float64 at worst"


def char_lm(result: Row) -> str:
    """Bits per character beside the baselines."""
    base = result["baselines"]
    return f"LSTM {result['held_out_bits']:.2f} bits per character; 5-gram {base['5-gram']:.2f}, xz {base['xz']:.2f}"


def chorales(result: Row) -> str:
    """Mean test loss of every net."""
    return "; ".join(f"{row['cell']}, {row['units']} units: {_mean_of(row['test'])}" for row in result["rows"])


def counting(result: Row) -> str:
    """How far the median net counts."""
    own = [row for row in result["rows"] if "reach" in row]
    return "right up to n = " + "; ".join(
        f"{np.median(row['reach']):.0f} ({row['cell']}, {row['language']})" for row in own
    )


def dates(result: Row) -> str:
    """How many strings are right to the last character."""
    return f"{100 * result['exact match']:.2f} % of {result['held-out strings']:,} held-out dates right"


def flip_flop(result: Row) -> str:
    """How many nets have the points expected."""
    perfect = [row for row in result["rows"] if row["by_unstable"][0] == row["memories"] == 8]
    return f"8 stable points, one for each memory, in {len(perfect)} of {len(result['rows'])} nets"


def gradbench(result: Row) -> str:
    """Gradient time over objective time."""
    ratios = [
        [row[name]["gradient"] / row[name]["objective"] for row in result["rows"]] for name in ("jaxlstm", "lax.scan")
    ]
    own, scan = (f"{min(values):.1f} to {max(values):.1f}" for values in ratios)
    return f"gradient / objective: {own}; by lax.scan {scan}"


def gradient_flow(result: Row) -> str:
    """How the seeds of LSTMs and RNNs compare after the training."""
    last = list(result["verdicts"])[-1]
    found = [row["than the RNN's"] for row in result["verdicts"][last] if row["cell"] == "LSTM"]
    return f"after training, an LSTM's is larger than the RNN's in {found.count('larger')} of {len(found)} settings"


def long_lag(result: Row) -> str:
    """Adding at lag 100 by both recipes."""
    shown = []
    for recipe in ("1997", "LSTM, chrono"):
        for row in _rows(result, recipe=recipe, task="adding", lag=100):
            median = np.median([number or np.inf for number in row["solved_at"]])
            solved = f"{sum(map(bool, row['solved_at']))}/{len(row['solved_at'])}"
            shown.append(f"{recipe}: {solved}" + (f", median {median:,.0f}" if median < np.inf else ""))
    return "adding, T = 100: " + "; ".join(shown)


def lorenz(result: Row) -> str:
    """The leading exponent of every cell."""
    nets = dict.fromkeys(row["net"] for row in result["rows"])
    leading = {net: [row["exponents"][0] for row in _rows(result, net=net)] for net in nets}
    return "leading exponent " + ", ".join(f"{net} {_mean_of(values, 3)}" for net, values in leading.items())


def odyssey(result: Row) -> str:
    """The mean test loss of every variant."""
    return ", ".join(f"{row['variant']} {_mean_of(row['test'])}" for row in result["rows"])


def ppo(result: Row) -> str:
    """How many agents remember the sign through 40 steps."""
    rows = [row for row in _rows(result, task="T-maze", number=40) if row["net"] in ("LSTM", "GRU", "RNN")]
    last = {row["net"]: np.array(row["success"])[:, -1] for row in rows}
    counts = ", ".join(f"{(success > 0.95).sum()}/{len(success)} ({net})" for net, success in last.items())
    return f"agents that remember a sign through 40 steps: {counts}"


def rnn_vs_lstm(result: Row) -> str:
    """The gap between training and test of every net."""
    return "gap " + ", ".join(f"{_mean_of(row['gap'])} ({row['cell']}, {row['units']} units)" for row in result["rows"])


def shakespeare(result: Row) -> str:
    """The best held-out loss of every recipe."""
    recipes = dict.fromkeys(row["recipe"] for row in result["rows"])
    return "; ".join(f"{name}: {_mean_of([row['best'] for row in _rows(result, recipe=name)], 3)}" for name in recipes)


def tagging(result: Row) -> str:
    """The mean F1 of every net."""
    return "F1 " + ", ".join(f"{row['name']} {_mean_of(row['f1'], 3)}" for row in result["rows"])


# fmt: off
EXPERIMENTS = [
    Entry("char_lm", "5", "", char_lm),
    Entry("shakespeare", "rows", "a checkpoint of char-rnn: 1.3950 nats per character", shakespeare,
          "--corpus tinyshakespeare.txt"),
    Entry("chorales", "rows", "nats per chord: RNN 9.19, GRU 8.54, LSTM 8.67 (Chung et al. 2014); with 300,000 "
          "parameters RNN 8.91, GRU 8.43, LSTM 8.45 (Bai et al. 2018)", chorales,
          "--data JSB_Chorales.mat --sizes 20,000"),
    Entry("long_lag", "rows", "adding, T = 100: 74,000 sequences (Hochreiter & Schmidhuber 1997)", long_lag,
          "--paper-lags 50 100"),
    Entry("counting", "rows", "LSTMs count, GRUs and tanh RNNs do not (Weiss et al. 2018)", counting),
    Entry("tagging", "rows", "", tagging),
    Entry("rnn_vs_lstm", "rows", "", rnn_vs_lstm, "--data JSB_Chorales.mat"),
    Entry("odyssey", "rows", "no variant is significantly better; the forget gate and the output activation matter "
          "most (Greff et al. 2017)", odyssey, "--data JSB_Chorales.mat"),
    Entry("gradbench", "rows", "", gradbench),
    Entry("agreement", "15", "number: under 1 % error, rising with attractors (Linzen et al. 2016)", agreement),
    Entry("gradient_flow", "7", "", gradient_flow),
    Entry("autodiff_vs_analytic", "5", "", autodiff_vs_analytic),
    Entry("flip_flop", "6", "8 stable fixed points (Sussillo & Barak 2013)", flip_flop),
    Entry("lorenz", "15", "exponents 0.906, 0, −14.57", lorenz),
    Entry("dates", "5", "", dates, folder="dates/functions"),
    Entry("ppo", "30", "", ppo),
]
# fmt: on


def markdown() -> str:
    """Return the table of docs/experiments.md."""
    lines = ["| question | command | minutes | published | measured |", "|---|---|---|---|---|"]
    for entry in EXPERIMENTS:
        answer = f"{entry.answer} ([picture](../{entry.picture}))" if entry.picture else entry.answer
        lines.append(f"| {entry.question} | `{entry.command}` | {entry.time} | {entry.published} | {answer} |")
    return "\n".join(lines)
