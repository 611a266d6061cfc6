"""Tables and key figures of the page about a run."""

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from optprune.report.block_values import BlockValues, pattern_of, shares, widths
from optprune.report.phases import BUDGET, METRIC
from optprune.report.progress import duration
from optprune.report.reading import EvaluationReport, HealingReport, SpeedReport
from optprune.report.records import Report
from optprune.report.stored import ModelSummary


@dataclass(frozen=True)
class Table:
    """Rows under a head; the first cell of a row is its name."""

    caption: str
    head: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    texts: tuple[int, ...] = (0,)
    """the columns of text; the others are numbers"""


def phases_table(report: Report) -> Table:
    """Return the time and memory of each phase, with a column of device memory if it was measured."""
    phases = [phase for phase in report.phases if phase.name not in _absent(report)]
    whole = sum(phase.seconds for phase in phases)
    device = any(phase.device_bytes is not None for phase in phases)
    rows: list[tuple[str, ...]] = [
        (
            phase.name,
            time_of(phase.seconds),
            f"{phase.seconds / whole:.1%}" if whole else "",
            _mib(phase.host_bytes),
            *([_mib(phase.device_bytes)] if device else []),
        )
        for phase in phases
    ]
    peaks = [
        _mib(max((size for size in sizes if size is not None), default=None))
        for sizes in zip(*((phase.host_bytes, phase.device_bytes) for phase in phases), strict=True)
    ]
    rows.append(("all", time_of(whole), "100.0%", *peaks[: 1 + device]))
    head = ("phase", "time", "share", "peak memory", *(["peak on the device"] if device else []))
    return Table("Time and largest memory of each phase", head, tuple(rows))


def _absent(report: Report) -> set[str]:
    """Return the phases that the recipe lacks, which every run passes through all the same."""
    allocation = report.recipe.get("allocation")
    kind = allocation.get("kind") if isinstance(allocation, dict) else allocation
    return ({METRIC} if report.recipe.get("metric") == "none" else set()) | ({BUDGET} if kind == "uniform" else set())


def kept_tables(report: Report) -> list[Table]:
    """Return the values of every block before and after pruning."""
    tables = []
    if (kept := widths(report)) and (any(each.changed for each in kept) or not shares(report)):
        tables.append(_by_block("What each block keeps, of its original count", kept, _count))
    if kept := shares(report):
        tables.append(_by_block("Share of the weights that are not zero", kept, lambda was, now: f"{now:.2%}"))
    return tables


def _by_block(caption: str, kept: Sequence[BlockValues], form: Callable[[float, float], str]) -> Table:
    rows = (
        (str(number), *(form(each.before[number], each.after[number]) for each in kept))
        for number in range(len(kept[0].after))
    )
    return Table(caption, ("block", *(each.name for each in kept)), tuple(rows))


def _count(was: float, now: float) -> str:
    return f"{now:,.0f}" if was == now else f"{now:,.0f} of {was:,.0f}"


def removed_table(report: Report) -> Table:
    """Return the sub-blocks that were removed whole, in order."""
    rows = tuple((str(part.block), part.part, f"{part.weights:,}", number(part.score)) for part in report.removed)
    return Table("Sub-blocks removed whole, first to last", ("block", "part", "weights", "score"), rows, (0, 1))


def layers_table(report: Report) -> Table:
    """Return the results of every solved layer."""
    held_out = any(layer.held_out_error is not None for layer in report.layers)
    rows = tuple(
        (
            layer.name,
            f"{layer.kept:,} of {layer.units:,}",
            number(layer.relative_error),
            *([number(layer.held_out_error)] if held_out else []),
            "no bound" if layer.gap is None else percent(layer.gap),
            number(layer.damping),
            time_of(layer.seconds),
            layer.status.replace("_", " ").lower(),
            layer.solver,
        )
        for layer in report.layers
    )
    head = ("layer", "kept", "relative error", *(["held out"] if held_out else []), "gap", "damping", "time")
    texts = (0, len(head), len(head) + 1)
    return Table("Every layer that was solved", (*head, "status", "solver"), rows, texts)


def recovered_table(report: Report) -> Table:
    """Return the errors of the recovered sub-modules."""
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


def along_table(evaluation: EvaluationReport) -> Table:
    """Return the quality of predictions by length of the context."""
    rows = tuple(
        (
            f"{each.first} to {each.last}",
            number(each.perplexity, ".4f"),
            number(each.divergence, ".4f"),
            f"{each.agreement:.1%}",
        )
        for each in evaluation.along
    )
    head = ("tokens in the context", "perplexity", "divergence, nats", "first choice the same")
    return Table("Predictions along the context", head, rows)


