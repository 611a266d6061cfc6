"""The command line: prune, evaluate, recipes, demo. What a command measures, --json FILE writes down."""

import errno
import functools
import json
import os
import signal
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ParamSpec

import typer
from rich.console import Console

from optprune.errors import InputError, OptpruneError

# Nothing here imports torch or transformers at the top, so that --help answers at once.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from optprune.models import SavedModel
    from optprune.progress import Reporter
    from optprune.recipe import Recipe
    from optprune.report import Report

INTERRUPTED = 130
FAILED = 2
PROBE_TOKENS = 128

P = ParamSpec("P")
app = typer.Typer(
    help="Prune language models: each layer an optimisation problem.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a .gguf file, a hub name, or 'demo'.")]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens in a window.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it holds a model.")]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors are one sentence on stderr.

    With OPTPRUNE_DEBUG=1 in the environment, a traceback comes before the sentence.
    """
    restore = _terminate_as_interrupt()
    try:
        # Without a command, the help is what one wants to see.
        result = app(
            args=list(sys.argv[1:] if arguments is None else arguments) or ["--help"],
            prog_name="optprune",
            standalone_mode=False,
        )
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return _tell(error)
    finally:
        restore()


def _reported(command: Callable[P, None]) -> Callable[P, None]:
    """A command whose errors are told in one sentence, also when typer runs it without `main`."""

    @functools.wraps(command)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except (Exception, KeyboardInterrupt) as error:
            raise typer.Exit(_tell(error)) from error

    return run


@app.command("prune", short_help="Prune a model and write it to a folder.")
@_reported
def prune_command(
    model: Model,
    calibration: Annotated[
        str,
        typer.Option(
            "--calibration",
            metavar="TEXT",
            help="FILE.txt, FILE.jsonl[:COLUMN], FILE.csv[:COLUMN], a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, "
            "or demo:calibration.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write.")],
    recipe: Annotated[str, typer.Option("--recipe", help="A recipe's name, or a .yaml file.")] = "fasp",
    sparsity: Annotated[
        float | None, typer.Option("--sparsity", help="The share of the decoder's linear weights to remove.")
    ] = None,
    samples: Annotated[int, typer.Option("--samples", help="How many calibration windows to draw.")] = 128,
    seq_length: SeqLength = 2048,
    seed: Annotated[int | None, typer.Option("--seed", help="Of the draws. [default: the recipe's, or 0]")] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    propagation: Annotated[
        str | None,
        typer.Option("--propagation", help="dense, pruned, intra or cross. [default: the recipe's, or pruned]"),
    ] = None,
    units: Annotated[
        str | None, typer.Option("--units", help="mlp, vo, all or weights. [default: the recipe's, or mlp]")
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", help="Of single weights: unstructured, rows or N:M. [default: the recipe's]"),
    ] = None,
    width_multiple: Annotated[
        int | None, typer.Option("--width-multiple", help="What MLP widths are multiples of. [default: 8]")
    ] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fallbacks and too few tokens are errors.")] = False,
    overwrite: Overwrite = False,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any recipe field; may be repeated.")
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Prune a model and write it to a folder, with its report and recipe beside the weights."""
    given = {
        "sparsity": sparsity,
        "seed": seed,
        "propagation": propagation,
        "units": units,
        "pattern": pattern,
        "width_multiple": width_multiple,
        "strict": strict or None,
    }
    overrides = _overrides({key: value for key, value in given.items() if value is not None}, settings or ())
    reporter = _start()
    from optprune.models import check_output, load_config, load_model, load_tokenizer, save_model
    from optprune.pipeline import prune
    from optprune.recipe import load_recipe
    from optprune.texts import calibration_batches, check_seq_length, check_vocabulary, read_documents, tokenise

    # What costs nothing is checked first: the weights are loaded when nothing the user gave can be wrong any more.
    chosen = load_recipe(recipe, overrides)
    check_output(output, overwrite)
    _check_json(json_file, output)
    documents = read_documents(calibration)
    config = load_config(model)
    check_seq_length(config, seq_length)
    _check_budget(config, chosen)
    reporter.say(f"tokenising {calibration}")
    tokens = tokenise(_tokenizer(load_tokenizer(model), model), documents)
    check_vocabulary(config, tokens)
    batches = calibration_batches(tokens, samples, seq_length, chosen.seed)

    reporter.say(f"loading {model}")
    loaded = load_model(model, dtype=dtype, device=device)
    with reporter.blocks() as on_event:
        text = f"{calibration}, {samples} windows of {seq_length} tokens, seed {chosen.seed}"
        report = prune(loaded.model, batches, chosen, on_event=on_event, source=model, calibration=text)
    reporter.say(f"saving to {output}, and reloading it in a fresh process to compare logits")
    saved = save_model(
        loaded.model,
        output,
        tokenizer=loaded.tokenizer,
        files={"report.json": report.to_json(), "recipe.yaml": chosen.to_yaml()},
        probe=_probe(tokens, seq_length),
        overwrite=overwrite,
    )
    _write_json(json_file, report.to_json(), f"the pruned model is in {output}")
    _summarise(report, saved)


