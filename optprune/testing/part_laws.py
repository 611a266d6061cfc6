"""The laws of the things that problems are made of: patterns, moments, the loss; each raises AssertionError."""

from itertools import product

import torch
from torch import Tensor

from optprune.moments import InputMoments
from optprune.patterns import Pattern
from optprune.problems import LayerLoss
from optprune.testing.quadratic import rounding


def projection_is_best(pattern: Pattern, score: Tensor) -> None:
    """The projection is admissible, and no admissible mask has a larger total score (at most 2^12 masks are tried)."""
    mask = pattern.project(score)
    assert pattern.admits(mask), f"{pattern} does not admit its own projection {mask.tolist()}"
    # Infinities would make totals NaN; beyond every finite score they only mean first and last.
    finite = score.nan_to_num(posinf=1e6, neginf=-1e6)
    best = float(finite[mask].sum())
    for bits in product((False, True), repeat=score.numel()):
        other = torch.tensor(bits).reshape(score.shape)
        if pattern.admits(other):
            total = float(finite[other].sum())
            # One rounding of a sum of at most 12 scores of at most 1e6.
            assert total <= best + 1e-8, f"{pattern}: {bits} scores {total}, the projection only {best}"


def merging_is_one_pass(inputs: Tensor, dense: Tensor | None, cut: int) -> None:
    """Moments of two parts, merged, are the moments of the whole."""
    parts = [(inputs[:cut], dense[:cut] if dense is not None else None)]
    parts.append((inputs[cut:], dense[cut:] if dense is not None else None))
    merged = InputMoments.from_samples(*parts[0]).merge(InputMoments.from_samples(*parts[1]))
    whole = InputMoments.from_samples(inputs, dense)
    assert merged.tokens == whole.tokens == inputs.shape[0], f"{merged.tokens} tokens of {inputs.shape[0]}"
    largest = max(float(inputs.abs().max()), 0.0 if dense is None else float(dense.abs().max()))
    # A few roundings of an average of numbers of this size.
    slack = 8 * torch.finfo(inputs.dtype).eps * max(largest, largest**2)
    for one, other in zip(merged.parts(), whole.parts(), strict=True):
        error = float((one - other).abs().max())
        assert error <= slack, f"merged moments differ from one pass by {error}"


def value_is_the_mean_over_samples(loss: LayerLoss, weight: Tensor, inputs: Tensor, dense: Tensor | None) -> None:
    """f(V) is half the mean squared output error over the samples, plus the ridge towards W."""
    actual = inputs.double()
    ideal = actual if dense is None else dense.double()
    new, old = weight.double(), loss.weight.double()
    error = actual @ new.T - ideal @ old.T
    if loss.fit_bias:
        error = error + loss.bias_change(weight).double()
    literal = float(error.square().sum(1).mean()) / 2
    literal += float(((new - old).square() * loss.damping.double()).sum()) / 2
    found = loss.value(weight)
    slack = 1e-12 * literal + rounding(loss, weight)
    assert abs(found - literal) <= slack, f"the loss says {found}, the samples say {literal}"
