# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # A tour of jaxlstm
#
# This notebook shows the cell, the scan, whether the gradient is right, where it comes from, what the gates do, and how
# to check your own loss. It takes a minute or two on a laptop. `docs/tour.py` is the source; `make tour` runs it and
# writes this notebook.

# %%
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from jaxlstm import GRU, LSTM, RNN, fit, init_train_state, make_train_step, summary, unroll
from jaxlstm.diagnostics import (
    check_gradients,
    compare_gradients,
    gradient_error,
    gradient_flow,
    gradient_sources,
    trace,
)
from jaxlstm.rtrl import cut_recurrence

# %% [markdown]
# ## The cell
#
# A cell is a few pure functions on plain pytrees. Parameters and carry are NamedTuples of arrays. One step is these
# equations:

# %%
print(inspect.getsource(LSTM.activations))
print(inspect.getsource(LSTM.gates))

# %%
params = LSTM.init(jax.random.key(0), 5, 7)  # 5 features, 7 units
print(summary(params))
carry = LSTM.initial_carry(params, (3,))  # for a batch of 3
carry, y = LSTM.step(params, carry, jnp.ones((3, 5)))
print(type(carry).__name__, carry.h.shape, carry.c.shape, y.shape)

# %% [markdown]
# ## The scan
#
# `unroll` runs a cell over time, axis 0. It is ordinary JAX: `jit`, `grad`, `vmap` and `hessian` work through it. All
# steps share the same weights, so the gradient is a sum over all steps. JAX computes it: backpropagation through time.

# %%
xs = jax.random.normal(jax.random.key(1), (40, 3, 5))
carry, ys = unroll(LSTM, params, xs)
print(ys.shape)


def mean_square(params):
    _, ys = unroll(LSTM, params, xs)
    return (ys**2).mean()


gradient = jax.jit(jax.grad(mean_square))(params)
print(jax.tree.map(jnp.shape, gradient))

# %% [markdown]
# ## Is the gradient right?
#
# We compute the same gradient by every method: autodiff of the scan, the library's rule (`bulk`), the derivation by
# hand (line by line in `jaxlstm/bptt.py`), real-time recurrent learning (`rtrl`), and central differences. The table
# shows errors relative to autodiff, in float64:


# %%
def square(y, t):
    return (y**2).sum()


print(compare_gradients(LSTM, params, xs[:12], square))

# %% [markdown]
# You can add your own method. This one forgets that $h_{t-1}$ reaches the gates:


# %%
def mine(params, xs, carry, d_ys):
    def forgetful(params, xs, carry):
        return unroll(cut_recurrence(LSTM), params, xs, carry)[1]

    _, backward = jax.vjp(forgetful, params, xs, carry)
    return backward(d_ys)


found = compare_gradients(LSTM, params, xs[:12], square, methods={"mine": mine})
print(found.departures["mine"])  # the last step is right; the step before it is the first wrong one

# %% [markdown]
# ## Where does it come from?
#
# The loss is $\sum_t E_t$ and every step $s$ uses the weights, so the gradient is $\sum_t \sum_s G_{t,s}$. Each row of
# the picture is the loss of one step. The further a row extends to the left, the further back the gradient reaches.


# %%
def sum_of_squares(params, cell):
    _, ys = unroll(cell, params, xs)
    return (ys**2).sum()


figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for axes, cell in zip(panels, (RNN, GRU, LSTM), strict=True):
    net = cell.init(jax.random.key(0), 5, 16)
    sources = jax.jit(gradient_sources, static_argnums=(0, 3))(cell, net, xs, square)
    whole = jax.grad(sum_of_squares)(net, cell)
    total = jax.tree.map(lambda leaf: leaf.sum(axis=0), sources.by_loss)
    print(cell.name, "rows add up to the gradient:", max(gradient_error(total, whole)) < 1e-5)
    image = axes.imshow(np.log10(np.asarray(sources.norms.w_hh) + 1e-30), vmin=-8, vmax=1, cmap="magma")
    axes.set(title=cell.name, xlabel="use of the weights, s", ylabel="loss, t")
figure.colorbar(image, ax=panels, label="log10 |G[t, s]| of w_hh")
plt.show()

# %% [markdown]
# ## What do the gates do?
#
# The task: at the end, name the first of twenty symbols, one of four. We train for 400 steps of Adam in one scan.


# %%
def loss_fn(model, batch, carry, key):
    symbols = jax.random.randint(batch, (20, 32), 0, 4)  # here a batch is a key; yours holds data
    final, _ = unroll(LSTM, model["layer"], jax.nn.one_hot(symbols, 4))
    logits = final.h @ model["w"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, symbols[0]).mean()
    return loss, (carry, {"accuracy": (logits.argmax(-1) == symbols[0]).mean()})


model = {"layer": LSTM.init(jax.random.key(2), 4, 24), "w": jnp.zeros((24, 4))}
optimizer = optax.adam(2e-2)
train_step = make_train_step(loss_fn, optimizer)
state = init_train_state(model, optimizer, jax.random.key(3))
keys = jax.random.split(jax.random.key(4), 400)
state, metrics = jax.jit(fit, static_argnums=0)(train_step, state, keys)
print(f"accuracy in the last steps: {metrics['accuracy'][-20:].mean():.2f}")

# %% [markdown]
# `trace` records every gate at every step. A row is a unit, a column is a step. The net must remember the first symbol.

# %%
symbols = jax.random.randint(jax.random.key(5), (20,), 0, 4)
recorded = trace(LSTM, state.params["layer"], jax.nn.one_hot(symbols, 4))
figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained", sharey=True)
shown = {"input gate i": recorded.gates.i, "forget gate f": recorded.gates.f, "cell state c": recorded.carry.c}
for axes, (name, values) in zip(panels, shown.items(), strict=True):
    limits = (0, 1) if "gate" in name else (-3, 3)
    image = axes.imshow(
        values.T, aspect="auto", cmap="viridis" if "gate" in name else "RdBu_r", vmin=limits[0], vmax=limits[1]
    )
    axes.set(title=name, xlabel="step")
    figure.colorbar(image, ax=axes)
panels[0].set_ylabel("unit")
plt.show()

# %% [markdown]
# How far back does the gradient of the answer reach, before training and after?


# %%
def last_output(ys):
    return ys[-1].sum()


figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
inputs = jax.nn.one_hot(jax.random.randint(jax.random.key(6), (20, 32), 0, 4), 4)
for name, net in (("before", model), ("after", state.params)):
    flow = gradient_flow(LSTM, net["layer"], inputs, last_output)
    axes.semilogy(jnp.linalg.norm(flow.c.reshape(20, -1), axis=-1), "o-", label=f"{name} training")
axes.set(xlabel="step", ylabel="norm of the gradient with respect to c")
axes.legend()
plt.show()

# %% [markdown]
# ## And your own model?
#
# `check_gradients` takes any loss of any pytree:


# %%
def loss_only(model, batch):
    loss, _ = loss_fn(model, batch, (), None)
    return loss


print(check_gradients(loss_only, state.params, keys[0], key=jax.random.key(7)))

# %% [markdown]
# Read on in `docs/trust-your-gradients.md`, `docs/experiments.md` (gradients of trained networks), `docs/claims.md`
# (common claims about LSTMs, true and false) and `docs/derivation.md` (the derivation by hand).
