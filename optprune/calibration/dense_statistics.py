"""What is measured of the dense model before anything is removed, and may be measured once for several recipes."""

import time
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar, final

import torch
from torch import Tensor

from optprune.calibration.fisher_pass import collect_metrics, positions_before, sampled
from optprune.calibration.known_moments import KnownMoments
from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.source import Source
from optprune.calibration.statistics_cache import CacheEntry, FolderCache, Key, MemoryCache, Serializer
from optprune.metric import Metrics, MetricSums
from optprune.models import Decoder
from optprune.numerics.fingerprint import fingerprint
from optprune.problems import ExpertChoice, LayerLoss, LinkedLeastSquares
from optprune.solvers import removal_curve
from optprune.solvers.experts import elimination

Removal = tuple[Tensor, Tensor, tuple[str, ...]]
"""a removal curve: the order in which units go, the loss after each, and notes"""
Value = TypeVar("Value")


class DenseStatistics:
    """Output metrics, moments and removal curves, measured whenever they are asked for."""

    def begin(self, decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums) -> None:
        """A run on all these batches begins: InputError where it is not one that these statistics are for."""

    def known(
        self, decoder: Decoder, batches: Sequence[Tensor], held_out: int, partial_sums: PartialSums
    ) -> KnownMoments | None:
        """What is known of the moments of the dense blocks on these batches; None where nothing is kept of them.

        The last `held_out` batches are kept apart.
        """
        return None

    def metrics(
        self,
        decoder: Decoder,
        batches: Iterable[Tensor],
        seed: int,
        full: Collection[str],
        widest: float,
        on_pass: Callable[[int, int], None],
        partial_sums: PartialSums | None = None,
    ) -> Metrics:
        """The output metrics of a model, not damped, with labels drawn by a seed: see `collect_metrics`."""
        batches, partial_sums = list(batches), partial_sums or PartialSums()
        labels = sampled(seed, positions_before(batches, partial_sums))
        return collect_metrics(
            decoder, batches, labels, full=full, widest=widest, on_pass=on_pass, partial_sums=partial_sums
        )

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        """The removal curve of a layer's units: see `removal_curve`."""
        return removal_curve(problem, batch=batch)

    def entries(self, loss: LayerLoss, stride: int, measure: Callable[[], Tensor]) -> Tensor:
        """What every `stride`-th of a layer's weights costs, in order of size: [n], as `measure` finds it."""
        return measure()

    def experts(self, problem: ExpertChoice) -> tuple[list[int], list[float]]:
        """Return the order in which experts of a mixture are eliminated, and the cost after each: see `elimination`."""
        return elimination(problem)

    def scores(self, key: Key, measure: Callable[[], list[float]]) -> list[float]:
        """Return the scores of sub-blocks, as `measure` finds them; within a run the key says which they are."""
        return measure()


class Statistics(DenseStatistics):
    """Dense statistics measured once and kept: `prune` need not measure again what several recipes have in common.

    `optprune.collect` makes those of one model on one text, which refuse any other. Without a source, what was measured
    goes by its content: the model's weights, the tokens, the seed, the layer's problem; so one object may serve copies
    of a model, other texts and other models, and a model that is changed is measured anew. Everything is kept until
    `forget`: in memory where it was measured, or in a folder.
    """

    def __init__(self, source: Source | None = None, folder: str | Path | None = None) -> None:
        """Those of one `source`, where it is named; a `folder`, which only such a one has, is made or gone on with."""
        self.source = source
        """what the statistics are of; None where they go by content"""
        self.seconds_saved = 0.0
        """the seconds of measuring that were saved"""
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
        on_pass: Callable[[int, int], None],
        partial_sums: PartialSums | None = None,
    ) -> Metrics:
        batches, partial_sums = list(batches), partial_sums or PartialSums()
        source = self._present or Source.of(decoder, batches, partial_sums)
        tokens, device = fingerprint(batches), decoder.model.device
        scope = ("metric", source.digest, tokens, str(device), seed, *sorted(full), float(widest), partial_sums.count)
        names = [decoder.name(index, path) for index in range(len(decoder.blocks)) for path in decoder.paths(index)]
        if not all(self._cache.has((*scope, name)) for name in names):
            began = time.perf_counter()
            found = super().metrics(decoder, batches, seed, full, widest, on_pass, partial_sums)
            seconds = (time.perf_counter() - began) / max(1, len(names))
            for name in names:
                self._cache.put((*scope, name), CacheEntry(found.sums(name), seconds), SUMS)
            return found
        sums = {}
        for name in names:
            kept = self._cache.get((*scope, name), SUMS, device)
            assert kept is not None
            self._add_saved(kept.seconds)
            sums[name] = kept.value
        return Metrics(sums)

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        device = problem.loss.weight.device
        key = ("removal", problem.fingerprint(), str(device), batch)
        return self._once(key, CURVE, device, lambda: super(Statistics, self).removal(problem, batch))

    def entries(self, loss: LayerLoss, stride: int, measure: Callable[[], Tensor]) -> Tensor:
        device = torch.device("cpu")
        key = ("entries", fingerprint(loss), str(loss.weight.device), stride)
        # A copy, which may be scaled.
        return self._once(key, COSTS, device, measure).clone()

    def forget(self) -> None:
        """Free all that is kept."""
        self._cache.clear()

    def _once(self, key: Key, form: Serializer[Value], device: torch.device, measure: Callable[[], Value]) -> Value:
        """What was measured under this key, or is now."""
        kept = self._cache.get(key, form, device)
        if kept is not None:
            self._add_saved(kept.seconds)
            return kept.value
        began = time.perf_counter()
        value = measure()
        self._cache.put(key, CacheEntry(value, time.perf_counter() - began), form)
        return value

    def _add_saved(self, seconds: float) -> None:
        self.seconds_saved += seconds


@final
class _SumsForm(Serializer[MetricSums]):
    def parts(self, value: MetricSums) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return value.parts(), {"width": value.width, "tokens": value.tokens, "full": value.full}

    def whole(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> MetricSums:
        # Whole matrices of all layers are too much to hold: each is read when its block is pruned.
        width, tokens, full = int(rest["width"]), int(rest["tokens"]), bool(rest["full"])
        return MetricSums.elsewhere(width, tokens, lambda: dict(tensors), full=full)


@final
class _CurveForm(Serializer[Removal]):
    def parts(self, value: Removal) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"order": value[0], "losses": value[1]}, {"notes": list(value[2])}

    def whole(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Removal:
        return tensors["order"], tensors["losses"], tuple(map(str, rest["notes"]))


@final
class _CostsForm(Serializer[Tensor]):
    def parts(self, value: Tensor) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"costs": value}, {}

    def whole(self, tensors: Mapping[str, Tensor], rest: Mapping[str, Any]) -> Tensor:
        return tensors["costs"]


SUMS, CURVE, COSTS = _SumsForm(), _CurveForm(), _CostsForm()
