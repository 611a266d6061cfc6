"""The folder of a pruned model: its weights, and beside them the report and the recipe that made them."""

from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

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
    """Write a pruned model with its tokenizer, report.json and recipe.yaml, whole or not at all.

    A fresh process reloads the folder, and its logits on the first tokens of `window` [length] must agree with those
    in memory. A `dtype` other than auto (float32, bfloat16 or float16) rounds the model to it before, in place.
    """
    check_dtype(dtype)
    if dtype != "auto":
        cast(loaded.model, DTYPES[dtype], loaded.store)
    return save_model(
        loaded.model,
        folder,
        tokenizer=loaded.tokenizer,
        files={"report.json": report.to_json(), "recipe.yaml": recipe.settled().to_yaml()},
        check_tokens=window[None, :CHECK_TOKENS],
        overwrite=overwrite,
        store=loaded.store,
        max_shard_size=max_shard_size,
        made=made,
    )
