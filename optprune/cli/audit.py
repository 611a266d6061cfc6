"""optprune audit: measure stored weights and check expectations of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_distinct, check_file, check_json, echo, start, write_file, write_json
from optprune.system.wording import counted

if TYPE_CHECKING:
    from optprune.report import Audit, Fault

NOT_AS_EXPECTED = 1
"""the exit status when a fault was found"""
MAX_PRINTED = 20
"""the largest number of faults, and of notes, that are printed; --json has them all"""


Against = Annotated[str | None, typer.Option("--against", metavar="MODEL", help="The model before pruning.")]
Expect = Annotated[
    list[str] | None,
    typer.Option(
        "--expect",
        metavar="EXPECTATION",
        help="N:M, rows, sparsity=0.5, sparsity=0.19..0.21, multiple=64 (of MLP widths) or dead=0 (largest number of "
        "units that do not affect the output); may be repeated.",
    ),
]
Plot = Annotated[
    Path | None,
    typer.Option("--plot", metavar="FILE", help="Draw the kept share of each block to a .png, .pdf or .svg file."),
]


def audit_command(
    model: Model, against: Against = None, expect: Expect = None, plot: Plot = None, json_file: JsonFile = None
) -> None:
    """Measure a model from its stored weights, and check them against its config, its report and --expect.

    The exit status is 0 when no fault is found, 1 when a fault is found, and 2 when the model cannot be read.
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
    check_distinct(json_file, plot)
    reporter.say(f"reading {model}")
    found = audit(model, against, expect or ())
    picture = None if kind is None else plot_kept(found, kind)
    already = f"{found.zeros} of {found.weights} weights are zero"
    write_json(json_file, found.to_json(), already)
    if picture is not None:
        write_file(plot, picture, "plot", already)
    _print_audit(found)
    if not found.passed:
        raise typer.Exit(NOT_AS_EXPECTED)


def _print_audit(found: "Audit") -> None:
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
            "without a report.json the original sizes are unknown, so only zeros are counted, not removed rows and "
            "columns: name the original model by --against"
        )
    else:
        echo(
            f"{found.removed:.2%} of the {found.original_weights} linear weights of {found.original.model} are "
            "removed: deleted with their unit, or zero"
        )
    _print_some(
        "note",
        [
            f"{counted(units.count, 'unit')} ({units.units}) of block {units.block} without effect on the output"
            for units in found.dead
        ],
    )
    _print_some("note", found.notes)
    _print_some("fault", _grouped(found.faults))


def _grouped(faults: "Sequence[Fault]") -> list[str]:
    """Return the sentences on faults; a group of the same expectation or report as its first and a count."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for number, fault in enumerate(faults):
        alone = -1 if fault.kind in ("expected", "report") else number
        groups.setdefault((fault.kind, fault.where, alone), []).append(fault.sentence)
    return [
        first if not more else f"{first}, and {counted(len(more), 'more such fault')} (listed by --json)"
        for first, *more in groups.values()
    ]


def _print_some(label: str, sentences: "list[str] | tuple[str, ...]") -> None:
    for sentence in sentences[:MAX_PRINTED]:
        echo(f"{label}: {sentence}")
    if len(sentences) > MAX_PRINTED:
        echo(f"{label}: and {len(sentences) - MAX_PRINTED} more (listed by --json)")
