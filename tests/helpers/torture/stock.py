"""The stock: small models, texts, finished and unfinished runs, from which malformed inputs are made by copying."""

import csv
import json
import os
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

from tests.helpers.torture.words import Words


@dataclass(frozen=True)
class Stock:
    """Where everything lies."""

    folder: Path

    def __getattr__(self, name: str) -> Path:
        """A file or folder of the stock by the name in `PLACES`."""
        return self.folder / PLACES[name]

    def words(self) -> Words:
        """Commands that would work."""
        return Words(model=self.model, pruned=self.pruned, text=self.text, held=self.held)


PLACES = {
    "model": "model",
    "deep": "deep",
    "sharded": "sharded",
    "pruned": "pruned",
    "text": "text.jsonl",
    "held": "held.jsonl",
    "plain": "text.txt",
    "csv": "text.csv",
    "parquet": "text.parquet",
    "gguf": "tiny.gguf",
    "questions": "questions.jsonl",
    "evaluation": "evaluation.json",
    "speed": "speed.json",
    "other": "other",
    "other_evaluation": "other-evaluation.json",
    "other_speed": "other-speed.json",
    "mixture": "mixture",
    "positions": "positions",
    "vision": "vision",
    "records": "images/records.jsonl",
    "quantised": "quantised",
    "problem": "problem.safetensors",
    "runs": "runs",
    "whole": "whole",
}
QUESTIONS = [{"question": "2 + 2 =", "choices": ["3", "4"], "answer": 1}] * 3
TIMED = ("--prompt-tokens", "8", "--new-tokens", "2", "--repeats", "1")
FP8 = {"quant_method": "fp8", "weight_block_size": [16, 16]}
GPTQ = {"quant_method": "gptq", "desc_act": False, "sym": False}
AWQ = {"quant_method": "awq", "version": "gemm", "zero_point": True}
RUNS = {"prune": "block-00000.json", "heal": "progress.json", "compare": "wanda-0.5-seed0.json"}
"""the commands of which the stock has the whole output, and a run that was killed after it wrote a file"""


def make(folder: Path) -> None:
    """Write the stock: a few seconds of processor time."""
    import pyarrow
    from pyarrow import parquet

    from optprune.problems import save_problem
    from optprune.texts import demo_articles
    from tests.helpers.sparse_cases import correlated
    from tests.helpers.tiny_gguf import write_gguf
    from tests.helpers.tiny_models import save_tiny, tiny_llama
    from tests.helpers.torture.calls import command

    stock, articles = Stock(folder), demo_articles("calibration")
    save_tiny(tiny_llama(), stock.model)
    save_tiny(tiny_llama(num_hidden_layers=3), stock.deep)
    save_tiny(tiny_llama(), stock.sharded)
    (stock.sharded / "model.safetensors").unlink()
    tiny_llama().save_pretrained(stock.sharded, max_shard_size="200KB")
    write_gguf(tiny_llama(), stock.gguf)
    save_problem(correlated(1, 8, 12, "2:4"), stock.problem, origin={"layer": "a.b"})
    stock.plain.write_text("\n\n".join(articles[:5]), encoding="utf-8")
    for file, documents in ((stock.text, articles[:12]), (stock.held, articles[12:15])):
        file.write_text("\n".join(json.dumps({"text": document}) for document in documents), encoding="utf-8")
    rows = [document[:2000] for document in articles[:6]]
    with stock.csv.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([("text", "more"), *((row, 3) for row in rows)])
    parquet.write_table(pyarrow.table({"text": rows, "more": list(range(6))}), stock.parquet)
    stock.questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    words = stock.words()
    stock.runs.mkdir()
    stock.whole.mkdir()
    assert command(words.prune(stock.pruned, "--set", "allocation.multiple=1")) == 0
    measured = words.evaluate("--against", str(stock.model), "--json", str(stock.evaluation))
    assert command(measured) == 0
    for name in RUNS:
        begin(stock, name)
    make_others(stock)


def make_others(stock: Stock) -> None:
    """Write models of other kinds, and what was measured of the pruned model and of another one."""
    from tests.helpers.image_records import save_with_processor, write_records
    from tests.helpers.quantised_folders import GROUP, awq, fp8, gptq, quantised_folder
    from tests.helpers.tiny_models import save_tiny, tiny_mixture, tiny_opt
    from tests.helpers.torture.calls import command

    save_tiny(tiny_mixture("qwen3_moe"), stock.mixture)
    save_tiny(tiny_opt(max_position_embeddings=64), stock.positions)
    save_with_processor("llava", stock.vision)
    write_records(stock.records.parent)
    stock.quantised.mkdir()
    in_words = {"bits": 4, "group_size": GROUP}
    quantised_folder(stock.quantised / "fp8", "llama", fp8((16, 16)), FP8)
    quantised_folder(stock.quantised / "gptq", "llama", gptq(), GPTQ | in_words)
    quantised_folder(stock.quantised / "awq", "llama", awq, AWQ | in_words)
    words = stock.words()
    assert command(words.prune(stock.other, "--set", "allocation.multiple=1", sparsity=0.4)) == 0
    for folder, evaluation, speed in (
        (stock.pruned, None, stock.speed),
        (stock.other, stock.other_evaluation, stock.other_speed),
    ):
        if evaluation is not None:
            of_other = ["--against", str(stock.model), "--json", str(evaluation)]
            assert command(replace(words, pruned=folder).evaluate(*of_other)) == 0
        timed = ["benchmark-model", str(folder), *TIMED, "--json", str(speed)]
        assert command(timed) == 0


def begin(stock: Stock, name: str) -> None:
    """Have the whole output of a command, and a run of it that was killed when some of it was done."""
    from tests.helpers.torture.calls import command
    from tests.helpers.torture.moments import middle, moments

    words, whole, begun = stock.words(), stock.whole / name, stock.runs / "out"
    with moments(None) as seen:
        assert command(words.of(name, whole)) == 0
    child = os.fork()
    if child == 0:
        with moments(middle(seen, RUNS[name])):
            command(words.of(name, begun))
        os._exit(70)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -9
    run = begun if name == "compare" else begun.with_name("out.run")
    run.rename(stock.runs / name)
    for left in stock.runs.iterdir():
        if left.name not in RUNS:
            shutil.rmtree(left) if left.is_dir() else left.unlink()
