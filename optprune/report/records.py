"""Records of a pruning run: layers, blocks, recovered sub-modules, and the whole report."""

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from optprune.models import BlockShape
from optprune.report.phases import PhaseReport
from optprune.system.display import Displayed, SummaryTable
from optprune.system.files import json_text
from optprune.system.wording import counted, one_line

MOST_LAYERS = 10
"""the number of layers in the table, those with the largest errors"""


@dataclass(frozen=True)
class LayerReport:
    """Result of the solver at one layer."""

    name: str
    kind: str
    """the kind of problem"""
    solver: str
    """the chain of solvers"""
    relative_error: float
    """E|V x* - W x|^2 / E|W x|^2 on the calibration tokens, without damping, when the layer was solved; the errors
    after recovery are in `Report.recovered`. Where rotary pairs are removed, outputs are weighed by the metric"""
    held_out_error: float | None
    """the relative error on held-out tokens, where the recipe holds some out"""
    status: str
    objective: float
    lower_bound: float | None
    gap: float | None
    damping: float
    """the damping on the diagonal of the Gram matrix, in (input activation)^2"""
    tokens: int
    seconds: float
    kept: int
    units: int
    """the number of units before pruning"""
    dead_inputs: int
    notes: tuple[str, ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    """the earlier solvers of a chain: label, steps, seconds, and the objective after each"""


@dataclass(frozen=True)
class BlockChange:
    """Shape of a block before and after the run; a block without any part is removed from the model."""

    before: BlockShape
    after: BlockShape


@dataclass(frozen=True)
class RemovedPart:
    """A sub-block that was removed whole, and its score."""

    block: int
    """the number of the block in the dense model"""
    part: str
    """the name of the sub-block, attention, recurrent or mlp"""
    weights: int
    score: float
    """the score of the recipe at the moment of removal; the lowest score is removed first"""


@dataclass(frozen=True)
class RecoveredPart:
    """Result of the recovery of a sub-module; errors are E|f* - f|^2 / E|f|^2 of its output f, in the output metric."""

    name: str
    layers: tuple[str, ...]
    """the refitted layers, in order"""
    error_before: float
    """the relative error on the fitted batches"""
    error_after: float
    held_out_before: float
    """the relative error on the batches that decide when to stop"""
    held_out_after: float
    steps: int
    """the steps that were kept: of conjugate gradients over all layers and rounds"""
    seconds: float


@dataclass(frozen=True)
class VocabularyChange:
    """Removal of tokens from the vocabulary, and the refit of the rows that stay."""

    before: int
    """the rows of the embedding"""
    after: int
    parameters_removed: int
    tokens: int
    """the tokens of the text that the rows were refitted on; 0 where they were not"""
    divergence_before: float | None
    """the mean divergence from the dense model's predictions of the same texts, on held-out states, in nats"""
    divergence_after: float | None
    seconds: float

    def in_words(self) -> str:
        """Return the change as a line."""
        line = (
            f"{self.after:,} of {self.before:,} tokens stay in the vocabulary ({self.parameters_removed:,} parameters"
        )
        line += " removed)"
        if self.divergence_before is None or self.divergence_after is None:
            return f"{line}; their rows were not refitted"
        return (
            f"{line}; refitted rows lower the divergence from the dense model's predictions of the same text from "
            f"{self.divergence_before:.4f} to {self.divergence_after:.4f} nats"
        )


@dataclass(frozen=True)
class GoalReached:
    """Goal in place of a sparsity, and the sparsity that was chosen for it."""

    asked: str
    """the goal as the user wrote it"""
    unit: str
    """the unit of the figures, in words"""
    sparsity: float
    reached: float
    """the figure at this sparsity: bytes, or a ratio to the dense model's speed or bits per byte"""
    tried: tuple[tuple[float, float], ...] = ()
    """the sparsities that were tried, each with its figure"""

    def in_words(self) -> str:
        """Return the goal and its figure as a line."""
        figure = f"{self.reached / 2**20:.1f} MiB" if self.unit == BYTES else f"{self.reached:.4g}"
        return f"for the goal {one_line(self.asked)}, a sparsity of {self.sparsity:.4f} gives {figure} {self.unit}"


BYTES = "of weights"
"""the unit of a size"""


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """Report of a pruning run, written as report.json beside the weights."""

    model: str
    recipe: dict[str, Any]
    sparsity_requested: float
    sparsity_reached: float
    """the share of the decoder blocks' linear weights that were removed; after `bits` also those rounded to zero"""
    seconds: float
    floor_seconds: float
    """the seconds of the two calibration passes with their Gram products, which every run needs"""
    tokens: int
    seed: int
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = field(default=())
    calibration: str = ""
    """the source of the calibration tokens, if the caller named it"""
    allocation: dict[str, Any] = field(default_factory=dict)
    """the allocation, in the form that `Allocation.from_json` reads"""
    removed: tuple[RemovedPart, ...] = ()
    """the sub-blocks that were removed whole, in order"""
    recovered: tuple[RecoveredPart, ...] = ()
    """the sub-modules that were refitted to their dense output"""
    blocks: tuple[BlockChange, ...] = ()
    """the change of each block of the dense model"""
    phases: tuple[PhaseReport, ...] = ()
    """the phases of the run; the report.json of a checked folder has all of them"""
    vocabulary: VocabularyChange | None = None
    """the removal of tokens, where the recipe has one"""
    goal: GoalReached | None = None
    """the goal that the sparsity was chosen for, if any"""
    parameters_before: int | None = None
    """the parameters of the dense model; None in reports of earlier versions"""
    own_code: dict[str, str] = field(default_factory=dict)
    """digests of the code of the user's own solvers, objective and policy, by their places: a recipe file cannot hold
    them"""
    run_facts: dict[str, Any] = field(default_factory=dict)
    """the facts that determine the weights of a run with a journal (digests of the model and the tokens, the recipe,
    the machine); `--resume` compares them with those of the command"""

    def with_vocabulary(self, change: VocabularyChange | None) -> "Report":
        """Return the report of a run that removed tokens before its blocks were pruned."""
        if change is None:
            return self
        before = self.parameters_before
        whole = None if before is None else before + change.parameters_removed
        return replace(self, vocabulary=change, parameters_before=whole)

    @property
    def lost(self) -> str:
        """The word for the weights in `sparsity_reached`: removed, or zero where rounding to few bits adds zeros."""
        return "removed" if self.recipe.get("bits", "none") in (None, "none") else "zero"

    def requested(self, of_what: str = "") -> str:
        """Return what was asked for, in words: a goal, no sparsity, or a share, such as " of the time"."""
        if self.goal is not None:
            return f"{one_line(self.goal.asked)} requested"
        if not self.sparsity_requested:
            return "no sparsity requested"
        return f"{self.sparsity_requested:.2%}{of_what} requested"

    def __repr__(self) -> str:
        removed = f"{self.sparsity_reached:.2%} {self.lost}, {self.requested()}"
        return (
            f"Report({self.model!r}, {self.recipe.get('name')!r}, {removed}, {counted(len(self.layers), 'layer')} "
            "solved)"
        )

    def summary_table(self) -> SummaryTable:
        errors = [layer.relative_error for layer in self.layers]
        facts = [
            ("model", one_line(self.model)),
            (self.lost, f"{self.sparsity_reached:.2%} of the linear weights ({self.requested()})"),
            (
                "calibration",
                f"{self.tokens:,} tokens" + (f", {one_line(self.calibration)}" if self.calibration else ""),
            ),
            ("seconds", f"{self.seconds:.1f}, of which the two calibration passes take {self.floor_seconds:.1f}"),
        ]
        if self.vocabulary is not None:
            facts.append(("vocabulary", self.vocabulary.in_words()))
        if self.goal is not None:
            facts.append(("goal", self.goal.in_words()))
        if errors:
            mean = f"{sum(errors) / len(errors):.3g} over {counted(len(errors), 'layer')}"
            facts.append(("mean relative error", mean))
        facts += [("note", one_line(note)) for note in self.notes]
        worst = sorted(self.layers, key=lambda layer: -layer.relative_error)[:MOST_LAYERS]
        rows = [
            (
                layer.name,
                f"{layer.kept} of {layer.units}",
                f"{layer.relative_error:.3g}",
                "" if layer.held_out_error is None else f"{layer.held_out_error:.3g}",
                "" if layer.gap is None else f"{layer.gap:.3g}",
                layer.status,
            )
            for layer in worst
        ]
        columns = ("layer", "kept", "error", "held out", "gap", "status")
        filled = [place for place in range(len(columns)) if any(row[place] for row in rows)]
        if len(errors) > MOST_LAYERS:
            facts.append(("below", f"the {MOST_LAYERS} layers of {len(errors)} with the largest errors"))
        return SummaryTable(
            f"report of {one_line(self.recipe.get('name', 'a recipe'))}",
            facts,
            [columns[place] for place in filled],
            [[row[place] for place in filled] for row in rows],
        )

    def to_json(self) -> str:
        """Return the whole report as indented JSON."""
        return json_text(asdict(self))
