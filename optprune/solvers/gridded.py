"""Weights on the grid of a low-bit format: rounding, columns with compensated errors, and coordinate descent."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from optprune.errors import NumericalError
from optprune.grids import Grid
from optprune.numerics import linalg
from optprune.problems import GridLeastSquares, MaskedLeastSquares
from optprune.solvers.base import Answer, Certificate, DirectSolver, Solver, Status, check_options, measuring, unfitted
from optprune.solvers.conjugate_gradients import ConjugateGradients
from optprune.solvers.inverse import inverse_gram
from optprune.solvers.restore import restored_bound
from optprune.work import Work, eigenvectors, factor, inverse, product, storage, sweeps

COUPLED = "it rounds row by row, and the full output metric couples the rows: take its diagonal"
SINGULAR = "the inverse Gram matrix is not positive definite in this precision: raise the damping"
SPREADS = 38
"""number of scales that are tried in each block, for the plan"""
RESTORING = 50
"""the most steps of conjugate gradients for the minimiser on the mask, and for a lower bound"""


def work_on_grid(flops: float, outputs: int, inputs: int, coupled: bool) -> Work:
    """Return the work of a solve of so many flops, of measuring its answer, and of proving a bound."""
    proof = RESTORING * (product(outputs, inputs, inputs) + sweeps(20, outputs, inputs)) + factor(inputs)
    whole = flops + proof + measuring(outputs, inputs, coupled=coupled)
    return Work(whole, unfitted(outputs, inputs, coupled=coupled))


def relaxed_bound(problem: GridLeastSquares, value: Float[Tensor, "out in"]) -> Certificate | None:
    """Return the lower bound of the problem without its grid, by some steps of conjugate gradients from a value."""
    if problem.mask is None and problem.loss.pull is None:
        return Certificate(0.0, "the original weights have no loss without the grid")
    return restored_bound(problem.relaxed, restored_on_mask(problem, value))


def restored_on_mask(problem: GridLeastSquares, start: Float[Tensor, "out in"]) -> Float[Tensor, "out in"]:
    """Return the best weight on the mask, without the grid, by conjugate gradients from a start."""
    solver, steps = ConjugateGradients(), 0
    relaxed, size, _ = problem.relaxed.in_moderate_units()
    assert isinstance(relaxed, MaskedLeastSquares)
    state = solver.init(relaxed, start * size)
    while solver.done(relaxed, state) is None and steps < RESTORING:
        state, steps = solver.step(relaxed, state), steps + 1
    return solver.value(relaxed, state) / size


@final
@dataclass(frozen=True)
class RoundToNearest(DirectSolver[GridLeastSquares]):
    """Round every weight of the start to the grid, with scales chosen by sum_j A_jj (v_j - s q_j)^2.

    The problem's own start, the original weights rounded in this way, is returned as it is. Weights outside the mask
    become zero. The diagonal of A is what llama.cpp calls the importance matrix. Cost: 38 passes of the weights, twice.
    Reference: the baseline of GPTQ (arXiv 2210.17323); make_qx_quants of ggml.
    """

    accepts = (GridLeastSquares,)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        return work_on_grid(sweeps(8 * SPREADS, outputs, inputs), outputs, inputs, coupled)

    def unsupported(self, problem: GridLeastSquares) -> str | None:
        return COUPLED if problem.loss.coupled else None

    def answer(self, problem: GridLeastSquares, start: Tensor) -> Answer:
        own = problem.start()
        return Answer(own if torch.equal(start, own) else problem.rounded(start))

    def prove(self, problem: GridLeastSquares, value: Tensor) -> Certificate | None:
        return relaxed_bound(problem, value)


@final
@dataclass(frozen=True)
class Gptq(DirectSolver[GridLeastSquares]):
    r"""Round columns from left to right, each error compensated by the columns that follow.

    With U the upper Cholesky factor of A^-1 = U^T U, for each column j in turn:

        e = (v_j - round(v_j)) / U_jj;   V[:, j:] -= e U[j, j:]

    A weight outside the mask is rounded to zero. The scale of a block is chosen when its first column is reached, by
    sum_j (v_j - s q_j)^2 / U_jj^2. V begins at the minimiser B A^-1 (which is W when x* = x), or with a mask at the
    minimiser on the mask V*, by conjugate gradients from the start: f(V) - f(V*) = 1/2 tr(S (V - V*) A (V - V*)^T) for
    all V on the mask, so that nothing is lost but by rounding. Raises NumericalError where A is not positive definite
    by more than rounding.

    A full output metric S = (R^T R)^-1, with R upper triangular, couples the rows. They are then rounded in groups G
    from the first to the last, and the errors E of a group are compensated by the rows L that follow:

        V_L -= (R_GG^-1 R_GL)^T E.

    With groups of one row this is the same method on all weights in one row, whose Hessian is the product S x A.

    Cost: in^3 + out in^2 and 38 passes of the weights, with a mask the gradients' steps, with a full metric out^3 +
    out^2 in more; memory 2 in^2 + 2 out in in float64. Reference: GPTQ (arXiv 2210.17323), Algorithm 1; with a mask the
    joint form of SparseGPT (arXiv 2301.00774, section 3.5); the compensation in rows is that of YAQA (arXiv
    2505.22988).
    """

    accepts = (GridLeastSquares,)

    columns: int = 128
    """number of columns after which the others are updated, rounded to whole blocks"""
    rows: int = 32
    """number of rows that are rounded together where a full metric couples rows"""

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        updates = (1 + 12 * self.columns / 128) * product(outputs, inputs, inputs)
        flops = 2 * factor(inputs) + inverse(inputs) + updates + sweeps(8 * SPREADS, outputs, inputs)
        if not coupled:
            return work_on_grid(flops, outputs, inputs, coupled)
        # A column of a few rows takes as long as these operations, however few numbers it has.
        flops += eigenvectors(outputs) + product(outputs, outputs, inputs) + 2.5e7 * inputs * outputs / self.rows
        return replace(work_on_grid(flops, outputs, inputs, coupled), bytes=storage(outputs, inputs, 24.0, 80.0, 36.0))

    def answer(self, problem: GridLeastSquares, start: Tensor) -> Answer:
        inverted, weight = inverse_gram(problem.loss)
        upper, failed = linalg.try_cholesky(inverted, upper=True)
        if bool(failed):
            raise NumericalError(SINGULAR)
        if problem.mask is not None:
            weight = restored_on_mask(problem, start).to(weight)
        metric, kept = problem.loss.metric, problem.kept.expand_as(weight)
        if metric is None or not metric.full:
            self._round(problem.grid, weight, kept, upper)
        else:
            factor = linalg.upper_factor(metric.whitening.inverse.to(weight))
            for first in range(0, len(weight), self.rows):
                group, later = slice(first, first + self.rows), slice(first + self.rows, None)
                errors = weight[group].clone()
                self._round(problem.grid, weight[group], kept[group], upper)
                errors -= weight[group]
                shares = linalg.solve_upper(factor[group, group], factor[group, later])
                weight[later] -= shares.T @ errors
        return Answer(weight.to(problem.loss.weight))

    def _round(
        self,
        grid: Grid,
        weight: Float[Tensor, "rows in"],
        kept: Bool[Tensor, "rows in"],
        upper: Float[Tensor, "in in"],
    ) -> None:
        """Round rows in place, column by column."""
        width, importance = weight.shape[1], upper.diagonal().square().reciprocal()
        size = max(1, self.columns // grid.block) * grid.block
        for first in range(0, width, size):
            last = min(first + size, width)
            inner, local, errors = weight[:, first:last], upper[first:last, first:last], weight[:, first:last].clone()
            for number in range(0, last - first, grid.block):
                inside = slice(first + number, first + number + grid.block)
                values = torch.where(kept[:, inside], inner[:, number : number + grid.block], 0.0)
                scales, lows = grid.fit(values, importance[inside].expand_as(values))
                for j in range(number, number + grid.block):
                    rounded = scales * grid.round(inner[:, j], scales, lows) * kept[:, first + j]
                    torch.div(inner[:, j] - rounded, local[j, j], out=errors[:, j])
                    inner[:, j + 1 :].addr_(errors[:, j], local[j, j + 1 :], alpha=-1)
                    inner[:, j] = rounded
            weight[:, last:] -= errors @ upper[first:last, last:]

    def prove(self, problem: GridLeastSquares, value: Tensor) -> Certificate | None:
        return relaxed_bound(problem, value)


@dataclass(frozen=True, eq=False)
class DescentState:
    """The weight with its codes, and how much its sweeps have lowered f."""

    weight: Float[Tensor, "out in"]
    scales: Float[Tensor, "out blocks"]
    lows: Float[Tensor, "out blocks"]
    gains: tuple[float, ...] = ()
    """the decrease of f in each sweep"""
    still: bool = False
    """whether the last sweep changed nothing"""


@final
@dataclass(frozen=True)
class GridDescent(Solver[GridLeastSquares, DescentState]):
    r"""Minimise f over one integer, or one scale, at a time.

    A step is a sweep over all columns. With r = V A - B, the best integer of column j in a row, the others fixed, is

        q_j = round((v_j - r_j / A_jj) / s),

    and after the columns of a block its scale moves by -(r . q) / (q A q^T), rounded to a scale that can be stored,
    where that lowers f. The objective never rises. Rows move together; weights outside the mask stay zero. It begins at
    the start, or at its projection, and stops when a sweep changes nothing or gains less than `tolerance` of what all
    of them gained.

    With a full output metric r = S (V A - B), and the changes d_i of two rows cost S_ik A_jj d_i d_k together. All rows
    that gain alone change if that lowers f by more than the best one does; else that one changes.

    Cost of a step: out in^2, with a full metric 2 out^2 in more; memory in^2 + 3 out in. Reference: coordinate descent
    for this problem is QuantEase (arXiv 2309.01885); the steps of scales and of coupled rows are ours.
    """

    accepts = (GridLeastSquares,)

    tolerance: float = 0.02
    sweeps: int = 20
    """the most sweeps"""
    columns: int = 128
    """number of columns between products with the whole Gram matrix, rounded to whole blocks"""

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        # About a third of the sweeps are taken; within a group of columns the updates run at the speed of memory.
        sweep = (1 + 12 * self.columns / 128) * product(outputs, inputs, inputs) + sweeps(30, outputs, inputs)
        if coupled:  # as are the products of a column of changes with the metric
            sweep += 48 * product(outputs, outputs, inputs)
        return work_on_grid(self.sweeps / 3 * sweep, outputs, inputs, coupled)

    def monotone(self, problem: GridLeastSquares) -> bool:
        return True

    def init(self, problem: GridLeastSquares, start: Tensor) -> DescentState:
        codes = problem.codes(start)
        return DescentState(codes.values(), codes.scales, codes.lows.to(start))

    def step(self, problem: GridLeastSquares, state: DescentState) -> DescentState:
        grid, loss, kept = problem.grid, problem.loss, problem.kept
        weight, scales = state.weight.clone(), state.scales.clone()
        metric = loss.metric.matrix.to(weight) if loss.metric is not None and loss.metric.full else None
        moved = torch.zeros((), dtype=torch.bool, device=weight.device)
        total = torch.zeros((), dtype=torch.float64, device=weight.device)
        size = max(1, self.columns // grid.block) * grid.block
        for first in range(0, weight.shape[1], size):
            group = slice(first, min(first + size, weight.shape[1]))
            residual = (weight - loss.weight) @ loss.gram[:, group]
            if loss.pull is not None:
                residual += loss.pull[:, group]
            if metric is not None:
                residual = metric @ residual
            gram = loss.gram[group, group]
            for start in range(0, gram.shape[0], grid.block):
                block = slice(start, start + grid.block)
                inside, number = slice(first + start, first + start + grid.block), (first + start) // grid.block
                columns = _Block(
                    grid=grid,
                    weight=weight[:, inside],
                    scales=scales[:, number],
                    lows=state.lows[:, number],
                    kept=kept[:, inside],
                    residual=residual,
                    gram=gram,
                    metric=metric,
                    columns=block,
                )
                lowered, changed = columns.improve()
                total, moved = total + lowered, moved | changed
        # Both are read together, so that a GPU is waited for once.
        gain, changed = linalg.numbers(total, moved.to(total))
        return replace(state, weight=weight, scales=scales, gains=(*state.gains, gain), still=not changed)

    def done(self, problem: GridLeastSquares, state: DescentState) -> Status | None:
        if not state.gains:
            return None
        little = state.gains[-1] <= self.tolerance * sum(state.gains)
        return Status.CONVERGED if state.still or little or len(state.gains) >= self.sweeps else None

    def value(self, problem: GridLeastSquares, state: DescentState) -> Tensor:
        return state.weight

    def prove(self, problem: GridLeastSquares, value: Tensor) -> Certificate | None:
        return relaxed_bound(problem, value)


@dataclass(frozen=True, eq=False)
class _Block:
    """A block of columns in a sweep. Its weights, its scales and the residual of its group are changed in place."""

    grid: Grid
    weight: Float[Tensor, "out block"]
    scales: Float[Tensor, " out"]
    lows: Float[Tensor, " out"]
    kept: Bool[Tensor, "rows block"]
    residual: Float[Tensor, "out group"]
    gram: Float[Tensor, "group group"]
    metric: Float[Tensor, "out out"] | None
    """S where it couples rows"""
    columns: slice
    """the columns of the block in its group"""

    def improve(self) -> tuple[Float[Tensor, ""], Bool[Tensor, ""]]:
        """Return the decrease of f by one pass over integers and scales, and whether any of them changed."""
        before = self.weight.clone()
        gains = [self._integer(j) for j in range(self.weight.shape[1])]
        gains.append(self._scale())
        return torch.stack(gains).sum(), (self.weight != before).any()

    def _integer(self, j: int) -> Float[Tensor, ""]:
        column = self.columns.start + j
        slope, product = self.residual[:, column], self.gram[column, column]
        q = self.grid.round(self.weight[:, j] - self._step(slope, product), self.scales, self.lows)
        change = torch.where(self.kept[:, j], q * self.scales - self.weight[:, j], 0.0)
        change, gain = self._lowering(change, slope, product)
        self.weight[:, j] = torch.where(change != 0, q * self.scales, self.weight[:, j])
        self.residual.addr_(self._weighed(change), self.gram[column])
        return gain

    def _scale(self) -> Float[Tensor, ""]:
        q = self.grid.round(self.weight, self.scales[:, None], self.lows[:, None])
        rows = self.gram[self.columns]
        slope, images = (self.residual[:, self.columns] * q).sum(1), q @ rows[:, self.columns]
        products = (images * q).sum(1) if self.metric is None else images @ q.T
        own = products if self.metric is None else products.diagonal()
        wanted = self.grid.stored(self.scales - self._step(slope, own))
        change, gain = self._lowering(wanted - self.scales, slope, products)
        self.scales.copy_(torch.where(change != 0, wanted, self.scales))
        self.weight.copy_(q * self.scales[:, None])
        self.residual.add_(self._weighed(change[:, None] * q) @ rows)
        return gain

    def _step(self, slope: Float[Tensor, " out"], products: Float[Tensor, "..."]) -> Float[Tensor, " out"]:
        """Return the step of each row alone to the least f; `products` are the curvatures without the metric."""
        curvature = products if self.metric is None else self.metric.diagonal() * products
        return torch.where(curvature > 0, slope / curvature, 0.0)

    def _weighed(self, change: Tensor) -> Tensor:
        """Return S d."""
        return change if self.metric is None else self.metric @ change

    def _lowering(
        self, change: Float[Tensor, " out"], slope: Float[Tensor, " out"], products: Float[Tensor, "..."]
    ) -> tuple[Float[Tensor, " out"], Float[Tensor, ""]]:
        """Return the changes of the rows that are made, and how much they lower f together.

        products: the q A q^T of one unit of change in two rows, as a matrix, or as a number for any two; without a
        metric those of each row with itself.
        """
        if self.metric is not None:
            return _together(change, slope, self.metric, products)
        gain = -change * (slope + change * products / 2)
        return torch.where(gain > 0, change, 0.0), gain.clamp(min=0).sum(dtype=torch.float64)


def _together(
    change: Float[Tensor, " out"],
    slope: Float[Tensor, " out"],
    metric: Float[Tensor, "out out"],
    products: Float[Tensor, "..."],
) -> tuple[Float[Tensor, " out"], Float[Tensor, ""]]:
    """Return the changes of coupled rows that are made, and how much they lower f: all at once, or the best alone."""
    every, hessian = (products, metric) if products.ndim == 0 else (1.0, metric * products)
    own = every * hessian.diagonal()
    alone = -change * (slope + change * own / 2)
    made = torch.where(alone > 0, change, 0.0)
    gain = -(made * (slope + every * (hessian @ made) / 2)).sum()
    best = alone.argmax()
    one = torch.zeros_like(change).index_copy_(0, best[None], change[best][None])
    made = torch.where(gain >= alone[best], made, torch.where(alone[best] > 0, one, 0.0))
    return made, torch.maximum(gain, alone[best]).clamp(min=0).double()
