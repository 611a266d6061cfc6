"""What a comparison costs beside its runs alone: four recipes and three sparsities, in processor seconds of one thread.

    .venv/bin/python -m benchmarks.comparison_cost
    .venv/bin/python -m benchmarks.comparison_cost --policies dense --blocks 4
    .venv/bin/python -m benchmarks.comparison_cost --demo --blocks 2

Alone, each of the twelve models is pruned without statistics and evaluated beside the dense model, which is gone
through again; `compare` does both for all of them. Loading and tokenising are in neither, nor saving, which only a
run alone does. The model is a random Llama with the proportions of SmolLM2-135M, or the first blocks of that
(`--demo`). Processor seconds do not depend on what else the machine does.
"""

import argparse
import copy
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.common import write_table
from benchmarks.tiny_models import randomise
from benchmarks.train_small import new_tokenizer
from optprune import load_recipe, prune
from optprune.comparison import compare
from optprune.measure import divergence_from
from optprune.models import LoadedModel, load_model, need_tokenizer
from optprune.texts import calibration_batches, demo_articles, evaluation_windows, read_documents, tokenise

RECIPES = ("fasp", "wanda", "alps", "structured_best")
SPARSITIES = (0.1, 0.2, 0.3)
VOCABULARY = 4096
CALIBRATION, TEXT = "demo:calibration", "demo:evaluation"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", action="store_true")
    parser.add_argument("--blocks", type=int, default=8)
    parser.add_argument("--width", type=int, default=256, help="of the hidden states of the random model")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--recipes", nargs="+", default=list(RECIPES))
    parser.add_argument("--policies", nargs="+", default=["pruned", "dense"])
    parser.add_argument("--name", default="comparison_cost", help="of the table")
    options = parser.parse_args()
    torch.set_num_threads(1)
    loaded = demo(options.blocks) if options.demo else random_model(options.blocks, options.width)
    rows = []
    for policy in options.policies:
        alone = runs_alone(loaded, policy, options)
        shared = in_comparison(loaded, policy, options)
        total, whole = sum(map(sum, alone.values())), sum(shared.values())
        for recipe in options.recipes:
            pruned, evaluated = alone[recipe]
            rows.append(row(policy, recipe, pruned + evaluated, shared[recipe], f"evaluating alone {evaluated:.1f}"))
        rows.append(row(policy, "the dense model, measured", 0.0, shared["measuring"]))
        rows.append(row(policy, "the dense model, evaluated", 0.0, shared["evaluating"]))
        rows.append(row(policy, "table, picture, digest", 0.0, shared["rest"]))
        rows.append(row(policy, "all", total, whole, f"{whole / total:.0%} of the runs alone"))
        print(json.dumps(rows[-1]), flush=True)
    print(write_table(options.name, "A comparison beside its runs alone, processor seconds", rows))


def row(policy: str, what: str, alone: float, shared: float, note: str = "") -> dict[str, Any]:
    return {"policy": policy, "what": what, "alone": round(alone, 2), "in compare": round(shared, 2), "": note}


def demo(blocks: int) -> LoadedModel:
    loaded = load_model("demo", device="cpu")
    loaded.model.model.layers = loaded.model.model.layers[:blocks]
    loaded.model.config.num_hidden_layers = blocks
    return loaded


def random_model(blocks: int, width: int) -> LoadedModel:
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
    return LoadedModel(randomise(LlamaForCausalLM(config), 0).eval(), tokenizer, "random Llama")


def settings_of(policy: str) -> dict[str, Any]:
    return {"propagation": policy}


def runs_alone(loaded: LoadedModel, policy: str, options: argparse.Namespace) -> dict[str, tuple[float, float]]:
    """The seconds of pruning and of evaluating by recipe, over the sparsities."""
    tokenizer = need_tokenizer(loaded.tokenizer, loaded.source)
    tokens, told = (tokenise(tokenizer, read_documents(text)) for text in (CALIBRATION, TEXT))
    windows = evaluation_windows(told, options.seq_length, options.windows)
    found = {}
    for name in options.recipes:
        pruned = evaluated = 0.0
        for sparsity in SPARSITIES:
            recipe = load_recipe(name, {"sparsity": sparsity, **settings_of(policy)})
            batches = calibration_batches(tokens, options.samples, options.seq_length, recipe.seed)
            model, began = copy.deepcopy(loaded.model), time.process_time()
            prune(model, batches, recipe)
            between = time.process_time()
            divergence_from(model, loaded.model, windows)
            pruned, evaluated = pruned + between - began, evaluated + time.process_time() - between
        found[name] = pruned, evaluated
        print(policy, name, "alone", found[name], flush=True)
    return found


def in_comparison(loaded: LoadedModel, policy: str, options: argparse.Namespace) -> dict[str, float]:
    """The seconds of the parts of a comparison, by what it says when each of them begins and ends."""
    parts: dict[str, float] = dict.fromkeys([*options.recipes, "measuring", "evaluating", "rest"], 0.0)
    last, doing = time.process_time(), "tokenising"

    def say(text: str) -> None:
        nonlocal last, doing
        now = time.process_time()
        # A cell is told when it is done, anything else when it begins.
        ended = next((name for name in options.recipes if text.startswith(f"{name} at ")), doing)
        if ended in parts:
            parts[ended] += now - last
        begun = ("tokenising", "measuring", "evaluating")
        last, doing = now, next((part for part in begun if text.startswith(part)), "rest")

    with tempfile.TemporaryDirectory() as folder:
        found = compare(
            loaded,
            options.recipes,
            SPARSITIES,
            calibration=CALIBRATION,
            text=TEXT,
            samples=options.samples,
            seq_length=options.seq_length,
            windows=options.windows,
            settings=settings_of(policy),
            folder=Path(folder) / "comparison",
            say=say,
        )
    parts["rest"] += time.process_time() - last
    if found.failures:
        raise SystemExit("\n".join(found.failures))
    print(found, flush=True)
    return parts


if __name__ == "__main__":
    main()
