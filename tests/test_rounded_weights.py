"""Layers of a 16-bit model: a bias goes with the weight as it was rounded, not with the one before rounding."""

import copy

import pytest
import torch
from torch import Tensor, nn

from optprune.objectives import LayerContext
from optprune.problems import MaskedLeastSquares, Problem
from optprune.pruning import prune
from optprune.recipe import Recipe
from tests.test_pipeline import batches, inputs_of
from tests.tiny_models import tiny_opt


def large_mean(model: nn.Module) -> nn.Module:
    """The inputs of queries, keys and values are about four, so that a rounding of many weights adds up."""
    with torch.no_grad():
        for block in model.model.decoder.layers:
            block.self_attn_layer_norm.bias.add_(4.0)
    return model


def half_of_each_row(context: LayerContext) -> Problem:
    size = context.loss.weight.abs()
    return MaskedLeastSquares(context.loss, size > size.median(1, keepdim=True).values)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_mean_output_is_kept_up_to_the_rounding_of_the_bias(dtype: torch.dtype) -> None:
    dense = large_mean(tiny_opt()).to(dtype)
    model = copy.deepcopy(dense)
    prune(model, batches(), Recipe(objective=half_of_each_row, units="weights", sparsity=0.5, propagation="dense"))

    def mean_output(layer: nn.Linear, inputs: Tensor) -> Tensor:
        return inputs.mean(0) @ layer.weight.detach().double().T + layer.bias.detach().double()

    worst = 0.0
    for block in range(2):
        for path in ("q_proj", "k_proj", "v_proj"):
            name = f"model.decoder.layers.{block}.self_attn.{path}"
            old, new = dense.get_submodule(name), model.get_submodule(name)
            assert not torch.equal(old.bias, new.bias)
            inputs = inputs_of(dense, name)
            drift = mean_output(new, inputs) - mean_output(old, inputs)
            # Half a unit in the last place of the bias; and what float32 averages of numbers of about four lose.
            rounding = torch.finfo(dtype).eps / 2 * new.bias.detach().double().abs()
            assert (drift.abs() <= rounding + 1e-5).all()
            worst = max(worst, float((drift.abs() / rounding).max()))
    # The bound is no idle one.
    assert worst > 0.5
