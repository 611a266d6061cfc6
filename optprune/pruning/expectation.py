"""What the phases of a run may take, from its recipe and the shapes of the model alone: a guess, put right on the way.

Passes of tokens through blocks, Gram products and factorisations are counted in multiplications, which a product of
matrices is timed for. How long solvers search is a rule of thumb. `TimeLeft` corrects all that once it sees work.
"""

import math
import time

import torch

from optprune.allocation import Allocation, Allocator, Depth, MeasuredBudget
from optprune.allocation.cost_work import SLOW, grams, head_weights
from optprune.calibration.fisher_pass import PASSES_BACK
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
        BUDGET: _budget(decoder, recipe, allocator_of(recipe, allocation), tokens),
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
    seen, widest, squares = min(tokens, recipe.metric.tokens), recipe.metric.width, 0
    whole = recipe.units.whole_metric(decoder.architecture) if recipe.metric.kind == "full" else ()
    for block in range(len(decoder.blocks)):
        for path in decoder.paths(block):
            outputs = decoder.layer(block, path).out_features
            squares += outputs**2 if path in whole and outputs <= (widest or outputs) else 0
    return SLOW * seen * ((1 + PASSES_BACK) * decoder.linear_weights() + 3 * head_weights(decoder) + squares)


def _budget(decoder: Decoder, recipe: Recipe, allocator: Allocator, tokens: int) -> float:
    blocks, weights = len(decoder.blocks), decoder.linear_weights()
    if isinstance(allocator, Depth):
        if allocator.score == "influence":
            return 2.0 * SLOW * tokens * weights
        # As many rounds as sub-blocks go, with a pass of half the model for each that is left, on average.
        parts = 2 * blocks
        gone = allocator.sparsity * parts
        return SLOW * min(tokens, allocator.tokens) * gone * (parts - gone / 2) * (weights / 2 + head_weights(decoder))
    return allocator.work(decoder, tokens) if isinstance(allocator, MeasuredBudget) else 0.0


def _pruning(decoder: Decoder, recipe: Recipe, tokens: int) -> float:
    work, solver = 0.0, recipe.layer_solver
    for block, shape in enumerate(decoder.shapes()):
        targets = recipe.units.candidates(decoder, block)
        passes, taps = 3 if recipe.policy.sequential else 2, {target.tap for target in targets}
        if recipe.matching is not None:
            passes += descent_of(recipe.matching).work(decoder.weights_of(shape)).passes
        work += SLOW * tokens * (passes * decoder.weights_of(shape) + grams(decoder, block, taps))
        for outputs, inputs in (decoder.layer(block, path).weight.shape for path in {each.path for each in targets}):
            # Two flops are a multiplication.
            work += 0.0 if solver is None else solver.work(outputs, inputs).flops / 2
    return work
