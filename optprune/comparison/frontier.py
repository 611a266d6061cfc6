"""Frontier of size and quality: a dense model in fewer bits, pruned models, and both together, with the verdict."""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from statistics import median
from typing import Any

from optprune.report.frontier_picture import Mark, frontier_svg
from optprune.report.simple_page import Continuation, Said, SimplePage
from optprune.system.files import json_text

DENSE = "dense"
FULL = "f16"
"""the type that quantised ones are compared with"""
SAME_SIZE = 1.002
"""ratio of sizes up to which files count as equally large"""
MIB = 2**20


@dataclass(frozen=True)
class Speed:
    """Speed and memory of a model in a runtime."""

    prefill: tuple[float, ...]
    """prompt tokens a second, of each repeat"""
    decode: tuple[float, ...]
    """new tokens a second, of each repeat"""
    peak_bytes: int | None
    """peak of memory with the model, None if unknown"""


@dataclass(frozen=True)
class FrontierRow:
    """One model in one type: its size, its quality, and where it was measured its speed."""

    model: str
    """DENSE, or the name of a pruned model"""
    kind: str
    """type of the matrices, such as q4_K"""
    importance: bool
    """whether rounding errors counted by the inputs of the layers"""
    bytes: int
    """size of the file, or of the weights' files"""
    bits_per_byte: float
    perplexity: float
    """for each token of the model's own vocabulary"""
    divergence: float | None
    """KL(dense || this), in nats a prediction; None where the vocabularies differ"""
    agreement: float | None
    """share of predictions with the dense model's first choice; None where the vocabularies differ"""
    notes: tuple[str, ...] = ()
    texts: tuple[str, ...] = ()
    """greedy continuations of the prompts"""
    speed: Speed | None = None

    @property
    def is_dense(self) -> bool:
        """Whether nothing is pruned."""
        return self.model == DENSE

    @property
    def name(self) -> str:
        """A name for tables and files."""
        return name_of(self.model, self.kind, self.importance)

    def __str__(self) -> str:
        return f"{self.model} in {self.kind}{' by importance' if self.importance else ''}"

    def dominates(self, other: "FrontierRow") -> bool:
        """Return whether this is no larger and no worse than another row, and better in one of both.

        Sizes count as equal within a fifth of a percent: an importance adds its name to the metadata of a file.
        """
        if self.bytes > SAME_SIZE * other.bytes or self.bits_per_byte > other.bits_per_byte:
            return False
        return self.bits_per_byte < other.bits_per_byte or self.bytes * SAME_SIZE < other.bytes


@dataclass(frozen=True)
class Pair:
    """A pruned row beside the dense rows that are next to it in size."""

    pruned: FrontierRow
    smaller: FrontierRow
    """the next dense row that is no larger"""
    larger: FrontierRow | None
    """the next dense row that is larger, None where there is none"""

    @property
    def expected(self) -> float:
        """The bits per byte of the dense model at this size, on the straight line between the two rows.

        A file between two types has some of its matrices in one and the rest in the other, so that a pruned row does
        not win where it only lies in a gap between types.
        """
        if self.larger is None:
            return self.smaller.bits_per_byte
        share = (self.pruned.bytes - self.smaller.bytes) / (self.larger.bytes - self.smaller.bytes)
        rise = self.larger.bits_per_byte - self.smaller.bits_per_byte
        return self.smaller.bits_per_byte + max(share, 0.0) * rise

    @property
    def excess(self) -> float:
        """The bits per byte of the pruned row over those of the dense model, as a share; negative where it wins."""
        return self.pruned.bits_per_byte / self.expected - 1

    def __str__(self) -> str:
        if self.larger is None:
            return f"{self.expected:.4f} ({self.smaller}, {_mib(self.smaller)} MiB)"
        both = f"{self.smaller}, {_mib(self.smaller)} MiB, and {self.larger}, {_mib(self.larger)} MiB"
        return f"{self.expected:.4f} (on the line between {both})"


