"""Penalties: value, proximal operator, dual norm and conjugate belong together."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from optprune.errors import InputError
from optprune.penalties import L1, ColumnGroups, ElasticNet, NormPenalty, WeightedL1
from tests.helpers.faults import halved_group_prox, halved_prox, noticed

SHAPES = ((1, 1), (1, 4), (3, 1), (3, 4))


def generator_of(seed):
    return torch.Generator().manual_seed(seed)


def normal(seed, shape, dtype=torch.float64):
    return torch.randn(shape, generator=generator_of(seed), dtype=torch.float64).to(dtype)


@st.composite
def cases(draw, dtype=torch.float64, norms=False, positive=False):
    """(penalty, weight): every penalty, weights with zeros and ties, thresholds hit exactly."""
    shape = draw(st.sampled_from(SHAPES))
    weight = normal(draw(st.integers(0, 1000)), shape)
    if draw(st.booleans()):
        weight = weight.round()
    strength = draw(st.sampled_from((0.25, 1.0, 3.0) if positive else (0.0, 0.25, 1.0, 3.0)))
    weights = torch.rand(
        draw(st.sampled_from((shape, shape[1:], (shape[0], 1)))), generator=generator_of(1), dtype=torch.float64
    )
    if positive:
        weights = weights + 0.1
    else:
        weights.view(-1)[::2] = 0
    choices = [L1(strength), WeightedL1(strength * weights), ColumnGroups(strength)]
    if not norms:
        choices += [ElasticNet(strength, 0.0), ElasticNet(strength, 2.0)]
    return draw(st.sampled_from(choices)), weight.to(dtype)


@given(cases(), st.sampled_from((1e-3, 1.0, 50.0)))
def test_the_proximal_operator_attains_equality_in_fenchels_inequality(case, size):
    penalty, weight = case
    step = torch.tensor(size, dtype=torch.float64)
    nearest = penalty.prox(weight, step)
    dual = (weight - nearest) / step
    # P(p) + P*(u) = <p, u> with u = (v - p) / step holds for the proximal point p, and for no other.
    product = float((nearest * dual).sum())
    # u is a difference divided by the step, so its rounding is that of v over the step; P* is infinite just outside
    # its domain, so what is tested is u drawn in by that much.
    rounding = 1e-14 * float(weight.abs().max()) / size
    inside = dual - dual.clamp(-rounding, rounding) if isinstance(penalty, WeightedL1) else dual * (1 - 1e-12)
    assert penalty.value(nearest) == pytest.approx(product - penalty.conjugate(inside), rel=1e-9, abs=1e-11)


@given(cases(), st.sampled_from((1e-3, 1.0, 50.0)), st.integers(0, 100))
def test_no_other_point_beats_the_proximal_point(case, size, seed):
    penalty, weight = case
    step = torch.tensor(size, dtype=torch.float64)

    def cost(point):
        return penalty.value(point) + float((point - weight).square().sum()) / (2 * size)

    nearest = penalty.prox(weight, step)
    best = cost(nearest)
    others = [weight, torch.zeros_like(weight), 0.9 * nearest, 1.1 * nearest]
    others += [nearest + scale * normal(seed, weight.shape) for scale in (1e-4, 1e-2, 1.0)]
    for other in others:
        # A few roundings of sums of a dozen terms.
        assert cost(other) >= best - 1e-13 * (1 + best)


@given(cases())
def test_a_step_for_each_column_is_that_column_alone(case):
    penalty, weight = case
    if not penalty.separable:
        assert isinstance(penalty, ColumnGroups)
        return
    steps = torch.linspace(0.5, 2.0, weight.shape[1], dtype=torch.float64)
    together = penalty.prox(weight, steps)
    for column, step in enumerate(steps):
        assert torch.equal(together[:, column], penalty.prox(weight, step)[:, column])


@given(cases(norms=True, positive=True), st.integers(0, 100))
def test_the_dual_norm_is_the_gauge(case, seed):
    penalty, dual = case
    assert isinstance(penalty, NormPenalty)
    gauge = penalty.dual_norm(dual)
    # Never exceeded ...
    for weight in (dual, dual.sign(), normal(seed, dual.shape)):
        assert float((dual * weight).sum()) <= gauge * penalty.value(weight) * (1 + 1e-12)
    # ... and attained: by one entry, or by one column in the direction of T.
    if isinstance(penalty, ColumnGroups):
        candidates = [dual * (torch.arange(dual.shape[1]) == column) for column in range(dual.shape[1])]
    else:
        candidates = [torch.zeros_like(dual).view(-1) for _ in range(dual.numel())]
        for index, candidate in enumerate(candidates):
            candidate[index] = dual.reshape(-1)[index].sign()
        candidates = [candidate.view(dual.shape) for candidate in candidates]
    ratios = [
        float((dual * candidate).sum()) / penalty.value(candidate)
        for candidate in candidates
        if penalty.value(candidate) > 0
    ]
    assert max(ratios, default=0.0) == pytest.approx(gauge, rel=1e-12)


@given(cases(norms=True, positive=True))
def test_the_conjugate_of_a_norm_is_zero_on_the_dual_ball_and_infinite_outside(case):
    penalty, dual = case
    gauge = penalty.dual_norm(dual)
    if gauge > 0:
        assert penalty.conjugate(dual / gauge) == 0
        assert penalty.conjugate(1.001 * dual / gauge) == math.inf
    assert penalty.conjugate(torch.zeros_like(dual)) == 0


@given(cases(), st.integers(0, 100))
def test_a_conjugate_is_never_below_the_inner_product(case, seed):
    penalty, dual = case
    conjugate = penalty.conjugate(dual)
    for scale in (0.1, 1.0, 10.0):
        weight = scale * normal(seed, dual.shape)
        product = float((dual * weight).sum())
        assert conjugate + penalty.value(weight) >= product - 1e-12 * (1 + abs(product))


@given(cases(), st.floats(-3, 3), st.integers(0, 100))
def test_values_are_convex_and_zero_at_zero(case, factor, seed):
    penalty, weight = case
    other, half = factor * normal(seed, weight.shape), 0.5
    middle = penalty.value(half * weight + half * other)
    mean = (penalty.value(weight) + penalty.value(other)) / 2
    assert middle <= mean * (1 + 1e-12)
    assert penalty.value(torch.zeros_like(weight)) == 0
    if isinstance(penalty, NormPenalty):
        assert penalty.value(factor * weight) == pytest.approx(abs(factor) * penalty.value(weight), rel=1e-12)


@given(cases(dtype=torch.float32))
def test_the_proximal_point_has_the_dtype_of_the_weight(case):
    penalty, weight = case
    nearest = penalty.prox(weight, torch.ones(()))
    assert nearest.dtype == torch.float32
    exact = penalty.prox(weight.double(), torch.ones((), dtype=torch.float64))
    assert torch.allclose(nearest.double(), exact, atol=1e-6)


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


@pytest.mark.parametrize(("penalty", "fault"), [(L1, halved_prox), (ColumnGroups, halved_group_prox)])
def test_a_halved_threshold_is_noticed_by_moreau(penalty, fault, monkeypatch):
    check = test_the_proximal_operator_attains_equality_in_fenchels_inequality
    noticed(monkeypatch, penalty, "prox", fault, check)
