"""Wrong calls of the public functions, drawn at random: each must raise one clear error or give a right value.

`calls()` lists valid calls; `draw_wrong` replaces one argument of one of them by a value of another kind. The test in
`test_fuzz.py` counts the outcomes; run this file to print the calls whose error comes from inside
JAX or NumPy, and with -a those that are accepted.
"""

import sys
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jaxlstm
from jaxlstm import GRU, LSTM, Bidirectional, LSTMState, diagnostics, initializers, regularize, rtrl
from jaxlstm.checks import ArgumentError

T, B, I, H = 4, 2, 3, 5


class Call(NamedTuple):
    function: Any
    arguments: dict[str, Any]


def calls() -> dict[str, Call]:
    """Return a valid call of every public function that takes numbers, arrays, cells or functions."""
    key = lambda n: jax.random.key(n)
    params, gru = LSTM.init(key(0), I, H), GRU.init(key(1), I, H)
    stack = jaxlstm.init_stack(key(2), LSTM, I, [H, H])
    pair = jaxlstm.init_bidirectional(key(3), LSTM, I, H)
    xs, flags = jnp.ones((T, B, I), "float32"), jnp.ones((T, B), bool)
    carry = LSTM.initial_carry(params, (B,))
    of_sequence = {"cell": LSTM, "params": params, "xs": xs, "carry": carry}
    step_loss = lambda y, t: (y**2).sum()
    loss = lambda ys: (ys**2).sum()
    init = {"key": key(4), "input_size": I, "hidden_size": H, "dtype": "float32"}
    step = jaxlstm.make_train_step(lambda w, b: ((b @ w) ** 2).sum(), optax.sgd(0.1))
    state = jaxlstm.init_train_state(jnp.ones(3), optax.sgd(0.1), key(5))
    return {
        "LSTM.init": Call(LSTM.init, init | {"forget_bias": 1.0}),
        "GRU.init": Call(GRU.init, init),
        "RNN.init": Call(jaxlstm.RNN.init, init),
        "initializers.torch": Call(initializers.torch, init),
        "initializers.keras": Call(initializers.keras, init),
        "initializers.flax": Call(initializers.flax, init),
        "initializers.chrono": Call(initializers.chrono, init | {"max_lag": 9}),
        "make_rnn": Call(jaxlstm.make_rnn, {"nonlinearity": "tanh"}),
        "low_precision": Call(jaxlstm.low_precision, {"cell": LSTM, "dtype": "bfloat16"}),
        "length_mask": Call(jaxlstm.length_mask, {"lengths": jnp.array([1, 3]), "num_steps": T}),
        "segment_resets": Call(jaxlstm.segment_resets, {"segment_ids": jnp.zeros((T, B), int), "reverse": False}),
        "unroll": Call(
            jaxlstm.unroll,
            of_sequence
            | {"mask": flags, "reset": flags, "reset_carry": carry, "reverse": False, "gradient": jaxlstm.Bulk()},
        ),
        "unroll GRU": Call(jaxlstm.unroll, {"cell": GRU, "params": gru, "xs": xs, "carry": None}),
        "unroll_bidirectional": Call(
            jaxlstm.unroll_bidirectional,
            {"cell": LSTM, "params": pair, "xs": xs, "carry": Bidirectional(carry, carry), "mask": flags},
        ),
        "init_bidirectional": Call(jaxlstm.init_bidirectional, {"cell": LSTM, **init}),
        "init_stack": Call(
            jaxlstm.init_stack,
            {"key": key(6), "cell": LSTM, "input_size": I, "hidden_sizes": [H], "bidirectional": True},
        ),
        "unroll_stack": Call(
            jaxlstm.unroll_stack,
            {"cell": LSTM, "params": stack, "xs": xs, "carries": [carry, carry], "mask": flags, "reset": flags}
            | {"dropout": 0.5, "key": key(7), "gradient": "scan", "reset_carries": [carry, carry]},
        ),
        "step_stack": Call(
            jaxlstm.step_stack,
            {"cell": LSTM, "params": stack, "carries": [carry, carry], "x": xs[0], "mask": flags[0], "reset": flags[0]},
        ),
        "generate": Call(
            jaxlstm.generate,
            {"step_fn": lambda s, x, k: (s, x), "carry": (), "x0": jnp.ones(2), "key": key(8), "num_steps": 3},
        ),
        "lstm_bptt": Call(jaxlstm.lstm_bptt, {"params": params, "xs": xs, "carry": carry, "mask": flags}),
        "split_gates": Call(jaxlstm.split_gates, {"params": params}),
        "init_train_state": Call(
            jaxlstm.init_train_state, {"params": params, "optimizer": optax.sgd(0.1), "key": key(9)}
        ),
        "make_train_step": Call(jaxlstm.make_train_step, {"loss_fn": lambda p, b: 0.0, "optimizer": optax.sgd(0.1)}),
        "fit": Call(jaxlstm.fit, {"train_step": step, "state": state, "batches": jnp.ones((2, 4, 3))}),
        "dropout_mask": Call(
            regularize.dropout_mask, {"key": key(10), "rate": 0.5, "shape": (2, 3), "dtype": "float32"}
        ),
        "variational_dropout": Call(regularize.variational_dropout, {"cell": LSTM}),
        "recurrent_dropout": Call(regularize.recurrent_dropout, {"cell": LSTM}),
        "zoneout": Call(regularize.zoneout, {"cell": LSTM, "rates": LSTMState(0.1, 0.2)}),
        "zoneout_noise": Call(regularize.zoneout_noise, {"key": key(11), "rates": 0.1, "carry": carry, "num_steps": T}),
        "weight_drop": Call(regularize.weight_drop, {"key": key(12), "rate": 0.5, "params": params}),
        "rtrl_gradient": Call(rtrl.rtrl_gradient, of_sequence | {"step_loss": step_loss, "mask": flags}),
        "init_rtrl": Call(rtrl.init_rtrl, {"cell": LSTM, "params": params, "batch_shape": (B,), "max_bytes": 1 << 30}),
        "snap1_pattern": Call(rtrl.snap1_pattern, {"cell": LSTM, "params": params, "x": xs[0, 0]}),
        "gradient_error": Call(diagnostics.gradient_error, {"gradients": params, "reference": params}),
        "gradient_flow": Call(diagnostics.gradient_flow, of_sequence | {"loss_fn": loss}),
        "gradient_sources": Call(diagnostics.gradient_sources, of_sequence | {"step_loss": step_loss, "mask": flags}),
        "trace": Call(diagnostics.trace, of_sequence),
        "carry_jacobians": Call(diagnostics.carry_jacobians, of_sequence),
        "lyapunov_exponents": Call(diagnostics.lyapunov_exponents, of_sequence | {"num_exponents": 2, "num_warmup": 1}),
        "truncated_gradient": Call(diagnostics.truncated_gradient, of_sequence | {"loss_fn": loss}),
        "cell_state_terms": Call(diagnostics.cell_state_terms, {"params": params, "xs": xs, "carry": carry}),
    }


