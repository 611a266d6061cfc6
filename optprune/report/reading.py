"""Readers of report.json and of the JSON files of `optprune evaluate` and `optprune benchmark-model`."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_args

from pydantic import TypeAdapter, ValidationError

from optprune.errors import InputError
from optprune.measure import Answers, StandardErrors
from optprune.report.records import LayerReport, RecoveredPart, RemovedPart, Report
from optprune.system.files import read_json
from optprune.system.wording import one_line, shown

REPORT, PAGE = "report.json", "report.html"
"""the files of a report in a folder: figures and page"""
INTEGER_LIMIT = 2**64
"""the bound of the integers in a report"""
ROWS = {"layers": LayerReport, "recovered": RecoveredPart, "removed": RemovedPart}
"""the lists of a report with records that may hold NaN or infinity"""


def read_report(folder: str | Path) -> Report:
    """Return the report in a folder that a run wrote; InputError where it is missing or not a report."""
    file, advice = Path(folder) / REPORT, "give a folder that optprune prune wrote"
    if not file.is_file():
        raise InputError(f"the folder {folder} has no {REPORT}: {advice}")
    return _as(Report, _restore_nan(_data(file)), f"{file} is not the report of a run", advice)


def read_run_report(folder: str | Path) -> Report | None:
    """Return the report of the run that a folder is from; None where it has none, or one of healing alone.

    InputError where it cannot be read.
    """
    file = Path(folder) / REPORT
    if not file.is_file():
        return None
    data = _data(file)
    return None if isinstance(data, dict) and data.keys() == {"healing"} else read_report(folder)


def check_whole_numbers(data: Any, where: str) -> None:
    """Raise InputError where plain data hold an integer beyond 64 bits."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) >= INTEGER_LIMIT:
            raise InputError(
                f"{where} holds the number {shown(value)}, which is beyond 64 bits: give the file as written"
            )


def _restore_nan(data: Any) -> Any:
    """Return the data with NaN for null where a float belongs: JSON has no NaN or infinity, so null was written."""
    if not isinstance(data, dict):
        return data
    filled = dict(data)
    for name, kind in ROWS.items():
        if isinstance(rows := filled.get(name), list):
            filled[name] = [_filled(row, kind) if isinstance(row, dict) else row for row in rows]
    return _filled(filled, Report)


def _filled(row: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """Return a row with NaN for null floats, and null for optional fields that earlier versions did not write."""
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
    """Quality of the predictions with a context of `first` to `last` tokens."""

    first: int
    last: int
    perplexity: float | None
    divergence: float | None
    agreement: float


@dataclass(frozen=True)
class Continuation:
    """A prompt, and its greedy continuation by each model."""

    prompt: str
    text: str
    dense_text: str | None = None
    """the continuation by the dense model"""


@dataclass(frozen=True)
class EvaluationReport:
    """Quality of a model on a text, and that of the dense model if it was measured."""

    text: str
    seq_length: int
    tokens: int
    windows: int
    perplexity: float | None
    """the perplexity; None where it is infinite"""
    bits_per_byte: float | None
    model: str = ""
    """the name of the model"""
    weights: str = ""
    """a digest of its weights files; empty where the model was just measured, and in files of earlier versions"""
    against: str | None = None
    """the name of the dense model"""
    divergence: float | None = None
    """KL(dense || model) in nats a prediction"""
    agreement: float | None = None
    dense_perplexity: float | None = None
    dense_bits_per_byte: float | None = None
    standard_errors: StandardErrors | None = None
    """None for a single window, and in files of earlier versions"""
    along: tuple[ContextPart, ...] = ()
    """the same figures by length of the context"""
    generations: tuple[Continuation, ...] = ()
    questions: Answers | None = None
    dense_questions: Answers | None = None
    dense_parameters: int | None = None
    dense_bytes: int | None = None
    """the size of the dense model's weights files"""
    begin: str = ""
    """the tokens that each window begins with, instead of its own first tokens"""


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of repeated measurements."""

    median: float
    quartiles: tuple[float, float]


@dataclass(frozen=True)
class SpeedOfModel:
    """Speed of a model in tokens a second, and its sizes in bytes."""

    name: str
    prefill: Spread
    decode: Spread
    parameters: int
    peak_bytes: int | None
    file_bytes: int
    weights: str = ""
    """a digest of its weights files; empty in files of earlier versions"""


@dataclass(frozen=True)
class SpeedReport:
    """Speed of a model, and of the dense model if both were measured in turn."""

    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    models: tuple[SpeedOfModel, ...]
    """the pruned model, and after it the dense one if it was measured"""


def parse_evaluation(data: Mapping[str, Any], where: str) -> EvaluationReport:
    """Return an evaluation from the data that `optprune evaluate` writes; InputError for other data."""
    return _as(EvaluationReport, data, f"{where} is not what optprune evaluate --json writes", "give its file")


def read_evaluation(file: Path) -> EvaluationReport:
    """Return the evaluation in a file of `optprune evaluate --json`; InputError for other files."""
    return parse_evaluation(_data(file), str(file))


def read_speed(file: Path) -> SpeedReport:
    """Return the speed in a file of `optprune benchmark-model --json`; InputError for other files."""
    problem = f"{file} is not what optprune benchmark-model --json writes"
    speed = _as(SpeedReport, _data(file), problem, "give its file")
    if len(speed.models) not in (1, 2):
        raise InputError(
            f"{file} has {len(speed.models)} models: give a file with one model, or with two that were compared"
        )
    return speed


def _data(file: Path) -> Any:
    """Return the plain data in a JSON file; InputError where it cannot be read or holds an integer beyond 64 bits."""
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the file {file} cannot be read: {one_line(error)}") from error
    data = read_json(text, str(file))
    check_whole_numbers(data, str(file))
    return data


def _as(kind: type[Kind], data: Any, problem: str, advice: str) -> Kind:
    """Return plain data as an object; InputError of the problem, the first wrong field and the advice."""
    try:
        return TypeAdapter(kind).validate_python(data)
    except ValidationError as error:
        first = error.errors()[0]
        reason = ": ".join(filter(None, (".".join(map(str, first["loc"])), first["msg"])))
        raise InputError(f"{problem} ({one_line(reason)}): {advice}") from error


@dataclass(frozen=True)
class HeldOutQuality:
    """Quality of a model on the held-out windows."""

    divergence: float | None
    """KL(dense || model) in nats a prediction; None where it is not finite"""
    perplexity: float | None


@dataclass(frozen=True)
class HealingReport:
    """Result of healing a pruned model, as written by `optprune heal`."""

    steps: int
    tokens: int
    """the number of training tokens"""
    held_out_tokens: int
    seconds: float
    before: HeldOutQuality
    after: HeldOutQuality
    dense_perplexity: float | None
    zeros: int = 0
    """the number of weights that were zero and still are"""
    stopped_early: bool = False
    generated_windows: int = 0
    """the number of training windows that the dense model generated"""


def read_healing(folder: str | Path) -> HealingReport | None:
    """Return the section `healing` of a folder's report.json; None where there is none.

    InputError where the file cannot be read, or the section has another form.
    """
    file = Path(folder) / REPORT
    data = _data(file)
    if not isinstance(data, dict) or "healing" not in data:
        return None
    problem = f"the section healing of {file} is not what optprune heal writes"
    return _as(HealingReport, data["healing"], problem, "give a folder that it wrote")