@app.command("inspect", short_help="Measure what is zero in a model, whoever pruned it.")
@_reported
def inspect_command(
    model: Model,
    json_file: JsonFile = None,
) -> None:
    """Measure the sparsity and the pattern of every linear layer from the weights themselves."""
    reporter = _start()
    from dataclasses import asdict

    from optprune.models import Decoder, load_model, model_patterns

    _check_json(json_file)
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
    _write_json(json_file, json.dumps(result, indent=2) + "\n", f"{zeros} of {weights} weights are zero")
    for layer in layers:
        held_here = ", ".join(layer.patterns) or ("rows" if layer.same_in_rows and layer.zeros else "")
        _print(f"{layer.name} [{layer.outputs}, {layer.inputs}] {layer.sparsity:.2%} zeros {held_here}".rstrip())
    _print(f"{zeros / weights:.2%} of {weights} linear weights are zero; in every layer: {', '.join(held) or 'no N:M'}")


@app.command("evaluate", short_help="Measure a model's perplexity on a text.")
@_reported
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
    reporter = _start()
    from optprune.evaluate import perplexity
    from optprune.models import load_config, load_model, load_tokenizer
    from optprune.progress import duration
    from optprune.texts import check_seq_length, check_vocabulary, evaluation_windows, read_documents, tokenise

    _check_json(json_file)
    documents = read_documents(text)
    config = load_config(model)
    check_seq_length(config, seq_length)
    reporter.say(f"tokenising {text}")
    tokens = tokenise(_tokenizer(load_tokenizer(model), model), documents)
    check_vocabulary(config, tokens)
    ids = evaluation_windows(tokens, seq_length, windows)

    reporter.say(f"loading {model}")
    loaded = load_model(model, dtype=dtype, device=device)
    with reporter.count("evaluating", "window") as update:
        evaluation = perplexity(loaded.model, ids, on_window=update)
    result = {"model": model, "text": text, "seq_length": seq_length, **evaluation.to_dict()}
    _write_json(json_file, json.dumps(result, indent=2) + "\n", f"the perplexity is {evaluation.perplexity:.4f}")
    _print(
        f"perplexity {evaluation.perplexity:.4f} over {evaluation.tokens} tokens "
        f"({evaluation.windows} windows of {seq_length}) in {duration(evaluation.seconds)}"
    )


@app.command("recipes")
@_reported
def recipes_command(
    name: Annotated[str | None, typer.Argument(metavar="NAME", help="The recipe to print as YAML.")] = None,
) -> None:
    """List the recipes, or print one as YAML."""
    from optprune.recipe import load_recipe, recipe_names

    if name is not None:
        typer.echo(load_recipe(name).to_yaml(), nl=False)
        return
    names = recipe_names()
    width = max(map(len, names))
    for each in names:
        _print(f"{each:<{width}}  {load_recipe(each).summary}")


