"""Wording of values, errors and counts in sentences."""

import difflib
import reprlib
from collections.abc import Iterable, Sequence


class _Short(reprlib.Repr):
    """`repr` of a value in at most a line, without the whole text in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel = 4
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = 6
        self.maxstring = self.maxother = 100
        self.maxlong = 40

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level)  # type: ignore[misc]  # typeshed leaves it out
        except ValueError:  # beyond the limit of digits that Python converts
            return f"a whole number of {x.bit_length()} bits"


def shown(value: object) -> str:
    """Return the `repr` of a value, cut to a line."""
    return one_line(_Short().repr(value), 200)


def one_line(text: object, longest: int = 300) -> str:
    """Return the text of an error or a value as one line of bounded length, without lone surrogates."""
    line = " ".join(str(text)[: 2 * longest].split()).encode("utf-8", "backslashreplace").decode()
    return line if len(line) <= longest else f"{line[: longest - 3]}..."


def amount(size: int) -> str:
    """Return a number of bytes in words, such as 12 MB or 3.4 GB."""
    if size < 10**9:
        return f"{size / 10**6:.0f} MB"
    return f"{size / 10**9:.1f} GB" if size < 10**12 else f"{size / 10**12:.1f} TB"


def counted(number: int, one: str, more: str | None = None) -> str:
    """Return a number with its noun, such as 1 layer or 2 layers; `more` is an irregular plural."""
    return f"{number} {one if number == 1 else more or f'{one}s'}"


def either(names: Sequence[str]) -> str:
    """Return names as a list in words, such as "mlp, vo or all"."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def install(extras: str) -> str:
    """Return the words on how to install what extras bring, from a checkout, because no package index has optprune."""
    return f"run pip install -e '.[{extras}]' in optprune's checkout"


def nearest(name: object, known: Iterable[str]) -> str | None:
    """Return the known name that is most like a name; None where none is like it."""
    found = difflib.get_close_matches(name[:100] if isinstance(name, str) else "", list(known), n=1)
    return found[0] if found else None


def suggestion(name: object, known: Iterable[str]) -> str:
    """Return a question for the sentence on an unknown name, such as " (did you mean fasp?)", or nothing."""
    found = nearest(name, known)
    return "" if found is None else f" (did you mean {found}?)"
