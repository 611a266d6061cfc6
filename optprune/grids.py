"""Grids: the weights that low-bit formats can store, as integers times one scale for each block of a row."""

import math
from dataclasses import dataclass, replace
from typing import final

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from optprune.errors import InputError, check_count

SPREAD = (-1.5, 3.0)
"""limits of the integers, beyond the largest one, to which the largest weight of a block is tried to be rounded"""
TRIED = 19
"""number of scales of each sign that are tried in a block"""
MOST_DIGITS = 11
"""binary digits of a float16"""
FIRST = 4
"""number of rows that are looked at first: those of a weight that was never rounded are off the grid"""


@dataclass(frozen=True, eq=False)
class Codes:
    """Weights on a grid: V_ij = s_b q_ij for the block b of column j."""

    scales: Float[Tensor, "rows blocks"]
    """s, numbers of the grid's scale dtype in the dtype of the weight"""
    integers: Int[Tensor, "rows in"]
    """q, int16"""
    lows: Int[Tensor, "rows blocks"]
    """the least integer that a block can store, int16"""

    def values(self) -> Float[Tensor, "rows in"]:
        """Return the weights, exactly."""
        blocks = self.integers.reshape(*self.scales.shape, -1)
        return (blocks * self.scales[:, :, None]).flatten(1)


