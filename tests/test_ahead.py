"""What compilers for accelerators say of the gradient: how it is counted, and what was measured."""

import json
from pathlib import Path

import pytest

from benchmarks import ahead

# Two fusions, and a loop of 16 turns with one fusion and a loop of 64 turns with a copy and a matmul in it.
PROGRAM = """HloModule jit_f

%fused (p: f32[3]) -> f32[3] {
  ROOT %add.1 = f32[3]{0} add(%p, %p)
}

%inner (arg: (s32[], f32[3])) -> (s32[], f32[3]) {
  %arg = (s32[], f32[3]{0}) parameter(0)
  %x = f32[3]{0} get-tuple-element(%arg), index=1
  %copy.1 = f32[3]{0} copy(%x)
  %gemm = (f32[3]{0}, s8[64]{0}) custom-call(%copy.1), custom_call_target="__cublas$gemm"
  ROOT %t = (s32[], f32[3]{0}) tuple(%i, %gemm)
}

%outer (arg: (s32[], f32[3])) -> (s32[], f32[3]) {
  %fusion.9 = f32[3]{0} fusion(%x), kind=kLoop, calls=%fused
  ROOT %while.2 = (s32[], f32[3]{0}) while(%t), body=%inner, backend_config={"known_trip_count":{"n":"64"}}
}

%graph (p: f32[3]) -> f32[3] {
  ROOT %fusion.3 = f32[3]{0} fusion(%p), kind=kLoop, calls=%fused
}

ENTRY %main (p: f32[3]) -> f32[3] {
  %p = f32[3]{0} parameter(0)
  %fusion.1 = f32[3]{0} fusion(%p), kind=kLoop, calls=%fused
  %called = f32[3]{0} call(%fusion.1), to_apply=%graph
  %while.1 = (s32[], f32[3]{0}) while(%t), condition=%c, body=%outer, backend_config={"known_trip_count":{"n":"16"}}
  ROOT %bitcast.1 = f32[3]{0} bitcast(%called)
}
"""


def test_a_kernel_in_a_loop_counts_once_per_turn():
    assert ahead.kernels(PROGRAM) == 2 + 16 * (1 + 64 * 2)


def test_the_table_in_the_docs_is_the_committed_result():
    root = Path(ahead.__file__).parents[1]
    result = json.loads((root / "benchmarks" / "results" / "ahead.json").read_text("utf-8"))
    page = (root / "docs" / "benchmark.md").read_text("utf-8")
    assert result["devices"].keys() == ahead.DEVICES.keys()
    assert ahead.table(result) in page
    for rows in result["devices"].values():
        large = [row["found"] for row in rows if tuple(row["shape"]) == ahead.LARGE]
        assert len(large) == 2
        for found in large:  # float32, bfloat16
            assert found["jaxlstm"]["bytes"] < 0.5 * found["fifteen lines"]["bytes"]
    for row in result["devices"]["NVIDIA H100"]:
        assert row["found"]["jaxlstm"]["kernels"] < 0.34 * row["found"]["fifteen lines"]["kernels"]


def test_without_a_compiler_for_an_accelerator_it_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setattr(ahead, "DEVICES", {"a device": ("no-such-package", {})})
    with pytest.raises(SystemExit, match="no compiler for an accelerator is installed; pip install libtpu"):
        ahead.main(workdir=str(tmp_path / "a"))
