"""Fixed sparse problems for several test files."""

import pytest
import torch

from optprune.moments import InputMoments
from optprune.patterns import NM, RowWise, Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares


def correlated_loss(seed, rows, width, *, tokens=None, damping=0.01, dtype=torch.float64):
    """The loss of a weight [rows, width] on correlated inputs; with an odd seed the dense inputs are other ones."""
    generator = torch.Generator().manual_seed(seed)
    tokens = 5 * width if tokens is None else tokens

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    mixing = normal(width, width) / width**0.5 + 0.5 * torch.eye(width, dtype=torch.float64)
    inputs = normal(tokens, width) @ mixing
    dense = inputs + 0.1 * normal(tokens, width) if seed % 2 else None
    return LayerLoss.of(normal(rows, width), InputMoments.from_samples(inputs, dense).to(dtype), damping)


def half(name, rows, width):
    """The pattern of that name that keeps half of a weight."""
    return {"unstructured": Unstructured(rows * width // 2), "rows": RowWise(width // 2), "2:4": NM(2, 4)}[name]


def correlated(seed, rows, width, pattern, **options):
    return SparseLeastSquares(correlated_loss(seed, rows, width, **options), half(pattern, rows, width))


PATTERN_NAMES = ("unstructured", "rows", "2:4")
by_pattern = pytest.mark.parametrize("pattern", PATTERN_NAMES)


def nearly_repeated(difference: float, seed: int) -> LayerLoss:
    """An undamped loss of 12 inputs, of which six are the others but for a difference."""
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(200, 12, generator=generator, dtype=torch.float64)
    inputs[:, 6:] = inputs[:, :6] + difference * inputs[:, 6:]
    weight = torch.randn(6, 12, generator=generator, dtype=torch.float64)
    return LayerLoss.of(weight, InputMoments.from_samples(inputs), 0.0)
