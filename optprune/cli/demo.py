"""optprune demo: prune, save, reload and evaluate a small model on packaged data."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from optprune.cli.options import JsonFile, Overwrite
from optprune.cli.outputs import check_json, start, write_json
from optprune.system.files import json_text


def demo_command(
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", metavar="DIR", help="The folder to write. [default: .demo/smollm2-fasp, which is replaced]"
        ),
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Remove a fifth of SmolLM2-135M's decoder weights, reload the saved model, and show perplexity before and after.

    The texts are packaged articles. It takes some minutes.
    """
    reporter = start()
    from optprune.cli.demo_run import FOLDER, run_demo

    folder = FOLDER if output is None else output
    check_json(json_file, output=folder)
    result = run_demo(folder, overwrite=overwrite or output is None, console=Console(), reporter=reporter)
    write_json(json_file, json_text(result.to_dict()), f"the pruned model is in {folder}")
