"""An extension of griffe: docstrings are plain text and formulas, and what Markdown would change is escaped."""

import re
from typing import Any

from griffe import Extension, Object

MARKUP = re.compile(r"(`[^`]*`)|([*<_\[\]$\\])")


class PlainDocstrings(Extension):
    """x* stays x*, <U, V> is no tag and [out, in] no link; code in backquotes and indented formulas are left alone."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Escape the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(map(plain, obj.docstring.value.splitlines()))


def plain(line: str) -> str:
    """A line of a docstring as Markdown that shows it as it stands."""
    if line.startswith("    "):
        return line
    return MARKUP.sub(lambda found: found[1] or ("&lt;" if found[2] == "<" else "\\" + found[2]), line)
