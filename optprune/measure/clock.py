"""The clock of a device."""

import time

import torch


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was given: for times of work, not of launches."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
