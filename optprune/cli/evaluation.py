"""A model beside the dense one: the measurements of `evaluate` and `report`, as data and as lines."""

import math
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.cli.tokens import begin_for, check_alike, tokens_for
from optprune.system.wording import counted

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from optprune.measure import Divergence, Evaluation, Question, Tasks
    from optprune.models import LoadedModel
    from optprune.models.load import Described
    from optprune.report.progress import Reporter

PROMPT = 32
"""the number of tokens in the prompt of a generation"""


@dataclass(frozen=True)
class TaskRun:
    """Tasks of lm-eval with the settings of their run."""

    tasks: "Tasks"
    limit: int | None
    """the largest number of questions of a task"""
    batch: int
    """the number of texts in a batch"""


@dataclass(frozen=True)
class ModelEvaluation:
    """A model and, if it is named, the dense one; each measurement returns entries of the JSON file and lines."""

    reporter: "Reporter"
    loaded: "LoadedModel"
    dense: "LoadedModel | None"
    windows: "Tensor | None"
    """the windows [n, length] of the text, where there is one"""
    text: str | None
    begin: tuple[int, ...] = ()
    """the token ids that each window begins with"""

    @classmethod
    def loaded_for(
        cls,
        reporter: "Reporter",
        model: str,
        against: str | None,
        text: str | None,
        seq_length: int,
        windows: int | None,
        *,
        device: str,
        dtype: str,
        architecture: Path | None = None,
        sequences: str = "packed",
    ) -> "ModelEvaluation":
        """Return both models and the windows of a text; InputError, before loading, where they do not match.

        If the pruned model carries a draft of its architecture, the dense model is read by it too.
        """
        from optprune.models import load_config
        from optprune.models.draft import draft_in

        config = load_config(model, architecture)
        begin = () if text is None else tuple(begin_for(model, sequences))
        ids = _windows(reporter, model, config, against, text, seq_length, windows, begin)
        loaded = _loaded(reporter, model, dtype, device, architecture)
        dense = None if against is None else _loaded(reporter, against, dtype, device, draft_in(config))
        return cls(reporter, loaded, dense, ids, text, begin)

    def measured(
        self, questions: "Sequence[Question]", generations: int, tasks: TaskRun | None = None
    ) -> tuple[dict[str, Any], list[str]]:
        """Return all measurements, as the content of the JSON file and as lines."""
        result, lines = dict[str, Any](model=self.loaded.source), list[str]()
        measures = self.on_text, lambda: self.answers(questions), lambda: self.tasks(tasks)
        for measure in (*measures, lambda: self.generations(generations)):
            entries, text = measure()
            result |= entries
            lines += text
        return result, lines

    def on_text(self) -> tuple[dict[str, Any], list[str]]:
        """Return the predictions on the text, if there is one."""
        from optprune.measure import bits_per_byte
        from optprune.models import need_tokenizer
        from optprune.texts import begin_in_words

        if self.windows is None:
            return {}, []
        evaluation, more, text = self.predictions(self.windows)
        tokenizer = need_tokenizer(self.loaded.tokenizer, self.loaded.source)
        bits = bits_per_byte(evaluation, self.windows, tokenizer)
        if self.dense is not None:
            dense = replace(evaluation, perplexity=more["dense_perplexity"])
            more["dense_bits_per_byte"] = bits_per_byte(dense, self.windows, tokenizer)
        begin = begin_in_words(tokenizer, self.begin)
        start = f", each begun with {begin}" if begin else ""
        first = (
            f"perplexity {evaluation.perplexity:.4f}, {bits:.4f} bits per byte, over {evaluation.tokens} tokens "
            f"({counted(evaluation.windows, 'window')} of {self.windows.shape[1]}{start}) in {evaluation.seconds:.0f} s"
        )
        about = {"text": self.text, "seq_length": self.windows.shape[1], "begin": begin}
        return {**about, **evaluation.to_dict(), "bits_per_byte": bits, **more}, [first, *text]

    def predictions(self, windows: "Tensor") -> "tuple[Evaluation, dict[str, Any], list[str]]":
        """Return the perplexity and the divergence from the dense model; each reads the text once."""
        from optprune.measure import Evaluation, divergence_from, perplexity

        model = self.loaded.model
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

    def answers(self, questions: "Sequence[Question]") -> tuple[dict[str, Any], list[str]]:
        """Return the share of questions that are answered right."""
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
                    f"{one.source}: {found.accuracy:.1%} of {counted(found.questions, 'question')} right, "
                    f"{found.accuracy_by_byte:.1%} by the likelihood of a byte"
                )
        return result, lines

    def tasks(self, run: "TaskRun | None") -> tuple[dict[str, Any], list[str]]:
        """Return the scores of lm-eval's tasks."""
        from optprune.models import need_tokenizer

        result, lines = dict[str, Any](), list[str]()
        for key, one in self._both("tasks"):
            if run is not None:
                self.reporter.say(f"running tasks, {one.source}")
                tokenizer = need_tokenizer(one.tokenizer, one.source)
                found = run.tasks.run(one.model, tokenizer, limit=run.limit, batch=run.batch)
                result[key] = found
                for task, scores in found.items():
                    listed = ", ".join(f"{name} {score:.4g}" for name, score in scores.items())
                    lines.append(f"{one.source}, {task}: {listed}")
        return result, lines

    def generations(self, count: int) -> tuple[dict[str, Any], list[str]]:
        """Return greedy continuations of the first tokens of windows, or of evenly spaced places."""
        from optprune.measure import generate
        from optprune.models import need_tokenizer

        if not count or self.windows is None:
            return {}, []
        prompts = list(prompts_of(self.windows, count, len(self.begin)))
        tokenizer = need_tokenizer(self.loaded.tokenizer, self.loaded.source)
        texts = {key: generate(one.model, tokenizer, prompts) for key, one in self._both("text")}
        shown = [tokenizer.decode(prompt, skip_special_tokens=True) for prompt in prompts]
        rows = [dict(zip(("prompt", *texts), row, strict=True)) for row in zip(shown, *texts.values(), strict=True)]
        lines = [f"{key}: {' '.join(text.split())}" for row in rows for key, text in row.items()]
        return {"generations": rows}, lines

    def _both(self, key: str) -> "list[tuple[str, LoadedModel]]":
        """Return the model and the dense one, each with the key of its entry in the JSON file."""
        return [(key, self.loaded)] + ([] if self.dense is None else [(f"dense_{key}", self.dense)])


