"""Statistics of the dense model on a text, measured when they are needed, or once for several recipes."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from optprune.calibration.fisher_pass import collect_metrics, positions_before, sampled
from optprune.calibration.moments_pass import Collected, collect
from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.statistics_cache import (
    CacheEntry,
    FolderCache,
    Key,
    MemoryCache,
    Serializer,
    Source,
    StatisticsCache,
)
from optprune.calibration.stream import Stream, advance
from optprune.metric import Metrics, MetricSums
from optprune.models import Decoder
from optprune.moments import InputMoments
from optprune.numerics.fingerprint import fingerprint
from optprune.problems import ExpertChoice, LayerLoss, StructuredLeastSquares
from optprune.solvers import removal_curve
from optprune.solvers.experts import elimination

Removal = tuple[Tensor, Tensor, tuple[str, ...]]
"""a removal curve: the order in which units are removed, the loss after each, and notes"""
Value = TypeVar("Value")


# -- the moments of dense blocks


@dataclass(frozen=True, eq=False)
class LayerMoments:
    """Moments of a layer's inputs in the dense model, with the seconds that they took."""

    moments: InputMoments
    held_out: InputMoments | None
    """the moments of the held-out batches, where there are any"""
    gram_seconds: float
    forward_seconds: float
    """the seconds of the pass that collected them, which may have collected those of other layers too"""


@dataclass(frozen=True, eq=False)
class KnownMoments:
    """Cached moments of the inputs of every block's layers in the dense model, on some batches."""

    cache: StatisticsCache
    scope: Key
    """the part of the key that all of them share"""
    device: torch.device
    add_saved: Callable[[float], None]
    """called with the seconds that a cached entry saves"""

    def knows(self, block: int, taps: Sequence[str]) -> bool:
        """Return whether the moments at all of these layers of a block are cached."""
        return all(self.cache.has(self._key(block, tap)) for tap in taps)

    def found(self, block: int, taps: Sequence[str], *, passing: bool) -> Collected | None:
        """Return the cached moments at these layers of a block, or None; `passing` where the block is run anyway."""
        if not self.knows(block, taps):
            return None
        entries = {tap: self.cache.get(self._key(block, tap), MOMENTS, self.device) for tap in taps}
        layers = {tap: entry.value for tap, entry in entries.items() if entry is not None}
        gram = sum(layer.gram_seconds for layer in layers.values())
        forward = max((layer.forward_seconds for layer in layers.values()), default=0.0)
        self.add_saved(gram + (0.0 if passing else forward))
        held_out = {tap: layer.held_out for tap, layer in layers.items() if layer.held_out is not None}
        return Collected({tap: layer.moments for tap, layer in layers.items()}, held_out, gram, forward)

    def keep(self, block: int, collected: Collected) -> None:
        """Cache the moments that were collected of a dense block."""
        every = collected.moments
        for tap, moments in every.items():
            key, gram = self._key(block, tap), collected.gram_seconds / len(every)
            layer = LayerMoments(moments, collected.held_out.get(tap), gram, collected.forward_seconds)
            if not self.cache.has(key):
                self.cache.put(key, CacheEntry(layer, gram), MOMENTS)

    def of(self, block: int) -> "BlockMoments":
        """Return the view of one block."""
        return BlockMoments(self, block)

    def _key(self, block: int, tap: str) -> Key:
        return ("moments", *self.scope, block, tap)


@dataclass(frozen=True, eq=False)
class BlockMoments:
    """Cached moments of one block, whose inputs are those of the dense model."""

    known: KnownMoments
    block: int

    def found(self, taps: Sequence[str], *, passing: bool) -> Collected | None:
        """Return the cached moments: see `KnownMoments.found`."""
        return self.known.found(self.block, taps, passing=passing)

    def keep(self, collected: Collected) -> None:
        """Cache moments: see `KnownMoments.keep`."""
        self.known.keep(self.block, collected)


