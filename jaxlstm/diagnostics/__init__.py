"""Check gradients and see where they come from, for any cell.

Is a gradient right? `check_gradients` (any model), `compare_gradients` (a recurrent cell, by several methods).
Where does it come from? `gradient_flow`, `gradient_sources`, `cell_state_terms`, `truncated_gradient`.
What does the net do? `trace`, `carry_jacobians`, `lyapunov_exponents`.
Where does it rest? `fixed_points`, `linearize`; `closed_loop` for a net that feeds itself; `principal_components`.
"""

from jaxlstm.diagnostics.comparison import Comparison, Departure, compare_gradients
from jaxlstm.diagnostics.differences import (
    Entry,
    GradientCheck,
    LeafCheck,
    central_differences,
    check_gradients,
    gradient_error,
)
from jaxlstm.diagnostics.dynamics import (
    CellStateTerms,
    Trace,
    carry_jacobians,
    cell_state_terms,
    jacobian_products,
    lyapunov_exponents,
    term_shares,
    trace,
    truncated_gradient,
)
from jaxlstm.diagnostics.flow import gradient_flow
from jaxlstm.diagnostics.sources import GradientSources, gradient_cosine, gradient_sources
from jaxlstm.diagnostics.statespace import (
    ClosedLoopParams,
    FixedPoints,
    Linearization,
    PrincipalComponents,
    closed_loop,
    fixed_points,
    linearize,
    principal_components,
    sample_carries,
    stacked,
)

# fmt: off
__all__ = [  # noqa: RUF022
    "check_gradients", "GradientCheck", "LeafCheck", "Entry", "gradient_error", "central_differences",
    "compare_gradients", "Comparison", "Departure",
    "gradient_flow", "gradient_sources", "GradientSources", "gradient_cosine", "truncated_gradient",
    "cell_state_terms", "CellStateTerms", "term_shares",
    "trace", "Trace", "carry_jacobians", "jacobian_products", "lyapunov_exponents",
    "fixed_points", "FixedPoints", "sample_carries", "linearize", "Linearization",
    "closed_loop", "ClosedLoopParams", "stacked", "principal_components", "PrincipalComponents",
]
