"""Errors in the user's own code, such as a solver or an objective, told apart from errors of optprune."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from traceback import walk_tb

from optprune.errors import OptpruneError, OwnCodeError, is_out_of_memory, no_room
from optprune.system.wording import one_line

OURS, STANDARD = Path(__file__).parents[1], Path(os.__file__).parent
PACKAGES = {"site-packages", "dist-packages"}
TYPED = ("<stdin>", "<ipython-input")
"""beginnings of the names of code that was typed; other names in angle brackets are of generated code"""


@contextmanager
def own_code() -> Iterator[None]:
    """Raise an error of the user's own code as an OwnCodeError with its file and line; others pass.

    Interrupts, lack of memory and a full disk pass too.
    """
    try:
        yield
    except OptpruneError:
        raise
    except Exception as error:
        place = place_in_own_code(error)
        if place is None or is_out_of_memory(error) or no_room(error) is not None:
            raise
        file, line = place
        said = one_line(error)
        raise OwnCodeError(
            f"the code of your own in {file}, line {line}, raises {type(error).__name__}{': ' if said else ''}{said}: "
            "correct it (OPTPRUNE_DEBUG=1 shows the traceback)"
        ) from error


def place_in_own_code(error: BaseException) -> tuple[str, int] | None:
    """Return the file and the line of the user's own code in which an error arose; None where it arose in optprune.

    Packages are passed over: they fail where the code that calls them is wrong.
    """
    found = None
    for frame, line in walk_tb(error.__traceback__):
        file = frame.f_code.co_filename
        if Path(file).is_relative_to(OURS):
            found = None
        elif _is_own(file):
            found = file, line
    return found


def _is_own(file: str) -> bool:
    if file.startswith("<"):
        return file.startswith(TYPED)
    return not (Path(file).is_relative_to(STANDARD) or PACKAGES & {*Path(file).parts})
