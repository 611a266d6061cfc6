"""Random problems that bounds are tried on, and good points of them, which no bound may exceed."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import numpy as np
import torch

from optprune.errors import NumericalError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import NM, RowWise, Unstructured
from optprune.penalties import L1, ElasticNet
from optprune.problems import (
    Channels,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.solvers import (
    ConjugateGradients,
    Fista,
    PerspectiveBound,
    ProximalAdmm,
    RemovalBound,
    Restore,
    solve,
)

DAMPINGS = (0.0, 0.0, 1e-10, 1e-6, 1e-2, 1.0, 1e6)
SHAPES = ("plain", "near duplicates", "duplicates", "few tokens", "different units", "offset")
SOLVERS = {
    "elastic net": (Fista(), ProximalAdmm()),
    "l1": (Fista(), ProximalAdmm()),
    "removal": (RemovalBound(), PerspectiveBound(60)),
    "sparse": (PerspectiveBound(60),),
    "restoration": (Restore(), ConjugateGradients()),
}
"""the solvers that prove bounds, by the kind of instances"""


def case(kind: str, seed: int) -> Problem:
    """The problem of a kind that a seed stands for."""
    generator = np.random.default_rng(seed)
    width = int(generator.integers(1, 3)) * 4 if kind == "sparse" else int(generator.integers(1, 9))
    rows = int(generator.integers(1, 4))
    loss = _loss(generator, rows, width)
    if kind == "restoration":
        mask = generator.random((1 if generator.random() < 0.5 else rows, width)) < 0.7
        return MaskedLeastSquares(loss, torch.from_numpy(mask))
    if kind == "removal":
        each = 2 if width % 2 == 0 and generator.random() < 0.5 else 1
        return StructuredLeastSquares(loss, Channels.of(width, each), int(generator.integers(1, width // each + 1)))
    if kind == "sparse":
        patterns = (NM(2, 4), RowWise(int(generator.integers(0, width + 1))))
        pattern = patterns[int(generator.integers(2))]
        if rows == 1 or (width == 4 and generator.random() < 0.3):
            pattern = Unstructured(int(generator.integers(0, min(rows, 2) * width + 1)))
            loss = _loss(generator, min(rows, 2), width)
        return SparseLeastSquares(loss, pattern)
    largest = float(loss.linear.double().abs().max()) or 1.0
    strength = largest * float(10 ** generator.uniform(-4, 0.2))
    if kind == "l1":
        return PenalisedLeastSquares(loss, L1(strength))
    ridge = float(loss.gram.diagonal().double().mean()) * float(generator.choice([0.0, 1e-6, 1e-2]))
    return PenalisedLeastSquares(loss, ElasticNet(strength, ridge))


def _loss(generator: np.random.Generator, rows: int, width: int) -> LayerLoss:
    shape = str(generator.choice(SHAPES))
    tokens = int(generator.integers(1, width + 1)) if shape == "few tokens" else 4 * width + 4
    inputs = generator.standard_normal((tokens, width))
    if "duplicates" in shape and width > 1:
        noise = 0.0 if shape == "duplicates" else 10.0 ** -float(generator.integers(2, 10))
        inputs[:, -1] = inputs[:, 0] + noise * generator.standard_normal(tokens)
    if shape == "different units":
        inputs = inputs * 10.0 ** generator.integers(-4, 5, width)
    if shape == "offset":
        inputs = inputs + 100 * generator.standard_normal(width)
    inputs = inputs * 10.0 ** float(generator.choice([0, 0, -8, 6]))
    drift = float(generator.choice([0.0, 1e-3, 0.3]))
    dense = inputs + drift * inputs.std() * generator.standard_normal(inputs.shape) if drift else None
    dtype = torch.float32 if generator.random() < 0.6 else torch.float64
    moments = InputMoments.from_samples(
        torch.from_numpy(inputs), None if dense is None else torch.from_numpy(dense)
    ).to(dtype)
    weight = torch.from_numpy(generator.standard_normal((rows, width)) * 10.0 ** float(generator.choice([0, 0, -6, 5])))
    if generator.random() < 0.2:
        weight = weight.round()
    metric = None
    if generator.random() < 0.3:
        gradients = torch.from_numpy(generator.standard_normal((3 * rows, rows)))
        metric = OutputMetric.from_samples(gradients, full=bool(generator.random() < 0.5)).to(dtype)
        metric = metric.damped(float(generator.choice([0.0, 1e-2])))
    damping = float(generator.choice(DAMPINGS))
    return LayerLoss.of(weight, moments, damping, fit_bias=bool(generator.random() < 0.2), metric=metric)


def doubled(problem: Problem) -> Problem:
    """The very same problem in float64: no number is another."""
    loss = problem.loss
    moments = loss.moments.to(torch.float64)
    metric = None if loss.metric is None else loss.metric.to(torch.float64)
    other = replace(loss, weight=loss.weight.double(), moments=moments, damping=loss.damping.double(), metric=metric)
    return replace(problem, loss=other)


def good_points(problem: Problem) -> Iterator[torch.Tensor]:
    """Feasible weights [out, in], in float64 where that is better; all of them optima of some choice, or near one."""
    exact = doubled(problem)
    yield problem.start()
    if isinstance(problem, PenalisedLeastSquares):
        yield torch.zeros_like(problem.loss.weight)
        for solver in (ProximalAdmm(1e-12), Fista(1e-9)):
            yield solve(exact, solver, max_steps=400).value
    elif isinstance(problem, MaskedLeastSquares):
        yield from _restored(exact)
    elif isinstance(problem, StructuredLeastSquares):
        for kept in combinations(range(problem.channels.units), problem.keep):
            choice = torch.zeros(problem.channels.units, dtype=torch.bool)
            choice[list(kept)] = True
            yield from _restored(exact.restrict(choice))
    elif isinstance(problem, SparseLeastSquares):
        yield from _sparse_points(exact)


def _sparse_points(problem: SparseLeastSquares) -> Iterator[torch.Tensor]:
    """The best of every mask of some tries, and of what the recommended solver finds."""
    rows, width = problem.loss.weight.shape
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        score = torch.rand(rows, width, generator=generator)
        yield from _restored(problem.restrict(problem.pattern.project(score)))
    try:
        yield solve(problem).value
    except NumericalError:
        return


def _restored(problem: MaskedLeastSquares) -> Iterator[torch.Tensor]:
    """The answer of Restore, and a plain least-squares solution of the normal equations without any cut."""
    if problem.loss.coupled and problem.mask.shape[0] > 1:
        yield solve(problem, ConjugateGradients()).value
        return
    yield solve(problem, Restore()).value
    gram, target = problem.loss.gram.numpy(), problem.loss.target.numpy()
    value = np.zeros_like(target)
    for row, kept in enumerate(problem.mask.expand(target.shape).numpy()):
        if kept.any():
            found = np.linalg.lstsq(gram[np.ix_(kept, kept)], target[row, kept], rcond=None)[0]
            value[row, kept] = found
    yield torch.from_numpy(value)
