"""optprune push: upload a model folder to the hub."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.outputs import echo, start


def push_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, such as optprune prune writes.")],
    name: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="The repository, which is created if needed.")],
    private: Annotated[bool, typer.Option("--private", help="Create a private repository.")] = False,
    reports: Annotated[
        bool,
        typer.Option("--reports", help="Upload report.json and report.html too. They may hold paths of this machine."),
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace all files of a repository that holds some.")
    ] = False,
) -> None:
    """Upload a model folder with its card to the Hugging Face hub, in one commit.

    The token is that of `hf auth login`, or HF_TOKEN in the environment.
    """
    reporter = start()
    from optprune.export.hub import push_to_hub

    reporter.say(f"uploading {folder} to {name}")
    echo(push_to_hub(folder, name, private=private, reports=reports, overwrite=overwrite))
