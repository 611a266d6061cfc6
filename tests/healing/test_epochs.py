"""A short text is gone through several times."""

from typing import Any

import pytest
import torch
from torch import Tensor

from optprune.healing import HealingSettings, HealReport, heal
from optprune.healing.heal import in_epochs
from optprune.healing.training import Training
from tests.helpers.trained_tiny import halved, news, trained


def healed(**settings: Any) -> HealReport:
    """A pruned tiny model after four steps an epoch."""
    text = list(news(10, 60)[:32].split(8))
    chosen = HealingSettings(learning_rate=2e-3, **settings)
    return heal(halved(trained()), trained(), text, held_out=news(60, 70)[:16], settings=chosen)


def test_every_epoch_has_all_batches_and_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = list[int](), Training.step

    def recorded(self: Training, number: int, steps: int, windows: Tensor) -> None:
        seen.append(next(index for index, batch in enumerate(text) if torch.equal(batch, windows)))
        step(self, number, steps, windows)

    text = list(news(10, 60)[:32].split(8))
    monkeypatch.setattr(Training, "step", recorded)
    report = healed(epochs=4, patience=99)
    epochs = [seen[first : first + 4] for first in range(0, 16, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and epochs[0] == [0, 1, 2, 3]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (report.steps, report.steps_planned, report.tokens) == (16, 16, 4 * 32 * text[0].shape[1])
    assert report.settings["epochs"] == 4


def test_the_seed_draws_the_orders() -> None:
    text = list(torch.arange(8).view(8, 1))
    orders = {tuple(int(batch) for batch in in_epochs(text, 2, seed)) for seed in range(5)}
    assert len(orders) == 5 and all(order[:8] == tuple(range(8)) for order in orders)


@pytest.mark.e2e
def test_a_second_look_at_a_short_text_helps() -> None:
    assert healed(epochs=4).after.divergence < 0.9 * healed().after.divergence
