"""Checks of a program: what its shapes rule out is refused before weights or text are read."""

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from optprune.allocation import Allocation, Depth
from optprune.errors import InputError, StrictError
from optprune.models import Decoder, ImageFeatures, reorderable
from optprune.moments import InputMoments
from optprune.objectives import OBJECTIVES
from optprune.patterns import ANYWHERE
from optprune.problems import GridLeastSquares, LayerLoss
from optprune.program.program import Program
from optprune.program.rounding import rounded_budget
from optprune.program.runtimes import RUNTIMES
from optprune.recipe import Recipe
from optprune.solvers.run import check_accepted
from optprune.system.wording import counted
from optprune.texts.token_batches import token_batches

Layers = list[tuple[int, str]]
"""layers as (block, path)"""


def check(program: Program) -> tuple[str, ...]:
    """Return notes on settings that do nothing for the model; InputError where it cannot be pruned so.

    NoSolver where the solver refuses the problems of the layers; StrictError where a strict recipe has a note.
    """
    decoder, method = program.decoder, program.method
    if not any(shape.kv_heads for shape in decoder.shapes()):
        raise InputError(
            f"no block of this {decoder.architecture.model_type} model has attention, which transformers needs to "
            "count the tokens of a cache: give a model with at least one such block"
        )
    part_of = decoder.architecture.part_of
    if part_of and program.request.recipe.vocabulary is not None:
        raise InputError(
            f"the tokens of a {part_of} model are known to its processor, so its vocabulary is not pruned: leave out "
            "--vocabulary"
        )
    if program.request.lengths and isinstance(program.allocator, Depth) and program.allocator.score == "perplexity":
        raise InputError(
            "the perplexity that chooses sub-blocks to remove is one of windows of text, and records have images: give "
            "a text, or --set allocation.score=influence"
        )
    _check_alike(program)
    for kind in program.units.kinds:
        kind.check_possible(decoder)
        metric = program.request.recipe.metric
        if kind.by_rows and (metric is None or metric.kind != "full"):
            raise InputError(
                f"units {kind.name} need a full output metric, by which rows make up for others: set metric to full"
            )
    program.allocator.check(decoder)
    if program.units.experts:
        refusal = method.expert_solver.refusal([shape.experts for shape in decoder.shapes()])
        if refusal is not None:
            raise InputError(refusal)
    pruned = [(index, target.path) for index, targets in enumerate(program.candidates()) for target in targets]
    family = program.units.family or ANYWHERE
    for index, path in pruned:
        inputs, multiple = decoder.layer(index, path).in_features, family.multiple
        if inputs % multiple:
            raise InputError(
                f"a {family.name} pattern needs a multiple of {multiple} inputs, not {inputs} as in "
                f"{decoder.name(index, path)}: choose another pattern"
            )
    notes = _check_grid(program) + _coordinates(program)
    notes += _idle_recovery(program, pruned) + _idle_order(program, pruned)
    notes += rounded_budget(program, program.known)
    if notes and method.strict:
        raise StrictError(f"{notes[0]} (strict mode makes this an error)")
    if method.solver is not None and method.objective in OBJECTIVES.values() and pruned:
        metric = program.metric
        widest = (metric and metric.width) or math.inf
        whole = any(decoder.layer(index, path).out_features <= widest for index, path in pruned)
        small = program.small_problem(coupled=metric is not None and metric.kind == "full" and whole)
        check_accepted(small.in_output_basis()[0], method.solver)
    return notes


def _check_grid(program: Program) -> tuple[str, ...]:
    """Return a note on layers whose rows are not whole blocks of the grid. NoSolver where the grid is not solved."""
    grid, solver = program.units.grid, program.method.grid_solver
    if grid is None or solver is None:
        return ()
    moments = InputMoments.from_samples(torch.eye(grid.block, dtype=torch.float64))
    check_accepted(GridLeastSquares(LayerLoss.of(moments.gram[:1], moments, 0.01), grid), solver)
    off = [(index, target.path) for index, every in enumerate(program.candidates()) for target in every]
    off = [(index, path) for index, path in off if program.decoder.layer(index, path).in_features % grid.block]
    if not off:
        return ()
    inputs, name = program.decoder.layer(*off[0]).in_features, program.decoder.name(*off[0])
    return (
        f"{counted(len(off), 'layer')} with rows that are not whole blocks of {grid.block} weights, such as {name} "
        f"with {inputs}, are not put on the grid",
    )


