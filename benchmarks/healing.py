"""Healing: perplexity of a model on held-out news and on speeches after pruning, and after a short distillation.

    .venv/bin/python -m benchmarks.healing                       # hours on one core
    .venv/bin/python -m benchmarks.healing --only fasp --tokens 40000 --learning-rate 1e-4
    .venv/bin/python -m benchmarks.healing --own-text --generated 64 --batch-size 2
    .venv/bin/python -m benchmarks.healing --own-text --generated 64 --model small-opt --seq-length 256
    .venv/bin/python -m benchmarks.healing --tables              # only write the table of what has been run

A model is pruned on calibration news, with `--prune-generated` also on windows that the dense model writes, and healed
on no more than 200 thousand tokens of the news, of which it holds out other articles; with `--own-text` on the windows
alone that it was pruned by, of which an eighth is held out, so that healing takes no text that pruning had not. With
`--generated` the dense model writes further windows itself, and with both options those that are held out too. It is
evaluated on the other half of the news, and on speeches, which neither has seen. `excess lost` is the share of what
pruning added to the perplexity that healing took off again. Rows are added to results/healing.json one by one, and
what is there already is not run again. The pruned models, and the state of a row that was stopped, are in the folder
of `--work`, from which it goes on.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase as Tokenizer

from benchmarks.common import RESULTS, TEXTS, evaluation_texts, machine, markdown, tokenizer_of, with_written
from benchmarks.studies import BEFORE, DIRECTIONS, HALF, INTRA, PAIRS, UNCLIPPED
from optprune import load_recipe, prune
from optprune.calibration import hold_out
from optprune.calibration.generated import PIECE, mixed
from optprune.export import save_model
from optprune.healing import HealingFolder, HealingSettings, generated_windows, heal
from optprune.healing.settings import LEARNING_RATE
from optprune.measure import perplexity
from optprune.models import LoadedModel, load_model
from optprune.recipe.recipe import EFFORTS, STANDARD
from optprune.report import DivergenceMeasured, Event, read_report
from optprune.texts import (
    Document,
    TrainingText,
    begin_tokens,
    calibration_batches,
    read_documents,
    split_held_out,
    tokenise,
)

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "fasp 30%": ("fasp", {"sparsity": 0.3}),
    "sparse_best 2:4": ("sparse_best", PAIRS),
    "sparse_best 2:4, intra, not clipped": ("sparse_best", PAIRS | UNCLIPPED | INTRA),
    "sparse_best 50%": ("sparse_best", HALF),
    "sparse_best 50%, intra": ("sparse_best", HALF | INTRA),
    "sparse_best 50%, pruned, not clipped": ("sparse_best", HALF | UNCLIPPED),
    "structured_best 20%": ("structured_best", {"sparsity": 0.2}),
    "structured_best 30%": ("structured_best", {"sparsity": 0.3}),
    "structured_best 20%, pairs stay": ("structured_best", {"sparsity": 0.2} | DIRECTIONS),
    "structured_best 30%, pairs stay": ("structured_best", {"sparsity": 0.3} | DIRECTIONS),
    "structured_best 20%, unclipped": ("structured_best", {"sparsity": 0.2} | DIRECTIONS | UNCLIPPED),
    "structured_best 30%, unclipped": ("structured_best", {"sparsity": 0.3} | DIRECTIONS | UNCLIPPED),
    "structured_best 20%, coordinates": ("structured_best", {"sparsity": 0.2} | BEFORE),
    "structured_best 30%, coordinates": ("structured_best", {"sparsity": 0.3} | BEFORE),
}
DEFAULTS = {
    **{"effort": "standard", "pruned by generated": 0, "text": "other articles", "epochs": 1, "generated": 0},
    **{"piece": 0, "dtype": "float32", "embeddings": "trained"},
}
"""of rows from before there were these fields"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*dict.fromkeys(recipe for recipe, _ in CASES.values()), *CASES]
    parser.add_argument("--only", nargs="+", choices=known, help="of recipes, or single cases; all otherwise")
    parser.add_argument("--effort", choices=EFFORTS, default=STANDARD, help="of pruning")
    parser.add_argument("--prune-generated", type=int, default=0, help="written windows that pruning takes as well")
    parser.add_argument("--model", default="demo", help="the dense one")
    parser.add_argument("--tokens", type=int, default=200_000, help="of other articles")
    parser.add_argument("--own-text", action="store_true", help="heal on what was pruned by")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--generated", type=int, default=0, help="windows that the dense model writes itself")
    parser.add_argument("--learning-rate", type=float, default=LEARNING_RATE)
    parser.add_argument("--keep-embeddings", action="store_true", help="and the head, as they are")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32", help="of the products")
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--held-out", type=int, default=16, help="windows that decide what is kept")
    parser.add_argument("--samples", type=int, default=16, help="windows that are pruned by")
    parser.add_argument("--windows", type=int, default=16, help="of each text that is evaluated on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--blocks", type=int, help="only so many of the model's blocks, to see that it works")
    parser.add_argument("--work", type=Path, default=Path(".demo/healing"))
    parser.add_argument("--tables", action="store_true", help="run nothing")
    options = parser.parse_args()
    if not options.tables:
        run(options)
    if read():
        (RESULTS / "healing.md").write_text(table(read()), encoding="utf-8")


