"""The ridge of recovery: its size is a share of the mean curvature, and the answer is that of the ridge problem."""

from itertools import count

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from optprune.calibration.calls import Calls
from optprune.pruning import prune, refinement
from optprune.pruning.refinement import InnerLayer, ModuleLoss, OutputLayer
from optprune.recipe import load_recipe
from tests.helpers.damaged_modules import PARTS, damaged, linearised
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches


def normal_equations(module: nn.Module, path: str, calls: Calls) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, H, -g) of half the error per token as a function of the nonzero weights of one layer."""
    mask, jacobian, change = linearised(module, path, calls)
    return mask, jacobian.T @ jacobian / calls.tokens, jacobian.T @ change / calls.tokens


@pytest.fixture
def every_step_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever it does on the tokens kept apart, which would otherwise stop a turn where the ridge is not met yet."""
    errors = count(-1, -1)
    for place in (OutputLayer, InnerLayer):
        monkeypatch.setattr(place, "held_out", lambda *_: float(next(errors)))


@torch.no_grad()
def step_of(name: str, path: str, layers: tuple[str, ...], turn: int, damping: float) -> tuple[Tensor, Tensor, Tensor]:
    """What one turn adds to the nonzero weights of a layer, with H and -g."""
    module, calls = damaged(name, path, layers, torch.float64)
    mask, hessian, slope = normal_equations(module, layers[turn], calls)
    layer: nn.Linear = module.get_submodule(layers[turn])  # type: ignore[assignment]
    start = layer.weight.clone()
    taken = refinement._Turn(ModuleLoss(module, calls, calls, None), 300, damping).take(layers[turn:], 0.0)
    assert taken is not None and taken.steps > 50
    return (layer.weight - start)[mask], hessian, slope


def ridge_in(step: Tensor, hessian: Tensor, slope: Tensor) -> float:
    """The ridge for which -g - H step = ridge step comes nearest to being true."""
    return float((slope - hessian @ step) @ step / (step @ step))


@pytest.mark.parametrize("damping", [0.05, 0.5])
@pytest.mark.parametrize("turn", [0, 1])
@pytest.mark.parametrize(("name", "path", "layers"), [PARTS[0], PARTS[1], PARTS[4]])
def test_a_turn_ends_at_the_answer_of_the_ridge_problem(
    name: str, path: str, layers: tuple[str, ...], turn: int, damping: float, every_step_is_taken: None
) -> None:
    step, hessian, slope = step_of(name, path, layers, turn, damping)
    size, ridge = len(hessian), ridge_in(step, hessian, slope)
    solved = np.linalg.solve((hessian + ridge * torch.eye(size).double()).numpy(), slope.numpy())
    # Hundreds of steps in float64 for a conditioning of at most size / damping.
    assert np.linalg.norm(solved - step.numpy()) <= 1e-7 * np.linalg.norm(solved)
    # The mean diagonal is estimated with one vector of signs, of variance 2 sum_{i != j} H_ij^2 / n^2: three of its
    # standard deviations.
    off = hessian - torch.diag(hessian.diagonal())
    spread = float((2 * off.square().sum()).sqrt()) / size
    assert abs(ridge - damping * float(hessian.diagonal().mean())) <= 3 * damping * spread


@pytest.mark.parametrize("turn", [0, 1])
def test_twice_the_damping_is_twice_the_ridge(turn: int, every_step_is_taken: None) -> None:
    once, twice = (ridge_in(*step_of("llama", "mlp", ("up_proj", "down_proj"), turn, each)) for each in (0.3, 0.6))
    assert twice == pytest.approx(2 * once, rel=1e-6)


@torch.no_grad()
def test_the_trace_of_the_first_tokens_is_a_mean_over_those(monkeypatch: pytest.MonkeyPatch) -> None:
    """<s, H s> with H the Hessian of the first batch alone, column by column."""
    module, calls = damaged("llama", "mlp", ("up_proj", "down_proj"), torch.float64)
    monkeypatch.setattr(refinement, "TRACE_TOKENS", 1)
    first = calls.first(1)
    assert first.tokens < calls.tokens
    mask, hessian, _ = normal_equations(module, "up_proj", first)
    signs = torch.randint(0, 2, mask.shape, generator=torch.Generator().manual_seed(2)).double() * 2 - 1
    inside = InnerLayer(ModuleLoss(module, calls, calls, None), ["up_proj", "down_proj"])
    expected = float(signs[mask] @ hessian @ signs[mask])
    assert inside.trace(torch.where(mask, signs, 0.0)) == pytest.approx(expected, rel=1e-9)


def test_the_recipe_says_how_large_the_ridge_is() -> None:
    """Where the ridge is all the curvature that counts, a step is -g / ridge: a tenth for ten times the damping."""

    def moved(damping: float) -> float:
        weights = []
        for rounds in (0, 1):
            model = tiny_llama(num_hidden_layers=1)
            recovery = {"rounds": rounds, "damping": damping} if rounds else "none"
            settings = {"refit": {"held_out": 0.25, "recovery": recovery}, "propagation": "dense"}
            prune(model, batches(8, 48), load_recipe("fasp", settings))
            weights.append(model.model.layers[0].mlp.up_proj.weight.detach())
        return float((weights[1] - weights[0]).norm())

    # No direction has more than fifty times the mean curvature, which is a twentieth of the smaller ridge.
    assert moved(1e3) == pytest.approx(10 * moved(1e4), rel=0.05)
