"""Expectations of a model's weights, stated by the user or by its report.json, and their checks."""

import json
import math
import re
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
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
    """Figures of a model's weights that expectations are checked against."""

    layers: Sequence[LayerPattern]
    breaks: Mapping[str, Sequence[BrokenGroups]]
    """the groups that break each requested N:M pattern, by the name of the layer"""
    widths: Sequence[int]
    """the MLP width of each block"""
    dead: int
    """the number of dead units"""
    original: int | None
    """the number of linear weights of the original; None if unknown"""

    @property
    def stored(self) -> int:
        """The number of stored linear weights."""
        return sum(layer.outputs * layer.inputs for layer in self.layers)

    @property
    def removed(self) -> int:
        """The number of linear weights that are zero, or were cut off if the original is known."""
        return (self.original or self.stored) - self.stored + sum(layer.zeros for layer in self.layers)


class Expectation(ABC):
    """A condition on the weights of a model."""

    @abstractmethod
    def unmet(self, found: WeightFigures) -> list[str]:
        """Return a sentence for each place where the condition is broken."""


@final
@dataclass(frozen=True)
class InEveryGroup(Expectation):
    """At most n nonzero weights of every m consecutive inputs, in every linear layer."""

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
    """Equal numbers of zeros in the rows of each layer."""

    def unmet(self, found: WeightFigures) -> list[str]:
        return [
            f"the rows of {layer.name} have unequal numbers of zeros"
            for layer in found.layers
            if not layer.same_in_rows
        ]


@final
@dataclass(frozen=True)
class Share(Expectation):
    """A share of all linear weights that is removed: cut off or zero."""

    low: float
    high: float

    def unmet(self, found: WeightFigures) -> list[str]:
        removed, whole = found.removed, found.original or found.stored
        if self.low < self.high:
            least, most = self.low * whole, self.high * whole
        else:  # an exact share: each row may round it to a whole number of entries
            exact = [self.low * layer.inputs for layer in found.layers]
            least = sum(layer.outputs * math.floor(e + 1e-9) for layer, e in zip(found.layers, exact, strict=True))
            most = sum(layer.outputs * math.ceil(e - 1e-9) for layer, e in zip(found.layers, exact, strict=True))
            if whole != found.stored:
                least, most = math.floor(self.low * whole + 1e-9), math.ceil(self.low * whole - 1e-9)
        if least <= removed <= most:
            return []
        wanted = f"{least:.12g}" if least == most else f"{least:.12g} to {most:.12g}"
        return [f"{removed} of {whole} linear weights ({removed / whole:.4%}) are removed, not {wanted}"]


@final
@dataclass(frozen=True)
class MultipleOf(Expectation):
    """A multiple of `of` as the MLP width of every block."""

    of: int

    def unmet(self, found: WeightFigures) -> list[str]:
        return [
            f"the MLP of block {block} has {width} units, which is not a multiple of {self.of}"
            for block, width in enumerate(found.widths)
            if width % self.of
        ]


@final
@dataclass(frozen=True)
class DeadAtMost(Expectation):
    """At most this number of dead units."""

    most: int

    def unmet(self, found: WeightFigures) -> list[str]:
        return (
            [f"the model has {counted(found.dead, 'dead unit')}, not at most {self.most}"]
            if found.dead > self.most
            else []
        )


def describe_break(layer: LayerPattern, broken: BrokenGroups) -> str:
    """Return a sentence about the groups that break a pattern; an empty text where it holds."""
    if broken.holds:
        return ""
    n, m = broken.pattern.split(":")
    if not broken.groups:
        return f"{layer.name} has {layer.inputs} inputs, which cannot be divided into groups of {m}"
    last = broken.first_input + int(m) - 1
    return (
        f"{broken.broken} of the {broken.groups} groups of {layer.name} keep more than {n} of {m}, the first is "
        f"row {broken.row}, inputs {broken.first_input} to {last}"
    )


def read_expectation(text: str) -> Expectation:
    """Return the expectation of a text; InputError for other texts."""
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
    """Statements of a folder's report.json about the weights of its layers."""

    kept: Mapping[str, int]
    """the number of nonzero weights of each layer that was pruned by single weights, by its current name"""
    family: PatternFamily | None
    """the pattern of those layers"""
    rounded: bool
    """whether the dtype of the files rounds small weights to zero"""
    alike: bool = False
    """whether the rows of a layer have equal numbers of zeros; rounding to few bits adds more to some"""
    notes: tuple[str, ...] = ()

    @property
    def groups(self) -> set[tuple[int, int]]:
        """The N:M pattern of the report, if any."""
        return {(self.family.n, self.family.m)} if isinstance(self.family, InGroups) else set()

    def faults(self, found: WeightFigures) -> list[Fault]:
        """Return a fault for each difference between the weights and the report."""
        sentences = []
        for layer in found.layers:
            if layer.name not in self.kept:
                continue
            kept, reported = layer.outputs * layer.inputs - layer.zeros, self.kept[layer.name]
            if kept > reported or (kept < reported and not self.rounded):
                sentences.append(f"{layer.name} keeps {counted(kept, 'weight')}, not {reported} as {REPORT} says")
            if self.alike and not layer.same_in_rows and not self.rounded:
                sentences.append(f"the rows of {layer.name} have unequal numbers of zeros, unlike those in {REPORT}")
            sentences += [
                f"{sentence}, but {REPORT} says that the pattern is {broken.pattern}"
                for broken in found.breaks[layer.name]
                if self.family is not None
                and broken.pattern == self.family.name
                and (sentence := describe_break(layer, broken))
            ]
        return [Fault("report", REPORT, sentence) for sentence in sentences]


def report_claims(stored: StoredModel) -> ReportClaims:
    """Return the statements of the report.json beside a model; none, with a note, where it describes other weights."""
    none, file = ReportClaims({}, None, False), Path(stored.source) / REPORT
    if not file.is_file():
        return none
    try:
        report = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        report = None
    if not isinstance(report, dict):
        return replace(none, notes=(f"{REPORT} is not a report, so it is ignored",))
    if report.keys() == {"healing"}:  # the report of a healed model that another program pruned
        return none
    original = original_from_report(stored.decoder, stored.source)
    if original is None:
        return replace(none, notes=(f"{REPORT} describes other weights than these, so it is ignored",))
    try:
        now = {number: index for index, number in enumerate(original.left)}
        kept = dict(_kept(report["layers"], stored.decoder.architecture.blocks, now))
        family = _family(report["recipe"]["units"])
        alike = isinstance(family, InRows) and report["recipe"].get("bits", "none") in (None, "none")
    except (ValueError, KeyError, TypeError, AttributeError):
        return replace(none, notes=(f"{REPORT} has no kept weights of its layers, so it is ignored",))
    rounded = any(tensor.dtype == torch.float16 for tensor in stored.tensors.values())
    return none if family is None else ReportClaims(kept, family, rounded, alike)


def _kept(layers: list[dict[str, Any]], blocks: str, now: Mapping[int, int]) -> list[tuple[str, int]]:
    """Return the nonzero weights of each layer by its current name, from the blocks that are `now` there."""
    found = []
    for layer in layers:
        number, _, path = str(layer["name"]).removeprefix(f"{blocks}.").partition(".")
        if int(number) in now:
            found.append((f"{blocks}.{now[int(number)]}.{path}", int(layer["kept"])))
    return found


def _family(units: Any) -> PatternFamily | None:
    """Return the pattern of a recipe of single weights; None for other units."""
    if not (isinstance(units, dict) and "weights" in units):
        return pattern_family("unstructured") if units == "weights" else None
    return pattern_family(str(units["weights"]))
