"""A loss whose smallest curvature is below rounding, and matters."""

import torch

from optprune.moments import DenseMoments, InputMoments
from optprune.problems import LayerLoss


def barely_apart():
    """float32: two inputs whose difference has a variance below the rounding of A, and matters to the target.

    E[(x_1 - x_2)^2] = 2^-23 and E[x (x_1 - x_2)] = 2^-13 + 2^-14, far above rounding: by the difference alone the
    loss, about 1/2, falls by (2^-13 + 2^-14)^2 / 2^-22, about 1/7.
    """
    unit = torch.ones(2)
    moments = InputMoments.from_averages(
        torch.tensor([[1.0, 1 - 2.0**-24], [1 - 2.0**-24, 1.0]]),
        0 * unit,
        10,
        DenseMoments(torch.tensor([[1.0, 1 - 2.0**-13 - 2.0**-14]] * 2), torch.full((2, 2), 2.0), 0 * unit),
    )
    return LayerLoss.of(torch.tensor([[1.0, 0.0]]), moments)
