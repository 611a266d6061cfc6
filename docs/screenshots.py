"""Screenshots of a run's page for docs/guide/report.md: light, dark, and as wide as a phone.

    .venv/bin/python docs/screenshots.py                # runs optprune demo, minutes
    .venv/bin/python docs/screenshots.py --page FILE    # of a page that is there

Needs chromium (or chrome) on the path, which draws without a window, and Pillow, which comes with matplotlib.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

PICTURES = Path(__file__).parent / "pictures"
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
LARGEST = 200 * 1024
"""the most bytes of a picture"""


@dataclass(frozen=True)
class Shot:
    """A window of this size onto the page, from a place on it."""

    name: str
    width: int
    height: int
    begins: str = ""
    """the id of what the window begins with; the page's first line without"""
    dark: bool = False


SHOTS = (
    Shot("report_light", 1000, 1120),
    Shot("report_dark", 1000, 1240, begins="kept", dark=True),
    Shot("report_phone", 390, 1150),
)


def browser() -> str:
    """The program that draws."""
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        sys.exit(f"no browser draws the page: install one of {', '.join(BROWSERS)}")
    return found


def made(folder: Path) -> Path:
    """The page of the demo; its folder has the name that it has without --output, which commands on the page name."""
    subprocess.run([sys.executable, "-m", "optprune", "demo"], check=True, cwd=folder)
    return folder / ".demo" / "smollm2-fasp" / "report.html"


def take(shot: Shot, page: Path, folder: Path) -> Path:
    """Draw the page in a window, with as few colours as it has, and store it."""
    text = page.read_text(encoding="utf-8")
    if shot.begins:
        # A headless window does not scroll: what comes before is not drawn.
        opening = f'<section aria-labelledby="{shot.begins}">'
        before, _, after = text.partition(opening)
        text = before.partition("<header>")[0] + opening + after
    narrowed, raw = folder / f"{shot.name}.html", folder / f"{shot.name}.png"
    narrowed.write_text(text, encoding="utf-8")
    scheme = ["--blink-settings=preferredColorScheme=0"] if shot.dark else ["--blink-settings=preferredColorScheme=1"]
    words = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--hide-scrollbars",
        f"--user-data-dir={folder / 'profile'}",
    ]
    window = [f"--window-size={shot.width},{shot.height}", f"--screenshot={raw}"]
    subprocess.run([browser(), *words, *scheme, *window, narrowed.as_uri()], check=True, capture_output=True)
    with Image.open(raw) as image:
        small = image.convert("RGB").quantize(128, dither=Image.Dither.NONE)
    file = PICTURES / f"{shot.name}.png"
    small.save(file, optimize=True)
    if file.stat().st_size > LARGEST:
        sys.exit(f"{file} has {file.stat().st_size} bytes, more than {LARGEST}: make the window smaller")
    return file


def main() -> None:
    """Take all of them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--page", type=Path, metavar="FILE", help="a report.html that is there")
    options = parser.parse_args()
    PICTURES.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        page = options.page or made(Path(folder))
        for shot in SHOTS:
            print(take(shot, page, Path(folder)))


if __name__ == "__main__":
    main()
