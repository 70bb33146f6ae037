"""Write torch.npz: what torch computes, in float64, so that the comparison runs where torch is not installed.

python tests/golden/generate.py         needs torch; test_torch.py regenerates it in memory and compares
"""

import itertools
from pathlib import Path

import numpy as np

PATH = Path(__file__).with_name("torch.npz")
T, B, I, H = 7, 3, 5, 4
LENGTHS = (4, 7, 2)
MODULES = {"LSTM": ("LSTM", {}), "GRU": ("GRU", {}), "RNN": ("RNN", {}), "RNN(relu)": ("RNN", {"nonlinearity": "relu"})}
SEEDS = range(20)
FLOAT32_SHAPE = (30, 4, 6, 8)
STACKS = list(
    itertools.product((1, 2, 3), (1, 2), (None, (6, 1, 4, 5)), (False, True))
)  # layers, directions, lengths, carry
STACK_SHAPE = (6, 4, 2, 3)
# Larger modules, whose weights test_weights.py converts: the module, its options, all but sizes.
WEIGHTS = {
    "LSTM": ("LSTM", {"num_layers": 3, "bias": False}),
    "ProjectedLSTM": ("LSTM", {"num_layers": 2, "bidirectional": True, "proj_size": 3}),
    "GRU": ("GRU", {"num_layers": 2, "bidirectional": True}),
    "RNN": ("RNN", {"num_layers": 2, "bidirectional": True}),
}
WEIGHTS_SHAPE = (5, 2, 3, 4)


def draw(seed, parameter_shapes, shape, *, directions=1, num_states=2, num_layers=1):
    """Draw (parameters, states, derivatives by the final states, xs, derivatives by ys) of one case."""
    num_steps, batch, input_size, hidden = shape
    normal = np.random.default_rng(seed).normal
    parameters = [normal(size=parameter_shape) / 2 for parameter_shape in parameter_shapes]
    state_shape = (num_layers * directions, batch, hidden)
    states, d_states = ([normal(size=state_shape) for _ in range(num_states)] for _ in range(2))
    xs, d_ys = normal(size=(num_steps, batch, input_size)), normal(size=(num_steps, batch, directions * hidden))
    return parameters, states, d_states, xs, d_ys


def run(module, xs, states, d_ys, d_states, lengths=None):
    """Return outputs, final states and every gradient of Σ ys d_ys + Σ states d_states, as NumPy arrays.

    Layouts stay torch's own: the test converts them.
    """
    import torch

    xs = xs.clone().requires_grad_()
    states = [state.clone().requires_grad_() for state in states]
    inputs = xs if lengths is None else torch.nn.utils.rnn.pack_padded_sequence(xs, lengths, enforce_sorted=False)
    ys, finals = module(inputs, tuple(states) if len(states) == 2 else states[0])
    if lengths is not None:
        ys, _ = torch.nn.utils.rnn.pad_packed_sequence(ys, total_length=len(xs))
    finals = list(finals) if len(states) == 2 else [finals]
    loss = (ys * d_ys).sum() + sum((state * d).sum() for state, d in zip(finals, d_states, strict=True))
    loss.backward()
    named = {"xs": xs, **{f"state{k}": state for k, state in enumerate(states)}, **dict(module.named_parameters())}
    results = {"ys": ys, **{f"final{k}": final for k, final in enumerate(finals)}}
    results |= {f"d_{name}": value.grad for name, value in named.items()}
    return {name: value.detach().numpy().copy() for name, value in (named | results).items()}


def case(name, *, lengths=None, bidirectional=False, shape=(T, B, I, H), seed=0, dtype="float64"):
    """Run one module on random weights, data and cotangents."""
    import torch

    kind, options = MODULES[name]
    *_, input_size, hidden = shape
    module = getattr(torch.nn, kind)(
        input_size, hidden, bidirectional=bidirectional, dtype=getattr(torch, dtype), **options
    )
    drawn = draw(
        seed,
        [parameter.shape for parameter in module.parameters()],
        shape,
        directions=1 + bidirectional,
        num_states=1 + (kind == "LSTM"),
    )
    tensor = lambda array: torch.tensor(array, dtype=getattr(torch, dtype))
    parameters, states, d_states = ([tensor(array) for array in arrays] for arrays in drawn[:3])
    xs, d_ys = map(tensor, drawn[3:])
    for parameter, value in zip(module.parameters(), parameters, strict=True):
        parameter.data = value
    results = run(module, xs, states, d_ys, d_states, lengths)
    return results | {"d_ys": d_ys.numpy()} | {f"d_final{k}": d.numpy() for k, d in enumerate(d_states)}


