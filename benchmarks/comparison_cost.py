"""What a comparison costs beside its runs alone: four recipes and three sparsities, whole commands of one thread.

    .venv/bin/python -m benchmarks.comparison_cost --demo --policies recipe
    .venv/bin/python -m benchmarks.comparison_cost --policies recipe dense
    .venv/bin/python -m benchmarks.comparison_cost --demo --blocks 4 --samples 8 --alone 0.2

Alone, each of the twelve models is what `optprune prune` makes, and is evaluated by `optprune evaluate --against` the
dense one: both commands import, load and tokenise, the first saves a folder and checks it in a fresh process, the
second goes through both models. `optprune compare` gives the same figures of the same models by one command, which
saves none of them. The seconds are those of the processor, with those of the processes that a command waits for: they
do not depend on what else the machine does. With `--alone 0.2` only the runs at that sparsity are made alone, and the
others are taken to cost as much. The policy "recipe" is what each recipe says. The model is a random Llama
with the proportions of SmolLM2-135M, or that model or its first blocks (`--demo`).
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import write_table
from benchmarks.tiny_models import randomise
from benchmarks.train_small import new_tokenizer
from optprune.export import save_model
from optprune.models import load_model
from optprune.texts import demo_articles

RECIPES = ("structured_best", "structured_uniform_best", "fasp", "flap")
SPARSITIES = ("0.1", "0.2", "0.3")
VOCABULARY = 4096
OWN = "recipe"
"""the policy of each recipe's own"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--blocks", type=int, help="default: all of the demo's, and 8 of the random model")
    parser.add_argument("--width", type=int, default=256, help="of the hidden states of the random model")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--alone", nargs="+", default=list(SPARSITIES), choices=SPARSITIES)
    parser.add_argument("--policies", nargs="+", default=[OWN, "dense"])
    parser.add_argument("--name", default="comparison_cost", help="of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows = list[dict[str, Any]]()
    with tempfile.TemporaryDirectory() as place:
        model = Path(place) / "model"
        save_demo(model, options.blocks) if options.demo else save_random(model, options.blocks or 8, options.width)
        for policy in options.policies:
            rows += compared(model, policy, options, Path(place) / policy)
            print(write_table(options.name, "A comparison beside its runs alone, processor seconds", rows), flush=True)


def save_demo(folder: Path, blocks: int | None) -> None:
    """The demo's model as a folder, or its first blocks."""
    loaded = load_model("demo", device="cpu")
    model: Any = loaded.model
    model.model.layers = model.model.layers[:blocks]
    model.config.num_hidden_layers = len(model.model.layers)
    save_model(model, folder, tokenizer=loaded.tokenizer)


def save_random(folder: Path, blocks: int, width: int) -> None:
    """With the proportions of SmolLM2-135M, but for the vocabulary."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=width,
        intermediate_size=width * 8 // 3 // 64 * 64,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        num_key_value_heads=max(1, width // 96),
        head_dim=32,
        tie_word_embeddings=True,
    )
    words = new_tokenizer(demo_articles("calibration"), VOCABULARY).backend_tokenizer.to_str()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer.from_str(words), bos_token="<s>", eos_token="</s>")
    save_model(randomise(LlamaForCausalLM(config), 0).eval(), folder, tokenizer=tokenizer)


def compared(model: Path, policy: str, options: argparse.Namespace, place: Path) -> list[dict[str, Any]]:
    """The rows of a policy: each recipe's runs alone, and what all of them take in one command."""
    shared = ["--calibration", "demo:calibration", "--samples", str(options.samples)]
    shared += ["--seq-length", str(options.seq_length), *([] if policy == OWN else ["--propagation", policy])]
    text = ["--text", "demo:evaluation", "--windows", str(options.windows)]
    alone = {recipe: runs_alone(model, recipe, shared, text, options, place) for recipe in options.recipes}
    asked = ["--recipes", ",".join(options.recipes), "--sparsities", ",".join(SPARSITIES)]
    whole = seconds(["compare", str(model), *asked, *shared, *text, "--output", str(place / "comparison")])
    cells = json.loads((place / "comparison" / "comparison.json").read_text(encoding="utf-8"))["cells"]
    total = sum(map(sum, alone.values()))
    fixed = {"policy": policy, "tokens": options.samples * options.seq_length}
    rows = [
        {
            **fixed,
            "recipe": recipe,
            "prune alone": pruning,
            "evaluate alone": evaluating,
            "in compare": sum(cell["spent"] for cell in cells if cell["cell"]["recipe"] == recipe),
            "": "pruning only",
        }
        for recipe, (pruning, evaluating) in alone.items()
    ]
    sums = {"prune alone": sum(p for p, _ in alone.values()), "evaluate alone": sum(e for _, e in alone.values())}
    rows.append({**fixed, "recipe": "all", **sums, "in compare": whole, "": f"{whole / total:.0%} of the runs alone"})
    return rows


def runs_alone(
    model: Path, recipe: str, shared: list[str], text: list[str], options: argparse.Namespace, place: Path
) -> tuple[float, float]:
    """The seconds of pruning by a recipe at every sparsity, and of evaluating, by the runs that are made."""
    pruning = evaluating = 0.0
    for sparsity in options.alone:
        output = place / f"{recipe}-{sparsity}"
        asked = ["--recipe", recipe, "--sparsity", sparsity, *shared, "--output", str(output)]
        pruning += seconds(["prune", str(model), *asked])
        lengths = ["--seq-length", str(options.seq_length)]
        evaluating += seconds(["evaluate", str(output), "--against", str(model), *text, *lengths])
    every = len(SPARSITIES) / len(options.alone)
    print(recipe, "alone", f"{pruning * every:.1f} {evaluating * every:.1f}", flush=True)
    return pruning * every, evaluating * every


def seconds(words: list[str]) -> float:
    """The processor seconds of a command."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    run = subprocess.run(
        [sys.executable, "-m", "optprune", *words], capture_output=True, text=True, check=False, env=environment
    )
    if run.returncode:
        raise SystemExit(f"optprune {' '.join(words)}: {run.stderr}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
