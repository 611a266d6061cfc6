"""The audit of a folder: what its weights are, against its config, its report, the original and what is expected."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.models import BlockShape
from optprune.models.draft import draft_in
from optprune.report.expectations import (
    Expectation,
    InEveryGroup,
    WeightFigures,
    describe_break,
    read_expectation,
    report_claims,
)
from optprune.report.stored import (
    Fault,
    Original,
    StoredModel,
    config_faults,
    open_stored,
    original_from_model,
    original_from_report,
    shares_kept,
)
from optprune.report.zeros import (
    NAMED,
    BrokenGroups,
    DeadUnits,
    LayerPattern,
    Zeros,
    broken_groups,
    dead_units,
    layer_pattern,
)
from optprune.system.files import json_text

NEARLY = 0.01
"""the share of groups that may break an N:M which seems to be meant: then the first one is told"""


@dataclass(frozen=True)
class Audit:
    """What a model is, measured from its stored weights; it passes where nothing is wrong with it."""

    model: str
    layers: tuple[LayerPattern, ...]
    """every linear layer of the decoder blocks"""
    blocks: tuple[BlockShape, ...]
    """what the blocks hold, by the weights"""
    original: Original | None
    """what the model was before, from another model or a report.json; None where that is not known"""
    original_weights: int | None
    """the linear weights that the original had"""
    sizes: Mapping[str, tuple[int, int]]
    """the outputs and inputs of the layers in the original, by their names now"""
    shares: Mapping[str, tuple[float, ...]]
    """the share of its weights that each kind of layer keeps, by block of the original; else of the largest block"""
    dead: tuple[DeadUnits, ...]
    """the units that could be cut off without a change of any output"""
    faults: tuple[Fault, ...]
    """what is wrong, and what is expected and not so"""
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether nothing is wrong and everything as expected."""
        return not self.faults

    @property
    def weights(self) -> int:
        """The linear weights of the decoder blocks that are stored."""
        return sum(layer.outputs * layer.inputs for layer in self.layers)

    @property
    def zeros(self) -> int:
        """How many of them are zero."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> float | None:
        """The share of the original's linear weights that is cut off or zero; None where that is not known."""
        return None if self.original_weights is None else 1 - (self.weights - self.zeros) / self.original_weights

    @property
    def patterns(self) -> tuple[str, ...]:
        """The N:M patterns, of those with names, that hold in every layer."""
        names = self.layers[0].patterns if self.layers else ()
        return tuple(name for name in names if all(name in layer.patterns for layer in self.layers))

    def to_json(self) -> str:
        """All of it as indented JSON."""
        weights, zeros = self.weights, self.zeros
        found: dict[str, Any] = {
            "model": self.model,
            "passed": self.passed,
            "faults": [asdict(fault) for fault in self.faults],
            "notes": list(self.notes),
            "linear_weights": weights,
            "zeros": zeros,
            "sparsity": zeros / weights if weights else 0.0,
            "original": None if self.original is None else self.original.model,
            "original_weights": self.original_weights,
            "removed": self.removed,
            "patterns": list(self.patterns),
            "same_in_rows": all(layer.same_in_rows for layer in self.layers),
            "dead": [asdict(units) for units in self.dead],
            "blocks": [asdict(shape) for shape in self.blocks],
            "original_blocks": None if self.original is None else [asdict(shape) for shape in self.original.shapes],
            "layers": [
                {**asdict(layer), "sparsity": layer.sparsity, "original": self.sizes.get(layer.name)}
                for layer in self.layers
            ],
        }
        return json_text(found)


