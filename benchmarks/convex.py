"""Seconds to a relative gap on l1 problems of real layers: ADMM, FISTA, coordinate descent, an interior-point method.

    python -m benchmarks.convex      # in an environment that also holds scikit-learn, skglm and cvxpy

Moments of SmolLM2 layers in the dense model, damped by 1 percent; the strength leaves half of the weights at zero.
One judge for all: (objective - bound) / objective in float64, where the bound is the Fenchel bound of an ADMM run to a
gap of 1e-9. Each method runs afresh at tolerances 1e-1, 1e-2 and so on, and the first answer within a gap counts.
ADMM and FISTA solve all rows at once, their own proof included; the others row by row, all rows or, with --rows, a
random sample of them, whose seconds are multiplied by (rows / sample); Clarabel one row. All but Clarabel start from
the dense weights; all have one thread; making the Gram matrix and its factor is free for the rivals.
"""

import argparse
import math
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec

import numpy as np
import torch
from torch import Tensor

from benchmarks.common import with_earlier, write_table
from benchmarks.layers import layers
from optprune.penalties import L1
from optprune.problems import LayerLoss, PenalisedLeastSquares
from optprune.solvers import Fista, ProximalAdmm, solve

GAPS = (1e-2, 1e-4, 1e-6)
TOLERANCES = tuple(10.0**-power for power in range(1, 11))
REFERENCE_GAP = 1e-9

MOST_STEPS = 2000

Run = Callable[[PenalisedLeastSquares], Iterator[tuple[float, Tensor]]]
"""answers of rising accuracy to a problem, each with the seconds that it took from the start"""


def ours(solver: type[Fista] | type[ProximalAdmm], problem: PenalisedLeastSquares) -> Iterator[tuple[float, Tensor]]:
    for tolerance in TOLERANCES:
        solution = solve(problem, solver(tolerance), max_steps=MOST_STEPS)
        yield solution.seconds, solution.value
        if solution.gap is None or solution.gap > tolerance:
            return  # a smaller tolerance gives the same answer


def scikit_learn(problem: PenalisedLeastSquares) -> Iterator[tuple[float, Tensor]]:
    from sklearn.linear_model import Lasso

    gram, data, targets, start, strength = as_regression(problem)
    for tolerance in TOLERANCES:
        model = Lasso(
            alpha=strength, fit_intercept=False, precompute=gram, tol=tolerance, max_iter=100_000, warm_start=True
        )
        model.coef_ = start.copy()
        began = time.perf_counter()
        model.fit(data, targets)
        yield time.perf_counter() - began, torch.from_numpy(np.atleast_2d(model.coef_))


def skglm(problem: PenalisedLeastSquares) -> Iterator[tuple[float, Tensor]]:
    from skglm import penalties
    from skglm.datafits import QuadraticHessian
    from skglm.solvers import AndersonCD
    from skglm.utils.jit_compilation import compiled_clone

    loss = problem.loss
    gram = np.asfortranarray(loss.gram.double().numpy())
    linear, start = -loss.target.double().numpy(), loss.weight.double().numpy()
    datafit, penalty = compiled_clone(QuadraticHessian()), compiled_clone(penalties.L1(problem.penalty.strength))
    scale = float(np.abs(linear).max())

    def answers(rows: int, **options) -> np.ndarray:
        solver = AndersonCD(fit_intercept=False, ws_strategy="fixpoint", **options)
        pairs = zip(linear[:rows], start[:rows], strict=True)
        return np.stack([solver.solve(gram, b, datafit, penalty, w.copy(), gram @ w)[0] for b, w in pairs])

    answers(1, max_iter=2, tol=0.0)  # compiles
    for tolerance in TOLERANCES:
        began = time.perf_counter()
        value = answers(len(linear), max_iter=1000, tol=tolerance * scale)
        yield time.perf_counter() - began, torch.from_numpy(value)


def clarabel(problem: PenalisedLeastSquares) -> Iterator[tuple[float, Tensor]]:
    import cvxpy

    _, data, targets, _, strength = as_regression(problem)
    data, targets = data / math.sqrt(len(data)), targets / math.sqrt(len(data))
    began = time.perf_counter()
    rows = []
    for target in targets.T:
        row = cvxpy.Variable(data.shape[1])
        program = cvxpy.Minimize(cvxpy.sum_squares(data @ row - target) / 2 + strength * cvxpy.norm1(row))
        cvxpy.Problem(program).solve(solver=cvxpy.CLARABEL)
        rows.append(row.value)
    yield time.perf_counter() - began, torch.from_numpy(np.stack(rows))


def as_regression(problem: PenalisedLeastSquares):
    """The Gram matrix times n, data [n = in, in], targets [n, out] with |y - X v|^2 / 2n = f + constant; start; l1."""
    loss = problem.loss
    factor = np.linalg.cholesky(loss.gram.double().numpy())
    n = len(factor)
    data = np.asfortranarray(math.sqrt(n) * factor.T)
    targets = math.sqrt(n) * np.linalg.solve(factor, loss.target.double().numpy().T)
    return data.T @ data, data, targets, loss.weight.double().numpy(), problem.penalty.strength


