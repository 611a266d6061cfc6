"""optprune inspect: a draft of a description of an architecture that is not known."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.options import Model
from optprune.cli.outputs import check_file, start, write_file

NOT_UNDERSTOOD = 1
"""the exit status where a draft cannot be used"""


def inspect_command(
    model: Model,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="Write the draft there, not to the terminal.")
    ] = None,
) -> None:
    """Trace what a model's blocks are made of, and write a draft of a description for prune --architecture.

    A small model of the config, with random weights, is run; no weights are read. Read the draft before it is used. The
    exit status is 1 where something is not understood, which the draft names.
    """
    reporter = start()
    from optprune.models import trace, traceable_config

    check_file(output, "draft", models=[model])
    config = traceable_config(model)
    reporter.say(f"tracing a small model of the config of {model}")
    draft = trace(config)
    if output is None:
        typer.echo(draft.to_yaml(), nl=False)
    else:
        write_file(output, draft.to_yaml().encode(), "draft", f"{model} was traced")
        typer.echo(f"{output}: a draft for {draft.model_type}; read it, and give it to prune --architecture")
    for each in draft.not_understood:
        typer.echo(f"not understood: {each.module} ({each.kind}): {each.why}", err=True)
    if draft.not_understood:
        raise typer.Exit(NOT_UNDERSTOOD)
