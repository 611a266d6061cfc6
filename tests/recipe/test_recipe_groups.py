"""A recipe's fields are in groups; whatever way one is spelled, from wherever it comes, it is the same recipe."""

from typing import Any

import pytest
from optprune.recipe.aliases import ALIASES
from optprune.recipe.fields import recipe_fields, spellings

from optprune.cli import main
from optprune.errors import InputError
from optprune.models import UNITS, Blocks, Weights
from optprune.patterns import InGroups
from optprune.recipe import Recipe, load_recipe, make_recipe, recipe_names
from optprune.recipe.groups import GROUPS, DepthSearch, FisherMetric, GlobalBudget, Recovery, Refit, UniformShares
from tests.helpers.attempts import Attempt

VALUES: dict[str, Any] = {
    "pattern": "rows",
    "width_multiple": 16,
    "budget": "flops",
    "budget_tokens": 1,
    "probe_tokens": 64,
    "least_kept": 0.5,
    "most_kept": 0.9,
    "depth_parts": "layers",
    "depth_score": "influence",
    "depth_tokens": 64,
    "output_metric": "diagonal",
    "metric_tokens": 128,
    "metric_width": 64,
    "metric_damping": 0.5,
    "held_out": 0.25,
    "refit_damping": [0.5, 1.0],
    "recovery": 2,
    "recovery_steps": 3,
    "recovery_tokens": 256,
    "recovery_damping": 0.5,
    "matching": 2,
    "matching_solver": "lbfgs",
    "matching_rate": 0.5,
    "matching_sequences": 3,
    "matching_pull": 0.5,
    "matching_tokens": 256,
}
"""of every flat name one that is no default"""
FLAT: dict[str, Any] = {
    "objective": None,
    "pattern": "unstructured",
    "propagation": "pruned",
    "damping": 0.01,
    "fit_bias": True,
    "output_metric": "none",
    "metric_tokens": 16384,
    "metric_width": None,
    "metric_damping": 0.01,
    "allocation": "uniform",
    "budget": "parameters",
    "budget_tokens": 512,
    "probe_tokens": 0,
    "least_kept": 0.2,
    "most_kept": 0.8,
    "width_multiple": None,
    "depth_parts": "both",
    "depth_score": "perplexity",
    "depth_tokens": 1024,
    "held_out": 0.0,
    "refit_damping": [],
    "recovery": 0,
    "recovery_steps": 8,
    "recovery_tokens": None,
    "recovery_damping": 0.1,
    "strict": False,
    "seed": 0,
}
"""what every recipe.yaml of 31 fields held that was not set otherwise"""
OLD: dict[str, dict[str, Any]] = {
    "depth": {"units": "blocks", "sparsity": 0.2, "solver": None},
    "wanda": {
        **{"units": "weights", "pattern": "rows", "objective": "sparse", "solver": ["wanda"]},
        **{"sparsity": 0.5, "fit_bias": False},
    },
    "spap": {
        **{"units": "mlp", "objective": "linked", "solver": ["spap", "restore"], "sparsity": 0.2},
        **{"held_out": 0.0625, "recovery": 1, "recovery_steps": 1, "recovery_tokens": 12288},
    },
    "structured_best": {
        **{"units": "all", "solver": [{"greedy_obs": {"batch": 8}}, "restore"], "sparsity": 0.2},
        **{"output_metric": "full", "metric_tokens": 8192, "metric_damping": 0.1},
        **{"allocation": "global", "probe_tokens": 512, "least_kept": 0.45},
        **{"held_out": 0.125, "refit_damping": [0.01, 0.03, 0.1, 0.3, 1.0, 3.0]},
    },
}


def context(name: str) -> dict[str, Any]:
    """Settings in which a flat name does something."""
    found = {"allocation": "depth" if name.startswith("depth") else "global"} if name != "width_multiple" else {}
    found |= {"units": "weights"} if name == "pattern" else {}
    found |= {"output_metric": "full"} if name.startswith("metric") else {}
    found |= {"held_out": 0.5} if name.startswith(("re", "matching")) else {}
    switch = name.partition("_")[0]
    return found | ({switch: 1} if name.startswith(("recovery_", "matching_")) else {})


