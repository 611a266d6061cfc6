"""The journal: what a run has finished, on the disk, and what decided it, so that it can go on later.

A run folder holds `run.json`, the manifest with the facts that decide the bytes; the output metric of each block; what
the units or weights of each layer cost; `division.json`, what every block keeps; and for each finished block a
safetensors file of its weights and a JSON file of its record. Every file is there whole or not at all, and counts as
absent where its bytes are not those that were written: then it is measured again. A run that goes on passes the
finished blocks by, with one forward pass, and does the rest: its weights are those of a run that was never stopped,
bit for bit.
"""

import hashlib
from collections.abc import Callable
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from optprune.allocation import Allocation, Division
from optprune.calibration import DenseStatistics
from optprune.models import Decoder
from optprune.models.checkpoint import Checkpoint, stored_tensors
from optprune.models.gguf import CONVERTED
from optprune.models.store import ShardSink
from optprune.numerics.fingerprint import fingerprint
from optprune.pruning.block import BlockRecord, BlockResult
from optprune.pruning.kept_costs import JournalledStatistics, KeptCosts
from optprune.pruning.metric_files import MetricFiles
from optprune.report import RemovedPart
from optprune.system.folders import RunFolder
from optprune.system.wording import counted

DIVISION = "division.json"
BLOCKS = "the blocks"
"""the fact that says how many blocks the model has"""
RECIPE = "the recipe"
PIECE = 1 << 24
"""how many bytes of a file are in memory while it is hashed"""


class Journal(RunFolder):
    """The run folder of pruning. `prune` begins it, and writes what is finished."""

    stays = (CONVERTED,)
    written = ("block-[0-9][0-9][0-9][0-9][0-9].json", "*.safetensors", "*.sums", "metrics.json", "cost-*", DIVISION)

    @cached_property
    def sink(self) -> ShardSink:
        """Where the weights of finished blocks are, one file each: `open_model` takes it for the pruned blocks."""
        return ShardSink(self.folder, keep=self.keep)

    @property
    def metrics(self) -> MetricFiles:
        """The output metrics of the dense model, for the blocks that are not finished."""
        return MetricFiles(self)

    @property
    def costs(self) -> KeptCosts:
        """What the units or the weights of each layer cost, until the budget is divided."""
        return KeptCosts(self)

    def keeping_costs(self, statistics: DenseStatistics) -> DenseStatistics:
        """Return statistics that keep the costs of removal in this folder."""
        return JournalledStatistics(statistics, self.costs)

    @property
    def worth_keeping(self) -> bool:
        # A division that nothing was measured for is made again in no time.
        kind = self.facts.get(RECIPE, {}).get("allocation", {}).get("kind")
        quick = {DIVISION} if kind in ("uniform", "given") else set()
        return bool(set(self.files) - quick) or self.has_scratch

    @property
    def complete(self) -> bool:
        return self.begun and len(self.finished()) == self._blocks

    @property
    def progress_text(self) -> str:
        listed = [index for index in range(self._blocks) if self.lists(_record(index))]
        done = f"{len(listed)} of {counted(self._blocks, 'block is', 'blocks are')} done"
        parts = []
        if self.metrics.there:
            parts.append("the output metric is measured")
        if self.lists(DIVISION):
            parts.append("the budget is divided")
        elif self.costs.names:
            parts.append(f"the costs of {counted(len(self.costs.names), 'layer')} are measured")
        return done if listed or not parts else " and ".join(parts)

    @property
    def _blocks(self) -> int:
        return int(self.facts.get(BLOCKS, 0))

    def shards(self) -> list[Path]:
        """Return the files of the finished blocks' weights."""
        return [self.folder / str(self._block(index)["weights"]) for index in self.finished()]

    def division(self) -> Division | None:
        """Return what every block keeps; None where the run has not come to that."""
        if not self.holds(DIVISION):
            return None
        data = self.read(DIVISION)
        try:
            removed = tuple(RemovedPart(**part) for part in data["removed"])
            notes = tuple(map(str, data["warnings"])), tuple(map(str, data["notes"]))
            return Division(Allocation.from_dict(data["allocation"]), removed, *notes)
        except (KeyError, TypeError) as error:
            raise self.damaged(DIVISION) from error

    def divided(self, division: Division) -> None:
        """Keep what every block keeps; what led to it is needed no longer."""
        data = {
            "allocation": division.allocation.to_dict(),
            "removed": [asdict(part) for part in division.removed],
            "warnings": division.warnings,
            "notes": division.notes,
        }
        self.write(DIVISION, data)
        self.costs.drop()

    def finished(self) -> list[int]:
        """Return the numbers of the blocks that are finished: whose record and weights are as they were written."""
        return [index for index in range(self._blocks) if self._is_finished(index)]

    def _is_finished(self, index: int) -> bool:
        return self.holds(_record(index)) and self.holds(str(self._block(index)["weights"]))

    def _block(self, index: int) -> dict[str, Any]:
        found = self._blocks_read.get(index)
        if found is None:
            found = self.read(_record(index))
            if not (isinstance(found, dict) and {"weights", "record"} <= found.keys()):
                raise self.damaged(_record(index))
            self._blocks_read[index] = found
        return found

    @cached_property
    def _blocks_read(self) -> dict[int, dict[str, Any]]:
        return {}

    def record(self, index: int) -> BlockRecord:
        """Return what there is to say of a finished block."""
        try:
            return TypeAdapter(BlockRecord).validate_python(self._block(index)["record"])
        except ValidationError as error:
            raise self.damaged(_record(index)) from error

    def weights(self, decoder: Decoder, index: int) -> dict[str, Tensor]:
        """Return the weights of a finished block, by their names inside it, on the decoder's device."""
        name, device = decoder.block_name(index), decoder.model.device
        file = self.sink.file(name)
        if not self.holds(file.name):
            raise self.damaged(file.name)
        found = Checkpoint(str(file), stored_tensors(file, str(self.folder))).read(name)
        return {own: weight.to(device) for own, weight in found.items()}

    def finish(self, decoder: Decoder, result: BlockResult) -> None:
        """Keep a finished block: its weights, unless the decoder's store has put them there, then its record."""
        index = result.record.index
        name = decoder.block_name(index)
        if decoder.store is None:
            self.sink.write(name, result.weights)
        self._blocks_read.pop(index, None)
        self.write(_record(index), {"weights": self.sink.file(name).name, "record": asdict(result.record)})
        self.metrics.drop(index)

    def repaired(self) -> tuple[str, ...]:
        """Return notes on the files that were damaged, whose content is measured again."""
        return tuple(
            f"{name} in the run folder was not as it was written, so its content was measured again"
            for name in self.damaged_files
        )


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
