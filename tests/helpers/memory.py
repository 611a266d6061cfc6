"""What tests of measured memory stand on."""

import pytest
import torch

from optprune.measure.memory import memory_increase

MIB = 2**20


def tells_nothing() -> bool:
    """Whether the system does not say what a run takes at most: where /proc/self/clear_refs is not, as on macOS."""
    return memory_increase(torch.device("cpu"), lambda: None) is None


told = pytest.mark.skipif(tells_nothing(), reason="the system does not tell a peak of memory")
