"""What the phases of a run may take, from its recipe and the shapes of the model alone: a guess, put right on the way.

Passes of tokens through blocks, Gram products and factorisations are counted in multiplications, which a product of
matrices is timed for. How long solvers search is a rule of thumb. `TimeLeft` corrects all that once it sees work.
"""

import math
import time

import torch

from optprune.allocation import Allocation
from optprune.calibration import fisher_pass
from optprune.calibration.moments_pass import moments_work
from optprune.calibration.stream import SLOW, head_weights
from optprune.measure.clock import clock
from optprune.models import Decoder
from optprune.pruning.matching import descent_of
from optprune.recipe import Recipe
from optprune.recipe.allocator import allocator_of
from optprune.report.phases import BUDGET, CHECKING, LOADING, METRIC, PRUNING, SAVING, TOKENISING

WIDTH, TIMES = 512, 5
"""the width of the matrices whose product is timed, and how often it is"""
BYTES_PER_SECOND = 5e8
"""what a disk reads and writes"""
START = 3.0, 60.0
"""the least and the most seconds in which a process imports torch and transformers"""
CHARACTERS_PER_SECOND = 1e6
"""what a tokenizer reads"""


def expected_seconds(
    decoder: Decoder,
    recipe: Recipe,
    allocation: Allocation | None,
    tokens: int,
    characters: int,
    device: torch.device,
    *,
    started: float | None = None,
) -> dict[str, float]:
    """The seconds of every phase of a run from a folder and a text to a folder, by its name.

    `decoder` may be on the meta device; so many `tokens` are drawn from a text of so many `characters`. The process
    was `started` so many seconds ago, and has hardly done anything since but to import torch and transformers.
    """
    reading, writing = expected_reading(decoder, characters), expected_writing(decoder, started)
    return reading | expected_computing(decoder, recipe, allocation, tokens, device) | writing


def expected_reading(decoder: Decoder, characters: int) -> dict[str, float]:
    """The seconds in which a text of so many characters is tokenised and a model is loaded."""
    return {TOKENISING: 0.5 + characters / CHARACTERS_PER_SECOND, LOADING: 0.5 + 2 * _files(decoder)}


def expected_writing(decoder: Decoder, started: float | None = None) -> dict[str, float]:
    """The seconds in which a model is saved and checked by a process that starts as this one did."""
    start = min(max(time.process_time() if started is None else started, START[0]), START[1])
    return {SAVING: 0.5 + 2 * _files(decoder), CHECKING: start + _files(decoder)}


def expected_evaluation(decoder: Decoder, tokens: int, device: torch.device) -> float:
    """The seconds in which a model predicts so many tokens."""
    return SLOW * tokens * (decoder.linear_weights() + head_weights(decoder)) / products_per_second(device)


def _files(decoder: Decoder) -> float:
    """The seconds in which a disk reads or writes the weights."""
    return sum(weight.nbytes for weight in decoder.model.parameters()) / BYTES_PER_SECOND


def expected_computing(
    decoder: Decoder, recipe: Recipe, allocation: Allocation | None, tokens: int, device: torch.device
) -> dict[str, float]:
    """The seconds of the phases of `prune` by their names."""
    allocation = allocation or recipe.given
    if allocation is None and not recipe.sparsity:
        return dict.fromkeys((METRIC, BUDGET, PRUNING), 0.0)
    recipe, rate = recipe.settled(), products_per_second(device)
    work = {
        METRIC: _metric(decoder, recipe, tokens),
        BUDGET: allocator_of(recipe, allocation).work(decoder, tokens).flops / 2,
        PRUNING: _pruning(decoder, recipe, tokens),
    }
    return {phase: count / rate for phase, count in work.items()}


def products_per_second(device: torch.device) -> float:
    """The multiplications a second in a product of matrices, the best of a few."""
    matrix, best = torch.ones(WIDTH, WIDTH, device=device), math.inf
    for _ in range(TIMES):
        began = clock(device)
        torch.matmul(matrix, matrix)
        best = min(best, clock(device) - began)
    return WIDTH**3 / max(best, 1e-9)


def _metric(decoder: Decoder, recipe: Recipe, tokens: int) -> float:
    if recipe.metric is None:
        return 0.0
    full = recipe.units.whole_metric(decoder.architecture) if recipe.metric.kind == "full" else ()
    widest = recipe.metric.width or math.inf
    return fisher_pass.work(decoder, min(tokens, recipe.metric.tokens), full=full, widest=widest).flops / 2


def _pruning(decoder: Decoder, recipe: Recipe, tokens: int) -> float:
    work, solver = 0.0, recipe.layer_solver
    for block, shape in enumerate(decoder.shapes()):
        targets = recipe.units.candidates(decoder, block)
        passes, taps = 3 if recipe.policy.sequential else 2, {target.tap for target in targets}
        if recipe.matching is not None:
            passes += descent_of(recipe.matching).work(decoder.weights_of(shape)).passes
        work += SLOW * tokens * (passes - 1) * decoder.weights_of(shape)
        work += moments_work(decoder, block, taps, tokens).flops / 2
        for outputs, inputs in (decoder.layer(block, path).weight.shape for path in {each.path for each in targets}):
            # Two flops are a multiplication.
            work += 0.0 if solver is None else solver.work(outputs, inputs).flops / 2
    return work
