"""The README and the pages of the docs, and the Python in them."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXTS = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for path in (ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md")))
}
BLOCKS = {page: re.findall(r"```python\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}
RECIPE_FILES = {page: re.findall(r"```yaml\n(.*?)```", text, re.DOTALL) for page, text in TEXTS.items()}
