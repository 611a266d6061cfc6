"""optprune evaluate: measure a model on a text, alone or against the dense model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.evaluation import ModelEvaluation, TaskRun
from optprune.cli.options import Architecture, Device, Dtype, JsonFile, Model, PackedSequences, SeqLength
from optprune.cli.outputs import check_json, echo, files_in, start, write_json
from optprune.errors import InputError, check_at_least
from optprune.system.files import json_text

if TYPE_CHECKING:
    from optprune.measure import Tasks
    from optprune.report.progress import Reporter


def evaluate_command(
    model: Model,
    text: Annotated[
        str | None,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="FILE.txt, FILE.jsonl[:COLUMN], also .csv and .parquet, a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, "
            "or demo:evaluation.",
        ),
    ] = None,
    seq_length: SeqLength = 2048,
    windows: Annotated[int | None, typer.Option("--windows", help="Number of windows. [default: all]")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DENSE", help="The model before pruning, to compare with."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option(
            "--questions",
            metavar="FILE.jsonl",
            help="Multiple-choice questions: question, choices and answer in each line.",
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option("--tasks", metavar="NAMES", help="Tasks of lm-eval: names or .yaml files, separated by commas."),
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option("--include-path", metavar="DIR", help="A folder with custom tasks.")
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", help="Largest number of questions of a task. [default: all]")
    ] = None,
    task_batch: Annotated[int, typer.Option("--task-batch", help="Number of texts of a task in a batch.")] = 1,
    generations: Annotated[
        int, typer.Option("--generations", help="Number of greedy continuations of the text to print.")
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    sequences: PackedSequences = "packed",
    architecture: Architecture = None,
    json_file: JsonFile = None,
) -> None:
    """Measure a model's perplexity on the text, joined, tokenised once and cut into consecutive windows.

    With --against, also measure the divergence of the predictions in nats and how often the first choice agrees. With
    --questions or --tasks, measure the share of right answers; these need no text.
    """
    reporter = start()
    from optprune.measure import read_questions
    from optprune.models import check_dtype, device_of
    from optprune.models.checkpoint import digest_of_source
    from optprune.texts import PACKED, check_sequences

    models = [model, *([] if against is None else [against])]
    inputs = [text, questions, architecture, *files_in((tasks or "").split(","))]
    check_json(json_file, models=models, inputs=inputs)
    check_dtype(dtype)
    check_sequences(sequences, PACKED)
    device_of(device)
    for name, number, least in (("generations", generations, 0), ("limit", limit, 1), ("task-batch", task_batch, 1)):
        check_at_least(f"--{name}", number, least)
    if text is None and questions is None and tasks is None:
        raise InputError("there is nothing to measure the model on: give --text, --questions or --tasks")
    if text is None and generations:
        raise InputError("--generations continues a text: give one by --text")
    choices = [] if questions is None else read_questions(questions)
    named = _named_tasks(reporter, tasks, include_path)
    places = {"device": device, "dtype": dtype, "architecture": architecture, "sequences": sequences}
    weights = {} if json_file is None else {"weights": digest_of_source(model)}
    evaluated = ModelEvaluation.loaded_for(reporter, model, against, text, seq_length, windows, **places)
    run = None if named is None else TaskRun(named, limit, task_batch)
    result, lines = evaluated.measured(choices, generations, run)
    already = f"the perplexity is {result['perplexity']:.4f}" if text is not None else lines[0]
    write_json(json_file, json_text({**result, **weights}), already)
    for line in lines:
        echo(line)


def _named_tasks(reporter: "Reporter", tasks: str | None, include: Path | None) -> "Tasks | None":
    """Return the named tasks of lm-eval; InputError where one is not found."""
    from optprune.measure import Tasks

    if tasks is None and include is not None:
        raise InputError("--include-path is the folder of the tasks in --tasks: give --tasks too")
    if tasks is None:
        return None
    reporter.say(f"reading the tasks {tasks}")
    return Tasks.found(tasks.split(","), include)
