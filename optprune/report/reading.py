"""Readers of report.json, and of the JSON files of optprune evaluate, benchmark-model and heal."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from optprune.errors import InputError
from optprune.report.records import LayerReport, RecoveredPart, RemovedPart, Report
from optprune.system.files import read_json
from optprune.system.wording import one_line, shown

REPORT, PAGE = "report.json", "report.html"
"""the files of a report in a folder: the figures, and the page about them"""
MOST = 2**64
"""what the whole numbers of a report are below"""
ROWS = {"layers": LayerReport, "recovered": RecoveredPart, "removed": RemovedPart}
"""the lists of a report whose entries hold numbers that JSON may not know"""


def read_report(folder: str | Path) -> Report:
    """The report of a folder that a run wrote; InputError where there is none, or something else under its name."""
    file = Path(folder) / REPORT
    if not file.is_file():
        raise InputError(f"the folder {folder} has no {REPORT}: give one that optprune prune wrote")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from error
    data = read_json(text, str(file))
    if not isinstance(data, dict):
        raise InputError(f"{file} is no report of a run, but {shown(data)}: give a folder that optprune prune wrote")
    check_whole_numbers(data, str(file))
    try:
        return TypeAdapter(Report).validate_python(_with_numbers(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{file} is no report of a run ({one_line(place)}: {one_line(first['msg'])}): give a folder that optprune "
            "prune wrote"
        ) from error


def check_whole_numbers(data: Any, where: str) -> None:
    """Raise InputError where plain data hold a whole number that no count, size or seed can be."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) >= MOST:
            raise InputError(
                f"{where} holds the number {shown(value)}, which is beyond 64 bits: give the file as written"
            )


def _with_numbers(data: Any) -> Any:
    """The data with NaN where a number is null: JSON knows neither NaN nor infinity, so one was written as null."""
    if not isinstance(data, dict):
        return data
    told = dict(data)
    for name, kind in ROWS.items():
        if isinstance(rows := told.get(name), list):
            told[name] = [_filled(row, kind) if isinstance(row, dict) else row for row in rows]
    return _filled(told, Report)


def _filled(row: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A row with NaN for numbers that are null, and null for what earlier versions did not write and may be absent."""
    filled = dict(row)
    for each in fields(kind):
        if each.type is float and filled.get(each.name, 0.0) is None:
            filled[each.name] = math.nan
        elif each.name not in filled and each.default is MISSING and type(None) in get_args(each.type):
            filled[each.name] = None
    return filled


Kind = TypeVar("Kind")


@dataclass(frozen=True)
class ContextPart:
    """The predictions that see between so many tokens and so many."""

    first: int
    last: int
    perplexity: float | None
    divergence: float | None
    agreement: float


@dataclass(frozen=True)
class Continuation:
    """A prompt, and how each model goes on from it greedily."""

    prompt: str
    text: str
    dense_text: str | None = None
    """the continuation of the model before pruning"""


@dataclass(frozen=True)
class RightAnswers:
    """How many of some questions a model answers right."""

    questions: int
    accuracy: float
    accuracy_by_byte: float


@dataclass(frozen=True)
class StandardErrors:
    """The standard errors of means over windows, those of differences paired."""

    surprise: float
    """the standard error of the difference of the mean surprise from the dense model's, in nats a prediction"""
    divergence: float
    agreement: float
    windows: int


@dataclass(frozen=True)
class EvaluationReport:
    """A model on a text, and the dense model beside it where there was one."""

    text: str
    seq_length: int
    tokens: int
    windows: int
    perplexity: float | None
    """the perplexity; None where it is beyond the largest number"""
    bits_per_byte: float | None
    against: str | None = None
    """the dense model that it was held against"""
    divergence: float | None = None
    """KL(dense || model) in nats a prediction"""
    agreement: float | None = None
    dense_perplexity: float | None = None
    dense_bits_per_byte: float | None = None
    standard_errors: StandardErrors | None = None
    """how far the means are known; None of a single window, and where earlier versions measured"""
    along: tuple[ContextPart, ...] = ()
    """the same along the context"""
    generations: tuple[Continuation, ...] = ()
    questions: RightAnswers | None = None
    dense_questions: RightAnswers | None = None
    dense_parameters: int | None = None
    dense_bytes: int | None = None
    """the size of the dense model's weights files"""


@dataclass(frozen=True)
class Spread:
    """The median of some repeats and their quartiles."""

    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class SpeedOfModel:
    """How fast and how large one model is; speeds in tokens a second, sizes in bytes."""

    name: str
    prefill: Spread
    decode: Spread
    parameters: int
    peak_bytes: int | None
    file_bytes: int


@dataclass(frozen=True)
class SpeedReport:
    """The speed of a model, and of the one that it took turns with."""

    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    models: tuple[SpeedOfModel, ...]
    """the pruned model, and after it the dense one where there was one"""


def parse_evaluation(data: Mapping[str, Any], where: str) -> EvaluationReport:
    """What `optprune evaluate` found, from the data that it writes; InputError for anything else."""
    return _as(EvaluationReport, data, where, "evaluate")


def read_evaluation(file: Path) -> EvaluationReport:
    """What `optprune evaluate --json` wrote; InputError for anything else."""
    return parse_evaluation(_data(file), str(file))


def read_speed(file: Path) -> SpeedReport:
    """What `optprune benchmark-model --json` wrote; InputError for anything else."""
    speed = _as(SpeedReport, _data(file), str(file), "benchmark-model")
    if len(speed.models) not in (1, 2):
        raise InputError(f"{file} tells of {len(speed.models)} models: one, or two that took turns, are known")
    return speed


def _data(file: Path) -> Any:
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file {file} cannot be read: {one_line(error)}") from error
    data = read_json(text, str(file))
    check_whole_numbers(data, str(file))
    return data


def _as(kind: type[Kind], data: Any, where: str, command: str) -> Kind:
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = one_line(".".join(map(str, first["loc"])))
        raise InputError(
            f"{where} is not what optprune {command} --json writes ({place}: {one_line(first['msg'])}): give its file"
        ) from error


@dataclass(frozen=True)
class HeldOutQuality:
    """The model on the held-out windows."""

    divergence: float | None
    """KL(dense || model) in nats a prediction; None where it is no number"""
    perplexity: float | None


@dataclass(frozen=True)
class HealingReport:
    """What healing did."""

    steps: int
    tokens: int
    """the tokens that were trained on"""
    held_out_tokens: int
    seconds: float
    before: HeldOutQuality
    after: HeldOutQuality
    dense_perplexity: float | None
    zeros: int = 0
    """the weights that were zero and still are"""
    stopped_early: bool = False
    generated_windows: int = 0
    """the windows of the text that the dense model wrote itself"""


def read_healing(folder: str | Path) -> HealingReport | None:
    """What the report.json of a folder says of healing; None where it says nothing of it.

    InputError where it cannot be read, or says something else.
    """
    file = Path(folder) / REPORT
    try:
        data = read_json(file.read_text(encoding="utf-8"), str(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from error
    if not isinstance(data, dict) or "healing" not in data:
        return None
    try:
        return TypeAdapter(HealingReport).validate_python(data["healing"])
    except ValidationError as error:
        first = error.errors()[0]
        place = one_line(".".join(map(str, first["loc"])))
        raise InputError(
            f"the section healing of {file} is not what optprune heal writes ({place}: {one_line(first['msg'])})"
        ) from error
