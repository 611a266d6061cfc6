"""What goes from block to block beside the hidden states: keys and values of earlier blocks, and numbers of each token.

They stand in columns behind the hidden states, so that all that keeps, copies or changes these takes them along.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optprune.models import Decoder
from optprune.models.architecture import Shared
from optprune.numerics.tensors import first_output

CARRIED = "optprune_carried"
"""the entry of a block's arguments that says what its hidden states carry"""


@dataclass(frozen=True)
class Kept:
    """The keys and values of one kind of attention: a column for each dimension of each KV head, the keys first."""

    kind: str
    heads: int
    dim: int

    @property
    def width(self) -> int:
        """The number of columns."""
        return 2 * self.heads * self.dim

    def opened(self, columns: Tensor) -> tuple[Tensor, ...]:
        """Return the keys and values [batch, heads, tokens, dim] in columns [batch, tokens, width]."""
        halves = columns.unflatten(-1, (2, self.heads, self.dim)).unbind(-3)
        return tuple(half.transpose(1, 2) for half in halves)


@dataclass(frozen=True)
class Carried:
    """What the inputs of one block carry behind the hidden states, and its outputs."""

    hidden: int
    """the width of the hidden states"""
    argument: str
    """the argument with the numbers of each token; empty where there is none"""
    width: int
    """the numbers that each token has in one block"""
    later: int
    """the blocks after this one, whose numbers stand behind its own"""
    shared: str
    """the argument with keys and values of earlier blocks"""
    comes: tuple[Kept, ...]
    """the keys and values that stand behind all that"""
    goes: tuple[Kept, ...]
    """those that stand in the outputs: some that come, and those that the block makes"""

    @property
    def sizes(self) -> tuple[int, ...]:
        """The columns that come in: hidden states, numbers of this block and the later ones, and keys and values."""
        return self.hidden, self.width * (1 + self.later), *(kept.width for kept in self.comes)

    @property
    def columns(self) -> int:
        """The number of columns behind the hidden states that come in."""
        return sum(self.sizes) - self.hidden

    def called(self, block: nn.Module, states: Tensor, arguments: dict[str, Any]) -> Tensor:
        """Return the outputs of a block, which carry what later blocks need."""
        hidden, numbers, *columns = states.split(self.sizes, dim=-1)
        there = {kept.kind: kept.opened(part) for kept, part in zip(self.comes, columns, strict=True)}
        given: dict[str, Any] = {self.shared: there}
        if self.argument:
            given[self.argument] = numbers[..., : self.width]
        output = first_output(block(hidden.contiguous(), **arguments, **given))
        made = [half.transpose(1, 2).flatten(-2) for kept in self.goes for half in there[kept.kind]]
        later = numbers[..., self.width :]
        return torch.cat([output, later, *made], -1) if later.shape[-1] or made else output

    def entering(self, hidden: Tensor, numbers: Sequence[Tensor]) -> Tensor:
        """Return the inputs of the first block, with those numbers of every block; no keys and values are made yet."""
        made = [hidden.new_zeros(*hidden.shape[:-1], kept.width) for kept in self.comes]
        return torch.cat([hidden, *numbers, *made], -1)


def carried(decoder: Decoder) -> list[Carried]:
    """Return what the inputs of every block carry, in a model whose architecture shares anything.

    A block that reads keys and values that no earlier one makes, as in a model of one block alone, gets zeros.
    """
    shared, count = decoder.architecture.shared, len(decoder.blocks)
    assert shared is not None
    width = shared.numbers_of_token(decoder.model.config)
    uses = [_uses(decoder, index, shared) for index in range(count)]
    found, there, made = list[Carried](), dict[str, Kept](), set[str]()
    for own, reads, writes in uses:
        if own and reads and own.kind not in made:
            there[own.kind] = own
        if own and writes:
            made.add(own.kind)
    for index, (own, _, writes) in enumerate(uses):
        comes = there
        if own and writes:
            there = there | {own.kind: own}
        read = {kept.kind for kept, reads, _ in uses[index + 1 :] if kept and reads}
        there = {kind: kept for kind, kept in there.items() if kind in read}
        found.append(
            Carried(
                hidden=int(decoder.model.config.hidden_size),
                argument=shared.numbers if width else "",
                width=width,
                later=count - 1 - index,
                shared=shared.argument,
                comes=tuple(comes.values()),
                goes=tuple(there.values()),
            )
        )
    return found


def carried_width(decoder: Decoder) -> int:
    """Return the most columns that go from a block to the next behind the hidden states."""
    return max((each.columns for each in carried(decoder)), default=0)


def _uses(decoder: Decoder, index: int, shared: Shared) -> tuple[Kept | None, bool, bool]:
    """Return the keys and values of a block's kind, whether it reads them, and whether it writes them."""
    shape = decoder.shape(index)
    if not shape.kv_heads:
        return None, False, False
    attention = decoder.blocks[index].get_submodule(decoder.architecture.attention)
    kept = Kept(shared.kind(attention), shape.kv_heads, shape.value_dim)
    return kept, shared.reads(attention), shared.writes(attention)
