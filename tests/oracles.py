"""Independent witnesses: NumPy loops over steps, and derivatives by complex steps. Nothing here imports jaxlstm or JAX.

A function that is evaluated at x + ih with a tiny h has its derivative in the imaginary part, without the cancellation
of finite differences: f'(x) = Im f(x + ih) / h, right to the last bits (Squire & Trapp, Using complex variables to
estimate derivatives of real functions, 1998).
"""

import numpy as np


def sigmoid(v):
    return 1 / (1 + np.exp(-v))


def lstm_step(params, state, x):
    w_ih, w_hh, b = params
    h, c = state
    z_i, z_f, z_g, z_o = np.split(x @ w_ih + h @ w_hh + b, 4)
    c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_g)
    h = sigmoid(z_o) * np.tanh(c)
    return (h, c), h


def gru_step(params, state, x):
    w_ih, w_hh, b, b_hn = params
    (h,) = state
    z_r, z_u, z_n = np.split(x @ w_ih + b, 3)
    a_r, a_u, a_n = np.split(h @ w_hh, 3)
    r, u = sigmoid(z_r + a_r), sigmoid(z_u + a_u)
    h = (1 - u) * np.tanh(z_n + r * (a_n + b_hn)) + u * h
    return (h,), h


def rnn_step(phi):
    def step(params, state, x):
        w_ih, w_hh, b = params
        h = phi(x @ w_ih + state[0] @ w_hh + b)
        return (h,), h

    return step


def relu(v):
    return np.where(v.real > 0, v, 0 * v)


def leaky_step(params, state, x):
    """The step of the tests' own cell: a leaky integrator with a learned rate (see tests/cells.py)."""
    into, back, rate = params
    (s,) = state
    keep = sigmoid(rate)
    s = keep * s + (1 - keep) * np.tanh(x @ into + s @ back)
    return (s,), s**2


def loop(step, params, xs, carry, mask=None, reset=None, reset_carry=None, reverse=False):
    """Run one sequence after another, one step after another. Leaves of carries are [batch, hidden]."""
    num_steps, batch = xs.shape[:2]
    ys, finals = None, []
    for n in range(batch):
        state = tuple(leaf[n] for leaf in carry)
        for t in reversed(range(num_steps)) if reverse else range(num_steps):
            if reset is not None and reset[t, n]:
                one_per_step = reset_carry[0].ndim == 3
                state = tuple(leaf[t, n] if one_per_step else leaf[n] for leaf in reset_carry)
            if mask is not None and not mask[t, n]:
                continue
            state, y = step(params, state, xs[t, n])
            if ys is None:
                ys = np.zeros((num_steps, batch, len(y)), np.result_type(y))
            ys[t, n] = y
        finals.append(state)
    return tuple(np.stack(leaves) for leaves in zip(*finals, strict=True)), ys


def complex_step_gradient(f, variables):
    """Return the gradient of the real function f by each array of a list, entry by entry."""
    gradients = []
    for k, variable in enumerate(variables):
        gradient = np.zeros(variable.shape)
        for entry in np.ndindex(variable.shape):
            moved = [v.astype(complex) for v in variables]
            moved[k][entry] += 1e-30j
            gradient[entry] = f(*moved).imag / 1e-30
        gradients.append(gradient)
    return gradients
