"""Shares: which text gives how many of the calibration windows, and in which order they come."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from optprune.errors import InputError
from optprune.system.wording import shown

SHARED = re.compile(r"(.+?)=(\d{1,3}(?:\.\d{0,9})?|\.\d{1,9})(?:,|\Z)", re.DOTALL)
"""a text with its share: a comma ends it only behind a share, so that names may hold commas and equals signs"""
ROUNDED = Fraction(1, 100)
"""how far from 1 the sum of shares may be, since thirds have to be rounded"""


@dataclass(frozen=True)
class SharedText:
    """The name of a text, and the share of the windows that is drawn from it."""

    name: str
    share: Fraction


def read_shares(spec: str) -> tuple[SharedText, ...]:
    """The texts that a calibration names: one, or several with shares, as in `a.jsonl:text=0.7,b.txt=0.3`.

    What is there as a file or a folder under this name is one text, whatever its name looks like. A text ends at a
    comma behind a share, and its share begins at the last equals sign before it. InputError where a text has no share
    or is given twice, or the shares do not come to 1.
    """
    if Path(spec).exists() or not SHARED.match(spec):
        return (SharedText(spec, Fraction(1)),)
    texts, place = list[SharedText](), 0
    while place < len(spec):
        found = SHARED.match(spec, place)
        if found is None:
            raise InputError(
                f"the text {shown(spec[place:])} of the calibration has no share: write one behind each, as in "
                "a.jsonl:text=0.7,b.txt=0.3"
            )
        texts.append(SharedText(found[1], Fraction(found[2])))
        place = found.end()
    names = [text.name for text in texts]
    for name in names:
        if names.count(name) > 1:
            raise InputError(f"the text {name} is given twice: give it once, with the sum of its shares")
    check_shares([text.share for text in texts])
    return tuple(texts)


def check_shares(shares: Sequence[Fraction]) -> None:
    """Raise InputError unless shares are above 0 and come to 1, to a hundredth."""
    if not shares:
        raise InputError("there is no text to draw from: give at least one")
    if min(shares) <= 0 or abs(sum(shares) - 1) > ROUNDED:
        told = " + ".join(f"{float(share):g}" for share in shares)
        raise InputError(
            f"the shares of the texts are {told}, which come to {float(sum(shares)):g}: give shares above 0 that come "
            "to 1, as in a.jsonl:text=0.7,b.txt=0.3"
        )


def divided(samples: int, shares: Sequence[Fraction]) -> tuple[int, ...]:
    """How many of so many windows each share gets, by largest remainders; of equal ones the first has precedence."""
    whole = sum(shares)
    exact = [samples * share / whole for share in shares]
    counts = [int(count) for count in exact]
    by_remainder = sorted(range(len(counts)), key=lambda index: counts[index] - exact[index])
    for index in by_remainder[: samples - sum(counts)]:
        counts[index] += 1
    return tuple(counts)


def interleaved(counts: Sequence[int]) -> list[tuple[int, int]]:
    """The order of all windows, as (text, number within the text): each text's are spread evenly over the whole.

    Whatever is made of the first windows or of the last alone, every text has its share in it.
    """
    places = [
        (Fraction(2 * number + 1, 2 * count), text, number)
        for text, count in enumerate(counts)
        for number in range(count)
    ]
    return [(text, number) for _, text, number in sorted(places)]
