"""Every fault that is put into a copy of the project is caught, by a test that passes without it."""

import pytest

from faults import FAULTS, ROOT, caught_by, copy_of_the_project, first_failure
from jobs import UNCHECKED
from sweeps import sweep


def test_every_fault_has_one_place():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) >= 20
    for fault in FAULTS:
        assert (ROOT / fault.file).read_text(encoding="utf-8").count(fault.right) == 1, fault.name
        assert (ROOT / "tests" / fault.tests).exists(), fault.name


caught = {}  # fault -> test


@pytest.mark.ci
@sweep("faults caught", len(FAULTS))
def test_a_fault_is_caught(trial, tmp_path, record_property):
    fault = FAULTS[trial]
    caught[fault.name] = caught_by(fault, tmp_path, **UNCHECKED)
    record_property("caught", f"{fault.name}: {caught[fault.name]}")
    assert caught[fault.name], f"no test fails with: {fault.name}"


@pytest.mark.ci
def test_what_caught_them_passes_without_them(tmp_path):
    if not caught:
        pytest.skip("no fault was put in")
    assert first_failure(copy_of_the_project(tmp_path), *sorted(set(caught.values())), **UNCHECKED) is None
