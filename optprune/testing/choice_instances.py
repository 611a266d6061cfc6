"""Fixed choices of units that are small enough to enumerate, on inputs of four kinds."""

from typing import Literal, get_args

import torch
from torch import Tensor

from optprune.moments import InputMoments
from optprune.problems import ChannelGroups, LayerLoss, StructuredLeastSquares

ChoiceKind = Literal["correlated", "drifted", "low rank", "pairs"]
CHOICE_KINDS: tuple[ChoiceKind, ...] = get_args(ChoiceKind)
"""mixed inputs; those of a pruned model, which differ from the dense one's; few directions; near-duplicate pairs"""


def choice_instance(
    kind: ChoiceKind, seed: int, *, units: int = 14, outputs: int = 8, damping: float = 0.01
) -> StructuredLeastSquares:
    """Return the choice of single columns of a random weight, of which a seed says how many go: 4 to 7 of 14."""
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
    return StructuredLeastSquares(loss, ChannelGroups.of(units), units - removed)
