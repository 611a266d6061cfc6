"""Hypothesis strategies of problems that are difficult for solvers, and of their parts.

Numbers come from a seeded generator, structure (shapes, ranks, ties, dead inputs) from hypothesis, so a failing
example shrinks to a small one whose structure is the reason. Tensors are on `chosen_device`.
`dtype` is float64 unless asked for; float32 instances stay where 1e-4 of the loss is attainable (see `samples`).
`generic` instances have no ties and full rank, so that a method that ranks has one answer.
"""

import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal, TypeVar, get_args

import torch
from hypothesis import HealthCheck, Phase, assume, settings
from hypothesis import strategies as st
from torch import Tensor

from optprune.errors import InputError
from optprune.grids import Grid
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.patterns import NM, PartlyFixed, Pattern, RowLimits, RowWise, SlotWise, Unstructured
from optprune.penalties import L1, ColumnGroups, ElasticNet, Penalty, WeightedL1
from optprune.problems import (
    Channels,
    GridLeastSquares,
    LayerLoss,
    MaskedLeastSquares,
    PenalisedLeastSquares,
    Problem,
    SparseLeastSquares,
    StructuredLeastSquares,
)

VARIABLE = "OPTPRUNE_TEST_DEVICE"


def chosen_device() -> torch.device:
    """Return the device that OPTPRUNE_TEST_DEVICE names. Raise InputError where torch cannot use it."""
    name = os.environ.get(VARIABLE) or "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).tolist()
    # torch raises a class of its own where it was built without a device, and NotImplementedError where there are none.
    except (AssertionError, NotImplementedError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"{VARIABLE} names the device {name!r}, which cannot be used ({reason}): use cpu or cuda"
        ) from None
    return device


def to_chosen_device(tensor: Tensor) -> Tensor:
    """Return the tensor on that device."""
    return tensor.to(chosen_device())


SHAPES = ("gaussian", "ties", "low rank", "inputs in different units", "few tokens", "ill-conditioned")
DAMPINGS = (0.0, 1e-6, 1e-2, 1.0)
"""fractions of the mean diagonal of the Gram matrix"""


@dataclass(frozen=True, eq=False)
class Samples:
    """The inputs of a layer, one token per row, and the dense inputs of the same tokens where they differ."""

    inputs: Tensor
    dense: Tensor | None = None

    def moments(self, dtype: torch.dtype = torch.float64) -> InputMoments:
        """Return the moments, summed in float64 and then rounded to `dtype`."""
        dense = None if self.dense is None else self.dense.double()
        return InputMoments.from_samples(self.inputs.double(), dense).to(dtype)


def generator_of(draw: st.DrawFn) -> torch.Generator:
    """Return a generator with a drawn seed."""
    return torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


SLOW_OR_NESTED = (HealthCheck.too_slow, HealthCheck.nested_given)


def law_settings(examples: int, *, suppressed: tuple[HealthCheck, ...] = (), shrink: bool = False) -> settings:
    """Return the settings under which laws are checked: the same examples every time, and no database."""
    same = settings(
        max_examples=examples,
        phases=[Phase.generate, Phase.shrink] if shrink else [Phase.generate],
        derandomize=True,
        database=None,
        deadline=None,
        report_multiple_bugs=False,
    )
    return settings(same, suppress_health_check=suppressed) if suppressed else same


