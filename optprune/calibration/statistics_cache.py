"""Caches of statistics, in memory or in a folder of safetensors files, and the source that statistics depend on."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Generic, TypeVar, final

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.stream import calibration_facts
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.numerics.fingerprint import fingerprint
from optprune.system.environment import machine, versions
from optprune.system.files import read_json, write_whole
from optprune.system.wording import shown

Value = TypeVar("Value")
Key = tuple[str | int | float | None, ...]
"""the key of a statistic: plain data, the same in every process"""
FACTS_FILE = "statistics.json"
FORMAT = 2
"""the format of a folder, which is a fact of it: a folder of another format is refused"""
IDLE = ("transformers_version", "dtype", "torch_dtype")
"""the fields of a config that do not affect what a model computes"""


@dataclass(frozen=True)
class Source:
    """A dense model and a text: all that decides the bytes of the statistics of one on the other."""

    facts: dict[str, Any]
    """the facts that decide the bytes, by name"""

    @classmethod
    def of(cls, decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums) -> "Source":
        """Return the source of a run. All weights are read for it, one block at a time."""
        return cls(
            {
                "the model": digest_of_weights(decoder),
                "its dtype": str(decoder.model.dtype),
                **calibration_facts(decoder, batches),
                "the number of partial sums": partial_sums.count,
                "the version": versions(),
                "the machine": machine(decoder.model.device),
            }
        )

    @property
    def digest(self) -> str:
        """A short hash of all facts."""
        return hashlib.sha256(repr(sorted(self.facts.items())).encode()).hexdigest()[:24]

    def check(self, other: "Source") -> None:
        """Raise InputError, which names the first fact that differs, where a run has another source."""
        for what, before in self.facts.items():
            now = other.facts.get(what)
            if now != before:
                raise InputError(
                    f"the statistics were collected where {what} was {shown(before)}, and here it is {shown(now)}: "
                    "collect them again"
                )


def digest_of_weights(decoder: Decoder) -> str:
    """Return a SHA-256 hex digest of a model's weights and config, the same wherever its blocks are stored."""
    model, blocks = decoder.model, f"{decoder.architecture.blocks}."
    config = {key: value for key, value in model.config.to_dict().items() if key[0] != "_" and key not in IDLE}
    found = [repr(sorted(config.items()))]
    found += [fingerprint([name, part]) for name, part in model.named_parameters() if not name.startswith(blocks)]
    for index in range(len(decoder.blocks)):
        with decoder.resident(index):
            found.append(fingerprint(sorted(decoder.weights(index).items(), key=lambda pair: pair[0])))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()


class Serializer(ABC, Generic[Value]):
    """Conversion of one kind of statistic to tensors and plain data, and back."""

    @abstractmethod
    def dump(self, value: Value) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return the tensors by name, and the rest as plain data."""

    @abstractmethod
    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Value:
        """Return the value that was dumped as these."""


@dataclass(frozen=True)
class CacheEntry(Generic[Value]):
    """A statistic, and the seconds that measuring it took."""

    value: Value
    seconds: float


class StatisticsCache(ABC):
    """A cache of statistics by their keys."""

    @abstractmethod
    def has(self, key: Key) -> bool:
        """Return whether there is an entry."""

    @abstractmethod
    def get(self, key: Key, serializer: Serializer[Value], device: torch.device) -> CacheEntry[Value] | None:
        """Return an entry with its tensors on a device; None where there is none."""

    @abstractmethod
    def put(self, key: Key, entry: CacheEntry[Value], serializer: Serializer[Value]) -> None:
        """Add an entry."""

    @abstractmethod
    def clear(self) -> None:
        """Free all that is kept."""


@final
class MemoryCache(StatisticsCache):
    """Cache of the objects themselves, with what solvers keep beside them."""

    def __init__(self) -> None:
        self._entries: dict[Key, CacheEntry[Any]] = {}

    def has(self, key: Key) -> bool:
        return key in self._entries

    def get(self, key: Key, serializer: Serializer[Value], device: torch.device) -> CacheEntry[Value] | None:
        return self._entries.get(key)

    def put(self, key: Key, entry: CacheEntry[Value], serializer: Serializer[Value]) -> None:
        self._entries[key] = entry

    def clear(self) -> None:
        self._entries.clear()


@final
class FolderCache(StatisticsCache):
    """Cache in a folder, a safetensors file for each entry, whole or absent; entries are in memory only while used."""

    def __init__(self, folder: str | Path, facts: Mapping[str, Any]) -> None:
        """Open a folder that is new or has statistics of the same source, by its `facts`; InputError for any other."""
        self.folder = Path(folder)
        plain, about = json.loads(json.dumps({"the format": FORMAT, **facts})), self.folder / FACTS_FILE
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
            raise InputError(f"{self.folder} is not a folder of statistics: choose another folder")
        self.folder.mkdir(parents=True, exist_ok=True)
        _write(about, json.dumps(plain, indent=2).encode())

    def has(self, key: Key) -> bool:
        return self._file(key).with_suffix(".json").is_file()

    def get(self, key: Key, serializer: Serializer[Value], device: torch.device) -> CacheEntry[Value] | None:
        if not self.has(key):
            return None
        file = self._file(key)
        entry = self._json(file.with_suffix(".json"))
        try:
            stored = _Stored(file, device, self._damaged(file))
            return CacheEntry(serializer.load(stored, entry["rest"]), float(entry["seconds"]))
        except (KeyError, TypeError, ValueError) as error:
            raise self._damaged(file) from error

    def put(self, key: Key, entry: CacheEntry[Value], serializer: Serializer[Value]) -> None:
        file = self._file(key)
        tensors, rest = serializer.dump(entry.value)
        _write(file, save({name: tensor.detach().contiguous() for name, tensor in tensors.items()}))
        about = {"of": list(key), "seconds": entry.seconds, "rest": rest}
        # Written last: without it there is no entry.
        _write(file.with_suffix(".json"), json.dumps(about).encode())

    def clear(self) -> None:
        for file in self.folder.glob("*.json"):
            if re.fullmatch(r"[0-9a-f]{32}", file.stem):
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
    """The tensors of a file, each read on access."""

    def __init__(self, file: Path, device: torch.device, damaged: InputError) -> None:
        """Raise the error `damaged` where the file is not whole."""
        self._file, self._device, self._damaged = file, str(device), damaged
        with self._open() as stored:
            self._names = tuple(stored.keys())

    def __getitem__(self, name: str) -> Tensor:
        with self._open() as stored:
            # A copy, which does not keep the memory map of the file alive.
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
