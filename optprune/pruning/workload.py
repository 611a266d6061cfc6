"""A workload: what a run will be, as far as shapes, a recipe and the size of the calibration text say."""

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from optprune.allocation import Allocation, Allocator, DenseModel, Depth, MeasuredBudget
from optprune.allocation.weight_costs import MOST_COSTS
from optprune.calibration import Path as Track
from optprune.calibration import Stream
from optprune.calibration.calls import MOST_PRODUCTS
from optprune.models import BlockAllocation, Decoder, Experts, Target
from optprune.models.places import OnDevice, States
from optprune.pruning.preflight import small_problem
from optprune.pruning.targets import by_stage, targets_of
from optprune.recipe import Recipe
from optprune.recipe.allocator import allocator_of
from optprune.recipe.groups import Matching, Recovery
from optprune.solvers import choose
from optprune.solvers.greedy_obs import removal_curve_work
from optprune.solvers.removal import entry_costs_work
from optprune.solvers.value_basis import best_basis_work

TOKENS_PER_BATCH = 2048
"""about how many tokens a calibration batch has (texts/windows.py)"""
FIRST_FEW = 4
"""how many blocks are passed by for one that stands for the rest"""
AVERAGE = 4
"""the bytes of a number in averages over tokens, which are float32"""
MAX_SHARD = 5 * 10**9
"""the most bytes of a weights file, where nobody says it"""


