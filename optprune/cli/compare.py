"""optprune compare: prune by several recipes at several sparsities and compare the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

import typer

from optprune.cli.options import (
    Architecture,
    Calibration,
    Device,
    Dtype,
    Generated,
    JsonFile,
    Model,
    Pattern,
    Propagation,
    Samples,
    SeqLength,
    Sequences,
    Settings,
    Strict,
    Units,
    Windows,
)
from optprune.cli.outputs import check_json, check_outside, echo, files_in, start, write_json
from optprune.cli.request import overrides
from optprune.errors import InputError
from optprune.system.wording import shown

FAILED = 1
"""the exit status when a cell has failed"""

Value = TypeVar("Value")


def compare_command(
    model: Model,
    recipes: Annotated[str, typer.Option("--recipes", metavar="A,B,...", help="Names of recipes, or .yaml files.")],
    sparsities: Annotated[
        str, typer.Option("--sparsities", metavar="X,Y,...", help="Shares of the decoder's linear weights to remove.")
    ],
    calibration: Calibration,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="The text to evaluate on, without documents of the calibration text; same forms as --calibration.",
        ),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="The folder of the comparison; a second call continues it.")
    ],
    seeds: Annotated[int, typer.Option("--seeds", help="Number of draws of the calibration text, from seed 0.")] = 1,
    samples: Samples = 128,
    generated: Generated = 0,
    seq_length: SeqLength = 2048,
    sequences: Sequences = "packed",
    windows: Windows = None,
    propagation: Propagation = None,
    units: Units = None,
    pattern: Pattern = None,
    strict: Strict = False,
    settings: Settings = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    architecture: Architecture = None,
    keep_models: Annotated[
        bool, typer.Option("--keep-models", help="Save each pruned model in DIR/models/ and check it.")
    ] = False,
    speed: Annotated[
        bool, typer.Option("--speed", help="Measure prefill and decoding speed too, with the whole model in memory.")
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Prune by every recipe at every sparsity, in memory, and print quality, size and time in one table.

    Measurements of the dense model are shared by all cells. Each finished cell is kept.
    """
    reporter = start()
    from optprune.comparison import compare
    from optprune.comparison.grid import MOST_DRAWS
    from optprune.comparison.kept_folder import JSON, PAGE, TABLE
    from optprune.comparison.run import NO_PICTURE
    from optprune.measure import SpeedWorkload
    from optprune.report.drawings import can_draw

    inputs = [calibration, text, architecture, *files_in(recipes.split(","))]
    check_outside(json_file, output)
    check_json(json_file, models=[model], inputs=inputs)
    fields = {"propagation": propagation, "units": units, "units.weights": pattern, "strict": strict or None}
    if not 1 <= seeds <= MOST_DRAWS:
        raise InputError(f"--seeds cannot be {shown(seeds)}: give 1 to {MOST_DRAWS}")
    # The time of the whole comparison is estimated from finished cells and printed after each.
    with reporter.events({}, left="left of this step") as on_event:
        found = compare(
            model,
            listed(recipes, "--recipes", str),
            listed(sparsities, "--sparsities", float),
            calibration=calibration,
            text=text,
            samples=samples,
            seq_length=seq_length,
            generated=generated,
            windows=windows,
            seeds=seeds,
            sequences=sequences,
            settings=overrides({key: value for key, value in fields.items() if value is not None}, settings or ()),
            folder=output,
            dtype=dtype,
            device=device,
            architecture=architecture,
            keep_models=keep_models,
            speed=SpeedWorkload() if speed else None,
            say=reporter.say,
            on_event=on_event,
        )
    write_json(json_file, found.to_json(), f"the comparison is in {output}")
    echo(str(found))
    echo(f"{output}: {TABLE}, {JSON}, {PAGE}")
    if not can_draw():
        echo(NO_PICTURE)
    if found.failures:
        raise typer.Exit(FAILED)


def listed(text: str, option: str, read: Callable[[str], Value]) -> list[Value]:
    """Return the values of a comma-separated list."""
    values: list[Any] = []
    for word in text.split(","):
        try:
            if not word.strip():
                raise ValueError
            values.append(read(word.strip()))
        except ValueError:
            raise InputError(f"{option} {shown(text)} is not a list such as a,b,c: {shown(word)} is wrong") from None
    return values
