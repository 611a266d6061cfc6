"""The memory of a run by phase, part by part, from shapes alone: each part is a product of widths that the docs state.

docs/large.md explains the parts. What `workload` says decides all but `base`, what a process has with its imports.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from optprune.allocation import Depth
from optprune.calibration.fisher_pass import POSITIONS_AT_ONCE, TOKENS_AT_ONCE
from optprune.models import Target, reorderable
from optprune.pruning.matching import descent_of
from optprune.pruning.workers import AHEAD
from optprune.pruning.workload import AVERAGE, Workload
from optprune.recipe.groups import Matching
from optprune.solvers.descent import NUMBER
from optprune.sums import AT_ONCE

PHASES = ("loading", "tokenising", "metric", "budget", "pruning", "saving", "checking")
SUM = 8
"""the bytes of a number in sums over tokens, which are float64"""
RELOADING = 192 * 2**20
"""what a process has for itself that has imported torch and transformers, as the one that reloads a folder does"""
HOST, DEVICE, DISK = "host", "device", "disk"


@dataclass(frozen=True)
class Part:
    """What takes memory in a phase."""

    name: str
    bytes: int
    where: str = DEVICE
    """device, host or disk: what is on the device is in the host's memory where that computes"""


def parts_of(work: Workload, phase: str, base: int, fresh: int) -> list[Part]:
    """What takes memory at the peak of a phase.

    `base` is what this process has with its imports, `fresh` what another process adds to that with its own, in bytes.
    """
    always = [Part("imports", base, HOST), Part("embeddings, head and norms", work.resident_bytes)]
    if phase == "loading":
        return [*always, *_loading(work)]
    if phase == "tokenising":
        return [Part("imports", base, HOST), Part("token ids", 64 * work.tokens, HOST)]
    if phase == "metric":
        return [*always, *_metric(work)] if work.recipe.metric is not None else []
    if phase == "budget":
        return [*always, *_budget(work), *metric_files(work)] if work.divides else []
    if phase == "pruning":
        return [*always, *_pruning(work, fresh), *metric_files(work), Part("run folder", work.pruned_bytes, DISK)]
    if phase == "saving":
        return [*always, *_saving(work)]
    return [*always, *_checking(work, fresh)]


def _loading(work: Workload) -> Iterator[Part]:
    # Of each number the absolute value, and two answers, on whether it is finite.
    largest = work.vocabulary * work.hidden
    yield Part("the largest tensor as it is checked", largest * (work.itemsize + 2), HOST)
    yield Part("the largest tensor before it is moved", 0 if work.device == "cpu" else largest * work.itemsize, HOST)


# -- passes


def activations(work: Workload, tokens: int, backward: bool = False) -> int:
    """What is inside the largest block while so many tokens go through it."""
    hidden, width = work.hidden, work.decoder.shape(work.largest).mlp_width
    # Residual and norm, q, k, v and what attention makes of them; the gate, what it lets pass, up, their product.
    numbers = 14 * hidden + 8 * width if backward else max(7 * hidden, 3 * hidden + 3 * width)
    return tokens * numbers * work.itemsize


def streams(work: Workload, count: int) -> Iterator[Part]:
    """The hidden states of all tokens between two blocks, `count` times, where the run has them."""
    where = {"host": HOST, "disk": DISK}.get(work.states, DEVICE)
    yield Part("hidden states", count * work.stream_bytes, where)
    if where != DEVICE:
        yield Part("hidden states of two batches", 2 * work.batch_tokens * work.hidden * work.itemsize)


def collecting(work: Workload, taps: dict[str, int], drifted: bool, held_out: bool) -> int:
    """The most that the sums of moments take while they are gathered and averaged, by the width of each tap."""
    kinds = 3 if drifted else 1
    squares = sorted(width**2 for width in taps.values())
    if not squares:
        return 0
    sums = SUM * kinds * sum(squares)
    # A batch's product, which is copied when it is added to the sums.
    adding = sums * (2 if held_out else 1) + (AVERAGE + SUM) * squares[-1]
    adding += min(AT_ONCE, work.batch_tokens) * int(squares[-1] ** 0.5) * 4 * kinds
    # The last and widest is averaged beside the averages of the others.
    averaging = AVERAGE * kinds * sum(squares[:-1]) + ((SUM + AVERAGE) * kinds + SUM) * squares[-1]
    averaging += sums if held_out else 0
    return max(adding, averaging)


