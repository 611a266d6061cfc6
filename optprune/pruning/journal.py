"""The journal: the blocks that a run has finished, on the disk, and what decided them, so that it can go on later.

A run folder holds `run.json`, the facts that decide the bytes; `division.json`, what every block keeps; for each
finished block a safetensors file of its weights and a JSON file of its record, and for each other one its output
metric, where there is one. Every file is there whole or not at all, and a block is finished once its record is there.
A run that goes on passes the finished blocks by, with one forward pass, and does the rest: its weights are those of a
run that was never stopped, bit for bit.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from optprune.allocation import Allocation, Division
from optprune.models import Decoder
from optprune.models.checkpoint import Checkpoint, stored_tensors
from optprune.models.gguf import CONVERTED
from optprune.models.store import ShardSink
from optprune.numerics.fingerprint import fingerprint
from optprune.pruning.block import BlockRecord, BlockResult
from optprune.pruning.metric_files import MetricFiles
from optprune.report import RemovedPart
from optprune.system.interrupts import record_done
from optprune.system.kept_folder import FACTS
from optprune.system.run_folder import RunFolder
from optprune.system.wording import counted

DIVISION = "division.json"
PIECE = 1 << 24
"""how many bytes of a file are in memory while it is hashed"""


class Journal(RunFolder):
    """What a run keeps in its folder. `prune` begins it, and writes what is finished."""

    stays = (CONVERTED,)

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
        return self.begun and len(self.finished()) == int(self.read(FACTS).get("the blocks", -1))

    @property
    def how_far(self) -> str:
        done = len(self.finished())
        return f"{counted(done, 'block is', 'blocks are')} done"

    @property
    def told(self) -> str:
        return f"{len(self.finished())} of {self.read(FACTS).get('the blocks')} blocks are done"

    def shards(self) -> list[Path]:
        """The files of the finished blocks' weights."""
        return sorted(self.folder.glob("*.safetensors"))

    def division(self) -> Division | None:
        """What every block keeps, where the run has come to that."""
        if not (self.folder / DIVISION).is_file():
            return None
        data = self.read(DIVISION)
        try:
            removed = tuple(RemovedPart(**part) for part in data["removed"])
            notes = tuple(map(str, data["warnings"])), tuple(map(str, data["notes"]))
            return Division(Allocation.from_dict(data["allocation"]), removed, *notes)
        except (KeyError, TypeError) as error:
            raise self.damaged(DIVISION) from error

    def divided(self, division: Division) -> None:
        """Keep what every block keeps."""
        data = {
            "allocation": division.allocation.to_dict(),
            "removed": [asdict(part) for part in division.removed],
            "warnings": division.warnings,
            "notes": division.notes,
        }
        self.write(DIVISION, data)

    def finished(self) -> list[int]:
        """The numbers of the blocks that are finished."""
        return sorted(int(file.stem.removeprefix("block-")) for file in self.folder.glob("block-*.json"))

    def record(self, index: int) -> BlockRecord:
        """What there is to say of a finished block."""
        try:
            return TypeAdapter(BlockRecord).validate_python(self.read(_record(index)))
        except ValidationError as error:
            raise self.damaged(_record(index)) from error

    def weights(self, decoder: Decoder, index: int) -> dict[str, Tensor]:
        """The weights of a finished block, by their names inside it, on the decoder's device."""
        name, device = decoder.block_name(index), decoder.model.device
        file = self.sink.file(name)
        if not file.is_file():
            raise self.damaged(file.name)
        found = Checkpoint(str(file), stored_tensors(file, str(self.folder))).read(name)
        return {own: weight.to(device) for own, weight in found.items()}

    def finish(self, decoder: Decoder, result: BlockResult) -> None:
        """Have a block on the disk: its weights, unless the decoder's store has put them there, then its record."""
        index = result.record.index
        if decoder.store is None:
            self.sink.write(decoder.block_name(index), result.weights)
        self.write(_record(index), asdict(result.record))
        self.metrics.drop(index)
        record_done(f"{self.told}, and kept in {self.folder}: go on with --resume")


def _record(index: int) -> str:
    return f"block-{index:05d}.json"


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
