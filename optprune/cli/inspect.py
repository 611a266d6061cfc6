"""optprune inspect: what is zero in a model."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_file, check_json, start, write_file, write_json
from optprune.values import json_text


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

    from optprune.models import Decoder, load_model, model_patterns
    from optprune.plots import check_plot, plot_kept

    check_json(json_file, models=[model])
    kind = None if plot is None else check_plot(plot)
    check_file(plot, "plot", models=[model])
    reporter.say(f"loading {model}")
    decoder = Decoder(load_model(model, device="cpu").model)
    layers = model_patterns(decoder)
    weights, zeros = sum(layer.outputs * layer.inputs for layer in layers), sum(layer.zeros for layer in layers)
    held = [name for name in layers[0].patterns if all(name in layer.patterns for layer in layers)]
    result = {
        "model": model,
        "linear_weights": weights,
        "zeros": zeros,
        "sparsity": zeros / weights,
        "patterns": held,
        "same_in_rows": all(layer.same_in_rows for layer in layers),
        "layers": [{**asdict(layer), "sparsity": layer.sparsity} for layer in layers],
    }
    title = f"{Path(model).name}: {zeros / weights:.1%} zeros"
    picture = None if kind is None else plot_kept(layers, decoder.architecture.blocks, title, kind)
    already = f"{zeros} of {weights} weights are zero"
    write_json(json_file, json_text(result), already)
    if picture is not None:
        write_file(plot, picture, "plot", already)
    for layer in layers:
        held_here = ", ".join(layer.patterns) or ("rows" if layer.same_in_rows and layer.zeros else "")
        typer.echo(f"{layer.name} [{layer.outputs}, {layer.inputs}] {layer.sparsity:.2%} zeros {held_here}".rstrip())
    typer.echo(
        f"{zeros / weights:.2%} of {weights} linear weights are zero; in every layer: {', '.join(held) or 'no N:M'}"
    )
