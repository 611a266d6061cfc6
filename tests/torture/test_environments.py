"""A run that has less than it needs ends rightly, or by a sentence, and goes on where it has enough."""

from pathlib import Path

import pytest

from tests.helpers.torture.environments import ENVIRONMENTS, faults
from tests.helpers.torture.suite import Suite

QUICK = {"closed stderr", "10 open files", "1000 MB of addresses"}


@pytest.mark.e2e
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in QUICK else pytest.mark.slow) for name in ENVIRONMENTS]
)
def test_less_than_a_run_needs(name: str, torture: Suite, tmp_path: Path) -> None:
    assert faults(torture.stock, ENVIRONMENTS[name], tmp_path) == []
