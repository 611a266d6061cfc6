"""What a run has of the dense model's moments without going through it: blocks, or all of them."""

from optprune.calibration import BlockMoments, KnownMoments
from optprune.models import BlockShape, Decoder, Target
from optprune.recipe import Recipe


class CachedMoments:
    """The moments that a run may recall: of the blocks that get on its path what the dense model gives them.

    Those are all blocks where they are independent by the policy, else the first one.
    """

    def __init__(self, decoder: Decoder, recipe: Recipe, known: KnownMoments | None, from_dense: bool) -> None:
        """`from_dense`: whether the path begins with the inputs of the dense model's first block."""
        self._decoder, self._recipe = decoder, recipe
        self._known = known if from_dense else None

    def block(self, index: int) -> BlockMoments | None:
        """What is known of a block."""
        if self._known is None or (index > 0 and not self._recipe.policy.independent):
            return None
        return self._known.of(index)

    def whole(self, targets: list[list[Target]], shapes: list[BlockShape]) -> bool:
        """Whether a run needs no pass at all, with these layers to prune of each block, which are left of these shapes.

        It must be one in which nothing but the moments of the dense model enters a block.
        """
        known, recipe, policy = self._known, self._recipe, self._recipe.policy
        if known is None or recipe.recovers:
            return False
        if policy.sequential or policy.dense_target or not policy.independent:
            return False
        return all(
            known.knows(index, [target.tap for target in of])
            and self._decoder.shape(index).parts == shape.parts
            and self._decoder.shape(index).experts == shape.experts
            for index, (of, shape) in enumerate(zip(targets, shapes, strict=True))
        )
