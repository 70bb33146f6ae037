"""The report of a char_lm run: what it logs, its result.json and its pictures."""

import json
import logging
import re
from pathlib import Path
from typing import Any

from experiments import plots, text
from experiments.harness import devices, runs
from jaxlstm import LSTM, unroll_stack
from jaxlstm.diagnostics import trace

log = logging.getLogger("char_lm")


def describe(data: text.Corpus) -> dict[str, float]:
    """Log the device, the corpus and the baselines; return the baselines, in bits per held-out character."""
    log.info("device: %s", devices.found())
    log.info(
        "corpus: %s, %s characters (sha256 %s), %d symbols; held out: the last %s characters",
        data.name, f"{len(data.text):,}", data.sha256[:12], len(data.symbols), f"{len(data.held_out):,}",
    )  # fmt: skip
    baselines = text.baselines(data)
    log.info("bits per held-out character: %s", ", ".join(f"{name} {bits:.3f}" for name, bits in baselines.items()))
    return baselines


def log_evaluation(step: int, steps: int, row: runs.Row) -> None:
    """Log one evaluation and its sample."""
    log.info(
        "step %5d/%d  train %.3f  held-out %.3f bits/char  %s characters/s  | %s",
        step, steps, row["train_bits"], row["held_out_bits"], f"{row['characters_per_second']:,.0f}",
        json.dumps(row["sample"], ensure_ascii=False),
    )  # fmt: skip


def write(
    folder: Path,
    config: dict[str, Any],
    data: text.Corpus,
    model: Any,
    bits: float,
    baselines: dict[str, float],
    checks: dict[str, Any],
) -> dict[str, Any]:
    """Write result.json and the pictures, and log the outcome.

    Args:
      folder: folder of the run.
      config: the flags of the run, with the symbols and the hash of its corpus.
      data: the corpus.
      model: the trained `char_lm.Model`.
      bits: its bits per held-out character.
      baselines: from `describe`.
      checks: from `gradient_check.check`.

    Returns:
      The content of result.json.
    """
    metrics = runs.read_metrics(folder)
    result: dict[str, Any] = {
        "held_out_bits": bits,
        "learned": bits < baselines["5-gram"] and bits < baselines["xz"],
        "baselines": baselines,
        "gradient_check": checks,
        "evaluations": [row for row in metrics if "held_out_bits" in row],
        "config": {name: value for name, value in config.items() if name not in ("workdir", "resume")},
        "corpus": {"characters": len(data.text), "held_out": len(data.held_out), "sha256": data.sha256},
        "read": read_sentence(model, data),
        "versions": runs.versions(),
    }
    if devices.is_first():
        runs.write_json(folder / "result.json", result)
        pictures = [
            plots.learning_curve(folder / "learning_curve.png", metrics, baselines),
            plots.gate_maps(folder / "gates.png", result["read"]),
        ]
        log.info(
            "%s: %.3f bits per held-out character; the 5-gram needs %.3f, xz %.3f",
            "LEARNED" if result["learned"] else "NOT LEARNED", bits, baselines["5-gram"], baselines["xz"],
        )  # fmt: skip
        log.info("pictures: %s", ", ".join(map(str, pictures)))
        log.info("result: %s", folder / "result.json")
        log.info("write with this model: %s", runs.command("experiments.sample", "--workdir", folder))
    devices.wait("the report is written")
    return result


def read_sentence(model: Any, data: text.Corpus, width: int = 60) -> dict[str, Any]:
    """Return a held-out sentence, and gates and cell state of the last layer at each of its characters."""
    sentences = re.findall(r"(?<=[.!?]\s)[A-Z][^.!?]{30,400}[.!?](?=\s)", data.held_out) or [data.held_out]
    longest_first = sorted(sentences, key=len, reverse=True)
    sentence = next((s for s in longest_first if len(s) <= width), sentences[0][:width])
    tokens = text.encode(sentence, data.symbols)[:, None]
    *below, last = model.layers
    _, xs = unroll_stack(LSTM, below, model.embedding[tokens])
    return plots.read_aloud(sentence, trace(LSTM, last, xs[:, 0]))
