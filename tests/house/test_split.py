"""What `make test` leaves to `make test-e2e`: combinations, and never a value of a parameter as a whole."""

from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from optprune.recipe import recipe_names
from tests.helpers.split import FAMILIES, LAWS, RECIPES, ROOMS, chosen, turns_of
from tests.helpers.tiny_models import ALL_MODELS


def test_what_runs_every_day_is_there(pytestconfig) -> None:
    assert set(ALL_MODELS) >= FAMILIES
    assert set(recipe_names()) >= RECIPES
    tests = pytestconfig.rootpath / "tests"
    assert {path.name for path in tests.iterdir() if path.is_dir()} >= ROOMS
    assert {path.name for path in tests.glob("*/*.py")} >= LAWS


def test_every_value_of_every_parameter_occurs_in_few_combinations() -> None:
    every = [dict(zip("abc", values, strict=True)) for values in product((1, 2, 3), ("x", "y"), ([], {}, 1.0, True))]
    places = chosen(every)
    assert len(places) <= 6
    for name in "abc":
        values = [(type(each[name]), each[name]) for each in every]
        assert all((type(value), value) in [values[place] for place in places] for _, value in values)


def test_one_test_stays_of_parameters_that_go_together() -> None:
    assert chosen([{"a": 1, "b": 2}]) == [0]
    assert chosen([{"a": 1, "b": 2}, {"a": 1, "b": 2}]) == [0]
    assert chosen([]) == []


@pytest.mark.parametrize("slow", [None, "a mark"])
def test_tests_of_a_file_take_turns_with_the_other_families(slow: Any) -> None:
    def item(*families: str) -> Any:
        params = dict(zip("ab", families, strict=False))
        return SimpleNamespace(callspec=SimpleNamespace(params=params), get_closest_marker=lambda name: slow)

    names = {(str, name): name for name in ("llama", "gemma2", "phi4", "qwen3", "olmo2")}
    every = [item("llama"), item("gemma2"), item("phi4"), item("qwen3", "olmo2")]
    one, other = Path("one.py"), Path("other.py")
    tests = {(one, "first"): every, (one, "second"): every, (one, "third"): every[:2], (other, "first"): every[1:2]}
    turns = turns_of(tests, names)
    if slow:
        assert not any(turns.values())
        return
    assert turns[other, "first"] == {"gemma2"}
    assert sorted(name for test, found in turns.items() if test[0] == one for name in found) == [
        *("gemma2", "olmo2", "phi4", "qwen3")
    ]
    assert all(len(found) <= 2 for found in turns.values())
