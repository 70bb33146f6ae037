# ---
# jupyter:
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Is my gradient right?
#
# You wrote a backward pass, or a loss with a `custom_vjp` in it, and want to know whether its gradient is right. This
# notebook checks both kinds, plants a fault in each, and shows how the checks report it. It takes half a minute on
# two CPU cores. `docs/check_gradients.py` is the source.

# %%
import jax
import jax.numpy as jnp

from jaxlstm import LSTM, plots, unroll
from jaxlstm.bptt import lstm_backward, lstm_forward
from jaxlstm.diagnostics import check_gradients, compare_gradients

# %% [markdown]
# ## Any loss
#
# `check_gradients` compares autodiff with central differences along random directions. It computes in float64,
# whatever your setting. Here the loss contains an activation with its own derivative.


# %%
@jax.custom_vjp
def swish(x):
    return x * jax.nn.sigmoid(x)


def swish_forward(x):
    return swish(x), x


def swish_backward(x, d_y):
    s = jax.nn.sigmoid(x)
    return (d_y * (s + x * s * (1 - s)),)


swish.defvjp(swish_forward, swish_backward)


def loss_fn(params, xs):
    _, ys = unroll(LSTM, params["layer"], xs)
    return (swish(ys @ params["w"]) ** 2).mean()


params = {"layer": LSTM.init(jax.random.key(0), 5, 7), "w": jax.random.normal(jax.random.key(1), (7, 2))}
xs = jax.random.normal(jax.random.key(2), (30, 3, 5))
found = check_gradients(loss_fn, params, xs, key=jax.random.key(3))
print(found)

# %% [markdown]
# Every leaf agrees down to the accuracy of the differences, the column `floor`. The column `given` is for a gradient of
# your own, which you pass as `gradients=`. Now a fault: the second term is missing.


# %%
def wrong_backward(x, d_y):
    return (d_y * jax.nn.sigmoid(x),)


swish.defvjp(swish_forward, wrong_backward)
found = check_gradients(loss_fn, params, xs, key=jax.random.key(3))
print(found)

# %% [markdown]
# The gradients of all leaves pass through the fault, so all are wrong. For a recurrent net there is more to see.
#
# ## A backward pass through time
#
# `compare_gradients` computes the gradient of a loss Σ_t E_t by every available method and compares them with autodiff
# of the scan, for every gate and every step. Your own method is one function. This one is the derivation by hand, with
# a fault in the forget gate at step 20.


# %%
def mine(params, xs, carry, d_ys):
    (last, _), residuals = lstm_forward(params, xs, carry)
    wrong_f = residuals.gates.f.at[20].multiply(1.01)
    residuals = residuals._replace(gates=residuals.gates._replace(f=wrong_f))
    return lstm_backward(params, residuals, (jax.tree.map(jnp.zeros_like, last), d_ys))


def step_loss(y, t):
    return (y**2).sum()


found = compare_gradients(LSTM, params["layer"], xs, step_loss, methods={"mine": mine}, max_differences=0)
print(found)

# %% [markdown]
# Going back in time, the error appears at step 20 and only in the gate f. All earlier steps inherit it.

# %%
axes = plots.error_by_step(found, "mine")

# %% [markdown]
# `departures` holds these findings as values, for your own tests:

# %%
print(found.departures["mine"])
print(found.departures["by hand"])