WRONG = {
    "a string": "no",
    "an object": object(),
    "a number": 3,
    "a float": 2.5,
    "nan": float("nan"),
    "infinity": float("inf"),
    "a negative number": -1,
    "zero": 0,
    "a flag": True,
    "nothing": None,
    "a list": [1, 2],
    "an empty list": [],
    "a ragged list": [[1.0, 2.0], [3.0]],
    "strings": ["a", "b"],
    "a dict": {"w": 1.0},
    "an object array": np.array([1, "a", None], dtype=object),
    "an array of strings": np.array(["a", "b"]),
    "a shape": jax.ShapeDtypeStruct((T, B, I), jnp.float32),
    "an empty array": np.zeros(0),
    "a scalar array": jnp.ones(()),
    "a vector": jnp.ones(7),
    "a matrix": np.ones((2, 9)),
    "four axes": jnp.ones((2, 2, 2, 2)),
    "complex numbers": jnp.ones((T, B, I), "complex64"),
    "half precision": jnp.ones((T, B, I), "float16"),
    "integers": np.ones((T, B, I), int),
    "a function": lambda *arguments: 1,
    "a type": int,
    "keys": jax.random.split(jax.random.key(0)),
    "a set": {1, 2},
    "bytes": b"no",
    "another cell": GRU,
    "other parameters": GRU.init(jax.random.key(0), I, H),
}


def outcome(call: Call, name: str, wrong: Any) -> tuple[str, Any]:
    """Return what happens to a call with one wrong argument: "clear", "accepted" or "unclear"; and its result."""
    try:
        return "accepted", call.function(**call.arguments | {name: wrong})
    except ArgumentError as error:
        return ("clear" if ": " in str(error) and "\n" not in str(error) else "unclear"), error
    except Exception as error:
        return "unclear", error


if __name__ == "__main__":
    every = calls()
    counts = dict.fromkeys(("clear", "accepted", "unclear"), 0)
    only, show_accepted = [name for name in sys.argv[1:] if name != "-a"], "-a" in sys.argv
    for function, call in every.items():
        if only and function not in only:
            continue
        for name in call.arguments:
            for kind, wrong in WRONG.items():
                result, found = outcome(call, name, wrong)
                counts[result] += 1
                if result == "unclear":
                    print(f"{function}({name}={kind}): {type(found).__name__}: {str(found).splitlines()[:1]}"[:170])
                elif result == "accepted" and show_accepted:
                    print(f"  accepted {function}({name}={kind})")
    print(counts)
