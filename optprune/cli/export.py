"""optprune export: write a pruned folder in the format of another runtime."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.options import Samples, SeqLength, Sequences
from optprune.cli.outputs import check_file, echo, start
from optprune.errors import InputError

if TYPE_CHECKING:
    from optprune.export import Exporter, Importance

FORMATS = ("compressed-tensors", "gguf", "onnx", "transformers")
"""names of the shipped exporters, `optprune.export.EXPORTERS`, which take seconds to import"""
EXACT = (None, "f32", "f16", "q8_0")
"""types of GGUF whose rounding does not go by an importance"""


def export_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A model folder, such as optprune prune writes.")],
    output: Annotated[
        Path, typer.Option("--output", metavar="PATH", help="The file to write for gguf, the folder for the others.")
    ],
    form: Annotated[
        str,
        typer.Option(
            "--format",
            help="gguf (for llama.cpp), onnx, transformers (a folder as prune writes it), or compressed-tensors (a "
            "folder of 4-bit weights for vLLM, after prune --bits w4a16).",
        ),
    ] = "gguf",
    kind: Annotated[
        str | None,
        typer.Option(
            "--type",
            help="For gguf f32, f16, q8_0, q6_K, q5_K, q5_0, q4_K or q4_0; for transformers float32, bfloat16 or "
            "float16. onnx is float32. [default: f16, or as stored]",
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="For gguf types from q6_K on: a text, as for prune. The inputs of layers are measured on it, and "
            "rounding errors count by them (llama.cpp's importance matrix).",
        ),
    ] = None,
    samples: Samples = 128,
    seq_length: SeqLength = 2048,
    sequences: Sequences = "packed",
    original: Annotated[
        Path | None,
        typer.Option(
            "--original",
            metavar="FILE",
            help="For gguf, of a folder that lost whole experts only: the GGUF file of the dense model, of any types. "
            "What stays is copied as it is.",
        ),
    ] = None,
    cache: Annotated[
        bool, typer.Option("--cache", help="For onnx: keys and values of earlier tokens are inputs and outputs.")
    ] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file or folder if it is there.")] = False,
) -> None:
    """Write a model folder in another format, with its tokenizer and chat template."""
    if form not in FORMATS:
        raise InputError(f"the format {form!r} is unknown: give {', '.join(FORMATS)}")
    if cache and form != "onnx":
        raise InputError(f"--cache applies to --format onnx only: leave it out for {form}")
    if form == "compressed-tensors" and kind is not None:
        raise InputError("the weights of a compressed-tensors folder have 4 bits: leave out --type")
    if form == "onnx" and kind not in (None, "f32"):
        raise InputError(f"ONNX is written in float32, not in {kind!r}: leave out --type")
    if calibration is not None and (form != "gguf" or kind in EXACT):
        raise InputError(f"--calibration applies to gguf types from q6_K on only: leave it out for {kind or form}")
    if original is not None and (form != "gguf" or kind is not None or calibration is not None):
        raise InputError(
            "with --original the types are those of that GGUF file: leave out --type, --format, --calibration"
        )
    if form == "gguf":
        if output.exists() and not overwrite:
            raise InputError(f"the file {output} exists: pass --overwrite to replace it")
        models = [str(folder), *([] if original is None else [str(original)])]
        check_file(output, "GGUF file", models=models, inputs=[calibration], replaces=lambda file: True)
    reporter = start()
    from optprune.export import export

    # Before the inputs of layers are measured, which takes long.
    _exporter(form, kind, cache, None, original).check_output(output, overwrite)
    importance = _importance(folder, calibration, samples, seq_length, sequences, reporter.say)
    exporter = _exporter(form, kind, cache, importance, original)
    reporter.say(f"writing {output}, and checking it")
    written = export(folder, output, exporter, overwrite=overwrite)
    echo(f"{written.path}: {written.bytes / 2**20:.1f} MiB, {written.summary}")
    if written.logits_difference is not None:
        echo(f"check passed: logits differ by at most {written.logits_difference:.2g}")
    for note in written.notes:
        echo(f"note: {note}")


def _importance(
    folder: Path, calibration: str | None, samples: int, seq_length: int, sequences: str, say: Callable[[str], None]
) -> "Importance | None":
    """Return the importance of the inputs of layers, measured on a calibration text; None without a text."""
    if calibration is None:
        return None
    from optprune.export import importance_of

    say(f"measuring the inputs of the layers on {calibration}")
    return importance_of(folder, calibration, samples=samples, seq_length=seq_length, sequences=sequences)


def _exporter(
    form: str, kind: str | None, cache: bool, importance: "Importance | None", original: Path | None
) -> "Exporter":
    from optprune.export import GgufExperts, GgufFile, OnnxFolder, PackedFolder, TransformersFolder

    if original is not None:
        return GgufExperts(original)
    if form == "compressed-tensors":
        return PackedFolder()
    if form == "gguf":
        return GgufFile(kind=kind or "f16", importance=importance)
    return OnnxFolder(cache=cache) if form == "onnx" else TransformersFolder(dtype=kind or "auto")
