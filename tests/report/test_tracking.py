"""Events as numbers for experiment trackers."""

import math
from dataclasses import replace
from typing import Any

import torch
from accelerate.tracking import GeneralTracker

from optprune.healing import HealingSettings, heal
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import BlockStarted, LayerSolved, TrackedEvents
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import tiny_llama


class Tracker(GeneralTracker):
    """A tracker of accelerate's interface, as those of TensorBoard, W&B and MLflow are."""

    name, requires_logging_directory, tracker = "list", False, None

    def __init__(self) -> None:
        super().__init__()
        self.logged = list[tuple[dict[str, Any], int | None]]()

    def log(self, values: dict, step: int | None = None, **more: Any) -> None:
        self.logged.append((values, step))


def test_the_numbers_of_a_run_reach_a_tracker() -> None:
    tracker, dense, model = Tracker(), tiny_llama(), tiny_llama()
    on_event = TrackedEvents(tracker.log)
    report = prune(model, batches(), load_recipe("alps", {"sparsity": 0.5}), on_event=on_event)
    layers = [(values, step) for values, step in tracker.logged if "layer/objective" in values]
    assert [step for _, step in layers] == list(range(1, len(report.layers) + 1))
    for (values, _), layer in zip(layers, report.layers, strict=True):
        assert values["layer/relative_error"] == layer.relative_error and values["layer/objective"] == layer.objective
    blocks = [values["block/number"] for values, _ in tracker.logged if "block/number" in values]
    assert blocks == list(range(model.config.num_hidden_layers))
    phases = {name for values, _ in tracker.logged for name in values if name.endswith("/seconds")}
    assert "pruning/seconds" in phases
    windows, apart = torch.cat(batches()).split(6)
    healed = heal(
        model, dense, list(windows.split(3)), held_out=apart, settings=HealingSettings(every=1), on_event=on_event
    )
    measured = [(values, step) for values, step in tracker.logged if "healing/divergence" in values]
    assert [values["healing/divergence"] for values, _ in measured] == [each.divergence for each in healed.measured]
    assert [step for _, step in measured] == [len(report.layers) + each.step for each in healed.measured]
    steps = [step for _, step in tracker.logged]
    assert steps == sorted(steps, key=int)
    assert all(math.isfinite(value) for values, _ in tracker.logged for value in values.values())


def test_what_has_no_number_is_left_out() -> None:
    tracker, seen = Tracker(), list[LayerSolved]()
    prune(
        tiny_llama(),
        batches(),
        load_recipe("fasp", {"sparsity": 0.25}),
        on_event=lambda event: seen.append(event) if isinstance(event, LayerSolved) else None,
    )
    on_event = TrackedEvents(tracker.log)
    on_event(BlockStarted(0, 2))
    assert not tracker.logged
    on_event(LayerSolved(replace(seen[0].layer, gap=None, held_out_error=math.nan, objective=math.inf)))
    [(values, step)] = tracker.logged
    assert step == 1 and not {"layer/gap", "layer/held_out_error", "layer/objective"} & values.keys()
