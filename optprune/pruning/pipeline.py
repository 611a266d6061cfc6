"""The pipeline: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

import math
import platform
import time
from collections.abc import Callable, Iterable
from importlib.metadata import version

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.allocation import Allocation
from optprune.calibration import DenseStatistics, Path, calibrating, first_inputs, first_tokens, hold_out
from optprune.errors import InputError, StrictError
from optprune.measure.memory import release
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.models.store import BlockStore
from optprune.numerics.precision import full_precision
from optprune.pruning.block import BlockRecord, BlockTask, prune_block
from optprune.pruning.layer import summary
from optprune.pruning.preflight import check_batches, check_run
from optprune.pruning.targets import targets_of
from optprune.recipe import Recipe
from optprune.recipe.allocator import allocator_of
from optprune.report import BlockChange, Event, PhaseAdvanced, Report

MISSED = (
    "the budget is not met: {:.2%} of the decoder's linear weights are gone, not {:.2%}, since answers keep more than "
    "they may: an objective of your own finds the number in context.keep"
)
"""the note of a run whose problems do not hold the budget"""


@full_precision()
def prune(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe,
    *,
    allocation: Allocation | None = None,
    statistics: DenseStatistics | None = None,
    on_event: Callable[[Event], None] | None = None,
    source: str = "",
    calibration: str = "",
    store: BlockStore | None = None,
) -> Report:
    """Prune a transformers model in place, by a recipe, on batches of token ids [batch, length].

    All tokens count, so batches must hold no padding; one tensor [batch, length] is one batch. Raises an OptpruneError
    that says why when the model, the recipe or the batches do not fit; the model in memory may then be half pruned. An
    `allocation` says what every block keeps, in place of the recipe's sparsity. `statistics` are those of the dense
    model, where runs share them; without, this run measures its own. `source` and `calibration` name the model and
    the text in the report. A model that `open_model` gave comes with the `store` of its blocks, which are in memory one
    at a time; afterwards the store gives the pruned ones.
    """
    began = time.perf_counter()
    decoder, recipe, on_event = Decoder(model, store), recipe.settled(), on_event or (lambda event: None)
    if store is None and any(weight.is_meta for weight in model.parameters()):
        raise InputError("the model's weights are not in memory: hand over the store that came with it from open_model")
    batches = check_batches(model.config, batches)
    idle = check_run(decoder, recipe, allocation, model.dtype)
    weights_before, shapes = decoder.linear_weights(), decoder.shapes()
    allocator, statistics = allocator_of(recipe, allocation), statistics or DenseStatistics()
    fitted, held_out = hold_out(batches, recipe.held_out)
    metrics, notes = _metrics(decoder, batches, recipe, statistics, on_event)
    notes += idle + _heeded(recipe, allocator.warnings)
    with calibrating(decoder):
        division = allocator.divide(decoder, fitted, metrics, statistics, on_event)
        divided, notes = division.allocation, notes + _heeded(recipe, division.warnings) + division.notes
        path = recipe.policy.start(first_inputs(decoder, fitted))
        records = _prune_blocks(decoder, recipe, divided, path, metrics, held_out, on_event)
    layers = [layer for record in records for layer in record.layers]
    kept = decoder.linear_weights() - sum(record.zeros for record in records)
    reached = 1 - kept / weights_before
    if kept > sum(map(decoder.weights_of, (block.shape for block in divided.blocks))) - sum(one.due for one in records):
        notes += _heeded(recipe, (MISSED.format(reached, divided.sparsity),))
    blocks, left = tuple(map(BlockChange, shapes, decoder.shapes())), divided.with_shapes(decoder, weights_before)
    decoder.record_shapes()
    return Report(
        model=source or model.config.name_or_path or model.config.model_type,
        recipe=recipe.to_dict(),
        sparsity_requested=recipe.sparsity if allocation is None else divided.sparsity,
        sparsity_reached=reached,
        seconds=time.perf_counter() - began,
        floor_seconds=sum(record.floor_seconds for record in records),
        tokens=sum(batch.numel() for batch in fitted),
        seed=recipe.seed,
        versions=_versions(),
        layers=tuple(layers),
        notes=summary(layers) + notes,
        calibration=calibration,
        allocation=left.to_dict(),
        removed=division.removed,
        recovered=tuple(part for record in records for part in record.recovered),
        blocks=blocks,
    )


def _prune_blocks(
    decoder: Decoder,
    recipe: Recipe,
    allocation: Allocation,
    path: Path,
    metrics: Metrics,
    held_out: int,
    on_event: Callable[[Event], None],
) -> list[BlockRecord]:
    """Prune block after block; each is a task of its own, and nothing travels past the last that has one."""
    records, wanted = list[BlockRecord](), allocation.blocks
    last = max((index for index, kept in enumerate(wanted) if targets_of(decoder, recipe, kept, index)), default=-1)
    for index, kept in enumerate(wanted):
        names = [decoder.name(index, layer) for layer in decoder.architecture.layers]
        task = BlockTask(index, recipe, kept, path, metrics.taken(names), held_out, onwards=index < last)
        result = prune_block(decoder, task, on_event)
        path = result.path
        records.append(result.record)
        del task, result  # with the block's metrics, and weights that may be in memory for it alone
        release()
    return records


def _versions() -> dict[str, str]:
    return {
        "optprune": version("optprune"),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "python": platform.python_version(),
    }


def _metrics(
    decoder: Decoder,
    batches: list[Tensor],
    recipe: Recipe,
    statistics: DenseStatistics,
    on_event: Callable[[Event], None],
) -> tuple[Metrics, tuple[str, ...]]:
    """The output metrics that a recipe asks for, damped, and a note where they are less than it asks for."""
    if recipe.output_metric == "none":
        return Metrics({}), ()
    full = recipe.units.whole_metric(decoder.architecture) if recipe.output_metric == "full" else ()
    widest = recipe.metric_width or math.inf
    used = first_tokens(batches, recipe.metric_tokens)

    def on_group(done: int, total: int) -> None:
        on_event(PhaseAdvanced("measuring the output metric", "group", done, total))

    metrics = statistics.metrics(decoder, used, recipe.seed, full, widest, on_group)
    cut = [path for path in full if any(name.endswith(f".{path}") for name in metrics.diagonal_only())]
    note = f"of {', '.join(cut)} with over {widest} outputs (metric_width) only the diagonal of the metric is used"
    return metrics.damped(recipe.metric_damping), (note,) if cut else ()


def _heeded(recipe: Recipe, warnings: tuple[str, ...]) -> tuple[str, ...]:
    """The same warnings, as notes; StrictError where a strict recipe has one."""
    if warnings and recipe.strict:
        raise StrictError(f"{warnings[0]} (strict mode makes this an error)")
    return warnings
