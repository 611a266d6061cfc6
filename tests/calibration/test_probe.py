"""Probes: the divergence of a model with one block changed, and budgets that are rescaled by it."""

import copy
import itertools
from collections.abc import Mapping, Sequence
from functools import partial

import pytest
import torch
from torch import Tensor

from optprune.allocation import Allocation, DenseModel
from optprune.calibration import (
    Change,
    Probe,
    calibrating,
    collect_metrics,
    first_inputs,
    first_tokens,
    sampled,
)
from optprune.calibration import divergence as divergence_module
from optprune.metric import OutputMetric
from optprune.models import Decoder
from optprune.moments import InputMoments
from optprune.numerics.tensors import divergence_terms
from optprune.problems import LayerLoss
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.recipe.recipe import by_cost
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import BUDGET
from tests.helpers.faults import noticed
from tests.helpers.tiny_models import TINY_MODELS, by_variant, tiny_llama
from tests.helpers.token_batches import batches


@by_variant
def test_it_is_the_divergence_of_the_whole_model(make) -> None:
    """Each with one block changed and all others dense."""
    model = make()
    decoder, dense, ids = Decoder(model), copy.deepcopy(model), torch.cat(batches())[:3, :20]
    expected = []

    def measured(changes: list[Change]) -> float:
        changed, names = copy.deepcopy(model), {id(module): name for name, module in model.named_modules()}
        for change in changes:
            changed.get_submodule(names[id(change.layer)]).weight.data.copy_(change.weight)
        log_p, log_q = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (dense, changed))
        return float((log_p.exp() * (log_p - log_q)).sum(-1).mean())

    with calibrating(decoder):
        probe = Probe(decoder, [ids[:2], ids[2:]])
        for index in range(len(decoder.blocks)):
            first, last = (decoder.layer(index, path) for path in decoder.architecture.layers[::3][:2])
            for layers in ([last], [first, last]):
                every = [1.5 ** torch.arange(layer.in_features).remainder(2) for layer in layers]
                changes = [
                    Change(layer, layer.weight * scale, None) for layer, scale in zip(layers, every, strict=True)
                ]
                probe.try_out(changes)
                expected.append(measured(changes))
            probe.advance()
        assert min(expected) > 1e-5
        assert probe.divergences() == pytest.approx(expected, rel=1e-3)
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())


def test_the_first_sequences_hold_the_tokens() -> None:
    texts = [torch.arange(24).reshape(3, 8), torch.arange(10).reshape(2, 5)]
    for tokens, shapes in ((1, [(1, 8)]), (9, [(2, 8)]), (25, [(3, 8), (1, 5)]), (999, [(3, 8), (2, 5)])):
        assert [tuple(part.shape) for part in first_tokens(texts, tokens)] == shapes
    assert torch.equal(first_tokens(texts, 9)[0], texts[0][:2])


