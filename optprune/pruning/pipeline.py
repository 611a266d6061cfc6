"""Pruning a model block by block: collect moments, state each layer's problem, solve it, write the answer back."""

import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.allocation import Allocation
from optprune.calibration import DenseStatistics, Propagation, calibrating
from optprune.calibration.partial_sums import PartialSums
from optprune.errors import InputError, check_kind
from optprune.models import Decoder, ImageFeatures
from optprune.models.store import BlockStore
from optprune.numerics.precision import full_precision
from optprune.program import Program, Request, check_batches, resolve
from optprune.pruning.block import BlockRecord
from optprune.pruning.layer import summary
from optprune.pruning.run import Listener, begin, warn_or_raise
from optprune.pruning.workers import Layers, Processes, Serial, Workers
from optprune.recipe import Recipe
from optprune.recipe.recipe import recipe_with
from optprune.report import BlockChange, Event, PhaseRecorder, PhaseReport, Report
from optprune.report.phases import BUDGET, EARLIER, METRIC, PRUNING
from optprune.system.environment import started_by_torchrun, versions
from optprune.system.names import renamed_argument

if TYPE_CHECKING:
    from optprune.pruning.journal import Journal

BUDGET_MISSED = (
    "the budget is not met: {:.2%} of the decoder's linear weights are removed, not {:.2%}, because answers keep {} "
    "than the budget: keep the number in context.keep in a custom objective"
)
"""the note of a run whose answers keep more or less than the budget"""


@renamed_argument("lanes", "partial_sums")
@full_precision()
def prune(
    model: PreTrainedModel,
    batches: Iterable[Tensor | Mapping[str, Any]],
    recipe: str | Recipe = "fasp",
    *,
    allocation: Allocation | Any = None,
    statistics: DenseStatistics | None = None,
    on_event: Callable[[Event], None] | None = None,
    progress: bool = False,
    source: str = "",
    calibration: str = "",
    store: BlockStore | None = None,
    journal: "Journal | None" = None,
    workers: Workers | None = None,
    partial_sums: PartialSums | None = None,
    states: str = "auto",
    images: ImageFeatures | None = None,
    **fields: Any,
) -> Report:
    """Prune a transformers model in place, by a recipe, on batches of token ids [batch, length]; return the report.

    The recipe is a Recipe, a name or a YAML file, whose `fields` are replaced, as in `prune(model, batches, "fasp",
    sparsity=0.2)`; those of groups are given by `**{"metric.width": 64}`. Batches are tensors without padding, or
    mappings of `input_ids` and `attention_mask`, as a DataLoader gives; it is read once. Tokens that a mask leaves out
    do not count, and the others have the positions that they have without padding; without a mask all tokens count.
    One tensor [batch, length] or mapping is one batch. Raises an OptpruneError when the model, the recipe or the
    batches do not match; the model in memory may then be partly pruned.

    - An `Allocation` as `allocation` replaces the recipe's sparsity, and the report's recipe contains it; anything else
      is the recipe's field.
    - `statistics` of the dense model come from `collect` and are shared by several runs; without them this run measures
      its own.
    - `source` and `calibration` name the model and the text in the report.
    - `store` comes with a model from `open_model`: blocks are in memory one at a time, and pruned ones go to the store.
    - `journal` keeps every finished block on the disk, so that a stopped run can be resumed.
    - `workers` prune blocks in parallel if the policy makes them independent (dense, intra), or share the layers of a
      block; the weights do not depend on them.
    - `partial_sums` adds sums over batches in parts, which processes may share: each process calls this with the same
      arguments, except for the journal, which only the first one has.
    - `states` is where hidden states are kept between two blocks: device, host, disk (an unnamed file, in the journal's
      folder if there is one), or auto, the first of these with enough room.
    - `images` are the features of images that token ids are numbers of, as `DrawnRecords.read` returns both.
    - `on_event` receives the events of the run, and `progress` shows them on stderr with the time left.
    """
    check_kind("the model", model, torch.nn.Module, "give the model itself, e.g. load_model(...).model")
    recipe, allocation = settings_of(recipe, allocation, fields)
    began, decoder = time.perf_counter(), Decoder(model, store, images=images)
    every = check_batches(model.config, batches, images)
    request = Request(
        recipe=recipe,
        allocation=allocation,
        samples=sum(map(len, every)),
        seq_length=max(batch.shape[1] for batch in every),
        lengths=() if images is None else tuple(batch.numel() for batch in every),
        dtype=model.dtype,
        device=model.device.type,
        states=states,
        whole=store is None,
    )
    return run_program(
        resolve(decoder, request),
        decoder,
        every,
        began=began,
        statistics=statistics,
        on_event=on_event,
        progress=progress,
        source=source,
        calibration=calibration,
        journal=journal,
        workers=workers,
        partial_sums=partial_sums,
    )


def settings_of(recipe: str | Recipe, allocation: Any, fields: dict[str, Any]) -> tuple[Recipe, Allocation | None]:
    """Return the recipe with its fields, and the allocation that replaces its sparsity, if one is given.

    InputError unless the recipe is known and can be run on tokens without their text.
    """
    check_kind("the recipe", recipe, (str, Recipe), "give a name, or a Recipe, e.g. load_recipe('wanda')")
    if allocation is not None and not isinstance(allocation, Allocation):
        fields, allocation = fields | {"allocation": allocation}, None
    recipe = recipe_with(recipe, fields)
    if recipe.vocabulary is not None:
        raise InputError(
            "a recipe with a smaller vocabulary needs the text, not its tokens: call prune_vocabulary first, and then "
            "prune with vocabulary none, on tokens of the new tokenizer"
        )
    return recipe, allocation


