"""Run folder of healing: the checkpoint after a measurement, from which a run resumes bit for bit."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import partial

from pydantic import TypeAdapter, ValidationError
from torch import Tensor

from optprune.calibration.generated import FILE as GENERATED
from optprune.healing.training import HeldOut
from optprune.models.checkpoint import stored_tensors
from optprune.numerics.tensors import write_tensors
from optprune.system.folders import RunFolder
from optprune.system.wording import counted

PROGRESS = "progress.json"


@dataclass(frozen=True)
class Progress:
    """State of the training without its tensors."""

    step: int
    steps: int
    seconds: float
    measured: tuple[HeldOut, ...]
    dense_perplexity: float
    best: int
    """step with the best weights"""
    done: bool
    """whether the training has ended: all steps are done, or the patience is used up"""
    stored: dict[str, str] = field(default_factory=dict)
    """file names of the tensors, by "state" and "best" """


class HealingFolder(RunFolder):
    """Run folder of `heal`: `progress.json`, weights with the optimizer's state, and the best weights."""

    noun = "healing run"
    written = (PROGRESS, GENERATED, "*.safetensors")

    def finished(self) -> list[int]:
        progress = self.progress()
        return [] if progress is None else [progress.step]

    @property
    def progress_text(self) -> str:
        progress = self.progress()
        if progress is not None:
            return f"{progress.step} of {counted(progress.steps, 'step is', 'steps are')} done"
        return "the teacher's windows are generated" if self.lists(GENERATED) else "no step is done"

    @property
    def complete(self) -> bool:
        progress = self.progress()
        return progress is not None and progress.done

    def progress(self) -> Progress | None:
        """Return the progress of the run, or None if there is none. Raises InputError where the file is damaged."""
        if not self.lists(PROGRESS):
            return None
        try:
            return TypeAdapter(Progress).validate_python(self.read(PROGRESS))
        except ValidationError as error:
            raise self.damaged(PROGRESS) from error

    def save(self, progress: Progress, state: Mapping[str, Tensor], best: Mapping[str, Tensor]) -> None:
        """Store a checkpoint in place of the previous one; the best weights are written only when they have changed."""
        before = self.progress()
        names = {"state": f"state-{progress.step:06d}.safetensors", "best": f"best-{progress.best:06d}.safetensors"}
        self.keep(names["state"], partial(write_tensors, tensors=state))
        if before is None or before.best != progress.best:
            self.keep(names["best"], partial(write_tensors, tensors=best))
        self.write(PROGRESS, {**asdict(progress), "stored": names})
        # The other files are unused now.
        self.forget([name for name in self.files if name.endswith(".safetensors") and name not in names.values()])

    def tensors(self, progress: Progress, which: str) -> dict[str, Tensor]:
        """Return the tensors of the "state" or of the "best" weights. Raises InputError where they are damaged."""
        name = progress.stored.get(which, "?")
        if not self.holds(name):
            raise self.damaged(name)
        file = self.folder / name
        return {name: tensor.read() for name, tensor in stored_tensors(file, str(self.folder)).items()}
