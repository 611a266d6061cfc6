"""A smaller vocabulary from the shell: the folder, its report, what reads it, and what is refused."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import optprune
from optprune.cli import main
from optprune.export import GgufFile, export
from tests.helpers.attempts import Attempt
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.tiny_models import VOCABULARY, tiny_tokenizer

KEPT = 400
TEXTS = ("The committee met on Monday.", "def f(x):\n    return x", "委员会 🙂", "naïve")


def pruned(attempt: Attempt, *more: str) -> Path:
    assert main(attempt.command("--recipe", "vocabulary", "--vocabulary", str(KEPT), *more)) == 0
    return attempt.output


def test_a_folder_of_fewer_tokens_is_read_by_transformers_and_llama_cpp(attempt: Attempt) -> None:
    folder = pruned(attempt, "--set", "vocabulary.tokens=2048")
    said = attempt.capsys.readouterr().out
    assert f"{KEPT} of {VOCABULARY} tokens stay in the vocabulary" in said
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert model.config.vocab_size == len(tokenizer) == KEPT
    assert model.get_input_embeddings().weight.shape[0] == model.get_output_embeddings().weight.shape[0] == KEPT
    file = export(folder, attempt.folder / "small.gguf", GgufFile(kind="f32")).path
    other: Any = LlamaCpp(file)
    before = tiny_tokenizer()
    for text in TEXTS:
        ids = tokenizer(text)["input_ids"]
        assert tokenizer.decode(ids) == before.decode(before(text)["input_ids"]) == text
        assert other.tokens(text) == len(ids)


def test_the_report_says_what_was_removed(attempt: Attempt) -> None:
    folder = pruned(attempt, "--set", "vocabulary.tokens=2048")
    report = json.loads((folder / "report.json").read_text())
    change = report["vocabulary"]
    assert (change["before"], change["after"], change["tokens"]) == (VOCABULARY, KEPT, 2048)
    hidden = optprune.load_model(folder).model.config.hidden_size
    assert change["parameters_removed"] == 2 * hidden * (VOCABULARY - KEPT)
    assert change["divergence_after"] <= change["divergence_before"]
    phases = [phase["name"] for phase in report["phases"]]
    assert phases[:4] == ["choosing", "tokenising", "loading", "vocabulary"]
    planned = attempt.folder / "plan.json"
    words = ["plan", str(attempt.model), "--recipe", "vocabulary", "--vocabulary", str(KEPT), "--no-probe"]
    assert main([*words, "--samples", "4", "--seq-length", "32", "--json", str(planned)]) == 0
    assert set(phases) == {phase["name"] for phase in json.loads(planned.read_text())["phases"]}
    assert report["parameters_before"] == sum(w.numel() for w in optprune.load_model(attempt.model).model.parameters())
    assert report["recipe"]["vocabulary"] == {"keep": KEPT, "tokens": 2048, "predictions": 65536}
    assert f"{KEPT} of {VOCABULARY}" in (folder / "README.md").read_text()
    assert f"{KEPT} of {VOCABULARY}" in (folder / "report.html").read_text()
    assert main(["audit", str(folder)]) == 0
    assert main(["audit", str(folder), "--against", str(attempt.model)]) == 0


@pytest.mark.e2e
def test_the_recipe_of_the_folder_makes_its_bytes_again(attempt: Attempt) -> None:
    folder = pruned(attempt, "--units", "mlp", "--sparsity", "0.2")
    weights = load_file(folder / "model.safetensors")
    again = attempt.folder / "again"
    assert main(attempt.command("--recipe", str(folder / "recipe.yaml"), output=again)) == 0
    assert (again / "model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()
    assert weights["model.embed_tokens.weight"].shape[0] == KEPT
    assert weights["model.layers.0.mlp.down_proj.weight"].shape[1] < 128, "units of the MLP are removed too"


@pytest.mark.parametrize(
    ("keep", "reason"),
    [
        ("20", "a vocabulary of 20 tokens is too small"),
        ("100000", "a vocabulary of 100000 tokens is larger than that of the model, 512"),
        ("400.5", "the vocabulary to keep cannot be 400.5"),
        ("-1", "the recipe field 'vocabulary' cannot be -1.0"),
    ],
)
def test_sizes_that_are_refused(attempt: Attempt, keep: str, reason: str) -> None:
    assert reason in attempt.fails(attempt.command("--recipe", "vocabulary", "--vocabulary", keep))
