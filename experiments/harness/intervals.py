"""Means over a few seeds and their 95 % intervals."""

from collections.abc import Sequence

import numpy as np
from scipy import stats


def of_mean(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the mean of some seeds and its interval, by Student's t.

    >>> print("%.2f (%.2f to %.2f)" % of_mean([1.0, 2.0, 3.0]))
    2.00 (-0.48 to 4.48)
    """
    mean, half = float(np.mean(values)), 0.0
    if len(values) > 1:
        half = float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return mean, mean - half, mean + half


def of_share(successes: int, trials: int) -> tuple[float, float, float]:
    """Return the share of trials that succeeded and its interval, by Wilson's method.

    >>> print("%.2f (%.2f to %.2f)" % of_share(10, 10))
    1.00 (0.72 to 1.00)
    """
    low, high = stats.binomtest(successes, trials).proportion_ci(method="wilson")
    return successes / trials, float(low), float(high)


def shown(values: Sequence[float], digits: int = 2) -> str:
    """Return the mean and its interval as a table shows them; of one seed, the value alone.

    >>> shown([1.0, 2.0, 3.0]), shown([1.0])
    ('2.00 (-0.48 to 4.48)', '1.00')
    """
    mean, low, high = (f"{value:.{digits}f}" for value in of_mean(values))
    return f"{mean} ({low} to {high})" if len(values) > 1 else mean
