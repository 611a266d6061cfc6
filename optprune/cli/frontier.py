"""optprune frontier: measure a dense model in fewer bits, pruned models, and both together."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.compare import FAILED, listed
from optprune.cli.options import JsonFile, Model, Samples, SeqLength, Sequences, Settings, Units, Windows
from optprune.cli.outputs import check_json, check_outside, echo, files_in, start, write_json
from optprune.cli.request import overrides

RUNTIMES = ("llama.cpp", "transformers")


def frontier_command(
    model: Model,
    text: Annotated[
        str,
        typer.Option("--text", metavar="TEXT", help="The text to evaluate on; same forms as --calibration of prune."),
    ],
    output: Annotated[
        Path, typer.Option("--output", metavar="DIR", help="The folder of the frontier; a second call continues it.")
    ],
    against: Annotated[
        list[str] | None,
        typer.Option("--against", metavar="DIR", help="A folder with a pruned model; may be repeated."),
    ] = None,
    recipes: Annotated[
        str | None, typer.Option("--recipes", metavar="A,B,...", help="Recipes to prune by, or .yaml files.")
    ] = None,
    sparsities: Annotated[
        str | None,
        typer.Option("--sparsities", metavar="X,Y,...", help="Shares of the decoder's linear weights to remove."),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="The text to prune on, and to measure the inputs of layers on (llama.cpp's importance matrix).",
        ),
    ] = None,
    runtime: Annotated[
        str, typer.Option("--runtime", help="llama.cpp (GGUF files in every type) or transformers (folders as stored).")
    ] = RUNTIMES[0],
    types: Annotated[
        str | None,
        typer.Option("--types", metavar="A,B,...", help="Types of the dense model. [default: f16 to q4_0]"),
    ] = None,
    pruned_types: Annotated[
        str | None,
        typer.Option("--pruned-types", metavar="A,B,...", help="Types of pruned models. [default: f16,q8_0,q4_K,q4_0]"),
    ] = None,
    samples: Samples = 128,
    seq_length: SeqLength = 2048,
    sequences: Sequences = "packed",
    windows: Windows = None,
    units: Units = None,
    settings: Settings = None,
    no_speed: Annotated[bool, typer.Option("--no-speed", help="Time nothing.")] = False,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of the timed prompt.")] = 256,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Timed new tokens.")] = 32,
    repeats: Annotated[int, typer.Option("--repeats", help="How often each file is timed.")] = 3,
    generations: Annotated[int, typer.Option("--generations", help="Number of continuations on the page.")] = 3,
    json_file: JsonFile = None,
) -> None:
    """Measure size, speed and quality of a dense model in fewer bits, of pruned models, and of both together.

    The page says at its top whether the given models pay, and at which size. Each finished row is kept.
    """
    reporter = start()
    from optprune.comparison import frontier
    from optprune.comparison.frontier_folder import JSON, PAGE, TABLE
    from optprune.measure import SpeedWorkload

    inputs = [calibration, text, *files_in((recipes or "").split(","))]
    check_outside(json_file, output)
    check_json(json_file, models=[model, *(against or ())], inputs=inputs)
    work = SpeedWorkload(prompt_tokens, new_tokens, 1, repeats) if not no_speed else None
    fields = {} if units is None else {"units": units}
    with reporter.events({}, left="left of this step") as on_event:
        found = frontier(
            model,
            text=text,
            folder=output,
            against=against or (),
            recipes=[] if recipes is None else listed(recipes, "--recipes", str),
            sparsities=[] if sparsities is None else listed(sparsities, "--sparsities", float),
            calibration=calibration,
            types=None if types is None else listed(types, "--types", str),
            pruned_types=None if pruned_types is None else listed(pruned_types, "--pruned-types", str),
            runtime=runtime,
            samples=samples,
            seq_length=seq_length,
            sequences=sequences,
            windows=windows,
            settings=overrides(fields, settings or ()),
            speed=work,
            generations=generations,
            say=reporter.say,
            on_event=on_event,
        )
    write_json(json_file, found.to_json(), f"the frontier is in {output}")
    echo(str(found))
    echo(f"{output}: {PAGE}, {TABLE}, {JSON}")
    if found.failures:
        raise typer.Exit(FAILED)