@app.command("demo", short_help="The whole story on packaged data, in minutes.")
@_reported
def demo_command(
    output: Annotated[
        Path | None,
        typer.Option("--output", metavar="DIR", help="The folder to write. [default: .demo/smollm2-fasp, replaced]"),
    ] = None,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Prune SmolLM2-135M by 20 percent on packaged articles: the whole story, in minutes."""
    reporter = _start()
    from optprune.demo import FOLDER, run_demo

    folder = FOLDER if output is None else output
    _check_json(json_file, folder)
    result = run_demo(folder, overwrite=overwrite or output is None, console=Console(), reporter=reporter)
    _write_json(json_file, json.dumps(result.to_dict(), indent=2) + "\n", f"the pruned model is in {folder}")


# -- what the commands share


def _start() -> "Reporter":
    """Import and quieten what is heavy; the command's own progress goes to stderr."""
    from optprune.progress import Reporter

    # Before transformers is imported, because its tokenizers warn when a process is forked after they ran.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")
    from transformers import modeling_gguf_pytorch_utils
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    # This one bar is not made by transformers' own tqdm, which can be switched off.
    modeling_gguf_pytorch_utils.tqdm = logging.tqdm  # type: ignore[attr-defined]
    return Reporter()


def _overrides(options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The recipe fields that the user gave, by option or as --set key=value."""
    import yaml

    fields = dict(options)
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"--set {setting!r} is not of the form KEY=VALUE, such as damping=0.05")
        if key in fields:
            raise InputError(f"the recipe field {key!r} is given twice, the second time by --set {setting}: give one")
        try:
            fields[key] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise InputError(
                f"the value in --set {setting} is not valid YAML: {' '.join(str(error).split())}"
            ) from error
    return fields


def _check_budget(config: "PretrainedConfig", recipe: "Recipe") -> None:
    """Raise InputError when the sparsity cannot be reached: allocate it on a model without weights."""
    import torch
    from transformers import AutoModelForCausalLM

    from optprune.allocation import uniform
    from optprune.models import Decoder, architecture_of, is_stock

    architecture_of(config)
    if not is_stock(config):
        return
    with torch.device("meta"):
        shapes = AutoModelForCausalLM.from_config(config)
    uniform(Decoder(shapes), recipe.sparsity, recipe.units, recipe.width_multiple)


def _tokenizer(tokenizer: Any, model: str) -> Any:
    if tokenizer is None:
        raise InputError(f"the model {model} has no tokenizer, which is needed to read text: save one in its folder")
    return tokenizer


def _probe(tokens: "Tensor", seq_length: int) -> "Tensor":
    """The tokens on which the saved model's logits are compared."""
    return tokens[: min(seq_length, PROBE_TOKENS)][None]


def _summarise(report: "Report", saved: "SavedModel") -> None:
    from optprune.progress import duration

    folder = saved.folder
    errors = [layer.relative_error for layer in report.layers]
    loads = (
        f"AutoModelForCausalLM.from_pretrained({str(folder)!r})" if saved.stock else f"optprune.load({str(folder)!r})"
    )
    _print(
        f"{report.sparsity_reached:.2%} of the decoder's linear weights removed ({report.sparsity_requested:.2%} asked)"
    )
    _print(
        f"{duration(report.seconds)} on {report.tokens} tokens, of which the two calibration passes need "
        f"{duration(report.floor_seconds)}"
    )
    if errors:
        _print(f"mean relative error {sum(errors) / len(errors):.3g} over {len(errors)} layers")
    for note in report.notes:
        _print(f"note: {note}")
    _print(f"{folder}: {saved.bytes / 2**20:.1f} MiB of weights, loads with {loads}")
    _print(f"reload check passed: logits differ by at most {saved.logits_difference:.2g}")


def _print(text: str) -> None:
    typer.echo(text)


def _check_json(file: Path | None, output: Path | None = None) -> None:
    """Raise InputError when the JSON file could not be written at the end."""
    if file is None:
        return
    if file.is_dir():
        raise InputError(f"the JSON file {file} is a folder: name a file")
    parent = file.absolute().parent
    if not parent.is_dir() and (output is None or parent != output.absolute()):
        raise InputError(f"the JSON file {file} cannot be written: there is no folder {file.parent}")
    if parent.is_dir() and not os.access(parent, os.W_OK):
        raise InputError(f"the JSON file {file} cannot be written: the folder {file.parent} is not writable")


def _write_json(file: Path | None, text: str, already: str) -> None:
    """Write the file whole or not at all; `already` says what is not lost when that fails."""
    if file is None:
        return
    draft: Path | None = None
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=file.absolute().parent, prefix=f".{file.name}.", delete=False
        ) as stream:
            draft = Path(stream.name)
            stream.write(text)
        # A temporary file is private; a result is as readable as any other file.
        umask = os.umask(0)
        os.umask(umask)
        draft.chmod(0o666 & ~umask)
        draft.replace(file)
    except BaseException as error:
        if draft is not None:
            draft.unlink(missing_ok=True)
        if isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt(already) from None
        if isinstance(error, OSError):
            raise OptpruneError(f"the JSON file {file} cannot be written ({error.strerror}), but {already}") from error
        raise


# -- errors


def _terminate_as_interrupt() -> Callable[[], None]:
    """Let SIGTERM clean up as Ctrl-C does; returns what puts the old handler back."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)

    def restore() -> None:
        signal.signal(signal.SIGTERM, before)

    return restore


def _tell(error: BaseException) -> int:
    """Say in one sentence on stderr what went wrong; returns the exit status."""
    if isinstance(error, typer.Exit):
        return error.exit_code
    if isinstance(error, BrokenPipeError):
        # The reader (head, less) has gone; Python must not complain again when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    if os.environ.get("OPTPRUNE_DEBUG") == "1":
        traceback.print_exception(error)
    if isinstance(error, KeyboardInterrupt | typer.Abort):
        typer.echo(f"interrupted; {error.args[0] if error.args else 'nothing was written'}", err=True)
        return INTERRUPTED
    typer.echo(f"error: {_sentence(error)}", err=True)
    return FAILED


def _sentence(error: BaseException) -> str:
    if isinstance(error, OptpruneError):
        text = str(error)
    elif hasattr(error, "format_message"):  # a wrong option or argument, in typer's words
        text = f"{error.format_message()} (see optprune --help)"  # type: ignore[attr-defined]
    elif _is_out_of_memory(error):
        text = "the memory is not enough: lower --samples or --seq-length, or use --dtype bfloat16"
    elif isinstance(error, OSError) and error.errno == errno.ENOSPC:
        text = "the disk is full, so nothing was written: free some space and run again"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'a file'} cannot be used: {error.strerror or error}"
    else:
        first = (str(error).strip().splitlines() or [""])[0]
        text = f"{type(error).__name__}: {first} (unexpected: set OPTPRUNE_DEBUG=1 for the traceback, and report it)"
    return " ".join(text.split())


def _is_out_of_memory(error: BaseException) -> bool:
    words = str(error).lower()
    return isinstance(error, MemoryError) or (
        isinstance(error, RuntimeError) and ("out of memory" in words or "can't allocate memory" in words)
    )


if __name__ == "__main__":
    sys.exit(main())
