"""Sweeps: the same test for many seeds. A tenth of them runs by default, all in `make test-full`, which counts them."""

import pytest


def sweep(name, count):
    """Give a test its `trial`, from 0 to `count`; those beyond a tenth are slow."""
    trials = [pytest.param(n, marks=[pytest.mark.slow] if n >= count // 10 else []) for n in range(count)]

    def decorate(test):
        return pytest.mark.sweep(name)(pytest.mark.parametrize("trial", trials)(test))

    return decorate
