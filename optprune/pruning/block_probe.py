"""A probe: the recipe's own code on one block and a few batches, timed, from which the time of a run is scaled."""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.allocation import DenseModel, MeasuredBudget
from optprune.calibration import Probe, calibrating, first_inputs, first_tokens, hold_out
from optprune.calibration.fisher_pass import TOKENS_AT_ONCE, collect_metrics, head_gradient, next_tokens, sampled
from optprune.calibration.moments_pass import collect
from optprune.calibration.stream import Stream, advance
from optprune.measure.clock import clock
from optprune.metric import Metrics
from optprune.models import Decoder
from optprune.models.registry import SHAPES_FIELD
from optprune.numerics.precision import full_precision
from optprune.pruning.block import BlockTask, prune_block
from optprune.pruning.workload import Workload
from optprune.recipe import Recipe
from optprune.solvers import FaspMetric, Magnitude

TOKENS_OVER_WIDTH = 1.25
"""the tokens of a probe over the widest layer's inputs: with fewer its Gram matrix would be one of no run"""


@dataclass(frozen=True)
class Pace:
    """How long the parts of a run take, in seconds, by one block."""

    forward: float
    """a token through the block"""
    head: float
    """a token through the head"""
    passes: float
    """a token through all that a policy does with the block"""
    fixed: float
    """what those passes take beside, however many tokens there are"""
    solves: float
    """all solves of the block"""
    recovery: float
    """a token through the recovery of sub-modules"""
    metric: float
    """a token forward and backward through the block, for an output metric"""
    metric_head: float
    """a token through the head and back"""
    costs: float
    """what the block would lose, beside the passes of its tokens"""
    costs_passes: float
    """a token through the pass that finds that"""
    read: float
    """a block read"""


