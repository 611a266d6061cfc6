"""Faults planted to see that a check notices them: how, and those that more than one check must notice."""

import pytest
import torch
from hypothesis import Phase, settings

from optprune.penalties import shrink
from optprune.problems import LayerLoss

SETTINGS = "_hypothesis_internal_use_settings"
"""where hypothesis keeps those of a test"""
input_scale = vars(LayerLoss)["input_scale"].func


def noticed(monkeypatch, owner, name, what, test):
    """With `what` in the place of an attribute, the test fails; of a random test any failure will do, not the least."""
    monkeypatch.setattr(owner, name, what)
    chosen = getattr(test, SETTINGS, None)
    if chosen is not None:
        phases = [phase for phase in chosen.phases if phase not in (Phase.shrink, Phase.explain)]
        monkeypatch.setattr(test, SETTINGS, settings(chosen, phases=phases))
    with pytest.raises(AssertionError):
        test()


def one_scale_for_all(self):
    """In the place of `LayerLoss.input_scale`: small inputs then look like the rounding of large ones."""
    size = input_scale(self)
    return size.square().mean().sqrt().expand(size.shape)


def halved_prox(self, weight, step):
    """In the place of `L1.prox`."""
    return shrink(weight, self.strength * step / 2)


def halved_group_prox(self, weight, step):
    """In the place of `ColumnGroups.prox`."""
    norms = weight.norm(dim=0)
    kept = (norms - self.strength * step / 2).clamp(min=0)
    return weight * (kept / torch.where(norms > 0, norms, 1.0))


def unclipped(self, change, dual, level):
    """In the place of `DualMap._projected`."""
    return self.verified.value(change) + float((dual * (self.verified.weight + change)).sum())


def not_refitted(self, columns):
    """In the place of `InverseForm.without`."""
    weight = self.minimiser.clone()
    weight[:, columns] = 0
    return weight
