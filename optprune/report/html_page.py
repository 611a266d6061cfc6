"""Page about a run: report.html, a single file without scripts."""

import re
import shlex
import statistics
from collections.abc import Mapping
from importlib.resources import files
from pathlib import PurePath
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from optprune.models.sources import DEMO, DEMO_NAME
from optprune.report.block_values import pattern_of, shares, widths
from optprune.report.drawings import can_draw, pictures
from optprune.report.page_tables import (
    Headline,
    Table,
    along_table,
    environment_table,
    healing_table,
    kept_tables,
    layers_table,
    number,
    percent,
    phases_table,
    recipe_table,
    recovered_table,
    removed_table,
    time_of,
)
from optprune.report.reading import EvaluationReport, HealingReport, SpeedReport
from optprune.report.records import Report
from optprune.report.stored import ModelSummary, loading_code
from optprune.system.wording import counted, install, one_line

NOT_ALLOWED = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff]")
"""the characters that HTML does not allow"""
DIGITS = 12
"""number of digits of a digest on the page"""


def page(
    report: Report,
    *,
    model: ModelSummary | None = None,
    evaluation: EvaluationReport | None = None,
    speed: SpeedReport | None = None,
    healing: HealingReport | None = None,
    drawn: Mapping[str, str] | None = None,
    folder: str = ".",
) -> str:
    """Return the page about a run as HTML without scripts and external files; equal figures give equal bytes.

    It shows the saved `model`, the `evaluation`, the `speed` and the `healing` where they are given. `drawn` are
    pictures that were made before; without matplotlib, tables replace pictures. Commands name the `folder`.
    """
    found = pictures(report, evaluation) if drawn is None else drawn
    template = page_environment().from_string(page_text("page.html"))
    return template.render(
        **_texts(report, model, evaluation, speed),
        commands=_commands(report, evaluation, speed, folder),
        sections=_sections(report, evaluation, healing),
        **_tables(report, model, evaluation),
        report=report,
        headline=Headline(report, model, evaluation, speed),
        evaluation=evaluation,
        healing=None if healing is None else {"sentence": _healing(healing), "table": healing_table(healing)},
        style=Markup(page_text("page.css")),
        pictures={name: Markup(svg) for name, svg in found.items()},
        drawn_kept={"widths", "shares"} & found.keys(),
        undrawn=install("plot") if drawn is None and not can_draw() else None,
    )


def page_environment() -> Environment:
    """Return the settings of templates: everything is escaped, and nothing undefined is left out."""
    return Environment(
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        finalize=_cleaned,
    )


def _cleaned(value: Any) -> Any:
    """Return a text with a replacement for each character that HTML does not allow."""
    return NOT_ALLOWED.sub("\ufffd", value) if type(value) is str else value


def page_text(name: str) -> str:
    """Return a file of this package, such as a template."""
    return (files("optprune.report") / name).read_text(encoding="utf-8")


def _tables(report: Report, model: ModelSummary | None, evaluation: EvaluationReport | None) -> dict[str, Any]:
    notes = [(layer.name, "; ".join(layer.notes)) for layer in report.layers if layer.notes]
    return {
        "phases": phases_table(report) if report.phases else None,
        "kept": kept_tables(report),
        "removed": removed_table(report),
        "layers": layers_table(report),
        "recovered": recovered_table(report),
        "along": along_table(evaluation) if evaluation is not None else None,
        "recipe": recipe_table(report),
        "environment": environment_table(report, None if model is None else model.dtype),
        "layer_notes": notes,
        "notes_table": Table("Notes by layer", ("layer", "notes"), tuple(notes), (0, 1)),
    }


