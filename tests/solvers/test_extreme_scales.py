"""Penalised problems whose numbers are at the ends of a dtype's range, and weights of any strides, end in an answer."""

from dataclasses import replace
from itertools import product

import pytest
import torch

from optprune.moments import InputMoments
from optprune.patterns import NM, RowWise
from optprune.penalties import L1, ColumnGroups, ElasticNet
from optprune.problems import (
    Channels,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.solvers import Fista, ProximalAdmm, Status, solve

SCALES = (1e-30, 1e-15, 1.0, 1e15, 1e30)


def loss_of(weights, inputs, *, rows=2, width=3, dtype=torch.float32, drift=False, tokens=20):
    generator = torch.Generator().manual_seed(1)
    samples, noise = (torch.randn(tokens, width, generator=generator, dtype=torch.float64) for _ in range(2))
    moments = InputMoments.from_samples(samples * inputs, (samples + 0.1 * noise) * inputs if drift else None).to(dtype)
    return LayerLoss.of(torch.randn(rows, width, generator=generator, dtype=torch.float64) * weights, moments)


def readable(loss):
    """Whether the numbers of a loss are in the range of its dtype."""
    return all(bool(torch.isfinite(part).all()) for part in (loss.gram, loss.weight, loss.linear))


@pytest.mark.slow
@pytest.mark.parametrize(
    "solver", [Fista(), ProximalAdmm(), ProximalAdmm(rho=1e-12)], ids=["fista", "admm", "small rho"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_scale_ends_in_an_answer_that_is_no_worse_than_the_start(solver, dtype):
    for weights, inputs, drift, width in product(SCALES, (1e-30, 1e-15, 1.0, 1e15), (False, True), (1, 4)):
        loss = loss_of(weights, inputs, width=width, dtype=dtype, drift=drift)
        if not readable(loss):
            continue
        largest = float(loss.linear.double().abs().max()) or 1.0
        for penalty in (
            L1(0.1 * largest),
            ElasticNet(0.1 * largest, float(loss.gram.mean().abs())),
            ColumnGroups(largest),
        ):
            problem = PenalisedLeastSquares(loss, penalty)
            solution = solve(problem, solver, max_steps=60)
            assert solution.objective <= problem.objective(problem.start())
            assert solution.gap is None or solution.gap >= 0


def test_a_rho_below_the_rounding_of_the_moments_is_raised():
    """float32 moments of fewer tokens than inputs: A + R is indefinite where R is less than their rounding."""
    loss = loss_of(1.0, 1.0, width=40, tokens=15)
    problem = PenalisedLeastSquares(loss, L1(0.1 * float(loss.linear.abs().max())))
    assert float(torch.linalg.eigvalsh(loss.gram.double())[0]) < -1e-9
    solution = solve(problem, ProximalAdmm(rho=1e-12), max_steps=200)
    assert solution.objective < problem.objective(problem.start())


@pytest.mark.parametrize("shape", [(1, 1), (1, 4), (3, 4)], ids=str)
def test_the_strides_of_a_weight_do_not_matter(shape):
    whole = loss_of(1.0, 1.0, rows=shape[0], width=shape[1])
    room = torch.zeros(2 * shape[0], 3 * shape[1])
    room[::2, ::3] = whole.weight
    strided = LayerLoss(room[::2, ::3], whole.moments, whole.damping)
    turned = LayerLoss(whole.weight.T.contiguous().T, whole.moments, whole.damping)
    for kind in (
        lambda loss: MaskedLeastSquares(loss, torch.ones(1, shape[1], dtype=torch.bool)),
        lambda loss: SparseLeastSquares(loss, RowWise(1)),
        lambda loss: PenalisedLeastSquares(loss, L1(0.1)),
    ):
        expected = kind(whole)
        for loss in (strided, turned):
            problem = kind(loss)
            assert problem.fingerprint() == expected.fingerprint()
            found = solve(problem)
            assert found.objective == pytest.approx(solve(expected).objective, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("scale", [1e-39, 1e-40, 1e-43])
def test_weights_below_the_normal_numbers_of_float32_are_solved(scale):
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(60, 8, generator=generator)
    weight = torch.randn(4, 8, generator=generator) * scale
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), 0.01)
    assert 0 < float(loss.weight.abs().max()) < torch.finfo(torch.float32).tiny
    for problem in (
        SparseLeastSquares(loss, NM(2, 4)),
        StructuredLeastSquares(loss, Channels.of(8), 4),
        MaskedLeastSquares(loss, torch.arange(8)[None] < 4),
    ):
        found = solve(problem)
        assert found.status is Status.CONVERGED
        assert found.violation == 0
        assert bool(found.value.isfinite().all())
        # The same weights in float64, where they are normal numbers; what differs is the rounding of the answer.
        wide = LayerLoss.of(weight.double(), loss.moments.to(torch.float64), 0.01)
        best = solve(replace(problem, loss=wide))
        spacing = 2.0**-149
        rounding = wide.moments.gram.abs().sum().item() * spacing * (spacing + 2 * float(weight.double().abs().max()))
        assert found.objective <= best.objective + 4 * rounding
