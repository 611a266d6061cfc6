"""Rounding to a grid by a beam: the best few roundings of the blocks so far are kept, not only one as in GPTQ."""

from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import NumericalError
from optprune.grids import Grid
from optprune.numerics import linalg
from optprune.problems import GridLeastSquares
from optprune.solvers.base import Answer, Certificate, DirectSolver, check_options
from optprune.solvers.gridded import SINGULAR, SPREADS, relaxed_bound, restored_on_mask, work_on_grid
from optprune.solvers.inverse import inverse_gram
from optprune.work import Work, eigenvectors, factor, inverse, product, sweeps

MOST_COUPLED = 1024
"""the most weights that are rounded together where a full output metric couples rows"""
MOST_TRIED = 114
"""the most scales that are tried in a block"""
BATCH_BYTES = 1 << 26
"""the memory of the rows that are rounded together"""
COUPLED = (
    "the full output metric couples all {} weights, of which it rounds at most " + str(MOST_COUPLED) + " together: "
    "take its diagonal, or Gptq"
)


@final
@dataclass(frozen=True)
class GridBeam(DirectSolver[GridLeastSquares]):
    r"""Round block after block from left to right, and keep the `beam` best roundings of each row.

    With U the upper Cholesky factor of A^-1 = U^T U, the rest of a row at the minimiser for what is rounded, a block b
    of it that is rounded from t to s q costs, and moves the columns that follow, by

        e = (t - s q) U_bb^-1,   f += 1/2 |e|^2,   V[:, b+] -= e U[b, b+].

    For each rounding of the blocks before, and each scale s that `Grid.candidates` tries, the `paths` best integers q
    are searched, column after column with four integers around each value; then s is moved to its best value for q,
    <t U_bb^-1, q U_bb^-1> / |q U_bb^-1|^2, and stored. Of all these the `beam` with the least f go on. With one of each
    this is GPTQ with scales chosen by f. The minimiser, masks and singular matrices are as in `Gptq`.

    A full output metric couples the rows. All weights are then one row, whose A is the product S x A; problems of more
    than `MOST_COUPLED` weights are refused.

    Cost: in^3 + beam out in^2, and 76 beam paths out in block products; memory 2 in^2 + beam out in, and 38 beam paths
    out block. So it is for small layers. Reference: K-best sphere decoding (Guo and Nilsson, 2006), of which GPTQ
    (arXiv 2210.17323) is the case of one, Babai's nearest plane; the choice of scales in it is ours.
    """

    accepts = (GridLeastSquares,)

    beam: int = 16
    """number of roundings of the blocks so far"""
    paths: int = 4
    """number of roundings of a block that are searched for each scale"""

    def __post_init__(self) -> None:
        check_options(self)

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        flops = 2 * factor(inputs) + inverse(inputs) + self.beam * product(outputs, inputs, inputs)
        flops += sweeps(8 * SPREADS * self.beam * self.paths, outputs, inputs)
        if coupled:
            flops += eigenvectors(outputs) + self.beam * product(outputs * outputs, inputs, inputs)
        found = work_on_grid(flops, outputs, inputs, coupled)
        return replace(found, bytes=found.bytes + 64 * self.beam * self.paths * SPREADS * outputs * inputs)

    def unsupported(self, problem: GridLeastSquares) -> str | None:
        count = problem.loss.weight.numel()
        return COUPLED.format(count) if problem.loss.coupled and count > MOST_COUPLED else None

    def answer(self, problem: GridLeastSquares, start: Tensor) -> Answer:
        inverted, weight = inverse_gram(problem.loss)
        upper, failed = linalg.try_cholesky(inverted, upper=True)
        if bool(failed):
            raise NumericalError(SINGULAR)
        if problem.mask is not None:
            weight = restored_on_mask(problem, start).to(weight)
        kept, metric = problem.kept.expand_as(weight), problem.loss.metric
        if problem.loss.coupled:
            assert metric is not None
            upper = torch.kron(linalg.upper_factor(metric.whitening.inverse.to(weight)), upper)
            weight, kept = weight.reshape(1, -1), kept.reshape(1, -1)
        grid = problem.grid
        one = weight.element_size() * MOST_TRIED * self.beam * self.paths * 4 * grid.block
        rows = torch.split(torch.arange(len(weight), device=weight.device), max(1, BATCH_BYTES // one))
        found = torch.cat([self._rounded(grid, weight[few], kept[few], upper) for few in rows])
        return Answer(found.reshape(problem.loss.weight.shape).to(problem.loss.weight))

    def _rounded(
        self, grid: Grid, weight: Float[Tensor, "rows n"], kept: Bool[Tensor, "rows n"], upper: Float[Tensor, "n n"]
    ) -> Float[Tensor, "rows n"]:
        """Return the best rounding of each row that the beam ends with."""
        beam, cost = weight[:, None], torch.zeros_like(weight[:, :1])
        integers_of, scales_of = beam[..., :0], beam[..., :0]
        for first in range(0, weight.shape[1], grid.block):
            block, later = slice(first, first + grid.block), slice(first + grid.block, None)
            target, local = beam[..., block], upper[block, block]
            wanted = _before(target[:, :, None, None], local)
            scales, lows = grid.candidates(target * kept[:, None, block])
            integers, allowed = self._integers(grid, target, kept[:, block], local, scales, lows)
            bent = _before(integers, local)
            size = bent.square().sum(-1)
            fitted = torch.where(size > 0, (bent * wanted).sum(-1) / torch.where(size > 0, size, 1.0), 0.0)
            fitted = grid.stored(fitted)[..., None]
            errors = wanted - fitted * bent
            total = cost[:, :, None, None] + errors.square().sum(-1) / 2
            cost, best = _least(torch.where(allowed, total, torch.inf).flatten(1), self.beam)
            parent = best // allowed[0, 0].numel()
            chosen, errors, scales = (_taken(each.flatten(1, 3), best) for each in (integers, errors, fitted))
            beam, integers_of, scales_of = (_taken(each, parent) for each in (beam, integers_of, scales_of))
            integers_of, scales_of = torch.cat([integers_of, chosen], -1), torch.cat([scales_of, scales], -1)
            beam[..., later] -= errors @ upper[block, later]
        return _best_of(grid, weight, upper, integers_of, scales_of)

    def _integers(
        self,
        grid: Grid,
        target: Float[Tensor, "rows beam block"],
        kept: Bool[Tensor, "rows block"],
        local: Float[Tensor, "block block"],
        scales: Float[Tensor, "rows beam t"],
        lows: Float[Tensor, "rows beam t"],
    ) -> tuple[Float[Tensor, "rows beam t paths block"], Bool[Tensor, "rows beam t paths"]]:
        """Return the best integers for each scale, and which of them are on the grid."""
        scale, low = scales[..., None], lows[..., None]
        rest = target[:, :, None, None].expand(*scales.shape, 1, -1)
        integers, cost = torch.zeros_like(rest), torch.zeros_like(rest[..., 0])
        around = torch.arange(4, dtype=target.dtype, device=target.device)
        for j in range(grid.block):
            value, possible = rest[..., j], kept[:, j, None, None, None]
            exact = torch.where(scale == 0, 0.0, value / scale)
            # Four integers of the grid around the value.
            lowest = torch.minimum(torch.maximum(exact.floor() - 1, low), low + grid.steps - 3)
            options = (lowest[..., None] + around) * possible[..., None]
            errors = (value[..., None] - scale[..., None] * options) / local[j, j]
            costs = cost[..., None] + errors.square() / 2
            # Where only zero is possible it is one option.
            costs[..., 1:].masked_fill_((options[..., 1:] == options[..., :1]) | (scale == 0)[..., None], torch.inf)
            cost, best = costs.flatten(-2).topk(min(self.paths, costs[0, 0, 0].numel()), largest=False)
            error = errors.flatten(-2).gather(-1, best)
            parent = (best // options.shape[-1])[..., None].expand(*best.shape, grid.block)
            integers, rest = integers.gather(-2, parent), rest.gather(-2, parent)
            integers[..., j] = options.flatten(-2).gather(-1, best)
            rest = rest - error[..., None] * local[j]
        return integers, cost < torch.inf

    def prove(self, problem: GridLeastSquares, value: Tensor) -> Certificate | None:
        return relaxed_bound(problem, value)


def _before(values: Float[Tensor, "*any block"], local: Float[Tensor, "block block"]) -> Float[Tensor, "*any block"]:
    """Return X U^-1 for an upper triangular U."""
    return linalg.solve_lower(local.T, values.flatten(0, -2).T).T.view(values.shape)


def _least(cost: Float[Tensor, "rows n"], count: int) -> tuple[Float[Tensor, "rows k"], Int[Tensor, "rows k"]]:
    """Return the least different costs of each row, ascending, with their places.

    Two scales that are tried often end at the same integers, and so at the same cost, which are counted once.
    """
    ordered, order = cost.sort(dim=1, stable=True)
    repeated = torch.cat([torch.zeros_like(ordered[:, :1], dtype=torch.bool), ordered[:, 1:] == ordered[:, :-1]], 1)
    found, place = ordered.masked_fill(repeated, torch.inf).topk(min(count, cost.shape[1]), dim=1, largest=False)
    found, rank = found.sort(dim=1, stable=True)
    return found, order.gather(1, place.gather(1, rank))


def _best_of(
    grid: Grid,
    weight: Float[Tensor, "rows n"],
    upper: Float[Tensor, "n n"],
    integers: Float[Tensor, "rows beam n"],
    scales: Float[Tensor, "rows beam blocks"],
) -> Float[Tensor, "rows n"]:
    """Return the best rounding of each row, with the scales found or with those that are best together."""
    count = scales.shape[-1]
    apart = torch.eye(count, dtype=weight.dtype, device=weight.device).repeat_interleave(grid.block, 1)
    bent, wanted = _before(integers[..., None, :] * apart, upper), _before(weight[:, None], upper)
    gram, right = bent @ bent.mT, (bent @ wanted[..., None])[..., 0]
    together = grid.stored((linalg.pinv(gram) @ right[..., None])[..., 0])
    every = torch.cat([scales, together], 1)
    twice = torch.cat([bent, bent], 1)
    cost = (wanted - (every[..., None, :] @ twice)[..., 0, :]).square().sum(-1)
    best = cost.argmin(1)
    each = torch.arange(len(best), device=best.device)
    chosen = every[each, best].repeat_interleave(grid.block, 1)
    return chosen * integers[each, best % scales.shape[1]]


def _taken(values: Float[Tensor, "rows n m"], places: Int[Tensor, "rows k"]) -> Float[Tensor, "rows k m"]:
    """Return the vectors at some places of each row."""
    return values.gather(1, places[..., None].expand(*places.shape, values.shape[-1]))
