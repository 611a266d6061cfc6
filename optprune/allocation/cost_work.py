"""What measuring costs takes by block, in multiplications as a product of matrices counts them: a guess, to go by."""

from dataclasses import dataclass

from optprune.allocation.costs import CostBudget
from optprune.models import Decoder, Units

SLOW = 1.5
"""how many times as long as in a large product a multiplication takes in a pass of tokens: 1.45 on SmolLM2"""
CURVE = 7
"""how many times in^3 multiplications the cost of every unit or weight of a layer takes"""


@dataclass(frozen=True)
class CostWork:
    """The work of gathering costs."""

    blocks: tuple[float, ...]
    """the work of each block: its pass and Gram products, its curves, and what was changed before going through it"""
    ending: float
    """the work of the divergences at the end, which a probe asks for: the head, once for the dense model too"""

    @classmethod
    def of(cls, decoder: Decoder, units: Units, budget: CostBudget, tokens: int, probe_tokens: int) -> "CostWork":
        """The work of so many tokens, and of changes that so many tokens go through; none of these without a probe."""
        found, changes = list[float](), 0
        for block, shape in enumerate(decoder.shapes()):
            targets, weights = units.candidates(decoder, block), decoder.weights_of(shape)
            passes = tokens * (weights + grams(decoder, block, {target.tap for target in targets}))
            own = budget.changes(targets)
            along = probe_tokens * weights * (changes + own)
            curves = sum(CURVE * decoder.layer(block, target.path).in_features ** 3 for target in targets)
            found.append(SLOW * (passes + along) + curves)
            changes += own
        return cls(tuple(found), SLOW * predictions(decoder, probe_tokens, changes))

    @property
    def whole(self) -> float:
        """All of it."""
        return sum(self.blocks) + self.ending

    @property
    def before_ending(self) -> float:
        """The share of all of it that is done when the last block is."""
        return sum(self.blocks) / self.whole

    def done(self, blocks: int) -> float:
        """The share of the work of all blocks that the first ones are."""
        return sum(self.blocks[:blocks]) / sum(self.blocks)


def grams(decoder: Decoder, block: int, taps: set[str]) -> int:
    """The multiplications a token that the Gram matrices of these layers' inputs take."""
    return sum(decoder.layer(block, tap).in_features ** 2 for tap in taps)


def predictions(decoder: Decoder, probe_tokens: int, changes: int) -> int:
    """The multiplications of the head for a probe's divergences: for the dense model once, and for every change."""
    return probe_tokens * (changes + bool(changes)) * head_weights(decoder)


def head_weights(decoder: Decoder) -> int:
    """The weights of the head."""
    head = decoder.model.get_output_embeddings()
    return 0 if head is None else sum(weight.numel() for weight in head.parameters())
