"""The pipeline: block by block, collect moments, state each layer's problem, solve it, write the answer back."""

import copy
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune.allocation import Allocation, uniform
from optprune.errors import InputError, NumericalError, StrictError
from optprune.metric import OutputMetric
from optprune.models import Decoder, LinkedLayers
from optprune.models.calibrate import Collected, Stream, advance, calibrating, collect, first_inputs
from optprune.models.decoder import write
from optprune.models.fisher import collect_metrics, sampled
from optprune.moments import InputMoments
from optprune.objectives import LayerContext
from optprune.patterns import NM, Pattern, RowWise, Unstructured
from optprune.problems import LayerLoss, LinkedLeastSquares, Problem
from optprune.recipe import Recipe, n_of_m
from optprune.report import BlockFinished, BlockStarted, Event, LayerReport, LayerSolved, Report
from optprune.solvers import Solution, Status, solve


@dataclass(frozen=True)
class Target:
    """A layer to prune in every block, and the place in the forward pass where its input is seen."""

    path: str
    tap: str
    """the first layer that reads the same input: layers of one stage share one set of moments"""
    units: Callable[[int], LinkedLayers] | None
    """the linked layers of a block, where units are pruned"""


def prune(
    model: PreTrainedModel,
    batches: Iterable[Tensor],
    recipe: Recipe,
    *,
    on_event: Callable[[Event], None] | None = None,
    source: str = "",
    calibration: str = "",
) -> Report:
    """Prune a transformers model in place, by a recipe, on batches of token ids [batch, length].

    All tokens count, so batches must hold no padding. Raises an OptpruneError that says why when the model, the
    recipe or the batches do not fit; the model in memory may then be half pruned. `source` and `calibration`
    name the model and the text in the report.
    """
    began = time.perf_counter()
    decoder = Decoder(model)
    allocation = uniform(decoder, recipe.sparsity, recipe.units, recipe.width_multiple)
    run = _Run(decoder, recipe, allocation, on_event or (lambda event: None))
    weights_before = decoder.linear_weights()
    batches = list(batches)
    run.metrics = _metrics(decoder, batches, recipe)
    with calibrating(decoder):
        stream = first_inputs(decoder, batches)
        run.start(stream)
        for block in range(len(decoder.blocks)):
            run.prune_block(block)
    decoder.record_shapes()
    return Report(
        model=source or model.config.name_or_path or model.config.model_type,
        recipe=recipe.to_dict(),
        sparsity_requested=recipe.sparsity,
        sparsity_reached=1 - (decoder.linear_weights() - run.zeros) / weights_before,
        seconds=time.perf_counter() - began,
        floor_seconds=run.floor_seconds,
        tokens=sum(hidden.shape[:-1].numel() for hidden in run.actual.hidden),
        seed=recipe.seed,
        versions={
            "optprune": version("optprune"),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "python": platform.python_version(),
        },
        layers=tuple(run.layers),
        notes=_summary(run.layers),
        calibration=calibration,
    )


