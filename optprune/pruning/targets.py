"""Targets: the layers of a block that a recipe and an allocation prune, in the order of the forward pass."""

from optprune.models import BlockAllocation, BlockShape, Decoder, Target
from optprune.recipe import Recipe


def targets_of(decoder: Decoder, recipe: Recipe, wanted: BlockAllocation, index: int) -> list[Target]:
    """The layers to prune in a block: what the allocation makes smaller.

    Where the inputs may have drifted from the dense model's, the recipe's layers are corrected even if they keep all.
    """
    return recipe.units.targets(decoder, index, wanted, drifted=recipe.policy.dense_target)


def by_stage(decoder: Decoder, targets: list[Target]) -> list[list[Target]]:
    """The targets that read the same input together, in the order of the forward pass."""
    stages = range(len(decoder.architecture.stages))
    groups = [[target for target in targets if decoder.architecture.stage_of(target.path) == stage] for stage in stages]
    return [group for group in groups if group]


def parts_removed(shape: BlockShape, wanted: BlockShape) -> tuple[str, ...]:
    """The sub-blocks that an allocation removes whole."""
    return tuple(part for part in shape.parts if part not in wanted.parts)
