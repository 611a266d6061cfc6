"""Extension of griffe that shows docstrings as plain text with formulas, by escaping what Markdown would change."""

import re
from typing import Any

from griffe import Extension, Object

MARKUP = re.compile(r"(`[^`]*`)|([*<_\[\]$\\])")


class PlainDocstrings(Extension):
    """Keeps x*, <U, V> and [out, in] as they are, and leaves code in backquotes and indented formulas alone."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        """Escape the docstring of an object."""
        if obj.docstring is not None:
            obj.docstring.value = "\n".join(map(plain, obj.docstring.value.splitlines()))


def plain(line: str) -> str:
    """Return a line of a docstring as Markdown that shows it unchanged."""
    if line.startswith("    "):
        return line
    return MARKUP.sub(lambda found: found[1] or ("&lt;" if found[2] == "<" else "\\" + found[2]), line)
