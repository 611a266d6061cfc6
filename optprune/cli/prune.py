"""optprune prune: prune a model on a text and write a folder."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optprune.cli.goal import GoalOptions, resolve_for
from optprune.cli.help import ADVANCED
from optprune.cli.log import LogFile
from optprune.cli.options import (
    Allocation,
    Architecture,
    Bits,
    Calibration,
    Device,
    Dtype,
    Effort,
    ExpertScores,
    ExpertsKept,
    Generated,
    JsonFile,
    MaxShardSize,
    Model,
    Overwrite,
    PartialSums,
    Pattern,
    Propagation,
    Ray,
    RecipeName,
    Restart,
    Resume,
    Runs,
    Samples,
    SaveDtype,
    Seed,
    SeqLength,
    Sequences,
    Settings,
    Sparsity,
    States,
    Strict,
    Units,
    Vocabulary,
    WidthMultiple,
    Workers,
)
from optprune.cli.outputs import check_distinct, check_json, echo, start, started, write_json
from optprune.cli.prune_run import WholeRun, run_on_text
from optprune.cli.request import Options
from optprune.cli.run_folder import FINISHED, Output
from optprune.system.wording import counted

if TYPE_CHECKING:
    from optprune.cli.request import Resolved
    from optprune.export import SavedModel
    from optprune.program import Program
    from optprune.recipe import Recipe
    from optprune.report import Report

DESTROYED = 0.5
"""the mean relative error of the layers above which the summary prints a warning"""


def prune_command(
    model: Model,
    calibration: Calibration,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write.")],
    recipe: RecipeName = "fasp",
    effort: Effort = "standard",
    sparsity: Sparsity = None,
    experts: ExpertsKept = None,
    expert_scores: ExpertScores = None,
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            metavar="GOAL",
            help="Choose the sparsity by a goal: a size of the weights in the folder such as 200MiB, or a speed of "
            "decoding over the dense model's on this machine such as 1.5x.",
        ),
    ] = None,
    to_quality: Annotated[
        float | None,
        typer.Option(
            "--to-quality",
            metavar="RATIO",
            help="Choose the largest sparsity whose bits per byte on --text are at most this many times the dense "
            "model's, such as 1.05.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="The text for --to-quality; same forms as --calibration.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
    windows: Annotated[
        int | None,
        typer.Option("--windows", help="Number of windows for --to-quality. [default: all]", rich_help_panel=ADVANCED),
    ] = None,
    samples: Samples = 128,
    generated: Generated = 0,
    seq_length: SeqLength = 2048,
    sequences: Sequences = "packed",
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    save_dtype: SaveDtype = "auto",
    propagation: Propagation = None,
    units: Units = None,
    pattern: Pattern = None,
    bits: Bits = None,
    allocation: Allocation = None,
    vocabulary: Vocabulary = None,
    width_multiple: WidthMultiple = None,
    target: Runs = None,
    architecture: Architecture = None,
    strict: Strict = False,
    workers: Workers = None,
    ray: Ray = None,
    partial_sums: PartialSums = None,
    states: States = "auto",
    overwrite: Overwrite = False,
    resume: Resume = False,
    restart: Restart = False,
    max_shard_size: MaxShardSize = "5GB",
    settings: Settings = None,
    no_plan: Annotated[
        bool,
        typer.Option(
            "--no-plan",
            help="Start even if the plan exceeds the memory or the disk.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    json_file: JsonFile = None,
    log: Annotated[
        Path | None,
        typer.Option(
            "--log",
            metavar="FILE",
            help="Append the lines of progress with their time to a file.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
) -> None:
    """Prune a model and write it to a folder, with its report and recipe beside the weights."""
    options = Options.of(locals())
    reporter = start(lines := LogFile(log))
    from optprune.pruning import workers_of
    from optprune.texts import check_sequences

    # Checks that take no time come first; the weights are loaded after the last check of options.
    chosen = options.chosen()
    whole = WholeRun(
        model=model,
        dtype=dtype,
        device=device,
        output=Output(output, overwrite, resume, restart, reads=(model,)),
        save_dtype=save_dtype,
        max_shard_size=max_shard_size,
        workers=workers_of(chosen.propagation, workers, ray),
        states=states,
        architecture=architecture,
        generated=generated,
    )
    whole.check()
    inputs = [calibration, text, *options.input_files]
    check_json(json_file, output=output, models=[model], inputs=inputs)
    lines.check(output, model, inputs)
    check_distinct(json_file, log)
    check_sequences(sequences)
    options = options.with_calibration(calibration, chosen)
    goal = {"to": to, "quality": to_quality, "text": text, "windows": windows}
    resolved = _resolved(options, chosen, goal, (calibration, sequences), whole=whole, say=reporter.say)
    done = run_on_text(
        whole,
        resolved,
        (calibration, sequences),
        partial_sums=partial_sums,
        planned=not no_plan,
        started=started(),
        reporter=reporter,
    )
    if done is not None:  # another process has it otherwise
        _finish(resolved, *done, json_file, output)


def _resolved(
    options: Options,
    recipe: "Recipe",
    goal: Mapping[str, Any],
    data: tuple[str, str],
    *,
    whole: WholeRun,
    say: Callable[[str], None],
) -> "Resolved":
    """Return the program of the run, with the sparsity that reaches a goal where an option names one."""
    if all(value is None for value in goal.values()):
        return options.resolve(recipe)
    calibration, sequences = data
    wanted = GoalOptions.of(**goal, calibration=calibration, sequences=sequences)
    return resolve_for(wanted, options, recipe, whole=whole, say=say)


def _finish(
    resolved: "Resolved", report: "Report", saved: "SavedModel | None", json_file: Path | None, output: Path
) -> None:
    """Write and print the result of a run."""
    if saved is not None:
        resolved.check(output)
    write_json(json_file, report.to_json(), f"the pruned model is in {output}")
    if saved is None:
        echo(FINISHED.format(output))
    else:
        _summarise(resolved.program, report, saved)


def _summarise(program: "Program", report: "Report", saved: "SavedModel") -> None:
    from optprune.allocation import Allocation
    from optprune.recipe.groups import GlobalBudget
    from optprune.report.progress import duration

    folder = saved.folder
    errors = [layer.relative_error for layer in report.layers]
    trust = "" if saved.stock else ", trust_remote_code=True"
    loads = f"{program.decoder.architecture.auto_class}.from_pretrained({str(folder)!r}{trust})"
    loads += "" if saved.stock else f" or optprune.load_model({str(folder)!r})"
    recipe = program.request.recipe
    currency = recipe.allocation.currency if isinstance(recipe.allocation, GlobalBudget) else "parameters"
    of_what = {"parameters": "", "flops": " of the operations", "time": " of the time"}[currency]
    what = "are zero" if report.lost == "zero" else report.lost
    echo(f"{report.sparsity_reached:.2%} of the decoder's linear weights {what} ({report.requested(of_what)})")
    for line in Allocation.from_dict(report.allocation).lines():
        echo(line)
    if report.vocabulary is not None:
        echo(report.vocabulary.in_words())
    if report.goal is not None:
        echo(report.goal.in_words())
    echo(
        f"{duration(report.seconds)} on {report.tokens} tokens, of which the two calibration passes take "
        f"{duration(report.floor_seconds)}"
    )
    if errors:
        when = " before recovery" if report.recovered else ""
        echo(f"mean relative error {sum(errors) / len(errors):.3g} over {counted(len(errors), 'layer')}{when}")
    if errors and sum(errors) / len(errors) > DESTROYED:
        echo("warning: the model is probably unusable with so large an error: lower the sparsity, or add recovery")
    if recipe.units.family is not None and report.sparsity_requested:
        echo(
            "zeros alone make a folder neither smaller nor faster: use a runtime with a kernel for the pattern "
            f"{recipe.units.family.name}"
        )
    for note in report.notes:
        echo(f"note: {note}")
    echo(f"{folder}: {saved.bytes / 2**20:.1f} MiB of weights, loads with {loads}")
    echo(f"reload check passed: logits differ by at most {saved.logits_difference:.2g}")
