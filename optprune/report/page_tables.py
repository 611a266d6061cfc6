"""The tables of a page about a run: rows of words, made from a report and from what was measured beside it."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optprune.report.by_block import Kept, shares, widths
from optprune.report.evaluated import Evaluated
from optprune.report.progress import duration
from optprune.report.records import Report


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its name, and all but `texts` of the columns are numbers."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = (0,)
    """the columns that hold words"""


def phases_table(report: Report) -> Table:
    """What each phase took; a column of a device's memory where one was told."""
    whole = sum(phase.seconds for phase in report.phases)
    device = any(phase.device_bytes is not None for phase in report.phases)
    rows: list[tuple[str, ...]] = [
        (
            phase.name,
            time_of(phase.seconds),
            f"{phase.seconds / whole:.1%}" if whole else "",
            _size(phase.host_bytes),
            *([_size(phase.device_bytes)] if device else []),
        )
        for phase in report.phases
    ]
    peaks = [
        _size(max((size for size in sizes if size is not None), default=None))
        for sizes in zip(*((phase.host_bytes, phase.device_bytes) for phase in report.phases), strict=True)
    ]
    rows.append(("all", time_of(whole), "100.0%", *peaks[: 1 + device]))
    head = ("phase", "time", "share", "peak memory", *(["peak on the device"] if device else []))
    return Table("Time and largest memory of each phase", head, tuple(rows))


def kept_tables(report: Report) -> list[Table]:
    """What every block keeps, and what it had."""
    tables = []
    if (kept := widths(report)) and (any(each.changed for each in kept) or not shares(report)):
        tables.append(_by_block("What each block keeps, of what it had", kept, _count_of))
    if kept := shares(report):
        tables.append(_by_block("Share of the weights that are not zero", kept, lambda was, now: f"{now:.2%}"))
    return tables


def _by_block(caption: str, kept: Sequence[Kept], told: Any) -> Table:
    rows = (
        (str(number), *(told(each.before[number], each.after[number]) for each in kept))
        for number in range(len(kept[0].after))
    )
    return Table(caption, ("block", *(each.name for each in kept)), tuple(rows))


def _count_of(was: float, now: float) -> str:
    return f"{now:,.0f}" if was == now else f"{now:,.0f} of {was:,.0f}"


def removed_table(report: Report) -> Table:
    """The sub-blocks that were removed whole, in their order."""
    rows = tuple((str(part.block), part.part, f"{part.weights:,}", number(part.score)) for part in report.removed)
    return Table("Sub-blocks removed whole, first to last", ("block", "part", "weights", "score"), rows, (0, 1))


def layers_table(report: Report) -> Table:
    """Every layer that was solved."""
    held = any(layer.held_out_error is not None for layer in report.layers)
    rows = tuple(
        (
            layer.name,
            f"{layer.kept:,} of {layer.units:,}",
            number(layer.relative_error),
            *([number(layer.held_out_error)] if held else []),
            "no bound" if layer.gap is None else percent(layer.gap),
            number(layer.damping),
            time_of(layer.seconds),
            layer.status.replace("_", " ").lower(),
            layer.solver,
        )
        for layer in report.layers
    )
    head = ("layer", "kept", "relative error", *(["held out"] if held else []), "gap", "damping", "time")
    texts = (0, len(head), len(head) + 1)
    return Table("Every layer that was solved", (*head, "status", "solver"), rows, texts)


def recovered_table(report: Report) -> Table:
    """The sub-modules that were refitted."""
    rows = tuple(
        (
            part.name,
            number(part.error_before),
            number(part.error_after),
            number(part.held_out_before),
            number(part.held_out_after),
            str(part.steps),
            time_of(part.seconds),
        )
        for part in report.recovered
    )
    head = ("sub-module", "error before", "after", "held out before", "after", "steps", "time")
    return Table("Relative error of the outputs of sub-modules, before and after recovery", head, rows)


def along_table(evaluation: Evaluated) -> Table:
    """What grows along the context."""
    rows = tuple(
        (
            f"{each.first} to {each.last}",
            number(each.perplexity, ".4f"),
            number(each.divergence, ".4f"),
            f"{each.agreement:.1%}",
        )
        for each in evaluation.along
    )
    head = ("tokens seen", "perplexity", "divergence, nats", "first choice the same")
    return Table("Predictions along the context", head, rows)


def recipe_table(report: Report) -> Table:
    """Every field of the recipe; those of a group are named with it."""
    return Table("Every field of the recipe", ("field", "value"), tuple(_fields(report.recipe)), (0, 1))


def environment_table(report: Report, dtype: str | None) -> Table:
    """What the run was made with."""
    rows = [
        ("model", report.model),
        ("calibration", report.calibration),
        ("tokens", f"{report.tokens:,}"),
        ("seed", str(report.seed)),
        ("dtype of the folder", dtype or ""),
        *report.versions.items(),
    ]
    return Table("What it was made from and with", ("what", "value"), tuple(row for row in rows if row[1]), (0, 1))


def _fields(data: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            rows += _fields(value, f"{above}{key}.")
        elif key == "blocks" and isinstance(value, list):
            rows.append((f"{above}{key}", f"{len(value)}, each as recipe.yaml says"))
        else:
            rows.append((f"{above}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def number(value: float | None, form: str = ".3g") -> str:
    """A number in words; one that is not known, or none, is a dash."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def time_of(seconds: float) -> str:
    """A time in words; one that is not known is a dash."""
    return duration(seconds) if math.isfinite(seconds) else "-"


def percent(share: float) -> str:
    """A share in percent with three digits, however small it is."""
    return f"{100 * share:.3g}%" if math.isfinite(share) else "unbounded"


def _size(size: int | None) -> str:
    return "-" if size is None else mib(size)


def mib(size: int) -> str:
    """A number of bytes in MiB."""
    return f"{size / 2**20:,.1f} MiB"