def healing_table(healing: HealingReport) -> Table:
    """Return the quality on held-out windows before and after healing, beside the dense model's."""
    states = healing.before, healing.after
    rows = (
        ("divergence, nats a prediction", *(number(state.divergence, ".4f") for state in states), "0"),
        ("perplexity", *(number(state.perplexity, ".2f") for state in states), number(healing.dense_perplexity, ".2f")),
    )
    head = ("", "before healing", "after", "dense model")
    return Table(f"On {healing.held_out_tokens:,} held-out tokens", head, rows)


def recipe_table(report: Report) -> Table:
    """Return every field of the recipe; the name of a field includes its group."""
    return Table("Every field of the recipe", ("field", "value"), tuple(_fields(report.recipe)), (0, 1))


def environment_table(report: Report, dtype: str | None) -> Table:
    """Return the model, the data and the versions of the run."""
    rows = [
        ("model", report.model),
        ("calibration", report.calibration),
        ("tokens", f"{report.tokens:,}"),
        ("seed", str(report.seed)),
        ("dtype of the folder", dtype or ""),
        *report.versions.items(),
    ]
    return Table("Inputs and versions of the run", ("input", "value"), tuple(row for row in rows if row[1]), (0, 1))


def _fields(data: Mapping[str, Any], above: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for key, value in data.items():
        if isinstance(value, dict) and value:
            rows += _fields(value, f"{above}{key}.")
        elif key == "blocks" and isinstance(value, list):
            rows.append((f"{above}{key}", f"{len(value)}, listed in recipe.yaml"))
        else:
            rows.append((f"{above}{key}", value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)))
    return rows


def number(value: float | None, form: str = ".3g") -> str:
    """Return a number as text; a dash for None, NaN and infinity."""
    return "-" if value is None or not math.isfinite(value) else format(value, form)


def time_of(seconds: float) -> str:
    """Return a time in words; a dash if it is not finite."""
    return duration(seconds) if math.isfinite(seconds) else "-"


def percent(share: float) -> str:
    """Return a share in percent with three significant digits."""
    return f"{100 * share:.3g}%" if math.isfinite(share) else "unbounded"


def mib(size: int) -> str:
    """Return a number of bytes in MiB."""
    return f"{size / 2**20:,.1f} MiB"


