"""The folder of a healed model: what the folder of the pruned one says of it, and what healing has done since."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from optprune.errors import InputError
from optprune.export.card import plain
from optprune.export.folder import CHECK_TOKENS
from optprune.export.origin import CARD, origin_of
from optprune.export.own_files import check_own_files, own_text
from optprune.export.save import SavedModel, save_model
from optprune.models import LoadedModel
from optprune.report import Event, page, read_healing, read_report, summarise_model
from optprune.report.reading import PAGE, REPORT
from optprune.system.files import json_text, write_whole

RECIPE = "recipe.yaml"


def save_healed(
    loaded: LoadedModel,
    folder: str | Path,
    healing: Mapping[str, Any],
    *,
    teacher: str,
    window: Tensor,
    overwrite: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> SavedModel:
    """Write a healed model with its tokenizer, whole or not at all, and beside it what its source says.

    report.json, recipe.yaml, the model card and the licence files are those of the source, where it is a folder that
    has them; report.json gets a section `healing`, and the card one with its figures, in which `teacher` is the source
    of the dense model. A fresh process reloads the folder, and its logits on the first tokens of `window` [length] must
    agree with those in memory. The page of it all, report.html, is in it too.
    """
    source = Path(loaded.source)
    check_own_files(source)
    texts = {name: own_text(source, name) for name in (REPORT, RECIPE, CARD)}
    try:
        before = json.loads(texts.get(REPORT) or "{}")
    except (ValueError, RecursionError):
        before = {}
    report = {**(before if isinstance(before, dict) else {}), "healing": dict(healing)}
    origin = origin_of(loaded.source)
    card = texts.get(CARD) or f"# {plain(origin.name.rpartition('/')[2])}\n"
    files = {
        **origin.licence_files,
        REPORT: json_text(report),
        CARD: f"{card.rstrip()}\n\n{_section(healing, origin_of(teacher).name)}",
    }
    recipe = texts.get(RECIPE)
    return save_model(
        loaded.model,
        folder,
        tokenizer=loaded.tokenizer,
        files=files if recipe is None else {**files, RECIPE: recipe},
        check_tokens=window[None, :CHECK_TOKENS],
        overwrite=overwrite,
        finish=_put_page,
        on_event=on_event,
    )


def _put_page(folder: Path) -> None:
    """Write the page of a folder, whose report may be of healing alone: then there is none."""
    try:
        report = read_report(folder)
    except InputError:
        return
    data = page(report, model=summarise_model(folder, report), healing=read_healing(folder)).encode()
    write_whole(folder / PAGE, lambda stream: stream.write(data))


def _section(healing: Mapping[str, Any], teacher: str) -> str:
    """What the card says of healing."""
    before, after, written = healing["before"], healing["after"], healing.get("generated_windows", 0)
    partly = f", {written:,} windows of which that one wrote itself;" if written else ""
    return (
        "## Healing\n\n"
        f"Trained after pruning by optprune to predict what {plain(teacher)} does, for {healing['steps']} steps on "
        f"{healing['tokens']:,} tokens{partly or ';'} all zeros and widths are as pruning left them. On "
        f"{healing['held_out_tokens']:,} held-out tokens:\n\n"
        "| | before healing | after | dense |\n|---|---|---|---|\n"
        f"| divergence from the dense model, nats | {before['divergence']:.4f} | {after['divergence']:.4f} | 0 |\n"
        f"| perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} | {healing['dense_perplexity']:.2f} |\n"
    )
