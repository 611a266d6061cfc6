"""A report as a table: the figures of the run, and the layers that lost the most."""

from typing import TYPE_CHECKING

from optprune.system.telling import Facts
from optprune.system.wording import counted, one_line

if TYPE_CHECKING:
    from optprune.report.records import Report

MOST_LAYERS = 10
"""how many layers a table tells, those with the largest errors"""


def facts_of(report: "Report") -> Facts:
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
    return Facts(
        f"report of {one_line(report.recipe.get('name', 'a recipe'))}",
        facts,
        [columns[place] for place in filled],
        [[row[place] for place in filled] for row in rows],
    )
