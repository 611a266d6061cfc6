"""A recipe's fields are in groups; whatever way they are set, from wherever they come, it is the same recipe."""

from pathlib import Path
from typing import Any

import pytest

from optprune.cli import main
from optprune.errors import InputError
from optprune.models import UNITS, Blocks, Weights
from optprune.patterns import InGroups
from optprune.recipe import Recipe, load_recipe, recipe_names
from optprune.recipe.groups import GROUPS, DepthSearch, FisherMetric, GlobalBudget, Recovery, Refit, UniformShares
from optprune.recipe.reference import recipe_fields, spellings
from optprune.recipe.settings import RENAMED
from tests.helpers.attempts import Attempt

# -- names


@pytest.mark.parametrize("name", RENAMED)
def test_a_former_name_is_refused_with_the_present_one(name: str, tmp_path: Path) -> None:
    assert RENAMED[name] in spellings()
    file = tmp_path / "recipe.yaml"
    file.write_text(f"{name}: 1\n", encoding="utf-8")
    for set_it in (
        lambda: Recipe(**{name: 1}),
        lambda: Recipe({name: 1}),
        lambda: load_recipe("fasp", {name: 1}),
        lambda: load_recipe(str(file)),
    ):
        with pytest.raises(InputError, match=f"^the recipe field '{name}' was renamed: write {RENAMED[name]}$"):
            set_it()


@pytest.mark.parametrize(
    ("settings", "meant"),
    [
        ({"sparsty": 0.5}, "sparsity"),
        ({"metric.widht": 64}, "width"),
        ({"width": 64}, "metric.width"),
        ({"probe_token": 64}, "allocation.probe_tokens"),
        ({"refit": {"held_out": 0.1, "recovery.step": 3}}, "steps"),
        ({"metric": "ful"}, "full"),
        ({"units": "weight"}, "weights"),
        ({"units": {"weights": "row"}}, "rows"),
        ({"propagation": "inta"}, "intra"),
        ({"objective": "lnked"}, "linked"),
        ({"solver": "wnda"}, "wanda"),
        ({"solver": {"greedy_obs": {"bach": 8}}}, "batch"),
        ({"solver": {"spap": {"scale": "inverted"}}}, "inverse"),
        ({"units": "blocks", "allocation.score": "influences"}, "influence"),
    ],
    ids=str,
)
def test_the_nearest_name_is_suggested(settings: dict[str, Any], meant: str) -> None:
    with pytest.raises(InputError, match=rf"\(did you mean {meant}\?\)"):
        Recipe(settings)


def test_the_nearest_recipe_is_suggested() -> None:
    with pytest.raises(InputError, match=r"'structured-best' is not known \(did you mean structured_best\?\)"):
        load_recipe("structured-best")


