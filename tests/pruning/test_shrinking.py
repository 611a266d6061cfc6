"""An objective of the user that zeroes whole units shrinks the model, and a budget that is not met is told."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import optprune
from optprune.allocation import Allocation
from optprune.errors import StrictError
from optprune.export import save_model
from optprune.models import Decoder
from optprune.objectives import LayerContext, linked, sparse
from optprune.penalties import ColumnGroups
from optprune.problems import MaskedLeastSquares, PenalisedLeastSquares, Problem
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.solvers import FaspMetric
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches

NOT_MET = "the budget is not met"


def most_energy(context: LayerContext) -> MaskedLeastSquares:
    """The README's objective."""
    energy = context.loss.weight.square().sum(0) * context.loss.moments.mean_square
    dropped = energy.numel() - context.keep
    return MaskedLeastSquares(context.loss, (energy > energy.kthvalue(dropped).values)[None])


def penalised(share: float) -> Callable[[LayerContext], Problem]:
    """A group lasso over columns, at a share of the strength at which zero is the answer."""

    def objective(context: LayerContext) -> PenalisedLeastSquares:
        largest = float(context.loss.target.norm(dim=0).max())
        return PenalisedLeastSquares(context.loss, ColumnGroups(share * largest))

    return objective


@pytest.mark.parametrize("policy", ["pruned", "intra", "cross"])
@pytest.mark.parametrize("units", ["mlp", "vo", "all"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_restricted_choice_is_the_linked_problem_with_that_choice(name: str, units: str, policy: str) -> None:
    def restricted(context: LayerContext) -> MaskedLeastSquares:
        problem = linked(context)
        return problem.restrict(problem.project(FaspMetric().scores(problem)))

    settings = {"units": units, "sparsity": 0.1, "propagation": policy}
    expected, found = TINY_MODELS[name](), TINY_MODELS[name]()
    known = prune(expected, batches(), load_recipe("fasp", settings))
    report = prune(found, batches(), Recipe(objective=restricted, **settings))
    assert Decoder(found).shapes() == Decoder(expected).shapes()
    for left, right in zip(found.parameters(), expected.parameters(), strict=True):
        assert (left - right).abs().max() <= 1e-5 * right.abs().max()
    assert report.sparsity_reached == known.sparsity_reached
    assert [(layer.kept, layer.units) for layer in report.layers] == [(one.kept, one.units) for one in known.layers]
    assert not any(NOT_MET in note for note in report.notes)


def test_the_objective_of_the_readme_shrinks_the_model(tmp_path: Path) -> None:
    model = tiny_llama()
    before = sum(parameter.numel() for parameter in model.parameters())
    report = prune(model, batches(), Recipe(objective=most_energy, units="mlp", sparsity=0.2, strict=True))
    assert abs(report.sparsity_reached - 0.2) <= 4 * 3 * 64 * 2 / 73728  # half a width multiple in two blocks
    assert before - sum(parameter.numel() for parameter in model.parameters()) == round(report.sparsity_reached * 73728)
    assert model.config.intermediate_size < 128 and type(model).__name__ == "LlamaForCausalLM"
    saved = save_model(model, tmp_path / "out", check_tokens=torch.arange(10, 42)[None])
    assert saved.stock and saved.logits_difference is not None


@pytest.mark.parametrize("units", ["mlp", "all"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_penalty_on_columns_shrinks_the_model_and_changes_no_output(
    name: str, units: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(objective=penalised(0.3), units=units, sparsity=0.05)
    small, zeroed = TINY_MODELS[name](), TINY_MODELS[name]()
    report = prune(small, batches(), recipe)
    allocation = Allocation.from_dict(report.allocation)
    shapes = tuple(block.shape for block in allocation.blocks)
    assert shapes == Decoder(small).shapes()
    assert any(shape.mlp_width < 128 for shape in shapes)
    monkeypatch.setattr(Decoder, "keep_units", lambda *_: None)
    prune(zeroed, batches(), recipe)
    tokens = batches(1)[0]
    with torch.no_grad():
        left, right = small(tokens).logits, zeroed(tokens).logits
    assert (left - right).abs().max() <= 1e-4 * right.abs().max()


def test_blocks_that_a_penalty_left_unlike_are_saved_and_loaded(tmp_path: Path) -> None:
    model = tiny_llama()
    prune(model, batches(), Recipe(objective=penalised(0.3), units="all", sparsity=0.05))
    assert len(set(Decoder(model).shapes())) == 2
    assert save_model(model, tmp_path / "out", check_tokens=torch.arange(10, 42)[None]).logits_difference is not None
    assert Decoder(optprune.load_model(str(tmp_path / "out"), device="cpu").model).shapes() == Decoder(model).shapes()


def test_every_head_keeps_as_many_value_dimensions_and_every_block_a_unit() -> None:
    def uneven(context: LayerContext) -> MaskedLeastSquares:
        channels = context.channels
        assert channels is not None
        stays = torch.zeros(channels.units, dtype=torch.bool)
        if channels.slot_count > 1:
            stays[[0, 5, 16, 17, 18]] = True  # two of KV head 0, three of KV head 1
        return MaskedLeastSquares(context.loss, channels.column_mask(stays, context.loss.weight.shape[1]))

    dense = tiny_llama()
    model = copy.deepcopy(dense)
    prune(model, batches(), Recipe(objective=uneven, units="all", sparsity=0.5))
    shape = Decoder(model).shape(0)
    assert (shape.mlp_width, shape.kv_heads, shape.value_dim) == (1, 2, 3)
    # The first that is not read makes up the number.
    rows = dense.model.layers[0].self_attn.v_proj.weight[[0, 1, 5, 16, 17, 18]]
    assert torch.equal(model.model.layers[0].self_attn.v_proj.weight, rows)
    output = model.model.layers[0].self_attn.o_proj.weight.reshape(64, 4, 3)
    assert bool((output[:, :2, 1] == 0).all())


def test_a_unit_that_a_problem_keeps_stays_though_its_weights_are_zero() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[:, 3] = 0
        model.model.layers[1].mlp.up_proj.weight[3] = 0
    everything = Recipe(
        objective=lambda context: MaskedLeastSquares(context.loss, torch.ones(1, 128, dtype=torch.bool)),
        sparsity=0.1,
    )
    prune(model, batches(), everything)
    assert [shape.mlp_width for shape in Decoder(model).shapes()] == [128, 128]


@pytest.mark.parametrize(
    "settings",
    [
        {"objective": penalised(0.0), "units": "mlp", "sparsity": 0.5},
        {"objective": penalised(0.0), "units": "weights", "sparsity": 0.5},
        {"objective": lambda context: MaskedLeastSquares(context.loss, torch.ones_like(context.loss.weight) > 0)},
    ],
    ids=["units", "weights", "a mask of all"],
)
def test_a_budget_that_is_not_met_is_told_and_an_error_in_strict_mode(settings: dict[str, Any]) -> None:
    report = prune(tiny_llama(), batches(), Recipe(**settings))
    assert report.sparsity_reached == 0
    asked = f"{report.sparsity_requested:.0%}".removesuffix("%")
    assert any(f"{NOT_MET}: 0.00% of the decoder's linear weights are removed, not {asked}" in n for n in report.notes)
    with pytest.raises(StrictError, match=NOT_MET):
        prune(tiny_llama(), batches(), Recipe(**settings, strict=True))


def half_of_the_columns(context: LayerContext) -> MaskedLeastSquares:
    """A problem that keeps every second column, whatever the budget."""
    columns = torch.arange(context.loss.weight.shape[1]) % 2 == 0
    return MaskedLeastSquares(context.loss, columns[None])


@pytest.mark.parametrize(("units", "reached"), [("mlp", "33.33%"), ("weights", "50.00%")])
def test_answers_that_remove_more_than_the_budget_are_told_and_an_error_in_strict_mode(
    units: str, reached: str
) -> None:
    settings: dict[str, Any] = {"objective": half_of_the_columns, "units": units, "sparsity": 0.25}
    [note] = [note for note in prune(tiny_llama(), batches(), Recipe(**settings)).notes if NOT_MET in note]
    assert f"{reached} of the decoder's linear weights are removed, not 25.00%, because answers keep less" in note
    with pytest.raises(StrictError, match=NOT_MET):
        prune(tiny_llama(), batches(), Recipe(**settings, strict=True))


def test_weights_that_were_zero_before_are_no_missed_budget() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[:, ::2] = 0
    report = prune(model, batches(), load_recipe("magnitude", {"sparsity": 0.2}))
    assert report.sparsity_reached > 0.2
    assert not any(NOT_MET in note for note in report.notes)


@pytest.mark.e2e
@pytest.mark.parametrize("sparsity", [0.253, 0.777])
@pytest.mark.parametrize("pattern", ["unstructured", "rows"])
def test_rounding_is_no_missed_budget(pattern: str, sparsity: float) -> None:
    def by_row(context: LayerContext) -> MaskedLeastSquares:
        rows, width = context.loss.weight.shape
        keep = round(context.keep / rows)
        order = context.loss.weight.abs().argsort(dim=1, descending=True)
        return MaskedLeastSquares(context.loss, torch.zeros(rows, width).scatter(1, order[:, :keep], 1.0) > 0)

    for objective in (sparse, by_row):
        recipe = Recipe(objective=objective, units={"weights": pattern}, sparsity=sparsity)
        report = prune(tiny_llama(), batches(), recipe)
        assert not any(NOT_MET in note for note in report.notes)
