"""Structured solvers on the MLPs of a real model: error on calibration and on held-out tokens, seconds, gap.

    .venv/bin/python -m benchmarks.structured_layers

Moments of SmolLM2's down projections in the dense model: calibrated on one half of the news articles, held out from
the other. Every solver gets the same damped loss (1 percent of the mean diagonal); errors are without damping, the
objective is with it. Every choice is refitted, except where the name says otherwise.
"""

import argparse
from collections import defaultdict
from statistics import mean, median

from benchmarks.common import write_table
from benchmarks.layers import layers
from optprune.problems import Channels, LayerLoss, StructuredLeastSquares
from optprune.recipe import load_recipe
from optprune.solvers import Chain, FlapMetric, Magnitude, Random, RemovalBound, Restore, Solver, solve

RECIPES = ("fasp", "spap", "spap_plus", "osscar", "flap")


def solvers() -> dict[str, Solver]:
    """By name: the structured recipes' chains, and the plainest choices with the same refit."""
    chains = {name: load_recipe(name).layer_solver for name in RECIPES}
    named = {name: solver for name, solver in chains.items() if solver is not None}
    named = {{"osscar": "greedy, one at a time", "flap": "flap, not refitted"}.get(k, k): v for k, v in named.items()}
    plain = {"flap": FlapMetric(), "magnitude": Magnitude(), "random": Random()}
    return {**named, **{name: Chain((choice, Restore())) for name, choice in plain.items()}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--held-out", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=list(range(30)))
    parser.add_argument("--removed", type=float, nargs="+", default=[0.2, 0.4], help="shares of the units")
    parser.add_argument("--solvers", nargs="+", default=list(solvers()))
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--bound", action="store_true", help="also bound the optimum: seconds for every layer")
    parser.add_argument("--name", default="structured_layers", help="of the table in results/")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    found = [
        layer
        for layer in layers(options.samples, options.held_out, options.seq_length, options.blocks, options.seed)
        if layer[0].endswith("mlp.down_proj")
    ]
    rows = []
    for removed in options.removed:
        seen: dict[str, dict[str, list[float]]] = {name: defaultdict(list) for name in options.solvers}
        for _, weight, moments, apart in found:
            loss, width = LayerLoss.of(weight, moments, options.damping), weight.shape[1]
            groups = Channels.of(width, device=loss.weight.device)
            problem = StructuredLeastSquares(loss, groups, round(width * (1 - removed)))
            bound = None
            if options.bound:
                bound = solve(problem, RemovalBound()).certificate
            for name in options.solvers:
                solution = solve(problem, solvers()[name])
                measured = {
                    "error on calibration": loss.relative_error(solution.value),
                    "error on held-out": LayerLoss.of(weight, apart).relative_error(solution.value),
                    "objective / signal": 2 * solution.objective / loss.signal,
                    "seconds": solution.seconds,
                }
                if bound is not None:
                    measured["gap"] = 1 - bound.lower_bound / solution.objective
                for key, value in measured.items():
                    seen[name][key].append(value)
        for name, values in seen.items():
            means = {key: mean(of) for key, of in values.items()}
            middle = {"gap, median": median(values["gap"])} if options.bound else {}
            rows.append({"units removed": f"{removed:.0%}", "solver": name, **means, **middle})
            print(rows[-1], flush=True)
    tokens = options.samples * options.seq_length
    title = (
        f"Structured solvers on the MLPs of blocks {options.blocks[0]} to {options.blocks[-1]} ({len(found)}) of "
        f"SmolLM2-135M-Instruct, means: {tokens} calibration tokens of news, "
        f"{options.held_out * options.seq_length} held out, damping {options.damping:g}, seed {options.seed}"
    )
    print(write_table(options.name, title, rows))


if __name__ == "__main__":
    main()
