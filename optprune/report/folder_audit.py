"""Audit of a model folder: its weights against config, report, original and expectations."""

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
from optprune.system.wording import counted

NEARLY = 0.01
"""the largest share of groups that break an N:M pattern for which a note names the first"""


@dataclass(frozen=True)
class Audit:
    """Figures and faults of a model, measured from its stored weights; without faults it passes."""

    model: str
    layers: tuple[LayerPattern, ...]
    """the linear layers of the decoder blocks"""
    blocks: tuple[BlockShape, ...]
    """the shapes of the blocks, by the weights"""
    original: Original | None
    """the model before pruning, from another model or report.json; None if unknown"""
    original_weights: int | None
    """the number of linear weights of the original"""
    sizes: Mapping[str, tuple[int, int]]
    """the original outputs and inputs of the layers, by their current names"""
    shares: Mapping[str, tuple[float, ...]]
    """the share of nonzero weights of each layer, by path and block, over the original or else the largest block"""
    dead: tuple[DeadUnits, ...]
    """the units whose removal changes no output"""
    faults: tuple[Fault, ...]
    """the errors, and the expectations that are not met"""
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        """Whether there are no faults."""
        return not self.faults

    @property
    def weights(self) -> int:
        """The number of stored linear weights of the decoder blocks."""
        return sum(layer.outputs * layer.inputs for layer in self.layers)

    @property
    def zeros(self) -> int:
        """The number of zeros among them."""
        return sum(layer.zeros for layer in self.layers)

    @property
    def removed(self) -> float | None:
        """The share of the original's linear weights that is cut off or zero; None if unknown."""
        return None if self.original_weights is None else 1 - (self.weights - self.zeros) / self.original_weights

    @property
    def patterns(self) -> tuple[str, ...]:
        """The N:M patterns in `NAMED` that hold in every layer."""
        names = self.layers[0].patterns if self.layers else ()
        return tuple(name for name in names if all(name in layer.patterns for layer in self.layers))

    def to_json(self) -> str:
        """Return all fields as indented JSON."""
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
            "blocks": [shape.counts(("experts",)) for shape in self.blocks],
            "original_blocks": None
            if self.original is None
            else [shape.counts(("experts",)) for shape in self.original.shapes],
            "layers": [
                {**asdict(layer), "sparsity": layer.sparsity, "original": self.sizes.get(layer.name)}
                for layer in self.layers
            ],
        }
        return json_text(found)


def audit(folder: str | Path, against: str | Path | None = None, expect: Sequence[str] = ()) -> Audit:
    """Measure a model of any origin from its stored weights, a tensor at a time.

    Its tensors are compared with its config, its report.json if that describes these weights, the model `against`
    from which it was made, and the expectations: N:M such as 2:4, rows, sparsity=0.5 (exact except for the rounding of
    rows), sparsity=0.19..0.21, multiple=64 (of MLP widths), dead=0 (dead units). InputError for a model that cannot be
    read, an unknown architecture or an unknown expectation.
    """
    expected = [(text, read_expectation(text)) for text in expect]
    stored = open_stored(str(folder))
    before = None if against is None else open_stored(str(against), draft_in(stored.config))
    claims = report_claims(stored)
    groups = {(each.n, each.m) for _, each in expected if isinstance(each, InEveryGroup)} | set(NAMED)
    reading = _Reading(stored, groups | claims.groups)
    original = (
        original_from_report(stored.decoder, stored.source) if before is None else original_from_model(before, stored)
    )
    weights = None if original is None else original.weights(stored.decoder)
    shapes, layers = stored.decoder.shapes(), tuple(reading.layers)
    dead = dead_units(stored.decoder, reading.zeros)
    measured = WeightFigures(
        layers, reading.breaks, [shape.mlp_width for shape in shapes], sum(units.count for units in dead), weights
    )
    faults = [*stored.faults, *reading.faults, *claims.faults(measured), *_unmet(expected, measured)]
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
        notes=(*claims.notes, *_nearly(measured)),
    )


class _Reading:
    """One pass over the tensors: each is read, measured and released."""

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
        # In the order of the blocks, which may differ from that in the files.
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
                Fault("nan", name, f"{name} has {counted(bad, 'value')} of NaN or infinity, the first at {place}")
            )

    def _compare_head(self, stored: StoredModel) -> None:
        if stored.shares_head and stored.ties is not None:
            head, embeddings = stored.ties
            if not torch.equal(stored.tensors[head].read(), stored.tensors[embeddings].read()):
                sentence = f"config.json ties {head} to {embeddings}, but both are stored and differ"
                self.faults.append(Fault("tied", head, f"{sentence}: programs load one or the other"))


def _unmet(expected: Sequence[tuple[str, Expectation]], measured: WeightFigures) -> list[Fault]:
    return [
        Fault("expected", text, f"{text}: {sentence}") for text, each in expected for sentence in each.unmet(measured)
    ]


def _nearly(measured: WeightFigures) -> list[str]:
    """Return a note for each layer in which almost all groups keep an N:M pattern."""
    return [
        f"almost {broken.pattern}: {describe_break(layer, broken)}"
        for layer in measured.layers
        for broken in measured.breaks[layer.name]
        if 0 < broken.broken <= NEARLY * broken.groups
    ]