class DensePass:
    """A pass through the dense model block by block for the moments of its layers' inputs.

    Missing moments are measured and cached. Where none is missing, no block is run.
    """

    def __init__(
        self,
        decoder: Decoder,
        stream: Callable[[], Stream],
        known: KnownMoments | None,
        taps: Sequence[Sequence[str]],
        held_out: int = 0,
    ) -> None:
        """Prepare a pass from `stream`, which returns the inputs of the first block, for the `taps` of each block.

        The last `held_out` batches have moments of their own.
        """
        self.decoder, self.known, self.taps, self.held_out = decoder, known, taps, held_out
        whole = known is not None and all(known.knows(index, own) for index, own in enumerate(taps))
        self.stream = None if whole else stream()

    def visit(self, block: int) -> Collected:
        """Return the moments at a block's layers. The blocks are visited in order, each while it is resident."""
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


# -- all statistics


class DenseStatistics:
    """Output metrics, moments and removal curves, measured on every call."""

    def begin(self, decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums) -> None:
        """Begin a run on all these batches; InputError where the statistics are not for it."""

    def known(
        self, decoder: Decoder, batches: Sequence[Tensor], held_out: int, partial_sums: PartialSums
    ) -> KnownMoments | None:
        """Return the cached moments of the dense blocks on these batches, of which the last `held_out` are held out.

        None where nothing is cached.
        """
        return None

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        clip: float | None,
        on_pass: Callable[[int, int], None],
        partial_sums: PartialSums | None = None,
    ) -> Metrics:
        """Return the output metrics of a model, not damped, with labels drawn by a seed: see `collect_metrics`."""
        batches, partial_sums = list(batches), partial_sums or PartialSums()
        labels = sampled(seed, positions_before(batches, partial_sums))
        return collect_metrics(
            decoder,
            batches,
            labels,
            full=full,
            widest=widest,
            clip=clip,
            on_pass=on_pass,
            partial_sums=partial_sums,
        )

    def removal(self, problem: StructuredLeastSquares, batch: int) -> Removal:
        """Return the removal curve of a layer's units: see `removal_curve`."""
        return removal_curve(problem, batch=batch)

    def entries(self, loss: LayerLoss, stride: int, measure: Callable[[], Tensor]) -> Tensor:
        """Return the costs of every `stride`-th of a layer's weights, sorted: [n], as `measure` finds them."""
        return measure()

    def experts(self, problem: ExpertChoice) -> tuple[list[int], list[float]]:
        """Return the order in which experts of a mixture are eliminated, and the cost after each: see `elimination`."""
        return elimination(problem)

    def scores(self, key: Key, measure: Callable[[], list[float]]) -> list[float]:
        """Return the scores of sub-blocks, as `measure` finds them; within a run the key says which they are."""
        return measure()


