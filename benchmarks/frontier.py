"""Results of `optprune frontier` as files of the documentation: the table, all figures, and the picture.

    .venv/bin/python -m benchmarks.frontier FRONTIER_FOLDER NAME

writes results/frontier_NAME.json and .md, and docs/pictures/frontier_NAME.svg with the colours of the page.
"""

import argparse
import json
import re
from pathlib import Path

from pydantic import TypeAdapter

from benchmarks.common import RESULTS, machine
from optprune.comparison import Frontier, FrontierRow
from optprune.comparison.frontier_folder import JSON
from optprune.report.frontier_picture import frontier_svg

PICTURES = Path(__file__).parents[1] / "docs" / "pictures"
STYLE = Path(__file__).parents[1] / "optprune" / "report" / "page.css"
FONT = "system-ui, sans-serif"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("name")
    options = parser.parse_args()
    content = json.loads((options.folder / JSON).read_text(encoding="utf-8"))
    found = read(content)
    RESULTS.mkdir(exist_ok=True)
    target = RESULTS / f"frontier_{options.name}.json"
    target.write_text(json.dumps({**content, "machine": machine()}, indent=1) + "\n", encoding="utf-8")
    target.with_suffix(".md").write_text(f"{found.markdown()}- {machine()}\n", encoding="utf-8")
    svg = frontier_svg(found.marks(), f"{found.model}: size and bits per byte")
    if svg is not None:
        (PICTURES / f"frontier_{options.name}.svg").write_text(alone(svg), encoding="utf-8")


def read(content: dict) -> Frontier:
    """The frontier of a JSON file."""
    rows = [{key: value for key, value in row.items() if key != "dominated"} for row in content["rows"]]
    return Frontier(
        content["model"],
        tuple(TypeAdapter(list[FrontierRow]).validate_python(rows)),
        content["options"],
        tuple(content["prompts"]),
        tuple(content["failures"]),
    )


def alone(svg: str) -> str:
    """An <svg> element of a page as a file of its own, on white."""
    [first] = re.findall(r":root \{(.*?)\}", STYLE.read_text(encoding="utf-8"), re.DOTALL)[:1]
    colours = dict(re.findall(r"--(\w+): (#[0-9a-f]{6})", first))
    for name, colour in colours.items():
        svg = svg.replace(f"var(--{name})", colour)
    head = f'<svg xmlns="http://www.w3.org/2000/svg" font-family="{FONT}" style="background:#ffffff"'
    return svg.replace("currentColor", colours["ink"]).replace("<svg", head, 1)


if __name__ == "__main__":
    main()
