"""optprune report: write the report page of a run again, with later measurements."""

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.evaluation import ModelEvaluation
from optprune.cli.options import Device, Dtype, SeqLength
from optprune.cli.outputs import Input, check_file, echo, start, write_file
from optprune.errors import InputError, check_at_least
from optprune.system.files import is_marked, real_path
from optprune.system.wording import install, one_line

if TYPE_CHECKING:
    from optprune.report import EvaluationReport, Report

PAGE = "report.html"


def report_command(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A folder that optprune prune wrote.")],
    against: Annotated[
        str | None, typer.Option("--against", metavar="MODEL", help="The model before pruning, to compare with.")
    ] = None,
    text: Annotated[
        str | None,
        typer.Option(
            "--text", metavar="TEXT", help="A held-out text to measure on, in the forms of optprune evaluate."
        ),
    ] = None,
    seq_length: SeqLength = 2048,
    windows: Annotated[int | None, typer.Option("--windows", help="Number of windows. [default: all]")] = None,
    generations: Annotated[
        int, typer.Option("--generations", help="Number of greedy continuations of the text to show.")
    ] = 10,
    evaluation: Annotated[
        Path | None, typer.Option("--evaluation", metavar="FILE", help="The file that optprune evaluate --json wrote.")
    ] = None,
    speed: Annotated[
        Path | None,
        typer.Option("--speed", metavar="FILE", help="The file that optprune benchmark-model --json wrote."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="FILE", help="The page to write. [default: DIR/report.html]")
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
) -> None:
    """Write report.html of a pruned folder again from its report.json, with evaluation and speed if given.

    The page is one self-contained file. With --text both models are in memory, as for optprune evaluate.
    """
    reporter = start()
    from optprune.models import check_dtype, device_of
    from optprune.report import page, read_evaluation, read_healing, read_report, read_speed, summarise_model
    from optprune.report.drawings import can_draw

    _check_together(against, text, evaluation)
    check_at_least("--generations", generations, 0)
    check_dtype(dtype)
    device_of(device)
    report = read_report(folder)
    place = _place(folder, output, against, [text, evaluation, speed])
    measured = None if evaluation is None else read_evaluation(evaluation)
    speeds = None if speed is None else read_speed(speed)
    if evaluation is not None and measured is not None:
        _check_measured(folder, evaluation, measured.model, measured.weights, "evaluate")
    if speed is not None and speeds is not None:
        _check_measured(folder, speed, speeds.models[0].name, speeds.models[0].weights, "benchmark-model")
    model, healing = summarise_model(folder, report), read_healing(folder)
    if text is not None:
        _check_against(folder, report, against)
        evaluated = ModelEvaluation.loaded_for(
            reporter, str(folder), against, text, seq_length, windows, device=device, dtype=dtype
        )
        measured = _evaluated(evaluated, generations)
    if not can_draw():
        reporter.say(f"matplotlib is not installed, so tables replace pictures: {install('plot')}")
    drawn = page(report, model=model, evaluation=measured, speed=speeds, healing=healing, folder=str(folder))
    write_file(place, drawn.encode(), "page", f"{folder} is as it was")
    echo(f"{place}: {len(drawn.encode()) / 1024:.0f} KiB")


def _check_together(against: str | None, text: str | None, evaluation: Path | None) -> None:
    if against is not None and text is None:
        raise InputError("--against compares predictions on a text: give one by --text")
    if evaluation is not None and text is not None:
        raise InputError("--evaluation reads a measurement and --text makes one: give one of them")


def _check_measured(folder: Path, file: Path, model: str, weights: str, command: str) -> None:
    """Raise InputError unless a file of measurements is of the weights in the folder."""
    from optprune.models.checkpoint import digest_of_source

    again = f"measure {folder} by optprune {command} --json"
    if not weights:
        raise InputError(f"{file} does not say which weights were measured, as files of earlier versions: {again}")
    if weights != digest_of_source(str(folder)):
        raise InputError(f"{file} has figures of other weights ({one_line(model)}) than those in {folder}: {again}")


def _check_against(folder: Path, report: "Report", against: str | None) -> None:
    """Raise InputError where the report says that other files were pruned; a GGUF file is not checked."""
    from optprune.models import load_config, open_model
    from optprune.models.draft import draft_in
    from optprune.models.sources import locate
    from optprune.models.store import NullSink
    from optprune.pruning.journal import may_be_of

    if against is None or locate(against)[1]:
        return
    dense = open_model(against, sink=NullSink(), device="cpu", architecture=draft_in(load_config(str(folder))))
    if not may_be_of(report.run_facts, dense.decoder()):
        raise InputError(
            f"{one_line(against)} has other weights than the model that was pruned into {folder}, "
            f"{one_line(report.model)}: name that model by --against"
        )


def _place(folder: Path, output: Path | None, against: str | None, inputs: Iterable[Input]) -> Path:
    """Return the path of the page: in the folder, or a file that is neither an input nor one of a model's."""
    place = folder / PAGE if output is None else output
    if output is None and place.is_symlink():
        raise InputError(f"{place} is a link, so the page is not written there: name the file by --output")
    own = real_path(place) == real_path(folder / PAGE)
    models = [*([] if own else [str(folder)]), *([] if against is None else [against])]
    check_file(place, "page", models=models, inputs=inputs, replaces=lambda file: own or is_marked(file))
    return place


def _evaluated(evaluated: "ModelEvaluation", generations: int) -> "EvaluationReport":
    """Return a new evaluation, with the size of the dense model."""
    from optprune.models.sources import file_bytes
    from optprune.report import parse_evaluation

    result, _ = evaluated.measured([], generations)
    if evaluated.dense is not None:
        result["dense_parameters"] = sum(parameter.numel() for parameter in evaluated.dense.model.parameters())
        result["dense_bytes"] = file_bytes(evaluated.dense.source)
    return parse_evaluation(result, "the evaluation")
