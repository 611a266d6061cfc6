"""What runs of tiny models are compared by: few tokens, whether models hold the same numbers, and reports."""

from dataclasses import replace

import torch
from torch import Tensor, nn

from optprune.report import Report


def batches(seed: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, 500, (4, 32), generator=generator) for _ in range(2)]


def same(one: nn.Module, other: nn.Module) -> bool:
    """Whether two modules have the same weights, bit for bit."""
    first, second = one.state_dict(), other.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def told(report: Report) -> Report:
    """A report without its times."""
    layers = tuple(replace(layer, seconds=0.0, stages=()) for layer in report.layers)
    recovered = tuple(replace(part, seconds=0.0) for part in report.recovered)
    return replace(report, seconds=0.0, floor_seconds=0.0, phases=(), layers=layers, recovered=recovered)