@st.composite
def samples(
    draw: st.DrawFn,
    width: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
    dense: bool | None = None,
) -> Samples:
    """Draw inputs of a layer: full rank, tied, rank-deficient, sizes from 1 to 2^-12, few tokens, condition 1e8, dead.

    A float32 Gram matrix knows its eigenvalues to 1e-7 of the largest, so no method can be held to 1e-4 of the loss
    where the spectrum passes gradually through that level. Float32 instances are therefore either exactly singular
    (repeated and dead inputs) or well conditioned, once every input is measured by its own size: an entry is known to a
    share of the sizes of its two inputs, so sizes themselves may differ.
    """
    width = draw(st.integers(1, 7), label="width") if width is None else width
    single = dtype == torch.float32
    generator = generator_of(draw)
    shape = "gaussian" if generic else draw(st.sampled_from(SHAPES[:4] if single else SHAPES), label="shape")
    if shape == "few tokens":
        tokens = draw(st.integers(1, width), label="tokens")
    else:
        tokens = draw(st.integers(2 * width + 2, 4 * width + 4), label="tokens")
    inputs = _normal(generator, tokens, width)
    if shape == "ties":
        inputs = inputs.round()
    elif shape == "ill-conditioned":
        # Singular values down to 1e-4, so a Gram matrix of condition 1e8.
        left, _ = torch.linalg.qr(inputs)
        right, _ = torch.linalg.qr(_normal(generator, width, width))
        inputs = tokens**0.5 * left @ torch.diag(torch.logspace(0, -4, width, dtype=torch.float64)) @ right
    if draw(st.booleans(), label="offset"):
        inputs = inputs + 2 * _normal(generator, width)
    if shape == "low rank":
        # Some inputs repeat others: singular exactly where both are kept.
        inputs = inputs[:, torch.randint(0, width, (width,), generator=generator)]
    ideal = None
    if draw(st.booleans(), label="dense") if dense is None else dense:
        ideal = inputs + draw(st.sampled_from((1e-3, 0.3)), label="drift") * _normal(generator, tokens, width)
    if shape == "inputs in different units":
        units = 2.0 ** -torch.randint(0, 13, (width,), generator=generator)
        inputs, ideal = inputs * units, None if ideal is None else ideal * units
    if not generic:
        dead = draw(st.sets(st.integers(0, width - 1), max_size=2), label="dead inputs")
        # Dead in the pruned model only: the dense inputs may well be alive.
        inputs = inputs.clone()
        inputs[:, sorted(dead)] = 0
    return Samples(to_chosen_device(inputs.to(dtype)), None if ideal is None else to_chosen_device(ideal.to(dtype)))


@st.composite
def moments(
    draw: st.DrawFn, width: int | None = None, *, dtype: torch.dtype = torch.float64, generic: bool = False
) -> InputMoments:
    """Draw the moments of `samples`, with or without dense inputs."""
    return draw(samples(width, dtype=dtype, generic=generic)).moments(dtype)


@st.composite
def weights(
    draw: st.DrawFn, width: int, *, dtype: torch.dtype = torch.float64, generic: bool = False, rows: int | None = None
) -> Tensor:
    """Draw a weight [out, in], possibly with ties and with rows of zeros."""
    rows = draw(st.integers(1, 4), label="rows") if rows is None else rows
    weight = _normal(generator_of(draw), rows, width)
    if not generic:
        if draw(st.booleans(), label="tied weights"):
            weight = weight.round()
        for row in draw(st.sets(st.integers(0, rows - 1), max_size=1), label="zero rows"):
            weight[row] = 0
    return to_chosen_device(weight.to(dtype))


@st.composite
def losses(
    draw: st.DrawFn,
    width: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
    rows: int | None = None,
) -> LayerLoss:
    """Draw a layer loss with no, uniform or uneven damping, with or without a free bias."""
    width = draw(st.integers(1, 7), label="width") if width is None else width
    statistics = draw(moments(width, dtype=dtype, generic=generic))
    weight = draw(weights(width, dtype=dtype, generic=generic, rows=rows))
    # A ridge of 1e-6 is below the rounding of a float32 Gram matrix.
    fractions = (0.0, 1e-2, 1.0) if dtype == torch.float32 else DAMPINGS
    fraction = draw(st.sampled_from(fractions), label="damping")
    loss = LayerLoss.of(weight, statistics, fraction, fit_bias=draw(st.booleans(), label="fit bias"))
    if draw(st.booleans(), label="uneven damping"):
        uneven = to_chosen_device(torch.arange(width, dtype=torch.float64).remainder(3).to(dtype))
        loss = LayerLoss(loss.weight, statistics, loss.damping * uneven, loss.fit_bias)
    return loss


MetricKind = Literal["none", "diagonal", "full"]
METRIC_KINDS: tuple[MetricKind, ...] = ("none", "diagonal", "full")


