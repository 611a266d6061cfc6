"""Statistics of a dense model that several runs share: the weights are the same."""

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from optprune import Statistics, layer_loss, load_recipe, prune
from optprune.calibration import DenseStatistics
from optprune.metric import Metrics
from optprune.models import Decoder, Mlp
from optprune.problems import StructuredLeastSquares
from optprune.report import Report
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches


def pruned(
    statistics: DenseStatistics | None,
    text: Sequence[Tensor] = batches(),
    model: int = 0,
    dtype: torch.dtype = torch.float32,
    recipe: str = "structured_best",
    **settings: object,
) -> tuple[dict[str, Tensor], Report]:
    tiny = tiny_llama(model).to(dtype)
    report = prune(tiny, text, load_recipe(recipe, settings), statistics=statistics)
    return dict(tiny.state_dict()), report


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the measurements that are made, in order."""
    asked: list[str] = []
    metrics, removal = DenseStatistics.metrics, DenseStatistics.removal

    def counted_metrics(self: DenseStatistics, *arguments: object) -> Metrics:
        asked.append("metrics")
        return metrics(self, *arguments)  # type: ignore[arg-type]

    def counted_removal(self: DenseStatistics, *arguments: object) -> object:
        asked.append("removal")
        return removal(self, *arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(DenseStatistics, "metrics", counted_metrics)
    monkeypatch.setattr(DenseStatistics, "removal", counted_removal)
    return asked


@pytest.mark.parametrize(
    "settings", [{}, {"allocation.probe_tokens": 50}, {"units": "kv-groups", "sparsity": 0.06}], ids=str
)
def test_a_run_with_shared_statistics_is_the_same(settings: dict) -> None:
    shared, alone = Statistics(), pruned(None, **settings)
    for run in range(2):
        weights, report = pruned(shared, **settings)
        assert (shared.seconds_saved > 0) == (run > 0)
        assert all(torch.equal(value, alone[0][name]) for name, value in weights.items())
        assert (report.allocation, report.notes) == (alone[1].allocation, alone[1].notes)


@pytest.mark.e2e
def test_costs_of_weights_that_a_probe_scales_are_as_they_were_for_the_next_run() -> None:
    """The statistics lie in memory: what a run scales is its own copy."""
    shared, settings = Statistics(), {"recipe": "sparse_best", "allocation.probe_tokens": 50, "sparsity": 0.5}
    alone, first, second = (pruned(statistics, **settings) for statistics in (None, shared, shared))  # type: ignore[arg-type]
    assert shared.seconds_saved > 0
    for weights, report in (first, second):
        assert report.allocation == alone[1].allocation
        assert all(torch.equal(value, alone[0][name]) for name, value in weights.items())


ALL = ["metrics"] + ["removal"] * 6


def test_recipes_share_what_does_not_depend_on_their_difference(asked: list[str]) -> None:
    """Another sparsity needs no metric and no curve anew; another damping new curves only; another seed all."""
    shared = Statistics()
    for settings, expected in (
        ({}, ALL),
        ({"sparsity": 0.3}, []),
        ({"damping": 0.02}, ["removal"] * 6),
        ({"seed": 1}, ALL),
        ({"damping": 0.02}, []),
    ):
        asked.clear()
        pruned(shared, **settings)
        assert asked == expected


PLAIN = {"metric": "none", "allocation.probe_tokens": 0}
PAIRS: dict[str, tuple[dict, dict]] = {
    "what is kept apart": ({**PLAIN, "refit.held_out": 0.25}, {**PLAIN, "refit.held_out": 0.5}),
    "the widest metric": ({"metric.width": 32}, {"metric.width": 64}),
    "clipped gradients": ({"metric.clip": 1.0}, {"metric.clip": 2.0}),
    "what is computed in": (PLAIN, {"allocation.probe_tokens": 0}),
}


@pytest.mark.e2e
@pytest.mark.parametrize("pair", PAIRS)
def test_a_run_after_another_recipe_is_as_it_is_alone(pair: str) -> None:
    """In half precision, where a metric has all computed in float32, and without one nothing is."""
    shared, (first, second) = Statistics(), ({"propagation": "dense", **one} for one in PAIRS[pair])
    before, _ = pruned(shared, dtype=torch.bfloat16, **first)
    weights, report = pruned(shared, dtype=torch.bfloat16, **second)
    alone, expected = pruned(None, dtype=torch.bfloat16, **second)
    assert all(torch.equal(value, alone[name]) for name, value in weights.items())
    errors = [[(layer.relative_error, layer.held_out_error) for layer in each.layers] for each in (report, expected)]
    assert errors[0] == errors[1]
    assert any(value.shape != before[name].shape or not value.equal(before[name]) for name, value in weights.items())


def test_a_removal_curve_is_of_one_multiple() -> None:
    """Units that go some at a time go in another order."""
    model, name = tiny_llama(), "model.layers.0.mlp.down_proj"
    channels = Mlp().linked(Decoder(model), 0, "mlp.down_proj").channels
    problem = StructuredLeastSquares(layer_loss(model, batches(), name, "dense").whitened(), channels, channels.units)
    shared, orders = Statistics(), list[Tensor]()
    for batch in (1, 16, 1):
        order, losses, _ = shared.removal(problem, batch)
        expected, others, _ = DenseStatistics().removal(problem, batch)
        assert torch.equal(order, expected) and torch.equal(losses, others)
        orders.append(order)
    assert not torch.equal(orders[0], orders[1])


@pytest.mark.e2e
def test_another_text_and_another_model_are_measured_anew(asked: list[str]) -> None:
    """As many tokens and the same shapes: only the content tells them apart."""
    shared, reversed_text = Statistics(), [batch.flip(1) for batch in batches()]
    for text, model in ((batches(), 0), (reversed_text, 0), (batches(), 1)):
        asked.clear()
        weights, _ = pruned(shared, text, model)
        assert asked == ALL
        alone, _ = pruned(None, text, model)
        assert all(torch.equal(value, alone[name]) for name, value in weights.items())
    asked.clear()
    pruned(shared, reversed_text, 0)
    assert asked == []
    shared.forget()
    pruned(shared, reversed_text, 0)
    assert asked == ALL