@pytest.mark.parametrize(
    ("value", "same"),
    [
        ({"metric": "full"}, {"metric": {"kind": "full"}}),
        ({"metric": FisherMetric(kind="full")}, {"metric.kind": "full"}),
        ({"metric": None}, {"metric": "none"}),
        ({"refit": 0.125}, {"refit": {"held_out": 0.125}}),
        (
            {"refit": Refit(held_out=0.125, recovery=Recovery(rounds=2))},
            {"refit.held_out": 0.125, "refit.recovery": 2},
        ),
        ({"refit": {"held_out": 0.125, "recovery": 2}}, {"refit": 0.125, "refit.recovery.rounds": 2}),
        (
            {"refit": 0.125, "refit.recovery": {"rounds": 2, "steps": 3}},
            {"refit": 0.125, "refit.recovery": 2, "refit.recovery.steps": 3},
        ),
        ({"allocation": "global"}, {"allocation": GlobalBudget()}),
        ({"units": {"weights": "2:4"}, "sparsity": 0.5}, {"units": "weights", "units.weights": "2:4", "sparsity": 0.5}),
        ({"units": Weights(InGroups(2, 4)), "sparsity": 0.5}, {"units": {"weights": "2:4"}, "sparsity": 0.5}),
    ],
    ids=str,
)
def test_a_group_may_be_given_by_one_value(value: dict[str, Any], same: dict[str, Any]) -> None:
    assert Recipe(value) == Recipe(same)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"metric.kind": "full", "metric": "full"}, "'metric.kind' is given twice, as metric.kind and as metric: give"),
        ({"metric": {"width": 8}, "metric.width": 9}, "'metric.width' is given twice, as metric.width and as metric."),
        (
            {"refit": {"recovery": 1}, "refit.recovery.rounds": 2},
            "as refit.recovery and as refit.recovery.rounds",
        ),
        ({"units": {"weights": "rows"}, "units.weights": "2:4"}, "is given twice, as units and as units.weights"),
        (
            {"units": Weights(InGroups(2, 4)), "units.weights": "rows"},
            "the pattern rows differs from 2:4, that of the units",
        ),
    ],
    ids=str,
)
def test_one_thing_spelled_twice_is_one_error(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        Recipe(settings)


@pytest.mark.usefixtures("no_weights")
def test_the_command_takes_paths(attempt: Attempt) -> None:
    twice = attempt.fails(attempt.command("--set", "allocation.multiple=4", width_multiple=8))
    assert "'allocation.multiple' is given twice, the second time by --set allocation.multiple=4: give one" in twice
    sentence = attempt.fails(attempt.command("--set", "metric=full", "--set", "metric.width=0"))
    assert "the recipe field 'metric.width' cannot be 0: Input should be greater than or equal to 1" in sentence
    sentence = attempt.fails(attempt.command("--set", "held_out=0.1"))
    assert sentence.endswith("the recipe field 'held_out' was renamed: write refit.held_out")
    sentence = attempt.fails(attempt.command(recipe="wanda", pattern="2:x"))
    assert "the recipe field 'units.weights' cannot be '2:x': the pattern '2:x' is not known" in sentence


# -- over a recipe


def test_what_overrides_goes_into_the_group_field_by_field() -> None:
    recipe = load_recipe("structured_best", {"metric.width": 64, "refit.recovery": 1, "allocation.most": 0.9})
    assert recipe.metric == FisherMetric(kind="full", tokens=8192, damping=0.1, clip=2, width=64)
    assert recipe.allocation == GlobalBudget(probe_tokens=512, least=0.45, most=0.9)
    before = load_recipe("structured_best").refit
    assert before is not None and recipe.refit == before.model_copy(update={"recovery": Recovery(rounds=1)})


def test_another_kind_keeps_what_both_kinds_have() -> None:
    narrow = load_recipe("structured_best", {"allocation.multiple": 4}).to_dict()
    assert Recipe(narrow, {"allocation": "uniform"}).allocation == UniformShares(multiple=4)
    diagonal = FisherMetric(kind="diagonal", tokens=8192, damping=0.1, clip=2)
    assert Recipe(narrow, {"metric": "diagonal"}).metric == diagonal
    plain = Recipe(narrow, {"metric": "none", "refit": "none"})
    assert plain.metric is None and plain.refit is None
    assert Recipe({"allocation.multiple": 4}, allocation="global").allocation == GlobalBudget(multiple=4)


def test_units_that_override_have_their_own_pattern() -> None:
    assert load_recipe("wanda", {"units.weights": "4:8"}).units == Weights(InGroups(4, 8))
    assert Recipe({"units": Weights(InGroups(2, 4))}, {"units.weights": "4:8"}).units == Weights(InGroups(4, 8))
    assert load_recipe("wanda", {"units": "weights"}).units == load_recipe("wanda").units
    assert load_recipe("wanda", {"units": {"weights": "2:4"}}).units == Weights(InGroups(2, 4))
    assert load_recipe("wanda", {"units": "mlp", "objective": None}).units == UNITS["mlp"]
    assert Recipe({"units": "weights", "units.weights": "rows"}, units="mlp").units == UNITS["mlp"]
    with pytest.raises(InputError, match="the pattern rows is for single weights, but units are mlp"):
        Recipe({"units": "mlp"}, {"units.weights": "rows"})


def test_whole_sub_blocks_are_of_depth_and_depth_of_whole_sub_blocks() -> None:
    assert Recipe(units="blocks").allocation == DepthSearch()
    assert isinstance(Recipe(allocation="depth").units, Blocks)
    assert load_recipe("structured_best", {"units": "blocks", "allocation.parts": "mlp"}).allocation == DepthSearch(
        parts="mlp"
    )
    assert Recipe(load_recipe("depth").to_dict(), units="mlp").allocation == UniformShares()
    assert load_recipe("fasp", {"allocation": "depth"}) == load_recipe("fasp", {"units": "blocks"})
    for settings in ({"units": "mlp", "allocation": "depth"}, {"units": "blocks", "allocation": "global"}):
        with pytest.raises(InputError, match="units 'blocks' and the allocation 'depth' go together, not "):
            Recipe(settings)
    with pytest.raises(InputError, match="'allocation' cannot be 'widely': use one of uniform, global, depth, given"):
        Recipe(units="blocks", allocation="widely")


# -- fields without their group


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"metric": {"width": 64}}, "'metric.width' has no effect without metric.kind diagonal or full: set that too"),
        (
            {"metric": {"kind": "none", "width": 64}},
            "'metric.width' has no effect without metric.kind diagonal or full",
        ),
        (
            {"allocation.least": 0.3},
            "'allocation.least' has no effect without allocation.kind global: set that too, or",
        ),
        ({"allocation": {"kind": "global", "parts": "mlp"}}, "has no effect without allocation.kind depth"),
        ({"refit.recovery.steps": 3}, "'refit.recovery.steps' has no effect without refit.held_out: set that too"),
        (
            {"refit": {"held_out": 0.1, "recovery": {"steps": 3}}},
            "has no effect without refit.recovery.rounds: set that",
        ),
        ({"refit.recovery": 1}, "'refit.recovery' has no effect without refit.held_out: set that too, or leave it out"),
        ({"refit.matching": 1}, "the recipe field 'refit.matching' was removed: it was better in no comparison"),
        ({"refit": {"held_out": 0.1, "matching": {"epochs": 3}}}, "the recipe field 'refit.matching' was removed"),
        ({"refit.matching.epochs": 3}, "the recipe field 'refit.matching.epochs' was removed"),
        ({"refit": {"dampings": [0.1]}}, "'refit.dampings' has no effect without refit.held_out: set that too, or"),
        ({"allocation.currency": "time"}, "'allocation.currency' has no effect without allocation.kind global: set"),
        ({"units": "blocks", "allocation.multiple": 8}, "has no effect without allocation.kind uniform or global"),
        ({"units": "experts", "allocation.multiple": 8}, "allocation.multiple is 8, but units experts have no widths"),
        (
            {"units": "weights", "allocation": {"kind": "global", "currency": "flops"}},
            "allocation.currency is flops, but units weights have no widths to divide it over: set units to mlp, vo,",
        ),
        (
            {"units.weights": "2:4"},
            "the pattern 2:4 is for single weights, but units are mlp: choose a recipe",
        ),
        ({"units": {"mlp": "rows"}}, "the pattern rows is for single weights, but units are mlp"),
        ({"metric": {"size": 3}}, "metric has no field 'size': it has kind, tokens, width, damping"),
        ({"refit": {"held_out": 0.1, "recovery.pace": 3}}, "refit.recovery has no field 'pace': it has rounds, steps,"),
        ({"units.rows": 3}, "a recipe has no field 'units.rows'"),
    ],
    ids=str,
)
def test_what_does_nothing_or_lacks_something_is_told(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError) as told:
        Recipe(settings)
    assert reason in str(told.value)


