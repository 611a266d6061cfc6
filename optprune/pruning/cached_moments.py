"""Cached moments: what a run knows of the dense model without a pass through it."""

from collections.abc import Sequence

from optprune.calibration import BlockMoments, KnownMoments
from optprune.models import Decoder
from optprune.program import BlockProgram, Program


class CachedMoments:
    """The moments of blocks that get the inputs of the dense model: of all independent blocks, else of the first."""

    def __init__(self, decoder: Decoder, program: Program, known: KnownMoments | None) -> None:
        """Use what is known, which is None where the path does not begin with the dense model's inputs."""
        self._decoder, self._policy, self._known = decoder, program.policy, known
        self._moves_weights_later = program.method.moves_weights_later

    def block(self, index: int) -> BlockMoments | None:
        """Return the moments of a block, as far as they are known."""
        if self._known is None or (index > 0 and not self._policy.independent):
            return None
        return self._known.of(index)

    def cover(self, blocks: Sequence[BlockProgram]) -> bool:
        """Return whether a run needs no pass at all: only known moments of the dense model decide its blocks."""
        policy, known = self._policy, self._known
        if known is None or self._moves_weights_later:
            return False
        if policy.sequential or policy.dense_target or not policy.independent:
            return False
        return all(
            known.knows(block.index, [target.tap for target in block.targets])
            and not block.removed
            and self._decoder.shape(block.index).experts == block.wanted.shape.experts
            for block in blocks
        )
