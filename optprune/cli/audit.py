"""optprune audit: what a model's weights are, and whether that is as it should be."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_file, check_json, echo, start, write_file, write_json
from optprune.system.wording import counted

if TYPE_CHECKING:
    from optprune.report import Audit, Fault

NOT_AS_EXPECTED = 1
"""the exit status where something is wrong, or not as expected"""
MOST_TOLD = 20
"""how many faults, and how many notes, are told; --json has them all"""


Against = Annotated[str | None, typer.Option("--against", metavar="MODEL", help="The model that it was made from.")]
Expect = Annotated[
    list[str] | None,
    typer.Option(
        "--expect",
        metavar="WHAT",
        help="N:M, rows, sparsity=0.5, sparsity=0.19..0.21, multiple=64 (of MLP widths) or dead=0 (units that "
        "could go for free); may be repeated.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw there what each block keeps: .png, .pdf or .svg."),
]


def audit_command(
    model: Model, against: Against = None, expect: Expect = None, plot: Plot = None, json_file: JsonFile = None
) -> None:
    """Measure a model from its stored weights, and hold them against its config, its report and what is expected.

    The exit status is 0 where nothing is wrong, 1 where something is, and 2 where the model cannot be read.
    """
    reporter = start()
    from optprune.report import audit
    from optprune.report.drawings import check_plot, plot_kept
    from optprune.report.expectations import read_expectation

    models = [model] if against is None else [model, against]
    for text in expect or ():
        read_expectation(text)
    check_json(json_file, models=models)
    kind = None if plot is None else check_plot(plot)
    check_file(plot, "plot", models=models)
    reporter.say(f"reading {model}")
    found = audit(model, against, expect or ())
    picture = None if kind is None else plot_kept(found, kind)
    already = f"{found.zeros} of {found.weights} weights are zero"
    write_json(json_file, found.to_json(), already)
    if picture is not None:
        write_file(plot, picture, "plot", already)
    _tell(found)
    if not found.passed:
        raise typer.Exit(NOT_AS_EXPECTED)


def _tell(found: "Audit") -> None:
    for layer in found.layers:
        held_here = ", ".join(layer.patterns) or ("rows" if layer.same_in_rows and layer.zeros else "")
        outputs, inputs = found.sizes.get(layer.name, (layer.outputs, layer.inputs))
        narrowed = f" of [{outputs}, {inputs}]," if (outputs, inputs) != (layer.outputs, layer.inputs) else ""
        line = f"{layer.name} [{layer.outputs}, {layer.inputs}]{narrowed} {layer.sparsity:.2%} zeros {held_here}"
        echo(line.rstrip())
    zeros = found.zeros / found.weights if found.weights else 0.0
    echo(
        f"{zeros:.2%} of {found.weights} linear weights are zero; in every layer: "
        f"{', '.join(found.patterns) or 'no N:M'}"
    )
    widths = sorted({shape.mlp_width for shape in found.blocks})
    echo(
        f"{counted(len(found.blocks), 'block')}, MLP widths "
        f"{' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))}"
    )
    if found.original is None:
        echo(
            "no report.json tells what these weights were before, so only zeros are counted, not what was cut off: "
            "give the original by --against"
        )
    else:
        echo(
            f"{found.removed:.2%} of the {found.original_weights} linear weights of {found.original.model} are "
            "removed: cut off, or zero"
        )
    _tell_some(
        "note",
        [
            f"{counted(units.count, 'unit')} ({units.units}) of block {units.block} could go for free"
            for units in found.dead
        ],
    )
    _tell_some("note", found.notes)
    _tell_some("fault", _once(found.faults))


def _once(faults: "Sequence[Fault]") -> list[str]:
    """The sentences on faults; those of many layers by one expectation, or by the report, as the first and a count."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for number, fault in enumerate(faults):
        alone = -1 if fault.kind in ("expected", "report") else number
        groups.setdefault((fault.kind, fault.where, alone), []).append(fault.sentence)
    return [
        first if not more else f"{first}, and {counted(len(more), 'more such fault')}, which --json tells"
        for first, *more in groups.values()
    ]


def _tell_some(what: str, sentences: "list[str] | tuple[str, ...]") -> None:
    for sentence in sentences[:MOST_TOLD]:
        echo(f"{what}: {sentence}")
    if len(sentences) > MOST_TOLD:
        echo(f"{what}: and {len(sentences) - MOST_TOLD} more, which --json tells")
