"""The experts of one block: which are kept, by what the mixture answers without the rest to the tokens that it gets."""

import time
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.errors import StrictError
from optprune.models import Decoder
from optprune.models.mixture import SeparateExperts, experts_in
from optprune.problems import ExpertChoice
from optprune.recipe import Recipe
from optprune.report import LayerReport
from optprune.solvers.experts import choose_experts

MOST_PRODUCTS = 2**26
"""the products of answers that are held of a block: of 8 experts those of a million tokens, of 128 those of 4096"""
FEW = 32
"""fewer tokens than these say little of an expert"""


@dataclass(frozen=True, eq=False)
class Routed:
    """What a router and all experts of a mixture make of some tokens."""

    logits: Tensor
    """[tokens, experts]"""
    products: Tensor
    """[tokens, experts, experts]"""


def remove_experts(decoder: Decoder, index: int, keep: int, recipe: Recipe, fit: Calls, apart: Calls) -> LayerReport:
    """Choose `keep` experts of a block by what it is called with, delete the others, and say how well that went.

    The tokens are the first of those to `fit`, as many as MOST_PRODUCTS allows; those `apart` only measure the choice.
    """
    began, solver, mixture = time.perf_counter(), recipe.expert_solver, decoder.architecture.mixture
    assert mixture is not None
    config = decoder.model.config
    chosen = int(config.num_experts_per_tok), mixture.normalised(config), keep
    block, name = decoder.blocks[index], decoder.name(index, mixture.experts)
    routed = routed_tokens(block, decoder, fit)
    problem = ExpertChoice(routed.logits, routed.products, *chosen)
    found = choose_experts(problem, solver)
    held_out = None
    if len(apart.targets):
        others = routed_tokens(block, decoder, apart)
        held_out = ExpertChoice(others.logits, others.products, *chosen).relative_error(found.kept)
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


@torch.no_grad()
def routed_tokens(block: nn.Module, decoder: Decoder, calls: Calls) -> Routed:
    """What the router and every expert of a block make of the tokens that its mixture is called with."""
    mixture = decoder.architecture.mixture
    assert mixture is not None
    experts, router = experts_in(block, mixture), block.get_submodule(mixture.router)
    assert isinstance(experts, SeparateExperts)
    left, logits, products = MOST_PRODUCTS // experts.count**2, list[Tensor](), list[Tensor]()
    for _, args, _, _ in calls.each():
        tokens = args[0].reshape(-1, args[0].shape[-1])[:left]
        left -= len(tokens)
        if not len(tokens):
            break
        logits.append(router(tokens)[0])
        answers = torch.stack([experts.outputs(tokens, number) for number in range(experts.count)], 1).float()
        products.append(answers @ answers.mT)
    return Routed(torch.cat(logits), torch.cat(products))
