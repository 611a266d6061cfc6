"""Time of a run: the declared work of its parts, times the seconds of an operation.

Each piece of work is declared beside the code that does it: solvers, allocators and unit kinds have `work`, and passes
of tokens are counted here by the multiplications of their matrix products. A short probe of one block
(pruning/measured_plan.py) measures the seconds per operation of each kind; without it, they are those of a large matrix
product.
"""

import hashlib
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch

from optprune.calibration.fisher_pass import PASSES_BACK
from optprune.calibration.fisher_pass import block_work as fisher_block_work
from optprune.calibration.generated import PASSES
from optprune.calibration.moments_pass import gram_work
from optprune.calibration.stream import SLOW, block_pass, head_work
from optprune.errors import OptpruneError
from optprune.measure.memory import clock
from optprune.models import Decoder
from optprune.program.memory import RELOADING
from optprune.program.program import VOCABULARY_TOKENS, Program
from optprune.report.phases import (
    BUDGET,
    CHECKING,
    CHOOSING,
    GENERATING,
    LOADING,
    METRIC,
    PRUNING,
    SAVING,
    TOKENISING,
    VOCABULARY,
)
from optprune.work import Work, factor, product

WIDTH, TIMES = 512, 5
"""the width of the matrices whose product is timed, and how often it is"""
DISK_SPEED = 5e8
"""the bytes a second that a disk is assumed to read or write"""
START = 3.0, 60.0
"""the least and the most seconds in which a process is assumed to import torch and transformers"""
CHOICE = 4e-5
"""the seconds in which it is decided whether a token stays in a smaller vocabulary"""
CHARACTERS_PER_SECOND = 1e6
"""the characters that a tokenizer is assumed to read"""
PIECE = 32 * 2**20
"""the bytes that the speed of a disk and of a digest is measured on"""
FRESH = """
import pathlib, time
began = time.perf_counter()
import torch, transformers
from transformers import AutoModelForCausalLM
reloading, status = time.perf_counter() - began, pathlib.Path("/proc/self/status")
lines = status.read_text().splitlines() if status.exists() else []
held = [int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon:")]
from optprune import texts
from optprune.pruning import prune
starting = time.perf_counter() - began
from optprune.report.drawings import can_draw
if can_draw():
    from matplotlib.figure import Figure
print(held[0] if held else 0, reloading, starting, time.perf_counter() - began - starting)
"""
"""the imports of a process that reloads a folder, then those of the command, and those of its drawings"""


@dataclass(frozen=True)
class Surroundings:
    """Speed of the machine beside arithmetic: starting processes, reading and writing files."""

    reload: float
    """the seconds until a fresh process that reloads a folder has imported what it needs"""
    start: float
    """the seconds until the command has"""
    draw: float
    """the seconds until it has imported what its drawings need"""
    fresh: int
    """the bytes that a process that reloads has for itself, with its imports"""
    write: float
    """the seconds of a byte that is written and made to last"""
    write_file: float
    """the seconds of a small file that is"""
    digest: float
    """the seconds of a byte's digest"""

    @classmethod
    def assumed(cls, started: float | None = None) -> "Surroundings":
        """Return usual figures; the process was started so many seconds ago, and has only imported its libraries."""
        start = min(max(time.process_time() if started is None else started, START[0]), START[1])
        return cls(start, start, start / 8, RELOADING, 2 / DISK_SPEED, 0.0, 1 / DISK_SPEED)

    @classmethod
    def measured(cls, place: Path | None = None) -> "Surroundings":
        """Measure the surroundings in about the time of an import, with files in a folder or among temporary files."""
        began = time.perf_counter()
        words = [sys.executable, "-c", FRESH]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path)}
        run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
        whole = time.perf_counter() - began
        if run.returncode:
            reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
            raise OptpruneError(f"a fresh process cannot import what a run needs: {reason}")
        fresh, reloading, importing, drawing = map(float, run.stdout.split())
        data = os.urandom(PIECE)
        # What others have written a moment ago goes to the disk with the first file that is made to last.
        small = min(_written(data[:1024], place) for _ in range(3))
        large = _written(data, place)
        began = time.perf_counter()
        hashlib.sha256(data).digest()
        digest = (time.perf_counter() - began) / PIECE
        interpreter = whole - importing - drawing
        each = max(0.0, large - small) / PIECE
        return cls(interpreter + reloading, whole - drawing, drawing, round(fresh) or RELOADING, each, small, digest)


def _written(data: bytes, place: Path | None) -> float:
    with tempfile.TemporaryFile(dir=place) as file:
        began = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began


