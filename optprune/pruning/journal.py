"""The journal: the blocks that a run has finished, on the disk, and what decided them, so that it can go on later.

A run folder holds `run.json`, the facts that decide the bytes; `division.json`, what every block keeps; for each
finished block a safetensors file of its weights and a JSON file of its record, and for each other one its output
metric, where there is one. Every file is there whole or not at all, and a block is finished once its record is there.
A run that goes on passes the finished blocks by, with one forward pass, and does the rest: its weights are those of a
run that was never stopped, bit for bit.
"""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from optprune.allocation import Allocation, Division
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.models.checkpoint import Checkpoint, stored_tensors
from optprune.models.gguf import CONVERTED
from optprune.models.store import ShardSink
from optprune.numerics.fingerprint import fingerprint
from optprune.pruning.block import BlockRecord, BlockResult
from optprune.pruning.metric_files import MetricFiles
from optprune.report import RemovedPart
from optprune.system.files import read_json, write_whole
from optprune.system.interrupts import interrupts_held, record_done
from optprune.system.wording import shown

FACTS, DIVISION, LOCK = "run.json", "division.json", "in-use"
PIECE = 1 << 24
"""how many bytes of a file are in memory while it is hashed"""


class Journal:
    """What a run keeps in its folder. `prune` begins it, and writes what is finished."""

    def __init__(self, folder: str | Path, *, resume: bool = False, overwrite: bool = False) -> None:
        """`resume` is to go on with the run in the folder, if there is one; else the folder must hold none.

        InputError where it holds one all the same, unless `overwrite` is to delete it, or where it holds something that
        is no run, or another process is at work on it.
        """
        self.folder, self.resume = Path(folder), resume
        before = {LOCK, CONVERTED}  # what a run that is killed leaves before it has begun
        if self.folder.exists() and not self.begun and any(file.name not in before for file in self.folder.iterdir()):
            raise InputError(f"{self.folder} holds something other than a run: choose another folder, or delete it")
        if self.begun and not resume and not overwrite:
            raise InputError(
                f"{self.folder} holds an unfinished run ({len(self.finished())} blocks are done): go on with it by "
                "--resume, or delete it"
            )
        self._made = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
        self.folder.mkdir(parents=True, exist_ok=True)
        # One for all journals of this process: one that is left lying about is no other process at work.
        self._lock = FileLock(self.folder / LOCK, is_singleton=True)
        try:
            self._lock.acquire(timeout=0)
        except Timeout as error:
            raise InputError(
                f"another process is at work on the run in {self.folder}: wait for it, or stop it"
            ) from error
        if self.begun and not resume:
            self._clear()
        for place in self.folder.iterdir():
            if place.is_dir() and place.name != CONVERTED:  # what an earlier run has put aside
                shutil.rmtree(place, ignore_errors=True)

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / FACTS).is_file()

    @cached_property
    def sink(self) -> ShardSink:
        """Where the weights of finished blocks are, one file each: `open_model` takes it for the pruned blocks."""
        return ShardSink(self.folder)

    @property
    def metrics(self) -> MetricFiles:
        """The output metrics of the dense model, for the blocks that are not finished."""
        return MetricFiles(self.folder)

    @property
    def whole(self) -> bool:
        """Whether all blocks are finished."""
        return self.begun and len(self.finished()) == int(self._read(FACTS).get("the blocks", -1))

    @property
    def told(self) -> str:
        """How far the run is, in words."""
        return f"{len(self.finished())} of {self._read(FACTS).get('the blocks')} blocks are done"

    def shards(self) -> list[Path]:
        """The files of the finished blocks' weights."""
        return sorted(self.folder.glob("*.safetensors"))

    def discard(self) -> None:
        """Delete the run, and the folders that were made for it as far as they are empty."""
        with interrupts_held():
            self._clear()
            self._lock.release(force=True)
            with suppress(OSError):
                (self.folder / LOCK).unlink(missing_ok=True)
                for folder in self._made or [self.folder]:
                    folder.rmdir()

    def _clear(self) -> None:
        # The facts go last: until then it is a run that can be deleted again.
        for file in sorted(self.folder.iterdir(), key=lambda file: file.name == FACTS):
            if file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif file.name != LOCK:
                file.unlink(missing_ok=True)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Note what decides the bytes of the run, or see that it is what the run in the folder began with.

        InputError names the first fact that is another.
        """
        plain = json.loads(json.dumps(facts))
        if not self.begun:
            self._write(FACTS, plain)
            return
        before = self._read(FACTS)
        for what, old, new in differences(before, plain):
            raise InputError(
                f"the run in {self.folder} cannot go on: {what} was {shown(old)} and is {shown(new)}; run it as it was "
                "begun, or delete the folder and begin anew"
            )

    def division(self) -> Division | None:
        """What every block keeps, where the run has come to that."""
        if not (self.folder / DIVISION).is_file():
            return None
        data = self._read(DIVISION)
        try:
            removed = tuple(RemovedPart(**part) for part in data["removed"])
            notes = tuple(map(str, data["warnings"])), tuple(map(str, data["notes"]))
            return Division(Allocation.from_dict(data["allocation"]), removed, *notes)
        except (KeyError, TypeError) as error:
            raise self._damaged(DIVISION) from error

    def divided(self, division: Division) -> None:
        """Keep what every block keeps."""
        data = {
            "allocation": division.allocation.to_dict(),
            "removed": [asdict(part) for part in division.removed],
            "warnings": division.warnings,
            "notes": division.notes,
        }
        self._write(DIVISION, data)

    def finished(self) -> list[int]:
        """The numbers of the blocks that are finished."""
        return sorted(int(file.stem.removeprefix("block-")) for file in self.folder.glob("block-*.json"))

    def record(self, index: int) -> BlockRecord:
        """What there is to say of a finished block."""
        try:
            return TypeAdapter(BlockRecord).validate_python(self._read(_record(index)))
        except ValidationError as error:
            raise self._damaged(_record(index)) from error

    def weights(self, decoder: Decoder, index: int) -> dict[str, Tensor]:
        """The weights of a finished block, by their names inside it, on the decoder's device."""
        name, device = decoder.block_name(index), decoder.model.device
        file = self.sink.file(name)
        if not file.is_file():
            raise self._damaged(file.name)
        found = Checkpoint(str(file), stored_tensors(file, str(self.folder))).read(name)
        return {own: weight.to(device) for own, weight in found.items()}

    def finish(self, decoder: Decoder, result: BlockResult) -> None:
        """Have a block on the disk: its weights, unless the decoder's store has put them there, then its record."""
        index = result.record.index
        if decoder.store is None:
            self.sink.write(decoder.block_name(index), result.weights)
        self._write(_record(index), asdict(result.record))
        self.metrics.drop(index)
        record_done(f"{self.told}, and kept in {self.folder}: go on with --resume")

    def _write(self, name: str, content: Any) -> None:
        # NaN and infinity, which a report may hold, are written as Python reads them.
        text = json.dumps(content, indent=2).encode()
        write_whole(self.folder / name, lambda stream: stream.write(text))

    def _read(self, name: str) -> Any:
        try:
            return read_json((self.folder / name).read_text(encoding="utf-8"), f"{name} of {self.folder}")
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise self._damaged(name) from error

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{name} of the run in {self.folder} is damaged: delete the folder and begin anew")


