"""The experts of one block: which are kept, by what the mixture answers without the rest to the tokens that it gets."""

import time

import torch

from optprune.calibration.calls import Calls, expert_choice
from optprune.errors import StrictError
from optprune.models import Decoder
from optprune.recipe import Recipe
from optprune.report import LayerReport
from optprune.solvers.experts import choose_experts

FEW = 32
"""fewer tokens than these say little of an expert"""


def remove_experts(decoder: Decoder, index: int, keep: int, recipe: Recipe, fit: Calls, apart: Calls) -> LayerReport:
    """Choose `keep` experts of a block by what it is called with, delete the others, and say how well that went.

    The tokens are the first of those to `fit`, as many as `expert_choice` takes; those `apart` only measure the choice.
    """
    began, solver, mixture = time.perf_counter(), recipe.expert_solver, decoder.architecture.mixture
    assert mixture is not None
    name, problem = decoder.name(index, mixture.experts), expert_choice(decoder, index, fit, keep)
    found = choose_experts(problem, solver)
    held_out = None
    if apart.tokens:
        held_out = expert_choice(decoder, index, apart, keep).relative_error(found.kept)
    every = torch.ones_like(found.kept)
    reached = (problem.weights(every) > 0).sum(0)
    few = [f"{expert} ({int(count)})" for expert, count in enumerate(reached) if count < FEW]
    notes = (f"few calibration tokens reach some experts: {', '.join(few[:4])}",) if few else ()
    if recipe.strict and notes:
        raise StrictError(f"{name}: {notes[0]} (strict mode makes this an error)")
    decoder.keep_experts(index, found.kept)
    return LayerReport(
        name=name,
        kind=problem.kind,
        solver=solver.label,
        relative_error=problem.relative_error(found.kept),
        held_out_error=held_out,
        status="converged",
        objective=found.objective,
        lower_bound=found.lower_bound,
        gap=None if found.lower_bound is None else 0.0,
        damping=0.0,
        tokens=problem.tokens,
        seconds=time.perf_counter() - began,
        kept=keep,
        units=problem.experts,
        dead_inputs=int((reached == 0).sum()),
        notes=notes,
    )
