"""The journal: the finished work of a run on the disk, and the facts that decided it, so that the run can be resumed.

A run folder holds `run.json`, the manifest with the facts that decide the bytes; `generated.json`, the windows that the
dense model generated; `tokens.json`, the tokens of a smaller vocabulary; the output metric of each block; the costs of
the units or weights of each layer; `division.json`, the division of the budget; and for each finished block a
safetensors file of its weights and a JSON file of its record. Every file is written whole or not at all. A file whose
bytes have changed counts as absent, and its content is measured again. A resumed run passes the finished blocks with
one forward pass and prunes the rest; its weights are those of an uninterrupted run, bit for bit.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from optprune.allocation import Allocation, Division
from optprune.calibration import DenseStatistics
from optprune.calibration.dense_statistics import KnownMoments, Removal
from optprune.calibration.generated import FILE as GENERATED
from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.statistics_cache import Key
from optprune.metric import Metrics, MetricSums
from optprune.models import Decoder
from optprune.models.checkpoint import Checkpoint, digest_of_files, stored_tensors
from optprune.models.gguf import CONVERTED
from optprune.models.store import ShardSink
from optprune.numerics.fingerprint import fingerprint
from optprune.numerics.tensors import write_tensors
from optprune.problems import ExpertChoice, LayerLoss, StructuredLeastSquares
from optprune.pruning.block import BlockRecord, BlockResult
from optprune.report import RemovedPart
from optprune.system.folders import RunFolder
from optprune.system.wording import counted

DIVISION = "division.json"
CHOSEN_TOKENS = "tokens.json"
"""the file of the tokens of a smaller vocabulary, so that a run that resumes does not choose them again"""
BLOCKS = "the blocks"
"""the key of the number of blocks among the facts"""
RECIPE = "the recipe"
MODEL = "the model"
"""the key of the digest of the model among the facts"""
IN_MEMORY = "in memory "
"""the beginning of the digest of a model that was in memory"""
PREFIX, REST = "cost-", "rest"
INDEX = "metrics.json"


class MetricFiles:
    """The files of the metrics in a run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @property
    def measured(self) -> bool:
        """Whether the metrics were measured."""
        return self._folder.lists(INDEX)

    def file(self, block: int) -> Path:
        """Return the path of a block's file, whether or not it exists; its ending is not that of a model's file."""
        return self._folder.folder / _name(block)

    def keep(self, decoder: Decoder, metrics: Metrics) -> Metrics:
        """Write measured metrics block by block, and return metrics that read these files."""
        layers: dict[str, dict[str, Any]] = {}
        for block in range(len(decoder.blocks)):
            names = [name for path in decoder.paths(block) if (name := decoder.name(block, path)) in metrics]
            sums = {name: metrics.sums(name) for name in names}
            parts = {f"{name}/{part}": value for name in names for part, value in sums[name].parts().items()}
            self._folder.keep(_name(block), partial(write_tensors, tensors=parts))
            del parts
            for name, own in sums.items():
                layers[name] = {"block": block, "width": own.width, "tokens": own.tokens, "full": own.full}
        self._folder.write(INDEX, layers)
        return self._metrics(layers, decoder.model.device)

    def read(self, decoder: Decoder, finished: Collection[int]) -> Metrics | None:
        """Return the metrics that an earlier run measured.

        None if there are none, or if the file of a block that is not `finished` has changed.
        """
        needed = [block for block in range(len(decoder.blocks)) if block not in finished]
        if not self._folder.holds(INDEX) or not all(self._folder.holds(_name(block)) for block in needed):
            return None
        try:
            return self._metrics(self._folder.read(INDEX), decoder.model.device)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._folder.damaged(INDEX) from error

    def drop(self, block: int) -> None:
        """Delete the file of a finished block."""
        self._folder.forget([_name(block)])

    def _metrics(self, layers: Mapping[str, Mapping[str, Any]], device: torch.device) -> Metrics:
        def sums(name: str, block: int, width: int, tokens: int, full: bool) -> MetricSums:
            def fetch() -> dict[str, Tensor]:
                stored = stored_tensors(self.file(block), str(self._folder.folder))
                own = {key.removeprefix(f"{name}/"): tensor for key, tensor in stored.items()}
                return {part: tensor.read().to(device) for part, tensor in own.items() if "/" not in part}

            return MetricSums.elsewhere(int(width), int(tokens), fetch, full=bool(full))

        return Metrics({name: sums(name, **own) for name, own in layers.items()})


