"""Parts of a program: the request, the method for all layers, and the stages of each block."""

from dataclasses import dataclass
from typing import Any

import torch

from optprune.allocation import Allocation
from optprune.calibration import Propagation
from optprune.models import BlockAllocation, Decoder, Target, Units
from optprune.objectives import Objective
from optprune.recipe import Recipe
from optprune.recipe.groups import Recovery
from optprune.report import GoalReached
from optprune.solvers import ExpertSolver, Solver

MAX_SHARD = 5 * 10**9
"""the default of the largest weights file, in bytes"""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Request for a run: a recipe, the size of the calibration text, and the machine to use."""

    recipe: Recipe
    allocation: Allocation | None = None
    """what every block keeps, in place of the recipe's sparsity"""
    goal: GoalReached | None = None
    """the goal that the recipe's sparsity was chosen for"""
    text: str | None = None
    """a digest of the text that the tokens of a smaller vocabulary are chosen by, once it is read"""
    tokenizer: str | None = None
    """a digest of the tokenizer of all tokens, where there is a smaller vocabulary"""
    samples: int = 128
    """calibration sequences"""
    seq_length: int = 2048
    """tokens of a sequence"""
    lengths: tuple[int, ...] = ()
    """tokens of each sequence, which is a batch of its own, where sequences are records"""
    generated: int = 0
    """further sequences, which the dense model generates"""
    dtype: torch.dtype = torch.float32
    """the dtype of the model while it is pruned"""
    device: str = "cpu"
    """cpu or cuda"""
    devices: int = 1
    """GPUs that the processes of this machine share"""
    workers: int = 1
    """workers side by side: on blocks where the policy makes them independent, else on the layers of a block"""
    ray: bool = False
    """whether the workers are on other machines"""
    states: str = "auto"
    """where hidden states between blocks are kept: auto or device, host, or disk"""
    whole: bool = False
    """whether the whole model is in memory, instead of one block at a time"""
    max_shard: int = MAX_SHARD
    """largest weights file of the output, in bytes"""
    features: int = 1
    """vectors of features of each token of an image, where sequences are records"""
    around: int = 0
    """bytes of the tensors of a vision-language model beside its language part, where they are known"""


@dataclass(frozen=True)
class Method:
    """Method of stating, solving and refitting layers, the same for every block of a run."""

    objective: Objective
    """states the problem of a layer"""
    solver: Solver | None
    """solves it; None lets the problem choose"""
    expert_solver: ExpertSolver
    damping: float
    fit_bias: bool
    permuted: bool = False
    """whether inputs change places for N:M patterns"""
    dampings: tuple[float, ...] = ()
    """dampings that the last refit of a layer chooses from, on held-out tokens"""
    recovery: Recovery | None = None
    grid_solver: Solver | None = None
    """puts the weights that stay on the grid of their targets, if they have one"""
    strict: bool = False
    """whether notes of layers are errors"""

    @property
    def moves_weights_later(self) -> bool:
        """Whether weights are moved again after their layers are solved."""
        return self.recovery is not None


@dataclass(frozen=True)
class Stage:
    """Layers of a block that are solved from the same statistics."""

    targets: tuple[Target, ...]
    taps: tuple[str, ...]
    """layers at which the inputs of the targets are collected, in the order of the forward pass"""
    touched: tuple[str, ...] = ()
    """sub-modules to recover that have a layer in this stage"""
    recovered: tuple[str, ...] = ()
    """sub-modules that are recovered once this stage is solved: no later stage has a layer of theirs"""


@dataclass(frozen=True, eq=False)
class BlockProgram:
    """Steps of pruning one block: remove sub-blocks and experts, solve the stages."""

    index: int
    wanted: BlockAllocation
    """what the block keeps"""
    removed: tuple[str, ...] = ()
    """sub-blocks that are removed whole"""
    fewer_experts: bool = False
    """whether experts are removed"""
    stages: tuple[Stage, ...] = ()

    @classmethod
    def of(
        cls,
        decoder: Decoder,
        index: int,
        wanted: BlockAllocation,
        *,
        units: Units,
        policy: Propagation,
        recovery: Recovery | None = None,
    ) -> "BlockProgram":
        """Return what has to happen for a block to keep what an allocation leaves it.

        Where the inputs may have drifted from those of the dense model, layers that keep everything are corrected too.
        """
        shape, architecture = decoder.shape(index), decoder.architecture
        targets = units.targets(decoder, index, wanted, drifted=policy.dense_target)
        stages = [
            [target for target in targets if architecture.stage_of(target.path) == stage]
            for stage in range(len(architecture.stages))
        ]
        groups = [stage for stage in stages if stage]
        if groups and not policy.sequential:
            groups = [[target for stage in groups for target in stage]]
        parts = list(decoder.recoverable(index)) if recovery is not None else []
        touched = [
            tuple(part for part in parts if any(target.path.startswith(f"{part}.") for target in group))
            for group in groups
        ]
        return cls(
            index,
            wanted,
            removed=tuple(part for part in shape.parts if part not in wanted.shape.parts),
            fewer_experts=0 < wanted.shape.experts < shape.experts,
            stages=tuple(
                Stage(
                    tuple(group),
                    taps=tuple(sorted({target.tap for target in group}, key=architecture.layers.index)),
                    touched=touched[number],
                    recovered=tuple(
                        part for part in touched[number] if not any(part in later for later in touched[number + 1 :])
                    ),
                )
                for number, group in enumerate(groups)
            ),
        )

    @property
    def targets(self) -> list[Target]:
        """The layers that are solved, in the order of the forward pass."""
        return [target for stage in self.stages for target in stage.targets]

    @property
    def solves(self) -> bool:
        """Whether the block's statistics decide anything."""
        return bool(self.stages) or self.fewer_experts

    @property
    def changes(self) -> bool:
        """Whether anything of the block changes."""
        return self.solves or bool(self.removed)

    def to_dict(self) -> dict[str, Any]:
        """Return the stages as plain data."""
        return {
            "removed": list(self.removed),
            "experts": self.wanted.shape.experts if self.fewer_experts else None,
            "stages": [
                {
                    "layers": [target.path for target in stage.targets],
                    "moments": list(stage.taps),
                    "recovered": list(stage.recovered),
                }
                for stage in self.stages
            ],
        }
