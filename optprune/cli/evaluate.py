"""optprune evaluate: what a model predicts on a text, by itself and beside the dense model."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from optprune.cli.options import Device, Dtype, JsonFile, Model, SeqLength
from optprune.cli.outputs import check_json, start, write_json
from optprune.cli.tokens import tokens_for
from optprune.errors import InputError
from optprune.system.files import json_text

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from optprune.measure import Divergence, Evaluation, Question
    from optprune.models import LoadedModel
    from optprune.report.progress import Reporter

PROMPT = 32
"""how many tokens of a window a generation goes on from"""


def evaluate_command(
    model: Model,
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="FILE.txt, FILE.jsonl[:COLUMN], FILE.csv[:COLUMN], a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, "
            "or demo:evaluation.",
        ),
    ],
    seq_length: SeqLength = 2048,
    windows: Annotated[int | None, typer.Option("--windows", help="How many windows. [default: all]")] = None,
    against: Annotated[
        str | None,
        typer.Option("--against", metavar="DENSE", help="The model before pruning, to compare with."),
    ] = None,
    questions: Annotated[
        Path | None,
        typer.Option("--questions", metavar="FILE.jsonl", help="Multiple choice: question, choices, answer in a line."),
    ] = None,
    generations: Annotated[
        int, typer.Option("--generations", help="How many greedy continuations of the text to show.")
    ] = 0,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: JsonFile = None,
) -> None:
    """Measure a model's perplexity: the text joined, tokenised once, cut into consecutive windows.

    Against the dense model also the divergence of the predictions in nats, and how often the first choice agrees.
    """
    reporter = start()
    from optprune.measure import read_questions
    from optprune.models import check_dtype, device_of

    check_json(json_file, models=[model, *([] if against is None else [against])])
    check_dtype(dtype)
    device_of(device)
    check_generations(generations)
    asked = [] if questions is None else read_questions(questions)
    beside = Beside.loaded_for(reporter, model, against, text, seq_length, windows, device=device, dtype=dtype)
    result, lines = beside.measured(asked, generations)
    write_json(json_file, json_text(result), f"the perplexity is {result['perplexity']:.4f}")
    for line in lines:
        typer.echo(line)


def check_generations(count: int) -> None:
    """Raise InputError when there cannot be so many continuations."""
    if count < 0:
        raise InputError(f"--generations cannot be {count}: it is at least 0")


@dataclass(frozen=True)
class Beside:
    """A model, and the dense one if it is named; each measure gives what goes into the JSON file, and lines to read."""

    reporter: "Reporter"
    loaded: "LoadedModel"
    dense: "LoadedModel | None"
    windows: "Tensor"
    text: str

    @classmethod
    def loaded_for(
        cls,
        reporter: "Reporter",
        model: str,
        against: str | None,
        text: str,
        seq_length: int,
        windows: int | None,
        *,
        device: str,
        dtype: str,
    ) -> "Beside":
        """Both models and the windows of a text; InputError, before either is loaded, where they do not go together."""
        from optprune.models import load_config
        from optprune.texts import check_seq_length, evaluation_windows, read_documents

        documents = read_documents(text)
        config = load_config(model)
        check_seq_length(config, seq_length)
        reporter.say(f"tokenising {text}")
        most = None if windows is None else max(windows, 1) * seq_length
        tokens = tokens_for(model, config, documents, most)
        if against is not None:
            _check_alike(model, config, against, tokens, lambda other: tokens_for(against, other, documents, most))
        ids = evaluation_windows(tokens, seq_length, windows)
        loaded, *others = [_loaded(reporter, name, dtype, device) for name in (model, against) if name is not None]
        return cls(reporter, loaded, others[0] if others else None, ids, text)

    def measured(self, questions: "list[Question]", generations: int) -> tuple[dict[str, Any], list[str]]:
        """All of it: what the JSON file holds, and lines to read."""
        from optprune.measure import bits_per_byte
        from optprune.models import need_tokenizer

        model, seq_length = self.loaded.source, self.windows.shape[1]
        evaluation, more, said = self.predictions()
        bits = bits_per_byte(evaluation, self.windows, need_tokenizer(self.loaded.tokenizer, model))
        about = {"model": model, "text": self.text, "seq_length": seq_length}
        result: dict[str, Any] = {**about, **evaluation.to_dict(), "bits_per_byte": bits, **more}
        lines = [
            f"perplexity {evaluation.perplexity:.4f}, {bits:.4f} bits per byte, over {evaluation.tokens} tokens "
            f"({evaluation.windows} windows of {seq_length}) in {evaluation.seconds:.0f} s",
            *said,
        ]
        for more, said in (self.answers(questions), self.generations(generations)):
            result |= more
            lines += said
        return result, lines

    def predictions(self) -> "tuple[Evaluation, dict[str, Any], list[str]]":
        """The perplexity, and how far the predictions are from the dense model's; each reads the text once."""
        from optprune.measure import Evaluation, divergence_from, perplexity

        model, windows = self.loaded.model, self.windows
        if self.dense is None:
            with self.reporter.count("evaluating", "window") as update:
                return perplexity(model, windows, on_window=update), {}, []
        began = time.perf_counter()
        with self.reporter.count("evaluating against the dense model", "window") as update:
            found = divergence_from(model, self.dense.model, windows, on_window=update)
        count, length = windows.shape
        evaluation = Evaluation(found.perplexity, count * (length - 1), count, time.perf_counter() - began)
        result = {key: value for key, value in found.to_dict().items() if key != "perplexity"}
        return evaluation, {"against": self.dense.source, **result}, _in_words(found)

    def answers(self, questions: "list[Question]") -> tuple[dict[str, Any], list[str]]:
        """How many questions are answered right."""
        from optprune.measure import answer_questions
        from optprune.models import need_tokenizer

        result, lines = dict[str, Any](), list[str]()
        for key, one in self._both("questions"):
            if questions:
                with self.reporter.count(f"answering, {one.source}", "question") as update:
                    tokenizer = need_tokenizer(one.tokenizer, one.source)
                    found = answer_questions(one.model, tokenizer, questions, on_question=update)
                result[key] = asdict(found)
                lines.append(
                    f"{one.source}: {found.accuracy:.1%} of {found.questions} questions right, "
                    f"{found.accuracy_by_byte:.1%} by the likelihood of a byte"
                )
        return result, lines

    def generations(self, count: int) -> tuple[dict[str, Any], list[str]]:
        """Greedy continuations of the first tokens of windows, or of places in them where there are fewer."""
        from optprune.measure import generate
        from optprune.models import need_tokenizer

        if not count:
            return {}, []
        prompts = list(prompts_of(self.windows, count))
        tokenizer = need_tokenizer(self.loaded.tokenizer, self.loaded.source)
        texts = {key: generate(one.model, tokenizer, prompts) for key, one in self._both("text")}
        shown = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        rows = [dict(zip(("prompt", *texts), row, strict=True)) for row in zip(shown, *texts.values(), strict=True)]
        lines = [f"{key}: {' '.join(text.split())}" for row in rows for key, text in row.items()]
        return {"generations": rows}, lines

    def _both(self, key: str) -> "list[tuple[str, LoadedModel]]":
        """The model and the dense one, with the keys of what is found of them."""
        return [(key, self.loaded)] + ([] if self.dense is None else [(f"dense_{key}", self.dense)])