@dataclass(frozen=True)
class Headline:
    """Key figures of a run and its model, from all measurements that were made."""

    report: Report
    model: ModelSummary | None = None
    evaluation: EvaluationReport | None = None
    speed: SpeedReport | None = None

    @property
    def key_figures(self) -> list[tuple[str, str, str]]:
        """The most important figures: name, figure, and a remark."""
        report, evaluation = self.report, self.evaluation
        found = list[tuple[str, str, str]]()
        if evaluation is not None:
            before = evaluation.dense_perplexity
            small = "" if before is None else f"{number(before, '.2f')} before"
            found.append(("perplexity", number(evaluation.perplexity, ".2f"), small))
            if evaluation.divergence is not None and evaluation.agreement is not None:
                small = f"nats; first choice the same in {evaluation.agreement:.1%}"
                found.append(("divergence", number(evaluation.divergence), small))
        found.append((f"weights {report.lost}", f"{report.sparsity_reached:.2%}", report.requested()))
        if self.speed is not None and len(self.speed.models) == 2:
            now, was = (model.decode.median for model in self.speed.models)
            found.append(("decoding speed", f"{now / was:.2f} times", f"{now:.1f} tokens a second, {was:.1f} before"))
        if self.model is not None:
            found.append(("size of the weights", mib(self.model.bytes), f"{self.model.parameters:,} parameters"))
        took = sum(phase.seconds for phase in report.phases) or report.seconds
        found.append(("time", time_of(took), f"on {report.tokens:,} tokens"))
        return found

    @property
    def table(self) -> Table:
        """The model before and after pruning."""
        rows = (*self._shapes(), *self._sizes(), *self._predictions(), *self._speeds())
        return Table("The model before and after", ("", "before", "after", "change"), rows)

    def _shapes(self) -> Iterator[tuple[str, str, str, str]]:
        blocks = self.report.blocks
        if blocks:
            counts = [sum(bool(shape.parts) for shape in shapes) for shapes in self._before_and_after()]
            yield ("decoder blocks", *_counted(*counts))
        for kept in widths(self.report):
            before, after = (_range(values) for values in (kept.before, kept.after))
            yield (f"{kept.name} in a block", before, after, "")

    def _before_and_after(self) -> tuple[list, list]:
        return [change.before for change in self.report.blocks], [change.after for change in self.report.blocks]

    def _sizes(self) -> Iterator[tuple[str, str, str, str]]:
        model = self.model
        if model is None:
            return
        yield ("linear weights of the blocks", *_counted(model.linear_before or None, model.linear_weights))
        if pattern_of(self.report) is not None and model.linear_before:
            kept = round(model.linear_before * (1 - self.report.sparsity_reached))
            yield ("of them not zero", *_counted(model.linear_before, kept))
        before = self._parameters_before
        yield ("parameters in all", *_counted(before, model.parameters))
        if model.itemsize is not None:
            was, now = None if before is None else before * model.itemsize, model.parameters * model.itemsize
            yield (f"size of the weights in {model.dtype}", _mib(was), mib(now), _change(was, now))
        # Files may have different dtypes, also quantised ones, so their sizes are not compared.
        if (stored := self._bytes_before) is not None:
            yield ("files as they are stored", mib(stored), mib(model.bytes), "")

    @property
    def _parameters_before(self) -> int | None:
        """The parameters of the dense model, from the report or a measurement; None if unknown."""
        if self.report.parameters_before is not None:
            return self.report.parameters_before
        if self.evaluation is not None and self.evaluation.dense_parameters is not None:
            return self.evaluation.dense_parameters
        return self.speed.models[1].parameters if self.speed is not None and len(self.speed.models) == 2 else None

    @property
    def _bytes_before(self) -> int | None:
        """The size of the dense model's files, from a measurement; None if unknown."""
        if self.evaluation is not None and self.evaluation.dense_bytes is not None:
            return self.evaluation.dense_bytes
        return self.speed.models[1].file_bytes if self.speed is not None and len(self.speed.models) == 2 else None

    def _predictions(self) -> Iterator[tuple[str, str, str, str]]:
        found = self.evaluation
        if found is None:
            return
        known = found.standard_errors
        before, after = found.dense_perplexity, found.perplexity
        change = _change(before, after)
        if change and known is not None and before and after is not None:
            change += f" ± {after / before * known.surprise:.1%}"
        yield ("perplexity", number(before, ".4f"), number(after, ".4f"), change)
        before, after = found.dense_bits_per_byte, found.bits_per_byte
        yield ("bits per byte", number(before, ".4f"), number(after, ".4f"), _change(before, after))
        if found.divergence is not None and found.agreement is not None:
            apart, same = ("", "") if known is None else (f" ± {known.divergence:.4f}", f" ± {known.agreement:.1%}")
            yield ("divergence, nats a prediction", "0", f"{number(found.divergence, '.4f')}{apart}", "")
            yield ("first choice the same", "100.0%", f"{found.agreement:.1%}{same}", "")
        if found.questions is not None:
            was = "-" if found.dense_questions is None else f"{found.dense_questions.accuracy:.1%}"
            yield (f"correct of {found.questions.questions} questions", was, f"{found.questions.accuracy:.1%}", "")

    def _speeds(self) -> Iterator[tuple[str, str, str, str]]:
        if self.speed is None:
            return
        after, before = self.speed.models[0], (*self.speed.models, None)[1]
        for name, now, was in (
            ("prefill, tokens a second", after.prefill, before and before.prefill),
            ("decoding, tokens a second", after.decode, before and before.decode),
        ):
            medians = was and was.median, now.median
            yield (name, number(medians[0], ".1f"), number(medians[1], ".1f"), _change(*medians))
        if after.peak_bytes is not None:
            was = before.peak_bytes if before else None
            yield (
                "peak memory",
                "-" if was is None else mib(was),
                mib(after.peak_bytes),
                _change(was, after.peak_bytes),
            )


def _mib(size: int | None) -> str:
    return "-" if size is None else mib(size)


def _counted(before: int | None, after: int) -> tuple[str, str, str]:
    return "-" if before is None else f"{before:,}", f"{after:,}", _change(before, after)


def _change(before: float | None, after: float | None) -> str:
    """Return the change in percent; an empty text without a change, or if a value is unknown."""
    if not before or after is None or before == after:
        return ""
    return f"{after / before - 1:+.1%}"


def _range(values: tuple[float, ...]) -> str:
    """Return the smallest and the largest value of the blocks with any."""
    there = [value for value in values if value] or [0.0]
    return " to ".join(f"{value:,.0f}" for value in dict.fromkeys((min(there), max(there))))
