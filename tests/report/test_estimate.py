"""Remaining time of a run: within a factor of two after its first tenth, even for wrong expectations."""

import random
from collections.abc import Iterator

import pytest

from optprune.report.estimate import TRUSTED_SHARE, TimeLeft
from optprune.report.phases import BUDGET, CHECKING, LOADING, METRIC, PRUNING, SAVING, TOKENISING

AROUND = {TOKENISING: 8.0, LOADING: 5.0, SAVING: 6.0, CHECKING: 12.0}
"""the seconds of the phases that do not compute"""
RUNS = {
    "fasp": {METRIC: 0.0, BUDGET: 0.0, PRUNING: 200.0},
    "sparse_best": {METRIC: 150.0, BUDGET: 120.0, PRUNING: 500.0},
    "structured_best": {METRIC: 100.0, BUDGET: 250.0, PRUNING: 150.0},
}
BLOCKS = 24
ORDER = (TOKENISING, LOADING, METRIC, BUDGET, PRUNING, SAVING, CHECKING)


class Clock:
    def __init__(self) -> None:
        self.now = 5000.0

    def __call__(self) -> float:
        return self.now


def moments(
    clock: Clock, left: TimeLeft, taken: dict[str, float], chance: random.Random
) -> Iterator[tuple[float, float, bool]]:
    """A run whose phases take so long: what is left, what is estimated to be, and whether a block is done."""
    items = [(phase, done) for phase in taken for done in range(BLOCKS if phase in RUNS["fasp"] else 1)]
    seconds = {item: taken[item[0]] / (BLOCKS if item[0] in RUNS["fasp"] else 1) for item in items}
    for phase, done in items:
        seconds[phase, done] *= chance.uniform(0.7, 1.3) if phase in RUNS["fasp"] else 1.0
    seconds[PRUNING, BLOCKS - 1] *= 0.6  # nothing travels past the last block
    real, seen = sum(seconds.values()), False
    for phase in taken:
        left.begin(phase)
        count = sum(name == phase for name, _ in items)
        left.advance(phase, "step", 0.0)
        for done in range(count):
            for _ in range(4):
                clock.now += seconds[phase, done] / 4
                real -= seconds[phase, done] / 4
                yield real, left.seconds(), seen
            left.advance(phase, "step", (done + 1) / count)
            seen = seen or (phase in RUNS["fasp"] and seconds[phase, done] > 0)
        left.end()
    assert left.seconds() == 0.0


@pytest.mark.parametrize("speed", [0.1, 0.5, 1.0, 2.0, 10.0])
@pytest.mark.parametrize("run", RUNS)
def test_after_a_tenth_the_time_left_is_at_most_twice_wrong(run: str, speed: float) -> None:
    """The machine is `speed` times what was assumed, and each phase another third off."""
    for seed in range(20):
        chance, clock = random.Random(seed), Clock()
        expected = {phase: AROUND.get(phase, 0.0) or RUNS[run][phase] for phase in ORDER}
        taken = {
            phase: seconds * chance.uniform(0.75, 1.33) / speed
            if phase in RUNS[run]
            else seconds * chance.uniform(0.9, 1.1)
            for phase, seconds in expected.items()
        }
        told = list(moments(clock, TimeLeft(expected, clock), taken, chance))
        whole = told[0][0]
        slack = 0.05 * whole  # towards the end, where twice of what is left is next to nothing
        for real, estimated, seen in told:
            # How fast the machine is shows in the first block.
            if real < 0.9 * whole and seen:
                assert real / 2 - slack <= estimated <= 2 * real + slack, (seed, real, whole)