class Statistics(DenseStatistics):
    """Dense statistics that are measured once and cached, so that runs of several recipes share them.

    `optprune.collect` makes statistics of one model on one text, which refuse any other. Without a source, entries are
    keyed by content: the model's weights, the tokens, the seed, the layer's problem. So one object may serve copies of
    a model, other texts and other models, and a changed model is measured again. Entries stay until `forget`: in memory
    on the device where they were measured, or in a folder.
    """

    def __init__(self, source: Source | None = None, folder: str | Path | None = None) -> None:
        """Make statistics of one `source`, or of any; a `folder`, which needs a source, is made or reused."""
        self.source = source
        """the model and the text of the statistics; None where they are keyed by content"""
        self.seconds_saved = 0.0
        """the seconds of measuring that cached entries saved"""
        self._present: Source | None = source
        self._cache = MemoryCache() if folder is None or source is None else FolderCache(folder, source.facts)

    def begin(self, decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums) -> None:
        self._present = Source.of(decoder, batches, partial_sums)
        if self.source is not None:
            self.source.check(self._present)

    def known(
        self, decoder: Decoder, batches: Sequence[Tensor], held_out: int, partial_sums: PartialSums
    ) -> KnownMoments | None:
        # Of processes that share the batches, all measure or none does.
        if self._present is None or partial_sums.peers.size > 1:
            return None
        computed = str(decoder.computes_in or decoder.model.dtype)
        scope = (self._present.digest, fingerprint(list(batches)), held_out, partial_sums.count, computed)
        return KnownMoments(self._cache, scope, decoder.model.device, self._add_saved)

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        clip: float | None,
        on_pass: Callable[[int, int], None],
        partial_sums: PartialSums | None = None,
    ) -> Metrics:
        batches, partial_sums = list(batches), partial_sums or PartialSums()
        source = self._present or Source.of(decoder, batches, partial_sums)
        tokens, device = fingerprint(batches), decoder.model.device
        settings = seed, *sorted(full), float(widest), clip, partial_sums.count
        scope = ("metric", source.digest, tokens, str(device), *settings)
        names = [decoder.name(index, path) for index in range(len(decoder.blocks)) for path in decoder.paths(index)]
        if not all(self._cache.has((*scope, name)) for name in names):
            began = time.perf_counter()
            found = super().metrics(decoder, batches, seed, full, widest, clip, on_pass, partial_sums)
            seconds = (time.perf_counter() - began) / max(1, len(names))
            for name in names:
                self._cache.put((*scope, name), CacheEntry(found.sums(name), seconds), SUMS)
            return found
        sums = {}
        for name in names:
            entry = self._cache.get((*scope, name), SUMS, device)
            assert entry is not None
            self._add_saved(entry.seconds)
            sums[name] = entry.value
        return Metrics(sums)

    def removal(self, problem: StructuredLeastSquares, batch: int) -> Removal:
        device = problem.loss.weight.device
        key = ("removal", problem.fingerprint(), str(device), batch)
        return self._cached(key, CURVE, device, lambda: super(Statistics, self).removal(problem, batch))

    def entries(self, loss: LayerLoss, stride: int, measure: Callable[[], Tensor]) -> Tensor:
        device = torch.device("cpu")
        key = ("entries", fingerprint(loss), str(loss.weight.device), stride)
        # A copy, which the caller may scale.
        return self._cached(key, COSTS, device, measure).clone()

    def forget(self) -> None:
        """Delete all entries."""
        self._cache.clear()

    def _cached(
        self, key: Key, serializer: Serializer[Value], device: torch.device, measure: Callable[[], Value]
    ) -> Value:
        """Return the cached value, or measure and cache it."""
        entry = self._cache.get(key, serializer, device)
        if entry is not None:
            self._add_saved(entry.seconds)
            return entry.value
        began = time.perf_counter()
        value = measure()
        self._cache.put(key, CacheEntry(value, time.perf_counter() - began), serializer)
        return value

    def _add_saved(self, seconds: float) -> None:
        self.seconds_saved += seconds


# -- serializers


@final
class _MomentsSerializer(Serializer[LayerMoments]):
    """Serializer of moments without drift: the inputs are the dense model's."""

    def dump(self, value: LayerMoments) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, rest = {}, {"gram": value.gram_seconds, "forward": value.forward_seconds}
        for name, part in (("fitted", value.moments), ("apart", value.held_out)):
            if part is not None:
                assert part.drift is None and part.proved is part.covariance
                tensors |= {f"{name}.covariance": part.covariance, f"{name}.mean": part.mean}
                rest[name] = part.tokens
        return tensors, rest

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> LayerMoments:
        def moments(name: str) -> InputMoments | None:
            if name not in rest:
                return None
            covariance = tensors[f"{name}.covariance"]
            return InputMoments(covariance, tensors[f"{name}.mean"], int(rest[name]), None, covariance)

        fitted = moments("fitted")
        if fitted is None:
            raise KeyError("fitted")
        return LayerMoments(fitted, moments("apart"), float(rest["gram"]), float(rest["forward"]))


@final
class _SumsSerializer(Serializer[MetricSums]):
    def dump(self, value: MetricSums) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return value.parts(), {"width": value.width, "tokens": value.tokens, "full": value.full}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> MetricSums:
        # The whole matrices of all layers may not fit in memory: each is read when its block is pruned.
        width, tokens, full = int(rest["width"]), int(rest["tokens"]), bool(rest["full"])
        return MetricSums.elsewhere(width, tokens, lambda: dict(tensors), full=full)


@final
class _CurveSerializer(Serializer[Removal]):
    def dump(self, value: Removal) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"order": value[0], "losses": value[1]}, {"notes": list(value[2])}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Removal:
        return tensors["order"], tensors["losses"], tuple(map(str, rest["notes"]))


@final
class _CostsSerializer(Serializer[Tensor]):
    def dump(self, value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"costs": value}, {}

    def load(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Tensor:
        return tensors["costs"]


MOMENTS, SUMS, CURVE, COSTS = _MomentsSerializer(), _SumsSerializer(), _CurveSerializer(), _CostsSerializer()
