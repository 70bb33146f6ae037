"""Names that used to be at the top of the package, and where they moved."""

ROOMS = {
    "baselines": "GRUGates",
    "bptt": "LSTMResiduals lstm_backward lstm_forward",
    "diagnostics": (
        "CellStateTerms Comparison Departure Entry GradientCheck GradientSources LeafCheck Trace carry_jacobians "
        "cell_state_terms central_differences check_gradients compare_gradients gradient_cosine gradient_error "
        "gradient_flow gradient_sources jacobian_products lyapunov_exponents term_shares trace truncated_gradient"
    ),
    "regularize": ("Locked Noisy dropout_mask recurrent_dropout variational_dropout weight_drop zoneout zoneout_noise"),
    "rtrl": (
        "OnlineState RTRLState SnAp1Pattern cut_recurrence init_rtrl make_online_step rtrl_gradient rtrl_step "
        "snap1_pattern"
    ),
    "train": "TrainStep",
}
MOVED = {name: f"jaxlstm.{room}.{name}" for room, names in ROOMS.items() for name in names.split()}
MOVED |= {f"init_{name}": f"jaxlstm.initializers.{name}" for name in ("chrono", "flax", "keras", "torch")}
MOVED |= {
    "check_table": "str() of a jaxlstm.diagnostics.GradientCheck",
    "comparison_table": "str() of a jaxlstm.diagnostics.Comparison",
    "embedding_dropout": "embedding * jaxlstm.regularize.dropout_mask(key, rate, (len(embedding), 1), embedding.dtype)",
    "init_glorot_orthogonal": "jaxlstm.LSTM.init",
    "init_gru": "jaxlstm.GRU.init",
    "init_rnn": "jaxlstm.RNN.init",
    "join_gates": "LSTMParams(*(jnp.concatenate(blocks, -1) for blocks in zip(*gates)))",
    "unroll_chunked": "jaxlstm.unroll with gradient=jaxlstm.Chunked(...)",
}
