"""Problems of a model's layers as files, as a run meets them."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from optprune.allocation import Allocation
from optprune.calibration import calibrating
from optprune.calibration.moments_pass import Collected
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.models.store import BlockStore
from optprune.numerics.precision import full_precision
from optprune.problems import save_problem
from optprune.program import Program, Request, check_batches, resolve
from optprune.pruning.executors import LayerExecutor, SerialExecutor, Take
from optprune.pruning.layer import LayerTask, stated_problem
from optprune.pruning.pipeline import settings_of
from optprune.pruning.run import begin
from optprune.recipe import Recipe
from optprune.report import Event, PhaseRecorder
from optprune.system.wording import shown

SUFFIX = ".safetensors"


@dataclass(frozen=True)
class SavingExecutor(LayerExecutor):
    """Executor that writes the problems of some layers to files before it solves them, and none after the last."""

    folder: Path
    left: set[str]
    """the full names of the layers that are not written yet"""
    origin: Mapping[str, str | int]

    def solve(self, tasks: Sequence[LayerTask], collected: Collected, take: Take) -> None:
        for task in tasks:
            if task.name in self.left:
                problem = stated_problem(task, collected.moments[task.target.tap])
                save_problem(problem, file_of(self.folder, task.name), origin={**self.origin, "layer": task.name})
                self.left.remove(task.name)
        if self.left:
            SerialExecutor().solve(tasks, collected, take)


def file_of(folder: Path, layer: str) -> Path:
    """Return the file of a layer's problem."""
    return folder / f"{layer}{SUFFIX}"


@full_precision()
def save_problems(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: str | Recipe,
    folder: str | Path,
    *,
    layers: str = "*",
    allocation: Allocation | Any = None,
    store: BlockStore | None = None,
    origin: Mapping[str, str | int] | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
    **fields: Any,
) -> list[Path]:
    """Write the problems that a recipe states at the layers whose full names match a pattern, and return the files.

    The model is pruned in place up to the last of them, because a later problem depends on the answers before it.
    `origin` is written into each file, beside the layer, the recipe and the number of tokens. `folder` must exist.
    InputError where no layer matches, or none of them loses a weight. The recipe is a Recipe, a name or a YAML file,
    and the rest too is as in `prune`.
    """
    recipe, allocation = settings_of(recipe, allocation, fields)
    every, decoder = check_batches(model.config, batches), Decoder(model, store)
    request = Request(
        recipe=recipe,
        allocation=allocation,
        dtype=model.dtype,
        device=model.device.type,
        whole=store is None,
    )
    program = resolve(decoder, request)
    names = wanted_layers(program, layers)
    tokens = sum(batch.numel() for batch in every)
    known = {**(origin or {}), "recipe": recipe.name, "tokens": tokens}
    executor = SavingExecutor(Path(folder), {name for block in names for name in block}, known)
    phases = PhaseRecorder(model.device, on_event)
    run = begin(program, decoder, every, phases=phases, executor=lambda _: executor)
    last = max(index for index, block in enumerate(names) if block)
    with calibrating(run.decoder):
        for index in range(last + 1):
            run.prune_block(index)
    files = [file_of(Path(folder), name) for block in names for name in block if file_of(Path(folder), name).exists()]
    if not files:
        raise InputError(
            f"none of the layers that match {shown(layers)} loses a weight at a sparsity of {program.sparsity:g}, so "
            "that they have no problems: raise the sparsity"
        )
    return files


def wanted_layers(program: Program, pattern: str) -> list[list[str]]:
    """Return the full names of the layers of every block that may be pruned and match; InputError where none does."""
    decoder = program.decoder
    every = [
        [decoder.name(index, target.path) for target in targets] for index, targets in enumerate(program.candidates())
    ]
    found = [[name for name in block if fnmatchcase(name, pattern)] for block in every]
    if not any(found):
        some = next((block[0] for block in every if block), "none")
        raise InputError(
            f"--layers {shown(pattern)} matches no layer that the recipe {program.request.recipe.name} prunes, such as "
            f"{some}: give a name or a pattern such as '*.3.*.down_proj'"
        )
    return found
