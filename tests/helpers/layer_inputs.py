"""What a layer sees in a model that runs as a whole, without our block runner."""

import torch
from torch import Tensor

from tests.helpers.token_batches import batches


def inputs_of(model: torch.nn.Module, name: str) -> Tensor:
    """The inputs of a layer of a whole model on all batches: [tokens, in], float64."""
    caught: list[Tensor] = []
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: caught.append(args[0].double()))
    with torch.no_grad():
        for batch in batches():
            model(batch, use_cache=False)
    handle.remove()
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in caught])


def check_wanda(pruned: torch.nn.Module, dense: torch.nn.Module, name: str) -> None:
    """A layer of the first block keeps, in every row, the half of |W_ij| times the norm of input j that is largest."""
    weight = dense.get_submodule(name).get_parameter("weight").detach()
    score = weight.double().abs() * inputs_of(dense, name).square().mean(0).sqrt()
    kept = torch.zeros_like(weight, dtype=torch.bool)
    kept.scatter_(1, score.argsort(1)[:, weight.shape[1] // 2 :], True)
    assert torch.equal(pruned.get_submodule(name).get_parameter("weight"), weight * kept)


def statistics(weight: Tensor, inputs: Tensor, ideal: Tensor) -> tuple[Tensor, Tensor]:
    """E[x* x*^T] and W E[x x*^T], from the samples."""
    return inputs.T @ inputs / len(inputs), weight.double() @ ideal.T @ inputs / len(inputs)


def apart(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> float:
    """The largest difference of an entry, as a share of the largest entry of the same matrix."""
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in zip(found, expected, strict=True))