class _Run:
    """The state of a run between two blocks: the streams that enter the next block, and what was done so far."""

    def __init__(
        self, decoder: Decoder, recipe: Recipe, allocation: Allocation, on_event: Callable[[Event], None]
    ) -> None:
        self.decoder, self.recipe, self.allocation, self.on_event = decoder, recipe, allocation, on_event
        self.targets = _targets(decoder, recipe.units)
        self.layers: list[LayerReport] = []
        self.floor_seconds = 0.0
        self.zeros = 0
        """weights set to zero in layers that kept their shape"""
        self.metrics: dict[str, OutputMetric] = {}
        """of the dense model, by the layer's full name; empty where outputs count alike"""

    def start(self, stream: Stream) -> None:
        """Begin with the inputs of the first block."""
        self.actual = stream
        """what the current block will really get"""
        two_paths = self.recipe.propagation.pruned_prefix and self.recipe.propagation.dense_target
        self.dense = stream.copy() if two_paths else stream
        """what the current block gets in the dense model; the same stream where the policy follows only one path"""
        self.held_out = round(self.recipe.held_out * len(stream.hidden))
        if self.recipe.held_out and not 0 < self.held_out < len(stream.hidden):
            raise InputError(
                f"held_out {self.recipe.held_out:g} of {len(stream.hidden)} calibration batches leaves none on one "
                "side: give more samples"
            )

    def prune_block(self, index: int) -> None:
        """Calibrate, solve and write one block, then move the streams past it."""
        began = time.perf_counter()
        policy, blocks = self.recipe.propagation, len(self.decoder.blocks)
        block = self.decoder.blocks[index]
        self.on_event(BlockStarted(index, blocks))
        original = copy.deepcopy(block) if policy.dense_target else block
        groups = _by_stage(self.decoder, self.targets) if policy.sequential else [self.targets]
        upcoming: Stream | None = None
        for position, group in enumerate(groups):
            first = position == 0
            reference = (original, self.dense) if policy.dense_target and (policy.pruned_prefix or not first) else None
            if first and not policy.pruned_prefix:
                # The block is still dense, so this pass also gives the next block's inputs.
                upcoming = self.actual.copy()
            collected = collect(
                block,
                self.actual,
                sorted({target.tap for target in group}, key=self.decoder.architecture.layers.index),
                reference=reference,
                held_out=self.held_out,
                output=upcoming if first else None,
            )
            if first:
                self.floor_seconds += collected.seconds + (collected.forward_seconds if upcoming is not None else 0)
            for target in group:
                self._prune_layer(index, target, collected)
        if upcoming is not None:
            self.actual.hidden = upcoming.hidden
        else:
            before = time.perf_counter()
            advance(block, self.actual)
            self.floor_seconds += time.perf_counter() - before
            if self.dense is not self.actual:
                advance(original, self.dense)
        self.on_event(BlockFinished(index, blocks, time.perf_counter() - began))

    def _prune_layer(self, index: int, target: Target, collected: Collected) -> None:
        began = time.perf_counter()
        recipe, layer = self.recipe, self.decoder.layer(index, target.path)
        units = None if target.units is None else target.units(index)
        moments = collected.moments[target.tap]
        name = self.decoder.name(index, target.path)
        metric = self.metrics.get(name)
        loss = LayerLoss.of(layer.weight, moments, recipe.damping, fit_bias=layer.bias is not None, metric=metric)
        context = LayerContext(
            name,
            index,
            loss,
            self._keep(layer, target),
            None if units is None else units.link,
            self._pattern(layer) if units is None else None,
        )
        problem = recipe.objective(context)
        solution = solve(problem, recipe.solver)
        _check(solution, name)
        value = solution.value.to(layer.weight.dtype)
        bias = None if layer.bias is None else layer.bias + problem.loss.bias_change(value.to(loss.weight))
        write(layer, value, bias)
        if isinstance(problem, LinkedLeastSquares) and units is not None:
            choice = problem.support(solution.value)
            self.decoder.keep_units(index, units, choice)
            kept, total = int(choice.sum()), choice.numel()
        else:
            kept, total = int((value != 0).sum()), value.numel()
            self.zeros += total - kept
        held_out = collected.held_out.get(target.tap)
        report = _layer_report(name, problem, solution, value, held_out, recipe, kept, total, began)
        if recipe.strict and report.notes:
            raise StrictError(f"{name}: {report.notes[0]} (strict mode makes this an error)")
        self.layers.append(report)
        self.on_event(LayerSolved(report))

    def _keep(self, layer: nn.Linear, target: Target) -> int:
        if target.units is None:
            return round(self.allocation.weights * layer.weight.numel())
        if target.path == self.decoder.architecture.mlp_consumer:
            return self.allocation.mlp_units
        return self.allocation.value_dim * self.decoder.heads.kv

    def _pattern(self, layer: nn.Linear) -> Pattern:
        kept = n_of_m(self.recipe.pattern)
        if kept is not None:
            return NM(*kept)
        if self.recipe.pattern == "rows":
            return RowWise(round(self.allocation.weights * layer.in_features))
        return Unstructured(round(self.allocation.weights * layer.weight.numel()))