def run(options: argparse.Namespace) -> None:
    dense = whole(options)
    tokenizer = tokenizer_of(dense)
    windows = evaluation_texts(tokenizer, options.seq_length, options.windows)
    documents = read_documents("demo:calibration")
    text: TrainingText | None = None
    expected: dict[str, float] = {}
    for name, (recipe, settings) in CASES.items():
        model = name if options.model == "demo" else f"{name}, {Path(options.model).name}"
        model = model if options.blocks is None else f"{model}, {options.blocks} blocks"
        key = key_of(model, options)
        if (options.only and not {recipe, name} & set(options.only)) or any(
            key.items() <= row.items() for row in read()
        ):
            continue
        if text is None:
            text = own_text(dense, documents, options) if options.own_text else others(tokenizer, documents, options)
            expected = score(dense, windows)
        place = options.work / f"{_plain(model)}-{options.effort}-{options.prune_generated}-{options.seed}"
        student = pruned(place, recipe, {**settings, "seed": options.seed}, documents, options)
        row = {**key, **healed(student, dense, text, windows, expected, place, options), "machine": machine()}
        RESULTS.mkdir(exist_ok=True)
        # Read again: another run of this script may have added rows meanwhile.
        data = json.dumps({"rows": [*read(), row]}, indent=1) + "\n"
        (RESULTS / "healing.json").write_text(data, encoding="utf-8")
        print(row, flush=True)


def key_of(model: str, options: argparse.Namespace) -> dict[str, Any]:
    """What decides a row."""
    return {
        "model": model,
        "effort": options.effort,
        "pruned by generated": options.prune_generated,
        "tokens": options.samples * options.seq_length if options.own_text else options.tokens,
        "learning rate": options.learning_rate,
        "batch": options.batch_size,
        "seed": options.seed,
        "evaluated": options.windows * options.seq_length,
        "text": "its own" if options.own_text else DEFAULTS["text"],
        "epochs": options.epochs,
        "generated": options.generated,
        "piece": PIECE if options.generated else 0,
        "dtype": options.dtype,
        "embeddings": "kept" if options.keep_embeddings else "trained",
    }


def others(tokenizer: Tokenizer, documents: list[Document], options: argparse.Namespace) -> TrainingText:
    """Windows of the articles, and of others to hold out."""
    return split_held_out(
        documents,
        lambda some: tokenise(tokenizer, some),
        tokens=options.tokens,
        most=options.tokens,
        seq_length=options.seq_length,
        batch_size=options.batch_size,
        held_out=options.held_out,
        seed=options.seed,
        begin=begin_tokens(tokenizer),
    )


def own_text(dense: LoadedModel, documents: list[Document], options: argparse.Namespace) -> TrainingText:
    """The windows that the model is pruned by, and what is held out: their last eighth.

    Where the dense model writes windows, others that it writes are held out: pruning has fitted its own text.
    """
    tokenizer, at_once = tokenizer_of(dense), options.batch_size * options.seq_length
    tokens, begin = tokenise(tokenizer, documents), begin_tokens(tokenizer)
    drawn = list[Tensor](calibration_batches(tokens, options.samples, options.seq_length, options.seed, at_once, begin))
    if options.generated:
        held_out = generated_windows(dense.model, drawn, options.held_out, seed=options.seed + 1)
        return TrainingText(drawn, held_out, 0)  # type: ignore[arg-type]  # of whole numbers
    batches, apart = hold_out(drawn, 1 / 8)
    fitted, held_out = batches[:-apart], torch.cat(batches[-apart:])
    return TrainingText(fitted, held_out, 0)  # type: ignore[arg-type]


def whole(options: argparse.Namespace) -> LoadedModel:
    """The dense model, or its first blocks."""
    loaded = load_model(options.model, dtype="float32")
    if options.blocks is not None:
        loaded.model.model.layers = loaded.model.model.layers[: options.blocks]  # type: ignore[union-attr,index]
        loaded.model.config.num_hidden_layers = options.blocks
    return loaded


def pruned(
    place: Path, recipe: str, settings: dict[str, Any], documents: list[Document], options: argparse.Namespace
) -> LoadedModel:
    """The pruned model, in its folder from now on."""
    folder = place / "pruned"
    if not folder.exists():
        loaded = whole(options)
        tokenizer = tokenizer_of(loaded)
        tokens, begin = tokenise(tokenizer, documents), begin_tokens(tokenizer)
        drawn = calibration_batches(tokens, options.samples, options.seq_length, options.seed, begin=begin)
        chosen = load_recipe(recipe, settings, effort=options.effort)
        batches = with_written(loaded.model, drawn, options.prune_generated, chosen)
        report = prune(loaded.model, batches, chosen)
        save_model(loaded, folder, report=report, recipe=chosen, check_tokens=batches[0][:1])
    return load_model(folder, dtype="float32")


