"""One choice shared by several layers: the units to keep, where a unit is a set of rows and columns removed together.

Removing column j of the second of two consecutive linear layers makes row j of the first irrelevant (FASP, arXiv
2501.09412), so the two go together and the loss is that of the second layer alone.
"""

from dataclasses import dataclass
from typing import ClassVar, final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.numerics.tensors import as_indices
from optprune.problems.loss import LayerLoss
from optprune.problems.structured import Channels, StructuredProblem


@final
@dataclass(frozen=True, eq=False)
class Link(Channels):
    """Unit j stands for columns[j] of the consumer and for rows[p][j] (with their biases) of each producer p.

    An MLP has one unit per hidden neuron and one slot. Attention has one unit per dimension of a KV head: its rows
    are one row of V, its columns the same dimension of every query head that reads that KV head, and its slot is
    the KV head, because every head must keep the same number of dimensions.
    """

    rows: tuple[Int[Tensor, "units _"], ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        every = tuple(as_indices("the rows of units", rows, ("units", "rows"), self.columns) for rows in self.rows)
        object.__setattr__(self, "rows", every)
        for rows in every:
            if len(rows) != self.units:
                raise InputError(f"a link of {self.units} units has {len(rows)} rows: give one for each unit")

    def first(self, keep: int) -> Bool[Tensor, " units"]:
        """Return the mask of the first `keep` units of each slot."""
        place = torch.arange(self.units, device=self.slots.device) % (self.units // self.slot_count)
        return place < keep

    def to(self, device: torch.device) -> "Link":
        """Return the same link on another device."""
        if device == self.slots.device:
            return self
        return Link(self.columns.to(device), self.slots.to(device), tuple(rows.to(device) for rows in self.rows))


@final
@dataclass(frozen=True, eq=False)
class LinkedLeastSquares(StructuredProblem):
    """minimise f(V) over V and z subject to V_c = 0 for the columns c of every unit with z_j = 0,
    z in {0, 1}^units, sum over each slot of z_j = keep / slots.

    V [out, in] is the consumer's weight, `keep` the number of units to keep. Mixed-integer: not convex in z, convex
    in V once z is fixed (`restrict`). f is the consumer's LayerLoss, in (output)^2 per token; the producers only
    lose rows whose outputs nothing reads any more, so they add nothing to it.

    Reference: FASP (arXiv 2501.09412), section on the pruning structure.
    """

    kind: ClassVar[str] = "linked least squares"

    loss: LayerLoss
    link: Link
    keep: int

    @property
    def channels(self) -> Link:
        return self.link


def loss_of_rows(
    weight: Float[Tensor, "out in"],
    bias: Float[Tensor, " out"] | None,
    moments: InputMoments,
    damping: float,
    metric: OutputMetric | None,
) -> LayerLoss:
    """Return the loss of a layer as a function of its transposed weight [in, out], whose columns are its outputs.

        f(V) = 1/2 tr(S (V - W) A (V - W)^T) = 1/2 tr(A (V - W)^T S (V - W))

    so the metric S of the outputs takes the place of the Gram matrix and A, that of the inputs, takes the place of the
    metric: problems whose units are columns, and their solvers, serve where units are rows. `damping` is that of A as a
    share of its mean diagonal. A bias is one more column of W, of an input that is always 1, and so the last row of the
    transposed weight. W is compared with itself on the inputs x* that the layer will get. Under a diagonal metric,
    and without one, which gives outputs a weight of 1, no row makes up for another.
    """
    gram, own = moments.gram, weight.detach().to(moments.mean)
    if bias is not None:
        mean = moments.mean[:, None]
        gram = torch.cat([torch.cat([gram, mean], 1), torch.cat([mean, torch.ones_like(mean[:1])]).T])
        own = torch.cat([own, bias.detach().to(own)[:, None]], 1)
    # Averages that were summed here need no check of definiteness, also with one more input.
    summed = moments.proved is moments.covariance
    inputs = OutputMetric(gram, torch.zeros_like(gram[0]), moments.tokens, gram if summed else None).damped(damping)
    ones, zeros = own.new_ones(len(own)), own.new_zeros(len(own))
    given = OutputMetric(ones, zeros, moments.tokens) if metric is None else metric.to(own.dtype).to(own.device)
    outputs = given.average if given.full else torch.diag(given.average)
    proved = outputs if given.proved is given.average else None
    squares = InputMoments(outputs, zeros, given.tokens, proved=proved)
    return LayerLoss(own.T.contiguous(), squares, given.damping, metric=inputs)
