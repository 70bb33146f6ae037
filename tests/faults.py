"""Faults, put into a copy of the project one at a time. A suite that passes with one of them in it is no evidence.

python tests/faults.py              every fault, and the test that caught it
python tests/faults.py "gate order" the ones whose name has these words
"""

import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "runs", "*.egg-info", "build", "dist")
LEFT_OUT = (
    "test_faults.py",
    "test_kills.py",
    "test_makefile.py",
)  # they start suites, jobs and environments themselves


class Fault(NamedTuple):
    """A line as it is, as it would be wrong, and the file of tests to begin with."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS = [
    # A tenth of them runs in CI: one of each kind comes first.
    Fault("two gates in the wrong order", "jaxlstm/lstm.py", "z_i, z_f, z_g, z_o = jnp.split(z + a",
          "z_i, z_g, z_f, z_o = jnp.split(z + a", "test_recurrence.py"),
    Fault("off by one in the reverse scan", "jaxlstm/bptt.py", "w_hh=jnp.tensordot(previous.h, d_zs,",
          "w_hh=jnp.tensordot(previous.h[1:], d_zs[:-1],", "test_bptt.py"),
    Fault("mask on h only", "jaxlstm/masks.py", "return select(now.mask, new_carry, carry), ",
          "return new_carry._replace(h=select(now.mask, new_carry.h, carry.h)), ", "test_recurrence.py"),
    Fault("manifest not checked", "experiments/harness/checkpoints.py", "if (noted := (path / SUMS).read_bytes()) != (found",
          "if (noted := (path / SUMS).read_bytes()) is (found", "test_checkpoints.py"),
    # The equations.
    Fault("sign of the candidate", "jaxlstm/lstm.py", "c = f * state.c + i * g", "c = f * state.c - i * g", "test_recurrence.py"),
    Fault("input gate missing", "jaxlstm/lstm.py", "c = f * state.c + i * g", "c = f * state.c + g", "test_recurrence.py"),
    Fault("tanh for sigmoid", "jaxlstm/lstm.py", "o = jax.nn.sigmoid(z_o)", "o = jnp.tanh(z_o)", "test_lstm.py"),
    Fault("no tanh of the cell state", "jaxlstm/lstm.py", "h = o * jnp.tanh(c)", "h = o * c", "test_recurrence.py"),
    Fault("forget bias lost", "jaxlstm/lstm.py", "gate_bias(hidden_size, dtype, f=forget_bias)",
          "gate_bias(hidden_size, dtype)", "test_lstm.py"),
    Fault("forget bias added at run time", "jaxlstm/lstm.py", "f = jax.nn.sigmoid(z_f)", "f = jax.nn.sigmoid(z_f + 1)",
          "test_lstm.py"),
    Fault("sign of the chrono bias", "jaxlstm/initializers.py", "i=-b_f, f=b_f",
          "i=b_f, f=b_f", "test_lstm.py"),
    Fault("w_hh not orthogonal", "jaxlstm/initializers.py", "w_hh = per_gate(orthogonal",
          "w_hh = per_gate(jax.nn.initializers.lecun_normal()", "test_lstm.py"),
    Fault("reset gate before the matmul's bias", "jaxlstm/baselines.py", "r * (a_n + b_hn)", "r * a_n + b_hn",
          "test_recurrence.py"),
    Fault("update gate upside down", "jaxlstm/baselines.py", "(1 - u) * n + u * state.h", "u * n + (1 - u) * state.h",
          "test_recurrence.py"),
    # The recurrence.
    Fault("gradient cut at h", "jaxlstm/cell.py", "return matmul(carry.h,", "return matmul(jax.lax.stop_gradient(carry.h),",
          "test_recurrence.py"),
    Fault("forgotten reset", "jaxlstm/masks.py", "if now.reset is None:",
          "if True:", "test_recurrence.py"),
    Fault("no reset at masked steps", "jaxlstm/masks.py", "return select(now.reset, ",
          "return select(now.reset if now.mask is None else now.reset & now.mask, ", "test_recurrence.py"),
    Fault("a reset puts the carry argument back", "jaxlstm/recurrence.py", "checked_reset_carry(cell, reset, reset_carry, initial_carry, num_steps)",
          "checked_reset_carry(cell, reset, reset_carry, carry, num_steps)", "test_recurrence.py"),
    Fault("NaN in padding multiplied into the gradient", "jaxlstm/masks.py", "return xs if mask is None else select(~mask, None, xs)",
          "return xs", "test_recurrence.py"),
    Fault("masked steps put something out", "jaxlstm/masks.py", "select(~now.mask, None, y)",
          "y", "test_recurrence.py"),
    Fault("reverse forgotten", "jaxlstm/bulk.py", "(steps, zs), reverse=how.reverse,",
          "(steps, zs), reverse=False,", "test_recurrence.py"),
    Fault("mask one step too long", "jaxlstm/masks.py", "steps < lengths",
          "steps <= lengths", "test_recurrence.py"),
    Fault("segments end one step late in reverse", "jaxlstm/masks.py", "[changes, start] if reverse else [start, changes]",
          "[start, changes]", "test_recurrence.py"),
    # The derivative rule, chunks and precision.
    Fault("closed form: derivative of the output gate", "jaxlstm/lstm.py", "tanh_c * o * (1 - o)", "tanh_c * o * (1 + o)",
          "test_derivative.py"),
    Fault("closed form: derivative of tanh", "jaxlstm/lstm.py", "o * (1 - tanh_c**2)", "o * (1 - tanh_c)",
          "test_derivative.py"),
    Fault("closed form: derivative of an RNN", "jaxlstm/baselines.py", "lambda h: h * (1 - h)", "lambda h: h * (1 + h)",
          "test_recurrence.py"),
    Fault("peepholes have no gradient", "jaxlstm/bulk.py", "(params, start, z, a), (d_params, None, d_z, d_a)",
          "(params, start, z, a), (None, None, d_z, d_a)", "test_derivative.py"),
    Fault("tangents pass through resets", "jaxlstm/bulk.py", "d_start = start_of(now, d_carry, d_reset_carry)",
          "d_start = d_carry", "test_derivative.py"),
    Fault("no second derivative through what is kept", "jaxlstm/bulk.py", "        return Kept(d_start, None)",
          "        return Kept(jax.tree.map(lambda v: 0 * v, d_start), None)", "test_derivative.py"),
    Fault("z joined in the wrong order", "jaxlstm/bulk.py", "jnp.concatenate(pieces, axis",
          "jnp.concatenate(pieces[::-1], axis", "test_recurrence.py"),
    Fault("the batch on every device", "experiments/harness/devices.py", "PartitionSpec(*[None] * batch_axis, AXIS)",
          "PartitionSpec()", "test_devices.py"),
    Fault("a remainder at the wrong end", "jaxlstm/bulk.py", "[w, v] if reverse else [v, w]",
          "[v, w]", "test_recurrence.py"),
    Fault("a sharded batch gathered for each block", "jaxlstm/tuning.py", "jax.tree.leaves(z)[0].ndim - 1 if reshapes else 0",
          "jax.tree.leaves(z)[0].ndim - 1", "test_derivative.py"),
    Fault("a mesh in use not noticed", "jaxlstm/tuning.py", "spread = on_devices((params, steps, carry))",
          "spread = False", "test_derivative.py"),
    Fault("z in the loop of an accelerator", "jaxlstm/recurrence.py", "default=by_plan(plans.elsewhere)",
          "default=by_plan(plans.on_a_cpu)", "test_platforms.py"),
    Fault("the platform of a mesh not known", "jaxlstm/tuning.py", "for mesh in meshes if mesh.abstract_device)",
          "for mesh in [])", "test_platforms.py"),
    Fault("an accelerator takes one step at a time", "jaxlstm/bulk.py", "reverse=how.reverse, unroll=how.plan.unroll)",
          "reverse=how.reverse)", "test_platforms.py"),
    Fault("factorizations batched under vmap", "jaxlstm/cell.py", "jax.custom_batching.sequential_vmap(",
          "(", "test_cell.py"),
    Fault("time and batch merged on every platform", "jaxlstm/tuning.py", "Plan(size_elsewhere, pieces=1",
          "Plan(size_elsewhere, merged_axes, pieces=1", "test_platforms.py"),
    Fault("truncation forgotten", "jaxlstm/recurrence.py", "if gradient.truncate:",
          "if False:", "test_recurrence.py"),
    Fault("truncation cuts the initial carry off", "jaxlstm/recurrence.py", "select(first.any(), carry, ",
          "select(first.any() & False, carry, ", "test_recurrence.py"),
    Fault("biases rounded", "jaxlstm/precision.py", "v.ndim >= 2 and _is_float(v)", "_is_float(v)", "test_precision.py"),
    Fault("matmuls summed in few digits", "jaxlstm/cell.py", ", preferred_element_type=dtype)", ").astype(dtype)",
          "test_precision.py"),
    Fault("the carry's two leaves share a buffer", "jaxlstm/lstm.py",
          "return LSTMState(jnp.zeros(shape, dtype), jnp.zeros(shape, dtype))",
          "return LSTMState(*[jnp.zeros(shape, dtype)] * 2)", "test_char_lm.py"),
    # The gradient by hand.
    Fault("tanh not differentiated", "jaxlstm/bptt.py", "d_s * (1 - s**2)", "d_s", "test_bptt.py"),
    Fault("sign in the derivative of tanh", "jaxlstm/bptt.py", "d_g * (1 - g**2)", "d_g * (1 + g**2)", "test_bptt.py"),
    Fault("wrong gate on the carousel", "jaxlstm/bptt.py", "d_c_prev = d_c * f", "d_c_prev = d_c * i", "test_bptt.py"),
    Fault("gates joined in the wrong order", "jaxlstm/bptt.py", "[d_z_i, d_z_f, d_z_g, d_z_o]", "[d_z_i, d_z_g, d_z_f, d_z_o]",
          "test_bptt.py"),
    Fault("masked steps lose d_h", "jaxlstm/bptt.py", "d_z @ w_hh.T + jnp.where(m, 0, d_h_t)", "d_z @ w_hh.T", "test_bptt.py"),
    Fault("time not reversed", "jaxlstm/bptt.py", "mask), reverse=True)", "mask))", "test_bptt.py"),
    Fault("an error relative to itself", "jaxlstm/diagnostics/differences.py",
          "norm((g - r) / scale) / size", "norm((g - r) / scale) / jnp.linalg.norm(g / scale)", "test_bptt.py"),
    # The gradient laboratory.
    Fault("no influence of the past", "jaxlstm/rtrl.py", "influence = by_carry @ state.influence + by_params",
          "influence = by_params", "test_rtrl.py"),
    Fault("an influence outlives a reset", "jaxlstm/rtrl.py", "state = select(reset, _initial_state(cell, params, batch_shape, pattern), state)",
          "state = select(reset, _initial_state(cell, params, batch_shape, pattern)._replace(influence=state.influence), state)", "test_rtrl.py"),
    Fault("SnAp-1 along h alone", "jaxlstm/rtrl.py", "through.sum(axis=1)", "through[:, 0]", "test_rtrl.py"),
    Fault("lag counted from the start", "jaxlstm/diagnostics/sources.py", "total.at[t - times].add(g)", "total.at[times].add(g)",
          "test_sources.py"),
    Fault("probes not seen by what follows", "jaxlstm/diagnostics/flow.py", "results = [r if probe is None else r + probe for",
          "results = [r for", "test_diagnostics.py"),
    Fault("Jacobians multiplied in the wrong order", "jaxlstm/diagnostics/dynamics.py", "(product @ jacobian,)",
          "(jacobian @ product,)", "test_diagnostics.py"),
    Fault("a masked step forgets", "jaxlstm/diagnostics/dynamics.py", "jacobians, jnp.eye(", "jacobians, 0 * jnp.eye(",
          "test_diagnostics.py"),
    Fault("w_hh not transposed in the four terms", "jaxlstm/diagnostics/dynamics.py", "...j,kj,...k", "...j,jk,...k", "test_diagnostics.py"),
    Fault("the first step named, not the last", "jaxlstm/diagnostics/comparison.py", "t = max(steps)", "t = min(steps)",
          "test_comparison.py"),
    Fault("a NaN agrees", "jaxlstm/diagnostics/comparison.py", "in errors.items() if not error <= tolerance}",
          "in errors.items() if error > tolerance}", "test_comparison.py"),
    Fault("differences of second order", "jaxlstm/diagnostics/differences.py",
          "(8 * (ahead - back) - (two_ahead - two_back)) / (12 * step_size)", "(ahead - back) / (2 * step_size)",
          "test_main.py"),
    Fault("a disagreement not in the exit code", "jaxlstm/__main__.py", "return 1 if lines else 0", "return 0",
          "test_main.py"),
    # Training.
    Fault("carry not handed on", "jaxlstm/train.py", "state.step + 1, state.key, carry)", "state.step + 1, state.key, state.carry)",
          "test_train.py"),
    Fault("one key for every step", "jaxlstm/train.py", "jax.random.fold_in(state.key, state.step)", "state.key", "test_train.py"),
    Fault("step not counted", "jaxlstm/train.py", "state.step + 1, state.key", "state.step, state.key", "test_train.py"),
    Fault("gradient norm after the update", "jaxlstm/train.py", "optax.tree.norm(grads)", "optax.tree.norm(updates)",
          "test_train.py"),
    Fault("one order for every epoch", "jaxlstm/epochs.py", "jax.random.fold_in(key, epoch)", "key", "test_epochs.py"),
    Fault("the last parameters, not the best", "jaxlstm/epochs.py", "return run.best._replace(", "return run.state._replace(",
          "test_epochs.py"),
    Fault("items left over do not count", "jaxlstm/epochs.py", "    if left_over:", "    if False:", "test_epochs.py"),
    Fault("padding counts", "jaxlstm/epochs.py", "jnp.sum(v, where=mask, dtype", "jnp.sum(v, dtype", "test_epochs.py"),
    Fault("patience counted from the start", "jaxlstm/epochs.py", "jnp.where(better, 0, run.waited + 1)", "run.waited + 1",
          "test_epochs.py"),
    # The main job.
    Fault("dropout key reused between layers", "experiments/char_lm.py", "jax.random.fold_in(key, depth)", "key",
          "test_char_lm.py"),
    Fault("dropout without its scale", "experiments/char_lm.py", "return xs * dropout_mask(",
          "return xs * (1 - dropout) * dropout_mask(", "test_char_lm.py"),
    Fault("no dropout after the last layer", "experiments/char_lm.py", "drop(ys, len(model.layers))", "ys", "test_char_lm.py"),
    Fault("a sampler that forgets", "experiments/char_lm.py", "return carries, y @ model.w + model.b",
          "return initial_carries(model), y @ model.w + model.b", "test_char_lm.py"),
    Fault("a target is its own input", "experiments/char_lm.py", "cross_entropy(logits, batch[1:])",
          "cross_entropy(logits, batch[:-1])", "test_char_lm.py"),
    Fault("nats called bits", "experiments/char_lm.py", "mean(where=scored) / math.log(2)", "mean(where=scored)",
          "test_char_lm.py"),
    Fault("held-out text trained on", "experiments/text.py", "Corpus(name, text[:cut], text[cut:],", "Corpus(name, text, text[cut:],",
          "test_char_lm.py"),
    Fault("a character lost between two batches", "experiments/text.py", "reads + step * seq_len)", "reads + step * (seq_len + 1))",
          "test_char_lm.py"),
    # Runs.
    Fault("a renamed checkpoint believed", "experiments/harness/checkpoints.py", 'if about["step"] != _step(path):', "if False:",
          "test_checkpoints.py"),
    Fault("the best checkpoint deleted", "experiments/harness/checkpoints.py", "if old != best:", "if True:", "test_checkpoints.py"),
    Fault("a failed save leaves its ruin", "experiments/harness/checkpoints.py", "        with contextlib.suppress(OSError):\n            _delete(beside)\n",
          "", "test_checkpoints.py"),
    Fault("half a checkpoint under its final name", "experiments/harness/checkpoints.py", 'beside = path.with_suffix(".part")', "beside = path",
          "test_checkpoints.py"),
    Fault("rows written twice after a kill", "experiments/harness/runs.py", "if step > after or", "if False or", "test_runs.py"),
    Fault("other flags let through", "experiments/harness/runs.py", "    if changed:\n", "    if False:\n", "test_runs.py"),
    Fault("two processes in one run", "experiments/harness/runs.py", "fcntl.LOCK_EX | fcntl.LOCK_NB", "fcntl.LOCK_SH", "test_runs.py"),
    Fault("a resumed run begins again", "experiments/harness/trainer.py", "for start in range(first, steps, block):",
          "for start in range(0, steps, block):", "test_runs.py"),
    Fault("NaN saved over the last good state", "experiments/harness/trainer.py", "    if bad:\n", "    if False:\n", "test_runs.py"),
    Fault("the request to stop not heard", "experiments/harness/trainer.py", "if stopping := devices.agree(max(stop, default=0)):",
          "if stopping := 0:", "test_runs.py"),
    Fault("the wish to stop not saved", "experiments/harness/trainer.py", "evaluating or stopping or done", "evaluating or done", "test_runs.py"),
    Fault("save_every ignored", "experiments/harness/trainer.py", "evaluating or stopping or done // save_every > start // save_every",
          "evaluating or stopping", "test_runs.py"),
    Fault("metrics cut before they are locked", "experiments/harness/runs.py", "        try:\n            fcntl.flock(",
          "        _cut(path, after)\n        try:\n            fcntl.flock(", "test_runs.py"),
    Fault("files written in place", "experiments/harness/runs.py", 'beside = path.with_name(path.name + ".part")', "beside = path",
          "test_runs.py"),
    Fault("checkpoints deleted in place", "experiments/harness/checkpoints.py", 'if path.suffix != ".part":', "if False:",
          "test_checkpoints.py"),
    # Layers, regularisers, adapters.
    Fault("backward half reset where the forward one is", "jaxlstm/bidirectional.py",
          "return jnp.concatenate([reset[1:], jnp.zeros_like(reset[:1])])", "return reset", "test_layers.py"),
    Fault("backward half runs forward", "jaxlstm/bidirectional.py", "options._replace(reset=reset, reverse=True)",
          "options._replace(reset=reset)", "test_layers.py"),
    Fault("merged outputs not masked", "jaxlstm/bidirectional.py", "if options.mask is not None and merge is not concatenate:",
          "if False:", "test_layers.py"),
    Fault("one dropout mask for all layers", "jaxlstm/layers.py", "jax.random.fold_in(key, depth)", "jax.random.clone(key)",
          "test_layers.py"),
    Fault("a step without its reset", "jaxlstm/layers.py", "start = start_of(now, carry, reset_carry)",
          "start = carry", "test_layers.py"),
    Fault("generation with one key", "jaxlstm/layers.py", "state[1], jax.random.fold_in(key, t))",
          "state[1], jax.random.clone(key))", "test_layers.py"),
    Fault("dropout not scaled", "jaxlstm/regularize.py", ".astype(dtype) / jnp.asarray(1 - rate, dtype)", ".astype(dtype)",
          "test_regularize.py"),
    Fault("masks that depend on x64", "jaxlstm/regularize.py", "jnp.asarray(rate, jnp.float32)", "rate",
          "test_regularize.py"),
    Fault("zoneout upside down", "jaxlstm/regularize.py", "jax.tree.map(where, held, carry, new)",
          "jax.tree.map(where, held, new, carry)", "test_regularize.py"),
    Fault("expectation of zoneout upside down", "jaxlstm/regularize.py", "rate * old + (1 - rate) * new",
          "rate * new + (1 - rate) * old", "test_regularize.py"),
    Fault("recurrent dropout of the memory", "jaxlstm/regularize.py", "c = f * state.c + i * (mask * g)",
          "c = mask * (f * state.c + i * g)", "test_regularize.py"),
    Fault("recurrent dropout of a GRU's memory", "jaxlstm/regularize.py", "h = (1 - u) * (mask * n) + u * state.h",
          "h = mask * ((1 - u) * n + u * state.h)", "test_regularize.py"),
    Fault("h not dropped", "jaxlstm/regularize.py", 'carry._replace(h=_masked("h", carry.h, mask))', "carry",
          "test_regularize.py"),
    Fault("masks of items taken for masks of steps", "jaxlstm/regularize.py", "jnp.broadcast_to(mask, steps.shape)",
          "jnp.repeat(mask, steps.size // mask.size, axis=0).reshape(steps.shape)", "test_regularize.py"),
    Fault("both directions with the same noise", "jaxlstm/bidirectional.py", "_noisy(xs, own_noise), own_carry",
          "_noisy(xs, pairs[1].forward), own_carry", "test_regularize.py"),
    Fault("lengths in place of the mask", "jaxlstm/adapters/conventions.py", "mask = real if mask is None else mask & real",
          "mask = real", "test_adapters.py"),
    Fault("flags transposed twice", "jaxlstm/adapters/conventions.py", "return flags if time_major else jnp.moveaxis(flags, -1, 0)",
          "return jnp.moveaxis(flags, -1, 0)", "test_adapters.py"),
    Fault("dtype of an nnx cell forgotten", "jaxlstm/adapters/nnx.py", "inputs, *cell.params), dtype=cell.dtype)",
          "inputs, *cell.params), dtype=None)", "test_adapters.py"),
    Fault("a mask that is trained", "jaxlstm/regularize.py", "lax.stop_gradient(mask).astype", "mask.astype", "test_regularize.py"),
    Fault("c for h in Flax's carry", "jaxlstm/adapters/conventions.py", "    c, h = carry", "    h, c = carry",
          "test_adapters.py"),
    Fault("Flax's gates in another order", "jaxlstm/adapters/weights.py", 'entries.take(f"h{gate}/kernel", hidden, hidden) for gate in gates]',
          'entries.take(f"h{gate}/kernel", hidden, hidden) for gate in gates[::-1]]', "test_adapters.py"),
    Fault("dtype of a module forgotten", "jaxlstm/adapters/conventions.py", "options.cell if dtype is None else low_precision(options.cell, dtype)",
          "options.cell", "test_adapters.py"),
    Fault("derivative of sLSTM's m takes the smaller", "jaxlstm/variants.py", "jnp.where(f >= i, d_log_f, d_z_i)", "jnp.where(f < i, d_log_f, d_z_i)", "test_variants.py"),
    Fault("slope of sLSTM's forget gate by subtraction", "jaxlstm/variants.py", "slope_f=sigmoid(-z_f)", "slope_f=1 - sigmoid(z_f)", "test_variants.py"),
    Fault("derivative of sLSTM forgets the normalizer", "jaxlstm/variants.py", "(d_c - ratio * d_n)", "(d_c)", "test_variants.py"),
    Fault("derivative of the candidate of 1997", "jaxlstm/variants.py", "(1 - g**2 / 4) * d_z_g", "(1 - g**2) * d_z_g", "test_variants.py"),
    Fault("Haiku's forget bias keeps its 1", "jaxlstm/adapters/weights.py", "b.at[hidden : 2 * hidden].add(1)", "b", "test_weights.py"),
    Fault("Keras's GRU in torch's order", "jaxlstm/adapters/weights.py", '"GRU": "urn", "RNN": "h"}\nKERAS_NAMES', '"GRU": "run", "RNN": "h"}\nKERAS_NAMES', "test_weights.py"),
    Fault("ONNX peepholes in our order", "jaxlstm/adapters/weights.py", '_reorder(own.p, "ifo", "iof")', "own.p", "test_onnx.py"),
    Fault("ONNX gates in torch's order", "jaxlstm/adapters/weights.py", 'ONNX = {"LSTM": "iofg"', 'ONNX = {"LSTM": "ifgo"', "test_onnx.py"),
    Fault("b_hn of torch's GRU is added to b", "jaxlstm/adapters/weights.py", "jnp.zeros_like(n)]), \"b_hn\": n}", "n]), \"b_hn\": n}", "test_weights.py"),
    Fault("unexpected entries are ignored", "jaxlstm/adapters/weights.py", "for name in self.left:\n            raise", "for name in ():\n            raise", "test_weights.py"),
    Fault("float64 weights are rounded", "jaxlstm/adapters/weights.py", "!= value.dtype:", "== object:", "test_weights.py"),
    Fault("outputs of both ONNX directions transposed", "jaxlstm/adapters/onnx.py", "perm=[0, 2, 1, 3]", "perm=[0, 2, 3, 1]", "test_onnx.py"),
    Fault("derivative of coupled gates forgets f", "jaxlstm/variants.py", "[d_z_i, -d_z_i, d_z_g, d_z_o]", "[d_z_i, 0 * d_z_i, d_z_g, d_z_o]", "test_variants.py"),
    Fault("cells of a block take the gates of another", "jaxlstm/variants.py", "jnp.repeat(gate, block_size, axis=-1)",
          "jnp.concatenate(block_size * [gate], axis=-1)", "test_variants.py"),
    Fault("truncation of 1997 forgotten", "jaxlstm/variants.py", "lax.stop_gradient(units) if truncate else units", "units", "test_variants.py"),
    Fault("sLSTM remembers m before anything was stored", "jaxlstm/variants.py", "jnp.where(state.n == 0, -jnp.inf, state.m)",
          "state.m", "test_variants.py"),
    Fault("layer norm without its mean", "jaxlstm/variants.py", "x = x - x.mean(-1, keepdims=True)", "x = x + 0", "test_variants.py"),
]  # fmt: skip


def copy_of_the_project(folder: Path, fault: Fault | None = None) -> Path:
    """Copy what the tests need; put the fault in."""
    copy = Path(shutil.copytree(ROOT, folder / "copy", ignore=NOT_COPIED))
    if fault:
        path = copy / fault.file
        content = path.read_text(encoding="utf-8")
        assert content.count(fault.right) == 1, f"{fault.name}: which {fault.right!r} of {fault.file} is meant?"
        path.write_text(content.replace(fault.right, fault.wrong), encoding="utf-8")
    return copy


def first_failure(
    copy: Path, *tests: str, marks: str = "not slow", timeout: float | None = None, **environment: str
) -> str | None:
    """Run tests in a copy, by default all; return the first one that fails."""
    left_out = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "-rfE", "-m", marks, "-p", "no:cacheprovider", "--tb=no", "--no-header",
         *left_out, *tests],
        cwd=copy, capture_output=True, text=True, check=False, timeout=timeout,
        env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", **environment},
    )  # fmt: skip
    if done.returncode in (0, 5):  # all pass, or the marks select none
        return None
    found = re.search(r"^(?:FAILED|ERROR) (\S+(?: [^-]\S*)*)", done.stdout, re.M)
    assert done.returncode in (1, 2) and found, done.stdout + done.stderr
    return found[1]


def caught_by(fault: Fault, folder: Path, **environment: str) -> str | None:
    """Return the first test that fails with a fault, or None if the whole suite passes."""
    copy = copy_of_the_project(folder, fault)
    return first_failure(copy, f"tests/{fault.tests}", **environment) or first_failure(copy, **environment)


if __name__ == "__main__":
    words = " ".join(sys.argv[1:])
    chosen = [fault for fault in FAULTS if words in fault.name]
    missed = 0
    for fault in chosen:
        with tempfile.TemporaryDirectory() as folder:
            test = caught_by(fault, Path(folder))
        missed += test is None
        print(f"{fault.name}: {test or 'NOT CAUGHT'}", flush=True)
    print(f"{len(chosen) - missed} of {len(chosen)} faults caught")
    sys.exit(missed > 0)