def _windows(
    reporter: "Reporter",
    model: str,
    config: "PretrainedConfig",
    against: str | None,
    text: str | None,
    seq_length: int,
    windows: int | None,
    begin: Sequence[int],
) -> "Tensor | None":
    """Return the windows [count, length] of the text, if any; InputError where it cannot compare the models."""
    from optprune.models import load_config
    from optprune.models.draft import draft_in
    from optprune.texts import check_seq_length, evaluation_windows, read_documents

    documents = None if text is None else read_documents(text)
    if documents is None:
        if against is not None:
            load_config(against, draft_in(config))
        return None
    check_seq_length(config, seq_length)
    reporter.say(f"tokenising {text}")
    most = None if windows is None else max(windows, 1) * seq_length
    tokens = tokens_for(model, config, documents, most)
    if against is not None:
        check_alike(model, config, against, tokens, lambda other: tokens_for(against, other, documents, most))
    return evaluation_windows(tokens, seq_length, windows, begin)


def prompts_of(windows: "Tensor", count: int, begin: int = 0) -> "Iterator[Tensor]":
    """Yield the first tokens of `count` windows [n, length], or of evenly spaced places if there are fewer.

    All windows begin with the same `begin` tokens, and so does each prompt.
    """
    import torch

    own = windows[:, begin:]
    tokens, length = own.flatten(), own.shape[1]
    if count > len(windows):
        count = min(count, max(1, len(tokens) // PROMPT))
        length = len(tokens) // count
    for place in range(0, count * length, length):
        yield torch.cat([windows[0, :begin], tokens[place : place + min(PROMPT, length)]])


def _loaded(
    reporter: "Reporter", source: str, dtype: str, device: str, architecture: "Described | None"
) -> "LoadedModel":
    from optprune.models import load_model

    reporter.say(f"loading {source}")
    return load_model(source, dtype=dtype, device=device, architecture=architecture)


def _in_words(found: "Divergence") -> list[str]:
    first, last, known = found.along[0], found.along[-1], found.standard_errors
    more, apart, same = ("",) * 3
    if found.dense_perplexity < math.inf:
        more = f" ({found.perplexity / found.dense_perplexity - 1:+.1%})"
    if known is not None:
        more = more and f"{more[:-1]} ± {found.perplexity / found.dense_perplexity * known.surprise:.1%})"
        apart, same = f" ± {known.divergence:.4f}", f" ± {known.agreement:.1%}"
    return [
        f"dense perplexity {found.dense_perplexity:.4f}{more}; divergence {found.divergence:.4f}{apart} nats, "
        f"first choice the same in {found.agreement:.1%}{same}",
        *([] if known is None else [f"± is the standard error over {known.windows} windows, of differences paired"]),
        f"along the context: {first.divergence:.4f} nats and {first.agreement:.1%} over the first {first.last} "
        f"predictions, {last.divergence:.4f} and {last.agreement:.1%} from the {last.first}th on",
    ]