@final
@dataclass(frozen=True)
class Grid:
    """Rows in blocks of `block` successive inputs; in each block the weights are integers q times a scale s.

    The integers are -2^(bits - 1) to 2^(bits - 1) - 1 or, where the grid is `shifted`, any 2^bits successive integers
    that include zero, which is a scale and a minimum. The scale is a number of `scale_dtype` of either sign. Zero is on
    every grid. The product of an integer and a scale has at most 19 binary digits, so float32 holds it exactly.

    Reference: the types Q4_0, Q5_0 and Q8_0 of ggml (block 32, scale in float16); W4A16 group formats (block 128).
    """

    bits: int
    block: int
    shifted: bool = False
    scale_dtype: torch.dtype = torch.float16
    digits: int = MOST_DIGITS
    """the most binary digits of a scale"""

    def __post_init__(self) -> None:
        check_count("the number of bits of a grid", self.bits)
        check_count("the length of a block of a grid", self.block)
        check_count("the number of digits of a scale", self.digits)
        if not 2 <= self.bits <= 8:
            raise InputError(f"a grid has 2 to 8 bits, not {self.bits}")
        if self.block < 1:
            raise InputError(f"a block of a grid has at least one input, not {self.block}")
        if self.scale_dtype not in (torch.float16, torch.bfloat16):
            raise InputError(f"the scales of a grid are float16 or bfloat16, not {self.scale_dtype}")
        if not 1 <= self.digits <= MOST_DIGITS:
            raise InputError(f"the scales of a grid have 1 to {MOST_DIGITS} binary digits, not {self.digits}")

    def within(self, dtype: torch.dtype) -> "Grid":
        """Return the grid with scales of so few digits that a dtype holds every weight on it exactly.

        A float16 leaves the scales of 4-bit weights 8 binary digits, and a bfloat16 leaves them 5.
        """
        kept = 1 + round(-math.log2(torch.finfo(dtype).eps))
        largest = self.bits if self.shifted else self.bits - 1
        return replace(self, digits=min(self.digits, max(1, kept - largest)))

    @property
    def lowest(self) -> int:
        """The least integer, of which a shifted grid may take a higher one up to zero."""
        return -(2**self.bits - 1) if self.shifted else -(2 ** (self.bits - 1))

    @property
    def steps(self) -> int:
        """The largest integer of a block less its least."""
        return 2**self.bits - 1

    def check_width(self, inputs: int) -> None:
        """Raise InputError where rows are not whole blocks."""
        if inputs % self.block:
            raise InputError(f"rows of {inputs} weights are not whole blocks of {self.block}: choose another width")

    def blocks(self, weight: Float[Tensor, "rows in"]) -> Float[Tensor, "rows blocks block"]:
        """Return the weight by blocks."""
        self.check_width(weight.shape[1])
        return weight.reshape(weight.shape[0], -1, self.block)

    def nearest(self, weight: Float[Tensor, "rows in"], importance: Float[Tensor, "*rows in"] | None = None) -> Codes:
        """Return weights on the grid near a weight, with the scale of each block chosen by sum_j h_j (v_j - s q_j)^2.

        h is the `importance` [in] or [rows, in], 1 by default. The best of some scales is taken, so a search of all
        scales may find better ones. Reference: make_qx_quants of ggml, which tries scales in the same way.
        """
        blocks = self.blocks(weight)
        weights = torch.ones_like(blocks[:1, :, :1])
        if importance is not None:
            weights = self.blocks(importance.expand_as(weight))
        scales, lows = self.fit(blocks, weights)
        integers = self.round(blocks, scales[:, :, None], lows[:, :, None])
        return Codes(scales, integers.to(torch.int16).flatten(1), lows.to(torch.int16))

    def round(
        self, values: Float[Tensor, "*any"], scales: Float[Tensor, "*any"], lows: Float[Tensor, "*any"]
    ) -> Float[Tensor, "*any"]:
        """Return the integers q of a block whose s q are nearest to the values; zero where the scale is zero."""
        q = torch.where(scales == 0, 0.0, values / scales).nan_to_num_(0.0).round_()
        return torch.minimum(torch.maximum(q, lows), lows + self.steps)

    def fit(
        self, blocks: Float[Tensor, "*any block"], importance: Float[Tensor, "*any block"]
    ) -> tuple[Float[Tensor, "*any"], Float[Tensor, "*any"]]:
        """Return the scale and the least integer of each block, by the least weighted square error of those tried."""
        low, high = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)
        if self.shifted:
            span, tried = high - low, [self.steps + delta for delta in self._deltas()]
        else:
            # The largest weight, with its sign: it has one integer more on the side of the least one.
            span = torch.where(high > -low, high, low)
            tried = [sign * (delta - self.lowest) for delta in self._deltas() for sign in (-1, 1)]
        best = torch.full_like(span, -1.0)
        scales, lows = torch.zeros_like(span), torch.zeros_like(span)
        for count in tried:
            scale = span / count
            least = self._least(low, scale)
            q = self.round(blocks, scale[..., None], least[..., None])
            # The best scale for these integers is p / d; it takes p^2 / d off the error.
            product, size = (importance * blocks * q).sum(-1), (importance * q * q).sum(-1)
            fitted = torch.where(size > 0, product / size, 0.0)
            better = product * fitted > best
            best = torch.where(better, product * fitted, best)
            scales = torch.where(better, self.stored(fitted), scales)
            lows = torch.where(better, least, lows)
        return scales, lows

    def candidates(
        self, blocks: Float[Tensor, "*any block"]
    ) -> tuple[Float[Tensor, "*any t"], Float[Tensor, "*any t"]]:
        """Return many scales for each block, as they are stored, with the least integer for each.

        The largest weight, or the span, is tried to be rounded to any integer and somewhat beyond. A shifted grid has
        each scale three times, with the least integer and its neighbours.
        """
        low, high = blocks.amin(-1).clamp_(max=0), blocks.amax(-1).clamp_(min=0)
        most = (self.steps if self.shifted else -self.lowest) + SPREAD[1]
        tried = torch.linspace(0.5, most, 2 * TRIED, dtype=blocks.dtype, device=blocks.device)
        if self.shifted:
            scales = self.stored((high - low)[..., None] / tried)
            lows = self._least(low[..., None].expand_as(scales), scales)
            return torch.cat([scales] * 3, -1), torch.cat([lows, lows - 1, lows + 1], -1).clamp_(-self.steps, 0)
        scales = self.stored(torch.where(high > -low, high, low)[..., None] / tried)
        scales = torch.cat([scales, -scales], -1)
        return scales, torch.full_like(scales, self.lowest)

    def stored(self, scales: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the nearest scales that can be stored."""
        most = torch.finfo(self.scale_dtype).max / 2**self.bits
        if self.digits < MOST_DIGITS:
            mantissa, exponent = torch.frexp(scales)
            scales = torch.ldexp((mantissa * 2**self.digits).round_() / 2**self.digits, exponent)
        return scales.clamp(-most, most).to(self.scale_dtype).to(scales.dtype)

    def _deltas(self) -> list[float]:
        first, last = SPREAD
        return [first + (last - first) * index / (TRIED - 1) for index in range(TRIED)]

    def _least(self, low: Float[Tensor, "*any"], scale: Float[Tensor, "*any"]) -> Float[Tensor, "*any"]:
        """Return the least integer of blocks whose least weight, or zero, is `low`."""
        if not self.shifted:
            return torch.full_like(low, self.lowest)
        return torch.where(scale == 0, 0.0, low / scale).nan_to_num_(0.0).round_().clamp_(-self.steps, 0)

    def encode(self, weight: Float[Tensor, "rows in"]) -> Codes:
        """Return the codes of a weight that is on the grid. Raise InputError where a block is not."""
        codes, off = self.find(weight)
        if bool(off.any()):
            raise InputError(f"{int(off.sum())} of {off.numel()} blocks are not on a grid of {self.bits} bits")
        return codes

    def codes(self, weight: Float[Tensor, "rows in"]) -> Codes | None:
        """Return the codes of a weight that is on the grid; None where a block is not, or rows are not whole blocks."""
        if weight.shape[1] % self.block or self.off(weight[:FIRST]):
            return None
        codes, off = self.find(weight)
        return None if bool(off.any()) else codes

    def off(self, weight: Float[Tensor, "rows in"]) -> int:
        """Return the number of blocks that are not on the grid."""
        return int(self.find(weight)[1].sum())

    def find(self, weight: Float[Tensor, "rows in"]) -> tuple[Codes, Bool[Tensor, "rows blocks"]]:
        """Return codes, and the mask of the blocks that no codes hold.

        The largest weight of a block is an integer of the grid times its scale, so each integer gives one scale to try.
        """
        blocks = self.blocks(weight)
        shape = blocks.shape[:2]
        flat = blocks.flatten(0, 1)
        largest = flat.gather(1, flat.abs().argmax(1, keepdim=True))
        scales, lows = torch.zeros_like(flat[:, 0]), torch.zeros_like(flat[:, 0])
        integers = torch.zeros_like(flat)
        left = (largest[:, 0] != 0).nonzero()[:, 0]
        for size in range(-self.lowest, 0, -1):
            for top in (-size, size):
                if not len(left):
                    break
                scale = self.stored(largest[left] / top)
                q = torch.where(scale == 0, torch.inf, flat[left] / scale).round()
                exact = (q * scale == flat[left]).all(1)
                least = q.amin(1).clamp(max=0) if self.shifted else torch.full_like(q[:, 0], self.lowest)
                fits = exact & (q.amin(1) >= least) & (q.amax(1) <= least + self.steps)
                found = left[fits]
                scales[found], lows[found], integers[found] = scale[fits, 0], least[fits], q[fits]
                left = left[~fits]
        off = torch.zeros(len(flat), dtype=torch.bool, device=weight.device)
        off[left] = True
        if not self.shifted:
            lows.fill_(self.lowest)
        codes = Codes(scales.view(shape), integers.to(torch.int16).view_as(weight), lows.to(torch.int16).view(shape))
        return codes, off.view(shape)


GRIDS = {
    "q4_0": Grid(4, 32),
    "q5_0": Grid(5, 32),
    "q8_0": Grid(8, 32),
    "w4a16": Grid(4, 128),
    "w4a16_shifted": Grid(4, 128, shifted=True),
}
"""grids by the names of their formats: ggml's types, and 4-bit weights in groups of 128"""
