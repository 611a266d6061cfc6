"""The plan of a run with its times: memory from shapes, and seconds from a short probe of one block.

The probe runs the program's own code on one block and a few batches. Its time over the declared work of that block
(program/time.py) is the time of an operation, which is multiplied by the work of the whole run.
"""

import copy
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from optprune.allocation import Allocation, DenseModel, MeasuredBudget
from optprune.calibration import Probe, calibrating, first_inputs, first_tokens, hold_out
from optprune.calibration.fisher_pass import TOKENS_AT_ONCE, collect_metrics, head_gradient, next_tokens, sampled
from optprune.calibration.stream import Stream, advance, block_pass, head_work
from optprune.errors import InputError
from optprune.measure.memory import clock, free_memory, held_bytes
from optprune.metric import Metrics
from optprune.models import DTYPES, Decoder, has_weights, load_config, load_model, load_shapes, open_model
from optprune.models.skeleton import keep_block, one_block_model
from optprune.numerics.precision import full_precision
from optprune.objectives import OBJECTIVES
from optprune.program.method import Method, Request
from optprune.program.plan import Plan, planned_memory
from optprune.program.program import Program
from optprune.program.resolve import places_of, resolve
from optprune.program.time import (
    Rates,
    Surroundings,
    block_metric,
    block_passes,
    block_refinement,
    block_solves,
    expected_seconds,
    operations_per_second,
    seconds_of,
)
from optprune.pruning.block import BlockTask, prune_block
from optprune.recipe import Recipe
from optprune.solvers import FaspMetric, Magnitude
from optprune.system.wording import amount
from optprune.work import Work

MOST_TOKENS, MOST_LOGITS = 128, 2**23
"""the most tokens, and the most logits of all of them, with which the head is timed"""
SHARE = 0.1
"""the most of a run's expected time that its probe takes"""
GUESSED = ("solves", "refinement", "metric", "budget")
"""the kinds of work whose rates are not measured where that would take too long"""
TOKENS_OVER_WIDTH = 1.25
"""the tokens of a probe over the inputs of the widest layer, so that its Gram matrix has full rank as in a run"""


class Steps:
    """The measurements of a probe: how many are done, and the time that is left for the others."""

    TOTAL = 5

    def __init__(
        self, on_step: Callable[[int, int], None] = lambda done, total: None, seconds: float = math.inf
    ) -> None:
        """Start the time; `on_step` is called with the number of measurements that are done, and with that of all."""
        self._on_step, self._done, self._ends = on_step, 0, time.perf_counter() + seconds
        on_step(0, self.TOTAL)

    def done(self) -> None:
        """Count one more measurement."""
        self._done += 1
        self._on_step(self._done, self.TOTAL)

    def has_time(self, seconds: float) -> bool:
        """Return whether so many seconds are left."""
        return time.perf_counter() + seconds <= self._ends


@dataclass(frozen=True)
class Measuring:
    """The text and the place with which the times of a plan are measured."""

    tokens: Tensor | None = None
    """the first tokens of the calibration text, in one row; without them, random tokens are used"""
    tokenising: float = 0.0
    """the seconds that tokenising the whole text takes"""
    starting: float | None = None
    """the seconds that the command takes to start; None measures a fresh process"""
    place: Path | None = None
    """a folder on the disk of the output; None uses the folder of temporary files"""


def plan(
    source: str | Path,
    recipe: Recipe,
    *,
    samples: int = 128,
    seq_length: int = 2048,
    device: str = "auto",
    dtype: str = "auto",
    allocation: Allocation | None = None,
    workers: int = 1,
    measuring: Measuring | None = Measuring(),
) -> Plan:
    """Return the memory and the time that the command `prune` takes for a model source and a recipe.

    Memory is computed from shapes, so that a folder with config.json is enough. Times come from a probe of one block
    with its own weights, or with random ones if the folder has none. With `measuring=None` there are no times, and the
    device need not exist. InputError where the model cannot be pruned so, or the probe needs far too much memory.
    """
    source = str(source)
    shapes = load_shapes(source, load_config(source))
    request = Request(
        recipe=recipe,
        allocation=allocation,
        samples=samples,
        seq_length=seq_length,
        workers=workers,
        **places_of(source, shapes, device, dtype),
    )
    program = resolve(shapes, request)
    return timed(program, source, measuring) if measuring is not None else planned_memory(program)