def audit(folder: str | Path, against: str | Path | None = None, expect: Sequence[str] = ()) -> Audit:
    """What a model is, by whoever it was made, read from its stored weights a tensor at a time.

    Its tensors are held against its config, its report.json where it has one of these weights, the model `against`
    that it was made from, and what is expected: N:M such as 2:4, rows, sparsity=0.5 (exact but for the rounding of
    rows), sparsity=0.19..0.21, multiple=64 (of MLP widths), dead=0 (units that could go for free). InputError for what
    cannot be read, of an architecture that is not known, or no expectation.
    """
    expected = [(text, read_expectation(text)) for text in expect]
    stored = open_stored(str(folder))
    before = None if against is None else open_stored(str(against), draft_in(stored.config))
    told = report_claims(stored)
    groups = {(each.n, each.m) for _, each in expected if isinstance(each, InEveryGroup)} | set(NAMED)
    reading = _Reading(stored, groups | told.groups)
    original = (
        original_from_report(stored.decoder, stored.source) if before is None else original_from_model(before, stored)
    )
    weights = None if original is None else original.weights(stored.decoder)
    shapes, layers = stored.decoder.shapes(), tuple(reading.layers)
    dead = dead_units(stored.decoder, reading.zeros)
    measured = WeightFigures(
        layers, reading.breaks, [shape.mlp_width for shape in shapes], sum(units.count for units in dead), weights
    )
    faults = [*stored.faults, *reading.faults, *told.faults(measured), *_unmet(expected, measured)]
    if before is not None:
        faults += config_faults(before, stored)
    return Audit(
        model=stored.source,
        layers=layers,
        blocks=shapes,
        original=original,
        original_weights=weights,
        sizes={} if original is None else original.sizes(stored.decoder),
        shares=shares_kept(stored.decoder, layers, original),
        dead=dead,
        faults=tuple(faults),
        notes=(*told.notes, *_nearly(measured)),
    )


class _Reading:
    """One pass over the tensors: each is read, measured, and forgotten."""

    def __init__(self, stored: StoredModel, groups: set[tuple[int, int]]) -> None:
        self.layers: list[LayerPattern] = []
        self.breaks: dict[str, list[BrokenGroups]] = {}
        self.zeros: dict[str, Zeros] = {}
        self.faults: list[Fault] = []
        decoder = stored.decoder
        linear = {
            f"{decoder.name(block, path)}.weight": decoder.name(block, path)
            for block in range(len(decoder.blocks))
            for path in decoder.paths(block)
        }
        # In the order of the blocks, whatever that in the files is.
        for name in dict.fromkeys([*(name for name in linear if name in stored.tensors), *stored.tensors]):
            tensor = stored.tensors[name].read()
            self._look_for_nan(name, tensor)
            if name in linear and tensor.ndim == 2 and tensor.numel():
                self.layers.append(layer_pattern(linear[name], tensor))
                self.breaks[linear[name]] = [broken_groups(tensor, n, m) for n, m in sorted(groups)]
                self.zeros[name] = Zeros.of(tensor)
            elif tensor.ndim == 1:
                self.zeros[name] = Zeros.of(tensor[:, None])
        self._compare_head(stored)

    def _look_for_nan(self, name: str, tensor: Tensor) -> None:
        good = torch.isfinite(tensor)
        bad = tensor.numel() - int(good.sum())
        if bad:
            place = torch.nonzero(~good)[0].tolist()
            self.faults.append(
                Fault("nan", name, f"{name} holds {bad} values of NaN or infinity, the first at {place}")
            )

    def _compare_head(self, stored: StoredModel) -> None:
        if stored.shares_head and stored.ties is not None:
            head, embeddings = stored.ties
            if not torch.equal(stored.tensors[head].read(), stored.tensors[embeddings].read()):
                sentence = f"config.json ties {head} to {embeddings}, and both are stored and differ"
                self.faults.append(Fault("tied", head, f"{sentence}: readers take the one or the other"))


def _unmet(expected: Sequence[tuple[str, Expectation]], measured: WeightFigures) -> list[Fault]:
    return [Fault("expected", text, f"{text}: {said}") for text, each in expected for said in each.unmet(measured)]


def _nearly(measured: WeightFigures) -> list[str]:
    """The layers in which an N:M that is known by name holds almost everywhere."""
    return [
        f"almost {broken.pattern}: {describe_break(layer, broken)}"
        for layer in measured.layers
        for broken in measured.breaks[layer.name]
        if 0 < broken.broken <= NEARLY * broken.groups
    ]
