"""optprune inspect: the audit of a model, or a draft of a description where its architecture is not known."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.audit import Against, Expect, Plot, audit_command
from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_file, echo, start, write_file

if TYPE_CHECKING:
    from transformers import PretrainedConfig

NOT_UNDERSTOOD = 1
"""the exit status where a draft cannot be used"""


def inspect_command(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write a draft there, not to the terminal.")
    ] = None,
    against: Against = None,
    expect: Expect = None,
    plot: Plot = None,
    json_file: JsonFile = None,
) -> None:
    """Audit a model; or, where its architecture is not known or with --output, draft a description of that.

    For a draft, which is for prune --architecture, a small model of the config, with random weights, is run; no weights
    are read. Read it before it is used. The exit status is 1 where something is not understood, which the draft names.
    """
    reporter = start()
    from optprune.models import is_gguf, is_known, traceable_config

    asked = against or expect or plot or json_file
    check_file(output, "draft", models=[model])
    config = None if output is None and (asked or is_gguf(model)) else traceable_config(model)
    if config is None or (output is None and is_known(config)):
        audit_command(model, against, expect, plot, json_file)
    else:
        reporter.say(f"tracing a small model of the config of {model}")
        draft(model, config, output)


def draft(model: str, config: "PretrainedConfig", output: Path | None) -> None:
    """Write a draft of what a model's blocks are made of to a file, or to the terminal."""
    from optprune.models import trace

    found = trace(config)
    if output is None:
        echo(found.to_yaml().rstrip())
    else:
        write_file(output, found.to_yaml().encode(), "draft", f"{model} was traced")
        echo(f"{output}: a draft for {found.model_type}; read it, and give it to prune --architecture")
    for each in found.not_understood:
        echo(f"not understood: {each.module} ({each.kind}): {each.why}", err=True)
    if found.not_understood:
        raise typer.Exit(NOT_UNDERSTOOD)