def test_a_phase_goes_by_its_own_speed_once_enough_of_it_is_done() -> None:
    clock = Clock()
    left = TimeLeft({PRUNING: 10.0}, clock)
    assert left.seconds() == 10.0
    left.begin(PRUNING)
    left.advance(PRUNING, "pruning", 0.0)
    clock.now += 30.0
    left.advance(PRUNING, "pruning", TRUSTED_SHARE / 4)
    whole = (120.0 / TRUSTED_SHARE) ** 0.25 * (10.0 * (12.0 / TRUSTED_SHARE) ** 0.25) ** 0.75
    assert left.seconds() == pytest.approx(whole * (1 - TRUSTED_SHARE / 4))
    clock.now += 90.0
    left.advance(PRUNING, "pruning", TRUSTED_SHARE)
    assert left.seconds() == pytest.approx(120.0 / TRUSTED_SHARE * (1 - TRUSTED_SHARE))
    clock.now += 15.0
    assert left.seconds() == pytest.approx(120.0 / TRUSTED_SHARE * (1 - TRUSTED_SHARE) - 15.0)


def test_what_takes_longer_than_expected_does_not_leave_nothing() -> None:
    clock = Clock()
    left = TimeLeft({PRUNING: 10.0}, clock)
    left.begin(PRUNING)
    left.advance(PRUNING, "pruning", 0.0)
    clock.now += 100.0
    assert left.seconds() == 90.0
    left.advance(PRUNING, "pruning", 0.25)
    clock.now += 500.0  # the second of four takes longer than the first: two more are left at least
    assert left.seconds() == pytest.approx(200.0)


def test_phases_to_come_take_as_much_longer_as_those_of_their_kind() -> None:
    clock = Clock()
    left = TimeLeft({LOADING: 1.0, METRIC: 10.0, PRUNING: 40.0, SAVING: 7.0}, clock)
    for phase, seconds in ((LOADING, 50.0), (METRIC, 30.0)):
        left.begin(phase)
        left.advance(phase, "step", 0.0)
        clock.now += seconds
        left.advance(phase, "step", 1.0)
        left.end()
    assert left.seconds() == pytest.approx(3 * 40.0 + 7.0)


def test_blocks_that_are_passed_by_say_nothing_of_those_to_prune() -> None:
    """A run that goes on: half of its blocks are done, and each is passed by in a hundredth of the time."""
    clock = Clock()
    left = TimeLeft({PRUNING: 100.0, SAVING: 7.0}, clock)
    left.begin(PRUNING)
    for done in range(6):
        left.advance(PRUNING, "passing finished blocks by", done / 5, 0.5, 0.5)
        assert left.seconds() == pytest.approx(50.0 + 7.0 + 0.1 * (5 - done) * (done > 0))
        clock.now += 0.1 * (done < 5)
    for done in range(5, 11):
        left.advance(PRUNING, "pruning", done / 10)
        assert left.seconds() == pytest.approx((10 - done) * (20.0 if done > 5 else 10.0) + 7.0)
        clock.now += 20.0


def test_a_phase_that_an_earlier_run_has_done_says_nothing() -> None:
    clock = Clock()
    left = TimeLeft({METRIC: 100.0, PRUNING: 100.0}, clock)
    left.begin(METRIC)
    clock.now += 0.1
    left.end()
    assert left.seconds() == 100.0


def test_nothing_is_known_before_anything_is() -> None:
    clock = Clock()
    left = TimeLeft({}, clock)
    assert not left.known
    left.advance("evaluating", "evaluating", 0.0)
    clock.now += 10.0
    assert not left.known
    left.advance("evaluating", "evaluating", 0.25)
    assert left.known
    assert left.seconds() == pytest.approx(30.0)


def test_a_machine_that_becomes_busy_is_noticed() -> None:
    """Blocks take three times as long from the fourth tenth on: halfway the rest is at most 1.5 times underrated."""
    clock = Clock()
    left = TimeLeft({PRUNING: 100.0}, clock)
    left.begin(PRUNING)
    left.advance(PRUNING, "pruning", 0.0)
    for done in range(1, 51):
        clock.now += 1.0 if done <= 30 else 3.0
        left.advance(PRUNING, "pruning", done / 100)
    assert 150 / 1.5 <= left.seconds() <= 150


def test_what_is_learned_on_the_way_counts_for_phases_to_come() -> None:
    left = TimeLeft({SAVING: 7.0}, Clock())
    left.expect({PRUNING: 40.0})
    assert left.seconds() == 47.0
