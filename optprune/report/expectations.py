"""Expectations of a model's weights, stated by the user or by its report.json, and their checks."""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import torch

from optprune.errors import InputError
from optprune.patterns import InGroups, InRows, PatternFamily, pattern_family
from optprune.report.reading import REPORT
from optprune.report.stored import Fault, StoredModel, original_from_report
from optprune.report.zeros import BrokenGroups, LayerPattern
from optprune.system.wording import counted, shown

FORMS = "N:M such as 2:4, rows, sparsity=0.5, sparsity=0.19..0.21, multiple=64, or dead=0"
NUMBER = r"(?:[01]|[01]?\.\d+)"


@dataclass(frozen=True)
class WeightFigures:
    """What was measured of a model, as far as expectations go."""

    layers: Sequence[LayerPattern]
    breaks: Mapping[str, Sequence[BrokenGroups]]
    """the groups that break each N:M that was asked for, by the names of layers"""
    widths: Sequence[int]
    """the MLP units of each block"""
    dead: int
    """the units that could go for free"""
    original: int | None
    """the linear weights that the original had, where that is known"""

    @property
    def there(self) -> int:
        """The linear weights that are stored."""
        return sum(layer.outputs * layer.inputs for layer in self.layers)

    @property
    def removed(self) -> int:
        """The linear weights that are cut off, as far as is known, or zero."""
        return (self.original or self.there) - self.there + sum(layer.zeros for layer in self.layers)


class Expectation(ABC):
    """Something that is expected of a model."""

    @abstractmethod
    def unmet(self, found: WeightFigures) -> list[str]:
        """A sentence for each place where it is not so; none where it is met."""


@final
@dataclass(frozen=True)
class InEveryGroup(Expectation):
    """At most n of every m consecutive inputs of every linear layer are not zero."""

    n: int
    m: int

    def unmet(self, found: WeightFigures) -> list[str]:
        return [
            said
            for layer in found.layers
            for broken in found.breaks[layer.name]
            if broken.pattern == f"{self.n}:{self.m}" and (said := describe_break(layer, broken))
        ]


@final
@dataclass(frozen=True)
class SameInRows(Expectation):
    """Every row of a layer has the same number of zeros."""

    def unmet(self, found: WeightFigures) -> list[str]:
        return [f"the rows of {layer.name} differ in their zeros" for layer in found.layers if not layer.same_in_rows]


@final
@dataclass(frozen=True)
class Share(Expectation):
    """A share of all linear weights is removed: cut off or zero."""

    low: float
    high: float

    def unmet(self, found: WeightFigures) -> list[str]:
        removed, whole = found.removed, found.original or found.there
        if self.low < self.high:
            least, most = self.low * whole, self.high * whole
        else:  # a whole number of entries: rows may be rounded, where the share of a row is not a whole number
            exact = [self.low * layer.inputs for layer in found.layers]
            least = sum(layer.outputs * math.floor(e + 1e-9) for layer, e in zip(found.layers, exact, strict=True))
            most = sum(layer.outputs * math.ceil(e - 1e-9) for layer, e in zip(found.layers, exact, strict=True))
            if whole != found.there:
                least, most = math.floor(self.low * whole + 1e-9), math.ceil(self.low * whole - 1e-9)
        if least <= removed <= most:
            return []
        wanted = f"{least:.12g}" if least == most else f"{least:.12g} to {most:.12g}"
        return [f"{removed} of {whole} linear weights ({removed / whole:.4%}) are removed, not {wanted}"]


@final
@dataclass(frozen=True)
class MultipleOf(Expectation):
    """The MLP width of every block is a multiple."""

    of: int

    def unmet(self, found: WeightFigures) -> list[str]:
        return [
            f"the MLP of block {block} has {width} units, which is no multiple of {self.of}"
            for block, width in enumerate(found.widths)
            if width % self.of
        ]


@final
@dataclass(frozen=True)
class DeadAtMost(Expectation):
    """No more than so many units could go for free."""

    most: int

    def unmet(self, found: WeightFigures) -> list[str]:
        return [f"{counted(found.dead, 'unit')} could go for free, not {self.most}"] if found.dead > self.most else []


def describe_break(layer: LayerPattern, broken: BrokenGroups) -> str:
    """Where a pattern does not hold in a layer, in words; nothing where it does."""
    if broken.holds:
        return ""
    n, m = broken.pattern.split(":")
    if not broken.groups:
        return f"{layer.name} has {layer.inputs} inputs, which are no groups of {m}"
    last = broken.first_input + int(m) - 1
    return (
        f"{broken.broken} of the {broken.groups} groups of {layer.name} keep more than {n} of {m}, the first is "
        f"row {broken.row}, inputs {broken.first_input} to {last}"
    )


def read_expectation(text: str) -> Expectation:
    """The expectation that a text states; InputError when it states none."""
    groups = re.fullmatch(r"([1-9]\d{0,5}):([1-9]\d{0,5})", text, re.ASCII)
    if groups is not None and int(groups[1]) < int(groups[2]):
        return InEveryGroup(int(groups[1]), int(groups[2]))
    if text == "rows":
        return SameInRows()
    share = re.fullmatch(rf"sparsity=({NUMBER})(?:\.\.({NUMBER}))?", text, re.ASCII)
    if share is not None:
        low, high = float(share[1]), float(share[2] or share[1])
        if 0 <= low <= high <= 1:
            return Share(low, high)
    count = re.fullmatch(r"(multiple|dead)=(\d{1,9})", text, re.ASCII)
    if count is not None and count[1] == "dead":
        return DeadAtMost(int(count[2]))
    if count is not None and int(count[2]):
        return MultipleOf(int(count[2]))
    raise InputError(f"the expectation {shown(text)} is not known: use {FORMS}")


@dataclass(frozen=True)
class ReportClaims:
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

    def faults(self, found: WeightFigures) -> list[Fault]:
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
                if self.family is not None
                and broken.pattern == self.family.name
                and (said := describe_break(layer, broken))
            ]
        return [Fault("report", REPORT, sentence) for sentence in faults]


def report_claims(stored: StoredModel) -> ReportClaims:
    """What the report.json of a source says, if it has one that tells of these weights."""
    silent, file = ReportClaims({}, None, False), Path(stored.source) / REPORT
    if not file.is_file() or _of_healing(file):
        return silent
    if not _is_report(file):
        return ReportClaims({}, None, False, (f"{REPORT} holds no report, so it is not believed",))
    original = original_from_report(stored.decoder, stored.source)
    if original is None:
        return ReportClaims({}, None, False, (f"{REPORT} tells of other weights than these, so it is not believed",))
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
        now = {number: index for index, number in enumerate(original.left)}
        blocks = stored.decoder.architecture.blocks
        kept = dict(_kept(report["layers"], blocks, now))
        family = _family(report["recipe"]["units"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return ReportClaims({}, None, False, (f"{REPORT} does not say what its layers keep, so it is not believed",))
    rounded = any(tensor.dtype == torch.float16 for tensor in stored.tensors.values())
    return ReportClaims(kept, family, rounded) if family is not None else silent


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