@dataclass(frozen=True)
class Rates:
    """Seconds of one floating-point operation in each kind of work."""

    passes: float
    """passes of tokens through a block, with their Gram products"""
    head: float
    solves: float
    refinement: float
    """recovery"""
    metric: float
    """passes forward and backward for the output metric"""
    budget: float
    """costs of removal, beside the passes for them"""
    fixed: float = 0.0
    """seconds of the passes of a block that do not grow with the number of tokens"""
    read: float = 0.0
    """seconds in which a block is read"""

    @classmethod
    def of_product(cls, device: torch.device) -> "Rates":
        """Return the rate of a large matrix product, for every kind of work."""
        each = 1 / operations_per_second(device)
        return cls(each, each, each, each, each, each)


def operations_per_second(device: torch.device) -> float:
    """Return the floating-point operations a second in a product of matrices, the best of a few."""
    matrix, best = torch.ones(WIDTH, WIDTH, device=device), math.inf
    for _ in range(TIMES):
        began = clock(device)
        torch.matmul(matrix, matrix)
        best = min(best, clock(device) - began)
    return 2 * WIDTH**3 / max(best, 1e-9)


# -- the work of a program


def block_passes(program: Program, index: int) -> Work:
    """Return the work of a token in all passes that the policy makes of a block, with the Gram products."""
    decoder = program.decoder
    taps = {target.tap for target in program.units.candidates(decoder, index)}
    times = 3 if program.policy.sequential else 2
    return block_pass(decoder, index) * times + gram_work(decoder, index, taps)


def block_solves(program: Program, index: int, tokens: int) -> Work:
    """Return the work of the solves of a block, and of the choice of its experts by so many tokens."""
    total = program.expert_work(index, tokens)
    for target in program.units.candidates(program.decoder, index):
        layer = program.decoder.layer(index, target.path)
        shape, coupled = target.sizes(layer), program.weighed(target, index)
        total += program.solver(coupled, shape).work(*shape, coupled=coupled)
        total += program.extra_work(target, *shape)
    return total


def block_refinement(program: Program, index: int) -> Work:
    """Return the work of recovering the sub-modules of a block."""
    method, once, total = program.method, block_pass(program.decoder, index), Work()
    if method.recovery is not None and program.units.experts:
        total += (
            _expert_recovery(program.decoder, index, program.fitted_tokens(method.recovery)) * method.recovery.rounds
        )
    elif method.recovery is not None:
        # Each step of conjugate gradients is a pass forward and back, of layers that are about the whole block.
        steps = method.recovery.rounds * method.recovery.steps
        total += once * (steps * (1 + PASSES_BACK) * program.fitted_tokens(method.recovery))
    return total


def _expert_recovery(decoder: Decoder, index: int, tokens: int) -> Work:
    """Return the work of a round of refits of the experts' last matrices: three passes to these, and the solves."""
    shape, hidden = decoder.shape(index), int(decoder.model.config.hidden_size)
    routed, width = tokens * decoder.experts_for_a_token, shape.mlp_width
    inner = SLOW * product(routed, hidden, 2 * width)
    products = product(routed, width, width) + 2 * product(routed, width, hidden)
    return Work(3 * inner + products + shape.experts * (factor(width) + product(width, width, hidden)))


def block_metric(program: Program, index: int) -> Work:
    """Return the work of a token that goes forward and back through a block for the output metric."""
    if program.metric is None:
        return Work()
    widest = program.metric.width or math.inf
    return fisher_block_work(program.decoder, index, full=program.whole_metric, widest=widest)


def evaluation(decoder: Decoder, tokens: int) -> Work:
    """Return the work of predicting so many tokens."""
    return blocks_pass(decoder) * tokens + head_work(decoder, tokens)


def blocks_pass(decoder: Decoder) -> Work:
    """Return the work of one token in a forward pass of all blocks."""
    return _total(block_pass(decoder, index) for index in range(len(decoder.blocks)))


def _total(works: Iterable[Work]) -> Work:
    return sum(works, Work())


# -- seconds


def seconds_of(
    program: Program, rates: Rates, around: Surroundings, *, opening: float, tokenising: float, starting: float
) -> dict[str, float]:
    """Return the seconds of each phase.

    `opening` is the time to open the model, `tokenising` that of the text, `starting` that of the command's imports.
    """
    scale = sum(program.block_numbers) / program.block_numbers[program.largest]
    model = (program.resident_numbers + sum(program.block_numbers)) * program.itemsize
    window = evaluation(program.decoder, program.length).flops * rates.passes
    new = program.request.generated * program.length
    generating = {GENERATING: opening + PASSES * evaluation(program.decoder, new).flops * rates.passes} if new else {}
    refit = _vocabulary(program, rates, scale)
    smaller = program.request.recipe.vocabulary is not None
    return {
        LOADING: starting + opening + model * around.digest,
        **({CHOOSING: tokenising + _choosing(program, rates, scale, opening)} if smaller else {}),
        TOKENISING: tokenising,
        **generating,
        **({VOCABULARY: refit} if refit else {}),
        METRIC: _metric(program, rates, around, scale),
        BUDGET: _budget(program, rates, around, scale),
        PRUNING: _pruning(program, rates, around, scale),
        SAVING: scale * rates.read
        + window
        + around.draw
        + (program.pruned_bytes + program.resident_numbers * program.itemsize) * around.write,
        CHECKING: around.reload + opening + 2 * scale * rates.read + window,
    }


