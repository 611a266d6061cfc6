"""Memory of a run by phase and part, from shapes alone: each part is a product of widths.

docs/explanation/large.md explains the parts. All but `base`, the memory of a process after its imports, follows from
the program.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from optprune.allocation import Depth
from optprune.calibration.fisher_pass import POSITIONS_AT_ONCE, TOKENS_AT_ONCE
from optprune.calibration.generated import pieces_at_once, pieces_of
from optprune.models import Target, reorderable
from optprune.moments import AT_ONCE
from optprune.numerics.gram import packed_size
from optprune.program.program import AVERAGE, VOCABULARY_TOKENS, Program
from optprune.report.phases import CHOOSING, GENERATING, VOCABULARY

AHEAD = 2
"""block jobs in flight for each worker: the present one and the next"""
PHASES = (
    *("loading", CHOOSING, "tokenising", GENERATING),
    *(VOCABULARY, "metric", "budget", "pruning", "saving", "checking"),
)
SUM = 8
"""the bytes of a number in sums over tokens, which are float64"""
RELOADING = 192 * 2**20
"""bytes of a process that has imported torch and transformers, such as the one that reloads a folder"""
HOST, DEVICE, DISK = "host", "device", "disk"


@dataclass(frozen=True)
class Part:
    """One use of memory in a phase."""

    name: str
    bytes: int
    where: str = DEVICE
    """device, host or disk; memory of the device is memory of the host where the CPU computes"""


def parts_of(program: Program, phase: str, base: int, fresh: int) -> list[Part]:
    """Return the uses of memory at the peak of a phase.

    `base` is the memory of this process after its imports, `fresh` what another process adds with its own, in bytes.
    """
    always = [
        Part("imports", base, HOST),
        Part("embeddings, head and norms", program.resident_bytes),
        *image_features(program),
    ]
    if phase == "loading":
        return [*always, *_loading(program)]
    if phase == "tokenising":
        vision = program.vision_bytes
        return [
            Part("imports", base, HOST),
            Part("token ids", 64 * program.tokens, HOST),
            *([Part("vision part and embeddings", vision)] if vision else []),
            *image_features(program),
        ]
    if phase == CHOOSING:
        return [Part("imports", base, HOST), *_choice_of_tokens(program)]
    if phase == GENERATING:
        return [*always, *_generating(program)]
    if phase == VOCABULARY:
        return [*always, *_vocabulary(program)]
    if phase == "metric":
        return [*always, *_metric(program)] if program.metric is not None else []
    if phase == "budget":
        return [*always, *_budget(program), *metric_files(program)] if program.divides else []
    if phase == "pruning":
        return [
            *always,
            *_pruning(program, fresh),
            *metric_files(program),
            Part("run folder", program.pruned_bytes, DISK),
        ]
    if phase == "saving":
        return [*always, *_saving(program)]
    return [*always, *_checking(program, fresh)]


def _loading(program: Program) -> Iterator[Part]:
    # Of each number the absolute value, and two answers, on whether it is finite.
    largest = program.vocabulary * program.hidden
    yield Part("the largest tensor as it is checked", largest * (program.itemsize + 2), HOST)
    yield Part(
        "the largest tensor before it is moved",
        0 if program.request.device == "cpu" else largest * program.itemsize,
        HOST,
    )


def _generating(program: Program) -> Iterator[Part]:
    """Yield the uses of memory of the whole dense model and of the keys and values of the windows that it generates."""
    yield Part("the dense model", (program.resident_numbers + sum(program.block_numbers)) * program.itemsize)
    pieces, size = pieces_of(program.length)
    rows = min(program.request.generated * pieces, pieces_at_once(size))
    # At most as wide as the hidden states; logits, their softmax and cumulated sums.
    keys = 2 * program.block_count * program.hidden * size
    yield Part("keys, values and logits", rows * (keys * program.itemsize + 12 * program.vocabulary))


def _choice_of_tokens(program: Program) -> Iterator[Part]:
    """Yield the uses of memory of the dense model and of its predictions by which tokens are chosen."""
    smaller = program.request.recipe.vocabulary
    if smaller is not None and smaller.predictions:
        blocks = sum(program.block_numbers) * program.itemsize if program.request.whole else program.block_bytes
        yield Part("the dense model", program.resident_bytes + blocks)
        yield Part("activations", activations(program, VOCABULARY_TOKENS))
        # As the model computes them, in float32, and their softmax.
        yield Part("predictions of tokens", 12 * VOCABULARY_TOKENS * program.vocabulary)


def _vocabulary(program: Program) -> Iterator[Part]:
    """Yield the uses of memory of the states and predictions that the rows of a smaller vocabulary are fitted to."""
    yield Part("a block", 0 if program.request.whole else program.block_bytes)
    yield Part("activations", activations(program, VOCABULARY_TOKENS))
    yield Part("predictions and states", round(program.vocabulary_work.bytes))


def image_features(program: Program) -> Iterator[Part]:
    """Yield the features of the images in records, which have at most all tokens."""
    if program.request.lengths:
        size = program.tokens * program.hidden * program.itemsize
        yield Part("features of images", program.request.features * size, HOST)
        yield Part("features of images for blocks", (program.request.features - 1) * size)


# -- passes


def activations(program: Program, tokens: int, backward: bool = False) -> int:
    """Return the bytes of activations inside the widest block while so many tokens pass through it."""
    hidden, width = program.hidden, max(shape.mlp_width for shape in program.decoder.shapes())
    # Residual and norm, q, k, v and what attention makes of them; the gate, what it lets pass, up, their product.
    numbers = 14 * hidden + 8 * width if backward else max(7 * hidden, 3 * hidden + 3 * width)
    return tokens * numbers * program.itemsize


def streams(program: Program, count: int) -> Iterator[Part]:
    """Yield `count` sets of the hidden states of all tokens between two blocks, in the place where they are kept."""
    where = {"host": HOST, "disk": DISK}.get(program.request.states, DEVICE)
    yield Part("hidden states", count * program.stream_bytes, where)
    if where != DEVICE:
        yield Part("hidden states of two batches", 2 * program.batch_tokens * program.stream_width * program.itemsize)


def collecting(program: Program, taps: dict[str, int], drifted: bool, held_out: bool) -> int:
    """Return the peak bytes of the sums of moments while they are gathered and averaged, by the width of each tap."""
    kinds = 3 if drifted else 1
    widths = sorted(taps.values())
    if not widths:
        return 0

    def summed(width: int) -> int:
        return SUM * (packed_size(width) * (2 if drifted else 1) + width**2 * drifted)

    sums, widest = sum(map(summed, widths)), widths[-1]
    # A batch's product, which is copied when it is added to the sums; the CPU forms squares in stripes.
    whole = drifted or program.request.device != "cpu"
    adding = sums * (2 if held_out else 1) + (AVERAGE + SUM) * widest**2 * whole
    adding += min(AT_ONCE, program.batch_tokens) * widest * 4 * kinds
    # The last and widest is averaged beside the averages of the others.
    averaging = AVERAGE * kinds * sum(width**2 for width in widths) + summed(widest)
    averaging += sums if held_out else 0
    return max(adding, averaging)


def moments(program: Program, taps: dict[str, int], drifted: bool, held_out: bool) -> int:
    """Return the bytes of the averages that are held while the layers are solved."""
    return AVERAGE * (3 if drifted else 1) * (2 if held_out else 1) * sum(width**2 for width in taps.values())


def changed(program: Program, targets: list[Target]) -> int:
    """Return the bytes of the changed layers of a block that a probe tries together; 0 without a probe."""
    layers = {target.path: program.decoder.layer(program.largest, target.path).weight.numel() for target in targets}
    return AVERAGE * sum(layers.values()) if program.probe_changes else 0


def reordered(program: Program, target: Target) -> dict[str, int]:
    """Return the width of a layer whose permuted or rotated inputs need moments of their own, by its path; else {}."""
    path = target.path
    free = (
        program.method.permuted
        and reorderable(program.decoder, program.largest, path, target.family.multiple) is not None
    )
    return {path: program.decoder.layer(program.largest, path).in_features} if free or target.rotated else {}


# -- the phases


def _metric(program: Program) -> Iterator[Part]:
    assert program.metric is not None
    tokens = program.first_tokens(program.metric.tokens)
    group = min(tokens, max(1, TOKENS_AT_ONCE // program.length) * program.length)
    states = tokens * program.stream_width * program.itemsize
    yield Part("a block", 0 if program.request.whole else program.block_bytes)
    inside = activations(program, group, backward=True) + _metric_sums(program, [program.largest])
    # Logits, their softmax, and its cumulated sums in float64 with what is summed.
    head = POSITIONS_AT_ONCE * program.vocabulary * (2 * program.itemsize + 2 * SUM)
    if program.request.whole:
        # One group at a time goes through all blocks, and the sums of all layers are there.
        entries = (program.block_count + 2) * group * program.stream_width * program.itemsize
        yield Part("block inputs and gradients of a group", entries)
        yield Part("sums of the metric", _metric_sums(program, range(program.block_count)))
        yield Part("backward pass", max(head, activations(program, group, backward=True)))
        return
    yield Part("hidden states and gradients", 2 * states)
    yield Part("backward pass", max(head, inside))
    yield Part("block inputs", program.block_count * states, DISK)
    yield from metric_files(program)


def _metric_sums(program: Program, blocks: "range | list[int]") -> int:
    """Return the bytes of the sums of the metric: half of each matrix, in the dtype of the model. Diagonals are 0."""
    asked, whole, total = program.metric, program.whole_metric, 0
    if asked is None:
        return 0
    for index in blocks:
        for path in set(program.decoder.paths(index)) & set(whole):
            out = program.decoder.layer(index, path).out_features
            total += out**2 * program.itemsize // 2 if out <= (asked.width or out) else 0
    return total


def metric_files(program: Program) -> Iterator[Part]:
    """Yield the sums of the output metric of all layers, which are read again block by block."""
    if program.metric is not None:
        total = _metric_sums(program, range(program.block_count))
        yield Part("sums of the metric", total, DEVICE if program.request.whole else DISK)


def _budget(program: Program) -> Iterator[Part]:
    if isinstance(program.allocator, Depth):
        yield from streams(program, 2)
        yield Part("a block", 0 if program.request.whole else program.block_bytes)
        yield Part("activations", activations(program, program.batch_tokens))
        return
    yield from streams(program, 1)
    yield Part("a block", 0 if program.request.whole else program.block_bytes)
    candidates = program.units.candidates(program.decoder, program.largest)
    taps = program.taps(candidates)
    gathering = collecting(program, taps, False, False) + activations(program, program.batch_tokens)
    costing = moments(program, taps, False, False) + max(map(program.cost_bytes, candidates), default=0)
    costing += changed(program, candidates)
    yield Part("moments and costs", max(gathering, costing))
    yield Part("answers of experts", program.expert_bytes)
    yield Part("costs of all weights", program.all_costs_bytes, HOST)
    yield Part("hidden states of probes", program.probe_bytes, DEVICE if program.request.whole else DISK)


def _pruning(program: Program, fresh: int) -> Iterator[Part]:
    if program.workers == 1:
        yield from streams(program, program.streams)
        yield from _inside(program)
        return
    yield from streams(program, program.streams)
    yield Part("a block", 0 if program.request.whole else program.block_bytes)
    yield Part("activations", activations(program, program.batch_tokens))
    job = program.streams * program.stream_bytes + program.block_bytes
    own = program.streams * program.stream_bytes + sum(part.bytes for part in _inside(program, worker=True))
    if program.request.ray:
        yield Part("block jobs under way", (AHEAD * program.workers + 1) * job, HOST)
        here = program.resident_bytes + program.streams * program.stream_bytes + program.block_bytes
        yield Part("work of a worker, beyond that", max(0, own - here))
        return
    # Pickled, and once more on their way.
    yield Part("block jobs under way", (AHEAD + 1) * program.workers * job, HOST)
    yield Part("imports of the workers", program.workers * fresh, HOST)
    yield Part("block jobs that workers unpack", program.workers * job, HOST)
    yield Part("work of the workers", -(-program.workers // program.request.devices) * own)


def _inside(program: Program, worker: bool = False) -> Iterator[Part]:
    """Yield the uses of memory while one block is pruned: the dense block, its statistics, and the largest solve."""
    method, held_out = program.method, bool(program.held_out)
    copies = (0 if program.request.whole or worker else 1) + program.keeps_original
    yield Part("the block", copies * program.block_bytes)
    gathering = solving = 0
    batch = activations(program, program.batch_tokens)
    for number, stage in enumerate(program.example.stages):
        taps = program.taps(stage.targets)
        drifted = program.policy.dense_target and (number > 0 or program.two_paths)
        gathering = max(gathering, collecting(program, taps, drifted, held_out) + (2 if drifted else 1) * batch)
        given = moments(program, taps, drifted, held_out)
        solves = sorted(
            program.spectra_bytes(stage.targets, target)
            + program.layer_bytes(target)
            + moments(program, reordered(program, target), drifted, held_out)
            for target in stage.targets
        )
        solving = max(solving, given + sum(solves[-program.layers_at_once :]))
    yield Part("moments while they are gathered", max(gathering, batch))
    yield Part("solving, beyond that", max(0, solving - max(gathering, batch)))
    yield Part("answers of experts", program.expert_bytes)
    if method.recovery is not None:
        # Of a sub-module: its inputs and its answers, in the dense block and in the pruned one.
        tokens = program.fitted_tokens(method.recovery)
        yield Part("inputs and answers of sub-modules", 4 * tokens * program.hidden * program.itemsize)


def _saving(program: Program) -> Iterator[Part]:
    yield Part("a block", 0 if program.request.whole else program.block_bytes)
    yield Part("logits of a window", logits(program))
    yield Part("run folder", program.pruned_bytes, DISK)
    yield Part("output", output_bytes(program), DISK)


def _checking(program: Program, fresh: int) -> Iterator[Part]:
    yield Part("logits of a window", logits(program), HOST)
    yield Part("imports of the process that reloads", fresh, HOST)
    resident = (program.resident_numbers - program.vocabulary_removed) * program.itemsize
    yield Part("embeddings, head and norms, reloaded", resident)
    yield Part("a block, reloaded", program.block_bytes)
    yield Part("vision part, reloaded", program.request.around)
    yield Part("logits, compared", 3 * logits(program))
    yield Part("run folder", program.pruned_bytes, DISK)
    yield Part("output", output_bytes(program), DISK)


def output_bytes(program: Program) -> int:
    """Return the bytes of the output on the disk beside the run folder.

    A shard of the output is a link to a block of the run folder where the output has several shards, the block is no
    larger than a shard may be, and files hold its tensors by the same names and in the same layout.
    """
    resident = (program.resident_numbers - program.vocabulary_removed) * program.itemsize
    whole = program.pruned_bytes + resident + program.request.around
    if (
        program.decoder.architecture.part_of
        or program.request.whole
        or not program.decoder.architecture.stored_as_it_is
        or whole <= program.request.max_shard
    ):
        return whole
    sizes = (program.pruned_bytes * numbers // sum(program.block_numbers) for numbers in program.block_numbers)
    return whole - sum(size for size in sizes if size <= program.request.max_shard)


def logits(program: Program) -> int:
    """Return the bytes of the logits of one window, in float32."""
    return program.length * program.vocabulary * 4
