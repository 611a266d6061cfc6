"""Resolution of a request and the model's shapes to the program of a run."""

from dataclasses import replace
from typing import Any

import torch

from optprune.calibration import POLICIES
from optprune.models import Decoder, stored_dtype, vision_folder
from optprune.objectives import OBJECTIVES
from optprune.program.check import check
from optprune.program.method import Method, Request
from optprune.program.program import Program
from optprune.recipe import allocator_of
from optprune.system.own_code import own_code


@own_code()
def resolve(shapes: Decoder, request: Request) -> Program:
    """Return the program of a request on a model, of which shapes are enough; it may be on the meta device.

    InputError where the two do not go together, and NoSolver where the solver refuses the problems of the layers;
    OwnCodeError where code of the user's own fails.
    """
    recipe = request.recipe.within(shapes)
    allocation = request.allocation or recipe.given
    # Without anything to change there is nothing to measure, weigh or refit.
    idle = not recipe.sparsity and allocation is None and recipe.bits is None
    refit = None if idle else recipe.refit
    method = Method(
        objective=recipe.objective or OBJECTIVES[recipe.units.objective],
        solver=recipe.layer_solver,
        expert_solver=recipe.expert_solver,
        damping=recipe.damping,
        fit_bias=recipe.fit_bias,
        permuted=recipe.permuted and not idle,
        dampings=() if refit is None else refit.dampings,
        recovery=None if refit is None else refit.recovery,
        grid_solver=None if recipe.bits is None else recipe.bits.solver,
        strict=recipe.strict,
    )
    units = recipe.units
    if recipe.bits is not None:
        units = units.on_grid(recipe.bits.grid.within(request.dtype))
    program = Program(
        request=replace(request, allocation=allocation),
        decoder=shapes,
        allocator=allocator_of(recipe, allocation),
        units=units,
        policy=POLICIES["dense"] if idle else recipe.propagation,
        method=method,
        sparsity=recipe.sparsity,
        seed=recipe.seed,
        metric=None if idle else recipe.metric,
        held_out=0.0 if refit is None else refit.held_out,
    )
    return replace(program, notes=check(program))


def places_of(source: str, shapes: Decoder, device: str, dtype: str) -> dict[str, Any]:
    """Return the fields of a Request for a device and a dtype as commands name them."""
    gpu = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    whole = vision_folder(source) if shapes.architecture.part_of else None
    return {
        "around": 0 if whole is None else whole.bytes_around(),
        "features": 1 if whole is None else whole.features(),
        "dtype": stored_dtype(source, shapes.model.config, dtype) or torch.float32,
        "device": "cuda" if gpu else "cpu",
        "devices": max(1, torch.cuda.device_count()) if gpu else 1,
    }
