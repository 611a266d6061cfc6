"""optprune prune: from a model and a text to a folder."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optprune.cli.log import LogFile
from optprune.cli.options import Device, Dtype, JsonFile, Model, Overwrite, SeqLength
from optprune.cli.outputs import check_json, start, write_json
from optprune.cli.tokens import calibration_for
from optprune.cli.whole_run import WholeRun
from optprune.errors import InputError
from optprune.system.files import read_yaml
from optprune.system.wording import one_line, shown

if TYPE_CHECKING:
    from optprune.allocation import Allocation
    from optprune.export import SavedModel
    from optprune.recipe import Recipe
    from optprune.report import Report

DESTROYED = 0.5
"""the mean relative error of the layers above which the summary warns"""


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
    save_dtype: Annotated[
        str,
        typer.Option("--save-dtype", help="auto (the dtype computed in), float32, bfloat16 or float16."),
    ] = "auto",
    propagation: Annotated[
        str | None,
        typer.Option(
            "--propagation",
            help="dense, pruned, intra, cross, local or auto (intra under N:M, else pruned). [default: the recipe's]",
        ),
    ] = None,
    units: Annotated[
        str | None,
        typer.Option(
            "--units", help="mlp, vo, kv-groups, all, weights or blocks. [default: the recipe's, all for fasp]"
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option("--pattern", help="Of single weights: unstructured, rows or N:M. [default: the recipe's]"),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            "--allocation",
            help="uniform, global (one budget for the model), or a FILE.json such as a report. [default: the recipe's]",
        ),
    ] = None,
    width_multiple: Annotated[
        int | None,
        typer.Option(
            "--width-multiple",
            help="What MLP widths and value dimensions are multiples of. [default: 64 for MLPs from 4096 on, else 8]",
        ),
    ] = None,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fallbacks, too few tokens and a missed budget are errors.")
    ] = False,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers", help="How many processes prune blocks side by side, under dense or intra. [default: 1]"
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            "--ray", metavar="ADDRESS", help="Workers of the Ray cluster there; 'local' starts one for the run."
        ),
    ] = None,
    states: Annotated[
        str, typer.Option("--states", help="Where hidden states wait for a block: device, host, disk or auto, by size.")
    ] = "auto",
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with a run into this folder that was stopped, if there is one.")
    ] = False,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", help="The most that a weights file holds, such as 5GB.")
    ] = "5GB",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set", metavar="KEY=VALUE", help="Any recipe field (see optprune recipes --fields); may be repeated."
        ),
    ] = None,
    json_file: JsonFile = None,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="Add the lines of progress to a file, with the time.")
    ] = None,
) -> None:
    """Prune a model and write it to a folder, with its report and recipe beside the weights."""
    given_blocks = allocation if allocation is not None and allocation.endswith(".json") else None
    given = {
        "sparsity": sparsity,
        "seed": seed,
        "propagation": propagation,
        "units": units,
        "pattern": pattern,
        "allocation": allocation if given_blocks is None else None,
        "width_multiple": width_multiple,
        "strict": strict or None,
    }
    overrides = _overrides({key: value for key, value in given.items() if value is not None}, settings or ())
    reporter = start(lines := LogFile(log))
    from optprune.models import device_of, load_config, load_shapes
    from optprune.pruning import workers_of
    from optprune.pruning.expectation import expected_seconds
    from optprune.pruning.preflight import check_run
    from optprune.recipe import load_recipe
    from optprune.recipe.allocator import allocator_of
    from optprune.report import PhaseRecorder
    from optprune.report.phases import TOKENISING
    from optprune.texts import check_seq_length, read_documents

    # What costs nothing is checked first: the weights are loaded when nothing the user gave can be wrong any more.
    chosen = load_recipe(recipe, overrides)
    if given_blocks is not None and "sparsity" in overrides and chosen.only_share is None:
        raise InputError(f"the sparsity is what the allocation file {given_blocks} comes to: leave out --sparsity")
    crew = workers_of(chosen, workers, ray)
    whole = WholeRun(model, dtype, device, output, overwrite, save_dtype, max_shard_size, resume, crew, states)
    whole.check()
    check_json(json_file, output=output, models=[model])
    lines.check(output, model)
    divided = None if given_blocks is None else _read_allocation(given_blocks)
    documents = read_documents(calibration)
    config = load_config(model)
    check_seq_length(config, seq_length)
    shapes = load_shapes(model, config)
    if divided is not None:
        with _named(given_blocks, "does not fit"):
            allocator_of(chosen, divided).check(shapes)
    check_run(shapes, chosen, divided)
    sizes = samples * seq_length, sum(map(len, documents))
    with reporter.events(expected_seconds(shapes, chosen, divided, *sizes, device_of(device))) as on_event:
        phases = PhaseRecorder(device_of(device), on_event)
        with phases.step(TOKENISING, f"tokenising {calibration}"):
            batches, window = calibration_for(model, config, documents, samples, seq_length, chosen.seed)
        del documents
        report, saved = whole.run(
            reporter,
            phases,
            batches,
            chosen,
            divided,
            f"{calibration}, {samples} windows of {seq_length} tokens, seed {chosen.seed}",
            window=window,
        )
    write_json(json_file, report.to_json(), f"the pruned model is in {output}")
    _summarise(chosen, report, saved)


def _overrides(options: Mapping[str, Any], settings: Sequence[str]) -> dict[str, Any]:
    """The recipe fields that the user gave, by option or as --set key=value."""
    fields = dict(options)
    for setting in settings:
        key, equals, text = setting.partition("=")
        key = key.strip()
        if not equals or not key:
            raise InputError(f"--set {shown(setting)} is not of the form KEY=VALUE, such as damping=0.05")
        if key in fields:
            raise InputError(
                f"the recipe field {shown(key)} is given twice, the second time by --set {one_line(setting)}: give one"
            )
        fields[key] = read_yaml(text, f"the value in --set {one_line(setting)}")
    return fields


def _read_allocation(file: str) -> "Allocation":
    """An allocation from its own file, or from the report of an earlier run."""
    from optprune.allocation import Allocation

    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the allocation file {file} cannot be read: {error}") from error
    with _named(file, "cannot be used"):
        return Allocation.from_json(text)


@contextmanager
def _named(file: str | None, what: str) -> Iterator[None]:
    """What is wrong with an allocation, with the name of its file."""
    try:
        yield
    except InputError as error:
        raise InputError(f"the allocation file {file} {what}: {error}") from error


def _summarise(recipe: "Recipe", report: "Report", saved: "SavedModel") -> None:
    from optprune.allocation import Allocation
    from optprune.recipe.groups import GlobalBudget
    from optprune.report.progress import duration

    folder = saved.folder
    errors = [layer.relative_error for layer in report.layers]
    trust = "" if saved.stock else ", trust_remote_code=True"
    loads = f"AutoModelForCausalLM.from_pretrained({str(folder)!r}{trust})"
    loads += "" if saved.stock else f" or optprune.load({str(folder)!r})"
    currency = recipe.allocation.currency if isinstance(recipe.allocation, GlobalBudget) else "parameters"
    of_what = {"parameters": "", "flops": " of the operations", "time": " of the time"}[currency]
    typer.echo(
        f"{report.sparsity_reached:.2%} of the decoder's linear weights removed "
        f"({report.sparsity_requested:.2%}{of_what} asked)"
    )
    for line in Allocation.from_dict(report.allocation).lines():
        typer.echo(line)
    typer.echo(
        f"{duration(report.seconds)} on {report.tokens} tokens, of which the two calibration passes need "
        f"{duration(report.floor_seconds)}"
    )
    if errors:
        when = " before recovery" if report.recovered else ""
        typer.echo(f"mean relative error {sum(errors) / len(errors):.3g} over {len(errors)} layers{when}")
    if errors and sum(errors) / len(errors) > DESTROYED:
        typer.echo("warning: the model is probably destroyed by so large an error: remove less, or restore more")
    if recipe.units.family is not None:
        typer.echo(
            "zeros by themselves make a folder neither smaller nor faster: that takes a runtime with a kernel for the "
            f"pattern {recipe.units.family.name}"
        )
    for note in report.notes:
        typer.echo(f"note: {note}")
    typer.echo(f"{folder}: {saved.bytes / 2**20:.1f} MiB of weights, loads with {loads}")
    typer.echo(f"reload check passed: logits differ by at most {saved.logits_difference:.2g}")
