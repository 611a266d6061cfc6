"""A second device without a GPU: tensors that say they are elsewhere, and whose numbers are on the CPU.

They do not mix with tensors on the CPU, give no numbers to NumPy and take no generator of the CPU, as a GPU's do not;
and every wait for the device is counted: reading a number, a shape that hangs on numbers, a copy between the two.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._device import _device_constructors
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "pretend"
WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "bincount",
    "cholesky_inverse",
    "equal",
    "linalg_lstsq",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
"""operators of torch that end only when a GPU has computed what they are given"""
BETWEEN = {"copy_", "_to_copy", "index", "index_put", "index_put_", "_index_put_impl_", "set_"}
"""operators that take tensors of both devices: for copies, and for places named by the CPU"""


COPIED, MADE = ("tensor", "as_tensor"), ("arange", "linspace", "logspace", "eye", "randperm")
"""functions that make tensors: of numbers that come from the CPU, and of none"""


class PretendTensor(torch.Tensor):
    """A tensor on the pretended device."""

    held: torch.Tensor
    """the same numbers on the CPU"""

    @staticmethod
    def __new__(cls, held: torch.Tensor) -> "PretendTensor":
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )
        tensor.held = held
        return tensor

    def __init__(self, held: torch.Tensor) -> None:
        """All is done where it is made."""

    def __repr__(self, **_: Any) -> str:
        return f"pretend {self.held!r}"

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def tolist(self) -> Any:
        return self.detach().to("cpu").tolist()

    def numpy(self, **_: Any) -> Any:
        raise TypeError(f"can't convert {NAME} device type tensor to numpy: copy it to host memory first")

    def __deepcopy__(self, memo: dict[int, Any]) -> "torch.Tensor":
        copy = PretendTensor(self.held.clone())
        if isinstance(self, torch.nn.Parameter):
            copy = torch.nn.Parameter(copy, self.requires_grad)
        memo[id(self)] = copy
        return copy

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, *args, **(kwargs or {}))


@dataclass
class Counted:
    """What happened on the device while it was watched."""

    waits: list[str]
    launches: list[str]
    """operators that were carried out and are no mere views"""


_watchers: list[Counted] = []


@contextmanager
def watched() -> Iterator[Counted]:
    """Count what is asked of the device."""
    found = Counted([], [])
    _watchers.append(found)
    try:
        yield found
    finally:
        _watchers.remove(found)


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Carry out an operator on the numbers, and have the result where it belongs."""
    name = func._schema.name.split("::")[1]
    tensors: list[torch.Tensor] = []
    held_args, held_kwargs = _held(args, tensors), {key: _held(value, tensors) for key, value in kwargs.items()}
    elsewhere = [tensor for tensor in tensors if isinstance(tensor, PretendTensor)]
    here = [tensor for tensor in tensors if not isinstance(tensor, PretendTensor)]
    if kwargs.get("generator") is not None:
        raise RuntimeError(f"expected a {NAME!r} device type for generator but found {kwargs['generator'].device!r}")
    if name not in BETWEEN and elsewhere and any(tensor.ndim for tensor in here):
        raise RuntimeError(f"expected all tensors to be on the same device, but {name} found {NAME} and cpu")
    target = kwargs.get("device")
    on_device = bool(elsewhere) if target is None else torch.device(target).type == NAME
    if name == "copy_":
        on_device = isinstance(args[0], PretendTensor)
    if on_device and target is not None:
        held_kwargs["device"] = torch.device("cpu")
    for watcher in _watchers:
        if _waits(name, args, on_device, bool(elsewhere), here):
            watcher.waits.append(name)
        if not func.is_view:
            watcher.launches.append(name)
    with torch._C._DisableTorchDispatch():
        found = func(*held_args, **held_kwargs)
    return _shown(found, name, tensors, on_device)


def _held(value: Any, tensors: list[torch.Tensor]) -> Any:
    """An argument with the numbers in place of what stands for them; the tensors among it are added to a list."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.held if isinstance(value, PretendTensor) else value
    return type(value)(_held(item, tensors) for item in value) if isinstance(value, tuple | list) else value


def _shown(value: Any, name: str, tensors: list[torch.Tensor], on_device: bool) -> Any:
    """A result where it belongs: what was written over is the argument that it was, all else is new."""
    if isinstance(value, tuple | list):
        return type(value)(_shown(item, name, tensors, on_device) for item in value)
    if not isinstance(value, torch.Tensor):
        return value
    for tensor in tensors:
        if value is tensor:
            return tensor
        if isinstance(tensor, PretendTensor) and value is tensor.held:
            if tensor.shape != value.shape:
                raise NotImplementedError(f"{name} changes the shape of a {NAME} tensor, which cannot be shown")
            return tensor
    return PretendTensor(value) if on_device else value


def _waits(name: str, args: Any, on_device: bool, from_device: bool, here: list[torch.Tensor]) -> bool:
    if name in WAITING:
        return True
    if name == "copy_":
        return bool(args[0].numel()) and isinstance(args[0], PretendTensor) != isinstance(args[1], PretendTensor)
    if name == "_to_copy":
        return on_device != from_device
    if name == "repeat_interleave":
        return True
    if name in ("index", "index_put_", "index_put", "_index_put_impl_"):
        masks = [place for place in args[1] if place is not None and place.dtype in (torch.bool, torch.uint8)]
        # One mask that is given a single number is filled, and nobody has to know how many there are.
        filled = name != "index" and len(masks) == len(args[1]) == 1 and args[2].numel() == 1
        return (bool(masks) and not filled) or any(place.ndim for place in here)
    return False


def _by_way_of_the_cpu(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A function that makes tensors, which torch itself does not make on a device that Python carries out."""

    @functools.wraps(make)
    def made(*args: Any, device: Any = None, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != NAME:
            return make(*args, device=device, **kwargs)
        found = make(*args, device="cpu", **kwargs)
        return found.to(device) if make.__name__ in COPIED else PretendTensor(found)

    return made


def set_up() -> torch.device:
    """The pretended device, which torch knows from the first call on."""
    if not _library:
        # `with torch.device(...)` looks up once, at its first use, which functions it is about: those of before.
        _device_constructors()
        for name in (*COPIED, *MADE):
            setattr(torch, name, _by_way_of_the_cpu(getattr(torch, name)))
        _setup_privateuseone_for_python_backend(NAME)
        # Who names the device gets it; a library that asks for the machine's accelerator must find none. Tests of one
        # process share the device, and accelerate would have a Trainer empty the cache of an allocator it lacks.
        torch.accelerator.current_accelerator = lambda check_available=False: None
        torch.accelerator.is_available = lambda: False
        # Checkpoints ask every device that torch knows what autocast may compute in, whether it is on or not.
        getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.bfloat16, torch.float16]
        library = torch.library.Library("_", "IMPL")
        library.fallback(_run, "PrivateUse1")
        _library.append(library)
    return torch.device(NAME, 0)


_library: list[torch.library.Library] = []