@dataclass(frozen=True, eq=False)
class Workload:
    """A run before it is begun."""

    decoder: Decoder
    """the model, of which shapes are enough"""
    recipe: Recipe
    samples: int
    """the calibration sequences"""
    length: int
    """the tokens of a sequence"""
    dtype: torch.dtype
    """what is computed in"""
    device: str = "cpu"
    """cpu or cuda"""
    devices: int = 1
    """the GPUs that processes of this machine share"""
    workers: int = 1
    """how many prune blocks side by side"""
    layers: int = 1
    """how many layers of a block are solved at a time, where blocks depend on each other"""
    ray: bool = False
    """whether the workers are on other machines"""
    states: str = "auto"
    """where the hidden states between blocks are: auto or device (on the device), host, or disk"""
    allocation: Allocation | None = None
    """what every block keeps, where that is given"""
    whole: bool = False
    """whether the model is in memory as a whole, and not read block by block"""
    max_shard: int = MAX_SHARD
    """the most bytes of a weights file"""

    # -- the text

    @property
    def tokens(self) -> int:
        """The calibration tokens."""
        return self.samples * self.length

    @property
    def batch_tokens(self) -> int:
        """The tokens of the largest batch."""
        return min(self.tokens, max(1, TOKENS_PER_BATCH // self.length) * self.length)

    @property
    def batches(self) -> int:
        """The batches."""
        return -(-self.tokens // self.batch_tokens)

    def first_tokens(self, asked: int) -> int:
        """The tokens of the first whole sequences that hold as many as asked for, or of all."""
        return min(self.tokens, -(-asked // self.length) * self.length)

    def fitted_tokens(self, asked: Recovery | Matching) -> int:
        """The tokens that recovery or matching fits."""
        return self.tokens if asked.tokens is None else self.first_tokens(asked.tokens)

    # -- the model

    @property
    def itemsize(self) -> int:
        """The bytes of a number."""
        return self.dtype.itemsize

    @property
    def computed_itemsize(self) -> int:
        """The bytes of a number in what is computed: gradients, probes and recovery take float32 at least."""
        precise = self.recipe.precise(self.probe_tokens > 0)
        return max(self.itemsize, torch.float32.itemsize) if precise else self.itemsize

    @property
    def blocks(self) -> int:
        """The decoder blocks."""
        return len(self.decoder.blocks)

    @property
    def hidden(self) -> int:
        """The width of the hidden states."""
        return self.decoder.model.config.hidden_size

    @property
    def vocabulary(self) -> int:
        """The outputs of the head."""
        return self.decoder.model.config.vocab_size

    @cached_property
    def block_numbers(self) -> tuple[int, ...]:
        """The numbers in each block's parameters."""
        return tuple(sum(weight.numel() for weight in block.parameters()) for block in self.decoder.blocks)

    @cached_property
    def resident_numbers(self) -> int:
        """The numbers in all parameters outside the blocks, of which those that are tied count once."""
        return sum(weight.numel() for weight in self.decoder.model.parameters()) - sum(self.block_numbers)

    @property
    def block_bytes(self) -> int:
        """The largest block."""
        return max(self.block_numbers) * self.computed_itemsize

    @property
    def resident_bytes(self) -> int:
        """What is in memory in every phase: all but the blocks, or with them where the model is whole."""
        return (self.resident_numbers + (sum(self.block_numbers) if self.whole else 0)) * self.itemsize

    @cached_property
    def largest(self) -> int:
        """The block with the most to it; of several such one behind the first few, which are not like the rest."""
        return max(range(self.blocks), key=lambda index: (self.block_numbers[index], -abs(index - FIRST_FEW)))

    @property
    def stream_bytes(self) -> int:
        """The hidden states of all tokens between two blocks."""
        return self.tokens * self.hidden * self.computed_itemsize

    # -- the recipe

    @cached_property
    def _path(self) -> Track:
        return self.recipe.policy.start(Stream(States(OnDevice()), []))

    @property
    def two_paths(self) -> bool:
        """Whether the dense model's hidden states travel beside the pruned one's."""
        return self._path.dense is not self._path.actual

    @property
    def streams(self) -> int:
        """How many hidden states of all tokens the policy holds at once."""
        # Where blocks are independent, the next block's inputs are made while this one's are needed.
        return 1 + self.two_paths + (self.recipe.policy.independent and self.workers == 1)

    @property
    def keeps_original(self) -> bool:
        """Whether the dense block is kept beside the one that is pruned."""
        return self.recipe.policy.dense_target or self.two_paths or self.recipe.matching is not None

    @cached_property
    def wanted(self) -> BlockAllocation:
        """What the largest block keeps, or may keep where a budget is not divided yet."""
        if not self.divides:
            return self.allocator.divide(DenseModel(self.decoder, ())).allocation.blocks[self.largest]
        shape, kept = self.decoder.shape(self.largest), 1 - self.recipe.sparsity
        if self.recipe.units.family is not None:
            return BlockAllocation(shape, dict.fromkeys(self.decoder.paths(self.largest), kept))
        # Of kinds that compete for a sub-block one is narrowed.
        for kind in {kind.part: kind for kind in reversed(self.recipe.units.kinds)}.values():
            shape = kind.with_count(shape, max(1, round(kept * kind.there(shape))))
        return BlockAllocation(shape)

    @cached_property
    def targets(self) -> list[Target]:
        """The layers of the largest block that are pruned."""
        return targets_of(self.decoder, self.recipe, self.wanted, self.largest)

    @cached_property
    def stages(self) -> list[list[Target]]:
        """What is solved together, in the order of the forward pass."""
        groups = by_stage(self.decoder, self.targets)
        if self.recipe.policy.sequential or not groups:
            return groups
        return [[target for group in groups for target in group]]

    def taps(self, targets: list[Target]) -> dict[str, int]:
        """The layers at which the inputs of targets are seen, with their widths."""
        return {target.tap: self.decoder.layer(self.largest, target.tap).in_features for target in targets}

    @cached_property
    def allocator(self) -> Allocator:
        """What divides the budget."""
        return allocator_of(self.recipe, self.allocation)

    @property
    def divides(self) -> bool:
        """Whether a budget is divided by what is measured."""
        return isinstance(self.allocator, MeasuredBudget | Depth)

    @property
    def probe_changes(self) -> int:
        """How many changes of a block a division tries, each on the tokens of a probe."""
        if not isinstance(self.allocator, MeasuredBudget) or not self.allocator.probes:
            return 0
        return self.allocator.changes(self.recipe.units.candidates(self.decoder, self.largest))

    @property
    def probe_tokens(self) -> int:
        """The tokens that a division tries changes on."""
        allocator = self.allocator
        return self.first_tokens(allocator.probe_tokens) if isinstance(allocator, MeasuredBudget) else 0

    # -- what a layer takes

    @property
    def layers_at_once(self) -> int:
        """How many layers a device solves at a time."""
        return -(-self.layers // self.devices)

    def coupled(self, path: str) -> bool:
        """Whether a whole metric weighs the outputs of a layer, by its path in the largest block."""
        asked = self.recipe.metric
        if (
            asked is None
            or asked.kind != "full"
            or path not in self.recipe.units.whole_metric(self.decoder.architecture)
        ):
            return False
        return self.decoder.layer(self.largest, path).out_features <= (asked.width or math.inf)

    def layer_bytes(self, target: Target) -> int:
        """The workspace of a layer's solve, or of the search for its basis, with its metric."""
        layer, coupled = self.decoder.layer(self.largest, target.path), self.coupled(target.path)
        out, width = layer.out_features, layer.in_features
        solver = self.recipe.layer_solver or choose(small_problem(self.recipe, full=coupled))
        work = solver.work(out, width, coupled=coupled) + target.work(out, width)
        if target.rotated:
            work += best_basis_work(out, width)
        return round(work.bytes) + (AVERAGE * out**2 if coupled else 0)

    def spectra_bytes(self, stage: list[Target], target: Target) -> int:
        """What solvers have kept with the moments of other layers when a layer of a stage is solved."""
        solver = self.recipe.layer_solver or choose(small_problem(self.recipe, full=self.coupled(target.path)))
        before = stage[: stage.index(target)]
        return solver.keeps * sum(width**2 for tap, width in self.taps(before).items() if tap != target.tap)

    @property
    def expert_bytes(self) -> int:
        """The calls of a mixture, what all experts make of a batch, and the products that whole experts go by."""
        if not isinstance(self.recipe.units, Experts):
            return 0
        count = self.decoder.shape(self.largest).experts
        tokens = min(self.tokens, MOST_PRODUCTS // count**2)
        calls = 2 * self.stream_bytes
        answers = min(tokens, self.batch_tokens) * count * self.hidden * torch.float32.itemsize
        # Once more in float64, for the errors.
        return calls + answers + tokens * count**2 * (torch.float32.itemsize + torch.float64.itemsize)

    def cost_bytes(self, target: Target) -> int:
        """What it takes to find what a layer would lose, where a budget is divided by that."""
        layer = self.decoder.layer(self.largest, target.path)
        out, width = layer.out_features, layer.in_features
        coupled = self.coupled(target.path)
        measure = entry_costs_work if target.kind is None else removal_curve_work
        return round(measure(out, width, coupled=coupled).bytes) + (AVERAGE * out**2 if coupled else 0)

    @property
    def all_costs_bytes(self) -> int:
        """The costs of single weights that are held for the whole model, and the copies that are sorted."""
        weights = self.recipe.units.family is not None
        return 5 * 4 * min(MOST_COSTS, self.decoder.linear_weights()) if weights else 0

    @property
    def probe_bytes(self) -> int:
        """The hidden states of all changes that a division tries, which go along to the end of the model."""
        return self.probe_changes * self.blocks * self.probe_tokens * self.hidden * self.itemsize

    # -- the folder

    @property
    def pruned_bytes(self) -> int:
        """The blocks once they are pruned: weights that are zero are there, units that are removed are not."""
        kept = 1.0 if self.recipe.units.family is not None else 1 - self.recipe.sparsity
        return round(kept * sum(self.block_numbers)) * self.itemsize
