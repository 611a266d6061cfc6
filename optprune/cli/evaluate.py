"""optprune evaluate: a model's perplexity on a text."""

from typing import Annotated

import typer

from optprune.cli.options import Device, Dtype, JsonFile, Model, SeqLength
from optprune.cli.outputs import check_json, start, write_json
from optprune.cli.tokens import tokens_for
from optprune.system.files import json_text


def evaluate_command(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="FILE.txt, FILE.jsonl[:COLUMN], FILE.csv[:COLUMN], a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, "
            "or demo:evaluation.",
        ),
    ],
    seq_length: SeqLength = 2048,
    windows: Annotated[int | None, typer.Option("--windows", help="How many windows. [default: all]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure a model's perplexity: the text joined, tokenised once, cut into consecutive windows."""
    reporter = start()
    from optprune.measure import perplexity
    from optprune.models import check_dtype, device_of, load_config, load_model
    from optprune.report.progress import duration
    from optprune.texts import check_seq_length, evaluation_windows, read_documents

    check_json(json_file, models=[model])
    check_dtype(dtype)
    device_of(device)
    documents = read_documents(text)
    config = load_config(model)
    check_seq_length(config, seq_length)
    reporter.say(f"tokenising {text}")
    tokens = tokens_for(model, config, documents)
    ids = evaluation_windows(tokens, seq_length, windows)

    reporter.say(f"loading {model}")
    loaded = load_model(model, dtype=dtype, device=device)
    with reporter.count("evaluating", "window") as update:
        evaluation = perplexity(loaded.model, ids, on_window=update)
    result = {"model": model, "text": text, "seq_length": seq_length, **evaluation.to_dict()}
    write_json(json_file, json_text(result), f"the perplexity is {evaluation.perplexity:.4f}")
    typer.echo(
        f"perplexity {evaluation.perplexity:.4f} over {evaluation.tokens} tokens "
        f"({evaluation.windows} windows of {seq_length}) in {duration(evaluation.seconds)}"
    )