def _targets(decoder: Decoder, units: str) -> list[Target]:
    """The layers a recipe prunes in every block, in the order of the forward pass."""
    architecture = decoder.architecture
    stages = architecture.stages
    if units == "weights":
        return [Target(path, stage[0], None) for stage in stages for path in stage]
    targets = []
    if units in ("vo", "all"):
        targets.append(Target(architecture.output, architecture.output, decoder.value_units))
    if units in ("mlp", "all"):
        targets.append(Target(architecture.mlp_consumer, architecture.mlp_consumer, decoder.mlp_units))
    return targets


def _metrics(decoder: Decoder, batches: list[Tensor], recipe: Recipe) -> dict[str, OutputMetric]:
    """The output metrics that a recipe asks for, damped."""
    if recipe.output_metric == "none":
        return {}
    tokens, used = 0, []
    for batch in batches:
        if tokens < recipe.metric_tokens:
            used.append(batch)
            tokens += batch.numel()
    full = decoder.architecture.layers if recipe.output_metric == "full" else ()
    found = collect_metrics(decoder, used, sampled(recipe.seed), full=full)
    return {name: metric.damped(recipe.metric_damping) for name, metric in found.items()}


def _by_stage(decoder: Decoder, targets: list[Target]) -> list[list[Target]]:
    stages = range(len(decoder.architecture.stages))
    groups = [[target for target in targets if decoder.architecture.stage_of(target.path) == stage] for stage in stages]
    return [group for group in groups if group]


def _check(solution: Solution, name: str) -> None:
    if solution.status is Status.NONFINITE or not bool(torch.isfinite(solution.value).all()):
        raise NumericalError(f"{name}: {Status.NONFINITE.value}")
    if solution.violation > 0:
        raise NumericalError(f"{name}: the solver's answer breaks the pattern by {solution.violation:g}")


def _layer_report(
    name: str,
    problem: Problem,
    solution: Solution,
    written: Tensor,
    held_out: InputMoments | None,
    recipe: Recipe,
    kept: int,
    total: int,
    began: float,
) -> LayerReport:
    loss = problem.loss
    written = written.to(loss.weight)
    dead = int(loss.moments.dead.sum())
    notes = list(solution.notes)
    if dead:
        notes.append(f"{dead} inputs were zero on every calibration token")
    if loss.moments.tokens < loss.moments.width:
        notes.append(f"fewer calibration tokens ({loss.moments.tokens}) than inputs ({loss.moments.width})")
    elsewhere = None
    if held_out is not None:
        elsewhere = LayerLoss.of(loss.weight, held_out, fit_bias=loss.fit_bias).relative_error(written)
    return LayerReport(
        name=name,
        kind=problem.kind,
        solver=recipe.solver.label if recipe.solver else "chosen by the problem",
        relative_error=loss.relative_error(written),
        held_out_error=elsewhere,
        status=solution.status.name.lower(),
        objective=solution.objective,
        lower_bound=None if solution.certificate is None else solution.certificate.lower_bound,
        gap=solution.gap,
        damping=float(loss.damping.mean()),
        tokens=loss.moments.tokens,
        seconds=time.perf_counter() - began,
        kept=kept,
        units=total,
        dead_inputs=dead,
        notes=tuple(notes),
    )


def _summary(layers: list[LayerReport]) -> tuple[str, ...]:
    """One sentence for each kind of note, with the number of layers it concerns."""
    count: dict[str, int] = {}
    for layer in layers:
        for note in layer.notes:
            kind = "".join("N" if character.isdigit() else character for character in note)
            count[kind] = count.get(kind, 0) + 1
    examples = {
        "".join("N" if character.isdigit() else character for character in note): note
        for layer in reversed(layers)
        for note in layer.notes
    }
    return tuple(f"{number} layers: {examples[kind]}" for kind, number in count.items())
