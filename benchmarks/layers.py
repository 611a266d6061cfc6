"""Sparse solvers on real layers: relative error on calibration and on held-out tokens, and seconds.

    .venv/bin/python -m benchmarks.layers
    .venv/bin/python -m benchmarks.layers --starts --blocks 14     # FISTAPruner and ours from several starts

Moments of SmolLM2 layers in the dense model: calibrated on one half of the news articles, held out from the other.
Every solver gets the same damped loss (1 percent of the mean diagonal); errors are without damping.
"""

import argparse
import time
from collections import defaultdict

import torch

from benchmarks.common import setting, write_table
from optprune.calibration import Stream, calibrating, first_inputs
from optprune.calibration.moments_pass import collect
from optprune.models import Decoder
from optprune.moments import InputMoments
from optprune.patterns import NM, Pattern, Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.recipe import load_recipe
from optprune.solvers import (
    Chain,
    ConjugateGradients,
    FistaPruner,
    HardThreshold,
    PerspectiveBound,
    Solver,
    SparseGpt,
    Wanda,
    solve,
)

RECIPES = ("magnitude", "wanda", "sparsegpt", "alps", "alps_plus", "fistapruner", "fistapruner_plus")
SETTINGS = ("50%", "60%", "70%", "2:4")


def solvers() -> dict[str, Solver]:
    """By name: every sparse recipe's chain, and iterative hard thresholding."""
    chains = {name: load_recipe(name).layer_solver for name in RECIPES}
    known = {name: solver for name, solver in chains.items() if solver is not None}
    refit = ConjugateGradients()
    return {**known, "hard thresholding": Chain((Wanda(), refit, HardThreshold(), refit))}


def pattern(name: str, weights: int) -> Pattern:
    if name == "2:4":
        return NM(2, 4)
    return Unstructured(round(weights * (1 - float(name.rstrip("%")) / 100)))


def layers(samples: int, held_out: int, seq_length: int, blocks: list[int], seed: int, *, first: bool = True):
    """(name, weight, calibration moments, held-out moments) of the first layer of every stage, or of all layers."""
    here = setting(samples, seq_length, held_out, seed)
    decoder = Decoder(here.loaded.model)
    apart = [window[None] for window in here.windows]
    found = []
    with calibrating(decoder):
        stream = first_inputs(decoder, [*here.batches, *apart])
        for index in range(max(blocks) + 1):
            following: Stream = stream.copy()
            taps = [stage[0] for stage in decoder.architecture.stages] if index in blocks else []
            seen = collect(decoder.blocks[index], stream, taps, held_out=len(apart), output=following)
            for stage in decoder.architecture.stages if index in blocks else ():
                tap = stage[0]
                for path in stage[:1] if first else stage:
                    weight = decoder.layer(index, path).weight.detach().clone()
                    found.append((decoder.name(index, path), weight, seen.moments[tap], seen.held_out[tap]))
            stream = following
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14, 26])
    parser.add_argument("--settings", nargs="+", default=list(SETTINGS))
    parser.add_argument("--solvers", nargs="+", default=list(solvers()))
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--bound-steps", type=int, default=0, help="also bound the optimum (slow)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--starts", action="store_true", help="only FISTAPruner and fistapruner_plus, by their start")
    options = parser.parse_args()
    found = layers(options.samples, options.held_out, options.seq_length, options.blocks, options.seed)
    if options.starts:
        print(write_table("layers_starts", title(found, options), by_start(found, options)))
        return
    rows = []
    for name in options.settings:
        for solver in options.solvers:
            sums: dict[str, float] = defaultdict(float)
            for _, weight, moments, apart in found:
                for key, value in measure(weight, moments, apart, name, solvers()[solver], options).items():
                    sums[key] += value / len(found)
            rows.append({"setting": name, "solver": solver, **sums})
            print(rows[-1], flush=True)
    print(write_table("layers", title(found, options), rows))


def title(found, options) -> str:
    tokens = options.samples * options.seq_length
    return (
        f"Sparse solvers on {len(found)} layers of SmolLM2-135M-Instruct (blocks {options.blocks}, the first layer of "
        f"every stage), means: {tokens} calibration tokens of news, {options.held_out * options.seq_length} held out, "
        f"damping {options.damping:g}, seed {options.seed}"
    )


def by_start(found, options) -> list[dict[str, float | str]]:
    """The objective over the signal from a zero start, Wanda's answer and SparseGPT's, by setting and layer."""
    rows: list[dict[str, float | str]] = []
    plus = solvers()["fistapruner_plus"]
    for name in options.settings:
        for layer, weight, moments, _ in found:
            loss = LayerLoss.of(weight, moments, options.damping)
            problem = SparseLeastSquares(loss, pattern(name, weight.numel()))
            starts = {
                "zero": torch.zeros_like(loss.weight),
                "wanda": solve(problem, Wanda()).value,
                "sparsegpt": solve(problem, SparseGpt()).value,
            }
            for label, solver in (("fistapruner", FistaPruner()), ("fistapruner_plus", plus)):
                ends = {
                    key: 2 * solve(problem, solver, start=start).objective / loss.signal
                    for key, start in starts.items()
                }
                spread = max(ends.values()) / min(ends.values()) - 1
                rows.append({"setting": name, "layer": layer, "solver": label, **ends, "spread": spread})
                print(rows[-1], flush=True)
    return rows


def measure(weight, moments: InputMoments, apart: InputMoments, name: str, solver: Solver, options) -> dict[str, float]:
    loss = LayerLoss.of(weight, moments, options.damping)
    problem = SparseLeastSquares(loss, pattern(name, weight.numel()))
    began = time.perf_counter()
    solution = solve(problem, solver)
    seconds = time.perf_counter() - began
    measured = {
        "error on calibration": loss.relative_error(solution.value),
        "error on held-out": LayerLoss.of(weight, apart).relative_error(solution.value),
        "objective / signal": 2 * solution.objective / loss.signal,
        "seconds": seconds,
    }
    if options.bound_steps:
        bounded = solve(problem, PerspectiveBound(options.bound_steps), start=solution.value)
        measured["gap"] = bounded.gap if bounded.gap is not None else float("nan")
    return measured


if __name__ == "__main__":
    main()
