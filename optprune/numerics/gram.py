"""X^T X on tensor cores: products of bfloat16 numbers are exact in float32, in which they are added up."""

import torch
from jaxtyping import BFloat16, Float32
from torch import Tensor

from optprune.numerics.precision import full_precision

PRODUCTS = {1: ((0, 0),), 2: ((0, 0), (0, 1), (1, 1)), 3: ((0, 0), (0, 1), (1, 1), (0, 2))}
"""for so many parts the products taken; of two parts that differ one product gives both, being its own transpose"""


def gram_product(values: Float32[Tensor, "tokens in"], parts: int = 2) -> Float32[Tensor, "in in"]:
    r"""X^T X of a float32 matrix by products of bfloat16 matrices: one, three or four for 1, 2 or 3 parts.

    X = H + M + L with H = bf16(X), M = bf16(X - H) and L the rest, which bfloat16 holds but for underflow: it has 8
    digits, and float32 has 24. So |M| <= 2^-8 |X| and |L| <= 2^-16 |X|, and what is left out of
    H^T H,  H^T H + H^T M + M^T H + M^T M  and that with H^T L + L^T H is at most 2^-7 + 2^-16, 2^-15 + 2^-32 and
    2^-23 + 2^-32 of sum_t |x_ti| |x_tj|. Exact products leave what adding up the tokens in float32 rounds, for each
    product a share tokens 2^-24 of the same sum (twice that where a tensor core cuts off in place of rounding).

    Two parts are all of what two bfloat16 numbers of sizes within 2^8 of each other differ by. For any float32 matrix
    it takes three, four products that is, so that where tensor cores are no more than four times as fast as
    float32 nothing is gained: activations in float32 are multiplied in float32.
    """
    halves = split(values, parts)
    total = torch.zeros((), dtype=torch.float32, device=values.device)
    # The small ones first.
    for one, other in reversed(PRODUCTS[parts]):
        product = _product(halves[one], halves[other])
        total = total + (product if one == other else product + product.T)
    return total


def split(values: Float32[Tensor, "tokens in"], parts: int) -> list[BFloat16[Tensor, "tokens in"]]:
    """Bfloat16 matrices that add up to a float32 matrix, each the rounding of what those before it leave."""
    found = list[Tensor]()
    for _ in range(parts):
        found.append(values.to(torch.bfloat16))
        values = values - found[-1]
    return found


def on_tensor_cores(inputs: Tensor) -> bool:
    """Whether Gram matrices of inputs are to be made by `gram_product`: of bfloat16 inputs on an NVIDIA GPU."""
    return inputs.dtype == torch.bfloat16 and inputs.device.type == "cuda"


@full_precision()
def _product(one: Tensor, other: Tensor) -> Tensor:
    """X^T Y of bfloat16 matrices, added up in float32."""
    if one.device.type == "cuda":
        return torch.mm(one.T, other, out_dtype=torch.float32)
    return one.float().T @ other.float()
