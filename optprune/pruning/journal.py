"""The journal: the blocks that a run has finished, on the disk, and what decided them, so that it can go on later.

A run folder holds `run.json`, the facts that decide the bytes; `division.json`, what every block keeps; and for each
finished block a safetensors file of its weights and a JSON file of its record. Every file is there whole or not at all,
and a block is finished once its record is there. A run that goes on passes the finished blocks by, with one forward
pass, and does the rest: its weights are those of a run that was never stopped, bit for bit.
"""

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from optprune.allocation import Allocation, Division
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.models.checkpoint import Checkpoint, stored_tensors
from optprune.models.store import ShardSink
from optprune.pruning.block import BlockRecord, BlockResult
from optprune.report import RemovedPart
from optprune.system.files import read_json, write_whole
from optprune.system.wording import shown

FACTS, DIVISION = "run.json", "division.json"


class Journal:
    """What a run keeps in its folder. `prune` begins it, and writes what is finished."""

    def __init__(self, folder: str | Path, *, resume: bool = False) -> None:
        """`resume` is to go on with the run in the folder, if there is one; else the folder must hold none.

        InputError where it holds one all the same, or something that is no run.
        """
        self.folder, self.resume = Path(folder), resume
        if self.begun and not resume:
            raise InputError(
                f"{self.folder} holds an unfinished run ({len(self.finished())} blocks are done): go on with it by "
                "--resume, or delete it"
            )
        if self.folder.exists() and not self.begun and any(self.folder.iterdir()):
            raise InputError(f"{self.folder} holds something other than a run: choose another folder, or delete it")
        self.folder.mkdir(parents=True, exist_ok=True)

    @property
    def begun(self) -> bool:
        """Whether the folder holds a run."""
        return (self.folder / FACTS).is_file()

    @cached_property
    def sink(self) -> ShardSink:
        """Where the weights of finished blocks are, one file each: `open_model` takes it for the pruned blocks."""
        return ShardSink(self.folder)

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Note what decides the bytes of the run, or see that it is what the run in the folder began with.

        InputError names the first fact that is another.
        """
        told = json.loads(json.dumps(facts))
        if not self.begun:
            self._write(FACTS, told)
            return
        before = self._read(FACTS)
        for what, old, new in differences(before, told):
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
        name, device = decoder.name(index, "").rstrip("."), decoder.model.device
        file = self.sink.file(name)
        if not file.is_file():
            raise self._damaged(file.name)
        found = Checkpoint(str(file), stored_tensors(file, str(self.folder))).read(name)
        return {own: weight.to(device) for own, weight in found.items()}

    def finish(self, decoder: Decoder, result: BlockResult) -> None:
        """Have a block on the disk: its weights, unless the decoder's store has put them there, then its record."""
        index = result.record.index
        if decoder.store is None:
            self.sink.write(decoder.name(index, "").rstrip("."), result.weights)
        self._write(_record(index), asdict(result.record))

    def _write(self, name: str, data: Any) -> None:
        # NaN and infinity, which a report may hold, are written as Python reads them.
        text = json.dumps(data, indent=2).encode()
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


def digest_of_model(decoder: Decoder) -> str:
    """A SHA-256 hex digest of a model's weights: of the bytes of its files, where its blocks stay there."""
    digest = hashlib.sha256()
    if decoder.store is not None:
        for file in decoder.store.checkpoint.files:
            with file.open("rb") as stream:
                digest.update(hashlib.file_digest(stream, "sha256").digest())
        return digest.hexdigest()
    for name, weight in decoder.model.state_dict().items():
        digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
        digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def digest_of_batches(batches: list[Tensor]) -> str:
    """A SHA-256 hex digest of token ids."""
    digest = hashlib.sha256()
    for batch in batches:
        digest.update(f"{tuple(batch.shape)}".encode())
        digest.update(batch.cpu().contiguous().numpy().astype("<i8").tobytes())
    return digest.hexdigest()


def versions() -> dict[str, str]:
    """The versions of what computes."""
    return {
        "optprune": version("optprune"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def machine(device: torch.device) -> dict[str, Any]:
    """What of a machine decides how sums are rounded."""
    gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if gpu else f"cpu, {torch.backends.cpu.get_cpu_capability()}",
        "threads": torch.get_num_threads(),
        "kernels": {key: os.environ[key] for key in ("MKL_CBWR", "ATEN_CPU_CAPABILITY") if key in os.environ},
    }
