"""What does a trained character model write? One `step` per character, the carry kept.

The end of a run of char_lm prints the command:

    python -m experiments.sample runs/char_lm/20260102-030405 --prompt "The "
"""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from experiments import runs, text
from experiments.char_lm import Model, init_model, initial_carries, write_next


def load(run: Path) -> tuple[Model, str]:
    """Return the model of a run and its symbols."""
    try:
        config = json.loads((run / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        sys.exit(f"sample: {run} holds no run ({error}); name a folder written by experiments.char_lm.")
    if not (run / "params").exists():
        sys.exit(f"sample: the run in {run} has not ended, it holds no params/.")
    sizes = (len(config["symbols"]), config["hidden_size"], config["num_layers"])
    like = jax.eval_shape(lambda: init_model(jax.random.key(0), *sizes))
    return runs.restore_params(run, like), config["symbols"]


def main(
    run: Annotated[Path, tyro.conf.Positional],
    *,
    prompt: str | None = None,
    num_characters: int = 1000,
    temperature: float = 0.7,
    seed: int = 0,
) -> dict[str, Any]:
    """Write text with the model of a run.

    Args:
      run: the folder of a run of experiments.char_lm.
      prompt: what the model reads first; default the start of a line.
      num_characters: how many characters it writes.
      temperature: below 1 is bolder than the model believes, above 1 more timid; more than 0.
      seed: of the choice of characters.
    """
    model, symbols = load(run)
    prompt = text.first_symbol(symbols) if prompt is None else prompt
    if unknown := sorted(set(prompt) - set(symbols)):
        sys.exit(f"sample: --prompt has characters the model never saw: {unknown}; it knows {symbols!r}.")
    if not prompt:
        sys.exit("sample: --prompt needs at least one character.")
    if not temperature > 0:
        sys.exit(f"sample: --temperature must be above 0, got {temperature}.")
    if num_characters < 0:
        sys.exit(f"sample: --num-characters must not be negative, got {num_characters}.")

    step = jax.jit(lambda carries, token, key: write_next(model, carries, token, key, temperature))
    keys = jax.random.split(jax.random.key(seed), len(prompt) + num_characters)
    carries, token, written = initial_carries(model), jnp.asarray(0), []
    for read, key in zip(text.encode(prompt, symbols), keys[: len(prompt)], strict=True):
        carries, token = step(carries, jnp.asarray(read), key)
    sys.stdout.write(prompt.lstrip("\n"))
    for key in keys[len(prompt) :]:
        written.append(symbols[int(token)])
        sys.stdout.write(written[-1])
        sys.stdout.flush()
        carries, token = step(carries, token, key)
    sys.stdout.write("\n")
    return {"text": "".join(written)}


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `... | head` ends it quietly
    tyro.cli(main)
