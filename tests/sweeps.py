"""Sweeps: the same test for many seeds. A fortieth of them runs in `make test`, a tenth in CI, and all in `make
test-full`, which counts them."""

import pytest


def sweep(name, count):
    """Give a test its `trial`, from 0 to `count`; those beyond a fortieth are for CI, beyond a tenth slow."""
    marks = lambda n: [pytest.mark.slow] if n >= count // 10 else [pytest.mark.ci] if n >= count // 40 else []
    trials = [pytest.param(n, marks=marks(n)) for n in range(count)]

    def decorate(test):
        return pytest.mark.sweep(name)(pytest.mark.parametrize("trial", trials)(test))

    return decorate