class BlockProbe:
    """The block of a model that stands for the rest, with what enters it from the first calibration tokens."""

    def __init__(self, work: Workload, decoder: Decoder, batches: Sequence[Tensor], index: int) -> None:
        """The block with a number, of a model with its weights, which stay as they are.

        `batches` are some of the calibration's.
        """
        self.work, self.decoder, self.index = work, decoder, index
        self.device = decoder.model.device
        self.batches = list(batches)
        with calibrating(decoder):
            stream = first_inputs(decoder, self.batches)
            for before in range(index):
                with decoder.resident(before) as block:
                    advance(block, stream)
        began = time.perf_counter()
        with decoder.resident(index) as block:
            self.read = time.perf_counter() - began
            self.block = copy.deepcopy(block)
        self.hidden = stream.hidden
        """what enters the block, by batch"""

    @full_precision()
    def pace(self) -> Pace:
        """Time everything once, after what libraries do at their first use."""
        with calibrating(self.decoder):
            tokens = sum(batch.numel() for batch in self.batches)
            few = max(1, len(self.batches) // 2)
            cheap = _cheap(self.work.recipe)
            self.prune(cheap, Metrics({}), few)
            first, whole = (self.prune(cheap, Metrics({}), count) for count in (few, len(self.batches)))
            some = sum(batch.numel() for batch in self.batches[:few])
            passes = max(0.0, whole.passes - first.passes) / (tokens - some) if tokens > some else 0.0
            passes = passes or whole.passes / tokens
            metrics, metric, metric_head = self.metric()
            full = self.prune(self.work.recipe, metrics, len(self.batches))
            costs, costs_passes = self.costs(metrics)
            return Pace(
                forward=self.forward(),
                head=self.head(),
                passes=passes,
                fixed=max(0.0, whole.passes - passes * tokens),
                solves=full.solves,
                recovery=(full.recovery + max(0.0, full.passes - whole.passes)) / tokens if full.recovery else 0.0,
                metric=metric,
                metric_head=metric_head,
                costs=costs,
                costs_passes=costs_passes,
                read=self.read,
            )

    def prune(self, recipe: Recipe, metrics: Metrics, count: int) -> "Times":
        """The times of pruning the block on so many batches."""
        decoder, ids = self.alone(), self.batches[:count]
        fitted, held_out = hold_out(ids, 0.0 if recipe.refit is None else recipe.refit.held_out)
        stream = self.entering(fitted)
        task = BlockTask(0, recipe, self.work.wanted, recipe.policy.start(stream), metrics, held_out)
        began = clock(self.device)
        result = prune_block(decoder, task, lambda event: None)
        total = clock(self.device) - began
        solves = sum(layer.seconds for layer in result.record.layers)
        recovery = sum(part.seconds for part in result.record.recovered)
        return Times(total - solves - recovery, solves, recovery)

    def entering(self, batches: Sequence[Tensor]) -> Stream:
        """What enters the block from these batches, which are some of the probe's, cut anew."""
        sizes = [len(batch) for batch in batches]
        hidden = torch.cat(list(self.hidden))[: sum(sizes)].split(sizes)
        return Stream(
            self.hidden.with_values(hidden),
            [[blocks[self.index]] for blocks in first_inputs(self.decoder, batches).others],
        )

    def alone(self) -> Decoder:
        """A model of the block alone: a copy of it, with the embeddings and the head of the whole model."""
        decoder, model = self.decoder, self.decoder.model
        inside = {id(weight) for weight in decoder.blocks.parameters()}
        shared: dict[int, object] = {id(weight): weight for weight in model.parameters() if id(weight) not in inside}
        shared[id(decoder.blocks)] = nn.ModuleList([copy.deepcopy(self.block)])
        shared[id(decoder.blocks)].train(False)  # type: ignore[attr-defined]
        one = copy.deepcopy(model, shared)
        one.config.num_hidden_layers = 1
        for field in (*decoder.architecture.by_block, SHAPES_FIELD):
            every = getattr(one.config, field, None)
            if every:
                setattr(one.config, field, [every[self.index]])
        alone = Decoder(one)
        return alone.precise() if self.work.computed_itemsize > self.work.itemsize else alone

    def metric(self) -> tuple[Metrics, float, float]:
        """The block's output metrics, the seconds of a token for them in the block, and in the head."""
        asked, work = self.work.recipe.metric, self.work
        if asked is None:
            return Metrics({}), 0.0, 0.0
        one, widest = self.alone(), asked.width or math.inf
        full = work.recipe.units.whole_metric(one.architecture) if asked.kind == "full" else ()
        used = first_tokens(self.batches, 4 * TOKENS_AT_ONCE)
        small = [used[0][:1]]

        def measured(ids: list[Tensor]) -> tuple[Metrics, float]:
            began = clock(self.device)
            found = collect_metrics(one, ids, sampled(0), full=full, widest=widest)
            return found, clock(self.device) - began

        measured(small)
        metrics, seconds = measured(used)
        hidden = first_inputs(one, used[:1]).hidden[0]
        began = clock(self.device)
        head_gradient(one, hidden, sampled(0), next_tokens(used[0].to(self.device)))
        head = (clock(self.device) - began) / used[0].numel()
        each = seconds / sum(batch.numel() for batch in used)
        # A pass back is no faster than one forward, whatever the clock says of two that differ little.
        return metrics.damped(asked.damping), max(self.forward(), each - head), min(head, each)

    def costs(self, metrics: Metrics) -> tuple[float, float]:
        """The seconds of what the block would lose, and of a token in the pass for that."""
        allocator = self.work.allocator
        if not isinstance(allocator, MeasuredBudget):
            return 0.0, 0.0
        one = self.alone()
        candidates = allocator.units.candidates(one, 0)
        stream = self.entering(self.batches)
        began = clock(self.device)
        collect(one.blocks[0], stream, list({target.tap for target in candidates}), output=stream.copy())
        passes = clock(self.device) - began
        probe = Probe(one, first_tokens(self.batches, allocator.probe_tokens)) if allocator.probes else None
        began = clock(self.device)
        allocator.along(DenseModel(one, self.batches, metrics), self.entering(self.batches), probe)
        costs = clock(self.device) - began - passes
        return max(0.0, costs), passes / self.tokens

    @property
    def tokens(self) -> int:
        """The tokens of the probe."""
        return sum(batch.numel() for batch in self.batches)

    def forward(self) -> float:
        """The seconds of a token through the block."""
        one, stream = self.alone(), self.entering(self.batches)
        return _timed(self.device, lambda: advance(one.blocks[0], stream)) / self.tokens

    def head(self) -> float:
        """The seconds of a token through the head."""
        hidden = self.hidden[0].flatten(0, -2)[:128]
        self.decoder.logits(hidden)
        return _timed(self.device, lambda: self.decoder.logits(hidden).log_softmax(-1)) / len(hidden)


@dataclass(frozen=True)
class Times:
    """The seconds of pruning a block."""

    passes: float
    solves: float
    recovery: float


def probe_batches(work: Workload) -> int:
    """How many batches a probe takes, of the first ones."""
    widest = max(work.taps(work.targets).values(), default=work.hidden)
    sequences = -(-TOKENS_OVER_WIDTH * widest // work.batch_tokens)
    return min(work.batches, max(2, int(sequences)))


def _cheap(recipe: Recipe) -> Recipe:
    """A recipe of the same passes, with solves that take next to nothing."""
    solver = FaspMetric() if recipe.units.kinds else Magnitude()
    refit = (
        None
        if recipe.refit is None
        else recipe.refit.model_copy(update={"dampings": (), "recovery": None, "matching": None})
    )
    return recipe.model_copy(update={"solver": solver, "refit": refit, "objective": None})


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    began = clock(device)
    run()
    return clock(device) - began
