"""What needs no weights and no pass over the text, so that it is refused before either: shapes are enough."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from optprune.allocation import Allocation
from optprune.errors import InputError, StrictError
from optprune.metric import OutputMetric
from optprune.models import PARTS, Blocks, Decoder, reorderable
from optprune.moments import InputMoments
from optprune.objectives import OBJECTIVES, LayerContext
from optprune.patterns import ANYWHERE
from optprune.problems import ChannelGroups, LayerLoss, Link, Problem
from optprune.pruning.targets import targets_of
from optprune.recipe import Recipe
from optprune.recipe.allocator import allocator_of
from optprune.recipe.runtimes import RUNTIMES
from optprune.solvers.run import check_accepted
from optprune.system.wording import counted


def check_run(decoder: Decoder, recipe: Recipe, allocation: Allocation | None) -> tuple[str, ...]:
    """Raise InputError when a model of these shapes cannot be pruned so; it may be on the meta device.

    Returns notes on what of the recipe will do nothing there, which in strict mode is an error too.

    NoSolver when the recipe's solver does not solve what the recipe states.
    """
    allocation = allocation or recipe.given
    _check_alike(decoder, recipe, allocation)
    for kind in recipe.units.kinds:
        decoder.architecture.check_divisible(kind.field, f"units {kind.name} remove {kind.field}")
    allocator_of(recipe, allocation).check(decoder)
    pruned = _pruned(decoder, recipe, allocation)
    family = recipe.units.family or ANYWHERE
    for index, path in pruned:
        inputs, multiple = decoder.layer(index, path).in_features, family.multiple
        if inputs % multiple:
            raise InputError(
                f"a {family.name} pattern needs a multiple of {multiple} inputs, not {inputs} as in "
                f"{decoder.name(index, path)}: choose another pattern"
            )
    idle = _idle_recovery(decoder, recipe, pruned) + _idle_matching(recipe, pruned)
    idle += _idle_order(decoder, recipe, pruned)
    if idle and recipe.strict:
        raise StrictError(f"{idle[0]} (strict mode makes this an error)")
    if recipe.layer_solver is not None and recipe.objective in (None, *OBJECTIVES.values()) and pruned:
        full = recipe.metric is not None and recipe.metric.kind == "full"
        widest = (recipe.metric and recipe.metric.width) or math.inf
        whole = any(decoder.layer(index, path).out_features <= widest for index, path in pruned)
        small = small_problem(recipe, full=full and whole)
        check_accepted(small.in_output_basis()[0], recipe.layer_solver)
    return idle


def check_parts(decoder: Decoder, recipe: Recipe, allocation: Allocation | None) -> None:
    """Raise InputError where sub-blocks go whole, and there are no classes for that, as under a draft."""
    emptied = allocation is not None and not all(len(block.shape.parts) == len(PARTS) for block in allocation.blocks)
    if decoder.architecture.pruned is None and (isinstance(recipe.units, Blocks) or emptied):
        raise InputError(
            f"no sub-block of a {decoder.architecture.model_type} model can be removed under a draft, which has no "
            "classes for that: prune units mlp or weights"
        )


def _check_alike(decoder: Decoder, recipe: Recipe, allocation: Allocation | None) -> None:
    """Raise InputError where blocks may come to differ, and there are no classes for that, as under a draft."""
    check_parts(decoder, recipe, allocation)
    if decoder.architecture.pruned is not None:
        return
    fitted, _ = RUNTIMES["transformers"].fitted(recipe, decoder, allocation)
    if fitted != recipe:
        raise InputError(
            f"blocks of a {decoder.architecture.model_type} model stay alike under a draft, and the recipe "
            f"{recipe.name} lets them differ: --target transformers, or --allocation uniform"
        )


def _idle_recovery(decoder: Decoder, recipe: Recipe, pruned: list[tuple[int, str]]) -> tuple[str, ...]:
    """A note where recovery finds no sub-module whose output is affine in its layers one at a time."""
    parts = [part for part, _ in decoder.architecture.recoverable]
    if recipe.recovery is None or any(path.startswith(f"{part}.") for _, path in pruned for part in parts):
        return ()
    family = decoder.architecture.model_type
    if not parts:
        return (f"recovery has nothing to refit: no sub-module of {family} is affine in a layer before its last one",)
    return (
        f"recovery has nothing to refit: of {family} it knows {', '.join(parts)} where a layer is pruned, and units "
        f"{recipe.units.name} prune none there",
    )


def _idle_matching(recipe: Recipe, pruned: list[tuple[int, str]]) -> tuple[str, ...]:
    """A note where no layer is pruned, so that there is no block to match."""
    if recipe.matching is None or pruned:
        return ()
    return (f"matching has nothing to match: units {recipe.units.name} prune no layer of a block",)


def _idle_order(decoder: Decoder, recipe: Recipe, pruned: list[tuple[int, str]]) -> tuple[str, ...]:
    """A note where value dimensions are to be permuted and cannot be."""
    output, size = decoder.architecture.output, (recipe.units.family or ANYWHERE).multiple
    blocks = [index for index, path in pruned if path == output] if recipe.permuted else []
    left = [index for index in blocks if reorderable(decoder, index, output, size) is None]
    if not left:
        return ()
    name, count = decoder.name(left[0], output), decoder.shape(left[0]).value_dim
    why = (
        f"{count} in a head are no whole groups of {size}"
        if count % size
        else f"a draft does not say how those of a {decoder.architecture.model_type} model lie"
    )
    return (
        f"permuted leaves the value dimensions of {counted(len(left), 'block')} in their order, as those of {name}: "
        f"{why}",
    )


def small_problem(recipe: Recipe, full: bool) -> Problem:
    """A problem such as the recipe states at its layers, with four outputs and without their statistics."""
    family = recipe.units.family
    inputs = 2 * math.lcm(4, (family or ANYWHERE).multiple)
    weight = torch.ones(4, inputs, dtype=torch.float64, device="cpu")
    metric = None if recipe.metric is None else OutputMetric.from_samples(torch.eye(4).to(weight), full=full)
    loss = LayerLoss.of(weight, InputMoments.from_samples(torch.eye(inputs).to(weight)), recipe.damping, metric=metric)
    if family is None:
        groups = ChannelGroups.of(inputs)
        return recipe.state(LayerContext("", 0, loss, inputs // 2, Link(groups.columns, groups.slots)))
    pattern = family.of(4, inputs, 0.5)
    return recipe.state(LayerContext("", 0, loss, weight.numel() // 2, None, pattern))


def _pruned(decoder: Decoder, recipe: Recipe, allocation: Allocation | None) -> list[tuple[int, str]]:
    """The layers that will be pruned, or may be where the allocation is not known yet, as (block, path)."""
    units = recipe.units
    named = (
        units.candidates(decoder, index)
        if allocation is None
        else targets_of(decoder, recipe, allocation.blocks[index], index)
        for index in range(len(decoder.blocks))
    )
    return [(index, target.path) for index, targets in enumerate(named) for target in targets]


def check_batches(config: PretrainedConfig, batches: Iterable[Any]) -> list[Tensor]:
    """The batches as a list of token ids [batch, length]; InputError when the model cannot read one of them.

    One tensor [batch, length] is one batch.
    """
    checked: list[Tensor] = []
    alone = isinstance(batches, Tensor) and batches.ndim == 2
    for number, batch in enumerate([batches] if alone else batches):
        what = f"a {batch.dtype} of shape {list(batch.shape)}" if isinstance(batch, Tensor) else type(batch).__name__
        if not isinstance(batch, Tensor) or batch.ndim != 2 or batch.dtype not in (torch.int32, torch.int64):
            hint = ", here batch['input_ids']" if isinstance(batch, Mapping) and "input_ids" in batch else ""
            raise InputError(
                f"batch {number} is {what}: give tensors of token ids [batch, length], of whole numbers{hint}"
            )
        if not batch.numel():
            raise InputError(f"batch {number} is {what}, which holds no token: leave it out")
        least, most = int(batch.min()), int(batch.max())
        if least < 0 or most >= config.vocab_size:
            raise InputError(
                f"batch {number} holds the token {least if least < 0 else most}, but the model has embeddings for 0 to "
                f"{config.vocab_size - 1} only: use the model's own tokenizer"
            )
        positions = getattr(config, "max_position_embeddings", None)
        if positions is not None and batch.shape[1] > positions:
            raise InputError(
                f"batch {number} has sequences of {batch.shape[1]} tokens, longer than the {positions} positions of "
                "the model: cut them"
            )
        checked.append(batch)
    if not checked:
        raise InputError("there are no calibration batches: give at least one tensor of token ids [batch, length]")
    return checked