@dataclass(frozen=True)
class Measured:
    """A measurement as tensors by name and plain data."""

    tensors: dict[str, Tensor]
    rest: Any = None


class CostFiles:
    """The files of costs in a run folder, each named after the problem whose costs it holds."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @property
    def names(self) -> list[str]:
        """The names of the files."""
        return [name for name in self._folder.files if name.startswith(PREFIX)]

    def once(self, key: Key, measure: Callable[[], Measured], device: torch.device | None = None) -> Measured:
        """Return the measurement under a key, from its file with tensors on a device, or else from `measure`."""
        name = f"{PREFIX}{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"
        if self._folder.holds(name):
            return self._read(name, str(device or "cpu"))
        found = measure()
        tensors = {part: tensor.detach().contiguous() for part, tensor in found.tensors.items()}
        data = save(tensors, {REST: json.dumps(found.rest)})
        self._folder.keep(name, lambda stream: stream.write(data))
        return found

    def drop(self) -> None:
        """Delete the files."""
        self._folder.forget(self.names)

    def _read(self, name: str, device: str) -> Measured:
        try:
            with safe_open(self._folder.folder / name, framework="pt", device=device) as stored:
                tensors = {part: stored.get_tensor(part).clone() for part in stored.keys()}  # noqa: SIM118  # no mapping
                return Measured(tensors, json.loads(stored.metadata()[REST]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._folder.damaged(name) from error


class JournalledStatistics(DenseStatistics):
    """Dense statistics for dividing a budget, with the costs of removal kept in a run folder."""

    def __init__(self, inner: DenseStatistics, costs: CostFiles) -> None:
        self._inner, self._costs = inner, costs

    def known(
        self, decoder: Decoder, batches: Sequence[Tensor], held_out: int, partial_sums: PartialSums
    ) -> KnownMoments | None:
        return self._inner.known(decoder, batches, held_out, partial_sums)

    def removal(self, problem: StructuredLeastSquares, batch: int) -> Removal:
        def measure() -> Measured:
            order, losses, notes = self._inner.removal(problem, batch)
            return Measured({"order": order, "losses": losses}, list(notes))

        device = problem.loss.weight.device
        found = self._costs.once(("removal", problem.fingerprint(), str(device), batch), measure, device)
        return found.tensors["order"], found.tensors["losses"], tuple(map(str, found.rest))

    def entries(self, loss: LayerLoss, stride: int, measure: Callable[[], Tensor]) -> Tensor:
        def measured() -> Measured:
            return Measured({"costs": self._inner.entries(loss, stride, measure)})

        key = ("entries", fingerprint(loss), str(loss.weight.device), stride)
        return self._costs.once(key, measured).tensors["costs"]

    def experts(self, problem: ExpertChoice) -> tuple[list[int], list[float]]:
        def measure() -> Measured:
            return Measured({}, self._inner.experts(problem))

        order, costs = self._costs.once(("experts", fingerprint(problem), str(problem.logits.device)), measure).rest
        return list(map(int, order)), list(map(float, costs))

    def scores(self, key: Key, measure: Callable[[], list[float]]) -> list[float]:
        def measured() -> Measured:
            return Measured({}, self._inner.scores(key, measure))

        return list(map(float, self._costs.once(("scores", *key), measured).rest))


class Journal(RunFolder):
    """The run folder of pruning. `prune` begins it and writes finished work to it."""

    stays = (CONVERTED,)
    written = (
        "block-[0-9][0-9][0-9][0-9][0-9].json",
        "*.safetensors",
        "*.sums",
        "metrics.json",
        "cost-*",
        DIVISION,
        GENERATED,
        CHOSEN_TOKENS,
    )

    @cached_property
    def sink(self) -> ShardSink:
        """The sink of the finished blocks' weights, one file each; `open_model` takes it for pruned blocks."""
        return ShardSink(self.folder, keep=self.keep)

    @property
    def metrics(self) -> MetricFiles:
        """The files of the dense model's output metrics, for the blocks that are not finished."""
        return MetricFiles(self)

    @property
    def costs(self) -> CostFiles:
        """The files of the costs of units or weights, which are kept until the budget is divided."""
        return CostFiles(self)

    def keeping_costs(self, statistics: DenseStatistics) -> DenseStatistics:
        """Return statistics that keep the costs of removal in this folder."""
        return JournalledStatistics(statistics, self.costs)

    earlier_seconds = 0.0
    """the seconds of the run until earlier processes finished the last of their work, once the clock was started"""
    _start = math.nan

    def start_clock(self, began: float) -> None:
        """Count the seconds of the run from a perf_counter on, after those of earlier processes."""
        kept = [self._block(index) for index in self.finished()] if self.begun else []
        kept += [self.read(DIVISION)] if self.begun and self.holds(DIVISION) else []
        known = [one["seconds"] for one in kept if isinstance(one, dict) and isinstance(one.get("seconds"), float)]
        self.earlier_seconds = max(filter(math.isfinite, known), default=0.0)
        self._start = began - self.earlier_seconds

    @property
    def _seconds(self) -> float:
        """The seconds of the run until now; NaN where its clock was not started."""
        return time.perf_counter() - self._start

    @property
    def worth_keeping(self) -> bool:
        if not self.begun:
            # Without facts no file is used again.
            return self.has_scratch
        # A division without measurements is repeated in no time.
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
        if self.metrics.measured:
            parts.append("the output metric is measured")
        if self.lists(DIVISION):
            parts.append("the budget is divided")
        elif self.costs.names:
            parts.append(f"the costs of {counted(len(self.costs.names), 'layer')} are measured")
        if not parts and self.lists(CHOSEN_TOKENS):
            parts.append("the tokens of the smaller vocabulary are chosen")
        if not parts and self.lists(GENERATED):
            parts.append("text is generated")
        return done if listed or not parts else " and ".join(parts)

    @property
    def _blocks(self) -> int:
        return int(self.facts.get(BLOCKS, 0))

    def shards(self) -> list[Path]:
        """Return the files of the finished blocks' weights."""
        return [self.folder / str(self._block(index)["weights"]) for index in self.finished()]

    def division(self) -> Division | None:
        """Return the division of the budget, or None if the run has not divided it."""
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
        """Keep the division of the budget, and delete the costs that led to it."""
        data = {
            "allocation": division.allocation.to_dict(),
            "removed": [asdict(part) for part in division.removed],
            "warnings": division.warnings,
            "notes": division.notes,
            "seconds": self._seconds,
        }
        self.write(DIVISION, data)
        self.costs.drop()

    def finished(self) -> list[int]:
        """Return the numbers of the finished blocks, whose record and weights are unchanged."""
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
        """Return the record of a finished block."""
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
        """Keep the weights of a finished block, unless the decoder's store wrote them, then its record."""
        index = result.record.index
        name = decoder.block_name(index)
        if decoder.store is None:
            self.sink.write(name, result.weights)
        self._blocks_read.pop(index, None)
        done = {"weights": self.sink.file(name).name, "record": asdict(result.record), "seconds": self._seconds}
        self.write(_record(index), done)
        self.metrics.drop(index)

    def repaired(self) -> tuple[str, ...]:
        """Return notes on damaged files, whose content is measured again."""
        return tuple(
            f"{name} in the run folder was damaged, so its content was measured again" for name in self.damaged_files
        )


def _record(index: int) -> str:
    return f"block-{index:05d}.json"


def digest_of_model(decoder: Decoder, on_bytes: Callable[[int, int], None] = lambda done, total: None) -> str:
    """Return a SHA-256 hex digest of a model's files, or of its weights and marked so where they are in memory.

    `on_bytes` receives the number of bytes read and the total.
    """
    if decoder.store is None:
        weights = list(decoder.model.state_dict().items())
        size = sum(weight.nbytes for _, weight in weights)
        on_bytes(0, size)
        found = fingerprint(weights)
        on_bytes(size, size)
        return IN_MEMORY + found
    return digest_of_files(decoder.store.checkpoint.files, on_bytes)


def may_be_of(facts: Mapping[str, Any], decoder: Decoder) -> bool:
    """Return False where a run was on other files than those that a model's blocks are read from."""
    known = str(facts.get(MODEL, IN_MEMORY))
    return known.startswith(IN_MEMORY) or known == digest_of_model(decoder)


def _name(block: int) -> str:
    return f"metric-{block:05d}.sums"