def healed(
    student: LoadedModel,
    dense: LoadedModel,
    text: TrainingText,
    windows: dict[str, Tensor],
    expected: dict[str, float],
    place: Path,
    options: argparse.Namespace,
) -> dict[str, Any]:
    """Heal a pruned model: what it was before, what it is after."""
    before = score(student, windows)
    kept = zeros(student)
    kind = f"own-{options.epochs}" if options.own_text else f"{options.tokens}-{options.epochs}"
    sizes = f"{options.generated}-{options.learning_rate}-{options.batch_size}-{options.seed}-{options.dtype}"
    tables = "-kept" if options.keep_embeddings else ""
    folder = HealingFolder(place / f"{kind}-{sizes}{tables}.run", resume=True)
    batches, writing = written(dense, text.batches, kind, options)
    report = heal(
        student.model,
        dense.model,
        batches,
        held_out=text.held_out,
        settings=HealingSettings(
            learning_rate=options.learning_rate,
            seed=options.seed,
            epochs=options.epochs,
            dtype=options.dtype,
            embeddings=not options.keep_embeddings,
        ),
        folder=folder,
        on_event=tell,
    )
    after = score(student, windows)
    folder.discard()
    found: dict[str, Any] = {}
    for name in TEXTS:
        excess = before[name] - expected[name]
        lost = (before[name] - after[name]) / excess if excess > 0 else None
        values = expected[name], before[name], after[name], lost
        found |= dict(
            zip((f"{name}, {what}" for what in ("dense", "pruned", "healed", "excess lost")), values, strict=True)
        )
    now = zeros(student)
    same = now.keys() == kept.keys() and all(torch.equal(now[name], mask) for name, mask in kept.items())
    return {
        **found,
        "divergence, pruned": report.before.divergence,
        "divergence, healed": report.after.divergence,
        "zeros and widths the same": same,
        "steps": f"{report.after.step} of {report.steps_planned}",
        "seconds of pruning": read_report(place / "pruned").seconds,
        "seconds": report.seconds + writing,
    }


def written(
    dense: LoadedModel, batches: Sequence[Tensor], kind: str, options: argparse.Namespace
) -> tuple[Sequence[Tensor], float]:
    """The batches with windows that the dense model writes, which rows share as a file, and the seconds of writing."""
    if not options.generated:
        return batches, 0.0
    name = f"{kind}-{options.generated}-{options.samples}-{options.seq_length}-{PIECE}-{options.seed}.json"
    file = options.work / f"written-{Path(options.model).name}-{name}"
    if not file.exists():
        began = time.perf_counter()
        windows = generated_windows(dense.model, batches, options.generated, seed=options.seed)
        data = {"seconds": time.perf_counter() - began, "windows": windows.tolist()}
        options.work.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(data), encoding="utf-8")
    data = json.loads(file.read_text(encoding="utf-8"))
    return mixed(batches, torch.tensor(data["windows"]), options.seed), data["seconds"]


def zeros(loaded: LoadedModel) -> dict[str, Tensor]:
    """Which linear weights of the blocks are zero, by layer; embeddings of a file in 8 bits have zeros by chance."""
    decoder = loaded.decoder()
    places = [(block, path) for block in range(len(decoder.blocks)) for path in decoder.paths(block)]
    return {decoder.name(*place): decoder.layer(*place).weight.detach() == 0 for place in places}


def _plain(name: str) -> str:
    """Return a name for a folder."""
    return name.replace(" ", "-").replace("%", "").replace(",", "").replace(":", "-")


def tell(event: Event) -> None:
    if isinstance(event, DivergenceMeasured):
        print(f"  step {event.step} of {event.steps}: divergence {event.divergence:.4f} held out", flush=True)


def score(loaded: LoadedModel, windows: dict[str, Tensor]) -> dict[str, float]:
    return {text: perplexity(loaded.model, ids).perplexity for text, ids in windows.items()}


def read() -> list[dict[str, Any]]:
    file = RESULTS / "healing.json"
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"] if file.exists() else []
    return [row | {key: value for key, value in DEFAULTS.items() if key not in row} for row in rows]


def table(rows: list[dict[str, Any]]) -> str:
    machines = sorted({row["machine"] for row in rows})
    order = dict.fromkeys(key for row in reversed(rows) for key in row)  # the last row has all fields
    shown = [{key: _shown(key, row.get(key)) for key in order if key != "machine"} for row in rows]
    parts = ["# Healing", "", "`python -m benchmarks.healing`", "", *machines, "", markdown(shown)]
    return "\n".join(parts)


def _shown(key: str, value: Any) -> Any:
    if key.endswith("excess lost") and value is not None:
        return f"{value:.0%}"
    return f"{value:g}" if key == "learning rate" else value


if __name__ == "__main__":
    main()
