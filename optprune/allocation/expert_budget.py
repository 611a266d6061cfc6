"""Allocator of one budget of experts for the whole model by the costs of their removal."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import DenseModel, Division, MeasuredBudget
from optprune.allocation.by_cost import Costs, rate_of
from optprune.allocation.knapsack import Curve, fill_budget, share_budget
from optprune.allocation.uniform import removed_by_experts
from optprune.calibration import Probe, Stream, advance, first_inputs
from optprune.calibration.calls import EVERY, catching, expert_choice, expert_choice_work
from optprune.calibration.divergence import probe_block_work, probe_end_work
from optprune.calibration.stream import forward_work
from optprune.errors import InputError
from optprune.measure.memory import release
from optprune.models import BlockAllocation, Decoder, Target, Units
from optprune.problems import ExpertChoice
from optprune.report import PhaseAdvanced
from optprune.report.phases import BUDGET
from optprune.solvers.experts import without
from optprune.system.wording import counted
from optprune.work import Work

UNLIKE_MIXTURES = (
    "the experts were divided by errors relative to each mixture's output, which do not compare between blocks: "
    "set allocation.probe_tokens to 512"
)
"""the note of a division without probes"""


@dataclass(frozen=True, eq=False)
class _Block:
    """Losses of a mixture with fewer experts."""

    number: int
    costs: dict[int, float]
    """the loss by the number of experts kept"""
    tried: int
    """the number of experts kept that the probe has tried"""


@final
@dataclass(frozen=True)
class ExpertBudget(MeasuredBudget):
    """Allocator that divides a budget over the blocks of a mixture so that the sum of their losses is least.

    The cost curve of a block is exact for the sets that a greedy elimination visits (`ExpertChoice`), on the dense
    model's hidden states: the squared change of the mixture's output. These costs are not in one unit from block to
    block, so a probe rescales them: experts of each block alone are removed, down to about the share that all keep, and
    the curve is rescaled to the divergence that this causes. With 0 `probe_tokens` each curve is a share of the squared
    output of the mixture.

    Costs a pass of the calibration tokens through all experts, k (E - least) evaluations of the cost of every block,
    and a pass of the probe's tokens from each block on.
    """

    units: Units
    sparsity: float
    least: float
    """the least share of its experts that a block keeps; it never keeps fewer than its router chooses"""
    probe_tokens: int

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.probes else (UNLIKE_MIXTURES,)

    def changes(self, targets: Sequence[Target]) -> int:
        return 1  # all experts of a block are removed together

    def check(self, decoder: Decoder) -> None:
        removed, least = removed_by_experts(decoder, self.units.least_experts(decoder)), self._fewest(decoder)
        if self.sparsity > removed[least]:
            raise InputError(
                f"a sparsity of {self.sparsity:g} is out of reach with units {self.units.name!r} and allocation.least "
                f"{self.least:g}: with {counted(least, 'expert')} in every block {removed[least]:.1%} of the linear "
                "weights are removed"
            )

    def along(self, dense: DenseModel, stream: Stream | None, probe: Probe | None = None) -> Division:
        decoder, on_event, mixture = dense.decoder, dense.on_event, dense.decoder.architecture.mixture
        assert mixture is not None
        stream = stream or first_inputs(decoder, dense.batches, dense.partial_sums)
        passing, end = self._works(decoder, sum(batch.numel() for batch in dense.batches))
        blocks, ends, found = len(decoder.blocks), passing.flops / (passing.flops + end.flops), list[_Block]()
        fewest, aim = self._fewest(decoder), self._aim(decoder)
        for index in range(blocks):
            on_event(PhaseAdvanced(BUDGET, "measuring the costs of experts", "block", index, blocks, ends=ends))
            with decoder.resident(index) as block:
                more = decoder.shape(index).experts > fewest
                with catching(block, [mixture.entry] if more else [], stream, EVERY) as calls:
                    advance(block, stream)
                if more:
                    problem = expert_choice(decoder, index, calls[mixture.entry], fewest)
                    order, costs = dense.statistics.experts(problem)
                    found.append(_curve(index, problem, costs, aim))
                    if probe is not None:
                        with decoder.only_experts(index, without(problem, order[: problem.experts - found[-1].tried])):
                            probe.try_as_is()
                    del problem
                del calls
            if probe is not None:
                probe.advance()
            release()
        if probe is not None:
            measured = Costs.divergences(probe, on_event, ends)
            found = [_rescaled(block, divergence) for block, divergence in zip(found, measured, strict=True)]
        return Division(self._allocation(decoder, found))

    def _allocation(self, decoder: Decoder, found: list[_Block]) -> Allocation:
        shapes, curves, counts = list(decoder.shapes()), dict[str, Curve](), dict[str, list[int]]()
        for block in found:
            shape = shapes[block.number]
            counts[str(block.number)] = kept = sorted(block.costs)
            weights = [decoder.weights_of(replace(shape, experts=count)) - decoder.weights_of(shape) for count in kept]
            losses = torch.tensor([block.costs[count] for count in kept], dtype=torch.float64)
            curves[str(block.number)] = Curve(torch.tensor(weights, dtype=torch.float64), losses)
        # Prices are negative: the weights that are saved.
        left = -self.sparsity * decoder.linear_weights()
        chosen = fill_budget(curves, share_budget(curves, left), left)
        for name, choice in chosen.items():
            shapes[int(name)] = replace(shapes[int(name)], experts=counts[name][choice])
        return Allocation.of(decoder, map(BlockAllocation, shapes))

    def step(self, shapes: Decoder) -> float:
        # At least the budget is removed, by whole experts.
        return max(
            shapes.weights_of(shape) - shapes.weights_of(replace(shape, experts=shape.experts - 1))
            for shape in shapes.shapes()
            if shape.experts
        )

    def _fewest(self, decoder: Decoder) -> int:
        most = max(shape.experts for shape in decoder.shapes())
        return max(self.units.least_experts(decoder), math.ceil(self.least * most))

    def _aim(self, decoder: Decoder) -> int:
        """Return the number of experts in every block that is closest to the budget, with at least one removed."""
        removed = removed_by_experts(decoder, self._fewest(decoder))
        return min(list(removed)[:-1], key=lambda count: abs(removed[count] - self.sparsity))

    def work(self, shapes: Decoder, tokens: int) -> Work:
        passing, end = self._works(shapes, tokens)
        return Work(passing.flops + end.flops, passing.bytes + end.bytes, passing.passes)

    def _works(self, shapes: Decoder, tokens: int) -> tuple[Work, Work]:
        """Return the work of all blocks, through all experts twice, and that of the divergences at the end."""
        blocks = len(shapes.blocks)
        passing = forward_work(shapes, tokens, 2.0)
        held = max(expert_choice_work(shapes, index, tokens).bytes for index in range(blocks))
        passing += Work(bytes=passing.bytes + held)
        along = sum(probe_block_work(shapes, index, self.probe_tokens, index + 1).flops for index in range(blocks))
        return passing + Work(along), probe_end_work(shapes, self.probe_tokens, blocks if self.probes else 0)


def _curve(number: int, problem: ExpertChoice, costs: list[float], aim: int) -> _Block:
    """Return the costs of a block by the number of experts kept, as shares of its squared output."""
    answered = problem.dense_energy()
    scale = 1 / answered if answered > 0 else 1.0
    by_count = {problem.experts - removed: scale * cost for removed, cost in enumerate(costs, start=1)}
    return _Block(number, {problem.experts: 0.0, **by_count}, min(max(aim, problem.keep), problem.experts - 1))


def _rescaled(block: _Block, measured: float) -> _Block:
    """Return the block with its costs rescaled to the divergence of a probe."""
    rate = rate_of(measured, block.costs[block.tried], False)
    return replace(block, costs={count: rate * cost for count, cost in block.costs.items()})
