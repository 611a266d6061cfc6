"""The costs of removal in a run folder: measured once, and read again by a run that goes on."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from optprune.calibration import DenseStatistics
from optprune.calibration.dense_statistics import KnownMoments, Removal
from optprune.calibration.partial_sums import PartialSums
from optprune.calibration.statistics_cache import Key
from optprune.models import Decoder
from optprune.numerics.fingerprint import fingerprint
from optprune.problems import ExpertChoice, LayerLoss, LinkedLeastSquares
from optprune.system.folders import RunFolder

PREFIX, REST = "cost-", "rest"


@dataclass(frozen=True)
class Measured:
    """What was measured: tensors by name, and plain data."""

    tensors: dict[str, Tensor]
    rest: Any = None


class KeptCosts:
    """The files of costs in a run folder, each named after the problem whose costs it holds."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @property
    def names(self) -> list[str]:
        """The names of the files."""
        return [name for name in self._folder.files if name.startswith(PREFIX)]

    def once(self, key: Key, measure: Callable[[], Measured], device: torch.device | None = None) -> Measured:
        """Return what was measured under a key: from its file, with tensors on a device, or by `measure`."""
        name = f"{PREFIX}{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}"
        if self._folder.holds(name):
            return self._read(name, str(device or "cpu"))
        found = measure()
        tensors = {part: tensor.detach().contiguous() for part, tensor in found.tensors.items()}
        data = save(tensors, {REST: json.dumps(found.rest)})
        self._folder.keep(name, lambda stream: stream.write(data))
        return found

    def drop(self) -> None:
        """Delete the files."""
        self._folder.forget(self.names)

    def _read(self, name: str, device: str) -> Measured:
        try:
            with safe_open(self._folder.folder / name, framework="pt", device=device) as stored:
                tensors = {part: stored.get_tensor(part).clone() for part in stored.keys()}  # noqa: SIM118  # no mapping
                return Measured(tensors, json.loads(stored.metadata()[REST]))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise self._folder.damaged(name) from error


class JournalledStatistics(DenseStatistics):
    """What dividing a budget asks of dense statistics, with the costs of removal kept in a run folder."""

    def __init__(self, inner: DenseStatistics, costs: KeptCosts) -> None:
        self._inner, self._costs = inner, costs

    def known(
        self, decoder: Decoder, batches: Sequence[Tensor], held_out: int, partial_sums: PartialSums
    ) -> KnownMoments | None:
        return self._inner.known(decoder, batches, held_out, partial_sums)

    def removal(self, problem: LinkedLeastSquares, batch: int) -> Removal:
        def measure() -> Measured:
            order, losses, notes = self._inner.removal(problem, batch)
            return Measured({"order": order, "losses": losses}, list(notes))

        device = problem.loss.weight.device
        found = self._costs.once(("removal", problem.fingerprint(), str(device), batch), measure, device)
        return found.tensors["order"], found.tensors["losses"], tuple(map(str, found.rest))

    def entries(self, loss: LayerLoss, stride: int, measure: Callable[[], Tensor]) -> Tensor:
        def measured() -> Measured:
            return Measured({"costs": self._inner.entries(loss, stride, measure)})

        key = ("entries", fingerprint(loss), str(loss.weight.device), stride)
        return self._costs.once(key, measured).tensors["costs"]

    def experts(self, problem: ExpertChoice) -> tuple[list[int], list[float]]:
        def measure() -> Measured:
            return Measured({}, self._inner.experts(problem))

        order, costs = self._costs.once(("experts", fingerprint(problem), str(problem.logits.device)), measure).rest
        return list(map(int, order)), list(map(float, costs))

    def scores(self, key: Key, measure: Callable[[], list[float]]) -> list[float]:
        def measured() -> Measured:
            return Measured({}, self._inner.scores(key, measure))

        return list(map(float, self._costs.once(("scores", *key), measured).rest))
