"""One budget of experts for the whole model: how many of them each block keeps, by what their absence costs."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import final

import torch

from optprune.allocation.allocation import Allocation
from optprune.allocation.base import DenseModel, Division, MeasuredBudget
from optprune.allocation.cost_work import SLOW, predictions
from optprune.allocation.costs import Costs, rate_of
from optprune.allocation.knapsack import Curve, fill_budget, share_budget
from optprune.allocation.uniform import gone_by_experts
from optprune.calibration import Probe, Stream, advance, first_inputs
from optprune.calibration.calls import EVERY, catching
from optprune.calibration.expert_answers import expert_choice
from optprune.errors import InputError
from optprune.measure.memory import release
from optprune.models import BlockAllocation, Decoder, Experts, Target
from optprune.problems import ExpertChoice
from optprune.report import PhaseAdvanced
from optprune.report.phases import BUDGET
from optprune.solvers.experts import without
from optprune.system.wording import counted

UNLIKE_MIXTURES = (
    "the experts were divided by shares of what each mixture answers, which are not in one unit from block to block: "
    "set probe_tokens to 512"
)
"""the note of a division without probes"""


@dataclass(frozen=True, eq=False)
class _Block:
    """What a mixture loses with fewer experts."""

    number: int
    costs: dict[int, float]
    """what is lost, by how many are kept"""
    tried: int
    """the number kept that the probe has tried"""


@final
@dataclass(frozen=True)
class ExpertBudget(MeasuredBudget):
    """Divide a budget over the blocks of a mixture so that the sum of what their answers lose is least.

    The curve of a block is exact for the sets that a greedy elimination comes by (`ExpertChoice`), on the dense model's
    hidden states: the squared change of what its mixture answers. These are not in one unit from block to block, so
    that a probe puts them right: of each block alone experts are removed, down to about the share that all keep, and
    the curve is scaled to the divergence that this brings. With 0 `probe_tokens` each is taken as a share of what the
    mixture answers.

    Costs a pass of the calibration tokens through all experts, of every block k (E - least) evaluations of its cost,
    and a pass of the probe's tokens from each block on.
    """

    units: Experts
    sparsity: float
    least: float
    """the least share of its experts that a block keeps, and never fewer than its router chooses"""
    probe_tokens: int

    @property
    def warnings(self) -> tuple[str, ...]:
        return () if self.probes else (UNLIKE_MIXTURES,)

    def changes(self, targets: Sequence[Target]) -> int:
        return 1  # whatever layers a block has

    def check(self, decoder: Decoder) -> None:
        gone, least = gone_by_experts(decoder, self.units.least(decoder)), self._fewest(decoder)
        if self.sparsity > gone[least]:
            raise InputError(
                f"a sparsity of {self.sparsity:g} is out of reach with units {self.units.name!r} and least_kept "
                f"{self.least:g}: with {counted(least, 'expert')} in every block {gone[least]:.1%} of the linear "
                "weights are gone"
            )

    def along(self, dense: DenseModel, stream: Stream | None, probe: Probe | None = None) -> Division:
        decoder, on_event, mixture = dense.decoder, dense.on_event, dense.decoder.architecture.mixture
        assert mixture is not None
        stream = stream or first_inputs(decoder, dense.batches, dense.partial_sums)
        passes, ending = self._work(decoder, sum(batch.numel() for batch in dense.batches))
        blocks, ends, found = len(decoder.blocks), passes / (passes + ending), list[_Block]()
        fewest, aim = self._fewest(decoder), self._aim(decoder)
        for index in range(blocks):
            on_event(PhaseAdvanced(BUDGET, "measuring what experts cost", "block", index, blocks, ends=ends))
            with decoder.resident(index) as block:
                more = decoder.shape(index).experts > fewest
                with catching(block, [mixture.module] if more else [], stream, EVERY) as calls:
                    advance(block, stream)
                if more:
                    problem = expert_choice(decoder, index, calls[mixture.module], fewest)
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
            found = [_put_right(block, divergence) for block, divergence in zip(found, measured, strict=True)]
        return Division(self._allocation(decoder, found))

    def _allocation(self, decoder: Decoder, found: list[_Block]) -> Allocation:
        shapes, curves, counts = list(decoder.shapes()), dict[str, Curve](), dict[str, list[int]]()
        for block in found:
            shape = shapes[block.number]
            counts[str(block.number)] = kept = sorted(block.costs)
            weights = [decoder.weights_of(replace(shape, experts=count)) - decoder.weights_of(shape) for count in kept]
            losses = torch.tensor([block.costs[count] for count in kept], dtype=torch.float64)
            curves[str(block.number)] = Curve(torch.tensor(weights, dtype=torch.float64), losses)
        # Prices are below zero: the weights that are saved.
        left = -self.sparsity * decoder.linear_weights()
        chosen = fill_budget(curves, share_budget(curves, left), left)
        for name, choice in chosen.items():
            shapes[int(name)] = replace(shapes[int(name)], experts=counts[name][choice])
        return Allocation.of(decoder, map(BlockAllocation, shapes))

    def _fewest(self, decoder: Decoder) -> int:
        most = max(shape.experts for shape in decoder.shapes())
        return max(self.units.least(decoder), math.ceil(self.least * most))

    def _aim(self, decoder: Decoder) -> int:
        """The number of experts in every block that comes nearest to the budget, with one expert gone at least."""
        gone = gone_by_experts(decoder, self._fewest(decoder))
        return min(list(gone)[:-1], key=lambda count: abs(gone[count] - self.sparsity))

    def work(self, decoder: Decoder, tokens: int) -> float:
        return SLOW * sum(self._work(decoder, tokens))

    def _work(self, decoder: Decoder, tokens: int) -> tuple[float, float]:
        """That of the blocks, through all experts twice, and that of the probe's divergences at the end."""
        changes, weights = len(decoder.blocks), decoder.linear_weights()
        along = self.probe_tokens * changes * weights / 2
        return 2.0 * tokens * weights + along, predictions(decoder, self.probe_tokens, changes)


def _curve(number: int, problem: ExpertChoice, costs: list[float], aim: int) -> _Block:
    """The costs of a block by the number of experts kept, as shares of what it answers."""
    answered = problem.answered()
    scale = 1 / answered if answered > 0 else 1.0
    by_count = {problem.experts - gone: scale * cost for gone, cost in enumerate(costs, start=1)}
    return _Block(number, {problem.experts: 0.0, **by_count}, min(max(aim, problem.keep), problem.experts - 1))


def _put_right(block: _Block, measured: float) -> _Block:
    """The curve scaled to what a probe measured."""
    rate = rate_of(measured, block.costs[block.tried], False)
    return replace(block, costs={count: rate * cost for count, cost in block.costs.items()})
