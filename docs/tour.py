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
# The cell, the scan, whether the gradient is right and where it comes from, what the gates do, and a loss of your own.
# A minute or two on a laptop. `docs/tour.py` is the source; `make tour` runs it and writes this notebook.

# %%
import inspect

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

import jaxlstm
from jaxlstm import GRU, LSTM, RNN

# %% [markdown]
# ## The cell
#
# A cell is a handful of pure functions on plain pytrees. Parameters and carry are NamedTuples of arrays, and one step
# is these equations:

# %%
print(inspect.getsource(LSTM.activations))
print(inspect.getsource(LSTM.gates))

# %%
params = LSTM.init(jax.random.key(0), 5, 7)  # 5 features, 7 units
print(jaxlstm.summary(params))
carry = LSTM.initial_carry(params, (3,))  # for a batch of 3
carry, y = LSTM.step(params, carry, jnp.ones((3, 5)))
print(type(carry).__name__, carry.h.shape, carry.c.shape, y.shape)

# %% [markdown]
# ## The scan
#
# `unroll` runs a cell over time, axis 0. It is ordinary JAX: `jit`, `grad`, `vmap`, `hessian` work through it. The
# weights of all steps are the same, so the gradient is a sum over all steps, and JAX finds it: backpropagation through
# time.

# %%
xs = jax.random.normal(jax.random.key(1), (40, 3, 5))
carry, ys = jaxlstm.unroll(LSTM, params, xs)
print(ys.shape)
loss = lambda params: (jaxlstm.unroll(LSTM, params, xs)[1] ** 2).mean()
gradient = jax.jit(jax.grad(loss))(params)
print(jax.tree.map(jnp.shape, gradient))

# %% [markdown]
# ## Is the gradient right?
#
# The same gradient by every road: autodiff of the scan, the library's own rule, the derivation by hand (line by line in
# `jaxlstm/bptt.py`), real-time recurrent learning, central differences. Relative errors, in float64:

# %%
square = lambda y, t: (y**2).sum()
print(jaxlstm.comparison_table(jaxlstm.compare_gradients(LSTM, params, xs[:12], square)))

# %% [markdown]
# A road of your own goes beside them. Here someone forgot that $h_{t-1}$ reaches the gates:


# %%
def mine(params, xs, carry, d_ys):
    forgetful = lambda *v: jaxlstm.unroll(jaxlstm.cut_recurrence(LSTM), *v)[1]
    return jax.vjp(forgetful, params, xs, carry)[1](d_ys)


found = jaxlstm.compare_gradients(LSTM, params, xs[:12], square, roads={"mine": mine})
print(found.departures["mine"])  # the last step is right; the one before is the first that is not

# %% [markdown]
# ## Where does it come from?
#
# The loss is $\sum_t E_t$ and the weights are used at every step $s$, so the gradient is $\sum_t \sum_s G_{t,s}$. A row
# is a loss; how far a row reaches to the left is how long the net's gradient remembers.

# %%
figure, panels = plt.subplots(1, 3, figsize=(11, 3.6), layout="constrained")
for axes, cell in zip(panels, (RNN, GRU, LSTM), strict=True):
    net = cell.init(jax.random.key(0), 5, 16)
    sources = jax.jit(lambda net, cell=cell: jaxlstm.gradient_sources(cell, net, xs, square))(net)
    whole = jax.grad(lambda net, cell=cell: (jaxlstm.unroll(cell, net, xs)[1] ** 2).sum())(net)
    total = jax.tree.map(lambda leaf: leaf.sum(axis=0), sources.by_loss)
    print(cell.name, "rows add up to the gradient:", max(jaxlstm.gradient_error(total, whole)) < 1e-5)
    image = axes.imshow(np.log10(np.asarray(sources.norms.w_hh) + 1e-30), vmin=-8, vmax=1, cmap="magma")
    axes.set(title=cell.name, xlabel="use of the weights, s", ylabel="loss, t")
figure.colorbar(image, ax=panels, label="log10 |G[t, s]| of w_hh")
plt.show()

# %% [markdown]
# ## What do the gates do?
#
# A loss of our own: say, at the end, which of four symbols came first. 300 steps of Adam, one `scan`.


# %%
def loss_fn(model, batch, carry, key):
    symbols = jax.random.randint(batch, (20, 32), 0, 4)  # a batch is a key here; yours is data
    final, _ = jaxlstm.unroll(LSTM, model["layer"], jax.nn.one_hot(symbols, 4))
    logits = final.h @ model["w"]
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, symbols[0]).mean()
    return loss, (carry, {"right": (logits.argmax(-1) == symbols[0]).mean()})


model = {"layer": LSTM.init(jax.random.key(2), 4, 24), "w": jnp.zeros((24, 4))}
optimizer = optax.adam(2e-2)
train_step = jaxlstm.make_train_step(loss_fn, optimizer)
state = jaxlstm.init_train_state(model, optimizer, jax.random.key(3))
keys = jax.random.split(jax.random.key(4), 400)
state, metrics = jax.jit(lambda state, keys: jaxlstm.fit(train_step, state, keys))(state, keys)
print(f"right in the last steps: {metrics['right'][-20:].mean():.2f}")

# %% [markdown]
# `trace` records every gate of every step. A row is a unit, a column a step; the first symbol is the one to keep.

# %%
symbols = jax.random.randint(jax.random.key(5), (20,), 0, 4)
recorded = jaxlstm.trace(LSTM, state.params["layer"], jax.nn.one_hot(symbols, 4))
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
# And how far back the gradient of the answer reaches, before training and after:

# %%
figure, axes = plt.subplots(figsize=(7, 3.6), layout="constrained")
inputs = jax.nn.one_hot(jax.random.randint(jax.random.key(6), (20, 32), 0, 4), 4)
for name, net in (("before", model), ("after", state.params)):
    flow = jaxlstm.gradient_flow(LSTM, net["layer"], inputs, lambda ys: ys[-1].sum())
    axes.semilogy(jnp.linalg.norm(flow.c.reshape(20, -1), axis=-1), "o-", label=f"{name} training")
axes.set(xlabel="step", ylabel="|gradient by c|")
axes.legend()
plt.show()

# %% [markdown]
# ## And your own model?
#
# `check_gradients` takes any loss of any pytree, whatever it is made of:

# %%
loss = lambda model, key: loss_fn(model, key, (), None)[0]
check = jaxlstm.check_gradients(loss, state.params, keys[0], key=jax.random.key(7))
print(jaxlstm.check_table(check))

# %% [markdown]
# From here: `docs/trust-your-gradients.md`, `docs/experiments.md` (what the gradients of trained nets do),
# `docs/claims.md` (what is said of LSTMs, and what is true), `docs/derivation.md` (all of it by hand).
