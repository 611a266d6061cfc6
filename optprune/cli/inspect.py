"""optprune inspect: audit a model, or draft a description of an unknown architecture."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.audit import Against, Expect, Plot, audit_command
from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_file, echo, is_standard_stream, start, write_file
from optprune.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOT_UNDERSTOOD = 1
"""the exit status when a draft cannot be used"""


def inspect_command(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the draft to a file, not to the terminal.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file of --output if it exists.")] = False,
    against: Against = None,
    expect: Expect = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Audit a model; draft a description instead if its architecture is unknown or --output is given.

    The draft comes from running a small model of the config with random weights; no stored weights are read. Review it
    before giving it to prune --architecture. The exit status is 1 if the draft lists modules that were not understood.
    """
    reporter = start()
    from optprune.models import is_gguf, is_known, traceable_config

    audits = against or expect or plot or json_file
    check_file(output, "draft", models=[model], replaces=lambda file: True)
    if output is not None and output.is_file() and not (overwrite or is_standard_stream(output)):
        raise InputError(f"the draft {output} exists, and you may have edited it: choose another, or pass --overwrite")
    config = None if output is None and (audits or is_gguf(model)) else traceable_config(model)
    if config is None or (output is None and is_known(config)):
        audit_command(model, against, expect, plot, json_file)
    else:
        reporter.say(f"tracing a small model of the config of {model}")
        draft(model, config, output)


def draft(model: str, config: "PretrainedConfig", output: Path | None) -> None:
    """Write the draft description of a model's blocks to a file, or to the terminal."""
    from optprune.models import trace

    found = trace(config)
    if output is None:
        echo(found.to_yaml().rstrip())
    else:
        write_file(output, found.to_yaml().encode(), "draft", f"{model} was traced")
        echo(f"{output}: a draft for {found.model_type}; review it, then give it to prune --architecture")
    for each in found.not_understood:
        echo(f"not understood: {each.module} ({each.kind}): {each.why}", err=True)
    if found.not_understood:
        raise typer.Exit(NOT_UNDERSTOOD)