RIVALS: dict[str, tuple[Run, str, str, int | None]] = {
    "scikit-learn Lasso(precompute)": (scikit_learn, "sklearn", "scikit-learn", None),
    "skglm AndersonCD(QuadraticHessian)": (skglm, "skglm", "skglm", None),
    "cvxpy with Clarabel": (clarabel, "cvxpy", "cvxpy", 1),
}
"""by name: how it runs, the module it needs, its distribution, and how many rows it solves where it is few"""


def half_zeros(loss: LayerLoss) -> L1:
    """The l1 penalty at which half of the weights are zero, by bisection."""
    high = float(loss.target.abs().max())
    low = 1e-7 * high
    start = loss.weight
    for _ in range(14):
        strength = math.sqrt(low * high)
        start = solve(PenalisedLeastSquares(loss, L1(strength)), ProximalAdmm(1e-3), start=start).value
        zeros = float((start == 0).float().mean())
        if abs(zeros - 0.5) < 0.01:
            break
        low, high = (strength, high) if zeros < 0.5 else (low, strength)
    return L1(strength)


def some_rows(problem: PenalisedLeastSquares, count: int) -> PenalisedLeastSquares:
    """The problem of a random sample of the rows: rows of an l1 problem are independent."""
    chosen = torch.randperm(len(problem.loss.weight), generator=torch.Generator().manual_seed(0))[:count]
    return replace(problem, loss=replace(problem.loss, weight=problem.loss.weight[chosen]))


def first_to_reach(
    run: Run, problem: PenalisedLeastSquares, judge: PenalisedLeastSquares, bound: float
) -> dict[float, float]:
    """The seconds of the first answer that the judge finds within each gap; absent where none is."""
    reached: dict[float, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a rival that stops before its tolerance is judged all the same
        for seconds, value in run(problem):
            objective = judge.objective(value.double())
            gap = (objective - bound) / objective
            reached |= {wanted: seconds for wanted in GAPS if gap <= wanted and wanted not in reached}
            if len(reached) == len(GAPS):
                break
    return reached


def bound_of(problem: PenalisedLeastSquares) -> float:
    solution = solve(problem, ProximalAdmm(REFERENCE_GAP))
    assert solution.certificate is not None
    print(f"  judge's own gap {solution.gap:.1e} after {solution.steps} steps", flush=True)
    return solution.certificate.lower_bound


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--block", type=int, default=14)
    parser.add_argument("--rows", type=int, help="how many rows coordinate descent solves; default: all")
    parser.add_argument("--without", nargs="+", default=[], help="rivals to leave out: cvxpy, skglm, scikit-learn")
    parser.add_argument("--layers", nargs="+", default=["q_proj", "up_proj", "down_proj"])
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = layers(options.samples, 1, options.seq_length, [options.block], 0, first=False)
    rows = []
    for name, weight, moments, _ in found:
        if name.rsplit(".", 1)[1] not in options.layers:
            continue
        single = LayerLoss.of(weight, moments, 0.01)
        penalty = half_zeros(single)
        # Everyone solves the same numbers: the float32 moments, exactly, in float64.
        double = replace(
            single, weight=single.weight.double(), moments=moments.to(torch.float64), damping=single.damping.double()
        )
        exact = PenalisedLeastSquares(double, penalty)
        bound = bound_of(exact)
        shape = f"{name.rsplit('.', 1)[1]} {list(weight.shape)}"
        for dtype, loss in (("float32", single), ("float64", double)):
            for solver in (ProximalAdmm, Fista):
                reached = first_to_reach(partial(ours, solver), PenalisedLeastSquares(loss, penalty), exact, bound)
                add(rows, shape, f"optprune {solver.__name__}, {dtype}", "all", reached, 1.0)
        for rival, (run, module, _, few) in RIVALS.items():
            if find_spec(module) is None or rival.split()[0] in options.without:
                continue
            count = min(few or options.rows or len(weight), len(weight))
            part = exact if count == len(weight) else some_rows(exact, count)
            reached = first_to_reach(run, part, part, bound if part is exact else bound_of(part))
            add(rows, shape, rival, "all" if part is exact else str(count), reached, len(weight) / count)
    used = [rival for rival, (_, module, _, _) in RIVALS.items() if find_spec(module) is not None]
    versions = ", ".join(f"{RIVALS[rival][2]} {version(RIVALS[rival][2])}" for rival in used)
    title = (
        f"Seconds to a relative gap on l1 problems with half of the weights zero (block {options.block} of "
        f"SmolLM2-135M-Instruct, {options.samples * options.seq_length} tokens, damping 0.01); seconds of "
        f"some rows are extrapolated to all; {versions}"
    )
    rows = with_earlier("convex", rows, ["layer", "solver"])
    print(write_table("convex", title, rows))


def add(rows: list, shape: str, solver: str, solved: str, reached: dict[float, float], factor: float) -> None:
    seconds = {f"gap {gap:.0e}": reached[gap] * factor if gap in reached else "not reached" for gap in GAPS}
    rows.append({"layer": shape, "solver": solver, "rows solved": solved, **seconds})
    print(rows[-1], flush=True)


if __name__ == "__main__":
    main()