def _texts(
    report: Report, model: ModelSummary | None, evaluation: EvaluationReport | None, speed: SpeedReport | None
) -> dict[str, Any]:
    recipe = one_line(report.recipe.get("name", "custom"))
    source = DEMO_NAME if report.model == DEMO else report.model
    name = one_line(PurePath(source).name or source)
    return {
        "title": f"{name}, pruned by {recipe}",
        "lead": f"{report.sparsity_reached:.2%} of the linear weights of its decoder blocks are {report.lost} "
        f"({report.requested()}), by optprune {report.versions.get('optprune', '')}".strip()
        + "."
        + "".join(f" {said.in_words()}." for said in (report.vocabulary, report.goal) if said is not None),
        "summary": " ".join(
            f"{one_line(text).rstrip('.')}." for key in ("summary", "source") if (text := report.recipe.get(key))
        ),
        "measured": _measured(report, speed),
        "floor": f"The two calibration passes with their Gram products, which every run needs, took "
        f"{time_of(report.floor_seconds)}.",
        "kept_sentence": _kept(report),
        "error_sentence": _errors(report),
        "gap_sentence": _gaps(report),
        "damping": _damping(report),
        "statuses": _statuses(report),
        "evaluated_on": "" if evaluation is None else _evaluated_on(evaluation),
        "code": None if model is None else loading_code(model),
        "load_sentence": _load(model),
    }


def _sections(
    report: Report, evaluation: EvaluationReport | None, healing: HealingReport | None
) -> list[tuple[str, str]]:
    there = {
        ("figures", "Before and after"): True,
        ("healing", "Healing"): healing is not None,
        ("time", "Time"): bool(report.phases),
        ("kept", "Blocks"): bool(report.blocks or shares(report)),
        ("layers", "Layers"): bool(report.layers),
        ("notes", "Notes"): True,
        ("predictions", "Predictions"): evaluation is not None,
        ("generations", "Continuations"): evaluation is not None and bool(evaluation.generations),
        ("recipe", "Recipe"): True,
        ("environment", "Environment"): True,
        ("load", "Load"): True,
    }
    return [section for section, is_there in there.items() if is_there]


def _commands(
    report: Report, evaluation: EvaluationReport | None, speed: SpeedReport | None, folder: str
) -> list[tuple[str, tuple[str, ...]]]:
    """Return a sentence with commands, in the names of this run, for each measurement that is missing."""
    where, dense = shlex.quote(folder), shlex.quote(report.model)
    text = "demo:evaluation" if report.calibration.startswith("demo:") else "heldout.txt"
    against = f"--against {dense} " if report.model else ""
    found = list[tuple[str, tuple[str, ...]]]()
    if evaluation is None:
        words = "Perplexity and divergence are not measured during pruning. This adds them, with continuations:"
        found.append((words, (f"optprune report {where} {against}--text {text}",)))
    elif evaluation.divergence is None:
        words = "Divergence and continuations are not measured. This adds them:"
        found.append((words, (f"optprune report {where} {against}--text {text}",)))
    if speed is None:
        measure = f"optprune benchmark-model {where} {against}--json speed.json"
        found.append(
            ("Speed was not measured. This adds it:", (measure, f"optprune report {where} --speed speed.json"))
        )
    return found


def _measured(report: Report, speed: SpeedReport | None) -> list[str]:
    """Return sentences about the conditions of measurements."""
    sentences = []
    if speed is not None:
        models = " beside ".join(_named(one.name, one.weights) for one in speed.models)
        sentences.append(
            f"Speed of {models} on {speed.device} in {speed.dtype}: batch {speed.batch}, prompts of "
            f"{speed.prompt_tokens} tokens, {speed.new_tokens} new ones, medians of {speed.repeats} repeats."
        )
    if (pattern := pattern_of(report)) is not None:
        sentences.append(
            "Zeros alone make a folder neither smaller nor faster: speed needs a runtime with a kernel for the pattern "
            f"{pattern}."
        )
    return sentences


def _kept(report: Report) -> str:
    """Return a sentence about the change of the blocks, with the range of the values."""
    changed = [each for each in widths(report) if each.changed]
    sentences = []
    for each in changed:
        pairs = {(was, now) for was, now in zip(each.before, each.after, strict=True) if now}
        empty = sum(bool(was) and not now for was, now in zip(each.before, each.after, strict=True))
        least, most = (pick((now for _, now in pairs), default=0) for pick in (min, max))
        if len(pairs) == 1 and not empty:
            ((was, now),) = pairs
            sentences.append(
                f"{now:,.0f} of {was:,.0f} {each.name} in every block{'' if all(each.before) else ' that has some'}"
            )
        else:
            tail = f", none in {counted(empty, 'block')}" if empty else ""
            sentences.append(f"{least:,.0f} to {most:,.0f} {each.name} (of {max(each.before):,.0f}){tail}")
    pattern = pattern_of(report)
    if pattern is not None:
        every = [share for each in shares(report) for share in each.after] or [1.0]
        stay = " to ".join(dict.fromkeys(f"{share:.2%}" for share in (min(every), max(every))))
        sentences.append(f"{stay} of the weights of a layer are not zero, in the pattern {pattern}")
    unchanged = [each.name for each in widths(report) if not each.changed]
    sentence = "; ".join(sentences) or "No block changed its shape"
    if sentences and unchanged and pattern is None:
        sentence += f"; all {' and '.join(unchanged)} are kept"
    return f"{sentence[0].upper()}{sentence[1:]}."


