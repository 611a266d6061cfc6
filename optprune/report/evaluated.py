"""What was measured of a model, as `optprune evaluate --json` and `optprune benchmark-model --json` write it."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from optprune.errors import InputError
from optprune.report.reading import check_whole_numbers
from optprune.system.files import read_json
from optprune.system.wording import one_line

Kind = TypeVar("Kind")


@dataclass(frozen=True)
class Along:
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
class Evaluated:
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
    along: tuple[Along, ...] = ()
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
class Speed:
    """The speed of a model, and of the one that it took turns with."""

    device: str
    dtype: str
    prompt_tokens: int
    new_tokens: int
    batch: int
    repeats: int
    models: tuple[SpeedOfModel, ...]
    """the pruned model, and after it the dense one where there was one"""


def evaluation_in(data: Mapping[str, Any], where: str) -> Evaluated:
    """What `optprune evaluate` found, from the data that it writes; InputError for anything else."""
    return _as(Evaluated, data, where, "evaluate")


def read_evaluation(file: Path) -> Evaluated:
    """What `optprune evaluate --json` wrote; InputError for anything else."""
    return evaluation_in(_data(file), str(file))


def read_speed(file: Path) -> Speed:
    """What `optprune benchmark-model --json` wrote; InputError for anything else."""
    speed = _as(Speed, _data(file), str(file), "benchmark-model")
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