@st.composite
def metrics(
    draw: st.DrawFn, width: int, kind: MetricKind, *, dtype: torch.dtype = torch.float64, generic: bool = False
) -> OutputMetric | None:
    """Draw an output metric: full rank, or fewer gradients than outputs; outputs without cost; sizes far from one."""
    if kind == "none":
        return None
    few = not generic and draw(st.booleans(), label="few gradients")
    tokens = draw(st.integers(1, width), label="gradients") if few else 4 * width + 4
    generator = generator_of(draw)
    # Outputs of very different importance, and gradients as small as those of a mean over many predictions.
    spread = torch.logspace(-0.5, 0.5, width, dtype=torch.float64)[torch.randperm(width, generator=generator)]
    gradients = _normal(generator, tokens, width) * spread * draw(st.sampled_from((1e-3, 1.0)), label="size")
    if not generic and draw(st.booleans(), label="an output that costs nothing"):
        gradients[:, 0] = 0
    metric = OutputMetric.from_samples(to_chosen_device(gradients), full=kind == "full").to(dtype)
    return metric.damped(draw(st.sampled_from((0.0, 1e-2, 1.0)), label="metric damping"))


Kind = TypeVar("Kind")
MOST_COUPLED = 8
"""weights of a sparse problem whose rows are coupled: its reference solves each of its 2^8 masks jointly"""
MOST_ON_GRID = 4
"""weights of a problem on a grid whose rows are coupled: its reference tries all integers of all rows together"""


