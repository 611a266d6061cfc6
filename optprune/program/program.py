"""Program of a run, resolved once from the request, the model's shapes and the sizes of the data.

Preflight, plan, progress, executors, journal and report read it; nothing of it is decided again.
"""

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch

from optprune.allocation import Allocation, Allocator, DenseModel, Depth, MeasuredBudget
from optprune.allocation.weight_costs import MOST_COSTS
from optprune.calibration import Path as Track
from optprune.calibration import Propagation, Stream
from optprune.calibration.calls import expert_choice_work
from optprune.calibration.stream import TOKENS_PER_BATCH, head_work, stream_width
from optprune.metric import OutputMetric
from optprune.models import BlockAllocation, Decoder, Target, Units
from optprune.models.places import OnDevice, States
from optprune.moments import InputMoments
from optprune.objectives import LayerContext, stated
from optprune.patterns import ANYWHERE
from optprune.problems import Channels, LayerLoss, Problem
from optprune.program.method import BlockProgram, Method, Request
from optprune.recipe.groups import FisherMetric, Recovery
from optprune.solvers import AnySolver, choose
from optprune.solvers.greedy_obs import removal_curve_work
from optprune.solvers.inverse import entry_costs_work
from optprune.solvers.value_basis import best_basis_work
from optprune.system.wording import counted
from optprune.work import Work, product, sweeps

FIRST_FEW = 4
"""first blocks that are skipped when one block represents all"""
AVERAGE = 4
"""bytes of a number in averages over tokens, which are float32"""
RECEIVING = 1 / 6
"""the share of the tokens that receive the probability of removed ones: 0.14 to 0.16 of those of SmolLM2"""
STATES = 1.15
"""the number of states that a smaller vocabulary is fitted to, over the tokens of their text"""
VOCABULARY_PASSES, VOCABULARY_TOKENS = 3, 1024
"""the passes of that text through the model, and the tokens of a batch"""
VOCABULARY_SWEEPS, LOGITS = 50, 6
"""the operations on the logits of each token of it, and the copies of a batch's logits that are in memory at once"""


