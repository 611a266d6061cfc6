"""Clock that waits for a device."""

import time

import torch


def clock(device: torch.device) -> float:
    """Return the time in seconds after all queued work of the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
