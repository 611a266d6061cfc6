"""Choices of units on instances small enough to enumerate: their cost over the least one, mean and worst.

    .venv/bin/python -m benchmarks.choices

Four kinds of inputs (`optprune.testing.strategies`), 14 units of which 4 to 7 go. Solvers are those of the
recipes as shipped. The cost is what a choice adds to the least loss of the layer, all kept weights refitted.
"""

import argparse
from itertools import combinations

import torch

from benchmarks.common import write_table
from optprune.problems import StructuredLeastSquares
from optprune.recipe import load_recipe
from optprune.solvers import Solver, solve
from optprune.testing.strategies import CHOICE_KINDS, choice_instance

RECIPES = ("spap", "spap_plus", "osscar", "fasp")


def costs(problem: StructuredLeastSquares) -> dict[tuple[int, ...], float]:
    """Return what every choice adds to the least loss, by the units it keeps."""
    gram, target = problem.loss.gram.double(), problem.loss.target.double()
    kept = torch.tensor(list(combinations(range(problem.channels.units), problem.keep)))
    blocks, rows = gram[kept[:, :, None], kept[:, None]], target.T[kept]
    gained = (rows * torch.linalg.solve(blocks, rows)).sum((1, 2)) / 2
    most = float((target.T * torch.linalg.solve(gram, target.T)).sum()) / 2
    return {tuple(units): most - gain for units, gain in zip(kept.tolist(), gained.tolist(), strict=True)}


def solver_of(recipe: str) -> Solver:
    found = load_recipe(recipe).layer_solver
    assert found is not None
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=100, help="of every kind")
    parser.add_argument("--units", type=int, default=14)
    parser.add_argument("--name", default="choices", help="of the table in results/")
    options = parser.parse_args()
    rows = []
    for kind in CHOICE_KINDS:
        problems = [choice_instance(kind, seed, units=options.units) for seed in range(options.instances)]
        every = [costs(problem) for problem in problems]
        for recipe in RECIPES:
            solutions = [solve(problem, solver_of(recipe)) for problem in problems]
            over = []
            for problem, solution, cost in zip(problems, solutions, every, strict=True):
                kept = tuple(problem.support(solution.value).nonzero()[:, 0].tolist())
                over.append(cost[kept] / min(cost.values()))
            shares = torch.tensor(over, dtype=torch.float64)
            rows.append(
                {
                    "inputs": kind,
                    "recipe": recipe,
                    "mean over the optimum": f"{float(shares.mean()):.5f}",
                    "worst": f"{float(shares.max()):.4f}",
                    "optimal": f"{float((shares < 1 + 1e-6).double().mean()):.0%}",
                    "seconds": sum(solution.seconds for solution in solutions) / len(solutions),
                }
            )
            print(rows[-1], flush=True)
    title = f"Choices over the exhaustive optimum: {options.instances} instances of {options.units} units of every kind"
    print(write_table(options.name, title, rows))


if __name__ == "__main__":
    main()
