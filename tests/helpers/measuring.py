"""What it takes to measure a layer's loss.

usage: python -m tests.helpers.measuring FULL: print the bytes, under a whole metric (1) or none (0)
"""

import sys

import torch

from optprune.measure.memory import memory_increase
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.problems import LayerLoss

OUT, WIDTH = 512, 3072


def main() -> None:
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments.from_samples(torch.randn(256, WIDTH, generator=generator))
    samples = torch.randn(2 * OUT, OUT, generator=generator)
    metric = OutputMetric.from_samples(samples) if int(sys.argv[1]) else None
    loss = LayerLoss.of(torch.randn(OUT, WIDTH, generator=generator), moments, 0.01, metric=metric)
    other = torch.randn(OUT, WIDTH, generator=generator)
    loss.value(other)

    def measure() -> None:
        loss.value(other)
        loss.relative_error(other)
        loss.rounding(other)

    print(memory_increase(torch.device("cpu"), measure))


if __name__ == "__main__":
    main()