def _record(index: int) -> str:
    return f"block-{index:05d}.json"


def differences(before: Any, now: Any, what: str = "") -> Iterator[tuple[str, Any, Any]]:
    """What is another in two values of plain data, by its path in them."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in dict.fromkeys((*before, *now)):
            yield from differences(before.get(key), now.get(key), f"{what}.{key}" if what else key)
    elif before != now:
        yield what, before, now


def digest_of_model(decoder: Decoder, on_bytes: Callable[[int, int], None] = lambda done, total: None) -> str:
    """A SHA-256 hex digest of a model's weights: of the bytes of its files, where its blocks stay there.

    `on_bytes` hears how many bytes are read, and of how many.
    """
    if decoder.store is None:
        weights = list(decoder.model.state_dict().items())
        size = sum(weight.nbytes for _, weight in weights)
        on_bytes(0, size)
        found = fingerprint(weights)
        on_bytes(size, size)
        return found
    digest, files, done = hashlib.sha256(), decoder.store.checkpoint.files, 0
    size = sum(file.stat().st_size for file in files)
    for file in files:
        of_file = hashlib.sha256()
        with file.open("rb") as stream:
            while piece := stream.read(PIECE):
                of_file.update(piece)
                on_bytes(done := done + len(piece), size)
        digest.update(of_file.digest())
    return digest.hexdigest()