def check_parts(decoder: Decoder, recipe: Recipe, allocation: Allocation | None) -> None:
    """Raise InputError where sub-blocks go whole, and there are no classes for that, as under a draft."""
    emptied = allocation is not None and any(
        block.shape.parts != shape.parts for block, shape in zip(allocation.blocks, decoder.shapes(), strict=False)
    )
    architecture = decoder.architecture
    if architecture.pruned is None and (recipe.units.sub_blocks or emptied):
        raise InputError(
            f"no sub-block of a {architecture.model_type} model can be removed {architecture.alike}: prune units mlp "
            "or weights"
        )
    if architecture.ordered and (recipe.units.sub_blocks or emptied):
        raise InputError(
            f"no block of the language part of a {architecture.part_of} model can be removed, because "
            f"{architecture.ordered}: prune units mlp or weights"
        )


def _check_alike(program: Program) -> None:
    """Raise InputError where blocks may come to differ, and there are no classes for that, as under a draft."""
    decoder, recipe, allocation = program.decoder, program.request.recipe, program.allocation
    check_parts(decoder, recipe, allocation)
    alike = decoder.architecture.alike
    if not alike:
        return
    fitted, _ = RUNTIMES["transformers"].fitted(recipe, decoder, allocation)
    if fitted != recipe:
        raise InputError(
            f"blocks of a {decoder.architecture.model_type} model stay alike {alike.partition(',')[0]}, and the recipe "
            f"{recipe.name} lets them differ: give --target transformers or --allocation uniform"
        )


def _coordinates(program: Program) -> tuple[str, ...]:
    """Return a note where directions were asked for and coordinates are removed."""
    rotated = [any(kind.rotated for kind in units.kinds) for units in (program.units, program.request.recipe.units)]
    if rotated[0] == rotated[1]:
        return ()
    family = program.decoder.architecture.model_type
    return (f"value dimensions are removed as coordinates, because those of a {family} model have a factor each",)


def _idle_recovery(program: Program, pruned: Layers) -> tuple[str, ...]:
    """Return a note where recovery finds no sub-module whose output is affine in its layers one at a time."""
    decoder = program.decoder
    parts = [part for part, _ in decoder.architecture.recoverable]
    if program.method.recovery is None or program.units.experts:
        return ()
    if any(path.startswith(f"{part}.") for index, path in pruned for part in decoder.recoverable(index)):
        return ()
    family = decoder.architecture.model_type
    if not parts:
        return (f"recovery has nothing to refit: no sub-module of {family} is affine in a layer before its last one",)
    return (
        f"recovery has nothing to refit: of {family} it knows {', '.join(parts)} where a layer is pruned, and units "
        f"{program.units.name} prune none there",
    )


def _idle_order(program: Program, pruned: Layers) -> tuple[str, ...]:
    """Return a note where value dimensions should be permuted and cannot be."""
    decoder = program.decoder
    output, size = decoder.architecture.output, (program.units.family or ANYWHERE).multiple
    blocks = [index for index, path in pruned if path == output] if program.method.permuted else []
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


def check_batches(
    config: PretrainedConfig, batches: Iterable[Any], images: ImageFeatures | None = None
) -> list[Tensor]:
    """Return the batches as a list of token ids [batch, length]; InputError when the model cannot read one of them.

    Batches are as in `token_batches`. Token ids may be numbers of `images`.
    """
    checked = token_batches(batches)
    known = config.vocab_size + (0 if images is None else len(images.rows))
    positions = getattr(config, "max_position_embeddings", None)
    for number, batch in enumerate(checked):
        least, most = int(batch.min()), int(batch.max())
        if least < 0 or most >= known:
            raise InputError(
                f"batch {number} holds the token {least if least < 0 else most}, but the model has embeddings for 0 to "
                f"{known - 1} only: use the model's own tokenizer"
            )
        if positions is not None and batch.shape[1] > positions:
            raise InputError(
                f"batch {number} has sequences of {batch.shape[1]} tokens, longer than the {positions} positions of "
                "the model: cut them"
            )
    return checked
