"""Where the strategies put their tensors: on the device that OPTPRUNE_TEST_DEVICE names, without it on the CPU.

So the laws hold a solver to its promises on a GPU as well: `OPTPRUNE_TEST_DEVICE=cuda` before any check.
"""

import os

import torch
from torch import Tensor

from optprune.errors import InputError

VARIABLE = "OPTPRUNE_TEST_DEVICE"


def place() -> torch.device:
    """The device that OPTPRUNE_TEST_DEVICE names; InputError where torch cannot put numbers on it."""
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


def here(tensor: Tensor) -> Tensor:
    """The same numbers on that device."""
    return tensor.to(place())
