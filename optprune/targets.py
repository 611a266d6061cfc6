"""Targets: the layers of a block that a recipe and an allocation prune, in the order of the forward pass."""

from collections.abc import Callable
from dataclasses import dataclass

from optprune.allocation import NARROWED, Allocation, BlockAllocation
from optprune.errors import InputError
from optprune.models import PARTS, BlockShape, Decoder, LinkedLayers
from optprune.recipe import Recipe, n_of_m


@dataclass(frozen=True)
class Target:
    """A layer to prune in every block, and the place in the forward pass where its input is seen."""

    path: str
    tap: str
    """the first layer that reads the same input: layers of one stage share one set of moments"""
    units: Callable[[int], LinkedLayers] | None = None
    """the linked layers of a block, where units are pruned"""
    kept: Callable[[BlockShape], int] | None = None
    """how many units a shape has"""


def targets_of(decoder: Decoder, recipe: Recipe, wanted: BlockAllocation, index: int) -> list[Target]:
    """The layers to prune in a block: what the allocation makes smaller.

    Where the inputs may have drifted from the dense model's, the recipe's layers are corrected even if they keep all.
    """
    architecture, shape, keep = decoder.architecture, decoder.shape(index), wanted.shape
    if recipe.units == "weights":
        tap = architecture.taps
        return [Target(path, tap[path]) for path in decoder.paths(index) if wanted.share(path) < 1]
    named = NARROWED.get(recipe.units, ()) if recipe.policy.dense_target else ()
    output, down = architecture.output, architecture.mlp_consumer
    values = Target(output, output, decoder.value_units, lambda shape: shape.value_dim * shape.kv_heads)
    groups = Target(output, output, decoder.kv_units, lambda shape: shape.kv_heads)
    targets = []
    if keep.kv_heads < shape.kv_heads or "kv_heads" in named:
        targets.append(groups)
    elif keep.value_dim < shape.value_dim or "value_dim" in named:
        targets.append(values)
    if keep.mlp_width < shape.mlp_width or "mlp_width" in named:
        targets.append(Target(down, down, decoder.mlp_units, lambda shape: shape.mlp_width))
    return [target for target in targets if target.kept and target.kept(keep)]


def by_stage(decoder: Decoder, targets: list[Target]) -> list[list[Target]]:
    """The targets that read the same input together, in the order of the forward pass."""
    stages = range(len(decoder.architecture.stages))
    groups = [[target for target in targets if decoder.architecture.stage_of(target.path) == stage] for stage in stages]
    return [group for group in groups if group]


def parts_removed(shape: BlockShape, wanted: BlockShape) -> tuple[str, ...]:
    """The sub-blocks that an allocation removes whole."""
    gone = {
        "attention": shape.kv_heads and not wanted.kv_heads,
        "mlp": shape.mlp_width and not wanted.mlp_width,
    }
    return tuple(part for part in PARTS if gone[part])


def check_allocation(decoder: Decoder, recipe: Recipe, allocation: Allocation) -> None:
    """Raise InputError when an allocation fits neither the model nor what the recipe prunes."""
    allocation.check(decoder)
    single, n_m = recipe.units == "weights", n_of_m(recipe.pattern)
    for index, block in enumerate(allocation.blocks):
        if block.shares and not single:
            raise InputError(
                f"the allocation thins out layers of block {index}: that needs a recipe with units weights"
            )
        if single and (block.shape.mlp_width or block.shape.kv_heads) and block.shape != decoder.shape(index):
            raise InputError(f"the allocation narrows block {index}, but the recipe's units are single weights")
        if (
            single
            and n_m is not None
            and any(min(abs(share - 1), abs(share - n_m[0] / n_m[1])) > 1e-6 for share in block.shares.values())
        ):
            raise InputError(f"with the pattern {recipe.pattern} a layer of block {index} keeps that share, or 1")
