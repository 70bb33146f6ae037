"""Tests run in float64 unless they say otherwise, with strict promotion, on two (pretended) CPU devices."""

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 2)
jax.config.update("jax_enable_x64", True)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture(autouse=True)
def documented_code_runs_as_users_run_it(request):
    """Doctests and code blocks run with JAX's own defaults."""
    if isinstance(request.node, pytest.DoctestItem) or request.node.get_closest_marker("documented"):
        with jax.enable_x64(False), jax.numpy_dtype_promotion("standard"):
            yield
    else:
        yield


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """The environment of a process that compiles nothing that another one of these tests has compiled."""
    shared = tmp_path_factory.getbasetemp().parent / "compiled"
    return {"JAX_COMPILATION_CACHE_DIR": str(shared), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}


def pytest_addoption(parser):
    parser.addoption("--seed", type=int, default=0, help="of the sweeps")


@pytest.fixture(scope="session")
def seed(request):
    return request.config.getoption("seed")