# -- spellings


@pytest.mark.parametrize("name", ALIASES)
def test_a_flat_name_is_its_path(name: str) -> None:
    value, rest = VALUES[name], context(name)
    recipe = Recipe(rest, {name: value})
    assert recipe == Recipe(rest, {ALIASES[name]: value}) == make_recipe({**rest, name: value})
    assert recipe == Recipe(**rest, **{name: value})
    assert recipe != Recipe(rest)


@pytest.mark.parametrize("name", OLD)
def test_a_file_of_31_flat_fields_is_the_recipe_it_was(name: str) -> None:
    recipe = load_recipe(name)
    described = {"name": recipe.name, "summary": recipe.summary, "source": recipe.source}
    assert make_recipe({**described, **FLAT, **OLD[name]}) == recipe


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ({"metric": "full"}, {"metric": {"kind": "full"}}),
        ({"metric": FisherMetric(kind="full")}, {"metric.kind": "full"}),
        ({"metric": None}, {"metric": "none"}),
        ({"refit": 0.125}, {"refit": {"held_out": 0.125}}),
        ({"refit": Refit(held_out=0.125, recovery=Recovery(rounds=2))}, {"refit.held_out": 0.125, "recovery": 2}),
        ({"refit": {"held_out": 0.125, "recovery": 2}}, {"refit": 0.125, "refit.recovery.rounds": 2}),
        ({"refit": 0.125, "recovery": {"rounds": 2, "steps": 3}}, {"refit": 0.125, "recovery": 2, "recovery_steps": 3}),
        ({"allocation": "global"}, {"allocation": GlobalBudget()}),
        ({"units": {"weights": "2:4"}, "sparsity": 0.5}, {"units": "weights", "pattern": "2:4", "sparsity": 0.5}),
        ({"units": Weights(InGroups(2, 4)), "sparsity": 0.5}, {"units": {"weights": "2:4"}, "sparsity": 0.5}),
    ],
    ids=str,
)
def test_a_group_may_be_told_by_one_value(value: dict[str, Any], same: dict[str, Any]) -> None:
    assert Recipe(value) == Recipe(same)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"output_metric": "full", "metric": "full"}, "'metric.kind' is given twice, as output_metric and as metric:"),
        ({"metric": {"width": 8}, "metric_width": 9}, "'metric.width' is given twice, as metric.width and as metric_"),
        ({"refit": {"recovery": 1}, "recovery": 2}, "as refit.recovery and as recovery: give one"),
        ({"units": {"weights": "rows"}, "pattern": "2:4"}, "'units.weights' is given twice, as units and as pattern"),
        ({"units": Weights(InGroups(2, 4)), "pattern": "rows"}, "the pattern rows is not 2:4, that of the units"),
    ],
    ids=str,
)
def test_one_thing_spelled_twice_is_one_error(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Recipe(settings)


@pytest.mark.usefixtures("no_weights")
def test_the_command_takes_every_spelling(attempt: Attempt) -> None:
    twice = attempt.fails(attempt.command("--set", "allocation.multiple=4", width_multiple=8))
    assert "'allocation.multiple' is given twice, as width_multiple and as allocation.multiple: give one" in twice
    for spelling in ("metric_width", "metric.width"):
        sentence = attempt.fails(attempt.command("--set", "metric=full", "--set", f"{spelling}=0"))
        assert f"the recipe field '{spelling}' cannot be 0: Input should be greater than or equal to 1" in sentence


# -- over a recipe


def test_what_overrides_goes_into_the_group_field_by_field() -> None:
    recipe = load_recipe("structured_best", {"metric_width": 64, "recovery": 1, "allocation.most": 0.9})
    assert recipe.metric == FisherMetric(kind="full", tokens=8192, damping=0.1, width=64)
    assert recipe.allocation == GlobalBudget(probe_tokens=512, least=0.45, most=0.9)
    before = load_recipe("structured_best").refit
    assert before is not None and recipe.refit == before.model_copy(update={"recovery": Recovery(rounds=1)})


def test_another_kind_keeps_what_both_kinds_have() -> None:
    narrow = load_recipe("structured_best", {"width_multiple": 4}).to_dict()
    assert Recipe(narrow, {"allocation": "uniform"}).allocation == UniformShares(multiple=4)
    assert Recipe(narrow, {"output_metric": "diagonal"}).metric == FisherMetric(
        kind="diagonal", tokens=8192, damping=0.1
    )
    plain = Recipe(narrow, {"metric": "none", "refit": "none"})
    assert plain.metric is None and plain.refit is None
    assert Recipe({"width_multiple": 4}, allocation="global").allocation == GlobalBudget(multiple=4)


def test_units_that_override_have_their_own_pattern() -> None:
    assert load_recipe("wanda", {"pattern": "4:8"}).units == Weights(InGroups(4, 8))
    assert load_recipe("wanda", {"units": "weights"}).units == load_recipe("wanda").units
    assert load_recipe("wanda", {"units": {"weights": "2:4"}}).units == Weights(InGroups(2, 4))
    assert load_recipe("wanda", {"units": "mlp", "objective": None}).units == UNITS["mlp"]
    with pytest.raises(InputError, match="the pattern rows is one of single weights, but units are mlp"):
        Recipe({"units": "weights", "pattern": "rows"}, units="mlp")


def test_whole_sub_blocks_are_of_depth_and_depth_of_whole_sub_blocks() -> None:
    assert Recipe(units="blocks").allocation == DepthSearch()
    assert isinstance(Recipe(allocation="depth").units, Blocks)
    assert load_recipe("structured_best", {"units": "blocks", "depth_parts": "mlp"}).allocation == DepthSearch(
        parts="mlp"
    )
    assert Recipe(load_recipe("depth").to_dict(), units="mlp").allocation == UniformShares()
    assert load_recipe("fasp", {"allocation": "depth"}) == load_recipe("fasp", {"units": "blocks"})
    for settings in ({"units": "mlp", "allocation": "depth"}, {"units": "blocks", "allocation.kind": "global"}):
        with pytest.raises(InputError, match="units 'blocks' and the allocation 'depth' go together, not "):
            Recipe(settings)
    with pytest.raises(InputError, match="'allocation' cannot be 'widely': use one of uniform, global, depth"):
        Recipe(units="blocks", allocation="widely")


# -- what a group has no use for

NEEDING = ("budget", "refit_damping", "recovery", "matching")
"""flat names that are refused without their group"""


@pytest.mark.parametrize("name", [name for name in ALIASES if name not in NEEDING])
def test_a_flat_name_without_its_group_does_nothing(name: str) -> None:
    if name in ("pattern", "width_multiple", "output_metric", "held_out"):
        return  # never without
    assert Recipe({name: VALUES[name]}) == Recipe()
    with pytest.raises(InputError, match=f"^the recipe field '{name}' cannot be 'some': "):
        Recipe({name: "some"})


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"metric": {"width": 64}}, "'metric.width' does nothing without metric.kind diagonal or full: set that too"),
        ({"metric": {"kind": "none", "width": 64}}, "'metric.width' does nothing without metric.kind diagonal or full"),
        ({"allocation.least": 0.3}, "'allocation.least' does nothing without allocation.kind global: set that too, or"),
        ({"allocation": {"kind": "global", "parts": "mlp"}}, "does nothing without allocation.kind depth"),
        ({"refit.recovery.steps": 3}, "'refit.recovery.steps' does nothing without refit.held_out: set that too"),
        (
            {"refit": {"held_out": 0.1, "recovery": {"steps": 3}}},
            "does nothing without refit.recovery.rounds: set that",
        ),
        ({"recovery": 1}, "recovery needs held-out tokens to decide where to stop: set held_out, such as 0.125"),
        ({"matching": 1}, "matching needs held-out tokens to decide where to stop: set held_out, such as 0.125"),
        ({"refit.recovery": 1}, "recovery needs held-out tokens to decide where to stop: set held_out"),
        ({"refit": {"dampings": [0.1]}}, "refit_damping is chosen on held-out tokens: set held_out, such as 0.125"),
        ({"budget": "time"}, "a budget in time is divided over widths: set allocation to global"),
        ({"pattern": "2:4"}, "the pattern 2:4 is one of single weights, but units are mlp: choose a recipe with units"),
        ({"units": {"mlp": "rows"}}, "the pattern rows is one of single weights, but units are mlp"),
        ({"metric": {"wide": 3}}, "metric has no field 'wide': it has kind, tokens, width, damping"),
        ({"refit": {"held_out": 0.1, "recovery.pace": 3}}, "refit.recovery has no field 'pace': it has rounds, steps,"),
        ({"units.rows": 3}, "a recipe has no field 'units.rows': it has name, "),
    ],
    ids=str,
)
def test_what_does_nothing_or_lacks_something_is_told(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as told:
        Recipe(settings)
    assert reason in str(told.value)


def test_a_group_that_is_switched_off_takes_its_fields_along() -> None:
    assert load_recipe("structured_best", {"refit": "none"}).refit is None
    assert load_recipe("structured_best", {"held_out": 0.0, "refit_damping": []}).refit is None
    with pytest.raises(InputError, match="refit_damping is chosen on held-out tokens"):
        load_recipe("structured_best", {"held_out": 0.0})


# -- wrong values


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sparsity": 2}, "the recipe field 'sparsity' cannot be 2: Input should be less than 1"),
        ({"metric": "fisher"}, "the recipe field 'metric' cannot be 'fisher': use one of none, diagonal, full"),
        ({"output_metric": "x"}, "the recipe field 'output_metric' cannot be 'x': use one of none, diagonal, full"),
        ({"refit": {"held_out": 1.5}}, "the recipe field 'refit.held_out' cannot be 1.5: Input should be less than 1"),
        ({"held_out": -1}, "the recipe field 'held_out' cannot be -1: Input should be greater than 0"),
        ({"held_out": 0.1, "refit_damping": [1, -1]}, "the recipe field 'refit_damping.1' cannot be -1"),
        ({"held_out": 0.1, "recovery": -1}, "the recipe field 'recovery' cannot be -1: Input should be greater"),
        ({"metric_damping": float("nan")}, "the recipe field 'metric_damping' cannot be nan"),
        ({"units": {"weights": "4:2"}}, "the recipe field 'units' cannot be '4:2': the pattern 4:2 keeps everything"),
        ({1: 2}, "a recipe has no field '1': it has name, summary, source, objective, solver, units, propagation, "),
    ],
    ids=str,
)
def test_a_recipe_says_what_is_wrong_in_the_words_it_was_given(settings: dict[Any, Any], reason: str) -> None:
    with pytest.raises(InputError) as told:
        Recipe(settings)
    assert str(told.value).startswith(reason)


