"""Known moments: those of the dense model's blocks on a text, which runs need not measure again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from optprune.calibration.moments_pass import Collected, collect
from optprune.calibration.statistics_cache import CacheEntry, Key, Serializer, StatisticsCache
from optprune.calibration.stream import Stream, advance
from optprune.models import Decoder
from optprune.moments import InputMoments


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """The moments of a layer's inputs in the dense model, and the seconds that they took."""

    moments: InputMoments
    held_out: InputMoments | None
    """those of the batches kept apart, where there are some"""
    gram_seconds: float
    forward_seconds: float
    """the seconds of the pass that they come from, which may have given those of other layers too"""


@final
class _LayerForm(Serializer[LayerMoments]):
    """No drift: the inputs are the dense model's."""

    def parts(self, value: LayerMoments) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = {}, {"gram": value.gram_seconds, "forward": value.forward_seconds}
        for name, of in (("fitted", value.moments), ("apart", value.held_out)):
            if of is not None:
                assert of.drift is None and of.proved is of.covariance
                tensors |= {f"{name}.covariance": of.covariance, f"{name}.mean": of.mean}
                rest[name] = of.tokens
        return tensors, rest

    def whole(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> LayerMoments:
        def moments(name: str) -> InputMoments | None:
            if name not in rest:
                return None
            covariance = tensors[f"{name}.covariance"]
            return InputMoments(covariance, tensors[f"{name}.mean"], int(rest[name]), None, covariance)

        fitted = moments("fitted")
        if fitted is None:
            raise KeyError("fitted")
        return LayerMoments(fitted, moments("apart"), float(rest["gram"]), float(rest["forward"]))


FORM = _LayerForm()


@dataclass(frozen=True, eq=False)
class KnownMoments:
    """The moments of the inputs of every block's layers in the dense model, on some batches, as far as they are known.

    What is measured of them is kept; `spare` hears of the seconds that were not spent again.
    """

    cache: StatisticsCache
    scope: Key
    """what all of them have in common"""
    device: torch.device
    spare: Callable[[float], None]

    def knows(self, block: int, taps: Sequence[str]) -> bool:
        """Whether those at all of these layers of a block are known."""
        return all(self.cache.has(self._key(block, tap)) for tap in taps)

    def found(self, block: int, taps: Sequence[str], *, passing: bool) -> Collected | None:
        """Those at these layers of a block, or None; `passing` where the block is gone through all the same."""
        if not self.knows(block, taps):
            return None
        kept = {tap: self.cache.get(self._key(block, tap), FORM, self.device) for tap in taps}
        layers = {tap: one.value for tap, one in kept.items() if one is not None}
        gram = sum(layer.gram_seconds for layer in layers.values())
        forward = max((layer.forward_seconds for layer in layers.values()), default=0.0)
        self.spare(gram + (0.0 if passing else forward))
        held_out = {tap: layer.held_out for tap, layer in layers.items() if layer.held_out is not None}
        return Collected({tap: layer.moments for tap, layer in layers.items()}, held_out, gram, forward)

    def keep(self, block: int, collected: Collected) -> None:
        """Keep what was collected of a dense block."""
        every = collected.moments
        for tap, moments in every.items():
            key, gram = self._key(block, tap), collected.gram_seconds / len(every)
            layer = LayerMoments(moments, collected.held_out.get(tap), gram, collected.forward_seconds)
            if not self.cache.has(key):
                self.cache.put(key, CacheEntry(layer, gram), FORM)

    def of(self, block: int) -> "BlockMoments":
        """Those of one block."""
        return BlockMoments(self, block)

    def _key(self, block: int, tap: str) -> Key:
        return ("moments", *self.scope, block, tap)


@dataclass(frozen=True, eq=False)
class BlockMoments:
    """What is known of one block, which gets what the dense model gives it."""

    known: KnownMoments
    block: int

    def found(self, taps: Sequence[str], *, passing: bool) -> Collected | None:
        """As of all blocks."""
        return self.known.found(self.block, taps, passing=passing)

    def keep(self, collected: Collected) -> None:
        """As of all blocks."""
        self.known.keep(self.block, collected)


class DensePass:
    """Goes through the dense model block by block, for the moments of its layers' inputs.

    Where all of them are known, it goes through no block; else those that are missing are measured, and kept.
    """

    def __init__(
        self,
        decoder: Decoder,
        stream: Callable[[], Stream],
        known: KnownMoments | None,
        taps: Sequence[Sequence[str]],
        held_out: int = 0,
    ) -> None:
        """`stream` gives the inputs of the first block, and `taps` are the layers of each block; blocks are resident.

        The last `held_out` batches are kept apart.
        """
        self.decoder, self.known, self.taps, self.held_out = decoder, known, taps, held_out
        whole = known is not None and all(known.knows(index, of) for index, of in enumerate(taps))
        self.stream = None if whole else stream()

    def visit(self, block: int) -> Collected:
        """The moments at a block's layers; the blocks come in their order, each while it is resident."""
        taps, known, stream = self.taps[block], self.known, self.stream
        found = None if known is None else known.found(block, taps, passing=stream is not None)
        if stream is None:
            assert found is not None
            return found
        if found is not None:
            advance(self.decoder.blocks[block], stream)
            return found
        collected = collect(self.decoder.blocks[block], stream, taps, held_out=self.held_out, output=stream)
        if known is not None:
            known.keep(block, collected)
        return collected
