"""The output metrics of a run in its folder, a file for each block, so that a run that goes on need not measure again.

`metrics.json` says what was measured of every layer; it is written last. A block's file goes once the block is
finished.
"""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.metric import Metrics, MetricSums
from optprune.models import Decoder
from optprune.models.checkpoint import stored_tensors, write_tensors
from optprune.system.folders import RunFolder

INDEX = "metrics.json"


class MetricFiles:
    """The files of the metrics in a run folder."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    @property
    def there(self) -> bool:
        """Whether the metrics were measured."""
        return self._folder.lists(INDEX)

    def file(self, block: int) -> Path:
        """Return the path of a block's file, there or not: it is no part of the model, so its name ends otherwise."""
        return self._folder.folder / _name(block)

    def keep(self, decoder: Decoder, metrics: Metrics) -> Metrics:
        """Write metrics that were measured, block by block; they are read from there from now on."""
        layers: dict[str, dict[str, Any]] = {}
        for block in range(len(decoder.blocks)):
            names = [name for path in decoder.paths(block) if (name := decoder.name(block, path)) in metrics]
            sums = {name: metrics.sums(name) for name in names}
            parts = {f"{name}/{part}": value for name in names for part, value in sums[name].parts().items()}
            self._folder.keep(_name(block), partial(write_tensors, tensors=parts))
            del parts
            for name, of in sums.items():
                layers[name] = {"block": block, "width": of.width, "tokens": of.tokens, "full": of.full}
        self._folder.write(INDEX, layers)
        return self._metrics(layers, decoder.model.device)

    def read(self, decoder: Decoder, finished: Collection[int]) -> Metrics | None:
        """Return the metrics that an earlier run has measured.

        None where it has not, or where a file of a block that is not `finished` is not as it was written.
        """
        needed = [block for block in range(len(decoder.blocks)) if block not in finished]
        if not self._folder.holds(INDEX) or not all(self._folder.holds(_name(block)) for block in needed):
            return None
        try:
            return self._metrics(self._folder.read(INDEX), decoder.model.device)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._folder.damaged(INDEX) from error

    def drop(self, block: int) -> None:
        """Delete the file of a block that is finished."""
        self._folder.forget([_name(block)])

    def _metrics(self, layers: Mapping[str, Mapping[str, Any]], device: torch.device) -> Metrics:
        def sums(name: str, block: int, width: int, tokens: int, full: bool) -> MetricSums:
            def fetch() -> dict[str, Tensor]:
                stored = stored_tensors(self.file(block), str(self._folder.folder))
                own = {key.removeprefix(f"{name}/"): tensor for key, tensor in stored.items()}
                return {part: tensor.read().to(device) for part, tensor in own.items() if "/" not in part}

            return MetricSums.elsewhere(int(width), int(tokens), fetch, full=bool(full))

        return Metrics({name: sums(name, **of) for name, of in layers.items()})


def _name(block: int) -> str:
    return f"metric-{block:05d}.sums"