@pytest.mark.parametrize("bias", [True, False])
def test_a_change_brings_the_bias_that_keeps_the_mean_output(bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = 3 + torch.randn(40, 6, generator=generator)
    layer = torch.nn.Linear(6, 4, bias=bias)
    mean, before = layer(inputs).mean(0), copy.deepcopy(layer)
    loss = LayerLoss.of(layer.weight, InputMoments.from_samples(inputs), fit_bias=bias)
    weight = layer.weight.detach() * (torch.rand(4, 6, generator=generator) < 0.5)
    change = Change.of(layer, weight, loss)
    undo = change.undo()
    change.write()
    assert torch.equal(layer.weight, weight)
    # Forty sums of a few numbers of about three, in float32.
    assert torch.allclose(layer(inputs).mean(0), mean, rtol=0, atol=1e-5) is bias
    undo.write()
    assert all(torch.equal(value, before.state_dict()[name]) for name, value in layer.state_dict().items())


class Told(Probe):
    """Divergences that the test gives, block by block."""

    def __init__(self, values: list[float]) -> None:
        self.values, self.block, self.returned = values, 0, list[float]()

    def try_out(self, changes: Sequence[Change]) -> None:
        self.returned.append(self.values[self.block])

    def advance(self) -> None:
        self.block += 1

    def divergences(self, on_change: object = None) -> list[float]:
        return self.returned


def along(recipe: Recipe, decoder: Decoder, metrics: Mapping[str, OutputMetric], probe: Probe) -> Allocation:
    stream = first_inputs(decoder, batches())
    return by_cost(recipe).along(DenseModel(decoder, batches(), metrics), stream, probe).allocation


def divided(probe: Probe, decoder: Decoder | None = None, **settings) -> Allocation:
    decoder = decoder or Decoder(tiny_llama())
    recipe = load_recipe("structured_best", {"units": "mlp", "sparsity": 0.3, "allocation.least": 0.1, **settings})
    metrics = collect_metrics(decoder, batches(), sampled(0)).damped(0.1)
    before = copy.deepcopy(decoder.model.state_dict())
    with calibrating(decoder):
        allocation = along(recipe, decoder, metrics, probe)
    assert all(torch.equal(before[name], value) for name, value in decoder.model.state_dict().items())
    return allocation


@pytest.mark.parametrize("units", ["mlp", "all", "kv-groups"])
def test_a_block_that_costs_more_than_predicted_keeps_more(units: str) -> None:
    settings = {"units": units, "sparsity": 0.06 if units == "kv-groups" else 0.3, "allocation.least": 0.01}
    first, second = (divided(Told(values), **settings) for values in ([10.0, 0.001], [0.001, 10.0]))
    field = "kv_heads" if units == "kv-groups" else "mlp_width"
    kept = [[getattr(block.shape, field) for block in found.blocks] for found in (first, second)]
    assert kept[0][0] > kept[0][1]
    assert kept[1][1] > kept[1][0]


class ToldGone(Told):
    """What the test gives, and what it gives for sub-blocks that are gone."""

    def __init__(self, values: list[float], gone: dict[str, list[float]]) -> None:
        super().__init__(values)
        self.gone = gone

    def try_without(self, block: int, part: str) -> None:
        assert block == self.block
        self.returned.append(self.gone[part][block])


@pytest.mark.parametrize("block", [0, 1])
def test_a_sub_block_goes_where_its_absence_costs_little(block: int) -> None:
    """Whatever its units cost: fewer of them are dear."""
    for part, units in (("mlp", "mlp"), ("mlp", "all-heads"), ("attention", "all-heads")):
        gone = {other: [50.0, 50.0] for other in ("attention", "mlp")}
        gone[part][block] = 0.01
        shapes = [
            each.shape
            for each in divided(
                ToldGone([9.0, 9.0], gone), units=units, sparsity=0.15, **{"allocation.least": 0}
            ).blocks
        ]
        assert part not in shapes[block].parts
        assert len(shapes[1 - block].parts) == 2


@pytest.mark.parametrize(("pattern", "sparsity"), [("unstructured", 0.5), ("rows", 0.5), ("2:4", 0.3)])
def test_weights_of_a_block_that_cost_more_than_predicted_stay(pattern: str, sparsity: float) -> None:
    decoder = Decoder(tiny_llama())
    metrics = collect_metrics(decoder, batches(), sampled(0)).damped(0.1)
    recipe = load_recipe("sparse_best", {"units.weights": pattern, "sparsity": sparsity})
    kept = []
    for values in ([10.0, 0.001], [0.001, 10.0]):
        with calibrating(decoder):
            found = along(recipe, decoder, metrics, Told(values))
        assert found.sparsity == pytest.approx(sparsity, abs=0.03)
        kept.append([sum(block.shares.values()) for block in found.blocks])
    assert kept[0][0] > kept[0][1] + 0.5
    assert kept[1][1] > kept[1][0] + 0.5


def test_the_weights_of_a_block_are_masked_to_the_share_that_all_keep(monkeypatch) -> None:
    shares = []

    def look(probe, changes):
        shares.extend(float((change.weight != 0).double().mean()) for change in changes)
        probe.returned.append(1.0)

    monkeypatch.setattr(Told, "try_out", look)
    decoder = Decoder(tiny_llama())
    metrics = collect_metrics(decoder, batches(), sampled(0)).damped(0.1)
    with calibrating(decoder):
        along(load_recipe("sparse_best"), decoder, metrics, Told([1.0, 1.0]))
    assert shares == pytest.approx([0.5] * 14, abs=1e-3)


def test_a_pattern_that_holds_everywhere_leaves_nothing_to_divide() -> None:
    for settings, divides in (
        ({"units.weights": "2:4"}, False),
        ({"units.weights": "2:4", "sparsity": 0.4}, True),
        ({}, True),
        ({"allocation": "uniform"}, False),
    ):
        assert load_recipe("sparse_best", settings).divides == divides


def test_the_units_are_removed_to_the_share_that_all_keep(monkeypatch) -> None:
    seen = []

    def look(probe, changes):
        [change] = changes
        seen.append(int((change.weight != 0).any(0).sum()))
        probe.returned.append(1.0)

    monkeypatch.setattr(Told, "try_out", look)
    divided(Told([1.0, 1.0]), sparsity=0.3, **{"allocation.multiple": 16})
    assert seen == [96, 96]  # of 128, in steps of 16, next to 0.7 x 128 = 89.6


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_real_probe_goes_through_the_model_and_leaves_it(name: str) -> None:
    decoder = Decoder(TINY_MODELS[name]())
    with calibrating(decoder):
        probe = Probe(decoder, first_tokens(batches(), 60))
    assert divided(probe, decoder).sparsity >= 0.3
    assert probe.variants.stream.block == len(decoder.blocks)


@pytest.mark.e2e
@pytest.mark.parametrize("name", TINY_MODELS)
def test_it_is_part_of_a_run(name: str) -> None:
    report = prune(TINY_MODELS[name](), batches(), load_recipe("sparse_best", {"allocation.probe_tokens": 50}))
    assert report.sparsity_reached == pytest.approx(0.5, abs=1e-3)
    for units in ("mlp", "all"):
        recipe = load_recipe("structured_best", {"units": units, "allocation.probe_tokens": 50})
        report = prune(TINY_MODELS[name](), batches(), recipe)
        # The hull of so small a model has few corners.
        assert 0.2 <= report.sparsity_reached <= 0.25


def test_probes_bring_squared_errors_to_one_unit() -> None:
    settings = {"metric": "none", "units": "mlp"}
    for tokens, told in ((0, True), (50, False)):
        report = prune(
            tiny_llama(), batches(), load_recipe("structured_best", {**settings, "allocation.probe_tokens": tokens})
        )
        assert any("do not compare between layers" in note for note in report.notes) == told


def test_where_no_budget_is_divided_nothing_is_probed(monkeypatch) -> None:
    monkeypatch.setattr("optprune.allocation.by_cost.Probe", lambda *_: pytest.fail("the model was probed"))
    for recipe, settings in (
        ("structured_best", {"allocation": "uniform"}),  # over the probes of the recipe's own budget
        ("sparse_best", {"units.weights": "2:4", "allocation.probe_tokens": 50}),
    ):
        prune(tiny_llama(), batches(), load_recipe(recipe, settings))


def test_without_a_metric_the_size_of_the_hidden_states_changes_nothing() -> None:
    """Root mean square norms undo a factor on all that is added up, so the function is the same."""
    widths = []
    for factor in (1.0, 2.0**-10):
        model = tiny_llama()
        for name, parameter in model.named_parameters():
            if "embed_tokens" in name or "o_proj" in name or "down_proj" in name:
                parameter.data.mul_(factor)
        for module in model.modules():
            if hasattr(module, "variance_epsilon"):
                module.variance_epsilon *= factor**2
        decoder = Decoder(model)
        recipe = load_recipe("structured_best", {"units": "mlp", "sparsity": 0.3, "metric": "none"})
        with calibrating(decoder):
            allocation = along(recipe, decoder, {}, Told([1.0, 2.0]))
        widths.append([block.shape.mlp_width for block in allocation.blocks])
    assert widths[0] == widths[1]


# -- faults planted


def test_a_divergence_the_wrong_way_round_is_noticed(monkeypatch):
    def wrong_way_round(log_p: Tensor, log_q: Tensor) -> Tensor:
        """KL(changed || dense)."""
        return divergence_terms(log_q, log_p)

    check = partial(test_it_is_the_divergence_of_the_whole_model, tiny_llama)
    noticed(monkeypatch, divergence_module, "divergence_terms", wrong_way_round, check)


@pytest.mark.e2e
@pytest.mark.parametrize("recipe", ["structured_best", "sparse_best"])
def test_progress_of_the_budget_reaches_its_end(recipe: str) -> None:
    """Also while divergences are measured, and with what blocks behind the first ones take more."""
    told = list[PhaseAdvanced]()

    def hear(event: Event) -> None:
        if isinstance(event, PhaseAdvanced) and event.phase == BUDGET:
            told.append(event)

    prune(
        tiny_llama(num_hidden_layers=3), batches(), load_recipe(recipe, {"allocation.probe_tokens": 64}), on_event=hear
    )
    shares = [event.share for event in told]
    assert shares == sorted(shares) and (shares[0], shares[-1]) == (0.0, 1.0)
    blocks, changes = ([event for event in told if event.unit == unit] for unit in ("block", "change"))
    assert [event.done for event in blocks] == [0, 1, 2, 3]
    assert [event.done for event in changes] == list(range(1 + (9 if recipe == "structured_best" else 3)))
    first, second, third = (later.share - before.share for before, later in itertools.pairwise(blocks))
    assert 0 < first < second < third
    assert changes[0].share == blocks[-1].share < 1


def test_the_head_answers_once_for_the_dense_model_and_once_for_each_change(monkeypatch: pytest.MonkeyPatch) -> None:
    """In parts of a batch, whose sums are those of all at once."""
    monkeypatch.setattr(divergence_module, "POSITIONS_AT_ONCE", 7)
    model, ids, rows = tiny_llama().double(), torch.cat(batches())[:3, :20], list[int]()
    found = list[list[float]]()
    for split in (list(ids.split(2)), [ids]):
        decoder = Decoder(model)
        with calibrating(decoder):
            probe = Probe(decoder, split)
            for block in range(len(decoder.blocks)):
                for path in ("self_attn.o_proj", "mlp.down_proj"):
                    layer = decoder.layer(block, path)
                    probe.try_out([Change(layer, layer.weight * 0.5, None)])
                probe.advance()
            handle = model.lm_head.register_forward_hook(lambda _, __, output: rows.append(output[..., 0].numel()))
            found.append(probe.divergences())
            handle.remove()
    changes = 2 * len(decoder.blocks)
    assert sum(rows) == 2 * (1 + changes) * ids.numel() and max(rows) == 7
    assert found[0] == pytest.approx(found[1], rel=1e-9) and len(set(found[0])) == changes


@by_variant
def test_a_sub_block_can_be_gone_for_a_divergence(make) -> None:
    """As with all that it adds to the hidden states gone, and the model is left as it was."""
    model, dense = make(), make()
    decoder, ids = Decoder(model), torch.cat(batches())[:2, :20]
    index, measured = len(decoder.blocks) - 1, []
    for part in ("attention", "mlp"):
        less = make()
        Decoder(less).remove(index, part)
        with torch.no_grad():
            log_p, log_q = (each(input_ids=ids).logits.double().log_softmax(-1) for each in (dense, less))
        measured.append(float((log_p.exp() * (log_p - log_q)).sum(-1).mean()))
    with calibrating(decoder):
        probe = Probe(decoder, [ids])
        for block in range(len(decoder.blocks)):
            for part in ("attention", "mlp") if block == index else ():
                probe.try_without(block, part)
            probe.advance()
        assert probe.divergences() == pytest.approx(measured, rel=1e-3) and min(measured) > 1e-5
    assert [type(each) for each in model.modules()] == [type(each) for each in dense.modules()]
    assert all(torch.equal(value, dense.state_dict()[name]) for name, value in model.state_dict().items())