def timed(
    program: Program,
    source: str,
    measuring: Measuring,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Plan:
    """Return the plan with times, measured on this machine in about the time of one block.

    What would take more than a tenth of the run is not measured: the plan names what is guessed. `on_step` is called
    with the number of measurements that are done, and with that of all.
    """
    base, count = held_bytes(), probe_batches(program)
    _check_probe_fits(program, count, base)
    limit = SHARE * sum(expected_seconds(program, 0, torch.device(program.request.device)).values())
    steps, around = Steps(on_step, limit), Surroundings.assumed()
    if steps.has_time(around.start + around.draw):
        around = Surroundings.measured(measuring.place)
    steps.done()
    decoder, opening = _opened(program, source)
    steps.done()
    index = program.largest if len(decoder.blocks) == program.block_count else 0
    batches = _batches(program, measuring.tokens, count)
    rates, guessed = BlockProbe(program, decoder, batches, index).rates_within(steps)
    starting = around.start if measuring.starting is None else measuring.starting
    seconds = seconds_of(program, rates, around, opening=opening, tokenising=measuring.tokenising, starting=starting)
    plan = planned_memory(program, base, around.fresh)
    return Plan.of([replace(phase, seconds=seconds[phase.name]) for phase in plan.phases], guessed)


def probe_batches(program: Program) -> int:
    """Return the number of batches, from the first, that a probe uses."""
    widest = max(program.taps(program.example.targets).values(), default=program.hidden)
    sequences = -(-TOKENS_OVER_WIDTH * widest // program.batch_tokens)
    return min(program.batches, max(2, int(sequences)))


def _check_probe_fits(program: Program, batches: int, base: int) -> None:
    """Raise InputError where one block and a few batches take far more memory than is free, by shapes."""
    free, request = free_memory(), program.request
    samples = min(request.samples, batches * (program.batch_tokens // program.length))
    fewer = replace(request, samples=samples, generated=0, lengths=request.lengths[:samples], workers=1)
    small = replace(program, request=fewer)
    phases = planned_memory(small, base, 0).phases
    needed = next(phase.host_bytes for phase in phases if phase.name == "pruning") - base
    if free is not None and needed > free:
        raise InputError(
            f"measuring one block takes {amount(needed)} of memory, and {amount(free)} are free: use --no-probe to "
            "plan the memory without times"
        )


def _opened(program: Program, source: str) -> tuple[Decoder, float]:
    """Return the model, or one random block of its shape if there is only a config, and the seconds of opening it."""
    request = program.request
    dtype = {known: name for name, known in DTYPES.items()}.get(request.dtype, "auto")
    began = time.perf_counter()
    if has_weights(source):
        open_it = load_model if request.whole else open_model
        decoder = open_it(source, dtype=dtype, device=request.device).decoder()
    else:
        config, device = program.decoder.model.config, torch.device(request.device)
        decoder = Decoder(one_block_model(config, request.dtype, device, program.largest))
    return decoder, time.perf_counter() - began


def _batches(program: Program, tokens: Tensor | None, count: int) -> list[Tensor]:
    """Return batches of the size of the run's."""
    rows = program.batch_tokens // program.length
    needed = min(count * rows, program.request.samples)
    if tokens is None or len(tokens) < needed * program.length:
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(0, program.vocabulary, (needed * program.length,), generator=generator)
    return list(tokens[: needed * program.length].view(needed, program.length).split(rows))


class BlockProbe:
    """The block of a model that stands for all, with its inputs from the first calibration tokens."""

    def __init__(self, program: Program, decoder: Decoder, batches: Sequence[Tensor], index: int) -> None:
        """Copy the block with a number, and compute its inputs; the model is unchanged.

        `batches` are some of the calibration's.
        """
        self.program, self.decoder, self.index = program, decoder, index
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
        """the inputs of the block, by batch"""

    def rates(self) -> Rates:
        """Return the seconds per operation of each kind of work, each timed once after a warm-up."""
        return self.rates_within(Steps())[0]

    @full_precision()
    def rates_within(self, steps: Steps) -> tuple[Rates, tuple[str, ...]]:
        """Return the seconds per operation of each kind of work, and the kinds that are guessed for want of time.

        Guessed work is as much slower than a large matrix product as the passes are.
        """
        program, index = self.program, self.program.largest
        with calibrating(self.decoder):
            tokens, few = self.tokens, max(1, len(self.batches) // 2)
            cheap = _cheap(program)
            self.prune(cheap, Metrics({}), few)
            first, whole = (self.prune(cheap, Metrics({}), count) for count in (few, len(self.batches)))
            some = sum(batch.numel() for batch in self.batches[:few])
            passes = max(0.0, whole.passes - first.passes) / (tokens - some) if tokens > some else 0.0
            passes = passes or whole.passes / tokens
            fixed, rate = max(0.0, whole.passes - passes * tokens), _rate(passes, block_passes(program, index))
            steps.done()
            slow = max(rate, 1 / operations_per_second(self.device))
            if not steps.has_time(slow * self.work_of_rest().flops):
                kinds = dict.fromkeys(GUESSED, slow)
                return Rates(passes=rate, head=slow, fixed=fixed, read=self.read, **kinds), GUESSED
            metrics, metric, metric_head = self.metric()
            steps.done()
            full = self.prune(program.method, metrics, len(self.batches))
            refinement = full.recovery + max(0.0, full.passes - whole.passes) if full.recovery else 0.0
            # The probe refines on all of its tokens, the run on those of the settings.
            recovery = program.method.recovery
            fitted = tokens if recovery is None else program.fitted_tokens(recovery)
            found = Rates(
                passes=rate,
                head=_rate(
                    metric_head / 3 if program.metric is not None else self.head(), head_work(program.decoder, 1)
                ),
                solves=_rate(full.solves, block_solves(program, index, tokens)),
                refinement=_rate(refinement * fitted / tokens, block_refinement(program, index)),
                metric=_rate(metric, block_metric(program, index)),
                budget=self.budget(metrics),
                fixed=fixed,
                read=self.read,
            )
            steps.done()
            return found, ()

    def work_of_rest(self) -> Work:
        """Return the declared work of all that is measured after the passes."""
        program, index = self.program, self.program.largest
        metric = block_metric(program, index) * min(self.tokens, 4 * TOKENS_AT_ONCE)
        solves = block_solves(program, index, self.tokens) + block_refinement(program, index)
        budget = program.allocator.work(program.decoder, self.tokens) * (1 / program.block_count)
        return block_passes(program, index) * self.tokens + metric + solves + budget

    def prune(self, method: Method, metrics: Metrics, count: int) -> "Times":
        """Return the times of pruning the block on the first `count` batches."""
        decoder, ids = self.alone(), self.batches[:count]
        # The first half of a few long sequences may be one, of which nothing can be held out.
        fitted, held_out = hold_out(ids, self.program.held_out if sum(map(len, ids)) > 1 else 0.0)
        stream = self.entering(fitted)
        block = replace(self.program, decoder=decoder, method=method).block(0, self.program.wanted)
        path = self.program.policy.start(stream)
        task = BlockTask(block=block, method=method, path=path, metrics=metrics, held_out=held_out)
        began = clock(self.device)
        result = prune_block(decoder, task, lambda event: None)
        total = clock(self.device) - began
        solves = sum(layer.seconds for layer in result.record.layers)
        recovery = sum(part.seconds for part in result.record.recovered)
        return Times(total - solves - recovery, solves, recovery)

    def entering(self, batches: Sequence[Tensor]) -> Stream:
        """Return the inputs of the block from these batches, which are some of the probe's, split again."""
        sizes = [len(batch) for batch in batches]
        hidden = torch.cat(list(self.hidden))[: sum(sizes)].split(sizes)
        return Stream(
            self.hidden.with_values(hidden),
            [[blocks[self.index]] for blocks in first_inputs(self.decoder, batches).others],
        )

    def alone(self) -> Decoder:
        """Return a model of a copy of the block alone, with the embeddings and the head of the whole model."""
        decoder, model = self.decoder, self.decoder.model
        inside = {id(weight) for weight in decoder.blocks.parameters()}
        shared: dict[int, object] = {id(weight): weight for weight in model.parameters() if id(weight) not in inside}
        shared[id(decoder.blocks)] = nn.ModuleList([copy.deepcopy(self.block)])
        shared[id(decoder.blocks)].train(False)  # type: ignore[attr-defined]
        one = copy.deepcopy(model, shared)
        blocks = len(decoder.blocks)
        keep_block(one.config, self.index)
        for path, dim in decoder.architecture.per_block.items():
            if path in dict(one.named_modules()):
                module = one.get_submodule(path)
                module.weight = nn.Parameter(module.get_parameter("weight").chunk(blocks, dim)[self.index])
        alone = Decoder(one)
        return alone.precise() if self.program.computed_itemsize > self.program.itemsize else alone

    def metric(self) -> tuple[Metrics, float, float]:
        """Return the block's output metrics, and the seconds of a token for them in the block and in the head."""
        setting = self.program.metric
        if setting is None:
            return Metrics({}), 0.0, 0.0
        one, widest = self.alone(), setting.width or math.inf
        full = self.program.whole_metric
        used = first_tokens(self.batches, 4 * TOKENS_AT_ONCE)
        small = [used[0][:1]]

        def measured(ids: list[Tensor]) -> tuple[Metrics, float]:
            began = clock(self.device)
            found = collect_metrics(one, ids, sampled(0), full=full, widest=widest, clip=setting.clip)
            return found, clock(self.device) - began

        measured(small)
        metrics, seconds = measured(used)
        hidden = first_inputs(one, used[:1]).hidden[0]
        began = clock(self.device)
        head_gradient(one, hidden, sampled(0), next_tokens(used[0].to(self.device)))
        head = (clock(self.device) - began) / used[0].numel()
        each = seconds / sum(batch.numel() for batch in used)
        # A backward pass is at least as slow as a forward pass, whatever the noise of the difference.
        return metrics.damped(setting.damping), max(self.forward(), each - head), min(head, each)

    def budget(self, metrics: Metrics) -> float:
        """Return the seconds per operation that the allocator takes to measure the costs of the block."""
        allocator = self.program.allocator
        if not isinstance(allocator, MeasuredBudget):
            return _rate(self.forward(), block_pass(self.program.decoder, self.program.largest))
        one = self.alone()
        probe = Probe(one, first_tokens(self.batches, allocator.probe_tokens)) if allocator.probes else None
        began = clock(self.device)
        allocator.along(DenseModel(one, self.batches, metrics), self.entering(self.batches), probe)
        return _rate(clock(self.device) - began, allocator.work(one, self.tokens))

    @property
    def tokens(self) -> int:
        """The number of tokens of the probe."""
        return sum(batch.numel() for batch in self.batches)

    def forward(self) -> float:
        """Return the seconds of a token through the block."""
        one, stream = self.alone(), self.entering(self.batches)
        return _timed(self.device, lambda: advance(one.blocks[0], stream)) / self.tokens

    def head(self) -> float:
        """Return the seconds of a token through the head."""
        hidden = self.hidden[0].flatten(0, -2)[: max(1, min(MOST_TOKENS, MOST_LOGITS // self.program.vocabulary))]
        self.decoder.logits(hidden)
        return _timed(self.device, lambda: self.decoder.logits(hidden).log_softmax(-1)) / len(hidden)


@dataclass(frozen=True)
class Times:
    """The seconds of pruning a block."""

    passes: float
    solves: float
    recovery: float


def _rate(seconds: float, work: Work) -> float:
    """Return the seconds of an operation; 0 where no work is declared."""
    return seconds / work.flops if work.flops else 0.0


def _cheap(program: Program) -> Method:
    """Return a method with the same passes, whose solves take almost no time."""
    solver = FaspMetric() if program.units.kinds else Magnitude()
    objective = OBJECTIVES[program.units.objective]
    return replace(program.method, solver=solver, objective=objective, dampings=(), recovery=None)


def _timed(device: torch.device, run: Callable[[], object]) -> float:
    began = clock(device)
    run()
    return clock(device) - began
