"""Places that keep tensors between two uses: the memory of their device, the memory of the host, or a file.

`States` keeps one value for each batch, and fetches one batch at a time: the hidden states of all batches may be larger
than any memory.
"""

import tempfile
import weakref
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Generic, Self, TypeVar, cast, final, overload

import torch
from torch import Tensor

from optprune.errors import InputError, no_room

Value = TypeVar("Value")


class Place(ABC):
    """A place that keeps tensors."""

    @abstractmethod
    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Keep a tensor, which must not be changed, and return a function that gives it on its device.

        The tensor is kept for as long as that function exists.
        """

    def keep_all(self, value: Value, besides: Collection[int] = ()) -> Callable[[], Value]:
        """Keep all tensors in nested dicts, lists and tuples, except those with the `id`s in `besides`."""
        found: Any = value
        if isinstance(value, Tensor) and id(value) not in besides:
            return cast(Callable[[], Value], self.keep(value))
        if isinstance(value, Mapping):
            named = {name: self.keep_all(part, besides) for name, part in found.items()}
            return lambda: cast(Value, {name: part() for name, part in named.items()})
        if type(value) in (list, tuple):
            # The closure holds only the type: a reference to the value would keep its tensors in memory.
            parts, kind = [self.keep_all(part, besides) for part in found], type(found)
            return lambda: cast(Value, kind(part() for part in parts))
        return lambda: value


@final
class OnDevice(Place):
    """The memory of the tensors' own device."""

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        return lambda: tensor


@final
class OnHost(Place):
    """The memory of the host."""

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        there, device = tensor.cpu(), tensor.device
        return lambda: there.to(device)


@final
class InFile(Place):
    """An unnamed file that disappears with this process, however that ends; it does not count as its memory."""

    def __init__(self, folder: Path) -> None:
        """Create the file in a `folder` when the first tensor is kept."""
        self._folder, self._end = folder, 0
        self._file: _File | None = None
        self._free: dict[int, list[int]] = {}
        """the offsets of released tensors, by their size"""

    def keep(self, tensor: Tensor) -> Callable[[], Tensor]:
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        size = data.numel()
        free = self._free.setdefault(size, [])
        begin = free.pop() if free else self._end
        self._end = max(self._end, begin + size)
        try:
            if self._file is None:
                self._file = _File(self._folder)
            self._file.write(begin, data)
        except OSError as error:
            full = no_room(error)
            if full is None:
                raise
            raise InputError(
                f"{full}, so hidden states cannot be kept in {self._folder}: make room, or keep them in memory "
                "(--states host), or calibrate on fewer tokens"
            ) from error
        slot = _Slot(self._file, begin, tensor)
        # The bytes of a tensor that cannot be fetched any more are reused.
        weakref.finalize(slot, free.append, begin).atexit = False
        return slot


class _File:
    """The file, which is closed when neither its place nor any of its tensors is referenced."""

    def __init__(self, folder: Path) -> None:
        self._stream: Any = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115  # closed with this object
        weakref.finalize(self, self._stream.close)

    def write(self, begin: int, data: Tensor) -> None:
        self._stream.seek(begin)
        self._stream.write(data.numpy().data)
        self._stream.flush()

    def read(self, begin: int, data: Tensor) -> None:
        self._stream.seek(begin)
        read = self._stream.readinto(data.numpy().data)
        assert read == data.nbytes, "the file is this process's own"


class _Slot:
    """A tensor in a file."""

    def __init__(self, file: _File, begin: int, tensor: Tensor) -> None:
        self._file, self._begin = file, begin
        self._dtype, self._shape, self._device = tensor.dtype, tensor.shape, tensor.device

    def __call__(self) -> Tensor:
        data = torch.empty(self._shape, dtype=self._dtype)
        self._file.read(self._begin, data.reshape(-1).view(torch.uint8))
        return data.to(self._device)


@final
class States(Sequence[Value], Generic[Value]):
    """One value for each batch, such as its hidden states [batch, length, hidden], with its tensors kept in a place.

    Indexing fetches a value, so that iteration holds one at a time in memory.
    """

    def __init__(self, place: Place, values: Iterable[Value] = (), besides: Collection[int] = ()) -> None:
        """Keep the values, except tensors whose `id` is in `besides`, which stay in memory anyway."""
        self.place, self._besides = place, besides
        self._kept: list[Callable[[], Value]] = []
        self.shapes: list[torch.Size] = []
        """the shapes of the values that are tensors"""
        self.device = torch.device("cpu")
        """the device of the last tensor added"""
        for value in values:
            self.append(value)

    def append(self, value: Value) -> None:
        """Add a value."""
        self._kept.append(self.place.keep_all(value, self._besides))
        if isinstance(value, Tensor):
            self.shapes.append(value.shape)
            self.device = value.device

    def __setitem__(self, index: int, value: Value) -> None:
        self._kept[index] = self.place.keep_all(value, self._besides)
        if isinstance(value, Tensor):
            self.shapes[index], self.device = value.shape, value.device

    @overload
    def __getitem__(self, index: int) -> Value: ...
    @overload
    def __getitem__(self, index: slice) -> Self: ...
    def __getitem__(self, index: int | slice) -> Value | Self:
        if isinstance(index, int):
            return self._kept[index]()
        return self.part(range(len(self))[index])

    def part(self, numbers: Iterable[int]) -> Self:
        """Return the values of some batches, without fetching any."""
        chosen, part = list(numbers), type(self)(self.place, besides=self._besides)
        part._kept, part.device = [self._kept[number] for number in chosen], self.device
        part.shapes = [self.shapes[number] for number in chosen] if self.shapes else []
        return part

    def __len__(self) -> int:
        return len(self._kept)

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy in another process is in memory.
        return type(self), (OnDevice(), list(self))

    @property
    def tokens(self) -> int:
        """The number of tokens in all batches, for values that are tensors [..., hidden]."""
        return sum(shape[:-1].numel() for shape in self.shapes)

    def with_values(self, values: Iterable[Value]) -> "States[Value]":
        """Return other values in the same place."""
        return States(self.place, values, self._besides)

    def to(self, place: Place) -> "States[Value]":
        """Return the same values in another place; nothing is copied where it is the same place."""
        return self[:] if place is self.place else States(place, self, self._besides)
