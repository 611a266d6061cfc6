"""The folder of a pruned model: its weights, and beside them the report and the recipe that made them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from optprune.export.card import ModelCard
from optprune.export.origin import CARD, origin_of
from optprune.export.save import SavedModel, cast, save_model
from optprune.export.shards import MAX_SHARD_SIZE
from optprune.models import DTYPES, LoadedModel, check_dtype
from optprune.recipe import Recipe
from optprune.report import Report

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
) -> SavedModel:
    """Write a pruned model with its tokenizer, report.json, recipe.yaml and a model card, whole or not at all.

    The card and the licence files go by what the source's own card says.

    A fresh process reloads the folder, and its logits on the first tokens of `window` [length] must agree with those
    in memory. A `dtype` other than auto (float32, bfloat16 or float16) rounds the model to it before, in place.
    """
    check_dtype(dtype)
    if dtype != "auto":
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
            "report.json": report.to_json(),
            "recipe.yaml": recipe.settled().to_yaml(),
        },
        check_tokens=window[None, :CHECK_TOKENS],
        overwrite=overwrite,
        store=loaded.store,
        max_shard_size=max_shard_size,
        made=made,
    )
