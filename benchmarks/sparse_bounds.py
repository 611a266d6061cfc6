"""How much of the optimum the perspective bound proves on real layers: the bound over the best objective known.

    .venv/bin/python -m benchmarks.sparse_bounds

Some rows of the first layer of every stage of three blocks of SmolLM2, at 50 percent and at 2:4, with the moments of
the dense model damped as recipes damp them. The best objective known is that of the recommended solver, so that the
optimum is between the two, and the share of it that is proved is no less than what is printed.
"""

import argparse
import time
from statistics import median

import torch

from benchmarks.common import write_table
from benchmarks.layers import layers, pattern
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.solvers import PerspectiveBound, solve


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--blocks", type=int, nargs="+", default=[2, 14, 26])
    parser.add_argument("--settings", nargs="+", default=["50%", "2:4"])
    parser.add_argument("--rows", type=int, default=16, help="how many rows of each layer, evenly spaced")
    parser.add_argument("--damping", type=float, default=0.01)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rows = []
    for name, weight, moments, _ in layers(options.samples, 1, options.seq_length, options.blocks, options.seed):
        some = torch.linspace(0, len(weight) - 1, min(options.rows, len(weight))).long()
        loss = LayerLoss.of(weight[some], moments, options.damping)
        for setting in options.settings:
            problem = SparseLeastSquares(loss, pattern(setting, loss.weight.numel()))
            best = solve(problem)
            began = time.perf_counter()
            bounded = solve(problem, PerspectiveBound(), start=best.value)
            seconds = time.perf_counter() - began
            assert bounded.certificate is not None
            share = bounded.certificate.lower_bound / best.objective
            rows.append({"layer": name, "setting": setting, "bound / best known": share, "seconds": seconds})
            print(rows[-1], flush=True)
    for setting in options.settings:
        shares = [float(row["bound / best known"]) for row in rows if row["setting"] == setting]
        rows.append({"layer": "median", "setting": setting, "bound / best known": median(shares), "seconds": 0.0})
    title = (
        f"The perspective bound on {options.rows} rows of layers of SmolLM2-135M-Instruct (blocks {options.blocks}, "
        f"the first layer of every stage): {options.samples * options.seq_length} calibration tokens of news, damping "
        f"{options.damping:g}, seed {options.seed}"
    )
    print(write_table("sparse_bounds", title, rows))


if __name__ == "__main__":
    main()