def draw_stack(num_layers, directions):
    """Draw one case of `STACKS`; the parameters, a layer and a direction after another, are w_ih, w_hh, b_ih, b_hh."""
    *_, input_size, hidden = STACK_SHAPE
    shapes = []
    for layer in range(num_layers):
        width = input_size if layer == 0 else directions * hidden
        one = [(4 * hidden, width), (4 * hidden, hidden), (4 * hidden,), (4 * hidden,)]
        shapes += directions * one
    return draw(2, shapes, STACK_SHAPE, directions=directions, num_layers=num_layers)


def stack(num_layers, directions, lengths, carry):
    """Run a stack of LSTMs; return what can't be drawn again: outputs, final states, and all gradients but b_hh's."""
    import torch

    *_, input_size, hidden = STACK_SHAPE
    module = torch.nn.LSTM(input_size, hidden, num_layers, bidirectional=directions == 2, dtype=torch.float64)
    parameters, states, d_states, xs, d_ys = draw_stack(num_layers, directions)
    for parameter, value in zip(module.parameters(), parameters, strict=True):
        parameter.data = torch.tensor(value)
    states = [torch.tensor(state if carry else 0 * state) for state in states]
    results = run(module, torch.tensor(xs), states, torch.tensor(d_ys), [torch.tensor(d) for d in d_states], lengths)
    kept = lambda name: name in ("ys", "final0", "final1") or (name.startswith("d_") and "bias_hh" not in name)
    return {name: value for name, value in results.items() if kept(name)}


def whole(kind, options, seed=3):
    """Run a module on random weights, data and cotangents; return all of them, results and gradients."""
    import torch

    num_steps, batch, input_size, hidden = WEIGHTS_SHAPE
    module = getattr(torch.nn, kind)(input_size, hidden, dtype=torch.float64, **options)
    normal = np.random.default_rng(seed).normal
    tensor = lambda *shape: torch.tensor(normal(size=shape))
    for parameter in module.parameters():
        parameter.data = tensor(*parameter.shape) / 2
    directions, out = 1 + module.bidirectional, module.proj_size or hidden
    state_shapes = [(module.num_layers * directions, batch, size) for size in (out, hidden)[: 1 + (kind == "LSTM")]]
    states, d_states = ([tensor(*shape) for shape in state_shapes] for _ in range(2))
    xs, d_ys = tensor(num_steps, batch, input_size), tensor(num_steps, batch, directions * out)
    results = run(module, xs, states, d_ys, d_states)
    return results | {"d_ys": d_ys.numpy()} | {f"d_final{k}": d.numpy() for k, d in enumerate(d_states)}


def float32_error(seed):
    """Return the relative error of torch's float32 weight gradients of an LSTM against its own in float64."""
    single, double = (case("LSTM", shape=FLOAT32_SHAPE, seed=seed, dtype=dtype) for dtype in ("float32", "float64"))
    weights = ("d_weight_ih_l0", "d_weight_hh_l0", "d_bias_ih_l0")
    flat = lambda results: np.concatenate([results[name].ravel().astype(np.float64) for name in weights])
    return np.linalg.norm(flat(single) - flat(double)) / np.linalg.norm(flat(double))


def generate():
    """Return everything that torch.npz holds."""
    cases = {name: case(name) for name in MODULES}
    cases |= {f"packed {name}": case(name, lengths=LENGTHS, bidirectional=True, seed=1) for name in MODULES}
    cases |= {f"weights {name}": whole(*options) for name, options in WEIGHTS.items()}
    cases |= {f"stack {n}": stack(*options) for n, options in enumerate(STACKS)}
    arrays = {f"{name}/{key}": value for name, results in cases.items() for key, value in results.items()}
    return arrays | {"float32 errors": np.array([float32_error(seed) for seed in SEEDS])}


if __name__ == "__main__":
    np.savez_compressed(PATH, **generate())
    print(PATH, PATH.stat().st_size, "bytes")
