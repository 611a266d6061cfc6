"""Collecting the statistics of the dense model that several runs share."""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from torch import Tensor
from transformers import PreTrainedModel

from optprune.allocation import ByCost, DenseModel
from optprune.calibration import DensePass, KnownMoments, Statistics, calibrating, first_inputs, hold_out
from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.statistics_cache import Source
from optprune.errors import InputError
from optprune.measure.memory import release
from optprune.models import UNITS, Decoder, ImageFeatures
from optprune.models.store import BlockStore
from optprune.numerics.precision import full_precision
from optprune.program import Program, Request, check_batches, resolve
from optprune.pruning.run import place_for, undamped_metrics
from optprune.recipe import Recipe
from optprune.recipe.recipe import recipe_with
from optprune.report import Event, PhaseAdvanced
from optprune.report.phases import BUDGET
from optprune.system.names import renamed_argument


@renamed_argument("lanes", "partial_sums")
@full_precision()
def collect(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    *,
    recipes: Sequence[str | Recipe] | None = None,
    store: BlockStore | None = None,
    folder: str | Path | None = None,
    partial_sums: PartialSums | None = None,
    states: str = "auto",
    images: ImageFeatures | None = None,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Statistics:
    """Measure once the statistics that runs on this model and these batches of token ids [batch, length] share.

    `prune(model, batches, recipe, statistics=...)` on a copy of the model then gives the same weights bit for bit, in
    less time. With `recipes`, each a Recipe, a name or a YAML file, the statistics are the output metric, the costs by
    which a budget is divided, and the moments of the layers' inputs: for all blocks if the policy makes them
    independent (dense; the first stage of intra) or a budget is divided, otherwise for the first block. Without recipes
    they are the moments of all layers of all blocks. A run measures and adds whatever else it needs. Statistics record
    the model, its dtype, the tokens, the partial sums, the versions and the machine; used with any other they raise an
    InputError that names the difference. They are kept in memory, with 4 in^2 bytes for each distinct input of a layer
    and as much again for solvers, or in a `folder`, whose files are written whole or not at all, and which a later call
    continues. Token ids may be numbers of `images`.
    """
    if isinstance(recipes, str | Recipe):
        raise InputError('the recipes are one recipe, not a list: give them as in recipes=["wanda"]')
    chosen = None if recipes is None else [recipe_with(recipe, {}) for recipe in recipes]
    decoder, partial_sums = Decoder(model, store, images=images), partial_sums or PartialSums()
    if partial_sums.peers.size > 1:
        raise InputError("statistics are collected in one process: collect them before starting torchrun")
    every = check_batches(model.config, batches, images)
    decoder.states = place_for(states, decoder, every, None)
    statistics = Statistics(Source.of(decoder, every, partial_sums), folder)
    needs = _Needs(decoder, every, statistics, partial_sums)
    programs = [resolve(decoder, Request(recipe=recipe)) for recipe in chosen or ()]
    for program in programs:
        needs.add(program)
    if chosen is None:
        needs.add_everything()
    for program in programs:
        if program.metric is not None:
            undamped_metrics(program, needs.access(program), every, statistics, on_event, partial_sums)
    with calibrating(decoder):
        needs.measure(on_event)
        for program in _of_any_sparsity(programs):
            needs.measure_costs(program, on_event)
    statistics.seconds_saved = 0.0
    return statistics


def _of_any_sparsity(programs: Sequence[Program]) -> list[Program]:
    """Return one of all programs whose recipes differ only in sparsity, which no cost depends on."""
    fields = [program.request.recipe.to_dict() | {"sparsity": 0} for program in programs]
    return list({json.dumps(key): program for key, program in zip(fields, programs, strict=True)}.values())


@dataclass(eq=False)
class _WantedMoments:
    """The layers whose moments are wanted on some batches, by block."""

    decoder: Decoder
    batches: list[Tensor]
    held_out: int
    known: KnownMoments
    taps: dict[int, set[str]] = field(default_factory=dict)


class _Needs:
    """The statistics of the dense model that recipes need."""

    def __init__(
        self, decoder: Decoder, every: list[Tensor], statistics: Statistics, partial_sums: PartialSums
    ) -> None:
        self.decoder, self.every, self.statistics, self.partial_sums = decoder, every, statistics, partial_sums
        self._wanted: dict[tuple[object, ...], _WantedMoments] = {}

    def access(self, program: Program) -> Decoder:
        """Return the model in the dtype in which a run of a program computes."""
        return self.decoder.precise() if program.precise else self.decoder

    def add(self, program: Program) -> None:
        """Add the moments that a run of a program takes from the cache."""
        decoder, policy = self.access(program), program.policy
        fitted, held_out = hold_out(self.every, program.held_out)
        blocks = range(len(decoder.blocks))
        taps = {index: [target.tap for target in program.units.candidates(decoder, index)] for index in blocks}
        if isinstance(program.allocator, ByCost):
            self._want(decoder, fitted, 0, taps)
        if program.method.recovery is not None and not policy.dense_target:
            return  # the pass that collects them also calls the sub-modules
        first = {index: own for index, own in taps.items() if index == 0 or policy.independent}
        if policy.sequential:
            stage = decoder.architecture.stage_of
            first = {index: [tap for tap in own if stage(tap) == min(map(stage, own))] for index, own in first.items()}
        self._want(decoder, fitted, held_out, first)

    def add_everything(self) -> None:
        """Add the moments of all layers of all blocks."""
        blocks, decoder = range(len(self.decoder.blocks)), self.decoder
        taps = {index: [target.tap for target in UNITS["weights"].candidates(decoder, index)] for index in blocks}
        self._want(decoder, self.every, 0, taps)

    def _want(self, decoder: Decoder, batches: list[Tensor], held_out: int, taps: dict[int, list[str]]) -> None:
        known = self.statistics.known(decoder, batches, held_out, self.partial_sums)
        assert known is not None
        wanted = self._wanted.setdefault(known.scope, _WantedMoments(decoder, batches, held_out, known))
        for index, own in taps.items():
            wanted.taps.setdefault(index, set()).update(own)

    def measure(self, on_event: Callable[[Event], None]) -> None:
        """Measure all wanted moments that are not known, in one pass through the blocks for each number held out."""
        for number, wanted in enumerate(self._wanted.values()):
            decoder, order = wanted.decoder, wanted.decoder.architecture.layers.index
            taps = [sorted(wanted.taps[index], key=order) for index in sorted(wanted.taps) if wanted.taps[index]]
            entering = partial(first_inputs, decoder, wanted.batches, self.partial_sums)
            dense_pass = DensePass(decoder, entering, wanted.known, taps, wanted.held_out)
            if dense_pass.stream is None:
                continue
            label = f"measuring the dense model's moments, {number + 1} of {len(self._wanted)}"
            for index in range(len(taps)):
                on_event(PhaseAdvanced(BUDGET, label, "block", index, len(taps)))
                with decoder.resident(index):
                    dense_pass.visit(index)
                release()

    def measure_costs(self, program: Program, on_event: Callable[[Event], None]) -> None:
        """Measure the costs by which a program divides its budget, without probes."""
        allocator = program.allocator
        if not isinstance(allocator, ByCost):
            return
        decoder, metrics = self.access(program), {}
        fitted, _ = hold_out(self.every, program.held_out)
        if program.metric is not None:
            metrics = undamped_metrics(program, decoder, self.every, self.statistics, on_event, self.partial_sums)
            metrics = metrics.damped(program.metric.damping)
        dense = DenseModel(decoder, fitted, metrics, self.statistics, on_event, self.partial_sums)
        replace(allocator, probe_tokens=0).gathered(dense)
