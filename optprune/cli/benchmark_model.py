"""optprune benchmark-model: measure the speed and the size of a model, alone or against another."""

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optprune.cli.options import Device, Dtype, JsonFile, Model
from optprune.cli.outputs import check_json, echo, start, write_json
from optprune.errors import InputError
from optprune.system.files import json_text

if TYPE_CHECKING:
    from optprune.measure import ModelSpeed, Repeats


def benchmark_model_command(
    model: Model,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="MODEL", help="The model to compare with; their runs alternate."),
    ] = None,
    prompt_tokens: Annotated[int, typer.Option("--prompt-tokens", help="Tokens of a prompt.")] = 512,
    new_tokens: Annotated[int, typer.Option("--new-tokens", help="Tokens to decode greedily, with the cache.")] = 32,
    batch: Annotated[int, typer.Option("--batch", help="Prompts in a batch.")] = 1,
    repeats: Annotated[int, typer.Option("--repeats", help="How often each model is timed.")] = 5,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure prefill and decoding speed, peak memory and file size; print medians and quartiles of the repeats."""
    reporter = start()
    from optprune.measure import SpeedWorkload, measure_speed
    from optprune.measure.speed import PEAK_MEMORY, device_name
    from optprune.models import check_dtype, device_of, load_config, load_model
    from optprune.models.checkpoint import digest_of_source
    from optprune.models.sources import file_bytes

    work = SpeedWorkload(prompt_tokens, new_tokens, batch, repeats)
    check_dtype(dtype)
    device_of(device)
    if against == model:
        raise InputError(f"--against names {model} itself: name the model to compare with")
    sources = [model] if against is None else [model, against]
    check_json(json_file, models=sources)
    for source in sources:
        work.check(source, load_config(source))
    digests = [None if json_file is None else digest_of_source(source) for source in sources]
    models = {}
    for source in sources:
        reporter.say(f"loading {source}")
        models[source] = load_model(source, dtype=dtype, device=device).model
    with reporter.count("measuring", "run") as update:
        speeds = measure_speed(models, work, on_run=update)
    files = [file_bytes(source) for source in sources]

    result: dict[str, Any] = {
        "device": device_name(models[model].device),
        "dtype": str(models[model].dtype).removeprefix("torch."),
        **asdict(work),
        "peak_memory_is": PEAK_MEMORY,
        "models": [
            {**speed.to_dict(), "file_bytes": size, "weights": digest}
            for speed, size, digest in zip(speeds, files, digests, strict=True)
        ],
    }
    lines = [
        f"{result['device']}, {result['dtype']}, batch {batch}, prompts of {prompt_tokens} tokens, {new_tokens} new "
        f"tokens, {repeats} repeats; medians (and quartiles)",
        *(_model_line(speed, size) for speed, size in zip(speeds, files, strict=True)),
    ]
    if against is not None:
        ratios = speeds[0].over(speeds[1])
        file_ratio = files[0] / files[1]
        result["ratios"] = {**ratios.to_dict(), "file": file_ratio}
        peak = "unknown" if ratios.peak_memory is None else f"{ratios.peak_memory:.3f}"
        lines.append(
            f"{model} over {against}: prefill {_spread(ratios.prefill, 3)}, decoding {_spread(ratios.decode, 3)}, "
            f"peak memory {peak}, weights {ratios.weights:.3f}, file {file_ratio:.3f}"
        )
    write_json(json_file, json_text(result), lines[-1])
    for line in (*lines, f"peak memory: {PEAK_MEMORY}"):
        echo(line)


def _model_line(speed: "ModelSpeed", file_size: int) -> str:
    peak = "unknown" if speed.peak_bytes is None else _mib(speed.peak_bytes)
    return (
        f"{speed.name}: prefill {_spread(speed.prefill, 1)} tokens/s, decoding {_spread(speed.decode, 1)} tokens/s, "
        f"peak memory {peak}, weights {_mib(speed.weight_bytes)}, file {_mib(file_size)}"
    )


def _spread(measured: "Repeats", digits: int) -> str:
    first, third = measured.quartiles
    return f"{measured.median:.{digits}f} ({first:.{digits}f} to {third:.{digits}f})"


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"
