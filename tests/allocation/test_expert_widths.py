"""One budget of the units of experts: a block's curve is of all its experts, by the tokens that each of them gets."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from optprune.allocation import Allocation, DenseModel
from optprune.allocation.uniform import uniform
from optprune.allocation.width_costs import WidthCosts
from optprune.calibration import Probe, calibrating, first_inputs
from optprune.models import BlockAllocation, Decoder, Mlp
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.recipe.recipe import by_cost
from tests.helpers.expert_tokens import inner, last, routed
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches

SETTINGS: dict[str, Any] = {
    **{"units": "mlp", "metric": "none", "allocation.multiple": 8, "damping": 0, "refit": "none"},
    **{"solver": [{"greedy_obs": {"batch": 8}}, "restore"], "sparsity": 0.25, "propagation": "pruned"},
}


def gathered(recipe: Recipe, tokens: int = 0) -> WidthCosts:
    """What a division by a recipe measures of a model, with a probe of the first so many sequences, where there are."""
    decoder, every = Decoder(ALL_MODELS["mixtral"]()), batches()
    probe = Probe(decoder, [every[0][:tokens]]) if tokens else None
    with calibrating(decoder):
        costs = by_cost(recipe).gathered(DenseModel(decoder, every), first_inputs(decoder, every), probe)
    assert isinstance(costs, WidthCosts)
    return costs


def test_what_a_block_without_its_units_loses_is_a_mean_over_all_tokens() -> None:
    recipe, dense = load_recipe("structured_best", {**SETTINGS, "allocation.probe_tokens": 0}), ALL_MODELS["mixtral"]()
    widths = gathered(recipe).widths
    assert [(width.block, width.kind, width.there) for width in widths] == [(0, Mlp(), 48), (1, Mlp(), 48)]
    tokens = sum(batch.numel() for batch in batches())
    for block, width in enumerate(widths):
        answers = [
            inner(dense, expert, own, block) @ last(dense, expert, block).double().T
            for expert, (own, _) in enumerate(routed(dense, block))
        ]
        assert width.losses[0] == pytest.approx(
            sum(float(each.square().sum()) for each in answers) / tokens / 2, rel=1e-4
        )


def test_a_probe_tries_all_experts_of_a_block_together() -> None:
    """Its divergence is that of a model in which a run has narrowed this block alone."""
    recipe = load_recipe("structured_best", {**SETTINGS, "allocation.probe_tokens": 96})
    costs, dense, ids = gathered(recipe, 2), ALL_MODELS["mixtral"](), batches()[0][:2]
    assert by_cost(recipe).changes(Mlp().candidates(Decoder(ALL_MODELS["mixtral"]()), 0)) == 1 == len(costs.tried) / 2
    with torch.no_grad():
        costs.allocation(lambda event: None)
    for width in costs.widths:
        model = ALL_MODELS["mixtral"]()
        shapes = list(Decoder(model).shapes())
        shapes[width.block] = replace(shapes[width.block], mlp_width=costs.tried[width.block][2])
        prune(model, batches(), recipe, allocation=Allocation.of(Decoder(model), map(BlockAllocation, shapes)))
        with torch.no_grad():
            log_p, log_q = (each(ids, use_cache=False).logits.double().log_softmax(-1) for each in (dense, model))
        measured = float((log_p.exp() * (log_p - log_q)).sum(-1).mean())
        assert width.losses[shapes[width.block].mlp_width] == pytest.approx(
            measured, rel=0.02
        )  # greedily, in other batches


def test_blocks_share_the_budget_and_experts_of_a_block_are_alike() -> None:
    model: Any = ALL_MODELS["mixtral"]()
    with torch.no_grad():  # what the experts of a block answer counts little
        model.model.layers[0].mlp.experts.down_proj.mul_(0.1)
    report = prune(
        model, batches(), load_recipe("structured_best", {**SETTINGS, "damping": 0.01, "allocation.probe_tokens": 0})
    )
    left = Decoder(model)
    first, second = left.shapes()
    assert first.mlp_width < second.mlp_width
    assert all(layers.channels.units == first.mlp_width for layers in Mlp().layers(left, 0)) and report.layers
    step = 4 * 3 * 64 * 8 / Decoder(ALL_MODELS["mixtral"]()).linear_weights()
    assert 0.25 <= report.sparsity_reached < 0.25 + step


def test_the_expert_that_every_token_goes_through_holds_nothing_that_could_go() -> None:
    decoder = Decoder(ALL_MODELS["qwen2_moe"](shared_expert_intermediate_size=800, moe_intermediate_size=400))
    step = 4 * 3 * 64 * 8 * 2 / decoder.linear_weights()
    assert uniform(decoder, 0.2, Mlp(), 8).sparsity == pytest.approx(0.2, abs=step / 2)
