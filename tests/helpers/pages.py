"""The README and the pages of the docs, and the Python in them."""

import copy
import re
from pathlib import Path

from optprune.models import LoadedModel

ROOT = Path(__file__).parents[2]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCKS = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}
RECIPE_FILES = {page: re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}


def copied(loaded: LoadedModel) -> LoadedModel:
    """Return a loaded model whose weights are a copy."""
    again = copy.copy(loaded)
    object.__setattr__(again, "model", copy.deepcopy(loaded.model))
    return again
