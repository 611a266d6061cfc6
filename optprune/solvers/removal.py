"""What it costs to remove a weight, or the columns of a unit, when all other weights of its rows make up for it.

These are costs of single removals from the unpruned layer, for a budget that is shared between layers (`budget.py`).
"""

import torch
from jaxtyping import Float
from torch import Tensor

from optprune.numerics import linalg
from optprune.problems import LayerLoss, Link
from optprune.solvers.sparsegpt import inverse_gram
from optprune.work import DOUBLE, Work, factor, inverse, product, storage, sweeps


def entry_costs(loss: LayerLoss) -> Float[Tensor, "out in"]:
    r"""S_ii v_ij^2 / (2 (A^-1)_jj), v = B A^-1: what f rises by when weight ij goes and its row is refitted.

    Exact for a diagonal metric; under a full one other rows stay as they are, so it is an upper bound of the rise.
    NumericalError where A is singular, unless it is zero and so are the costs. Cost: in^3. Reference: Hassibi and Stork
    (1992).
    """
    if loss.dead:
        return torch.zeros_like(loss.weight)
    inverse, weight = inverse_gram(loss)
    costs = weight.square() / (2 * inverse.diagonal())
    return (costs if loss.metric is None else loss.metric.diagonal.double()[:, None] * costs).to(loss.weight)


def entry_costs_work(outputs: int, inputs: int, *, coupled: bool = False) -> Work:
    """Return the work of `entry_costs`, for a weight [outputs, inputs]; that of `unit_costs` of one column is less."""
    flops = factor(inputs) + inverse(inputs) + DOUBLE * product(outputs, inputs, inputs)
    form = (16.0, 28.0, 8.0) if coupled else (16.0, 12.0)
    return Work(flops + sweeps(10, outputs, inputs), storage(outputs, inputs, *form))


def unit_costs(loss: LayerLoss, link: Link) -> Float[Tensor, " units"]:
    r"""1/2 tr(S V_C ((A^-1)_CC)^-1 V_C^T), V = B A^-1: the rise of f when a unit's columns C go, all else refitted.

    Exact for every metric, since all rows lose the same columns. Zero where A is. Cost: in^3.
    """
    if loss.dead:
        return torch.zeros_like(loss.weight[0, link.columns[:, 0]])
    inverse, weight = inverse_gram(loss)
    block = inverse[link.columns[:, :, None], link.columns[:, None, :]]
    # [units, columns, out], for the unit's own little system.
    removed, weighed = (v.T[link.columns] for v in (weight, loss.weigh(weight)))
    return ((linalg.solve(block, removed) * weighed).sum((1, 2)) / 2).to(loss.weight)
