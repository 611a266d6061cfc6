"""`--expert-scores`: experts are chosen by the numbers in a file."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import optprune
from optprune.cli import main
from optprune.models import Decoder
from optprune.models.mixture import SeparateExperts, experts_in
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import ALL_MODELS, save_tiny

SCORES = {"0": [0.4, 0.1, 0.3, 0.2], "1": [0, 0, 7, 2]}
KEPT = [[0, 2], [2, 3]]
"""the two largest of each block"""


@pytest.fixture
def mixture(attempt: Attempt, tmp_path: Path) -> Attempt:
    """A run on a model with four experts in each of its two blocks, of which the router chooses two."""
    return Attempt(save_tiny(ALL_MODELS["mixtral"](), tmp_path / "mixture"), attempt.text, tmp_path, attempt.capsys)


def written(mixture: Attempt, content: Any) -> Path:
    file = mixture.folder / "scores.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return file


def last_matrices(folder: Path) -> list[list[torch.Tensor]]:
    decoder = optprune.load_model(folder, device="cpu").decoder()
    described = decoder.architecture.mixture
    assert described is not None
    found: list[list[torch.Tensor]] = []
    for block in decoder.blocks:
        experts = experts_in(block, described)
        assert isinstance(experts, SeparateExperts)
        found.append([experts.get_parameter(f"{number}.down_proj.weight") for number in range(experts.count)])
    return found


def test_the_experts_of_the_largest_scores_stay(mixture: Attempt) -> None:
    file = written(mixture, {"about": "counted by hand", "scores": SCORES})
    words = ("--recipe", "reap", "--experts", "2", "--expert-scores", str(file))
    assert main(mixture.command(*words)) == 0
    dense, left = last_matrices(mixture.model), last_matrices(mixture.output)
    for block, kept in enumerate(KEPT):
        assert len(left[block]) == 2
        assert all(torch.equal(left[block][place], dense[block][number]) for place, number in enumerate(kept))
    report = json.loads((mixture.output / "report.json").read_text())
    assert [layer["solver"] for layer in report["layers"]] == ["GivenScores"] * 2
    assert report["recipe"]["solver"] == {"given_scores": {"scores": SCORES}}


def test_the_recipe_that_a_run_writes_holds_the_scores(mixture: Attempt) -> None:
    """Its own file is gone then, and the same folder comes out; a resumed run wants the same scores too."""
    file = written(mixture, {"scores": SCORES})
    assert main(mixture.command("--recipe", "experts_best", "--experts", "3", "--expert-scores", str(file))) == 0
    file.unlink()
    again = mixture.folder / "again"
    assert main(mixture.command("--recipe", str(mixture.output / "recipe.yaml"), output=again)) == 0
    assert (again / "model.safetensors").read_bytes() == (mixture.output / "model.safetensors").read_bytes()


def test_a_recipe_names_the_file_and_a_plan_takes_it(mixture: Attempt) -> None:
    file, recipe, plan = written(mixture, {"scores": SCORES}), mixture.folder / "own.yaml", mixture.folder / "plan.json"
    solver = {"given_scores": {"scores": str(file)}}
    recipe.write_text(yaml.safe_dump({"units": "experts", "sparsity": 0.3, "solver": solver}))
    words = ["plan", str(mixture.model), "--samples", "8", "--seq-length", "64", "--no-probe", "--json", str(plan)]
    assert main([*words, "--recipe", str(recipe)]) == 0
    assert json.loads(plan.read_text())["program"]["the recipe"]["solver"] == {"given_scores": {"scores": SCORES}}
    assert main([*words, "--recipe", "reap", "--expert-scores", str(file)]) == 0


def test_blocks_without_experts_have_no_scores() -> None:
    """Of a model whose first block has one MLP."""
    model = ALL_MODELS["glm4_moe"]()
    counts = [shape.experts for shape in Decoder(model).shapes()]
    assert counts[0] == 0 and counts[1] == 4
    scores = {number: (1.0, 2.0, 3.0, 4.0) for number, count in enumerate(counts) if count}
    assert optprune.solvers.GivenScores(scores).refusal(counts) is None
    told = optprune.solvers.GivenScores(scores | {0: (1.0,)}).refusal(counts)
    assert told == "the expert scores name block 0, which has no experts: leave it out"


def test_of_equal_scores_the_first_stay() -> None:
    problem = optprune.problems.ExpertChoice.of(torch.randn(6, 40), torch.randn(6, 40, 3), 1, True, 20)
    scores = optprune.solvers.GivenScores({3: (1.0,) * 40})
    for method in (scores, scores.of_block(3)):
        assert optprune.solvers.choose_experts(problem, method).kept.tolist() == [True] * 20 + [False] * 20


BAD: dict[str, tuple[Any, str]] = {
    "no JSON": ("scores", "is not valid JSON"),
    "a list": ([[1, 2, 3, 4]], "it has no object 'scores' with a list for each block: write {"),
    "no scores": ({"blocks": SCORES}, "it has no object 'scores'"),
    "another field": ({"scores": SCORES, "text": "code"}, "a field 'text', which is not known: use scores and about"),
    "a name": ({"scores": SCORES | {"mlp": [1]}}, "'mlp' is not the number of a block"),
    "a number": ({"scores": SCORES | {"1": 3}}, "the scores of block 1 are 3, not a list of numbers"),
    "words": ({"scores": SCORES | {"1": [1, 2, "3", 4]}}, "the scores of block 1 are [1, 2, '3', 4], not a list"),
    "truth": ({"scores": SCORES | {"1": [1, 2, True, 4]}}, "not a list of numbers"),
    "NaN": (
        '{"scores": {"0": [1, 2, NaN, 4], "1": [1, 2, 3, 4]}}',
        "the score of expert 2 of block 0 is nan: give finite numbers of at least 0",
    ),
    "infinity": ('{"scores": {"0": [1, 2, 1e999, 4], "1": [1, 2, 3, 4]}}', "expert 2 of block 0 is inf"),
    "a long whole number": ({"scores": SCORES | {"1": [1, 2, 3, 10**400]}}, "expert 3 of block 1 is inf"),
    "a negative": ({"scores": SCORES | {"1": [1, 2, 3, -4]}}, "the score of expert 3 of block 1 is -4"),
    "twice": ('{"scores": {"0": [1], "0": [2]}}', "the key '0' is given twice"),
    "a block too few": ({"scores": {"0": SCORES["0"]}}, "lack block 1: give a score for each of its 4 experts"),
    "a block too many": ({"scores": SCORES | {"2": [1]}}, "name block 2, which is not among the 2 of the model"),
    "an expert too few": (
        {"scores": SCORES | {"1": [1, 2, 3]}},
        "the expert scores of block 1 are 3 numbers, and it has 4 experts: give one for each",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_file_is_one_sentence(mixture: Attempt, case: str) -> None:
    content, sentence = BAD[case]
    file = written(mixture, content)
    told = mixture.fails(mixture.command("--recipe", "reap", "--expert-scores", str(file)))
    assert sentence in told
    if "too" not in case:
        assert f"the file of expert scores {file} cannot be used: " in told


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (("--recipe", "fasp"), "GivenScores does not solve the problems of units all: use expert_elimination"),
        (("--recipe", "reap", "--set", "solver=reap"), "the recipe field 'solver' is given twice"),
    ],
)
def test_what_does_not_go_together_is_one_sentence(mixture: Attempt, words: tuple[str, ...], sentence: str) -> None:
    file = written(mixture, {"scores": SCORES})
    assert sentence in mixture.fails(mixture.command(*words, "--expert-scores", str(file)))


def test_a_missing_file_is_one_sentence(mixture: Attempt) -> None:
    told = mixture.fails(mixture.command("--recipe", "reap", "--expert-scores", str(mixture.folder / "none.json")))
    assert "the file of expert scores" in told and "cannot be read" in told
