"""The README and the pages of the docs, and the Python in them."""

import copy
import re
from pathlib import Path

import torch

from optprune.models import LoadedModel

ROOT = Path(__file__).parents[2]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCKS = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}
RECIPE_FILES = {page: re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}


def narrow(loaded: LoadedModel) -> LoadedModel:
    """Return a model of the same class and tokenizer with two narrow blocks and random weights."""
    small, config = copy.copy(loaded), copy.deepcopy(loaded.model.config)
    config.update({"num_hidden_layers": 2, "hidden_size": 96, "intermediate_size": 192, "head_dim": 32})
    config.update({"num_attention_heads": 3, "num_key_value_heads": 1})
    torch.manual_seed(0)
    object.__setattr__(small, "model", type(loaded.model)(config))
    return small


def copied(loaded: LoadedModel) -> LoadedModel:
    """Return a loaded model whose weights are a copy."""
    again = copy.copy(loaded)
    object.__setattr__(again, "model", copy.deepcopy(loaded.model))
    return again
