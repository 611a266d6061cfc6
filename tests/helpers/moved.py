"""The same problem, or any other plain data, on another device."""

import dataclasses
from typing import Any, TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


def moved(value: T, device: torch.device | str) -> T:
    """Frozen dataclasses, tuples and tensors with all their tensors on a device; what was one tensor stays one."""
    return _moved(value, torch.device(device), {})


def _moved(value: Any, device: torch.device, known: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.to(device)
        return known[id(value)]
    if isinstance(value, tuple):
        return tuple(_moved(item, device, known) for item in value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: _moved(getattr(value, field.name), device, known) for field in dataclasses.fields(value)}
        return type(value)(**fields)
    return value
