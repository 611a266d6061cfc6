"""optprune inspect: what is zero in a model."""

import typer

from optprune.cli.options import JsonFile, Model
from optprune.cli.outputs import check_json, start, write_json
from optprune.values import json_text


def inspect_command(
    model: Model,
    json_file: JsonFile = None,
) -> None:
    """Measure the sparsity and the pattern of every linear layer from the weights themselves."""
    reporter = start()
    from dataclasses import asdict

    from optprune.models import Decoder, load_model, model_patterns

    check_json(json_file)
    reporter.say(f"loading {model}")
    layers = model_patterns(Decoder(load_model(model, device="cpu").model))
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
    write_json(json_file, json_text(result), f"{zeros} of {weights} weights are zero")
    for layer in layers:
        held_here = ", ".join(layer.patterns) or ("rows" if layer.same_in_rows and layer.zeros else "")
        typer.echo(f"{layer.name} [{layer.outputs}, {layer.inputs}] {layer.sparsity:.2%} zeros {held_here}".rstrip())
    typer.echo(
        f"{zeros / weights:.2%} of {weights} linear weights are zero; in every layer: {', '.join(held) or 'no N:M'}"
    )