def test_a_group_that_is_switched_off_takes_its_fields_along() -> None:
    assert load_recipe("structured_best", {"refit": "none"}).refit is None
    assert load_recipe("structured_best", {"refit.held_out": 0.0}).refit is None
    assert Recipe({"metric": "none", "metric.width": None, "allocation.least": 0.2}) == Recipe()  # the defaults


# -- wrong values


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"sparsity": 2}, "the recipe field 'sparsity' cannot be 2: Input should be less than 1"),
        ({"metric": "fisher"}, "the recipe field 'metric' cannot be 'fisher': use one of none, diagonal, full"),
        ({"metric.kind": "x"}, "the recipe field 'metric.kind' cannot be 'x': use one of none, diagonal, full"),
        ({"refit": {"held_out": 1.5}}, "the recipe field 'refit.held_out' cannot be 1.5: Input should be less than 1"),
        ({"refit.held_out": -1}, "the recipe field 'refit.held_out' cannot be -1: Input should be greater than 0"),
        ({"refit": 0.1, "refit.dampings": [1, -1]}, "the recipe field 'refit.dampings.1' cannot be -1"),
        (
            {"refit": 0.1, "refit.recovery": -1},
            "the recipe field 'refit.recovery' cannot be -1: Input should be greater",
        ),
        ({"metric": "full", "metric.damping": float("nan")}, "the recipe field 'metric.damping' cannot be nan"),
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


def test_every_plain_field_is_what_it_is_set_to() -> None:
    plain = {"name": "mine", "summary": "a", "source": "b", "sparsity": 0.5, "damping": 0.5, "fit_bias": False}
    plain |= {"permuted": True, "strict": True, "seed": 7}
    fields = Recipe.model_fields.items()
    assert plain.keys() == {name for name, field in fields if field.annotation in (str, float, bool, int)}
    recipe = Recipe({**plain, "units": {"weights": "2:4"}})
    assert {name: getattr(recipe, name) for name in plain} == plain
    assert all(plain[name] != field.default for name, field in fields if name in plain)


@pytest.mark.parametrize("name", recipe_names())
def test_a_recipe_that_is_written_is_read_as_it_was(name: str) -> None:
    changed: dict[str, Any] = {"refit.held_out": 0.25, "refit.recovery": 2, "metric": "diagonal"}
    if load_recipe(name).units.kinds:
        changed["allocation.multiple"] = 4
    if load_recipe(name).bits is not None:
        changed = {"metric": "diagonal", "bits.group": 64}
    for settings in ({}, changed):
        recipe = load_recipe(name, settings)
        assert Recipe(recipe.to_dict()) == recipe == Recipe(**dict(recipe))
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
    assert main(["recipes", "fasp", "--fields"]) == 2


def test_every_spelling_can_be_set() -> None:
    for name in spellings():
        with pytest.raises(InputError) as told:
            Recipe({name: {"no": {"such": "value"}}})
        assert not str(told.value).startswith("a recipe has no field")
