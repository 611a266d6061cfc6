"""Shelves: where statistics are kept, in memory as they are, or in a folder, a safetensors file for each."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from optprune.errors import InputError
from optprune.system.files import read_json, write_whole
from optprune.system.wording import shown

Value = TypeVar("Value")
Key = tuple[str | int | float, ...]
"""what a statistic goes by: plain data, the same in every process"""
FACTS_FILE = "statistics.json"


class Serializer(ABC, Generic[Value]):
    """How one kind of statistic is written as tensors and plain data, and read again."""

    @abstractmethod
    def parts(self, value: Value) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """The tensors by name, and the rest as plain data."""

    @abstractmethod
    def whole(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Value:
        """The value of such parts."""


@dataclass(frozen=True)
class CacheEntry(Generic[Value]):
    """A statistic, and what it took to measure it."""

    value: Value
    seconds: float


class StatisticsCache(ABC):
    """Somewhere to keep statistics by their keys."""

    @abstractmethod
    def has(self, key: Key) -> bool:
        """Whether there is one."""

    @abstractmethod
    def get(self, key: Key, form: Serializer[Value], device: torch.device) -> CacheEntry[Value] | None:
        """The one that was put there, with its tensors on a device; None where there is none."""

    @abstractmethod
    def put(self, key: Key, kept: CacheEntry[Value], form: Serializer[Value]) -> None:
        """Keep one."""

    @abstractmethod
    def clear(self) -> None:
        """Free all that is kept."""


@final
class MemoryCache(StatisticsCache):
    """The objects themselves: solvers find again what they have put beside them."""

    def __init__(self) -> None:
        self._kept: dict[Key, CacheEntry[Any]] = {}

    def has(self, key: Key) -> bool:
        return key in self._kept

    def get(self, key: Key, form: Serializer[Value], device: torch.device) -> CacheEntry[Value] | None:
        return self._kept.get(key)

    def put(self, key: Key, kept: CacheEntry[Value], form: Serializer[Value]) -> None:
        self._kept[key] = kept

    def clear(self) -> None:
        self._kept.clear()


@final
class FolderCache(StatisticsCache):
    """A file for each, whole or not there; none is in memory for longer than it is used."""

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        """A folder that is new, or has statistics of the same source by its `facts`; else InputError."""
        self.folder = Path(folder)
        plain, about = json.loads(json.dumps(facts)), self.folder / FACTS_FILE
        if about.is_file():
            before = self._json(about)
            for what in dict.fromkeys((*before, *plain)):
                if before.get(what) != plain.get(what):
                    raise InputError(
                        f"the statistics in {self.folder} were collected where {what} was {shown(before.get(what))}, "
                        f"and here it is {shown(plain.get(what))}: choose another folder, or delete it"
                    )
            return
        if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise InputError(f"{self.folder} holds something other than statistics: choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(about, json.dumps(plain, indent=2).encode())

    def has(self, key: Key) -> bool:
        return self._file(key).with_suffix(".json").is_file()

    def get(self, key: Key, form: Serializer[Value], device: torch.device) -> CacheEntry[Value] | None:
        if not self.has(key):
            return None
        file = self._file(key)
        told = self._json(file.with_suffix(".json"))
        try:
            stored = _Stored(file, device, self._damaged(file))
            return CacheEntry(form.whole(stored, told["rest"]), float(told["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(file) from error

    def put(self, key: Key, kept: CacheEntry[Value], form: Serializer[Value]) -> None:
        file = self._file(key)
        tensors, rest = form.parts(kept.value)
        _write(file, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))
        told = {"of": list(key), "seconds": kept.seconds, "rest": rest}
        # Written last: without it the statistic is not there.
        _write(file.with_suffix(".json"), json.dumps(told).encode())

    def clear(self) -> None:
        for file in self.folder.glob("*.json"):
            if file.name != FACTS_FILE:
                file.unlink(missing_ok=True)
                file.with_suffix(".safetensors").unlink(missing_ok=True)

    def _file(self, key: Key) -> Path:
        return self.folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.safetensors"

    def _json(self, file: Path) -> dict[str, Any]:
        try:
            found = read_json(file.read_text(encoding="utf-8"), file.name)
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise self._damaged(file) from error
        if not isinstance(found, dict):
            raise self._damaged(file)
        return found

    def _damaged(self, file: Path) -> InputError:
        return InputError(f"{file.name} of the statistics in {self.folder} is damaged: delete the folder")


class _Stored(Mapping[str, Tensor]):
    """The tensors of a file, each read when it is asked for."""

    def __init__(self, file: Path, device: torch.device, damaged: InputError) -> None:
        """InputError, the one that is given, where the file is not whole."""
        self._file, self._device, self._damaged = file, str(device), damaged
        with self._open() as stored:
            self._names = tuple(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as stored:
            # A copy: a map of the file would stay in memory with it.
            return stored.get_tensor(name).clone()

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        try:
            with safe_open(self._file, framework="pt", device=self._device) as stored:
                yield stored
        except (OSError, SafetensorError) as error:
            raise self._damaged from error


def _write(file: Path, data: bytes) -> None:
    write_whole(file, partial(_put, data))


def _put(data: bytes, stream: Any) -> None:
    stream.write(data)
