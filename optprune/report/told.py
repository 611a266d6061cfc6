"""What report.json says of single weights, and whether the weights beside it are still so."""

import json
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from optprune.patterns import InGroups, InRows, PatternFamily, pattern_family
from optprune.report.expectations import Measured, told_of
from optprune.report.original import original_of
from optprune.report.reading import REPORT
from optprune.report.stored import Fault, Stored
from optprune.system.wording import counted


@dataclass(frozen=True)
class Told:
    """What the report of a folder says of its layers."""

    kept: Mapping[str, int]
    """the weights that are not zero in each layer that lost single ones, by its name now"""
    family: PatternFamily | None
    """the pattern of those layers"""
    rounded: bool
    """whether the weights are stored in a dtype in which small ones become zero"""
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> set[tuple[int, int]]:
        """The N:M that is told of."""
        return {(self.family.n, self.family.m)} if isinstance(self.family, InGroups) else set()

    def faults(self, found: Measured) -> list[Fault]:
        """Where the weights are not what the report says."""
        faults = []
        for layer in found.layers:
            if layer.name not in self.kept:
                continue
            kept, told = layer.outputs * layer.inputs - layer.zeros, self.kept[layer.name]
            if kept > told or (kept < told and not self.rounded):
                faults.append(f"{layer.name} keeps {counted(kept, 'weight')}, not {told} as {REPORT} says")
            if isinstance(self.family, InRows) and not layer.same_in_rows and not self.rounded:
                faults.append(f"the rows of {layer.name} differ in their zeros, and {REPORT} says that they do not")
            faults += [
                f"{said}, and {REPORT} says that it is {broken.pattern}"
                for broken in found.breaks[layer.name]
                if self.family is not None and broken.pattern == self.family.name and (said := told_of(layer, broken))
            ]
        return [Fault("report", REPORT, sentence) for sentence in faults]


def told_in(stored: Stored) -> Told:
    """What the report.json of a source says, if it has one that tells of these weights."""
    silent, file = Told({}, None, False), Path(stored.source) / REPORT
    if not file.is_file() or _of_healing(file):
        return silent
    if not _is_report(file):
        return Told({}, None, False, (f"{REPORT} holds no report, so it is not believed",))
    original = original_of(stored.decoder, stored.source)
    if original is None:
        return Told({}, None, False, (f"{REPORT} tells of other weights than these, so it is not believed",))
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        now = {number: index for index, number in enumerate(original.left)}
        blocks = stored.decoder.architecture.blocks
        kept = dict(_kept(report["layers"], blocks, now))
        family = _family(report["recipe"]["units"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return Told({}, None, False, (f"{REPORT} does not say what its layers keep, so it is not believed",))
    rounded = any(tensor.dtype == torch.float16 for tensor in stored.tensors.values())
    return Told(kept, family, rounded) if family is not None else silent


def _is_report(file: Path) -> bool:
    """Whether a file holds what may be a report: an object of JSON, whatever is in it."""
    with suppress(OSError, ValueError, RecursionError):
        return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    return False


def _of_healing(file: Path) -> bool:
    """Whether a report tells of healing alone, as that of a folder does which something else has pruned."""
    with suppress(OSError, ValueError, RecursionError):
        told = json.loads(file.read_text(encoding="utf-8"))
        return isinstance(told, dict) and told.keys() == {"healing"}
    return False


def _kept(layers: list[dict[str, Any]], blocks: str, now: Mapping[int, int]) -> list[tuple[str, int]]:
    found = []
    for layer in layers:
        number, _, path = str(layer["name"]).removeprefix(f"{blocks}.").partition(".")
        if int(number) in now:
            found.append((f"{blocks}.{now[int(number)]}.{path}", int(layer["kept"])))
    return found


def _family(units: Any) -> PatternFamily | None:
    """The pattern of a recipe of single weights; None for other units."""
    if not (isinstance(units, dict) and "weights" in units):
        return pattern_family("unstructured") if units == "weights" else None
    return pattern_family(str(units["weights"]))