def _errors(report: Report) -> str:
    errors = [layer.relative_error for layer in report.layers]
    apart = [layer.held_out_error for layer in report.layers if layer.held_out_error is not None]
    if not errors:
        return ""
    worst = max(report.layers, key=lambda layer: layer.relative_error)
    when = " before recovery" if report.recovered else ""
    held_out = f" On held-out tokens the mean is {number(statistics.fmean(apart))}." if apart else ""
    return (
        f"The mean relative error of {counted(len(errors), 'layer')}{when} is {number(statistics.fmean(errors))}, the "
        f"largest {number(worst.relative_error)} ({worst.name}).{held_out}"
    )


def _gaps(report: Report) -> str:
    gaps = [layer.gap for layer in report.layers if layer.gap is not None]
    if not gaps:
        return "No layer has a proved bound: the solvers give no bound on the distance to the optimum."
    return (
        f"{len(gaps)} of {counted(len(report.layers), 'layer')} have a proved bound: their objectives are within "
        f"{percent(max(gaps))} of the optimum, half of them within {percent(statistics.median(gaps))}."
    )


def _damping(report: Report) -> str:
    ridges = [layer.damping for layer in report.layers]
    dead = sum(layer.dead_inputs for layer in report.layers)
    if not ridges:
        return ""
    span = " to ".join(dict.fromkeys((number(min(ridges)), number(max(ridges)))))
    zero = (
        f" {counted(dead, 'input of layers was', 'inputs of layers were')} zero on every calibration token."
        if dead
        else ""
    )
    return f"Damping added to the diagonals of the Gram matrices: {span}, by layer.{zero}"


def _healing(healing: HealingReport) -> str:
    early = ", until held-out windows got no better" if healing.stopped_early else ""
    zeros = f"all {healing.zeros:,} zeros and all widths are" if healing.zeros else "all widths are"
    generated = f", {healing.generated_windows:,} windows of them generated by the dense model"
    partly = generated if healing.generated_windows else ""
    return (
        f"After pruning the model was trained to the predictions of the dense one: {healing.steps:,} steps on "
        f"{healing.tokens:,} tokens{partly}, in {time_of(healing.seconds)}{early}; {zeros} unchanged. Errors "
        "and gaps by layer are those before healing."
    )


def _statuses(report: Report) -> list[str]:
    """Return the number of layers for each status other than converged."""
    found: dict[str, int] = {}
    for layer in report.layers:
        if layer.status.lower() != "converged":
            found[layer.status] = found.get(layer.status, 0) + 1
    return [
        f"{status.replace('_', ' ').lower()}: {count} of {counted(len(report.layers), 'layer')}"
        for status, count in found.items()
    ]


def _named(model: str, weights: str) -> str:
    """Return the name of a measured model, with the first digits of the digest of its weights."""
    return one_line(model) + (f" (weights {weights[:DIGITS]})" if weights else "")


def _evaluated_on(found: EvaluationReport) -> str:
    beside, known = "" if found.against is None else f", beside {found.against}", found.standard_errors
    error = "" if known is None else f" ± is the standard error over {known.windows:,} windows, of differences paired."
    start = f", each begun with {found.begin}" if found.begin else ""
    model = f"{_named(found.model, found.weights)} on " if found.model else ""
    return (
        f"{model}{found.text}, {found.windows:,} windows of {found.seq_length:,} tokens{start}, {found.tokens:,} "
        f"predictions{beside}.{error}"
    )


def _load(model: ModelSummary | None) -> str:
    if model is None:
        return ""
    if model.stock:
        return "It uses the stock classes of transformers."
    return (
        "Its blocks differ from those of the stock class, so transformers needs the modelling file in the folder and "
        "trust_remote_code=True; optprune.load_model(folder) does not."
    )
