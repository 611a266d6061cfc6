"""optprune export: a pruned folder in the format of another runtime."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.outputs import check_file, echo, start
from optprune.errors import InputError

FORMATS = ("gguf", "onnx")


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, such as optprune prune writes.")],
    output: Annotated[Path, typer.Option("--output", metavar="PATH", help="The file to write; of onnx the folder.")],
    form: Annotated[str, typer.Option("--format", help="gguf, for llama.cpp, or onnx.")] = "gguf",
    kind: Annotated[
        str | None, typer.Option("--type", help="Of gguf: f32, f16 or q8_0. onnx is float32. [default: f16]")
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="Of onnx: keys and values of earlier tokens are inputs and outputs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file or folder if it is there.")] = False,
) -> None:
    """Write a model folder for another runtime, with its vocabulary and chat template."""
    if form not in FORMATS:
        raise InputError(f"the format {form!r} is unknown: give {', '.join(FORMATS)}")
    if form == "onnx":
        _export_onnx(folder, output, kind, cache, overwrite)
    else:
        _export_gguf(folder, output, kind or "f16", cache, overwrite)


def _export_gguf(folder: Path, output: Path, kind: str, cache: bool, overwrite: bool) -> None:
    if cache:
        raise InputError("--cache is of --format onnx: a GGUF file has no graph, so leave it out")
    if output.exists() and not overwrite:
        raise InputError(f"the file {output} exists: pass --overwrite to replace it")
    check_file(output, "GGUF file", models=[str(folder)])
    reporter = start()
    from optprune.export.gguf_file import export_gguf

    reporter.say(f"writing {output}")
    written = export_gguf(folder, output, kind=kind, overwrite=overwrite)
    echo(f"{written.file}: {written.bytes / 2**20:.1f} MiB, architecture {written.architecture}")
    for note in written.notes:
        echo(f"note: {note}")


def _export_onnx(folder: Path, output: Path, kind: str | None, cache: bool, overwrite: bool) -> None:
    if kind not in (None, "f32"):
        raise InputError(f"ONNX is written in float32, not in {kind!r}: leave out --type")
    reporter = start()
    from optprune.export.onnx_folder import export_onnx

    reporter.say(f"exporting to {output}, and comparing the logits of ONNX Runtime with those of transformers")
    written = export_onnx(folder, output, cache=cache, overwrite=overwrite)
    echo(f"{written.folder}: {written.bytes / 2**20:.1f} MiB, {'with' if cache else 'without'} a key/value cache")
    echo(f"check passed: logits differ by at most {written.logits_difference:.2g}")
