"""A report read back from report.json, as this version writes it or an earlier one did."""

import math
from collections.abc import Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, get_args

from pydantic import TypeAdapter, ValidationError

from optprune.errors import InputError
from optprune.report.records import LayerReport, RecoveredPart, RemovedPart, Report
from optprune.system.files import read_json
from optprune.system.wording import one_line, shown

REPORT, PAGE = "report.json", "report.html"
"""the files of a report in a folder: the figures, and the page about them"""
MOST = 2**64
"""what the whole numbers of a report are below"""
ROWS = {"layers": LayerReport, "recovered": RecoveredPart, "removed": RemovedPart}
"""the lists of a report whose entries hold numbers that JSON may not know"""


def read_report(folder: str | Path) -> Report:
    """The report of a folder that a run wrote; InputError where there is none, or something else under its name."""
    file = Path(folder) / REPORT
    if not file.is_file():
        raise InputError(f"the folder {folder} has no {REPORT}: give one that optprune prune wrote")
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read: {one_line(error)}") from error
    data = read_json(text, str(file))
    if not isinstance(data, dict):
        raise InputError(f"{file} is no report of a run, but {shown(data)}: give a folder that optprune prune wrote")
    check_whole_numbers(data, str(file))
    try:
        return TypeAdapter(Report).validate_python(_with_numbers(data))
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise InputError(
            f"{file} is no report of a run ({one_line(place)}: {one_line(first['msg'])}): give a folder that optprune "
            "prune wrote"
        ) from error


def check_whole_numbers(data: Any, where: str) -> None:
    """Raise InputError where plain data hold a whole number that no count, size or seed can be."""
    left = [data]
    while left:
        value = left.pop()
        if isinstance(value, dict | list):
            left += value.values() if isinstance(value, dict) else value
        elif isinstance(value, int) and abs(value) >= MOST:
            raise InputError(
                f"{where} holds the number {shown(value)}, which is beyond 64 bits: give the file as written"
            )


def _with_numbers(data: Any) -> Any:
    """The data with NaN where a number is null: JSON knows neither NaN nor infinity, so one was written as null."""
    if not isinstance(data, dict):
        return data
    told = dict(data)
    for name, kind in ROWS.items():
        if isinstance(rows := told.get(name), list):
            told[name] = [_filled(row, kind) if isinstance(row, dict) else row for row in rows]
    return _filled(told, Report)


def _filled(row: Mapping[str, Any], kind: type) -> dict[str, Any]:
    """A row with NaN for numbers that are null, and null for what earlier versions did not write and may be absent."""
    filled = dict(row)
    for each in fields(kind):
        if each.type is float and filled.get(each.name, 0.0) is None:
            filled[each.name] = math.nan
        elif each.name not in filled and each.default is MISSING and type(None) in get_args(each.type):
            filled[each.name] = None
    return filled
