"""Malformed input of every kind: a sentence and exit status 2, or a right result; nothing of anybody else changes.

`OPTPRUNE_FUZZ_SEED` names other seeds, with commas between them. `python -m tests.helpers.torture` prints all faults.
"""

import os

import pytest

from tests.helpers.torture.kinds import KINDS
from tests.helpers.torture.suite import Suite

SEEDS = [int(seed) for seed in os.environ.get("OPTPRUNE_FUZZ_SEED", "20261128").split(",")]
QUICK, ALL = range(100), range(100, 500)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_hundred_malformed_inputs(seed: int, torture: Suite) -> None:
    assert "\n\n".join(str(tried) for tried in torture.tried(seed, QUICK) if tried.faults) == ""


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", SEEDS)
def test_more_malformed_inputs(seed: int, kind: str, torture: Suite) -> None:
    tried = torture.tried(seed, ALL, [kind])
    assert "\n\n".join(str(each) for each in tried if each.faults) == ""
