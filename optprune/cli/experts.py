"""optprune experts: measure which experts of a mixture serve which text."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.choices import check_choices
from optprune.cli.options import Device, Dtype, JsonFile, Model, Sequences
from optprune.cli.outputs import check_distinct, check_file, check_json, echo, start, write_file, write_json
from optprune.cli.tokens import tokenizer_of
from optprune.errors import InputError, check_at_least
from optprune.system.files import MARK, json_text
from optprune.system.wording import counted, either, shown

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from optprune.calibration import UseByText

MOST_BLOCKS = 6
"""the largest number of blocks of which experts are listed in a line"""


def experts_command(
    model: Model,
    texts: Annotated[
        list[str],
        typer.Option(
            "--text",
            metavar="NAME=TEXT",
            help="A name of your own and a text, in the forms of --calibration of optprune prune; may be repeated.",
        ),
    ],
    samples: Annotated[int, typer.Option("--samples", help="Number of windows of each text.")] = 128,
    seq_length: Annotated[int, typer.Option("--seq-length", help="Tokens in a window.")] = 2048,
    sequences: Sequences = "packed",
    seed: Annotated[int, typer.Option("--seed", help="Seed of the windows.")] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    scores: Annotated[
        Path | None,
        typer.Option("--scores", metavar="FILE", help="Write scores for --expert-scores of optprune prune as JSON."),
    ] = None,
    by: Annotated[
        str,
        typer.Option(
            "--by",
            help="The scores to write: reap (the score of REAP), share (of the tokens that an expert gets) or weight "
            "(its mean routing weight).",
        ),
    ] = "reap",
    of: Annotated[
        str | None,
        typer.Option("--of", metavar="NAME", help="The text whose scores are written. [default: all together]"),
    ] = None,
    json_file: JsonFile = None,
) -> None:
    """Measure which experts of a mixture serve which text, and print which of them one text or none uses.

    All texts go through the dense model once, a block at a time. --json has the share of the tokens, the mean routing
    weight and the score by REAP of every expert for every text.
    """
    check_choices(by=by, sequences=sequences, dtype=dtype)
    named = _named(texts)
    reporter = start()
    from optprune.calibration import expert_use
    from optprune.models import check_dtype, device_of, load_config, load_shapes, open_model
    from optprune.models.store import NullSink
    from optprune.pruning.run import place_for
    from optprune.solvers import GivenScores

    if of is not None and of not in named:
        raise InputError(f"--of cannot be {shown(of)}: use {either(tuple(named))}")
    check_at_least("--samples", samples, 1)
    check_at_least("--seq-length", seq_length, 2)
    check_dtype(dtype)
    device_of(device)
    check_json(json_file, models=[model], inputs=named.values())
    check_file(scores, "file of expert scores", models=[model], inputs=named.values())
    check_distinct(json_file, scores)
    config = load_config(model)
    if not any(shape.experts for shape in load_shapes(model, config).shapes()):
        raise InputError(f"{model} has no experts: give a mixture of experts")
    batches = _batches(model, config, named, samples, seq_length, seed=seed, sequences=sequences)
    reporter.say(f"loading {model}")
    decoder = open_model(model, sink=NullSink(), dtype=dtype, device=device).decoder()
    decoder.states = place_for("auto", decoder, [batch for own in batches.values() for batch in own], None)
    with reporter.count("passing the texts", "block") as update:
        found = expert_use(decoder, batches, update)
    windows = f"{counted(samples, 'window')} of {seq_length} tokens, seed {seed}"
    about = {"model": model, "texts": dict(named), "windows": windows}
    write_json(json_file, json_text({**about, **found.to_dict()}), "nothing else is written")
    whose = ", ".join([of] if of is not None else found.texts)
    chosen = GivenScores(found.scores(by, of)).to_json(f"{by} of {model} on {whose}, {windows} of each text, {MARK}")
    write_file(scores, chosen.encode(), "file of expert scores", "the rest is written")
    for line in lines(found):
        echo(line)


def _named(texts: Sequence[str]) -> dict[str, str]:
    """Return the texts by name."""
    found: dict[str, str] = {}
    for spec in texts:
        name, equals, text = spec.partition("=")
        if not equals or not text or not re.fullmatch(r"\w[\w-]{0,39}", name):
            raise InputError(
                f"--text {shown(spec)} is not of the form NAME=TEXT with a name of letters and digits, such as "
                "code=code.jsonl:text"
            )
        if name in found:
            raise InputError(f"two texts are called {name}: give each a name of its own")
        found[name] = text
    return found


def _batches(
    model: str,
    config: "PretrainedConfig",
    named: Mapping[str, str],
    samples: int,
    seq_length: int,
    *,
    seed: int,
    sequences: str,
) -> "dict[str, Sequence[Tensor]]":
    """Return the windows of each text as batches."""
    from optprune.texts import check_vocabulary, draw_windows, read_texts

    read = {name: read_texts(text) for name, text in named.items()}
    found: dict[str, Sequence[Tensor]] = {}
    with tokenizer_of(model) as tokenizer:
        for name, texts in read.items():
            found[name] = draw_windows(tokenizer, texts, samples, seq_length, seed, sequences=sequences).batches
    for batch in (batch for own in found.values() for batch in own):
        check_vocabulary(config, batch.flatten())
    return found


def lines(found: "UseByText") -> list[str]:
    """Return what matters of the use of experts, for a terminal."""
    every, several = found.experts, len(found.texts) > 1
    wide = max(len(text) for text in found.texts)
    rows = [
        f"{'text':<{wide}}  {'tokens':>9}  {'experts used':>16}" + ("  by no other text" if several else ""),
    ]
    for text in found.texts:
        tokens = next(iter(found.blocks.values()))[text].tokens
        used = f"{_count(found.used(text))} of {every}"
        alone = f"  {_count(found.used_only(text)):>16}" if several else ""
        rows.append(f"{text:<{wide}}  {tokens:>9}  {used:>16}{alone}")
    rows.append("used: with at least a tenth of an even share of the text's tokens")
    for text in found.texts if several else ():
        if only := found.used_only(text):
            rows.append(f"used by {text} alone: {_listed(only)}")
    if unused := found.unused():
        rows.append(f"used by no text, {_count(unused)} of {every}: {_listed(unused)}")
    for one, other in combinations(found.texts, 2):
        overlap = found.overlap(one, other)
        least = min(overlap, key=lambda block: overlap[block])
        rows.append(
            f"{one} and {other}: {sum(overlap.values()) / len(overlap):.0%} of the routers' choices are alike, in "
            f"block {least} {overlap[least]:.0%}"
        )
    return rows


def _count(experts: Mapping[int, Sequence[int]]) -> int:
    return sum(map(len, experts.values()))


def _listed(experts: Mapping[int, Sequence[int]]) -> str:
    """Return the experts of the blocks that have most of them, by block."""
    most = sorted(sorted(experts, key=lambda block: -len(experts[block]))[:MOST_BLOCKS])
    shown = "; ".join(f"block {block}: {', '.join(map(str, experts[block]))}" for block in most)
    left = len(experts) - len(most)
    return shown + (f"; and in {counted(left, 'more block')} (--json has all)" if left else "")
