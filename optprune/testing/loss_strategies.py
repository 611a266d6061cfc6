"""Hypothesis strategies for what losses are made of: samples, moments, weights, output metrics."""

from dataclasses import dataclass
from typing import Literal

import torch
from hypothesis import strategies as st
from torch import Tensor

from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import LayerLoss
from optprune.testing.place import here

SHAPES = ("gaussian", "ties", "low rank", "inputs in different units", "few tokens", "ill-conditioned")
DAMPINGS = (0.0, 1e-6, 1e-2, 1.0)
"""fractions of the mean diagonal of the Gram matrix"""


@dataclass(frozen=True, eq=False)
class Samples:
    """The inputs a layer gets, one token a row, and the dense inputs of the same tokens where they differ."""

    inputs: Tensor
    dense: Tensor | None = None

    def moments(self, dtype: torch.dtype = torch.float64) -> InputMoments:
        """Their moments, summed in float64 and then rounded to `dtype`."""
        dense = None if self.dense is None else self.dense.double()
        return InputMoments.from_samples(self.inputs.double(), dense).to(dtype)


def generator_of(draw: st.DrawFn) -> torch.Generator:
    """A seeded generator; the seed is drawn."""
    return torch.Generator().manual_seed(draw(st.integers(0, 2**32 - 1), label="seed"))


def _normal(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@st.composite
def samples(
    draw: st.DrawFn,
    width: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
    dense: bool | None = None,
) -> Samples:
    """Inputs of one layer: full rank, tied, rank-deficient, sizes from 1 to 2^-12, few tokens, condition 1e8, dead.

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
    return Samples(here(inputs.to(dtype)), None if ideal is None else here(ideal.to(dtype)))


@st.composite
def moments(
    draw: st.DrawFn, width: int | None = None, *, dtype: torch.dtype = torch.float64, generic: bool = False
) -> InputMoments:
    """The moments of `samples`, with or without dense inputs."""
    return draw(samples(width, dtype=dtype, generic=generic)).moments(dtype)


@st.composite
def weights(
    draw: st.DrawFn, width: int, *, dtype: torch.dtype = torch.float64, generic: bool = False, rows: int | None = None
) -> Tensor:
    """A weight [out, in], possibly with ties and with rows of zeros."""
    rows = draw(st.integers(1, 4), label="rows") if rows is None else rows
    weight = _normal(generator_of(draw), rows, width)
    if not generic:
        if draw(st.booleans(), label="tied weights"):
            weight = weight.round()
        for row in draw(st.sets(st.integers(0, rows - 1), max_size=1), label="zero rows"):
            weight[row] = 0
    return here(weight.to(dtype))


@st.composite
def losses(
    draw: st.DrawFn,
    width: int | None = None,
    *,
    dtype: torch.dtype = torch.float64,
    generic: bool = False,
    rows: int | None = None,
) -> LayerLoss:
    """A layer loss with no, uniform or uneven damping, with or without a free bias."""
    width = draw(st.integers(1, 7), label="width") if width is None else width
    statistics = draw(moments(width, dtype=dtype, generic=generic))
    weight = draw(weights(width, dtype=dtype, generic=generic, rows=rows))
    # A ridge of 1e-6 drowns in the rounding of a float32 Gram matrix.
    fractions = (0.0, 1e-2, 1.0) if dtype == torch.float32 else DAMPINGS
    fraction = draw(st.sampled_from(fractions), label="damping")
    loss = LayerLoss.of(weight, statistics, fraction, fit_bias=draw(st.booleans(), label="fit bias"))
    if draw(st.booleans(), label="uneven damping"):
        uneven = here(torch.arange(width, dtype=torch.float64).remainder(3).to(dtype))
        loss = LayerLoss(loss.weight, statistics, loss.damping * uneven, loss.fit_bias)
    return loss


MetricKind = Literal["none", "diagonal", "full"]
METRIC_KINDS: tuple[MetricKind, ...] = ("none", "diagonal", "full")


@st.composite
def metrics(
    draw: st.DrawFn, width: int, kind: MetricKind, *, dtype: torch.dtype = torch.float64, generic: bool = False
) -> OutputMetric | None:
    """An output metric: full rank, or fewer gradients than outputs; outputs that cost nothing; sizes far from one."""
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
    metric = OutputMetric.from_samples(here(gradients), full=kind == "full").to(dtype)
    return metric.damped(draw(st.sampled_from((0.0, 1e-2, 1.0)), label="metric damping"))
