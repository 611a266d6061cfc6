"""The workspace of a whole solve: its peak memory beside the weight, the moments and the metric, as a formula.

    .venv/bin/python -m benchmarks.workspace --recipes fasp alps --predict 4096 14336

A problem is stated as `prune` states it, from float32 moments of random inputs, with the metric that the recipe asks
for; then it is solved, refitted and measured. Each solve is a process of its own, in which memory goes back to the
system as soon as it is freed; its peak is the largest resident size that Linux tells. Over a few shapes [out, in] the
peaks give the bytes of a in^2 + b in out + c out^2, by least squares with no negative term. With --shape one shape is
measured, and no formula fitted.
"""

import argparse
import json
import os
import subprocess
import sys

import torch

from optprune import Recipe, load_recipe
from optprune.measure.memory import memory_increase
from optprune.metric import OutputMetric
from optprune.moments import InputMoments
from optprune.objectives import LayerContext
from optprune.problems import Channels, LayerLoss
from optprune.solvers import solve
from optprune.solvers.ridge import refit

RECIPES = ("fasp", "alps", "sparse_best", "structured_best")
SHAPES = ((256, 1536), (512, 1536), (1024, 1024), (1536, 512), (384, 1792))
"""[out, in], far enough apart to tell the three terms from each other"""
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--predict", type=int, nargs=2, metavar=("OUT", "IN"), default=[4096, 14336])
    parser.add_argument("--shape", type=int, nargs=2, metavar=("OUT", "IN"), help="measure this shape alone")
    parser.add_argument("--run", nargs=3, metavar=("RECIPE", "OUT", "IN"), help="what a process of its own does")
    options = parser.parse_args()
    if options.run:
        name, out, width = options.run
        print(json.dumps(workspace(load_recipe(name), int(out), int(width))))
        return
    if options.shape:
        for name in options.recipes:
            print(f"{name} {options.shape}: {measured(name, *options.shape) / MIB:.0f} MiB", flush=True)
        return
    out, width = options.predict
    print(f"| recipe | in^2 | in out | out^2 | largest residual | [{out}, {width}], GB |\n|---|---|---|---|---|---|")
    for name in options.recipes:
        (a, b, c), residual = formula({shape: measured(name, *shape) for shape in SHAPES})
        predicted = (a * width**2 + b * width * out + c * out**2) / 1e9
        print(f"| {name} | {a:.1f} | {b:.1f} | {c:.1f} | {residual:.1%} | {predicted:.2f} |", flush=True)


def measured(name: str, out: int, width: int) -> int:
    """The peak of one solve, in bytes, in a process of its own."""
    # The C library would keep what is freed below a size that grows: that is no workspace.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(64 * 1024), "OMP_NUM_THREADS": "1"}
    words = [sys.executable, "-m", "benchmarks.workspace", "--run", name, str(out), str(width)]
    return int(subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def formula(peaks: dict[tuple[int, int], int]) -> tuple[tuple[float, float, float], float]:
    """The bytes over in^2, in out and out^2 that fit the peaks best, and the largest share that is left of a peak."""
    terms = torch.tensor([(width * width, width * out, out * out) for out, width in peaks], dtype=torch.float64)
    known = torch.tensor(list(peaks.values()), dtype=torch.float64)
    # Shares of each peak count, so that large shapes do not decide alone.
    relative = terms / known[:, None]
    choices: list[tuple[float, torch.Tensor]] = []
    for used in ([0], [1], [2], [0, 1], [0, 2], [1, 2], [0, 1, 2]):
        found = torch.zeros(3, dtype=torch.float64)
        found[used] = torch.linalg.lstsq(relative[:, used], torch.ones_like(known)[:, None]).solution[:, 0]
        if bool((found >= 0).all()):
            choices.append((float((relative @ found - 1).square().sum()), found))
    _, best = min(choices, key=lambda choice: choice[0])
    a, b, c = best.tolist()
    return (a, b, c), float((relative @ best - 1).abs().max())


def workspace(recipe: Recipe, out: int, width: int) -> int:
    """The peak of stating, solving, refitting and measuring one layer, in bytes beside what is given."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(width, width // 4, generator=generator)

    def moments(tokens: int) -> InputMoments:
        inputs = torch.randn(tokens, width // 4, generator=generator) @ mixing.T
        return InputMoments.from_samples(inputs + torch.randn(tokens, width, generator=generator))

    given, apart = moments(2 * width), moments(width // 4)
    weight = torch.randn(out, width, generator=generator) / width**0.5
    metric = None
    if recipe.metric is not None:
        metric = OutputMetric.from_samples(torch.randn(2 * out, out, generator=generator) / out)
        metric = metric.damped(recipe.metric.damping)
    # What a library keeps for itself comes with its first use.
    _whole_solve(recipe, weight[:8, :64].clone(), InputMoments.from_samples(torch.randn(128, 64)), None, None)
    peak = memory_increase(
        torch.device("cpu"), lambda: _whole_solve(recipe, weight, given, metric, apart if recipe.refit else None)
    )
    assert peak is not None, "this system does not tell a peak"
    return peak


def _whole_solve(
    recipe: Recipe, weight: torch.Tensor, moments: InputMoments, metric: OutputMetric | None, apart: InputMoments | None
) -> None:
    out, width = weight.shape
    loss = LayerLoss.of(weight, moments, recipe.damping, metric=metric)
    family = recipe.units.family
    if family is None:
        context = LayerContext("layer", 0, loss, round((1 - recipe.sparsity) * width), Channels.of(width))
    else:
        keep, pattern = family.keep(out, width, 1 - recipe.sparsity), family.of(out, width, 1 - recipe.sparsity)
        context = LayerContext("layer", 0, loss, keep, None, pattern)
    problem = recipe.state(context)
    solution = solve(problem, recipe.layer_solver)
    if apart is not None and recipe.refit is not None and recipe.refit.dampings:
        refitted = refit(problem, solution, apart, recipe.refit.dampings, recipe.layer_solver)
        problem, solution = refitted.problem, refitted.solution
    problem.loss.relative_error(solution.value)


if __name__ == "__main__":
    main()