def moments(work: Workload, taps: dict[str, int], drifted: bool, held_out: bool) -> int:
    """The averages that are there while the layers are solved."""
    return AVERAGE * (3 if drifted else 1) * (2 if held_out else 1) * sum(width**2 for width in taps.values())


def changed(work: Workload, targets: list[Target]) -> int:
    """The layers of a block as a probe tries them together, where there is one."""
    layers = {target.path: work.decoder.layer(work.largest, target.path).weight.numel() for target in targets}
    return AVERAGE * sum(layers.values()) if work.probe_changes else 0


def reordered(work: Workload, target: Target) -> dict[str, int]:
    """The width of a layer whose inputs are permuted or rotated, and have moments of their own then; else nothing."""
    path = target.path
    free = work.recipe.permuted and reorderable(work.decoder, work.largest, path, target.family.multiple) is not None
    return {path: work.decoder.layer(work.largest, path).in_features} if free or target.rotated else {}


# -- the phases


def _metric(work: Workload) -> Iterator[Part]:
    recipe = work.recipe
    assert recipe.metric is not None
    tokens = work.first_tokens(recipe.metric.tokens)
    group = min(tokens, max(1, TOKENS_AT_ONCE // work.length) * work.length)
    states = tokens * work.hidden * work.itemsize
    yield Part("a block", 0 if work.whole else work.block_bytes)
    inside = activations(work, group, backward=True) + _metric_sums(work, [work.largest])
    # Logits, their softmax, and its cumulated sums in float64 with what is summed.
    head = POSITIONS_AT_ONCE * work.vocabulary * (2 * work.itemsize + 2 * SUM)
    if work.whole:
        # One group at a time goes through all blocks, and the sums of all layers are there.
        entries = (work.blocks + 2) * group * work.hidden * work.itemsize
        yield Part("block inputs and gradients of a group", entries)
        yield Part("sums of the metric", _metric_sums(work, range(work.blocks)))
        yield Part("backward pass", max(head, activations(work, group, backward=True)))
        return
    yield Part("hidden states and gradients", 2 * states)
    yield Part("backward pass", max(head, inside))
    yield Part("block inputs", work.blocks * states, DISK)
    yield from metric_files(work)


def _metric_sums(work: Workload, blocks: "range | list[int]") -> int:
    """Half of each matrix, or the diagonals, which are next to nothing, in the dtype of the model."""
    recipe, total = work.recipe, 0
    asked = recipe.metric
    if asked is None or asked.kind != "full":
        return 0
    whole = recipe.units.whole_metric(work.decoder.architecture)
    for index in blocks:
        for path in set(work.decoder.paths(index)) & set(whole):
            out = work.decoder.layer(index, path).out_features
            total += out**2 * work.itemsize // 2 if out <= (asked.width or out) else 0
    return total


def metric_files(work: Workload) -> Iterator[Part]:
    """The sums of the output metric of all layers, which are read again block by block."""
    if work.recipe.metric is not None:
        total = _metric_sums(work, range(work.blocks))
        yield Part("sums of the metric", total, DEVICE if work.whole else DISK)


def _budget(work: Workload) -> Iterator[Part]:
    if isinstance(work.allocator, Depth):
        yield from streams(work, 2)
        yield Part("a block", 0 if work.whole else work.block_bytes)
        yield Part("activations", activations(work, work.batch_tokens))
        return
    yield from streams(work, 1)
    yield Part("a block", 0 if work.whole else work.block_bytes)
    candidates = work.recipe.units.candidates(work.decoder, work.largest)
    taps = work.taps(candidates)
    gathering = collecting(work, taps, False, False) + activations(work, work.batch_tokens)
    costing = moments(work, taps, False, False) + max(map(work.cost_bytes, candidates), default=0)
    costing += changed(work, candidates)
    yield Part("moments and costs", max(gathering, costing))
    yield Part("answers of experts", work.expert_bytes)
    yield Part("costs of all weights", work.all_costs_bytes, HOST)
    yield Part("hidden states of probes", work.probe_bytes, DEVICE if work.whole else DISK)


def _pruning(work: Workload, fresh: int) -> Iterator[Part]:
    if work.workers == 1:
        yield from streams(work, work.streams)
        yield from _inside(work)
        return
    yield from streams(work, work.streams)
    yield Part("a block", 0 if work.whole else work.block_bytes)
    yield Part("activations", activations(work, work.batch_tokens))
    errand = work.streams * work.stream_bytes + work.block_bytes
    own = work.streams * work.stream_bytes + sum(part.bytes for part in _inside(work, worker=True))
    if work.ray:
        yield Part("errands under way", (AHEAD * work.workers + 1) * errand, HOST)
        here = work.resident_bytes + work.streams * work.stream_bytes + work.block_bytes
        yield Part("work of a worker, beyond that", max(0, own - here))
        return
    # Pickled, and once more on their way.
    yield Part("errands under way", (AHEAD + 1) * work.workers * errand, HOST)
    yield Part("imports of the workers", work.workers * fresh, HOST)
    yield Part("errands that workers unpack", work.workers * errand, HOST)
    yield Part("work of the workers", -(-work.workers // work.devices) * own)


def _inside(work: Workload, worker: bool = False) -> Iterator[Part]:
    """What pruning one block takes: the dense block, its statistics, or the most that one layer's solve takes."""
    recipe, held_out = work.recipe, work.recipe.refit is not None
    copies = (0 if work.whole or worker else 1) + work.keeps_original
    yield Part("the block", copies * work.block_bytes)
    gathering = solving = 0
    batch = activations(work, work.batch_tokens)
    for number, stage in enumerate(work.stages):
        taps = work.taps(stage)
        drifted = recipe.policy.dense_target and (number > 0 or work.two_paths)
        gathering = max(gathering, collecting(work, taps, drifted, held_out) + (2 if drifted else 1) * batch)
        given = moments(work, taps, drifted, held_out)
        solves = sorted(
            work.spectra_bytes(stage, target)
            + work.layer_bytes(target)
            + moments(work, reordered(work, target), drifted, held_out)
            for target in stage
        )
        solving = max(solving, given + sum(solves[-work.layers_at_once :]))
    yield Part("moments while they are gathered", max(gathering, batch))
    yield Part("solving, beyond that", max(0, solving - max(gathering, batch)))
    yield Part("answers of experts", work.expert_bytes)
    if recipe.recovery is not None:
        # Of a sub-module: its inputs and its answers, in the dense block and in the pruned one.
        tokens = work.fitted_tokens(recipe.recovery)
        yield Part("inputs and answers of sub-modules", 4 * tokens * work.hidden * work.itemsize)
    if recipe.matching is not None:
        asked = recipe.matching
        yield Part("answers of the dense block", work.fitted_tokens(asked) * work.hidden * work.computed_itemsize)
        matching = numbers_of(asked) * work.block_bytes + activations(work, work.length, backward=True)
        yield Part("matching, beyond solving", max(0, matching - max(gathering, batch, solving)))


def numbers_of(matching: Matching) -> int:
    """What a block is matched with beside itself, in blocks at most: the point kept, a gradient and its sum.

    Then the point that a pull is towards, the averages of Adam, or the pairs of L-BFGS, its direction, its point and
    one that is tried, each with its gradient. Where entries are gone all of these are so much smaller, and where the
    others are is as large as one.
    """
    return 3 + (matching.pull > 0) + round(descent_of(matching).work(1).bytes / NUMBER)


def _saving(work: Workload) -> Iterator[Part]:
    yield Part("a block", 0 if work.whole else work.block_bytes)
    yield Part("logits of a window", logits(work))
    yield Part("run folder", work.pruned_bytes, DISK)
    yield Part("output", output_bytes(work), DISK)


def _checking(work: Workload, fresh: int) -> Iterator[Part]:
    yield Part("logits of a window", logits(work), HOST)
    yield Part("imports of the process that reloads", fresh, HOST)
    resident = work.resident_numbers * work.itemsize
    yield Part("embeddings, head and norms, reloaded", resident)
    yield Part("a block, reloaded", work.block_bytes)
    yield Part("logits, compared", 3 * logits(work))
    yield Part("run folder", work.pruned_bytes, DISK)
    yield Part("output", output_bytes(work), DISK)


def output_bytes(work: Workload) -> int:
    """What the output takes on the disk beside the run folder, whose blocks its shards are links to where it can.

    A block is linked where the output has several shards, one may be as large, and files hold its matrices as they are
    in memory.
    """
    resident = work.resident_numbers * work.itemsize
    whole = work.pruned_bytes + resident
    if work.whole or work.decoder.architecture.transposed or whole <= work.max_shard:
        return whole
    sizes = (work.pruned_bytes * numbers // sum(work.block_numbers) for numbers in work.block_numbers)
    return whole - sum(size for size in sizes if size <= work.max_shard)


def logits(work: Workload) -> int:
    """The logits of one window, in float32."""
    return work.length * work.vocabulary * 4
