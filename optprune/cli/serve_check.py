"""optprune serve-check: say which runtimes load a model folder, and why the others do not."""

import json
from dataclasses import asdict
from typing import Annotated

import typer

from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_json, echo, start, write_json
from optprune.errors import InputError

REFUSED = 1
"""the exit status when a runtime that was asked for does not load the model"""


def serve_check_command(
    model: Model,
    runtimes: Annotated[
        list[str] | None,
        typer.Option(
            "--runtime",
            metavar="NAME",
            help="Only this runtime: transformers, transformers-4.57, vllm, llama.cpp or onnxruntime; may be repeated. "
            "[default: all]",
        ),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Print which runtimes load a model folder as it is, and why the others do not.

    The exit status is 0, or 1 when a runtime that is named by --runtime does not load it. No weights are read.
    """
    start()
    from optprune.export.serving import NAMES, serving

    unknown = sorted(set(runtimes or ()) - set(NAMES))
    if unknown:
        raise InputError(f"the runtime {unknown[0]!r} is unknown: give {', '.join(NAMES)}")
    check_json(json_file, models=[model])
    answers = [answer for answer in serving(model) if not runtimes or answer.runtime in runtimes]
    found = {"model": model, "runtimes": [asdict(answer) for answer in answers]}
    write_json(json_file, json.dumps(found, indent=2) + "\n", f"{len(answers)} runtimes were asked")
    for answer in answers:
        echo(f"{answer.runtime}: {'yes' if answer.loads else 'no'}: {answer.sentence}")
    if runtimes and not all(answer.loads for answer in answers):
        raise typer.Exit(REFUSED)
