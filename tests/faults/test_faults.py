"""The fault suite in small: one trial of two faults; `make faults` runs twenty of every one."""

import pytest
import trials

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]
HARDEST = [("kill -9 of the kernel", "evaluation/exact"), ("damaged artifact", "evaluation/exact")]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A finished small run and the seconds of its stages."""
    stages = dict.fromkeys(stage for _, stage in HARDEST)
    return trials.run_undisturbed(tmp_path_factory.mktemp("faults") / "small", [*stages])


@pytest.mark.parametrize(("fault", "stage"), HARDEST)
def test_nothing_is_lost(fault, stage, undisturbed):
    tried = (trials.trial(fault, stage, seed, undisturbed) for seed in range(5))
    one = next((one for one in tried if one), None)
    assert one and one.lost == "", one