@st.composite
def weighted(
    draw: st.DrawFn,
    kind: type[Problem],
    metric: MetricKind,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
) -> Problem:
    """Draw a problem of a kind with an output metric in its loss."""
    problem = draw(STRATEGIES[kind](dtype=dtype, generic=generic))
    loss = problem.loss
    if metric == "full" and isinstance(problem, SparseLeastSquares):
        assume(loss.weight.numel() <= MOST_COUPLED)
    if metric == "full" and isinstance(problem, GridLeastSquares):
        problem = _first_rows(problem, max(1, MOST_ON_GRID // loss.weight.shape[1]))
        loss = problem.loss
    found = draw(metrics(loss.weight.shape[0], metric, dtype=dtype, generic=generic))
    loss = replace(loss, metric=found)
    if isinstance(problem, PenalisedLeastSquares):
        # Strengths are relative to the loss in the metric.
        return replace(problem, loss=loss, penalty=draw(penalties(loss)))
    return replace(problem, loss=loss)


def _first_rows(problem: GridLeastSquares, rows: int) -> GridLeastSquares:
    """Return the problem of the first rows alone."""
    loss, mask = problem.loss, problem.mask
    fewer = LayerLoss(loss.weight[:rows], loss.moments, loss.damping, loss.fit_bias)
    return GridLeastSquares(fewer, problem.grid, None if mask is None else mask[:rows])


@st.composite
def masked(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False) -> MaskedLeastSquares:
    """Draw a restoration problem with one mask for all rows or one for each; rows may keep nothing, or everything."""
    loss = draw(losses(dtype=dtype, generic=generic))
    rows, width = loss.weight.shape
    rows = 1 if draw(st.booleans(), label="shared mask") else rows
    bits = draw(st.lists(st.booleans(), min_size=rows * width, max_size=rows * width), label="mask")
    return MaskedLeastSquares(loss, to_chosen_device(torch.tensor(bits).reshape(rows, width)))


@st.composite
def _units(draw: st.DrawFn, most: int, dtype: torch.dtype, generic: bool) -> tuple[LayerLoss, Tensor, Tensor, int]:
    """Draw a loss, its units (one or two slots, one or two columns per unit, some columns of no unit) and a count."""
    slots = draw(st.integers(1, 2), label="slots")
    size = draw(st.integers(1, most // slots), label="units per slot")
    each = draw(st.integers(1, 2), label="columns per unit")
    units = slots * size
    width = units * each + draw(st.integers(0, 1), label="columns of no unit")
    loss = draw(losses(width, dtype=dtype, generic=generic))
    columns = torch.tensor(draw(st.permutations(range(width)), label="columns")[: units * each]).reshape(units, each)
    slot_of = torch.tensor(draw(st.permutations([slot for slot in range(slots) for _ in range(size)]), label="slot of"))
    return (
        loss,
        to_chosen_device(columns),
        to_chosen_device(slot_of),
        slots * draw(st.integers(1, size), label="keep per slot"),
    )


@st.composite
def structured(
    draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False, most: int = 6
) -> StructuredLeastSquares:
    """Draw a choice among at most `most` units of columns."""
    loss, columns, slots, keep = draw(_units(most, dtype, generic))
    return StructuredLeastSquares(loss, Channels(columns, slots), keep)


STRENGTHS = (1e-4, 1e-2, 0.3, 1.5)
"""strengths of penalties, as shares of the strength at which zero is the answer"""


def concrete(base: type[Kind]) -> list[type[Kind]]:
    """Return the concrete subclasses of a class that optprune itself defines, at any depth, by name."""
    found = [
        cls for cls in base.__subclasses__() if not inspect.isabstract(cls) and cls.__module__.startswith("optprune.")
    ]
    found += [deeper for cls in base.__subclasses__() for deeper in concrete(cls)]
    return sorted(set(found), key=lambda cls: cls.__name__)


@st.composite
def penalties(draw: st.DrawFn, loss: LayerLoss, kinds: tuple[type[Penalty], ...] | None = None) -> Penalty:
    """Draw any penalty, from tiny to so strong that zero is the answer; weights per entry, column or row, some zero."""
    kind = draw(st.sampled_from(kinds or concrete(Penalty)), label="penalty")
    return draw(_penalties_of(kind)(loss, draw(st.sampled_from(STRENGTHS), label="strength")))


@st.composite
def penalised_weights(draw: st.DrawFn, kind: type[Penalty]) -> tuple[Penalty, Tensor]:
    """Draw a penalty of a kind, with a strength that may be zero, and a weight with zeros and ties, for its laws."""
    rows, width = draw(st.sampled_from(((1, 1), (1, 4), (3, 1), (3, 4))), label="shape")
    # The largest entry of the linear term is 1, so strengths are absolute.
    ones, unit, zeros = (
        to_chosen_device(make.double()) for make in (torch.ones(rows, width), torch.eye(width), torch.zeros(width))
    )
    loss = LayerLoss.of(ones, InputMoments(unit, zeros, 1))
    penalty = draw(_penalties_of(kind)(loss, draw(st.sampled_from((0.0, 0.25, 1.0, 3.0)), label="strength")))
    return penalty, draw(weights(width, rows=rows))


def _penalties_of(kind: type[Penalty]) -> Callable[[LayerLoss, float], st.SearchStrategy[Penalty]]:
    if kind not in PENALTIES:
        raise TypeError(f"no examples of the penalty {kind.__name__}: add a strategy to PENALTIES in {__name__}")
    return PENALTIES[kind]


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
    return WeightedL1(share * _largest(loss) * to_chosen_device(weights))


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
    """Draw a layer loss with one of the penalties."""
    loss = draw(losses(dtype=dtype, generic=generic))
    return PenalisedLeastSquares(loss, draw(penalties(loss, kinds)))


@st.composite
def sparse(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False) -> SparseLeastSquares:
    """Draw a choice among at most 12 single weights: anywhere, per row, or n of m; possibly none of them, or all."""
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


@st.composite
def gridded(draw: st.DrawFn, *, dtype: torch.dtype = torch.float64, generic: bool = False) -> GridLeastSquares:
    """Draw weights of two bits in one or two blocks of a row, with no mask, one for all rows or one for each.

    Scales are float16, or bfloat16 where problems are scaled, whose range is that of float32.
    """
    block, count = draw(st.sampled_from(((1, 1), (1, 2), (2, 1), (2, 2), (3, 1), (4, 1))), label="block and blocks")
    loss = draw(losses(block * count, dtype=dtype, generic=generic))
    kind = torch.bfloat16 if generic else draw(st.sampled_from((torch.float16, torch.bfloat16)), label="scales")
    grid, rows = Grid(2, block, draw(st.booleans(), label="shifted"), kind), loss.weight.shape[0]
    rows = draw(st.sampled_from((0, 1, rows)), label="rows of the mask")
    if not rows:
        return GridLeastSquares(loss, grid)
    count = rows * loss.weight.shape[1]
    bits = draw(st.lists(st.booleans(), min_size=count, max_size=count), label="mask")
    return GridLeastSquares(loss, grid, to_chosen_device(torch.tensor(bits).reshape(rows, -1)))


TINY_SHAPES = ((1, 1), (1, 2), (1, 5), (1, 7), (2, 1), (2, 3), (2, 6), (3, 4), (4, 3), (5, 2))
GROUPED_SHAPES = ((2, 1, 3), (2, 2, 2), (2, 3, 1), (4, 1, 2), (4, 3, 1), (3, 2, 2), (1, 2, 3))
"""(m, rows, groups) for n of m"""

ENTRY_PATTERNS: tuple[type[Pattern], ...] = (Unstructured, RowWise, NM)
"""the patterns of single weights"""

STRATEGIES: dict[type[Problem], Callable[..., st.SearchStrategy]] = {
    GridLeastSquares: gridded,
    MaskedLeastSquares: masked,
    PenalisedLeastSquares: penalised,
    SparseLeastSquares: sparse,
    StructuredLeastSquares: structured,
}
"""for each concrete kind of problem a strategy that takes `dtype` and `generic`"""


@st.composite
def scores(draw: st.DrawFn, *shape: int) -> Tensor:
    """Draw scores with many ties: small integers, whose sums are exact."""
    count = int(torch.Size(shape).numel())
    numbers = draw(st.lists(st.integers(-3, 3), min_size=count, max_size=count), label="scores")
    return to_chosen_device(torch.tensor(numbers, dtype=torch.float64).reshape(shape))


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
    return SlotWise(to_chosen_device(torch.tensor(slot_of)), draw(st.integers(0, size))), draw(scores(slots * size))


@st.composite
def _row_limits(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    rows, width = draw(st.integers(1, 3)), draw(st.integers(2, 4))
    least = draw(st.integers(0, 1))
    most = draw(st.integers(max(least, 1), width - 1))
    keep = draw(st.integers(rows * least, rows * most))
    return RowLimits(keep, least, most), draw(scores(rows, width))


@st.composite
def _partly_fixed(draw: st.DrawFn) -> tuple[Pattern, Tensor]:
    """Draw a pattern with some entries fixed as in one of its masks, so that a mask fits."""
    pattern, score = draw(st.one_of(_unstructured(), _row_wise(), _n_of_m(), _row_limits()))
    mask = pattern.project(draw(scores(*score.shape)))
    bits = draw(st.lists(st.booleans(), min_size=score.numel(), max_size=score.numel()), label="fixed")
    fixed = to_chosen_device(torch.tensor(bits).reshape(score.shape))
    return PartlyFixed(pattern, mask & fixed, ~mask & fixed), score


PATTERNS: dict[type[Pattern], st.SearchStrategy[tuple[Pattern, Tensor]]] = {
    Unstructured: _unstructured(),
    RowWise: _row_wise(),
    NM: _n_of_m(),
    PartlyFixed: _partly_fixed(),
    RowLimits: _row_limits(),
    SlotWise: _slot_wise(),
}
"""for each concrete pattern a strategy of (pattern, scores), small enough to list every mask"""


ChoiceKind = Literal["correlated", "drifted", "low rank", "pairs"]
CHOICE_KINDS: tuple[ChoiceKind, ...] = get_args(ChoiceKind)
"""mixed inputs; those of a pruned model, which differ from the dense one's; few directions; near-duplicate pairs"""


def choice_instance(
    kind: ChoiceKind, seed: int, *, units: int = 14, outputs: int = 8, damping: float = 0.01
) -> StructuredLeastSquares:
    """Return a choice of single columns of a random weight; by the seed 4 to 7 of 14 columns are removed."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(torch.rand((), generator=generator))

    def mixed(width: int) -> Tensor:
        return normal(tokens, width) @ (normal(width, width) / width**0.5 + torch.eye(width, dtype=torch.float64) / 2)

    tokens, dense = 6 * units, None
    match kind:
        case "correlated":
            inputs = mixed(units)
        case "drifted":
            inputs = mixed(units)
            dense = inputs + between(0.1, 1.0) * normal(tokens, units)
        case "low rank":
            rank = units // 2
            inputs = normal(tokens, rank) @ normal(rank, units) + between(0.1, 0.5) * normal(tokens, units)
        case "pairs":
            half = mixed(units // 2)
            inputs = torch.cat([half, half + between(0.03, 0.3) * normal(tokens, units // 2)], 1)
    moments = InputMoments.from_samples(inputs, dense)
    loss = LayerLoss.of(normal(outputs, units), moments, damping)
    removed = 2 * units // 7 + seed % 4
    return StructuredLeastSquares(loss, Channels.of(units), units - removed)
