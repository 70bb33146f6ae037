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


def lstm_variant_step(kind):
    """Return the step of Greff's cells, written as one formula with switches, which the package avoids."""
    gates = {"NIG": "fgo", "NFG": "igo", "NOG": "ifg"}.get(kind, "ifgo")

    def step(params, state, x):
        if kind == "FGR":
            w_ih, w_hh, w_gates, b, p = params
            h, c, i_before, f_before, o_before = state
        else:
            w_ih, w_hh, b, p = params
            h, c = state
        size = len(c)
        z = dict(zip(gates, np.split(x @ w_ih + h @ w_hh + b, len(gates)), strict=True))
        if kind == "FGR":
            for to, gate in enumerate("ifo"):
                for source, before in enumerate((i_before, f_before, o_before)):
                    block = w_gates[source * size : (source + 1) * size, to * size : (to + 1) * size]
                    z[gate] = z[gate] + before @ block
        peephole = dict(zip(gates.replace("g", ""), p.reshape(-1, size), strict=True))
        i = sigmoid(z["i"] + peephole["i"] * c) if "i" in gates else 1
        f = sigmoid(z["f"] + peephole["f"] * c) if "f" in gates else 1
        c = f * c + i * (z["g"] if kind == "NIAF" else np.tanh(z["g"]))
        o = sigmoid(z["o"] + peephole["o"] * c) if "o" in gates else 1
        h = o * (c if kind == "NOAF" else np.tanh(c))
        return ((h, c, i, f, o) if kind == "FGR" else (h, c)), h

    return step


def coupled_step(params, state, x):
    w_ih, w_hh, b = params
    h, c = state
    z_i, z_g, z_o = np.split(x @ w_ih + h @ w_hh + b, 3)
    c = (1 - sigmoid(z_i)) * c + sigmoid(z_i) * np.tanh(z_g)
    h = sigmoid(z_o) * np.tanh(c)
    return (h, c), h


def layer_norm_step(params, state, x):
    w_ih, w_hh, b, scale_x, scale_h, scale_c, shift_c = params
    h, c = state

    def normal(v):
        mean = v.sum() / len(v)
        return (v - mean) / np.sqrt(((v - mean) ** 2).sum() / len(v) + 1e-5)

    z_i, z_f, z_g, z_o = np.split(scale_x * normal(x @ w_ih) + scale_h * normal(h @ w_hh) + b, 4)
    c = sigmoid(z_f) * c + sigmoid(z_i) * np.tanh(z_g)
    h = sigmoid(z_o) * np.tanh(scale_c * normal(c) + shift_c)
    return (h, c), h


def projected_step(params, state, x):
    w_ih, w_hh, b, w_hr = params
    (_, c), h = lstm_step((w_ih, w_hh, b), state, x)
    return (h @ w_hr, c), h @ w_hr


def lstm_1997_step(block_size):
    """Return a step that goes through the memory blocks and their cells one by one."""

    def step(params, state, x):
        w_ih, w_hh, b = params
        h, c, i_before, o_before = state
        z = x @ w_ih + np.concatenate([h, i_before, o_before]) @ w_hh + b
        size, blocks = len(c), len(i_before)
        i, o = sigmoid(z[size : size + blocks]), sigmoid(z[size + blocks :])
        h, c = h.astype(z.dtype), c.astype(z.dtype)
        for n in range(size):
            block = n // block_size
            c[n] = c[n] + i[block] * (4 / (1 + np.exp(-z[n])) - 2)
            h[n] = o[block] * (2 / (1 + np.exp(-c[n])) - 1)
        return (h, c, i, o), h

    return step


def slstm_step(params, state, x):
    w_ih, w_hh, b = params
    h, c, n, m = state
    z_i, z_f, z_g, z_o = np.split(x @ w_ih + h @ w_hh + b, 4)
    log_f = np.log(sigmoid(z_f)) + m
    new_m = np.where((n == 0) | (z_i.real > log_f.real), z_i, log_f)
    i, f = np.exp(z_i - new_m), np.where(n == 0, 0, np.exp(log_f - new_m))
    c, n = f * c + i * np.tanh(z_g), f * n + i
    h = sigmoid(z_o) * c / n
    return (h, c, n, new_m), h


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
