"""optprune inspect: what is zero in a model."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_file, check_json, start, write_file, write_json
from optprune.system.files import json_text


def inspect_command(
    model: Model,
    plot: Annotated[
        Path | None,
        typer.Option("--plot", metavar="FILE", help="Draw there what each block keeps: .png, .pdf or .svg."),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure the sparsity and the pattern of every linear layer from the weights themselves."""
    reporter = start()
    from dataclasses import asdict

    from optprune.models import Decoder, load_model
    from optprune.report import model_patterns, original_of, shares_kept
    from optprune.report.plots import check_plot, plot_kept

    check_json(json_file, models=[model])
    kind = None if plot is None else check_plot(plot)
    check_file(plot, "plot", models=[model])
    reporter.say(f"loading {model}")
    decoder = Decoder(load_model(model, device="cpu").model)
    layers, original = model_patterns(decoder), original_of(decoder, model)
    weights, zeros = sum(layer.outputs * layer.inputs for layer in layers), sum(layer.zeros for layer in layers)
    held = [name for name in layers[0].patterns if all(name in layer.patterns for layer in layers)]
    whole = None if original is None else original.weights(decoder)
    removed = None if whole is None else 1 - (weights - zeros) / whole
    sizes = {} if original is None else original.sizes(decoder)
    result = {
        "model": model,
        "linear_weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "original": None if original is None else original.model,
        "original_weights": whole,
        "removed": removed,
        "patterns": held,
        "same_in_rows": all(layer.same_in_rows for layer in layers),
        "layers": [
            {**asdict(layer), "sparsity": layer.sparsity, "original": sizes.get(layer.name)} for layer in layers
        ],
    }
    gone = f"{zeros / weights:.1%} zeros" if removed is None else f"{removed:.1%} removed"
    of_what = "over the most in a block" if original is None else "of the original's"
    shares = shares_kept(decoder, layers, original)
    picture = None if kind is None else plot_kept(shares, of_what, f"{Path(model).name}: {gone}", kind)
    already = f"{zeros} of {weights} weights are zero"
    write_json(json_file, json_text(result), already)
    if picture is not None:
        write_file(plot, picture, "plot", already)
    for layer in layers:
        held_here = ", ".join(layer.patterns) or ("rows" if layer.same_in_rows and layer.zeros else "")
        outputs, inputs = sizes.get(layer.name, (layer.outputs, layer.inputs))
        narrowed = f" of [{outputs}, {inputs}]," if (outputs, inputs) != (layer.outputs, layer.inputs) else ""
        line = f"{layer.name} [{layer.outputs}, {layer.inputs}]{narrowed} {layer.sparsity:.2%} zeros {held_here}"
        typer.echo(line.rstrip())
    typer.echo(
        f"{zeros / weights:.2%} of {weights} linear weights are zero; in every layer: {', '.join(held) or 'no N:M'}"
    )
    if original is None:
        typer.echo(
            "no report.json tells what these weights were before, so only zeros are counted, not what was cut off"
        )
    else:
        typer.echo(f"{removed:.2%} of the {whole} linear weights of {original.model} are removed: cut off, or zero")
