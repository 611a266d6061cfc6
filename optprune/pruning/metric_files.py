"""The output metrics of a run in its folder, a file for each block, so that a run that goes on need not measure again.

`metrics.json` says what was measured of every layer, and a SHA-256 digest of each file; it is written last. A block's
file goes once the block is finished.
"""

import hashlib
import json
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.errors import InputError
from optprune.metric import Metrics, MetricSums
from optprune.models import Decoder
from optprune.models.checkpoint import stored_tensors, write_tensors
from optprune.system.files import read_json, write_whole

INDEX = "metrics.json"


class MetricFiles:
    """The files of the metrics in a run folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def file(self, block: int) -> Path:
        """The file of a block, there or not: no part of the model, so that its name ends otherwise."""
        return self.folder / f"metric-{block:05d}.sums"

    def keep(self, decoder: Decoder, metrics: Metrics) -> Metrics:
        """Have metrics that were measured on the disk, block by block; they are read from there from now on."""
        layers: dict[str, dict[str, Any]] = {}
        digests: dict[str, str] = {}
        for block in range(len(decoder.blocks)):
            names = [name for path in decoder.paths(block) if (name := decoder.name(block, path)) in metrics]
            sums = {name: metrics.sums(name) for name in names}
            parts = {f"{name}/{part}": value for name in names for part, value in sums[name].parts().items()}
            write_whole(self.file(block), partial(write_tensors, tensors=parts))
            del parts
            digests[str(block)] = _digest(self.file(block))
            for name, of in sums.items():
                layers[name] = {"block": block, "width": of.width, "tokens": of.tokens, "full": of.full}
        text = json.dumps({"layers": layers, "files": digests}, indent=2).encode()
        write_whole(self.folder / INDEX, lambda stream: stream.write(text))
        return self._metrics(layers, decoder.model.device)

    def read(self, decoder: Decoder, finished: Collection[int]) -> Metrics | None:
        """The metrics that an earlier run has measured; None where it has not, or a file that is needed is gone.

        InputError where a file of a block that is not `finished` is not the one that was written.
        """
        index = self.folder / INDEX
        needed = [block for block in range(len(decoder.blocks)) if block not in finished]
        if not index.is_file() or not all(self.file(block).is_file() for block in needed):
            return None
        try:
            data = read_json(index.read_text(encoding="utf-8"), str(index))
            layers = {str(name): dict(of) for name, of in data["layers"].items()}
            digests = {block: data["files"][str(block)] for block in needed}
            metrics = self._metrics(layers, decoder.model.device)
        except (OSError, UnicodeDecodeError, InputError, KeyError, TypeError, ValueError, AttributeError) as error:
            raise self._damaged(index) from error
        for block, digest in digests.items():
            if _digest(self.file(block)) != digest:
                raise self._damaged(self.file(block))
        return metrics

    def drop(self, block: int) -> None:
        """Delete the file of a block that is finished."""
        self.file(block).unlink(missing_ok=True)

    def _metrics(self, layers: Mapping[str, Mapping[str, Any]], device: torch.device) -> Metrics:
        def sums(name: str, block: int, width: int, tokens: int, full: bool) -> MetricSums:
            def fetch() -> dict[str, Tensor]:
                stored = stored_tensors(self.file(block), str(self.folder))
                own = {key.removeprefix(f"{name}/"): tensor for key, tensor in stored.items()}
                return {part: tensor.read().to(device) for part, tensor in own.items() if "/" not in part}

            return MetricSums.elsewhere(int(width), int(tokens), fetch, full=bool(full))

        return Metrics({name: sums(name, **of) for name, of in layers.items()})

    def _damaged(self, file: Path) -> InputError:
        return InputError(
            f"{file.name} of the run in {self.folder} is damaged, or another run's: delete that file, and the output "
            "metric is measured again"
        )


def _digest(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
