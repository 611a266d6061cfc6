"""What a recipe may remove beside units of one kind: of several kinds, single weights, experts, or whole sub-blocks."""

from dataclasses import dataclass
from typing import final

from optprune.errors import InputError
from optprune.models.architecture import Architecture, BlockAllocation
from optprune.models.decoder import Decoder
from optprune.models.units import KvGroups, LinkedUnits, Mlp, Target, Units, Values
from optprune.patterns import ANYWHERE, PatternFamily
from optprune.system.wording import counted


@final
@dataclass(frozen=True)
class Composite(Units):
    """Units of several kinds; those of one sub-block compete for it, block by block (`Units.compete`)."""

    name: str
    of: tuple[LinkedUnits, ...]
    """the kinds of units, of which the last one fills up what the others leave of a budget"""

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return self.of


@final
@dataclass(frozen=True)
class Weights(Units):
    """Single weights of every linear layer."""

    family: PatternFamily = ANYWHERE
    name = "weights"
    objective = "sparse"

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return ()

    def candidates(self, decoder: Decoder, block: int) -> list[Target]:
        taps = decoder.architecture.taps
        return [Target(path, taps[path], family=self.family) for path in decoder.paths(block)]

    def targets(self, decoder: Decoder, block: int, wanted: BlockAllocation, drifted: bool) -> list[Target]:
        return [target for target in self.candidates(decoder, block) if wanted.share(target.path) < 1]

    def check(self, decoder: Decoder, block: int, wanted: BlockAllocation) -> None:
        if wanted.shape.parts and wanted.shape != decoder.shape(block):
            raise InputError(f"the allocation narrows block {block}, but the recipe's units are single weights")
        if not all(map(self.family.admits, wanted.shares.values())):
            raise InputError(f"with the pattern {self.family.name} a layer of block {block} keeps that share, or 1")

    def whole_metric(self, architecture: Architecture) -> tuple[str, ...]:
        return architecture.layers


@final
@dataclass(frozen=True)
class Experts(Units):
    """Whole experts, with the rows of the router that choose them: the block's own choice, and nothing to solve after.

    Every block keeps as many, at least as many as its router chooses for a token.
    """

    name = "experts"

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return ()

    def least(self, decoder: Decoder) -> int:
        """How many experts a router chooses for a token; InputError where there is no router."""
        if decoder.architecture.mixture is None:
            raise InputError(
                f"units {self.name} are those of a router, and a {decoder.architecture.model_type} model has none: "
                "choose a recipe with other units"
            )
        return decoder.experts_for_a_token

    def check(self, decoder: Decoder, block: int, wanted: BlockAllocation) -> None:
        super().check(decoder, block, wanted)
        least, kept = self.least(decoder), wanted.shape.experts
        if 0 < kept < least:
            raise InputError(
                f"the allocation keeps {counted(kept, 'expert')} in block {block}, where the router chooses {least} "
                "for each token"
            )


@final
@dataclass(frozen=True)
class Blocks(Units):
    """Whole sub-blocks, attention or MLP: nothing is left to solve."""

    name = "blocks"

    @property
    def kinds(self) -> tuple[LinkedUnits, ...]:
        return ()


UNITS: dict[str, Units] = {
    units.name: units
    for units in (
        *(Mlp(), Values(), Values(rotated=True), KvGroups()),
        *(Composite("all", (Values(), Mlp())), Composite("rotated-all", (Values(rotated=True), Mlp()))),
        *(
            Composite("all-heads", (Values(), KvGroups(), Mlp())),
            Composite("rotated-all-heads", (Values(rotated=True), KvGroups(), Mlp())),
        ),
        *(Weights(), Experts(), Blocks()),
    )
}
"""the units of a recipe, by name"""
