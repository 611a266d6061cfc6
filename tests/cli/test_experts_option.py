"""`--experts`: the number of experts that a block keeps, in place of a sparsity."""

import json
from pathlib import Path

import pytest

import optprune
from optprune.cli import main
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import ALL_MODELS, save_tiny


@pytest.fixture
def mixture(attempt: Attempt, tmp_path: Path) -> Attempt:
    """A run on a model with four experts in each of its blocks, of which the router chooses two."""
    return Attempt(save_tiny(ALL_MODELS["mixtral"](), tmp_path / "mixture"), attempt.text, tmp_path, attempt.capsys)


def test_every_block_keeps_that_many(mixture: Attempt) -> None:
    assert main(mixture.command("--recipe", "experts_best", "--experts", "3")) == 0
    decoder = optprune.load_model(mixture.output).decoder()
    assert [shape.experts for shape in decoder.shapes()] == [3] * len(decoder.blocks)
    dense = optprune.load_model(mixture.model).decoder()
    before, after = (sum(map(each.weights_of, each.shapes())) for each in (dense, decoder))
    assert f"| linear weights in them | {before:,} | {after:,} |" in (mixture.output / "README.md").read_text()
    again = mixture.folder / "again"
    assert main(mixture.command("--recipe", str(mixture.output / "recipe.yaml"), output=again)) == 0
    assert (again / "model.safetensors").read_bytes() == (mixture.output / "model.safetensors").read_bytes()


def test_a_plan_takes_the_option(mixture: Attempt) -> None:
    file = mixture.folder / "plan.json"
    words = ["plan", str(mixture.model), "--recipe", "reap", "--experts", "3", "--samples", "8", "--seq-length", "64"]
    assert main([*words, "--no-probe", "--json", str(file)]) == 0
    assert json.loads(file.read_text())["host_bytes"] > 0


def test_one_budget_keeps_that_many_on_average(mixture: Attempt) -> None:
    assert main(mixture.command("--recipe", "experts_best", "--experts", "3", "--allocation", "global")) == 0
    counts = [shape.experts for shape in optprune.load_model(mixture.output).decoder().shapes()]
    assert sum(counts) == 3 * len(counts)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (
            ("--recipe", "reap", "--experts", "4"),
            "--experts 4 is out of range: give 2 to 3 of the 4 experts of a block",
        ),
        (("--recipe", "reap", "--experts", "1"), "give 2 to 3 of the 4 experts"),
        (("--recipe", "fasp", "--experts", "3"), "for recipes whose units are experts: choose --recipe experts_best"),
        (("--recipe", "reap", "--experts", "3", "--sparsity", "0.2"), "leave out --sparsity"),
        (("--recipe", "reap", "--experts", "3", "--to", "1MiB"), "leave out --experts, or the goal"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(mixture: Attempt, words: tuple[str, ...], sentence: str) -> None:
    assert sentence in mixture.fails(mixture.command(*words))


def test_a_model_without_experts_is_refused(attempt: Attempt) -> None:
    assert "has none" in attempt.fails(attempt.command("--recipe", "reap", "--experts", "3"))
