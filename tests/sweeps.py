"""Sweeps: one test for many seeds. `make test` runs a fortieth of them and CI a tenth; `make test-full` runs and counts
them all."""

import pytest


def some(cases, *in_make_test):
    """Return the cases to parametrize a test with; `make test` runs those named, and CI all."""
    assert set(in_make_test) <= set(cases)
    return [case if case in in_make_test else pytest.param(case, marks=pytest.mark.ci) for case in cases]


def sweep(name, count):
    """Parametrize a test with `trial`, from 0 to `count` - 1."""

    def marks(trial):
        if trial >= count // 10:
            return [pytest.mark.slow]
        return [pytest.mark.ci] if trial >= count // 40 else []

    trials = [pytest.param(trial, marks=marks(trial)) for trial in range(count)]

    def decorate(test):
        return pytest.mark.sweep(name)(pytest.mark.parametrize("trial", trials)(test))

    return decorate
