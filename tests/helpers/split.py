"""Split of the suite: which tests run in `make test`, and which only in `make test-e2e`.

A test is marked `e2e` by hand where it is a whole run of several seconds. Tests of models and of runs are parametrised
over families, recipes, policies and more, and all combinations take long. Of these `make test` runs

- one family of each structure, and some recipes, and
- of several parameters as few combinations as hold every value once (each-choice coverage; Ammann and Offutt, 1994).

`make test-e2e` runs each of the other families and recipes once for each file of tests, in few combinations, and the
tests of a file take turns; and of the tests that are marked `e2e` by hand as few combinations as hold every value once.
All that are left are marked `slow`. Laws are not split: each accepted pair of problem and solver keeps all of them in
`make test`.
"""

from collections import defaultdict
from collections.abc import Hashable, Iterable
from pathlib import Path
from typing import Any

import pytest

Test = tuple[Path, str]
"""a file and the name of a function in it"""
ROOMS = {
    "allocation",
    "calibration",
    "cli",
    "comparison",
    "export",
    "healing",
    "measure",
    "models",
    "pruning",
    "report",
    "solvers",
}
"""folders of the tests that are split"""
LAWS = {"test_metric_laws.py", "test_solver_laws.py"}
"""files of tests that are not split"""
FAMILIES = {"gpt2", "llama", "mixtral", "opt", "phi3"}
"""one family of each structure: fused and transposed layers; Llama-like; experts; LayerNorm, learned positions and
biases; fused layers"""
RECIPES = {"depth", "experts_best", "fasp", "sparse_best", "structured_best", "wanda"}
"""one recipe of each kind: sub-blocks, experts, units, weights in a metric, units in a metric, a baseline"""


def _key(value: object) -> Hashable:
    """Return what identifies a value of a parameter."""
    try:
        hash(value)
    except TypeError:
        return id(value)
    return type(value), value


def _minor(item: pytest.Function, names: dict[Hashable, str]) -> set[str]:
    """Return the families and recipes of a test that do not run every day."""
    values = item.callspec.params.values() if hasattr(item, "callspec") else ()
    found = {names[_key(value)] for value in values if _key(value) in names}
    return found - FAMILIES - RECIPES


def chosen(combinations: list[dict[str, Any]]) -> list[int]:
    """Return the places of few combinations in which every value of every parameter occurs, chosen greedily."""
    values = [{(name, _key(value)) for name, value in each.items()} for each in combinations]
    missing = set[tuple[str, Hashable]]().union(*values)
    places = []
    while missing:
        best = max(range(len(values)), key=lambda place: len(values[place] & missing))
        missing -= values[best]
        places.append(best)
    return sorted(places)


def turns_of(tests: dict[Test, list[pytest.Function]], names: dict[Hashable, str]) -> dict[Test, set[str]]:
    """Return which of the other families and recipes each test runs: one test of a file runs each, and all as many."""
    turns: dict[Test, set[str]] = {test: set() for test in tests}
    able: dict[tuple[Path, str], list[Test]] = defaultdict(list)
    for test, group in tests.items():
        running = (item for item in group if not item.get_closest_marker("slow"))
        for name in sorted({name for item in running for name in _minor(item, names)}):
            able[test[0], name].append(test)
    for (_, name), those in sorted(able.items(), key=lambda entry: len(entry[1])):
        turns[min(those, key=lambda test: len(turns[test]))].add(name)
    return turns


def split(items: Iterable[pytest.Item], names: dict[Hashable, str]) -> None:
    """Mark as `e2e`, and some as `slow` too, the combinations of parameters that do not run every day.

    names: the families and recipes by the keys of the values that stand for them.
    """
    groups: dict[Test, list[pytest.Function]] = defaultdict(list)
    for item in items:
        here = item.path.parent.name in ROOMS and item.path.name not in LAWS
        if here and isinstance(item, pytest.Function) and hasattr(item, "callspec"):
            groups[item.path, item.originalname].append(item)
    turns = turns_of(groups, names)
    for test, group in groups.items():
        everyday = [item for item in group if not (item.get_closest_marker("slow") or item.get_closest_marker("e2e"))]
        # Where no representative takes part, the first combination stands for the others.
        major = [item for item in everyday if not _minor(item, names)] or everyday[:1]
        kept = {major[place] for place in chosen([item.callspec.params for item in major])}
        rest = [item for item in group if not item.get_closest_marker("slow") and item not in kept]
        minor = [(item, found) for item in rest if (found := _minor(item, names) & turns[test])]
        again = [item for item in rest if not _minor(item, names)]
        once = {minor[place][0] for place in chosen([dict.fromkeys(found) for _, found in minor])}
        if not everyday:
            once |= {again[place] for place in chosen([item.callspec.params for item in again])}
        for item in everyday:
            if item not in kept:
                item.add_marker(pytest.mark.e2e)
        for item in rest:
            if item not in once:
                item.add_marker(pytest.mark.slow)


def names_of() -> dict[Hashable, str]:
    """Return every family and recipe by the keys of the values that stand for them in parameters."""
    from optprune.recipe import recipe_names
    from tests.helpers.tiny_models import ALL_MODELS

    known = {_key(name): name for name in (*ALL_MODELS, *recipe_names())}
    return known | {_key(make): name for name, make in ALL_MODELS.items()}
