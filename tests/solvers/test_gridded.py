"""Solvers on grids against literal implementations and exhaustion, and the grids themselves."""

from itertools import pairwise, product
from statistics import fmean

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from optprune.errors import InputError, NumericalError
from optprune.grids import GRIDS, Grid
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import GridLeastSquares, LayerLoss
from optprune.solvers import Chain, Gptq, GridBeam, GridDescent, RoundToNearest, choose, solve
from optprune.testing import reference
from optprune.testing.quadratic import rounding
from optprune.testing.strategies import gridded, weighted
from optprune.testing.transformations import random_feasible

FEWER = settings(max_examples=max(settings().max_examples // 2, 1))
GRID = Grid(2, 3, scale_dtype=torch.bfloat16)


def correlated(seed, rows=3, width=6, grid=GRID, masked=False, drifted=False, coupled=False):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    inputs = normal(40, width) @ normal(width, width)
    moments = InputMoments.from_samples(inputs, inputs + 0.3 * normal(40, width) if drifted else None)
    metric = OutputMetric.from_samples(normal(30, rows) @ normal(rows, rows)).damped(0.01) if coupled else None
    loss = LayerLoss.of(normal(rows, width), moments, 0.01, metric=metric)
    return GridLeastSquares(loss, grid, torch.rand(rows, width, generator=generator) < 0.6 if masked else None)


# -- grids


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_codes_are_found_again_and_nothing_else_is_on_the_grid(bits, shifted, seed):
    generator = torch.Generator().manual_seed(seed)
    grid = Grid(bits, 4, shifted)
    least = grid.lowest if not shifted else -int(torch.randint(0, 2**bits, (1,), generator=generator))
    integers = torch.randint(least, least + 2**bits, (3, 8), generator=generator)
    scales = torch.randn(3, 2, generator=generator).half().float()
    weight = (integers.unflatten(1, (2, 4)) * scales[:, :, None]).flatten(1)
    assert grid.off(weight) == 0
    assert torch.equal(grid.encode(weight).values(), weight)
    other = weight.clone()
    other[1, 2] += 0.01 * float(scales[1, 0].abs())
    assert grid.off(other) == 1
    with pytest.raises(InputError, match="1 of 6 blocks are not on a grid"):
        grid.encode(other)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", GRIDS)
def test_a_dtype_holds_every_weight_of_its_grid(name, dtype):
    grid = GRIDS[name].within(dtype)
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(8, 256, generator=generator) * torch.logspace(-4, 2, 8)[:, None]
    found = grid.nearest(weight).values()
    assert torch.equal(found.to(dtype).float(), found)
    assert float((found - weight).norm()) < 0.5 * float(weight.norm())


@pytest.mark.parametrize("name", ["q4_0", "w4a16"])
def test_scales_are_numbers_that_the_format_stores(name):
    weight = torch.randn(4, 256, generator=torch.Generator().manual_seed(0))
    scales = GRIDS[name].nearest(weight).scales
    assert torch.equal(scales.to(GRIDS[name].scale_dtype).to(scales), scales)


def test_a_search_of_scales_is_near_the_best_of_many():
    """For one block and equal importance: 19 scales of each sign against ten thousand."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(50, 32, generator=generator, dtype=torch.float64)
    found = GRIDS["q4_0"].nearest(weight).values()
    largest = weight.abs().amax(1, keepdim=True)
    best = torch.full((50,), torch.inf, dtype=torch.float64)
    for scale in np.linspace(-1 / 5, 1 / 5, 10_001):
        if scale:
            q = (weight / (scale * largest)).round().clamp(-8, 7)
            best = torch.minimum(best, (weight - scale * largest * q).square().sum(1))
    lost = (found - weight).square().sum(1)
    assert float((lost / best).max()) < 1.05 and float((lost / best).mean()) < 1.01


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ((1, 32), "2 to 8 bits"),
        ((4, 0), "at least one input"),
        ((4, 32, False, torch.float32), "float16 or bfloat16"),
        ((4, 32, False, torch.float16, 12), "1 to 11 binary digits"),
    ],
)
def test_grids_that_no_format_has_are_refused(arguments, reason):
    with pytest.raises(InputError, match=reason):
        Grid(*arguments)


def test_rows_that_are_not_whole_blocks_are_refused():
    with pytest.raises(InputError, match="rows of 6 weights are not whole blocks of 4"):
        GridLeastSquares(correlated(0).loss, Grid(2, 4))


# -- the literal methods


def literal_target(problem):
    """B, or with a mask V* A: the quadratic whose minimiser is the best weight on the mask."""
    loss = problem.loss
    if problem.mask is None:
        return loss.target
    kept = problem.kept.flatten()
    metric = torch.eye(len(loss.weight), dtype=torch.float64) if loss.metric is None else loss.metric.matrix
    best = torch.zeros_like(kept, dtype=torch.float64)
    hessian = torch.kron(metric, loss.gram)
    best[kept] = torch.linalg.solve(hessian[kept][:, kept], (metric @ loss.target).flatten()[kept])
    return best.reshape(loss.weight.shape) @ loss.gram


def literal_gptq(problem):
    """Each column rounded, the columns behind it at the minimiser for the columns that are fixed."""
    loss, grid, kept = problem.loss, problem.grid, problem.kept.expand_as(problem.loss.weight).numpy()
    gram, target = loss.gram.numpy(), literal_target(problem).numpy()
    rows, width = target.shape
    answer, upper = np.zeros((rows, width)), np.linalg.cholesky(np.linalg.inv(gram)).T
    importance = 1 / np.diagonal(upper) ** 2
    for j in range(width):
        fixed, free = slice(0, j), slice(j, width)
        right = target[:, free] - answer[:, fixed] @ gram[fixed, free]
        current = np.linalg.solve(gram[free, free], right.T).T
        if j % grid.block == 0:
            values = torch.from_numpy(np.where(kept[:, j : j + grid.block], current[:, : grid.block], 0.0))
            weights = torch.from_numpy(importance[j : j + grid.block]).expand_as(values)
            scales, lows = grid.fit(values, weights)
        q = grid.round(torch.from_numpy(current[:, 0]), scales, lows).numpy()
        answer[:, j] = scales.numpy() * q * kept[:, j]
    return torch.from_numpy(answer)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("columns", [3, 128])
def test_gptq_is_the_literal_loop(columns, masked):
    for seed in range(10):
        problem = correlated(seed, masked=masked, drifted=seed % 2 == 1)
        # Equal but for the rounding of the updates, which no value here is near a tie of.
        torch.testing.assert_close(solve(problem, Gptq(columns)).value, literal_gptq(problem), rtol=1e-9, atol=1e-12)


def literal_coupled_gptq(problem):
    """Each weight rounded, row after row; all weights behind it at the minimiser for those that are fixed."""
    loss, grid, kept = problem.loss, problem.grid, problem.kept.expand_as(problem.loss.weight).flatten().numpy()
    rows, width = loss.weight.shape
    hessian = np.kron(loss.metric.matrix.numpy(), loss.gram.numpy())
    target = (loss.metric.matrix @ literal_target(problem)).flatten().numpy()
    # Of a row, the columns' curvature alone: that of the rows is one factor of all of its weights.
    importance = 1 / np.diagonal(np.linalg.cholesky(np.linalg.inv(loss.gram.numpy())).T) ** 2
    answer = np.zeros(rows * width)
    for k in range(rows * width):
        fixed, free = slice(0, k), slice(k, rows * width)
        current = np.linalg.solve(hessian[free, free], target[free] - hessian[free, fixed] @ answer[fixed])
        if k % grid.block == 0:
            values = torch.from_numpy(np.where(kept[k : k + grid.block], current[: grid.block], 0.0))[None]
            j = k % width
            scales, lows = grid.fit(values, torch.from_numpy(importance[j : j + grid.block])[None])
        q = grid.round(torch.tensor([current[0]]), scales, lows)
        answer[k] = float(scales * q) * kept[k]
    return torch.from_numpy(answer.reshape(rows, width))


@pytest.mark.parametrize("masked", [False, True])
def test_gptq_of_coupled_rows_is_the_literal_loop_over_all_weights(masked):
    for seed in range(10):
        problem = correlated(seed, rows=4, masked=masked, drifted=seed % 2 == 1, coupled=True)
        found = solve(problem, Gptq(rows=1)).value
        torch.testing.assert_close(found, literal_coupled_gptq(problem), rtol=1e-9, atol=1e-12)


def test_rounding_rounds_the_start():
    problem = correlated(0, masked=True)
    start = solve(problem.relaxed).value
    rounded = solve(problem, RoundToNearest(), start=start).value
    assert torch.equal(rounded, problem.grid.nearest(start, problem.loss.input_scale.square()).values())
    assert torch.equal(solve(problem, RoundToNearest()).value, problem.start())


def test_rows_that_are_compensated_lose_less_in_the_metric():
    """By a third in the mean, in groups of two of sixteen rows; with all of them in one group nothing is gained."""
    ratios = {2: [], 16: []}
    for seed in range(20):
        problem = correlated(seed, rows=16, width=12, coupled=True)
        plain = problem.objective(solve(GridLeastSquares(problem.loss.plain, GRID), Gptq()).value)
        for rows, found in ratios.items():
            found.append(solve(problem, Gptq(rows=rows)).objective / plain)
    assert fmean(ratios[2]) < 0.67
    assert max(ratios[16]) == 1.0


@pytest.mark.parametrize(("masked", "coupled"), [(False, False), (True, False), (True, True)])
def test_no_single_integer_and_no_scale_betters_the_end_of_descent(masked, coupled):
    for seed in range(10):
        problem = correlated(seed, masked=masked, coupled=coupled)
        found, before = solve(problem, GridDescent(tolerance=1e-9, sweeps=200)).value, None
        while before is None or not torch.equal(found, before):
            # Some blocks have several scales; the codes below are those with which another solve begins.
            found, before = solve(problem, GridDescent(tolerance=1e-9, sweeps=200), start=found).value, found
        codes, best = problem.codes(found), problem.objective(found)
        slack = 2 * rounding(problem.loss, found)
        scales = codes.scales.repeat_interleave(GRID.block, 1)
        for row, column in product(range(3), range(6)):
            if not bool(problem.kept.expand_as(found)[row, column]):
                continue
            for q in range(-2, 2):
                other = found.clone()
                other[row, column] = q * scales[row, column]
                assert problem.objective(other) >= best - slack
        for row, block in product(range(3), range(2)):
            for factor in (1 - 2**-7, 1 + 2**-7):  # the next scales in bfloat16
                other = found.clone()
                scale = (codes.scales[row, block] * factor).to(torch.bfloat16).double()
                part = slice(3 * block, 3 * block + 3)
                other[row, part] = scale * codes.integers[row, part]
                assert problem.objective(other) >= best - slack


@FEWER
@given(problem=gridded() | weighted(GridLeastSquares, "full"), seed=st.integers(0, 100))
def test_the_objective_never_rises_from_one_sweep_to_the_next(problem, seed):
    start = random_feasible(problem, seed)
    found = [problem.objective(start)]
    solve(problem, GridDescent(), start=start, callback=lambda _, weight: found.append(problem.objective(weight())))
    slack = rounding(problem.loss, start) + rounding(problem.loss, problem.loss.weight)
    for before, after in pairwise(found):
        assert after <= before + slack


# -- how near the optimum

SHARES = {"gptq": (Gptq(), 0.05), "descent": (GridDescent(), 0.6), "both": (Chain((Gptq(), GridDescent())), 0.65)}
"""for two bits and six inputs, where one pass over the columns has few columns left to compensate with"""


def closed(solver, masked):
    """Return the mean share of the distance from rounding to the optimum that a solver closes."""
    shares = []
    for seed in range(20):
        problem = correlated(seed, rows=2, masked=masked)
        plain, best = solve(problem, RoundToNearest()).objective, reference(problem).optimum
        shares.append((plain - solve(problem, solver).objective) / (plain - best))
    return fmean(shares)


@pytest.mark.parametrize("masked", [False, True], ids=["no mask", "mask"])
@pytest.mark.parametrize("name", SHARES)
def test_a_stated_share_of_the_distance_to_the_optimum_is_closed(name, masked):
    solver, share = SHARES[name]
    assert closed(solver, masked) >= share


def test_the_bound_is_that_of_restoration():
    for seed in range(5):
        problem = correlated(seed, masked=True)
        relaxed = solve(problem.relaxed)
        for solver in (RoundToNearest(), Gptq(), GridDescent()):
            certificate = solve(problem, solver).certificate
            assert certificate is not None
            assert 0.99 * relaxed.objective <= certificate.lower_bound <= relaxed.objective


def test_the_chosen_solver_is_gptq_or_for_few_weights_a_beam_and_then_descent():
    assert choose(correlated(0)).label == "GridBeam > GridDescent"
    assert choose(correlated(0), (256, 768)).label == "Gptq > GridDescent"


def test_a_beam_loses_less_than_gptq_and_a_wider_one_least():
    """On the grid of Q4_0, with correlated inputs."""
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(200, 64, generator=generator, dtype=torch.float64)
    inputs = inputs @ torch.randn(64, 64, generator=generator, dtype=torch.float64)
    weight = torch.randn(4, 64, generator=generator, dtype=torch.float64)
    problem = GridLeastSquares(LayerLoss.of(weight, InputMoments.from_samples(inputs), 0.01), GRIDS["q4_0"])
    gptq, one, few = (solve(problem, solver) for solver in (Gptq(), GridBeam(1, 1), GridBeam(4, 2)))
    assert one.violation == few.violation == 0
    assert few.objective < 0.9 * gptq.objective and few.objective < one.objective


def test_a_singular_gram_matrix_is_an_error_of_gptq_alone():
    loss = LayerLoss.of(torch.ones(2, 6, dtype=torch.float64), InputMoments.from_samples(torch.eye(6).double()[:2]))
    problem = GridLeastSquares(loss, GRID)
    with pytest.raises(NumericalError, match="damp the loss"):
        solve(problem, Gptq())
    assert solve(problem, GridDescent()).violation == 0
