"""What does a trained character model write? One `step` per character, the carry kept.

The end of a run of char_lm prints the command:

    python -m experiments.sample runs/char_lm/20260102-030405-678 --prompt "The "
"""

import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import jax
import jax.numpy as jnp
import tyro

from experiments import checkpoints, runs, text
from experiments.char_lm import Model, init_model, initial_carries, write_next


def load(run: Path, best: bool = False) -> tuple[Model, str]:
    """Return the model of a run's newest intact checkpoint, or of the best one, and its symbols."""
    config = runs.read_config(run)
    if not {"symbols", "hidden_size", "num_layers"} <= config.keys():
        sys.exit(f"sample: the run in {run} is none of experiments.char_lm.")
    found = checkpoints.intact(run / "checkpoints")
    checkpoint = min(found, key=lambda c: c.score, default=None) if best else next(found, None)
    if checkpoint is None:
        sys.exit(f"sample: the run in {run} has no intact checkpoint.")
    sizes = (len(config["symbols"]), config["hidden_size"], config["num_layers"])
    model = jax.eval_shape(lambda: init_model(jax.random.key(0), *sizes))
    try:
        return checkpoints.restore(checkpoint, {"params": model}, partial=True)["params"], config["symbols"]
    except checkpoints.Mismatch as error:
        sys.exit(f"sample: {error}")


def main(
    run: Annotated[Path, tyro.conf.Positional],
    *,
    prompt: str | None = None,
    num_characters: int = 1000,
    temperature: float = 0.7,
    best: bool = False,
    seed: int = 0,
) -> dict[str, Any]:
    """Write text with the model of a run.

    Args:
      run: the folder of a run of experiments.char_lm.
      prompt: what the model reads first; default the start of a line.
      num_characters: how many characters it writes.
      temperature: below 1 is bolder than the model believes, above 1 more timid; more than 0.
      best: with the weights that did best on the held-out text, not the last ones.
      seed: of the choice of characters.
    """
    model, symbols = load(run, best)
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
    runs.cli("sample", main, log_to=sys.stderr)  # stdout is for the text