@full_precision()
def run_program(
    program: Program,
    decoder: Decoder,
    batches: list[Tensor],
    *,
    began: float | None = None,
    statistics: DenseStatistics | None = None,
    on_event: Callable[[Event], None] | None = None,
    progress: bool = False,
    source: str = "",
    calibration: str = "",
    journal: "Journal | None" = None,
    workers: Workers | None = None,
    partial_sums: PartialSums | None = None,
    facts: dict[str, Any] | None = None,
) -> Report:
    """Prune a model in place by a program that was resolved for its shapes, and return the report.

    `batches` must be checked, and `facts` are those that the journal has begun with already; the rest is as in `prune`.
    The report counts the seconds from `began`, a perf_counter.
    """
    began, workers, partial_sums = began or time.perf_counter(), workers or Serial(), partial_sums or PartialSums()
    model, recipe = decoder.model, program.request.recipe
    earlier = 0.0 if journal is None else _earlier_seconds(journal, began)
    _check_workers(decoder, program, workers, partial_sums)
    weights_before, shapes = decoder.linear_weights(), decoder.shapes()
    parameters_before = sum(parameter.numel() for parameter in model.parameters())
    with event_display(progress, on_event, program, model.device) as listener:
        phases = PhaseRecorder(model.device, listener)
        run = begin(
            program,
            decoder,
            batches,
            phases=phases,
            executor=workers.executor,
            statistics=statistics,
            journal=journal,
            partial_sums=partial_sums,
            known_facts=facts,
        )
        with phases.phase(PRUNING), calibrating(run.decoder):
            workers.prune(run)
    divided, notes = run.division.allocation, run.notes
    recipe = recipe if program.allocation is None else recipe.with_given(divided)
    records = sorted(run.records, key=lambda record: record.index)
    layers = [layer for record in records for layer in record.layers]
    kept = decoder.linear_weights() - sum(record.zeros for record in records)
    reached = 1 - kept / weights_before
    wrong = _kept_wrongly(kept, records, sum(decoder.weights_of(block.shape) for block in divided.blocks))
    if wrong:
        notes += warn_or_raise(program.method.strict, (BUDGET_MISSED.format(reached, divided.sparsity, wrong),))
    blocks, left = tuple(map(BlockChange, shapes, decoder.shapes())), divided.with_shapes(decoder, weights_before)
    decoder.record_shapes()
    return Report(
        model=source or model.config.name_or_path or model.config.model_type,
        recipe=recipe.to_dict(),
        sparsity_requested=program.sparsity if program.allocation is None else divided.sparsity,
        sparsity_reached=reached,
        seconds=earlier + time.perf_counter() - began,
        floor_seconds=sum(record.floor_seconds for record in records),
        tokens=run.tokens,
        seed=program.seed,
        versions=versions(),
        layers=tuple(layers),
        notes=summary(layers) + notes,
        calibration=calibration,
        allocation=left.to_dict(),
        removed=run.division.removed,
        recovered=tuple(part for record in records for part in record.recovered),
        blocks=blocks,
        phases=(*([PhaseReport(EARLIER, earlier, None, None)] if earlier else []), *phases.done),
        goal=program.request.goal,
        parameters_before=parameters_before,
        own_code=program.request.recipe.own_code(),
        run_facts=run.facts,
    )


def _earlier_seconds(journal: "Journal", began: float) -> float:
    """Return the seconds that earlier processes of a run have taken, and start the clock of this one."""
    journal.start_clock(began)
    return journal.earlier_seconds


def _kept_wrongly(kept: int, records: list[BlockRecord], planned: int) -> str:
    """Return whether more or less is kept than of the `planned` weights of the shapes; an empty text for neither."""
    if kept > planned - sum(record.due for record in records):
        return "more"
    return "less" if kept < planned - sum(record.most_zeros for record in records) else ""


def workers_of(policy: Propagation, count: int | None = None, ray: str | None = None) -> Workers:
    """Return the workers of the options: `count` of them here, or those of a Ray cluster at an address.

    Here they are processes with a block each or, if blocks depend on each other, threads with a layer each. InputError
    where the blocks of the policy cannot be pruned this way.
    """
    if started_by_torchrun() and (count is not None or ray is not None):
        raise InputError("the processes of torchrun are already the workers: leave out --workers and --ray")
    several = Processes if policy.independent else Layers
    here = Serial() if count is None or count == 1 else several(count)
    if ray is None:
        workers = here
    else:
        from optprune.pruning.ray_workers import RayWorkers

        workers = RayWorkers(ray, count)
    workers.check(policy)
    return workers


@contextmanager
def event_display(
    progress: bool, listener: Listener | None, program: Program, device: torch.device
) -> Iterator[Listener]:
    """Yield the receiver of the events of a run: the listener, if any, and with `progress` a display too."""
    listener = listener or (lambda event: None)
    if not progress:
        yield listener
        return
    from optprune.program.time import expected_seconds
    from optprune.report.progress import Reporter

    expected = expected_seconds(program, 0, device)
    computing = {phase: expected[phase] for phase in (METRIC, BUDGET, PRUNING)}
    with Reporter().events(computing, left="left of pruning") as show:

        def on_event(event: Event) -> None:
            show(event)
            listener(event)

        yield on_event


def _check_workers(decoder: Decoder, program: Program, workers: Workers, partial_sums: PartialSums) -> None:
    """Raise InputError unless the weights are in memory or a store and the workers match the run."""
    if decoder.store is None and any(weight.is_meta for weight in decoder.model.parameters()):
        raise InputError("the model's weights are not in memory: pass the store that open_model returned with it")
    workers.check(program.policy)
    if partial_sums.peers.size > 1 and workers.several:
        raise InputError("the processes that share the partial sums are already the workers: leave out `workers`")
