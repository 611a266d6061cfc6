"""Penalties: value, proximal operator, dual norm and conjugate belong together."""

import math
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from hypothesis import Phase, find, given, settings
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.penalties import L1, ColumnGroups, ElasticNet, NormPenalty, Penalty, WeightedL1, shrink
from optprune.testing import check_penalty
from optprune.testing.laws import PENALTY_LAWS
from optprune.testing.strategies import concrete, penalised_weights
from tests.helpers.faults import halved_group_prox, halved_prox, noticed

by_kind = pytest.mark.parametrize("kind", concrete(Penalty), ids=lambda kind: kind.__name__)


def test_the_shipped_penalties_are_found():
    assert {ColumnGroups, ElasticNet, L1, WeightedL1} <= set(concrete(Penalty))


@by_kind
@given(st.data())
def test_every_penalty_keeps_the_laws(kind, data):
    """Those of optprune.penalties, found by inspection, on weights with zeros and ties; thresholds are hit exactly."""
    penalty, weight = data.draw(penalised_weights(kind))
    for law in PENALTY_LAWS:
        law(penalty, weight)


def test_a_penalty_without_examples_is_an_error_that_names_it():
    class Nuclear(NormPenalty):
        value = prox = dual_norm = None

    with pytest.raises(TypeError, match="no examples of the penalty Nuclear: add a strategy to PENALTIES"):
        find(penalised_weights(Nuclear), lambda drawn: True)


def test_free_entries_have_no_dual():
    free = WeightedL1(torch.tensor([0.0, 1.0]))
    assert free.dual_norm(torch.tensor([[0.0, 2.0]])) == 2
    assert free.dual_norm(torch.tensor([[1e-9, 2.0]])) == math.inf
    assert L1(0.0).dual_norm(torch.ones(1, 2)) == math.inf
    assert L1(0.0).dual_norm(torch.zeros(1, 2)) == 0


@pytest.mark.parametrize("value", [-1.0, math.nan, math.inf])
def test_impossible_strengths_are_errors(value):
    makers = (
        lambda: L1(value),
        lambda: ElasticNet(value, 1.0),
        lambda: ElasticNet(1.0, value),
        lambda: ColumnGroups(value),
        lambda: WeightedL1(torch.tensor([1.0, value])),
    )
    for make in makers:
        with pytest.raises(InputError, match="finite and not negative"):
            make()


@dataclass(frozen=True)
class RowGroups(NormPenalty):
    """A penalty that optprune does not ship, as in docs/guide/extend.md."""

    strength: float

    def value(self, weight):
        return self.strength * float(weight.double().norm(dim=1).sum())

    def prox(self, weight, step):
        norms = weight.norm(dim=1, keepdim=True).clamp(min=1e-30)
        return weight * (1 - self.strength * step / norms).clamp(min=0)

    def dual_norm(self, dual):
        return float(dual.double().norm(dim=1).max()) / self.strength


def test_a_penalty_of_ones_own_is_checked_by_the_same_laws():
    check_penalty(RowGroups(0.7))


def half_value(self, weight):
    return value_of[type(self)](self, weight) / 2


def half_conjugate(self, dual):
    return conjugate_of_elastic_net(replace(self, ridge=2 * self.ridge), dual) if self.ridge else 0.0


conjugate_of_elastic_net = ElasticNet.conjugate
value_of = {kind: kind.value for kind in (L1, WeightedL1, ElasticNet, ColumnGroups, RowGroups)}
FAULTS = [
    (L1, "prox", halved_prox),
    (ColumnGroups, "prox", halved_group_prox),
    *((kind, "value", half_value) for kind in value_of),
    (L1, "dual_norm", lambda self, dual: float(dual.abs().max()) / self.strength / 2 if self.strength else 0.0),
    (ColumnGroups, "dual_norm", lambda self, dual: 2 * float(dual.norm(dim=0).max()) / (self.strength or 1)),
    (RowGroups, "dual_norm", lambda self, dual: float(dual.abs().max()) / self.strength),
    (RowGroups, "prox", lambda self, weight, step: weight),
    (ElasticNet, "conjugate", half_conjugate),
    (ColumnGroups, "separable", property(lambda self: True)),
    (L1, "reach", lambda self, level, size: level * float(size.min()) / (self.strength or 1)),
    (WeightedL1, "prox", lambda self, weight, step: shrink(weight, self.weights * step)),
]


@pytest.mark.parametrize(("kind", "name", "fault"), FAULTS)
def test_a_planted_fault_is_noticed(kind, name, fault, monkeypatch):
    check = partial(check_penalty, RowGroups(0.7)) if kind is RowGroups else every_example(kind)
    noticed(monkeypatch, kind, name, fault, check)


def every_example(kind):
    @settings(phases=[Phase.generate], derandomize=True, database=None)
    @given(penalised_weights(kind))
    def check(drawn):
        for law in PENALTY_LAWS:
            law(*drawn)

    return check
