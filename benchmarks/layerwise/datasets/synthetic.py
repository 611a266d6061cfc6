"""Small random problems, of every kind that a layer has: for tests, and for a first look at a solver."""

from typing import Any

import torch
from benchopt import BaseDataset

from optprune.moments import InputMoments
from optprune.patterns import NM, Unstructured
from optprune.penalties import L1
from optprune.problems import (
    Channels,
    LayerLoss,
    PenalisedLeastSquares,
    SparseLeastSquares,
    StructuredLeastSquares,
)


class Dataset(BaseDataset):
    """A random weight [16, 32] with correlated inputs, to be pruned by half; a tiny one is [4, 8]."""

    name = "Random"
    parameters = {"kind": ["channels", "unstructured", "2:4", "l1", "tiny"], "seed": [0]}
    test_parameters = parameters

    def get_data(self) -> dict[str, Any]:
        """Return the problem."""
        rows, width = (4, 8) if self.kind == "tiny" else (16, 32)
        generator = torch.Generator().manual_seed(self.seed)
        mixing = torch.randn(width, width, generator=generator, dtype=torch.float64) / width**0.5
        inputs = torch.randn(200, width, generator=generator, dtype=torch.float64) @ (mixing + torch.eye(width) / 2)
        weight = torch.randn(rows, width, generator=generator, dtype=torch.float64)
        loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), damping=0.01)
        problem = {
            "tiny": lambda: StructuredLeastSquares(loss, Channels.of(8), 4),
            "channels": lambda: StructuredLeastSquares(loss, Channels.of(32), 16),
            "unstructured": lambda: SparseLeastSquares(loss, Unstructured(256)),
            "2:4": lambda: SparseLeastSquares(loss, NM(2, 4)),
            "l1": lambda: PenalisedLeastSquares(loss, L1(0.2 * float(loss.target.abs().max()))),
        }[self.kind]()
        return {"problem": problem}