# -- written and told


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_is_written_is_read_as_it_was(name: str) -> None:
    more = {"width_multiple": 4} if load_recipe(name).units.kinds else {}
    for settings in ({}, {"held_out": 0.25, "recovery": 2, "output_metric": "diagonal", **more}):
        recipe = load_recipe(name, settings)
        assert make_recipe(recipe.to_dict()) == recipe == Recipe(**dict(recipe))
        assert list(recipe.to_dict()) == list(Recipe.model_fields)


def test_every_field_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes", "--fields"]) == 0
    printed = capsys.readouterr().out
    fields = {field.path: field for field in recipe_fields()}
    for path, choice in GROUPS.items():
        for model in choice.models:
            switches = {choice.switch} if choice.kinds else set()
            assert {f"{path}.{name}" for name in set(model.model_fields) - switches} <= set(fields)
    assert set(Recipe.model_fields) <= set(fields)
    for field in fields.values():
        assert field.kind and field.meaning and f"\n{field.path}" in f"\n{printed}"
    assert {field.flat for field in fields.values()} - {""} == set(ALIASES)
    assert main(["recipes", "fasp", "--fields"]) == 2


def test_every_spelling_can_be_set() -> None:
    for name in spellings():
        with pytest.raises(InputError) as told:
            Recipe({name: {"no": {"such": "value"}}})
        assert not str(told.value).startswith("a recipe has no field")
