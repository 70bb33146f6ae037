# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Where does a trained net come to rest?
#
# We train a net to remember two bits, find the points where it rests without input, and see how an input moves it from
# one to another (Sussillo & Barak, Opening the black box, 2013). It takes half a minute on two CPU cores.
# `docs/find_fixed_points.py` is the source.

# %%
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxlstm import LSTM, fit, init_train_state, make_train_step, plots, unroll
from jaxlstm.diagnostics import fixed_points, linearize, principal_components, sample_carries, trace

# %% [markdown]
# ## The task
#
# Each of two inputs is 0 except for an occasional pulse of +1 or −1. The net should output the last pulse of each one.
# Every training step draws new sequences, so a "batch" is only a key.


# %%
def pulses(key):
    """Draw inputs [time, batch, bits] and the outputs wanted."""
    key_when, key_sign = jax.random.split(key)
    when = jax.random.bernoulli(key_when, 0.15, (40, 32, 2)).at[0].set(True)
    xs = jnp.where(when, jax.random.rademacher(key_sign, (40, 32, 2), float), 0.0)
    return xs, jax.lax.associative_scan(lambda old, new: jnp.where(new == 0, old, new), xs)


def loss_fn(net, batch, carry, key):
    xs, bits = pulses(batch)
    _, ys = unroll(LSTM, net["layer"], xs)
    return ((ys @ net["w"] - bits) ** 2).mean(), (carry, {})


net = {"layer": LSTM.init(jax.random.key(0), 2, 12), "w": jnp.zeros((12, 2))}
optimizer = optax.adam(optax.cosine_decay_schedule(1e-2, 2000))
state = init_train_state(net, optimizer, jax.random.key(1))
train = jax.jit(functools.partial(fit, make_train_step(loss_fn, optimizer)))
state, metrics = train(state, jax.random.split(jax.random.key(2), 2000))
params = state.params["layer"]
print(f"loss: {metrics['loss'][0]:.3f} before training, {metrics['loss'][-1]:.5f} after it")

# %% [markdown]
# ## The points
#
# The search starts from states that the net visits, with noise added, and finds points of every kind: stable ones,
# where the net stays, and saddles, which it leaves along a few directions.

# %%
xs, _ = pulses(jax.random.key(3))
carries, quiet = trace(LSTM, params, xs).carry, jnp.zeros(2)
found = fixed_points(LSTM, params, sample_carries(jax.random.key(4), carries, 1024, noise=1.0), quiet)
around = linearize(LSTM, params, found.carry, quiet)
shown = np.asarray(found.carry.h @ state.params["w"], np.float64)
for number, kind, bits in zip(around.num_unstable, around.kind, shown, strict=True):
    print(f"{kind:9} unstable directions: {number}   output: {bits[0]:+.2f} {bits[1]:+.2f}")

# %% [markdown]
# The four stable points hold the four memories. Between every two that differ in one bit there is a saddle with one
# unstable direction. The point in the middle has two: there, neither bit is decided.

# %%
plane = principal_components(carries, 2)
axes = plots.phase_portrait(plane, carries, found.carry, around)

# %% [markdown]
# ## Crossing the saddle
#
# A pulse pushes the net over the saddle; without further input, it falls into the next corner. A weaker push is not
# enough, and the net comes back.

# %%
stable = found.carry.h[around.num_unstable == 0] @ state.params["w"]
corner = int(jnp.argmax(stable.sum(1)))  # both bits are +1
start = jax.tree.map(lambda leaf: jnp.asarray(leaf[around.num_unstable == 0][corner], jnp.float32), found.carry)
for size in (0.2, 0.4, 0.6, 0.8, 1.0):
    push = jnp.zeros((30, 2)).at[0, 0].set(-size)
    _, ys = unroll(LSTM, params, push, start)
    print(f"a push of -{size}: the first output 30 steps later is {float((ys[-1] @ state.params['w'])[0]):+.2f}")

# %% [markdown]
# The slowest direction of a stable point sets how fast the net returns to it:

# %%
slowest = around.time_constants[around.num_unstable == 0][:, 0]
print("steps to 1/e along the slowest direction:", np.round(np.asarray(slowest), 1))
