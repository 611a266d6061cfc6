"""What two outputs of the same run have in common, bit for bit."""

import json
from pathlib import Path
from typing import Any

TIMES = ("seconds", "spent", "prefill", "decode", "floor_seconds", "phases", "stages")
"""what of a comparison's figures and of a report is measured by a clock"""
AGAIN = "was damaged, so its content was measured again"


def contents(output: Path) -> dict[str, Any]:
    """What of an output must be the same: all but times, and pages and pictures that tell of them."""
    if output.is_file():
        return {"": output.read_bytes()}
    found: dict[str, Any] = {}
    for file in sorted(file for file in output.rglob("*") if file.is_file()):
        name = str(file.relative_to(output))
        if file.name == "run.json":
            continue  # the digests of files that tell of times
        if file.name == "report.json" or ((output / "cells").is_dir() and file.suffix == ".json"):
            try:
                found[name] = untimed(json.loads(file.read_text()))
            except ValueError:  # of an output that somebody has spoiled
                found[name] = file.read_bytes()
        elif file.stem not in ("report", "comparison") and file.name not in ("in-use", "README.md"):
            found[name] = file.read_bytes()
    return found


def untimed(data: Any) -> Any:
    """Plain data without what a clock has measured, and without notes of what was measured again."""
    if isinstance(data, dict):
        return {key: untimed(value) for key, value in data.items() if key not in TIMES}
    if isinstance(data, list):
        return [untimed(value) for value in data if not (isinstance(value, str) and value.endswith(AGAIN))]
    return data
