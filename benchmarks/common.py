"""What the benchmarks share: the model, the text, the machine's name, and tables as Markdown and JSON."""

import json
import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from optprune import Recipe
from optprune.calibration.generated import TEMPERATURE, generated_windows, with_generated
from optprune.models import LoadedModel, load_model, need_tokenizer
from optprune.texts import begin_tokens, calibration_batches, evaluation_windows, read_documents, tokenise

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Setting:
    """A model with its calibration batches and evaluation windows."""

    loaded: LoadedModel
    batches: Sequence[Tensor]
    windows: Tensor


def setting(samples: int, seq_length: int, windows: int, seed: int, model: str = "demo") -> Setting:
    """The packaged model or another, calibrated on one half of the news articles and evaluated on the other."""
    loaded = load_model(model)
    tokenizer = tokenizer_of(loaded)
    tokens = tokenise(tokenizer, read_documents("demo:calibration"))
    held_out, begin = tokenise(tokenizer, read_documents("demo:evaluation")), begin_tokens(tokenizer)
    return Setting(
        loaded,
        calibration_batches(tokens, samples, seq_length, seed, begin=begin),
        evaluation_windows(held_out, seq_length, windows, begin),
    )


def tokenizer_of(loaded: LoadedModel) -> PreTrainedTokenizerBase:
    """The model's tokenizer, without which there is nothing to measure on."""
    return need_tokenizer(loaded.tokenizer, loaded.source)


def with_written(
    dense: PreTrainedModel, batches: Sequence[Tensor], count: int, recipe: Recipe, temperature: float = TEMPERATURE
) -> list[Tensor]:
    """Return calibration batches with `count` windows that the dense model writes, as `prune --generated` has them."""
    if not count:
        return list(batches)
    windows = generated_windows(dense, batches, count, seed=recipe.seed, temperature=temperature)
    return with_generated(batches, windows, held_out=getattr(recipe.refit, "held_out", 0.0), seed=recipe.seed)


TEXTS = {"news": "demo:evaluation", "speeches": "demo:speeches"}
"""what whole models are evaluated on"""


def evaluation_texts(tokenizer: PreTrainedTokenizerBase, seq_length: int, windows: int) -> dict[str, Tensor]:
    """The windows of every text, which begin as the tokenizer begins a text."""
    begin = begin_tokens(tokenizer)
    return {
        text: evaluation_windows(tokenise(tokenizer, read_documents(spec)), seq_length, windows, begin)
        for text, spec in TEXTS.items()
    }


def machine() -> str:
    """The machine and the versions that a table was made with."""
    cpu = next(
        (
            line.split(":", 1)[1].strip()
            for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
            if line.startswith("model name")
        ),
        platform.processor(),
    )
    return (
        f"{cpu}, {torch.get_num_threads()} threads; torch {torch.__version__}, "
        f"transformers {version('transformers')}, optprune {version('optprune')}, Python {platform.python_version()}"
    )


def command() -> str:
    """What the benchmark was called with."""
    spec = sys.modules["__main__"].__spec__
    # A path of this machine says nothing to others: the name of the folder does.
    words = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return " ".join(["python -m", "?" if spec is None else spec.name, *words])


def write_table(name: str, title: str, rows: Sequence[dict[str, Any]]) -> str:
    """Write rows as results/NAME.json and results/NAME.md, and return the Markdown."""
    RESULTS.mkdir(exist_ok=True)
    text = "\n".join([f"# {title}", "", f"`{command()}`", "", machine(), "", markdown(rows)])
    (RESULTS / f"{name}.md").write_text(text, encoding="utf-8")
    data = {"title": title, "command": command(), "machine": machine(), "rows": list(rows)}
    (RESULTS / f"{name}.json").write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return text


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """Rows with the same fields as a Markdown table."""
    columns = list(rows[0])
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in columns) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def with_earlier(name: str, rows: list[dict[str, Any]], keys: Sequence[str]) -> list[dict[str, Any]]:
    """The rows of an earlier, partial run whose keys are not among the new rows, then the new ones."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    new = [[row[key] for key in keys] for row in rows]
    return [row for row in earlier if [row[key] for key in keys] not in new] + rows


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
