"""The run folder of healing: the state of the training after a measurement, from which it goes on bit for bit."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from optprune.errors import InputError
from optprune.healing.records import HeldOut
from optprune.models.checkpoint import stored_tensors, write_tensors
from optprune.system.files import write_whole
from optprune.system.interrupts import record_done
from optprune.system.run_folder import RunFolder

PROGRESS = "progress.json"
GENERATED = "generated.json"


@dataclass(frozen=True)
class Progress:
    """How far the training is, but for its tensors."""

    step: int
    steps: int
    seconds: float
    measured: tuple[HeldOut, ...]
    dense_perplexity: float
    best: int
    """the step whose state has the least divergence"""
    done: bool
    """whether no step is left, or none is worth taking"""
    stored: dict[str, str] = field(default_factory=dict)
    """the files of the tensors: of the state, and of the best weights where they are another"""


class HealingFolder(RunFolder):
    """What `heal` keeps on the disk: `progress.json`, the weights and the optimizer's state, and the best weights."""

    def finished(self) -> list[int]:
        progress = self.progress()
        return [] if progress is None else [progress.step]

    @property
    def how_far(self) -> str:
        return self.told

    @property
    def told(self) -> str:
        progress = self.progress()
        return "no step is done" if progress is None else f"{progress.step} of {progress.steps} steps are done"

    @property
    def whole(self) -> bool:
        progress = self.progress()
        return progress is not None and progress.done

    def progress(self) -> Progress | None:
        """How far the run is, where anything of it is kept."""
        if not (self.folder / PROGRESS).is_file():
            return None
        try:
            return TypeAdapter(Progress).validate_python(self.read(PROGRESS))
        except ValidationError as error:
            raise self.damaged(PROGRESS) from error

    def generated(self) -> Tensor | None:
        """The windows [n, length] that the dense model wrote, where they are kept."""
        if not (self.folder / GENERATED).is_file():
            return None
        try:
            return torch.tensor(TypeAdapter(list[list[int]]).validate_python(self.read(GENERATED)))
        except (ValidationError, ValueError) as error:
            raise self.damaged(GENERATED) from error

    def keep_generated(self, windows: Tensor) -> None:
        """Keep what the dense model wrote."""
        self.write(GENERATED, windows.tolist())

    def save(self, progress: Progress, state: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
        """Keep a state in place of the one before; the best weights are written where they are new."""
        before = self.progress()
        names = {"state": f"state-{progress.step:06d}.safetensors", "best": f"best-{progress.best:06d}.safetensors"}
        self._write_tensors(names["state"], state)
        if before is None or before.best != progress.best:
            self._write_tensors(names["best"], best)
        self.write(PROGRESS, {**asdict(progress), "stored": names})
        for file in self.folder.glob("*.safetensors"):  # only what no state refers to any more
            if file.name not in names.values():
                with suppress(OSError):
                    file.unlink()
        record_done(f"{self.told}, and kept in {self.folder}: go on with --resume")

    def tensors(self, progress: Progress, which: str) -> dict[str, Tensor]:
        """The tensors of the "state" or of the "best" weights."""
        file = self.folder / Path(progress.stored.get(which, "?")).name
        try:
            return {name: tensor.read() for name, tensor in stored_tensors(file, str(self.folder)).items()}
        except (OSError, InputError) as error:
            raise self.damaged(file.name) from error

    def _write_tensors(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        write_whole(self.folder / name, lambda stream: write_tensors(stream, tensors))
