"""A long command that is ended at any moment goes on by the same words, and ends with the bytes of one that was not."""

import pytest

from tests.helpers.torture.killing import LONG, Killing
from tests.helpers.torture.moments import FULL, INTERRUPT, KILL, TERMINATE

SEEDS = {
    **{"fasp in shards": 5, "alps under intra": 4, "sparse_best": 4, "structured_best": 6, "two workers": 4},
    **{"fewer tokens": 4, "heal": 6, "compare": 5, "export gguf": 4, "export onnx": 3},
}
"""how often each command is ended: 45 times in all"""
QUICK = {("fasp in shards", 0): KILL, ("export gguf", 0): KILL}
EVERY = [(name, seed) for name in LONG for seed in range(SEEDS[name])]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "seed", "how"),
    [
        pytest.param(name, seed, QUICK.get((name, seed)), marks=[] if (name, seed) in QUICK else pytest.mark.slow)
        for name, seed in EVERY
    ],
)
def test_what_was_ended_goes_on_to_the_same_bytes(name: str, seed: int, how: str | None, killing: Killing) -> None:
    assert killing.faults(name, seed, how) == []


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "how"),
    [
        ("fasp in shards", FULL),
        ("heal", TERMINATE),
        pytest.param("heal", FULL, marks=pytest.mark.slow),
        pytest.param("compare", FULL, marks=pytest.mark.slow),
        pytest.param("compare", INTERRUPT, marks=pytest.mark.slow),
    ],
)
def test_what_was_stopped_or_had_no_room_goes_on(name: str, how: str, killing: Killing) -> None:
    assert killing.faults(name, 100, how) == []
