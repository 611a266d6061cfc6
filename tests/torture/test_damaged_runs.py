"""The folder of a run that is not as it was left: refused by name, or measured again to the same bytes."""

import pytest

from tests.helpers.torture.damages import DAMAGES, Damaging

QUICK = {
    *("a flipped bit in the weights of a block", "an edited division", "an edited record of a block", "no facts"),
    *("a state in place of the best weights", "healing at step -1", "a record of no block"),
}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in DAMAGES]
)
def test_a_damaged_run_never_ends_otherwise(name: str, damaging: Damaging) -> None:
    assert damaging.faults(name) == []