@dataclass(frozen=True, eq=False)
class Program:
    """A run before it begins."""

    request: Request
    """the request, with the resolved recipe and the given allocation"""
    decoder: Decoder
    """the model, of which only shapes are read"""
    allocator: Allocator
    """the allocator that divides the budget over the blocks"""
    units: Units
    policy: Propagation
    method: Method
    sparsity: float
    seed: int
    metric: FisherMetric | None = None
    """the settings of the metric that weighs output errors"""
    held_out: float = 0.0
    """share of the calibration sequences that is held out"""
    notes: tuple[str, ...] = ()
    """settings of the recipe that do nothing for this model"""

    @property
    def allocation(self) -> Allocation | None:
        """Allocation that was given, if any."""
        return self.request.allocation

    @property
    def idle(self) -> bool:
        """Whether the run leaves the model as it is."""
        return not self.sparsity and self.allocation is None and self.method.grid_solver is None

    def facts(self) -> dict[str, Any]:
        """Return what the request decides of a run's bytes, before a model is read."""
        recipe, allocation, goal = self.request.recipe.to_dict(), self.allocation, self.request.goal
        own_code = self.request.recipe.own_code()
        return {
            **({"the user's own code": own_code} if own_code else {}),
            **({} if goal is None else {"the goal": asdict(goal)}),
            **({} if self.request.text is None else {"the text of the vocabulary": self.request.text}),
            **({} if self.request.tokenizer is None else {"the tokenizer": self.request.tokenizer}),
            "the number of generated windows": self.request.generated,
            # The summary is text about the other fields.
            "the recipe": {name: value for name, value in recipe.items() if name != "summary"},
            "the allocation": None if allocation is None else allocation.to_dict(),
        }

    def to_dict(self) -> dict[str, Any]:
        """Return the program as plain data, with the expected stages where the budget is not divided yet."""
        return {
            **self.facts(),
            "policy": self.policy.name,
            "allocator": type(self.allocator).__name__,
            "computes in": "float32" if self.precise else str(self.request.dtype).removeprefix("torch."),
            "notes": list(self.notes),
            "blocks": [self.block(index, self.expected(index)).to_dict() for index in range(self.block_count)],
        }

    def blocks(self, allocation: Allocation) -> tuple[BlockProgram, ...]:
        """Return the stages of every block, once it is known what the blocks keep."""
        return tuple(self.block(index, wanted) for index, wanted in enumerate(allocation.blocks))

    def block(self, index: int, wanted: BlockAllocation) -> BlockProgram:
        """Return the stages of one block."""
        method = self.method
        return BlockProgram.of(
            self.decoder, index, wanted, units=self.units, policy=self.policy, recovery=method.recovery
        )

    def candidates(self) -> list[list[Target]]:
        """Return the layers of every block that may be pruned, or that the given allocation prunes."""
        blocks, allocation = range(self.block_count), self.allocation
        if allocation is None:
            return [self.units.candidates(self.decoder, index) for index in blocks]
        return [self.block(index, allocation.blocks[index]).targets for index in blocks]

    @property
    def precise(self) -> bool:
        """Whether the run computes in float32 at least.

        Gradients, and small differences of nearly equal numbers, have too few digits in half precision.
        """
        return self.metric is not None or self.method.moves_weights_later or self.allocator.probes

    def solver(self, coupled: bool, shape: tuple[int, int]) -> AnySolver:
        """Return the solver of layers of a shape, chosen by the problem where the recipe leaves it open.

        `coupled` is whether a whole metric weighs the outputs.
        """
        return self.method.solver or choose(self.small_problem(coupled), shape)

    def small_problem(self, coupled: bool) -> Problem:
        """Return a problem as the layers have it, with four outputs; `coupled` is whether its metric is a whole one."""
        family = self.units.family
        inputs = 2 * math.lcm(4, (family or ANYWHERE).multiple)
        weight = torch.ones(4, inputs, dtype=torch.float64, device="cpu")
        metric = None if self.metric is None else OutputMetric.from_samples(torch.eye(4).to(weight), full=coupled)
        moments = InputMoments.from_samples(torch.eye(inputs).to(weight))
        loss = LayerLoss.of(weight, moments, self.method.damping, metric=metric)
        if family is None:
            context = LayerContext("", 0, loss, inputs // 2, Channels.of(inputs))
        else:
            context = LayerContext("", 0, loss, weight.numel() // 2, None, family.of(4, inputs, 0.5))
        return stated(self.method.objective, context)

    # -- the text

    @property
    def length(self) -> int:
        """The tokens of a sequence, of the longest where they differ."""
        return max(self.request.lengths, default=self.request.seq_length)

    @property
    def tokens(self) -> int:
        """The calibration tokens."""
        return sum(self.request.lengths) or (self.request.samples + self.request.generated) * self.length

    @property
    def batch_tokens(self) -> int:
        """The tokens of the largest batch."""
        largest = min(self.tokens, max(1, TOKENS_PER_BATCH // self.length) * self.length)
        return max(self.request.lengths, default=largest)

    @property
    def batches(self) -> int:
        """The batches."""
        return len(self.request.lengths) or -(-self.tokens // self.batch_tokens)

    def first_tokens(self, asked: int) -> int:
        """Return the number of tokens of the first whole sequences that hold `asked` tokens, or of all sequences."""
        if self.request.lengths:
            sums = accumulate(self.request.lengths)
            return next((held for held in sums if held >= asked), self.tokens)
        return min(self.tokens, -(-asked // self.length) * self.length)

    def fitted_tokens(self, asked: Recovery) -> int:
        """Return the number of tokens that recovery fits."""
        return self.tokens if asked.tokens is None else self.first_tokens(asked.tokens)

    # -- the model

    @property
    def itemsize(self) -> int:
        """The bytes of a number."""
        return self.request.dtype.itemsize

    @property
    def computed_itemsize(self) -> int:
        """The bytes of a number in what is computed: gradients, probes and recovery take float32 at least."""
        return max(self.itemsize, torch.float32.itemsize) if self.precise else self.itemsize

    @property
    def block_count(self) -> int:
        """The number of decoder blocks."""
        return len(self.decoder.blocks)

    @property
    def hidden(self) -> int:
        """The width of the hidden states."""
        return self.decoder.model.config.hidden_size

    @property
    def widest(self) -> int:
        """The inputs of the widest layer that may be pruned; the width of the hidden states where none may."""
        every = [(index, target.path) for index, targets in enumerate(self.candidates()) for target in targets]
        return max((self.decoder.layer(*one).in_features for one in every), default=self.hidden)

    @cached_property
    def stream_width(self) -> int:
        """The numbers of a token that go from a block to the next."""
        return stream_width(self.decoder)

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
        """Bytes that stay in memory in every phase: all weights outside the blocks, or all weights of a whole model."""
        return (self.resident_numbers + (sum(self.block_numbers) if self.request.whole else 0)) * self.itemsize

    @property
    def vision_bytes(self) -> int:
        """Bytes of the vision part and of the embeddings while records with images are read; 0 where there are none."""
        return self.request.around + self.resident_numbers * self.itemsize if self.request.lengths else 0

    @cached_property
    def largest(self) -> int:
        """Index of the block with the most parameters among those with layers or experts that the recipe prunes.

        Of equal ones it is one after the first few, which often differ.
        """
        having = [
            index
            for index, shape in enumerate(self.decoder.shapes())
            if (self.units.experts and shape.experts) or self.units.candidates(self.decoder, index)
        ]
        blocks = having or range(self.block_count)
        return max(blocks, key=lambda index: (self.block_numbers[index], -abs(index - FIRST_FEW)))

    @property
    def stream_bytes(self) -> int:
        """The hidden states of all tokens between two blocks."""
        return self.tokens * self.stream_width * self.computed_itemsize

    # -- the recipe

    @cached_property
    def _path(self) -> Track:
        return self.policy.start(Stream(States(OnDevice()), []))

    @property
    def two_paths(self) -> bool:
        """Whether hidden states of the dense model are propagated beside those of the pruned one."""
        return self._path.dense is not self._path.actual

    @property
    def streams(self) -> int:
        """Number of sets of hidden states of all tokens that the policy holds at once."""
        # Where blocks are independent, the next block's inputs are made while this one's are needed.
        return 1 + self.two_paths + (self.policy.independent and self.workers == 1)

    @property
    def keeps_original(self) -> bool:
        """Whether the dense block is kept beside the one that is pruned."""
        return self.policy.dense_target or self.two_paths

    @cached_property
    def wanted(self) -> BlockAllocation:
        """Allocation of the largest block, or the most that it may keep before a budget is divided."""
        return self.expected(self.largest)

    @cached_property
    def known(self) -> Allocation | None:
        """Allocation that is known before the run, if any."""
        return None if self.divides else self.allocator.divide(DenseModel(self.decoder, ())).allocation

    def expected(self, index: int) -> BlockAllocation:
        """Return what a block keeps, or about the average where a budget is not divided yet."""
        if self.known is not None:
            return self.known.blocks[index]
        shape, kept = self.decoder.shape(index), 1 - self.sparsity
        if self.units.family is not None:
            return BlockAllocation(shape, dict.fromkeys(self.decoder.paths(index), kept))
        # Of rival kinds one is narrowed.
        for kind in {kind.rivals: kind for kind in reversed(self.units.kinds)}.values():
            there = kind.there(shape)
            shape = kind.with_count(shape, max(1, round(kept * there)) if there else 0)
        return BlockAllocation(shape)

    @cached_property
    def example(self) -> BlockProgram:
        """The stages of the largest block."""
        return self.block(self.largest, self.wanted)

    def taps(self, targets: Iterable[Target]) -> dict[str, int]:
        """Return the width of each layer at which the inputs of targets are collected."""
        return {target.tap: self.decoder.layer(self.largest, target.tap).in_features for target in targets}

    @property
    def divides(self) -> bool:
        """Whether a budget is divided by measured costs."""
        return isinstance(self.allocator, MeasuredBudget | Depth)

    @property
    def probe_changes(self) -> int:
        """Number of changes of a block that a division tries, each on the tokens of a probe."""
        if not isinstance(self.allocator, MeasuredBudget) or not self.allocator.probes:
            return 0
        return self.allocator.changes(self.units.candidates(self.decoder, self.largest))

    @property
    def probe_tokens(self) -> int:
        """Number of tokens on which a division tries changes."""
        allocator = self.allocator
        return self.first_tokens(allocator.probe_tokens) if isinstance(allocator, MeasuredBudget) else 0

    # -- what a layer takes

    @property
    def layers_at_once(self) -> int:
        """Number of layers that a device solves at a time."""
        return -(-self.layers // self.request.devices)

    @property
    def workers(self) -> int:
        """Number of workers that prune blocks side by side; 1 where blocks depend on each other."""
        return self.request.workers if self.request.ray or self.policy.independent else 1

    @property
    def layers(self) -> int:
        """Layers of a block that are solved at a time, where blocks depend on each other."""
        return 1 if self.request.ray or self.policy.independent else self.request.workers

    @property
    def spare_workers(self) -> str:
        """A sentence where the request has more workers than can be at work; empty where it has not."""
        asked, most, what = self.request.workers, self.block_count, "block"
        if asked > 1 and not self.policy.independent:
            most, what = max((len(stage.targets) for stage in self.example.stages), default=0), "layer"
        if asked == 1 or asked <= most:
            return ""
        if not most:
            return f"of {asked} workers no more than 1 is used, because the recipe solves no layer"
        return f"of {asked} workers no more than {most} are used, because {counted(most, what)} can be pruned at a time"

    @property
    def whole_metric(self) -> Collection[str]:
        """The layers of a block, by their paths, that get a whole output metric unless they are too wide."""
        if self.metric is None or self.metric.kind != "full":
            return ()
        return self.units.whole_metric(self.decoder.architecture)

    def coupled(self, path: str, block: int | None = None) -> bool:
        """Return whether a whole metric weighs the outputs of a layer, by its path in a block, or in the largest."""
        asked = self.metric
        if asked is None or path not in self.whole_metric:
            return False
        layer = self.decoder.layer(self.largest if block is None else block, path)
        return layer.out_features <= (asked.width or math.inf)

    def weighed(self, target: Target, block: int | None = None) -> bool:
        """Return whether the outputs of a target's problem are coupled: by a whole metric, or as its units are rows."""
        return target.by_rows or self.coupled(target.path, block)

    def layer_bytes(self, target: Target) -> int:
        """Return the bytes of the workspace of a layer's solve, or of the search for its basis, with its metric."""
        layer, coupled = self.decoder.layer(self.largest, target.path), self.weighed(target)
        out, width = target.sizes(layer)
        work = self.solver(coupled, (out, width)).work(out, width, coupled=coupled) + self.extra_work(
            target, out, width
        )
        return round(work.bytes) + self.metric_bytes(target)

    def metric_bytes(self, target: Target) -> int:
        """Return the bytes of the matrices of a layer's problem that are no moments of its inputs."""
        out, width = target.sizes(self.decoder.layer(self.largest, target.path))
        if target.by_rows:  # the metric in place of the Gram matrix, and a copy of the moments
            return AVERAGE * (out**2 + width**2)
        return AVERAGE * out**2 if self.coupled(target.path) else 0

    def extra_work(self, target: Target, outputs: int, inputs: int) -> Work:
        """Return the work beside the solve of a layer: of choosing units and directions, and of the grid."""
        total = target.work(outputs, inputs)
        if target.rotated:
            total += best_basis_work(outputs, inputs)
        if self.method.grid_solver is not None:
            total += self.method.grid_solver.work(outputs, inputs, coupled=self.coupled(target.path))
        return total

    def spectra_bytes(self, stage: Sequence[Target], target: Target) -> int:
        """Return the bytes that solvers keep with the moments of other layers while a layer of a stage is solved."""
        layer = self.decoder.layer(self.largest, target.path)
        solver = self.solver(self.weighed(target), target.sizes(layer))
        before = stage[: stage.index(target)]
        return solver.cached_bytes * sum(width**2 for tap, width in self.taps(before).items() if tap != target.tap)

    def expert_work(self, index: int, tokens: int) -> Work:
        """Return the work of choosing the experts of a block by so many tokens, where they are the units."""
        return expert_choice_work(self.decoder, index, tokens) if self.units.experts else Work()

    @property
    def expert_bytes(self) -> int:
        """Bytes of the choice of experts, where they are the units."""
        return round(self.expert_work(self.largest, self.tokens).bytes)

    def cost_bytes(self, target: Target) -> int:
        """Return the bytes of computing the costs of removal of a layer, where a budget is divided by them."""
        layer = self.decoder.layer(self.largest, target.path)
        out, width = target.sizes(layer)
        coupled = self.weighed(target)
        measure = entry_costs_work if target.kind is None else removal_curve_work
        return round(measure(out, width, coupled=coupled).bytes) + self.metric_bytes(target)

    @property
    def all_costs_bytes(self) -> int:
        """Bytes of the costs of single weights of the whole model, and of the copies that are sorted."""
        weights = self.units.family is not None
        return 5 * 4 * min(MOST_COSTS, self.decoder.linear_weights()) if weights else 0

    @property
    def probe_bytes(self) -> int:
        """Bytes of the hidden states of all changes that a division tries, propagated to the end of the model."""
        return self.probe_changes * self.block_count * self.probe_tokens * self.stream_width * self.itemsize

    # -- the folder

    @property
    def pruned_bytes(self) -> int:
        """Bytes of the pruned blocks: zeros are counted, removed units are not."""
        kept = 1.0 if self.units.family is not None else 1 - self.sparsity
        return round(kept * sum(self.block_numbers)) * self.itemsize

    @property
    def dense_numbers(self) -> int:
        """The numbers in all parameters of the dense model, of which those that are tied count once."""
        return self.resident_numbers + sum(self.block_numbers)

    @property
    def vocabulary_removed(self) -> int:
        """About how many numbers a smaller vocabulary removes from embedding and head."""
        smaller, model = self.request.recipe.vocabulary, self.decoder.model
        if smaller is None:
            return 0
        kept = smaller.keep if smaller.keep > 1 else smaller.keep * self.vocabulary
        inner, outer = model.get_input_embeddings(), model.get_output_embeddings()
        tables = {id(table.weight) for table in (inner, outer) if table is not None}
        return round((self.vocabulary - kept) * len(tables) * self.hidden)

    @property
    def vocabulary_work(self) -> Work:
        """Work of the refit of a smaller vocabulary, beside the passes of its tokens through the blocks.

        The text passes three times: as it is, with tokens replaced by removed ones, and in the new tokens. The rows
        that stay are fitted to predictions behind all tokens and behind some pieces of the replaced ones.
        """
        smaller = self.request.recipe.vocabulary
        if smaller is None or not smaller.tokens:
            return Work()
        logits, receiving = smaller.tokens * self.vocabulary, self.vocabulary * RECEIVING
        states = STATES * smaller.tokens
        head = head_work(self.decoder, VOCABULARY_PASSES * smaller.tokens)
        fits = 6 * product(round(states), self.hidden, round(receiving))
        kept = states * (2 * receiving + 4 * self.hidden)
        at_once = LOGITS * min(smaller.tokens, VOCABULARY_TOKENS) * self.vocabulary * 4
        # The states of all batches are joined, and then four copies of the rows are fitted.
        most = kept + max(kept, at_once, 16 * receiving * self.hidden)
        return head + Work(sweeps(VOCABULARY_SWEEPS, logits) + fits, most, VOCABULARY_PASSES)

    @property
    def pruned_numbers(self) -> int:
        """The numbers in all parameters of the pruned model; exact but for biases where shapes are known before."""
        sparsity = self.sparsity if self.known is None else self.known.sparsity
        removed = 0 if self.units.family is not None else sparsity * self.decoder.linear_weights()
        return round(self.dense_numbers - self.vocabulary_removed - removed)
