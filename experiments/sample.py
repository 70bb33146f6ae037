"""What does a trained character model write? Read a prompt, then write one character per step.

The last line that char_lm logs is the command to paste:

    python -m experiments.sample --workdir runs/char_lm/20260102-030405-678 --prompt "The "
"""

import functools
import signal
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from experiments import text
from experiments.char_lm import Model, init_model, initial_carries, predict, write_next
from experiments.harness import checkpoints, runs


def load(run: Path, best: bool = False) -> tuple[Model, str]:
    """Return the model and the symbols of a run, from its newest intact checkpoint or from its best one."""
    config = runs.read_config(run)
    if not {"symbols", "hidden_size", "num_layers"} <= config.keys():
        sys.exit(f"sample: the run in {run} is not a run of experiments.char_lm.")
    found = sorted(runs.intact(run), key=_score) if best else runs.intact(run)
    init = functools.partial(
        init_model,
        num_symbols=len(config["symbols"]),
        hidden_size=config["hidden_size"],
        num_layers=config["num_layers"],
    )
    like = {"params": jax.eval_shape(init, jax.random.key(0))}
    for checkpoint in found:
        try:
            return checkpoints.restore(checkpoint, like, partial=True)["params"], config["symbols"]
        except checkpoints.Damaged as damage:
            checkpoints.warn(checkpoint.path, damage)
        except checkpoints.Mismatch as error:
            sys.exit(f"sample: {error}")
    sys.exit(f"sample: the run in {run} has no intact checkpoint.")


def _score(checkpoint: checkpoints.Checkpoint) -> float:
    return checkpoint.score


def main(
    *,
    workdir: Path,
    prompt: str | None = None,
    num_characters: int = 1000,
    temperature: float = 0.7,
    best: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Write text with the model of a run.

    Args:
      workdir: folder of a run of experiments.char_lm.
      prompt: text that the model reads first; by default a newline, the start of a line.
      num_characters: how many characters to write.
      temperature: sampling temperature; values below 1 make likely characters more likely, values above 1 less likely.
      best: use the checkpoint with the best score on the held-out text instead of the newest one.
      seed: random seed of the characters.
    """
    model, symbols = load(workdir, best)
    prompt = text.first_symbol(symbols) if prompt is None else prompt
    check_flags(prompt, symbols, num_characters, temperature)
    step = jax.jit(functools.partial(write_next, model, temperature=temperature))
    tokens = jnp.asarray(text.encode(prompt, symbols))
    carries, _ = predict(model, initial_carries(model), tokens[:-1])
    token, written = tokens[-1], ""
    keys = jax.random.split(jax.random.key(seed), len(prompt) + num_characters)  # one per character, read or written
    sys.stdout.write(prompt.lstrip("\n"))
    for key in keys[len(prompt) - 1 : -1]:
        carries, token = step(carries, token, key)
        written += symbols[int(token)]
        sys.stdout.write(written[-1])
        sys.stdout.flush()
    sys.stdout.write("\n")
    return {"text": written}


def check_flags(prompt: str, symbols: str, num_characters: int, temperature: float) -> None:
    """Exit with one line that names the flag out of range."""
    if unknown := sorted(set(prompt) - set(symbols)):
        sys.exit(f"sample: --prompt has characters that the model does not know: {unknown}; it knows {symbols!r}.")
    if not prompt:
        sys.exit("sample: --prompt must have at least one character.")
    if not temperature > 0:
        sys.exit(f"sample: --temperature must be above 0, got {temperature}.")
    if num_characters < 0:
        sys.exit(f"sample: --num-characters must be at least 0, got {num_characters}.")


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # so that `... | head` ends it without a traceback
    runs.cli("sample", main, log_to=sys.stderr)  # stdout carries only the text
