"""What the processes of `Children` do: run a command, end it at a moment, load what it wrote."""

from __future__ import annotations

import json
import math
import time
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.helpers.warm_reloads import WarmReloads

reloads: WarmReloads | None = None
"""the check of written folders in a process that was forked, in place of one that imports all it needs"""
TOKENS = 8
QUICK = "print(2e8, 1, 1, 0)"
"""in place of the imports that a plan measures: memory, seconds of a reload, of all imports, of the drawing library"""


def command(words: list[str], checked: bool = False) -> int:
    """Run a command of optprune; only where it is `checked` are written folders reloaded in another process."""
    from optprune.cli.app import main
    from optprune.export import check, folder
    from optprune.program import time as program_time

    if checked:
        check.run_alongside = reloads  # type: ignore[assignment]
    else:
        folder.compare = lambda *_: 0.0  # type: ignore[assignment]
    program_time.FRESH = QUICK
    return main(words)


def ended(words: list[str], at: int | str | float | None, how: str, note: str, output: str, checked: bool) -> int:
    """Run a command that ends at a moment, or after so many seconds; `note` tells of it, or of all moments and time."""
    from tests.helpers.torture.moments import after_seconds, moments

    places = Path(note), Path(output)
    if isinstance(at, float):
        with after_seconds(at, how, *places):
            return command(words, checked)
    began = time.process_time()
    with moments(at, how, *places) as seen:
        status = command(words, checked)
    if at is None:
        Path(note).write_text(json.dumps({"moments": seen, "seconds": time.process_time() - began}))
    return status


def program(code: str) -> int:
    """Run a program that uses the library; an error of optprune ends it as it ends a command."""
    import sys

    from optprune.errors import OptpruneError

    sys.path.insert(0, str(Path.cwd()))  # with modules of one's own
    with TemporaryDirectory() as folder, chdir(folder):
        try:
            exec(compile(code, "program.py", "exec"), {"__name__": "__main__"})
        except OptpruneError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
    return 0


def checks(name: str, given: dict[str, Any]) -> int:
    """Look at a result by means that are not optprune's: 0, or 1 with a sentence."""
    from tests.helpers.torture.checks import CHECKS

    fault = CHECKS[name](**given)
    if fault:
        print(fault)
    return 1 if fault else 0


def stock(folder: str) -> int:
    """Make what inputs are made of."""
    from tests.helpers.torture.stock import make

    make(Path(folder))
    return 0


def loads(kind: str, place: str) -> int:
    """See that what a command has written is whole: 0, or 1 with a sentence."""
    fault = LOADS[kind](Path(place))
    if fault:
        print(fault)
    return 1 if fault else 0


def of_model(place: Path) -> str | None:
    """What is wrong with a model folder or a GGUF file."""
    import torch

    from optprune.models import load_model

    loaded = load_model(place)
    for name, weight in loaded.model.state_dict().items():
        if not bool(torch.isfinite(weight).all()):
            return f"{name} is not finite"
    with torch.no_grad():
        logits = loaded.model(input_ids=torch.arange(TOKENS)[None]).logits
    if not bool(torch.isfinite(logits).all()):
        return "the logits are not finite"
    return None


def of_gguf(place: Path) -> str | None:
    """What is wrong with a GGUF file, whatever its name."""
    with TemporaryDirectory() as folder:
        named = Path(folder) / "model.gguf"
        named.symlink_to(place)
        return of_model(named)


def of_pruned(place: Path) -> str | None:
    """What is wrong with a folder that `prune` wrote."""
    from optprune.report import audit

    strict(place / "report.json")
    faults = audit(place).faults
    return faults[0].sentence if faults else of_model(place)


def of_onnx(place: Path) -> str | None:
    """What is wrong with a folder of ONNX."""
    import numpy as np

    from optprune.export.onnx_folder import without_telemetry

    without_telemetry()
    import onnxruntime

    session = onnxruntime.InferenceSession(str(place / "model.onnx"), providers=["CPUExecutionProvider"])
    feed = {}
    for one in session.get_inputs():
        before = len(one.shape) == 4
        feed[one.name] = (
            np.zeros((1, one.shape[1], 0, one.shape[3]), np.float32)
            if before
            else np.arange(TOKENS)[None]
            if one.name != "attention_mask"
            else np.ones((1, TOKENS), np.int64)
        )
    return None if np.isfinite(session.run(["logits"], feed)[0]).all() else "the logits are not finite"


def of_json(place: Path) -> str | None:
    """What is wrong with a JSON file."""
    strict(place)
    return None


def of_comparison(place: Path) -> str | None:
    """What is wrong with the folder of a comparison."""
    data = strict(place / "comparison.json")
    for key, value in leaves(data):
        if isinstance(value, float) and not math.isfinite(value):
            return f"{key} is {value}"
    return None if (place / "comparison.md").read_text().strip() else "the table is empty"


def of_vision(place: Path) -> str | None:
    """What is wrong with a folder of a model of text and images that `prune` wrote."""
    from optprune.report import audit

    strict(place / "report.json")
    faults = audit(place).faults
    return faults[0].sentence if faults else None


def of_config(place: Path) -> str | None:
    """What is wrong with a folder whose config is for another program."""
    strict(place / "config.json")
    return None


def of_frontier(place: Path) -> str | None:
    """What is wrong with the folder of a frontier."""
    data = strict(place / "frontier.json")
    return of_page(place / "frontier.html") if data["rows"] else "there are no rows"


def of_page(place: Path) -> str | None:
    """What is wrong with a page."""
    text = place.read_text(encoding="utf-8")
    return None if text.rstrip().endswith("</html>") else "the page is not whole"


def of_solution(place: Path) -> str | None:
    """What is wrong with a file of a solution."""
    import torch
    from safetensors.torch import load_file

    return None if bool(torch.isfinite(load_file(place)["value"]).all()) else "the answer is not finite"


LOADS = {
    "model": of_model,
    "gguf": of_gguf,
    "pruned": of_pruned,
    "onnx": of_onnx,
    "json": of_json,
    "comparison": of_comparison,
    "page": of_page,
    "solution": of_solution,
    "vision": of_vision,
    "config": of_config,
    "frontier": of_frontier,
}


def strict(file: Path) -> Any:
    """The data of a JSON file, in which there is no NaN and no infinity."""

    def refuse(name: str) -> None:
        raise ValueError(f"{file.name} holds {name}")

    return json.loads(file.read_text(encoding="utf-8"), parse_constant=refuse)


def leaves(data: Any, path: str = "") -> Any:
    """The values in plain data, with where they are."""
    if isinstance(data, dict | list):
        for key, item in data.items() if isinstance(data, dict) else enumerate(data):
            yield from leaves(item, f"{path}.{key}")
    else:
        yield path, data
