"""Does a character LSTM reach the published loss on Tiny Shakespeare, and how small may it be?

char-rnn (Karpathy 2015) names a checkpoint with a validation loss of 1.3950 nats per character; its size is not stated.
"char-rnn" is its default recipe: two layers of 128 units, 50 sequences of 50 characters, RMSProp, no dropout. "today"
has the same number of parameters and reads as many characters, with Adam, a warm-up and a cosine decay, longer
sequences and dropout.

The text is not part of this repository: look for `tinyshakespeare.txt` (char-rnn's `input.txt`, 1,115,394 bytes) and
pass it with --corpus. As there, the last 5 % of the text are held out.
"""

import functools
import logging
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int, Key
from optax import softmax_cross_entropy_with_integer_labels as cross_entropy
from tqdm import tqdm

from experiments import plots, text
from experiments.harness import intervals, rows, runs
from jaxlstm import LSTM, LSTMParams, LSTMState, fit, init_train_state, make_train_step, num_params, unroll_stack
from jaxlstm.regularize import dropout_mask

PUBLISHED = 1.3950

log = logging.getLogger("shakespeare")


class Params(NamedTuple):
    """Layers on one-hot characters, and a readout."""

    layers: list[LSTMParams]
    w: Float[Array, "units symbol"]
    b: Float[Array, "symbol"]


class Recipe(NamedTuple):
    """How a net is trained."""

    units: int
    epochs: int
    batch: int = 50  # places in the text that are read in parallel
    seq_len: int = 50  # characters between two updates
    num_layers: int = 2
    dropout: float = 0.0  # between the layers and after the last
    adam: float | None = None  # the peak of the learning rate; None: RMSProp as in char-rnn


RECIPES = {
    "char-rnn": Recipe(128, 50),
    "today": Recipe(128, 50, batch=32, seq_len=100, dropout=0.1, adam=1e-2),
    "today, 256 units": Recipe(256, 30, batch=32, seq_len=100, dropout=0.3, adam=5e-3),
}


def init_net(key: Key[Array, ""], recipe: Recipe, num_symbols: int) -> Params:
    """Draw the parameters: char-rnn's are uniform in ±0.08, with forget bias 1."""
    *keys, key = jax.random.split(key, recipe.num_layers + 1)
    sizes = (num_symbols, *[recipe.units] * (recipe.num_layers - 1))
    layers = [LSTM.init(k, size, recipe.units) for k, size in zip(keys, sizes, strict=True)]
    net = Params(layers, jnp.zeros((recipe.units, num_symbols)), jnp.zeros(num_symbols))
    if recipe.adam is not None:
        return net
    draw = lambda key, leaf: jax.random.uniform(key, leaf.shape, leaf.dtype, -0.08, 0.08) if leaf.ndim == 2 else leaf
    leaves: list[Any] = jax.tree.leaves(net)
    structure: Any = jax.tree.structure(net)
    return structure.unflatten(map(draw, jax.random.split(key, len(leaves)), leaves))


def predict(
    net: Params, carries: list[LSTMState], tokens: Int[Array, "time batch"], dropout: float = 0.0, key: Any = None
) -> tuple[list[LSTMState], Float[Array, "time batch symbol"]]:
    """Return the logits of the character after each one."""
    xs = jax.nn.one_hot(tokens, len(net.b))
    key_layers, key_last = (None, None) if key is None else jax.random.split(key)
    carries, hs = unroll_stack(
        LSTM, net.layers, xs, carries, dropout=dropout if key_layers is not None else 0.0, key=key_layers
    )
    if key_last is not None and dropout:
        hs = hs * dropout_mask(key_last, dropout, hs.shape, hs.dtype)
    return carries, hs @ net.w + net.b


