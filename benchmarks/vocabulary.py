"""A smaller vocabulary: bits per byte of held-out news, with and without refitted rows.

    python -m benchmarks.vocabulary --pieces 30 --tokens 16384

SmolLM2-135M-Instruct. Tokens are chosen on one half of the news articles, and rows are refitted on windows of it. The
other half is cut into pieces of 1500 characters, of which `--pieces` are drawn; each is predicted alone, without its
first token. Rows are written as they are measured.
"""

import argparse
import math
import random
import time
from typing import Any

import torch

from benchmarks.common import tokenizer_of, with_earlier, write_table
from optprune.models import LoadedModel, load_model
from optprune.texts import demo_articles, read_texts
from optprune.tokens import prune_vocabulary

PIECE = 1500
"""the characters of a piece of text"""


def pieces(count: int, seed: int) -> list[str]:
    """Return pieces of held-out articles in a random order."""
    articles = demo_articles("evaluation")
    found = [text[first : first + PIECE] for text in articles for first in range(0, len(text) - PIECE // 2, PIECE)]
    random.Random(seed).shuffle(found)
    return found[:count]


@torch.no_grad()
def measured(loaded: LoadedModel, texts: list[str]) -> dict[str, float | int]:
    """Return the bits per byte of texts, each predicted alone, and the number of their tokens."""
    tokenizer, nats, tokens = tokenizer_of(loaded), 0.0, 0
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        scores = loaded.model(input_ids=ids, use_cache=False).logits[0, :-1].float().log_softmax(-1)
        nats -= float(scores.gather(1, ids[0, 1:, None]).double().sum())
        tokens += ids.numel()
    return {"bits per byte": nats / math.log(2) / sum(len(text.encode()) for text in texts), "tokens written": tokens}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[32768, 24576])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--pieces", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    texts, held_out = read_texts("demo:calibration"), pieces(options.pieces, options.seed)
    rows = list[dict[str, Any]]()

    def add(keep: int, refitted: int, parameters: int, seconds: float, loaded: LoadedModel) -> None:
        row = {"vocabulary": keep, "refitted on": refitted, "parameters": parameters, **measured(loaded, held_out)}
        dense = rows[0]["bits per byte"] if rows else row["bits per byte"]
        rows.append({**row, "over dense": f"{row['bits per byte'] / dense - 1:+.2%}", "seconds": round(seconds)})
        size = sum(len(text.encode()) for text in held_out)
        title = f"Smaller vocabularies of SmolLM2-135M-Instruct on {size} bytes of held-out news, seed {options.seed}"
        write_table("vocabulary", title, with_earlier("vocabulary", rows, ["vocabulary", "refitted on"]))
        print(rows[-1], flush=True)

    dense = load_model("demo")
    add(len(tokenizer_of(dense)), 0, dense.model.num_parameters(), 0.0, dense)
    for keep in options.keep:
        for tokens in (0, options.tokens):
            began = time.perf_counter()
            loaded, change = prune_vocabulary(load_model("demo"), texts, keep, tokens=tokens)
            print(change.in_words(), flush=True)
            parameters = dense.model.num_parameters() - change.parameters_removed
            add(keep, change.tokens, parameters, time.perf_counter() - began, loaded)


if __name__ == "__main__":
    main()
