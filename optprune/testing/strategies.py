"""Hypothesis strategies: the awkward problems that a pruning solver must survive.

Numbers come from a seeded generator, structure (shapes, ranks, ties, dead inputs) from hypothesis, so a failing
example shrinks to a small one whose structure is the reason. They are where OPTPRUNE_TEST_DEVICE says (see place.py).
`dtype` is float64 unless asked for; float32 instances stay where 1e-4 of the loss is attainable (see `samples` in
loss_strategies.py). `generic` instances have no ties and full rank, so that a method that ranks has one answer.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor

from optprune.patterns import NM, Pattern, RowWise, SlotWise, Unstructured
from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import (
    ChannelGroups,
    LayerLoss,
    Link,
    LinkedLeastSquares,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)
from optprune.testing.loss_strategies import MetricKind, generator_of, losses, metrics
from optprune.testing.place import here

MOST_COUPLED = 8
"""weights of a sparse problem whose rows are coupled: its reference solves each of its 2^8 masks jointly"""


@st.composite
def weighted(
    draw: st.DrawFn,
    kind: type[Problem],
    metric: MetricKind,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
) -> Problem:
    """A problem of a kind with an output metric in its loss."""
    problem = draw(STRATEGIES[kind](dtype=dtype, generic=generic))
    loss = problem.loss
    if metric == "full" and isinstance(problem, SparseLeastSquares):
        assume(loss.weight.numel() <= MOST_COUPLED)
    found = draw(metrics(loss.weight.shape[0], metric, dtype=dtype, generic=generic))
    loss = replace(loss, metric=found)
    if isinstance(problem, PenalisedLeastSquares):
        # Strengths are relative to the loss, so to the weighed one.
        return replace(problem, loss=loss, penalty=draw(penalties(loss)))
    return replace(problem, loss=loss)


@st.composite
def masked(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False) -> MaskedLeastSquares:
    """A restoration problem with one mask for all rows or one for each; rows may keep nothing, or everything."""
    loss = draw(losses(dtype=dtype, generic=generic))
    rows, width = loss.weight.shape
    rows = 1 if draw(st.booleans(), label="shared mask") else rows
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width), label="mask")
    return MaskedLeastSquares(loss, here(torch.tensor(bits).reshape(rows, width)))


@st.composite
def _units(draw: st.DrawFn, most: int, dtype: torch.dtype, generic: bool) -> tuple[LayerLoss, Tensor, Tensor, int]:
    """A loss, its units (one or two slots, one or two columns a unit, scattered, some columns of no unit), a count."""
    slots = draw(st.integers(1, 2), label="slots")
    size = draw(st.integers(1, most // slots), label="units per slot")
    each = draw(st.integers(1, 2), label="columns per unit")
    units = slots * size
    width = units * each + draw(st.integers(0, 1), label="columns of no unit")
    loss = draw(losses(width, dtype=dtype, generic=generic))
    columns = torch.tensor(draw(st.permutations(range(width)), label="columns")[: units * each]).reshape(units, each)
    slot_of = torch.tensor(draw(st.permutations([slot for slot in range(slots) for _ in range(size)]), label="slot of"))
    return loss, here(columns), here(slot_of), slots * draw(st.integers(1, size), label="keep per slot")


@st.composite
def linked(
    draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False, most: int = 6
) -> LinkedLeastSquares:
    """A choice among at most `most` units, each with a row of a layer before it."""
    loss, columns, slots, keep = draw(_units(most, dtype, generic))
    return LinkedLeastSquares(loss, Link(columns, slots, (here(torch.arange(len(slots)))[:, None],)), keep)


@st.composite
def structured(
    draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False, most: int = 6
) -> StructuredLeastSquares:
    """A choice among at most `most` groups of columns."""
    loss, columns, slots, keep = draw(_units(most, dtype, generic))
    return StructuredLeastSquares(loss, ChannelGroups(columns, slots), keep)


STRENGTHS = (1e-4, 1e-2, 0.3, 1.5)
"""strengths of penalties, as shares of the strength at which zero is the answer"""


@st.composite
def penalties(draw: st.DrawFn, loss: LayerLoss, kinds: tuple[type[Penalty], ...] | None = None) -> Penalty:
    """Every penalty, from tiny to so strong that zero is the answer; weights per entry, column or row, some zero."""
    kind = draw(st.sampled_from(kinds or tuple(PENALTIES)), label="penalty")
    return draw(PENALTIES[kind](loss, draw(st.sampled_from(STRENGTHS), label="strength")))


def _largest(loss: LayerLoss) -> float:
    return float(loss.linear.abs().max()) or 1.0


def _l1(loss: LayerLoss, share: float) -> st.SearchStrategy[Penalty]:
    return st.just(L1(share * _largest(loss)))


@st.composite
def _weighted_l1(draw: st.DrawFn, loss: LayerLoss, share: float) -> Penalty:
    rows, width = loss.weight.shape
    shape = draw(st.sampled_from(((rows, width), (width,), (rows, 1))), label="shape of the weights")
    weights = torch.rand(shape, generator=generator_of(draw), dtype=torch.float64) + 0.1
    if draw(st.booleans(), label="zero weights"):
        weights.view(-1)[::3] = 0
    # In float64 also where the problem is not: a penalty need not know the dtype of the problem.
    return WeightedL1(share * _largest(loss) * here(weights))


@st.composite
def _elastic_net(draw: st.DrawFn, loss: LayerLoss, share: float) -> Penalty:
    ridge = draw(st.sampled_from((0.0, 1e-3, 1.0)), label="ridge") * float(loss.gram.diagonal().mean())
    if loss.metric is not None:
        ridge *= float(loss.metric.diagonal.mean())
    return ElasticNet(share * _largest(loss), ridge)


def _column_groups(loss: LayerLoss, share: float) -> st.SearchStrategy[Penalty]:
    return st.just(ColumnGroups(share * (float(loss.linear.norm(dim=0).max()) or 1.0)))


PENALTIES: dict[type[Penalty], Callable[[LayerLoss, float], st.SearchStrategy[Penalty]]] = {
    L1: _l1,
    WeightedL1: _weighted_l1,
    ElasticNet: _elastic_net,
    ColumnGroups: _column_groups,
}
"""for each penalty a strategy that takes the loss it goes with and a strength relative to it"""


@st.composite
def penalised(
    draw: st.DrawFn,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
    kinds: tuple[type[Penalty], ...] | None = None,
) -> PenalisedLeastSquares:
    """A layer loss with one of the penalties."""
    loss = draw(losses(dtype=dtype, generic=generic))
    return PenalisedLeastSquares(loss, draw(penalties(loss, kinds)))


@st.composite
def sparse(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False) -> SparseLeastSquares:
    """A choice among at most 12 single weights: anywhere, per row, or n of m; perhaps none of them, or all."""
    kind = draw(st.sampled_from(ENTRY_PATTERNS), label="pattern")
    if kind is NM:
        m, rows, groups = draw(
            st.sampled_from(((2, 1, 3), (2, 2, 2), (2, 3, 1), (4, 1, 2), (4, 3, 1), (3, 2, 2), (1, 2, 3)))
        )
        pattern, width = NM(draw(st.integers(0, m), label="n"), m), m * groups
    else:
        rows, width = draw(
            st.sampled_from(((1, 1), (1, 2), (1, 5), (1, 7), (2, 1), (2, 3), (2, 6), (3, 4), (4, 3), (5, 2)))
        )
        most = width if kind is RowWise else rows * width
        keep = draw(st.integers(0, most), label="keep")
        pattern = RowWise(keep) if kind is RowWise else Unstructured(keep)
    return SparseLeastSquares(draw(losses(width, dtype=dtype, generic=generic, rows=rows)), pattern)


TINY_SHAPES = ((1, 1), (1, 2), (1, 5), (1, 7), (2, 1), (2, 3), (2, 6), (3, 4), (4, 3), (5, 2))
GROUPED_SHAPES = ((2, 1, 3), (2, 2, 2), (2, 3, 1), (4, 1, 2), (4, 3, 1), (3, 2, 2), (1, 2, 3))
"""(m, rows, groups) for n of m"""

ENTRY_PATTERNS: tuple[type[Pattern], ...] = (Unstructured, RowWise, NM)
"""the patterns of single weights"""

STRATEGIES: dict[type[Problem], Callable[..., st.SearchStrategy]] = {
    MaskedLeastSquares: masked,
    LinkedLeastSquares: linked,
    PenalisedLeastSquares: penalised,
    SparseLeastSquares: sparse,
    StructuredLeastSquares: structured,
}
"""for each concrete kind of problem a strategy that takes `dtype` and `generic`"""


@st.composite
def scores(draw: st.DrawFn, *shape: int) -> Tensor:
    """Scores with many ties: small integers, so that sums of them are exact."""
    count = int(torch.Size(shape).numel())
    numbers = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count), label="scores")
    return here(torch.tensor(numbers, dtype=torch.float64).reshape(shape))


@st.composite
def _unstructured(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    rows, width = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    return Unstructured(draw(st.integers(0, rows * width))), draw(scores(rows, width))


@st.composite
def _row_wise(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    rows, width = draw(st.integers(1, 2)), draw(st.integers(1, 4))
    return RowWise(draw(st.integers(0, width))), draw(scores(rows, width))


@st.composite
def _n_of_m(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    m = draw(st.sampled_from((2, 4)))
    rows, blocks = draw(st.sampled_from(((1, 1), (1, 2), (2, 1))))
    return NM(draw(st.integers(0, m)), m), draw(scores(rows, m * blocks))


@st.composite
def _slot_wise(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    slots, size = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    slot_of = draw(st.permutations([slot for slot in range(slots) for _ in range(size)]))
    return SlotWise(here(torch.tensor(slot_of)), draw(st.integers(0, size))), draw(scores(slots * size))


PATTERNS: dict[type[Pattern], st.SearchStrategy[tuple[Pattern, Tensor]]] = {
    Unstructured: _unstructured(),
    RowWise: _row_wise(),
    NM: _n_of_m(),
    SlotWise: _slot_wise(),
}
"""for each concrete pattern a strategy of (pattern, scores), small enough to list every mask"""
