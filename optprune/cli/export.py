"""optprune export: a pruned folder in the format of another runtime."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.outputs import check_file, start
from optprune.errors import InputError

FORMATS = ("gguf",)


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, such as optprune prune writes.")],
    output: Annotated[Path, typer.Option("--output", metavar="FILE", help="The file to write.")],
    form: Annotated[str, typer.Option("--format", help="gguf, for llama.cpp.")] = "gguf",
    kind: Annotated[str, typer.Option("--type", help="f32, f16 or q8_0.")] = "f16",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it is there.")] = False,
) -> None:
    """Write a model folder as one file for another runtime, with its vocabulary and chat template."""
    if form not in FORMATS:
        raise InputError(f"the format {form!r} is unknown: give {', '.join(FORMATS)}")
    if output.exists() and not overwrite:
        raise InputError(f"the file {output} exists: pass --overwrite to replace it")
    check_file(output, "GGUF file", models=[str(folder)])
    reporter = start()
    from optprune.export.gguf_file import export_gguf

    reporter.say(f"writing {output}")
    written = export_gguf(folder, output, kind=kind)
    typer.echo(f"{written.file}: {written.bytes / 2**20:.1f} MiB, architecture {written.architecture}")
    for note in written.notes:
        typer.echo(f"note: {note}")