@dataclass(frozen=True)
class Frontier:
    """Result of `frontier`; printed as the verdict and a table."""

    model: str
    rows: tuple[FrontierRow, ...]
    options: dict[str, Any] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    """beginnings of the continuations"""
    failures: tuple[str, ...] = ()
    """a sentence for each pruned model that could not be made"""

    def dominated(self, row: FrontierRow) -> bool:
        """Return whether another row is no larger and no worse, and better in one of both."""
        return any(other.dominates(row) for other in self.rows)

    def best_dense(self) -> list[FrontierRow]:
        """Return the dense rows that no other dense row dominates."""
        every = [row for row in self.rows if row.is_dense]
        return [row for row in every if not any(other.dominates(row) for other in every)]

    def pairs(self) -> list[Pair]:
        """Return each pruned row beside the dense rows next to it in size, unless it is smaller than all of them.

        Dense rows that another dense row dominates are left out.
        """
        dense = self.best_dense()
        found = list[Pair]()
        for row in self.rows:
            smaller = [one for one in dense if one.bytes <= SAME_SIZE * row.bytes]
            larger = [one for one in dense if one.bytes > SAME_SIZE * row.bytes]
            if not row.is_dense and smaller:
                above = min(larger, key=lambda one: one.bytes, default=None)
                found.append(Pair(row, max(smaller, key=lambda one: one.bytes), above))
        return found

    def verdict(self) -> str:
        """Return in sentences whether the given models pay beside fewer bits, and where, as far as the rows show it."""
        dense = self.best_dense()
        pruned = [row for row in self.rows if not row.is_dense]
        if not dense or not pruned:
            return "There is nothing to compare: the frontier needs dense rows and pruned ones."
        return " ".join(sentence for sentence in (self._at_equal_size(), self._below(dense, pruned)) if sentence)

    def _at_equal_size(self) -> str:
        pairs = self.pairs()
        if not pairs:
            return ""
        best = min(pairs, key=lambda pair: pair.excess)
        at = f"{best.pruned} at {_mib(best.pruned)} MiB has {best.pruned.bits_per_byte:.4f} bits per byte"
        if best.excess < 0:
            won = sum(pair.excess < 0 for pair in pairs)
            return (
                f"It pays: {won} of {len(pairs)} files of the given models are better than the dense model in as many "
                f"bytes. {at}, the dense model {best}, {-best.excess:.1%} fewer for the given one."
            )
        return (
            f"It does not pay here: in as many bytes the dense model in fewer bits is better. Closest, {at}, the "
            f"dense model {best}, {best.excess:.1%} more for the given one."
        )

    def _below(self, dense: Sequence[FrontierRow], pruned: Sequence[FrontierRow]) -> str:
        """Return a sentence on pruned files that are smaller than every dense one."""
        least = min(dense, key=lambda row: row.bytes)
        smaller = [row for row in pruned if row.bytes * SAME_SIZE < least.bytes]
        if not smaller:
            return ""
        best = min(smaller, key=lambda row: row.bits_per_byte)
        return (
            f"Below {_mib(least)} MiB, the size of {least} ({least.bits_per_byte:.4f}), only pruned files are left; "
            f"the best is {best}, with {best.bits_per_byte:.4f} at {_mib(best)} MiB."
        )

    def markdown(self) -> str:
        """Return the verdict, the table and how it was measured, as Markdown."""
        head, *body = self._cells()
        lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in body)]
        notes = [f"- {sentence}" for sentence in self._sentences()]
        return "\n".join([f"# {self.model}", "", self.verdict(), "", *lines, "", *notes]) + "\n"

    def to_json(self) -> str:
        """Return all rows and the verdict as JSON."""
        rows = [{**asdict(row), "dominated": self.dominated(row)} for row in self.rows]
        content = {"model": self.model, "verdict": self.verdict(), "options": self.options, "rows": rows}
        return json_text({**content, "prompts": self.prompts, "failures": self.failures})

    def page(self) -> str:
        """Return the page as HTML, in one file without scripts."""
        head, *body = self._cells()
        picture = frontier_svg(self.marks(), f"{self.model}: size and bits per byte")
        return SimplePage(
            title=f"{self.model}: fewer weights or fewer bits",
            lead=self.verdict(),
            pictures=() if picture is None else ((picture, "Grey: another file is no larger and no worse."),),
            caption="All files, by size",
            head=tuple(head),
            rows=tuple(map(tuple, body)),
            sentences=tuple(self._sentences()),
            said=tuple(self._said()),
        ).html()

    def __str__(self) -> str:
        table = self._cells()
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, *self._sentences(), self.verdict()])

    def marks(self) -> list[Mark]:
        """Return the points of the picture."""
        return [
            Mark(row.bytes / MIB, row.bits_per_byte, str(row), dense=row.is_dense, dominated=self.dominated(row))
            for row in self.rows
        ]

    def _cells(self) -> list[list[str]]:
        columns = ["model", "type", "imatrix", "MiB", "bits per byte", "divergence, nats", "same first choice"]
        timed = any(row.speed for row in self.rows)
        table = [
            [*columns, *(("prefill, tokens/s", "decoding, tokens/s", "memory, MiB") if timed else ()), "dominated"]
        ]
        for row in sorted(self.rows, key=lambda row: -row.bytes):
            apart = "" if row.divergence is None else f"{row.divergence:.4f}"
            same = "" if row.agreement is None else f"{row.agreement:.1%}"
            imatrix, dominated = ("yes" if each else "" for each in (row.importance, self.dominated(row)))
            cells = [row.model, row.kind, imatrix, _mib(row), f"{row.bits_per_byte:.4f}", apart, same]
            table.append([*cells, *(_speed_cells(row.speed) if timed else ()), dominated])
        return table

    def _sentences(self) -> Iterator[str]:
        options = self.options
        if options:
            yield (
                f"Quality on {options['the evaluation text']}, {options['the windows evaluated']} windows of "
                f"{options['the length of a window']} tokens: {options['how quality is measured']}"
            )
            if options.get("how speed is measured"):
                yield f"Speed: {options['how speed is measured']}"
            if options.get("the calibration text"):
                yield f"Calibrated on {options['the calibration text']}, {options['the samples']} windows"
            yield f"Machine: {options['the machine']['device']}, {options['the machine']['threads']} threads"
        yield from (f"Failed: {sentence}" for sentence in self.failures)
        for row in self.rows:
            yield from (f"{row}: {note}" for note in row.notes)

    def _said(self) -> Iterator[Said]:
        """Yield each prompt with the continuations of the rows that are not dominated."""
        first = next((row for row in self.rows if row.is_dense and row.kind == FULL), None)
        if first is None or not first.texts:
            return
        kept = [row for row in self.rows if row is not first and row.texts and not self.dominated(row)]
        for number, prompt in enumerate(self.prompts):
            reference = first.texts[number]
            others = (Continuation.beside(str(row), row.texts[number], reference) for row in kept)
            yield Said(prompt, (Continuation(str(first), "", reference), *others))


def name_of(model: str, kind: str, importance: bool) -> str:
    """Return the name of a row, for tables and files."""
    return f"{model}-{kind.replace(' ', '-')}{'-imatrix' if importance else ''}"


def with_speeds(rows: Sequence[FrontierRow], speeds: dict[str, Speed]) -> tuple[FrontierRow, ...]:
    """Return the rows with their speeds, by their names."""
    return tuple(replace(row, speed=speeds.get(row.name)) for row in rows)


def _speed_cells(speed: Speed | None) -> tuple[str, str, str]:
    if speed is None:
        return "", "", ""
    memory = "" if speed.peak_bytes is None else f"{speed.peak_bytes / MIB:.0f}"
    return f"{median(speed.prefill):.0f}", f"{median(speed.decode):.1f}", memory


def _mib(row: FrontierRow) -> str:
    return f"{row.bytes / MIB:.1f}"
