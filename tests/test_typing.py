"""A user's type checker infers the types that the library returns."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

USER_CODE = """\
import jax
import jaxlstm

params = jaxlstm.LSTM.init(jax.random.key(0), 5, 7)
reveal_type(params.w_hh)
carry, ys = jaxlstm.unroll(jaxlstm.LSTM, params, jax.numpy.ones((11, 5)))
reveal_type(carry)
reveal_type(carry.c)
reveal_type(jaxlstm.split_gates(params).f)
gru_carry, _ = jaxlstm.unroll(jaxlstm.GRU, jaxlstm.GRU.init(jax.random.key(0), 5, 7), ys)
gru_carry.c
jaxlstm.unroll(jaxlstm.LSTM, params, ys, gru_carry)
"""


@pytest.mark.ci
def test_mypy_infers_the_type_of_a_carry_and_rejects_another_cells_carry(tmp_path):
    path = tmp_path / "user.py"
    path.write_text(USER_CODE)
    root = Path(__file__).parents[1]
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", f"--cache-dir={root / '.mypy_cache'}", path]
    out = subprocess.run(command, capture_output=True, text=True, check=False, cwd=root).stdout
    reported = dict(re.findall(r"user\.py:(\d+): (?:note|error): (.*)", out))
    assert 'Revealed type is "jax' in reported["5"] and "Array" in reported["5"], out
    assert "jaxlstm.lstm.LSTMState" in reported["7"]
    assert "Array" in reported["8"]
    assert "jaxlstm.lstm.LSTMParams" in reported["9"]
    assert '"GRUState" has no attribute "c"' in reported["11"]
    assert "unroll" in reported["12"] and "error" in out.splitlines()[-2]
    assert len(reported) == 6, out
