"""Records of a pruning run: one of each layer and block, and the whole report."""

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from optprune.models import BlockShape
from optprune.report.phases import PhaseReport
from optprune.system.display import Displayed, SummaryTable
from optprune.system.files import json_text
from optprune.system.wording import counted, one_line

if TYPE_CHECKING:
    from optprune.report.records import Report


@dataclass(frozen=True)
class LayerReport:
    """What was solved at one layer, and how well."""

    name: str
    kind: str
    """the kind of problem"""
    solver: str
    """the chain of solvers"""
    relative_error: float
    """E|V x* - W x|^2 / E|W x|^2 on the calibration tokens, without damping, of the weights as they were written when
    the layer was solved: what recovery makes of them later is in `Report.recovered`"""
    held_out_error: float | None
    """the relative error on held-out tokens, where the recipe holds some out"""
    status: str
    objective: float
    lower_bound: float | None
    gap: float | None
    damping: float
    """the ridge that was added to the diagonal of the Gram matrix, in (input activation)^2"""
    tokens: int
    seconds: float
    kept: int
    units: int
    """how many units there were to choose from"""
    dead_inputs: int
    notes: tuple[str, ...] = ()
    stages: tuple[dict[str, Any], ...] = ()
    """the solvers of a chain before the last: label, steps, seconds, and the objective after each"""


@dataclass(frozen=True)
class BlockChange:
    """What a block held before the run and after; one that holds nothing any more is dropped from the model."""

    before: BlockShape
    after: BlockShape


@dataclass(frozen=True)
class RemovedPart:
    """A sub-block that was removed whole, and the score that chose it."""

    block: int
    """the number of the block in the model before"""
    part: str
    """the name of the sub-block, attention or mlp"""
    weights: int
    score: float
    """the value of what the recipe scores by, at the moment of removal; the lowest goes first"""


@dataclass(frozen=True)
class RecoveredPart:
    """What the recovery of a sub-module did; errors are E|f* - f|^2 / E|f|^2 of its output f, in the output metric.

    Of a block that was matched as a whole the squares are those of every token as shares of its size.
    """

    name: str
    layers: tuple[str, ...]
    """the layers that were refitted, in turn; of a block all its parameters"""
    error_before: float
    """the relative error on the batches that were fitted"""
    error_after: float
    held_out_before: float
    """the relative error on the batches that decided where to stop"""
    held_out_after: float
    steps: int
    """the steps that were kept: of conjugate gradients, over all layers and rounds, or of what matches a whole block"""
    seconds: float


@dataclass(frozen=True, repr=False)
class Report(Displayed):
    """What a pruning run did; written as report.json beside the weights."""

    model: str
    recipe: dict[str, Any]
    sparsity_requested: float
    sparsity_reached: float
    """the share of the decoder blocks' linear weights that is gone"""
    seconds: float
    floor_seconds: float
    """the seconds of the two calibration passes with their Gram products, without which no run can do"""
    tokens: int
    seed: int
    versions: dict[str, str]
    layers: tuple[LayerReport, ...]
    notes: tuple[str, ...] = field(default=())
    calibration: str = ""
    """where the calibration tokens came from, as far as the caller said"""
    allocation: dict[str, Any] = field(default_factory=dict)
    """what every block kept, as `Allocation.from_json` reads it"""
    removed: tuple[RemovedPart, ...] = ()
    """the sub-blocks that the recipe chose to remove whole, in that order"""
    recovered: tuple[RecoveredPart, ...] = ()
    """the sub-modules that were refitted against their dense output"""
    blocks: tuple[BlockChange, ...] = ()
    """what became of each block of the model that was pruned"""
    phases: tuple[PhaseReport, ...] = ()
    """what each phase of the run took; in the report.json of a folder that a fresh process has loaded, all of them"""
    parameters_before: int | None = None
    """the parameters of the model that was pruned; None in reports of earlier versions"""
    run_facts: dict[str, Any] = field(default_factory=dict)
    """what decided the weights of a run with a journal (digests of the model and the tokens, the recipe, the machine):
    `--resume` compares them with a command's own"""

    def __repr__(self) -> str:
        removed = f"{self.sparsity_reached:.2%} removed, {self.sparsity_requested:.2%} asked"
        return (
            f"Report({self.model!r}, {self.recipe.get('name')!r}, {removed}, {counted(len(self.layers), 'layer')} "
            "solved)"
        )

    def summary_table(self) -> SummaryTable:
        return report_table(self)

    def to_json(self) -> str:
        """The whole report as indented JSON."""
        return json_text(asdict(self))


MOST_LAYERS = 10
"""how many layers a table tells, those with the largest errors"""


def report_table(report: "Report") -> SummaryTable:
    """What a report says, for a terminal or a notebook."""
    errors = [layer.relative_error for layer in report.layers]
    facts = [
        ("model", one_line(report.model)),
        ("removed", f"{report.sparsity_reached:.2%} of the linear weights ({report.sparsity_requested:.2%} asked)"),
        (
            "calibration",
            f"{report.tokens:,} tokens" + (f", {one_line(report.calibration)}" if report.calibration else ""),
        ),
        ("seconds", f"{report.seconds:.1f}, of which the two calibration passes need {report.floor_seconds:.1f}"),
    ]
    if errors:
        facts.append(
            (
                "mean relative error",
                f"{sum(errors) / len(errors):.3g} over {counted(len(errors), 'layer')}",
            )
        )
    facts += [("note", one_line(note)) for note in report.notes]
    worst = sorted(report.layers, key=lambda layer: -layer.relative_error)[:MOST_LAYERS]
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
        f"report of {one_line(report.recipe.get('name', 'a recipe'))}",
        facts,
        [columns[place] for place in filled],
        [[row[place] for place in filled] for row in rows],
    )
