"""What is measured of a dense model can be shared by runs, which come to the same weights."""

import pytest
import torch
from torch import Tensor

from benchmarks.shared import Shared
from optprune import load_recipe, prune
from optprune.calibration import DenseStatistics
from optprune.metric import Metrics
from optprune.report import Report
from tests.test_sparse_pipeline import batches
from tests.tiny_models import tiny_llama


def pruned(statistics: DenseStatistics | None, **settings: object) -> tuple[dict[str, Tensor], Report]:
    model = tiny_llama()
    report = prune(model, batches(), load_recipe("structured_best", settings), statistics=statistics)
    return dict(model.state_dict()), report


@pytest.mark.parametrize("settings", [{}, {"probe_tokens": 50}, {"units": "kv-groups", "sparsity": 0.06}], ids=str)
def test_a_run_with_shared_statistics_is_the_same(settings: dict) -> None:
    shared, alone = Shared(), pruned(None, **settings)
    for run in range(2):
        shared.begin(load_recipe("structured_best", settings))
        weights, report = pruned(shared, **settings)
        assert (shared.spared > 0) == (run > 0)
        assert all(torch.equal(value, alone[0][name]) for name, value in weights.items())
        assert (report.allocation, report.notes) == (alone[1].allocation, alone[1].notes)


def test_recipes_share_what_does_not_depend_on_their_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another sparsity needs no metric and no curve anew; another damping new curves only; another seed all."""
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
    shared = Shared()
    for settings, expected in (
        ({}, ["metrics"] + ["removal"] * 4),
        ({"sparsity": 0.3}, []),
        ({"damping": 0.02}, ["removal"] * 4),
        ({"seed": 1}, ["metrics"] + ["removal"] * 4),
    ):
        asked.clear()
        shared.begin(load_recipe("structured_best", settings))
        pruned(shared, **settings)
        assert asked == expected
