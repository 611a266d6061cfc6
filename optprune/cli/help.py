"""The help of a command, with usual and advanced options in two sections."""

from collections.abc import Sequence
from typing import Any

import typer.core

ADVANCED = "Advanced options"
"""the section of rarely used options; an option declares it as its `rich_help_panel`"""


class Command(typer.core.TyperCommand):
    """A command whose help lists advanced options last."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write the arguments and options by section."""
        shown: list[tuple[Any, tuple[str, str]]] = [
            (one, record) for one in self.get_params(ctx) if (record := one.get_help_record(ctx)) is not None
        ]
        arguments = [record for one, record in shown if one.param_type_name == "argument"]
        usual = [record for one, record in shown if one.param_type_name == "option" and not _is_advanced(one)]
        advanced = [record for one, record in shown if _is_advanced(one)]
        _section(formatter, "Arguments", arguments)
        _section(formatter, "Options", usual)
        _section(formatter, ADVANCED, advanced)


def _is_advanced(parameter: Any) -> bool:
    return getattr(parameter, "rich_help_panel", None) == ADVANCED


def _section(formatter: Any, title: str, records: Sequence[tuple[str, str]]) -> None:
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
