"""One budget of experts: what blocks keep, against costs and divergences measured on models that are cut by hand."""

import copy
from itertools import product
from typing import Any

import pytest
import torch

from optprune.errors import InputError, StrictError
from optprune.models import Decoder
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.cut_mixtures import answers, cut
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches

EXPERT = 3 * 64 * 48
"""the linear weights of an expert"""
NEAR = 0.84
"""with it the second expert of the last block costs more than the first of the middle one"""
BUDGET: dict[str, Any] = {
    "allocation": "global",
    "allocation.probe_tokens": 96,
    "refit.held_out": 0,
    "allocation.least": 0.5,
}


def mixture(layers: int = 3, middle: float = 1.0) -> Any:
    """What the experts of the middle block answer is multiplied by a number."""
    model = ALL_MODELS["qwen3_moe"](num_hidden_layers=layers)
    with torch.no_grad():
        model.model.layers[1].mlp.experts.down_proj.mul_(middle)
    return model


def divergence(model: Any, other: Any) -> float:
    """KL of the predictions on the probe's tokens, in nats."""
    tokens = torch.cat(batches())[:2]
    with torch.no_grad():
        log_p, log_q = (each(tokens, use_cache=False).logits.double().log_softmax(-1) for each in (model, other))
    return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())


def curve(model: Any, block: int) -> dict[int, float]:
    """The cost by the number of experts kept: greedily by the change of the answer, in nats by what three give."""
    costs, three = changes(model, block)
    tried = divergence(model, cut(model, block, three))
    return {count: cost * tried / costs[3] for count, cost in costs.items()}


def changes(model: Any, block: int) -> tuple[dict[int, float], list[int]]:
    """The squared change of the answer by the number of experts kept, greedily; and which three are kept."""
    dense, kept, costs, three = answers(model, block), list(range(4)), {4: 0.0}, list[int]()
    while len(kept) > 2:
        without = {
            expert: float((answers(cut(model, block, [k for k in kept if k != expert]), block) - dense).square().sum())
            for expert in kept
        }
        gone = min(without, key=lambda expert: without[expert])
        kept.remove(gone)
        costs[len(kept)] = without[gone]
        three = three or list(kept)
    return costs, three


@pytest.fixture(scope="module")
def curves() -> list[dict[int, float]]:
    return [curve(mixture(middle=NEAR), block) for block in range(3)]


@pytest.mark.parametrize("gone", [2, 3, 4, 5])
def test_the_costs_of_what_goes_are_the_least_there_are(gone: int, curves: list[dict[int, float]]) -> None:
    """So many of twelve experts may go, and each block may lose two: against every way to divide them."""
    model = mixture(middle=NEAR)
    share = gone * EXPERT / Decoder(copy.deepcopy(model)).linear_weights()
    prune(model, batches(), load_recipe("experts_best", {**BUDGET, "sparsity": share * 0.99}))
    chosen = tuple(shape.experts for shape in Decoder(model).shapes())
    every = [tuple(counts) for counts in product(range(2, 5), repeat=3) if sum(counts) == 12 - gone]
    costs = {counts: sum(curves[block][count] for block, count in enumerate(counts)) for counts in every}
    assert sum(chosen) == 12 - gone
    assert costs[chosen] == pytest.approx(min(costs.values()), rel=1e-3)


def test_without_a_probe_the_size_of_what_a_mixture_answers_changes_nothing() -> None:
    """Costs are shares of it: the last block's answers are made smaller and larger, which no other block sees."""
    kept = []
    for size in (0.01, 1.0, 100.0):
        model = mixture(layers=2, middle=size)
        share = 2 * EXPERT / Decoder(copy.deepcopy(model)).linear_weights()
        prune(
            model,
            batches(),
            load_recipe("experts_best", {**BUDGET, "allocation.probe_tokens": 0, "sparsity": 0.99 * share}),
        )
        kept.append([shape.experts for shape in Decoder(model).shapes()])
    assert sum(kept[0]) == 6 and kept[0] == kept[1] == kept[2]


def test_a_block_that_predictions_do_not_notice_gives_all() -> None:
    """Its experts differ from each other as much as those of other blocks do, in shares of what they answer."""
    model = mixture(middle=1e-3)
    decoder = Decoder(copy.deepcopy(model))
    share = 1.9 * EXPERT / decoder.linear_weights()
    prune(model, batches(), load_recipe("experts_best", {**BUDGET, "sparsity": share}))
    assert [shape.experts for shape in Decoder(model).shapes()] == [4, 2, 4]


@pytest.mark.parametrize("gone", [2, 3])
def test_without_a_probe_costs_are_shares_of_what_a_mixture_answers(gone: int) -> None:
    """The middle block answers little: in shares its experts cost as much as others, as squares next to nothing."""
    model = mixture(middle=1e-2)
    squares = [changes(model, block)[0] for block in range(3)]
    answered = [float(answers(model, block).square().sum()) for block in range(3)]
    share = gone * EXPERT / Decoder(copy.deepcopy(model)).linear_weights()
    prune(
        model,
        batches(),
        load_recipe("experts_best", {**BUDGET, "allocation.probe_tokens": 0, "sparsity": share * 0.99}),
    )
    chosen = tuple(shape.experts for shape in Decoder(model).shapes())
    every = [tuple(counts) for counts in product(range(2, 5), repeat=3) if sum(counts) == 12 - gone]
    costs = {
        counts: sum(squares[block][count] / answered[block] for block, count in enumerate(counts)) for counts in every
    }
    assert chosen == min(every, key=lambda counts: costs[counts])
    by_squares = min(every, key=lambda counts: sum(squares[block][count] for block, count in enumerate(counts)))
    assert by_squares != chosen


def test_without_a_probe_a_note_says_that_units_differ() -> None:
    model, settings = mixture(2), {**BUDGET, "allocation.probe_tokens": 0, "sparsity": 0.1}
    report = prune(model, batches(), load_recipe("experts_best", settings))
    assert any("do not compare between blocks: set allocation.probe_tokens" in note for note in report.notes)
    with pytest.raises(StrictError, match=r"set allocation\.probe_tokens to 512"):
        prune(mixture(2), batches(), load_recipe("experts_best", {**settings, "strict": True}))


def test_what_is_out_of_reach_is_refused() -> None:
    with pytest.raises(InputError, match=r"out of reach .* and allocation\.least 0\.75: with 3 experts in every block"):
        prune(mixture(2), batches(), load_recipe("experts_best", {**BUDGET, "allocation.least": 0.75, "sparsity": 0.3}))


def test_where_blocks_are_to_be_alike_experts_are_divided_evenly() -> None:
    recipe = load_recipe("experts_best", {**BUDGET, "sparsity": 0.2})
    fitted, told = RUNTIMES["transformers"].fitted(recipe, Decoder(mixture(2)), None)
    assert fitted.allocation.kind == "uniform"
    assert any("the allocation is uniform in place of global" in line for line in told)