def make_optimizer(recipe: Recipe, steps_per_epoch: int) -> optax.GradientTransformation:
    """Return RMSProp, decayed by 0.97 per epoch after the tenth and clipped entry by entry; or Adam."""
    steps = recipe.epochs * steps_per_epoch
    if recipe.adam is not None:
        schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.adam, min(500, steps // 10), steps, recipe.adam / 100)
        return optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule))

    def rate(step: Any) -> Array:
        return 2e-3 * 0.97 ** jnp.maximum(0, step // steps_per_epoch - 9)

    return optax.chain(optax.clip(5.0), optax.rmsprop(rate, decay=0.95, eps=1e-8))


def zero_carries(net: Params, batch: int) -> list[LSTMState]:
    """Return the carries before the first batch."""
    return [LSTM.initial_carry(layer, (batch,)) for layer in net.layers]


@jax.jit
def held_out_nats(net: Params, streams: Any) -> Float[Array, ""]:
    """Return nats per held-out character."""
    inputs, targets, scored = streams
    _, logits = predict(net, zero_carries(net, inputs.shape[1]), inputs)
    return cross_entropy(logits, targets).mean(where=scored)


def measure(recipe: str, seed: int, *, corpus: text.Corpus, epochs: int | None) -> dict[str, Any]:
    """Train one net, evaluating it on the held-out text after every epoch."""
    how = RECIPES[recipe]
    how = how._replace(epochs=epochs or how.epochs)
    tokens = text.encode(corpus.train, corpus.symbols)
    streams = tuple(map(jnp.asarray, text.held_out_streams(corpus)))
    key_init, key_train = jax.random.split(jax.random.key(seed))
    net = init_net(key_init, how, len(corpus.symbols))
    steps_per_epoch = len(tokens) // (how.batch * how.seq_len)
    optimizer = make_optimizer(how, steps_per_epoch)

    def loss_fn(net: Params, batch: Array, carries: list[LSTMState], key: Key[Array, ""]) -> Any:
        carries, logits = predict(net, carries, batch[:-1], how.dropout, key)
        return cross_entropy(logits, batch[1:]).mean(), (carries, {})

    train = jax.jit(functools.partial(fit, make_train_step(loss_fn, optimizer)), donate_argnums=0)
    state = init_train_state(net, optimizer, key_train, carry=zero_carries(net, how.batch))
    curve: dict[str, list[float]] = {"training": [], "held out": []}
    with tqdm(range(how.epochs), unit="epoch", leave=False, disable=None) as bar:
        for epoch in bar:
            steps = range(epoch * steps_per_epoch, (epoch + 1) * steps_per_epoch)
            state, metrics = train(state, text.batches(tokens, steps, how.batch, how.seq_len))
            curve["training"].append(round(float(metrics["loss"].mean()), 4))
            curve["held out"].append(round(float(held_out_nats(state.params, streams)), 4))
            bar.set_postfix_str(f"held out {curve['held out'][-1]:.3f}")
    return {"parameters": num_params(net), "curve": curve, "best": min(curve["held out"])}


def main(
    *,
    corpus: str = "tinyshakespeare.txt",
    recipes: tuple[str, ...] = tuple(RECIPES),
    seeds: int = 3,
    epochs: int = 0,
    workdir: str | None = None,
    resume: bool = False,
) -> dict[str, Any]:
    """Train all nets, write the result and a picture, and log the table.

    Args:
      corpus: the text file.
      recipes: names of recipes.
      seeds: nets of each recipe.
      epochs: passes over the text; 0: as many as the recipe says.
      workdir: folder of the results; by default a new one in runs/.
      resume: continue the run in --workdir.
    """
    config = {name: value for name, value in locals().items() if name not in ("workdir", "resume")}
    data = text.load_or_exit("shakespeare", corpus, 50 * 100)
    config["sha256"] = data.sha256
    plans = [{"recipe": recipe, "seed": seed} for recipe in recipes for seed in range(seeds)]
    of_row = functools.partial(measure, corpus=data, epochs=epochs or None)
    folder, result = rows.collect("shakespeare", config, plans, of_row, workdir=workdir, resume=resume)
    picture = plots.shakespeare(folder / "shakespeare.png", result["rows"], PUBLISHED)
    log.info("%s\n%s\n%s", table(result), folder / "result.json", picture)
    return result


def table(result: dict[str, Any]) -> str:
    """Return a Markdown table: held-out nats per character at the best epoch, mean and 95 % interval of the seeds."""
    lines = ["| recipe | parameters | held out, best epoch | last epoch |", "|---|---|---|---|"]
    lines.append(f"| published checkpoint | not stated | {PUBLISHED:.4f} | |")
    for recipe in dict.fromkeys(row["recipe"] for row in result["rows"]):
        own = [row for row in result["rows"] if row["recipe"] == recipe]
        best = intervals.shown([row["best"] for row in own], 3)
        last = intervals.shown([row["curve"]["held out"][-1] for row in own], 3)
        lines.append(f"| {recipe} | {own[0]['parameters']:,} | {best} | {last} |")
    return "\n".join(lines)


if __name__ == "__main__":
    runs.cli("shakespeare", main, quick={"recipes": ("char-rnn",), "seeds": 1, "epochs": 1})