def prompts_of(windows: "Tensor", count: int) -> "Iterator[Tensor]":
    """The first tokens of so many windows [n, length], or of places that lie evenly in them where there are fewer."""
    tokens, length = windows.flatten(), windows.shape[1]
    if count > len(windows):
        count = min(count, max(1, len(tokens) // PROMPT))
        length = len(tokens) // count
    for begin in range(0, count * length, length):
        yield tokens[begin : begin + min(PROMPT, length)]


def _loaded(reporter: "Reporter", source: str, dtype: str, device: str) -> "LoadedModel":
    from optprune.models import load_model

    reporter.say(f"loading {source}")
    return load_model(source, dtype=dtype, device=device)


def _in_words(found: "Divergence") -> list[str]:
    first, last = found.along[0], found.along[-1]
    return [
        f"dense perplexity {found.dense_perplexity:.4f}; divergence {found.divergence:.4f} nats, "
        f"first choice the same in {found.agreement:.1%}",
        f"along the context: {first.divergence:.4f} nats and {first.agreement:.1%} over the first {first.last} "
        f"predictions, {last.divergence:.4f} and {last.agreement:.1%} from the {last.first}th on",
    ]


def _check_alike(
    model: str,
    config: "PretrainedConfig",
    against: str,
    tokens: "Tensor",
    others: "Callable[[PretrainedConfig], Tensor]",
) -> None:
    """Raise InputError when two models cannot be compared, since their vocabularies or tokenizers differ."""
    import torch

    from optprune.models import load_config, load_tokenizer

    other = load_config(against)
    sizes = [one.get_text_config().vocab_size for one in (config, other)]
    same = sizes[0] == sizes[1]
    if same and load_tokenizer(against) is not None:
        same = torch.equal(others(other), tokens)
    if not same:
        raise InputError(
            f"{model} and {against} do not have the same tokens, so that their predictions cannot be compared: "
            "give the model that this one was made from"
        )
