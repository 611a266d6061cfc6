"""The folder of a pruned model: its weights, and beside them the report and the recipe that made them."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from optprune.export.card import ModelCard
from optprune.export.origin import CARD, origin_of
from optprune.export.own_files import check_own_files
from optprune.export.save import SavedModel, cast, save_model
from optprune.export.shards import MAX_SHARD_SIZE
from optprune.models import DTYPES, LoadedModel, check_dtype
from optprune.recipe import Recipe
from optprune.report import Event, PhaseRecorder, Report, joined
from optprune.report.phases import SAVING

CHECK_TOKENS = 128
"""how many tokens the logits of the saved model are compared on"""


def save_pruned(
    loaded: LoadedModel,
    folder: str | Path,
    report: Report,
    recipe: Recipe,
    *,
    window: Tensor,
    overwrite: bool = False,
    dtype: str = "auto",
    max_shard_size: str = MAX_SHARD_SIZE,
    made: Sequence[Path] = (),
    on_event: Callable[[Event], None] = lambda event: None,
) -> SavedModel:
    """Write a pruned model with its tokenizer, report.json, recipe.yaml and a model card, whole or not at all.

    The card and the licence files go by what the source's own card says.

    A fresh process reloads the folder, and its logits on the first tokens of `window` [length] must agree with those
    in memory. A `dtype` other than auto (float32, bfloat16 or float16) rounds the model to it before, in place.
    report.json, and `SavedModel.report`, have what saving and checking took as well.
    """
    check_dtype(dtype)
    check_own_files(loaded.source)
    phases = PhaseRecorder(loaded.model.device, on_event)
    if dtype != "auto":
        with phases.phase(SAVING):
            cast(loaded.model, DTYPES[dtype], loaded.store)
    origin = origin_of(loaded.source)
    card = ModelCard(origin, report, loaded.model)
    return save_model(
        loaded.model,
        folder,
        tokenizer=loaded.tokenizer,
        files={
            **origin.licence_files,
            CARD: card.text(),
            "recipe.yaml": recipe.as_run(report.recipe).to_yaml(),
        },
        report=replace(report, phases=joined(report.phases, phases.done)),
        on_event=on_event,
        check_tokens=window[None, :CHECK_TOKENS],
        overwrite=overwrite,
        store=loaded.store,
        max_shard_size=max_shard_size,
        made=made,
    )
