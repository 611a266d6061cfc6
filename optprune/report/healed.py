"""What healing did to a pruned model, as the section `healing` of its report.json says."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from optprune.errors import InputError
from optprune.report.page_tables import Table, number, time_of
from optprune.report.reading import REPORT
from optprune.system.files import read_json
from optprune.system.wording import one_line


@dataclass(frozen=True)
class State:
    """The model on the held-out windows."""

    divergence: float | None
    """KL(dense || model) in nats a prediction; None where it is no number"""
    perplexity: float | None


@dataclass(frozen=True)
class Healed:
    """What healing did."""

    steps: int
    tokens: int
    """the tokens that were trained on"""
    held_out_tokens: int
    seconds: float
    before: State
    after: State
    dense_perplexity: float | None
    zeros: int = 0
    """the weights that were zero and still are"""
    stopped_early: bool = False
    generated_windows: int = 0
    """the windows of the text that the dense model wrote itself"""

    @property
    def sentence(self) -> str:
        """What was done, in words."""
        early = ", until the divergence fell no further" if self.stopped_early else ""
        zeros = f"all {self.zeros:,} zeros and every width are" if self.zeros else "every width is"
        partly = f", {self.generated_windows:,} windows of which it wrote itself" if self.generated_windows else ""
        return (
            f"After pruning the model was trained to predict what the dense one does: {self.steps:,} steps on "
            f"{self.tokens:,} tokens{partly}, in {time_of(self.seconds)}{early}; {zeros} as pruning left them. Errors "
            "and gaps by layer are those of pruning, before that."
        )

    @property
    def table(self) -> Table:
        """The model before healing and after, on what was held out."""
        rows = (
            ("divergence, nats a prediction", *(number(at.divergence, ".4f") for at in (self.before, self.after)), "0"),
            (
                "perplexity",
                *(number(at.perplexity, ".2f") for at in (self.before, self.after)),
                number(self.dense_perplexity, ".2f"),
            ),
        )
        head = ("", "before healing", "after", "dense model")
        return Table(f"On {self.held_out_tokens:,} held-out tokens", head, rows)


def healed_in(folder: str | Path) -> Healed | None:
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
        return TypeAdapter(Healed).validate_python(data["healing"])
    except ValidationError as error:
        first = error.errors()[0]
        place = one_line(".".join(map(str, first["loc"])))
        raise InputError(
            f"the section healing of {file} is not what optprune heal writes ({place}: {one_line(first['msg'])})"
        ) from error
