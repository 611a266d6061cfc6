"""Layer reports: a solver's answer checked, measured again as it was written, and put into words."""

import time
from dataclasses import asdict

import torch
from torch import Tensor

from optprune.errors import NumericalError
from optprune.problems import Problem
from optprune.recipe import Recipe
from optprune.report import LayerReport
from optprune.solvers import Solution, Status


def check(solution: Solution, name: str) -> None:
    """Raise NumericalError where an answer is not finite or breaks the pattern."""
    if solution.status is Status.NONFINITE or not bool(torch.isfinite(solution.value).all()):
        raise NumericalError(f"{name}: {Status.NONFINITE.value}")
    if solution.violation > 0:
        raise NumericalError(f"{name}: the solver's answer breaks the pattern by {solution.violation:g}")


def layer_report(
    name: str,
    problem: Problem,
    solution: Solution,
    written: Tensor,
    held_out_error: float | None,
    recipe: Recipe,
    kept: int,
    total: int,
    began: float,
) -> LayerReport:
    """What there is to say of a layer: `written` is the weight as it stands in the model, `began` a perf_counter."""
    loss = problem.loss
    written = written.to(loss.weight)
    dead = int(loss.moments.dead.sum())
    notes = list(solution.notes)
    if solution.status is not Status.CONVERGED:
        notes.append(solution.status.value)
    if dead:
        notes.append(f"{dead} inputs were zero on every calibration token")
    if loss.moments.tokens < loss.moments.width:
        notes.append(f"fewer calibration tokens ({loss.moments.tokens}) than inputs ({loss.moments.width})")
    return LayerReport(
        name=name,
        kind=problem.kind,
        solver=recipe.solver.label if recipe.solver else "chosen by the problem",
        relative_error=loss.relative_error(written),
        held_out_error=held_out_error,
        status=solution.status.name.lower(),
        objective=solution.objective,
        lower_bound=None if solution.certificate is None else solution.certificate.lower_bound,
        gap=solution.gap,
        damping=float(loss.damping.mean()),
        tokens=loss.moments.tokens,
        seconds=time.perf_counter() - began,
        kept=kept,
        units=total,
        dead_inputs=dead,
        notes=tuple(notes),
        stages=tuple(asdict(record) for record in solution.history),
    )


def summary(layers: list[LayerReport]) -> tuple[str, ...]:
    """One sentence for each kind of note, with the number of layers it concerns."""
    count: dict[str, int] = {}
    for layer in layers:
        for note in layer.notes:
            kind = "".join("N" if character.isdigit() else character for character in note)
            count[kind] = count.get(kind, 0) + 1
    examples = {
        "".join("N" if character.isdigit() else character for character in note): note
        for layer in reversed(layers)
        for note in layer.notes
    }
    return tuple(f"{number} layers: {examples[kind]}" for kind, number in count.items())
