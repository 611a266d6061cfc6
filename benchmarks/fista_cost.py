"""What a FISTA iteration costs over the bare matrix product.

.venv/bin/python -m benchmarks.fista_cost
"""

import time

import torch

from benchmarks.common import write_table
from optprune.moments import InputMoments
from optprune.penalties import L1
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers import Fista

SHAPES = ((1536, 576), (576, 1536), (4096, 4096))


def best_of(run, times: int) -> float:
    """The least seconds of several runs: noise only adds."""
    taken = []
    for _ in range(times):
        began = time.perf_counter()
        run()
        taken.append(time.perf_counter() - began)
    return min(taken)


def main() -> None:
    rows = []
    for outputs, inputs in SHAPES:
        generator = torch.Generator().manual_seed(0)
        sample = torch.randn(2 * inputs, inputs, generator=generator)
        weight = torch.randn(outputs, inputs, generator=generator)
        loss = LayerLoss.of(weight, InputMoments.from_samples(sample), 0.01)
        problem = PenalisedLeastSquares(loss, L1(0.01 * float(loss.target.abs().max())))
        solver, steps = Fista(), 20 if inputs < 4096 else 4
        repeats = 7 if inputs < 4096 else 3
        # The set-up (bound of the eigenvalue, step matrix) is the same for both, so it is subtracted.
        short = best_of(lambda s=solver, p=problem, w=weight: s.iterate(p, w, 0), repeats)
        long = best_of(lambda s=solver, p=problem, w=weight, n=steps: s.iterate(p, w, n), repeats)
        gram = loss.gram
        product = best_of(lambda g=gram, w=weight, n=steps: [w @ g for _ in range(n)], repeats) / steps
        step = (long - short) / steps
        rows.append(
            {
                "shape": f"[{outputs}, {inputs}]",
                "product, ms": 1e3 * product,
                "FISTA step, ms": 1e3 * step,
                "ratio": step / product,
            }
        )
        print(rows[-1], flush=True)
    print(write_table("fista_cost", "A FISTA iteration over the bare matrix product", rows))


if __name__ == "__main__":
    main()
