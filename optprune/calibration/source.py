"""The source of statistics: what decides their bytes, so that they are not used for another model or text."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from optprune.calibration.partial_sums import PartialSums
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.numerics.fingerprint import fingerprint
from optprune.system.environment import machine, versions
from optprune.system.wording import shown

IDLE = ("transformers_version", "dtype", "torch_dtype")
"""the fields of a config that say nothing of what a model computes"""


@dataclass(frozen=True)
class Source:
    """A dense model and a text, as far as the statistics of the one on the other depend on them."""

    facts: dict[str, Any]
    """what decides the bytes, in words"""

    @classmethod
    def of(cls, decoder: Decoder, batches: Sequence[Tensor], partial_sums: PartialSums) -> "Source":
        """The source that a run has: all weights are read for it, a block at a time."""
        return cls(
            {
                "the model": digest_of_weights(decoder),
                "its dtype": str(decoder.model.dtype),
                "the calibration tokens": fingerprint(list(batches)),
                "the number of partial sums": partial_sums.count,
                "the version": versions(),
                "the machine": machine(decoder.model.device),
            }
        )

    @property
    def digest(self) -> str:
        """A short name of all of it."""
        return hashlib.sha256(repr(sorted(self.facts.items())).encode()).hexdigest()[:24]

    def check(self, other: "Source") -> None:
        """Raise InputError, which names the first fact that differs, where a run has another source."""
        for what, before in self.facts.items():
            now = other.facts.get(what)
            if now != before:
                raise InputError(
                    f"the statistics were collected where {what} was {shown(before)}, and here it is {shown(now)}: "
                    "collect them anew"
                )


def digest_of_weights(decoder: Decoder) -> str:
    """A SHA-256 hex digest of a model's weights and of what its config says: the same wherever its blocks are."""
    model, blocks = decoder.model, f"{decoder.architecture.blocks}."
    config = {key: value for key, value in model.config.to_dict().items() if key[0] != "_" and key not in IDLE}
    found = [repr(sorted(config.items()))]
    found += [fingerprint([name, part]) for name, part in model.named_parameters() if not name.startswith(blocks)]
    for index in range(len(decoder.blocks)):
        with decoder.resident(index):
            found.append(fingerprint(sorted(decoder.weights(index).items(), key=lambda pair: pair[0])))
    return hashlib.sha256("\n".join(found).encode()).hexdigest()
