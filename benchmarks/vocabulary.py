"""A smaller vocabulary: bits per byte of held-out news, with and without refitted rows, and healed.

    python -m benchmarks.vocabulary --pieces 40 --tokens 0 --heal 98304 --keep 32768

SmolLM2-135M-Instruct. Tokens are chosen on one half of the news articles, rows are refitted on windows of it, and the
last model of each vocabulary is healed on the windows of it with the most pieces of removed tokens, in bfloat16, by
the dense model's predictions pushed forward, with embedding and head as they are. The other half is cut into pieces
of 1500 characters, of which `--pieces` are drawn; each is predicted alone, without its first token. Rows are written
as they are measured.
"""

import argparse
import math
import random
import time
from typing import Any

import torch

from benchmarks.common import tokenizer_of, with_earlier, write_table
from optprune.healing import HealingSettings, heal
from optprune.healing.heal import precision_of
from optprune.models import LoadedModel, load_model
from optprune.report import DivergenceMeasured, Event
from optprune.texts import begin_tokens, demo_articles, read_documents, read_texts, split_held_out, tokenise
from optprune.tokens import PushedTeacher, SmallerVocabulary, prune_vocabulary

KEY = ["vocabulary", "predictions", "refitted on", "healed on"]
PIECE = 1500
"""the characters of a piece of text"""
LENGTH = 96
"""the tokens of a window that a model is healed on"""


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


def healed(loaded: LoadedModel, dense: LoadedModel, tokens: int, rate: float) -> int:
    """Heal a model with fewer tokens in place, and return the number of tokens that it was trained on."""
    smaller = SmallerVocabulary.between(tokenizer_of(dense), tokenizer_of(loaded))
    assert smaller is not None
    settings = HealingSettings(learning_rate=rate, dtype="bfloat16", every=16, embeddings=False)
    teacher = PushedTeacher(dense.model, smaller=smaller, precision=precision_of(settings, dense.model.device))
    documents, tokenizer = read_documents("demo:calibration"), tokenizer_of(loaded)
    sizes: dict[str, Any] = {
        "seq_length": LENGTH,
        "batch_size": 16,
        "held_out": 96,
        "tokens": tokens,
        "most": tokens,
        "seed": 0,
    }
    text = split_held_out(
        documents,
        lambda some: tokenise(tokenizer, some),
        **sizes,
        worth=teacher.push.inside,
        begin=begin_tokens(tokenizer),
    )

    def show(event: Event) -> None:
        if isinstance(event, DivergenceMeasured):
            print(event, flush=True)

    report = heal(loaded.model, teacher, text.batches, held_out=text.held_out, settings=settings, on_event=show)
    return report.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keep", type=int, nargs="+", default=[32768, 24576])
    parser.add_argument("--tokens", type=int, default=32768)
    parser.add_argument("--heal", type=int, default=0, help="tokens to heal on; 0 heals nothing")
    parser.add_argument("--learning-rate", type=float, default=2e-4)
    parser.add_argument("--predictions", type=int, default=65536, help="tokens whose predictions count in the choice")
    parser.add_argument("--pieces", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    texts, held_out = read_texts("demo:calibration"), pieces(options.pieces, options.seed)
    rows = list[dict[str, Any]]()

    def add(keep: int, refitted: int, healed: int, parameters: int, seconds: float, loaded: LoadedModel) -> None:
        row = {"vocabulary": keep, "predictions": options.predictions if rows else 0}
        row |= {"refitted on": refitted, "healed on": healed, "parameters": parameters}
        row |= measured(loaded, held_out)
        dense = rows[0]["bits per byte"] if rows else row["bits per byte"]
        rows.append({**row, "over dense": f"{row['bits per byte'] / dense - 1:+.2%}", "seconds": round(seconds)})
        size = sum(len(text.encode()) for text in held_out)
        title = f"Smaller vocabularies of SmolLM2-135M-Instruct on {size} bytes of held-out news, seed {options.seed}"
        write_table("vocabulary", title, with_earlier("vocabulary", rows, KEY))
        print(rows[-1], flush=True)

    dense = load_model("demo")
    add(len(tokenizer_of(dense)), 0, 0, dense.model.num_parameters(), 0.0, dense)
    for keep in options.keep:
        for tokens in dict.fromkeys((0, options.tokens)):
            began = time.perf_counter()
            loaded, change = prune_vocabulary(
                load_model("demo"), texts, keep, tokens=tokens, predictions=options.predictions
            )
            print(change.in_words(), flush=True)
            parameters = dense.model.num_parameters() - change.parameters_removed
            add(keep, change.tokens, 0, parameters, time.perf_counter() - began, loaded)
        if options.heal:
            began = time.perf_counter()
            trained = healed(loaded, dense, options.heal, options.learning_rate)
            add(keep, change.tokens, trained, parameters, time.perf_counter() - began, loaded)


if __name__ == "__main__":
    main()