def expected_seconds(
    program: Program, characters: int, device: torch.device, *, started: float | None = None
) -> dict[str, float]:
    """Return the seconds of each phase without a probe, for a text of so many characters.

    The process was `started` so many seconds ago, and has hardly done anything since but to import its libraries.
    """
    around, files = Surroundings.assumed(started), _file_seconds(program.decoder)
    tokenising = 0.5 + characters / CHARACTERS_PER_SECOND
    rates = Rates.of_product(device)
    return seconds_of(program, rates, around, opening=0.5 + files, tokenising=tokenising, starting=0.0)


def expected_files(decoder: Decoder, characters: int, started: float | None = None) -> dict[str, float]:
    """Return the seconds of loading, tokenising, saving and checking a model, for runs without a program."""
    around, files = Surroundings.assumed(started), _file_seconds(decoder)
    return {
        TOKENISING: 0.5 + characters / CHARACTERS_PER_SECOND,
        LOADING: 0.5 + 2 * files,
        SAVING: 0.5 + around.draw + 2 * files,
        CHECKING: around.reload + files,
    }


def _file_seconds(decoder: Decoder) -> float:
    """Return the seconds in which a disk reads or writes the weights."""
    return sum(weight.nbytes for weight in decoder.model.parameters()) / DISK_SPEED


def _choosing(program: Program, rates: Rates, scale: float, opening: float) -> float:
    """Return the seconds of choosing the tokens of a smaller vocabulary, once the text is tokenised."""
    smaller, predicted = program.request.recipe.vocabulary, 0.0
    if smaller is not None and smaller.predictions:
        predicted = opening + evaluation(program.decoder, smaller.predictions).flops * rates.passes
        predicted += 0.0 if program.request.whole else smaller.predictions / VOCABULARY_TOKENS * scale * rates.read
    return predicted + CHOICE * program.vocabulary


def _vocabulary(program: Program, rates: Rates, scale: float) -> float:
    """Return the seconds of fitting the rows of a smaller vocabulary."""
    work, smaller = program.vocabulary_work, program.request.recipe.vocabulary
    if smaller is None or not work.flops:
        return 0.0
    inside = smaller.tokens * work.passes * blocks_pass(program.decoder).flops * rates.passes
    batches = -(-smaller.tokens // VOCABULARY_TOKENS)
    read = 0.0 if program.request.whole else work.passes * batches * scale * rates.read
    return inside + read + work.flops * rates.head


def _metric(program: Program, rates: Rates, around: Surroundings, scale: float) -> float:
    if program.metric is None:
        return 0.0
    tokens, files = program.first_tokens(program.metric.tokens), 0.0
    if not program.request.whole:
        states = program.block_count * tokens * program.stream_width * program.itemsize
        files = 2 * scale * rates.read + states * around.write
    inside = _total(block_metric(program, index) for index in range(program.block_count)).flops * rates.metric
    head = (1 + PASSES_BACK) * head_work(program.decoder, tokens).flops * rates.head
    return tokens * inside + head + files


def _budget(program: Program, rates: Rates, around: Surroundings, scale: float) -> float:
    if not program.divides:
        return 0.0
    work = program.allocator.work(program.decoder, program.tokens)
    files = 0.0 if program.request.whole else program.block_count * program.probe_changes * around.write_file
    head = head_work(program.decoder, program.allocator.head_tokens(program.decoder, program.tokens)).flops
    return work.flops * rates.budget + head * rates.head + scale * (rates.read + files)


def _pruning(program: Program, rates: Rates, around: Surroundings, scale: float) -> float:
    if program.idle:
        return 0.0
    blocks, tokens = range(program.block_count), program.tokens
    kept = program.pruned_bytes * around.write + program.block_count * 2 * around.write_file
    passes = tokens * _total(block_passes(program, index) for index in blocks).flops * rates.passes
    solves = _total(block_solves(program, index, tokens) for index in blocks).flops * rates.solves
    refinement = _total(block_refinement(program, index) for index in blocks).flops * rates.refinement
    inside = scale * rates.fixed + passes + solves + refinement
    if program.workers == 1:
        return inside + scale * rates.read + kept
    dense = tokens * blocks_pass(program.decoder).flops * rates.passes
    return around.start + max(dense + scale * rates.read + kept, inside / program.workers)
