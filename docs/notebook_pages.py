"""Hook of mkdocs that turns every notebook into a page with its stored outputs, without running it."""

import base64
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add a page for each notebook, and its images."""
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        parts: list[str] = []
        for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
            source = "".join(cell["source"])
            if cell["cell_type"] == "markdown":
                parts.append(source)
                continue
            parts.append(f"```python\n{source}\n```")
            for shown, output in enumerate(cell["outputs"]):
                image = output.get("data", {}).get("image/png")
                if image:
                    name = f"{path.stem}-{number}-{shown}.png"
                    content = base64.b64decode("".join(image))
                    files.append(File.generated(config, f"notebooks/{name}", content=content))
                    parts.append(f"![output of the cell]({name})")
                else:
                    parts += (f"```text\n{text.rstrip()}\n```" for text in _texts(output))
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content="\n\n".join(parts) + "\n"))
    return files


def _texts(output: dict[str, Any]) -> Iterator[str]:
    """Yield the printed text of a cell, or the text of its value."""
    if output["output_type"] == "stream":
        yield "".join(output["text"])
    elif "data" in output:
        yield "".join(output["data"]["text/plain"])
