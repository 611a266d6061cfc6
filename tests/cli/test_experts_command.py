"""optprune experts: which experts serve which text, as lines, as data and as scores for a run."""

import json
import shutil
from pathlib import Path

import pytest
import torch

import optprune
from optprune.calibration import ExpertUse, UseByText, expert_use
from optprune.cli import main
from optprune.cli.experts import lines
from optprune.solvers import GivenScores
from optprune.texts import draw_windows, read_texts
from tests.helpers.attempts import SMALL, Attempt
from tests.helpers.tiny_models import ALL_MODELS, save_tiny


@pytest.fixture
def mixture(attempt: Attempt, tmp_path: Path) -> Attempt:
    """A model with four experts in each of its blocks, of which the router chooses two, and a text of numbers too."""
    (tmp_path / "numbers.txt").write_text(" ".join(map(str, range(1000))), encoding="utf-8")
    return Attempt(save_tiny(ALL_MODELS["qwen3_moe"](), tmp_path / "mixture"), attempt.text, tmp_path, attempt.capsys)


def words(mixture: Attempt, *more: str, **texts: object) -> list[str]:
    named = [word for name, text in texts.items() for word in ("--text", f"{name}={text}")]
    return ["experts", str(mixture.model), *named, *(word for pair in SMALL.items() for word in pair), *more]


def test_the_file_holds_what_python_measures(mixture: Attempt) -> None:
    file = mixture.folder / "experts.json"
    texts = {"news": str(mixture.text), "other": str(mixture.folder / "numbers.txt")}
    assert main(words(mixture, "--json", str(file), **texts)) == 0
    loaded = optprune.load_model(mixture.model, device="cpu")
    assert loaded.tokenizer is not None
    drawn = {name: draw_windows(loaded.tokenizer, read_texts(text), 8, 64, seed=0) for name, text in texts.items()}
    found = expert_use(loaded.decoder(), {name: each.batches for name, each in drawn.items()})
    content = json.loads(file.read_text())
    assert {name: content[name] for name in ("tokens", "blocks")} == found.to_dict()
    assert content["texts"] == texts and content["tokens"] == {"news": 512, "other": 512}
    said = mixture.capsys.readouterr().out.splitlines()
    assert said == lines(found)


@pytest.mark.parametrize("measure", ["reap", pytest.param("share", marks=pytest.mark.e2e)])
def test_a_run_by_its_scores_is_the_recipe_of_that_name(mixture: Attempt, measure: str) -> None:
    """On dense inputs, which scores are measured on."""
    scores, recipe = mixture.folder / "scores.json", {"reap": "reap", "share": "expert_frequency"}[measure]
    assert main(words(mixture, "--scores", str(scores), "--by", measure, news=mixture.text)) == 0
    dense, other = ("--experts", "3", "--propagation", "dense"), mixture.folder / "other"
    assert main(mixture.command("--recipe", recipe, *dense)) == 0
    given = ("--recipe", "expert_frequency" if measure == "reap" else "reap", "--expert-scores", str(scores))
    assert main(mixture.command(*given, *dense, output=other)) == 0
    assert (other / "model.safetensors").read_bytes() == (mixture.output / "model.safetensors").read_bytes()
    about = json.loads(scores.read_text())["about"]
    windows = "8 windows of 64 tokens, seed 0 of each text"
    assert about == f"{measure} of {mixture.model} on news, {windows}, written by optprune"


def test_scores_of_one_text_or_of_all(mixture: Attempt) -> None:
    texts = {"news": mixture.text, "other": mixture.folder / "numbers.txt"}
    read = dict[str, GivenScores]()
    for name in ("news", "other", "all", "alone"):
        file = mixture.folder / f"{name}.json"
        whose = ("--of", name) if name in texts else ()
        named = {"other": texts["other"]} if name == "alone" else texts
        assert main(words(mixture, *whose, "--by", "share", "--scores", str(file), **named)) == 0
        read[name] = GivenScores.read(file)
    assert read["other"] == read["alone"] != read["news"]
    for block, scores in read["all"].scores.items():
        both = torch.tensor([read[name].scores[block] for name in texts], dtype=torch.float64)
        torch.testing.assert_close(torch.tensor(scores, dtype=torch.float64), both.mean(0), rtol=1e-12, atol=0)


def use(tokens: int, *counts: float) -> ExpertUse:
    sums = torch.tensor(counts, dtype=torch.float64)
    return ExpertUse(tokens, 2, sums, sums / 2, 3 * sums)


def test_the_lines_tell_who_uses_what() -> None:
    blocks = {number: {"code": use(100, 100, 90, 9, 1, 0), "news": use(50, 4, 41, 50, 1, 4)} for number in range(3, 11)}
    even = use(100, 40, 40, 40, 40, 40)
    assert lines(UseByText(blocks | {1: {"code": even, "news": even}})) == [
        "text     tokens      experts used  by no other text",
        "code        100          29 of 45                 0",
        "news         50          37 of 45                 8",
        "used: with at least a tenth of an even share of the text's tokens",
        "used by news alone: block 3: 4; block 4: 4; block 5: 4; block 6: 4; block 7: 4; block 8: 4; and in 2 more "
        "blocks (--json has all)",
        "used by no text, 8 of 45: block 3: 3; block 4: 3; block 5: 3; block 6: 3; block 7: 3; block 8: 3; and in 2 "
        "more blocks (--json has all)",
        "code and news: 56% of the routers' choices are alike, in block 3 50%",
    ]
    assert lines(UseByText({0: {"code": even}})) == [
        "text     tokens      experts used",
        "code        100            5 of 5",
        "used: with at least a tenth of an even share of the text's tokens",
    ]


WRONG: dict[str, tuple[tuple[str, ...], str]] = {
    "no name": (("--text", "news.txt"), "--text 'news.txt' is not of the form NAME=TEXT"),
    "no text": (("--text", "news="), "is not of the form NAME=TEXT"),
    "a name of words": (("--text", "my news=news.txt"), "with a name of letters and digits"),
    "twice": (("--text", "news=other.txt"), "two texts are called news: give each a name of its own"),
    "another measure": (("--by", "count"), "--by cannot be 'count': use reap, share or weight"),
    "another text": (("--of", "code"), "--of cannot be 'code': use news"),
    "no windows": (("--samples", "0"), "--samples cannot be 0"),
    "a missing file": (("--text", "code=missing.txt"), "missing.txt"),
    "a folder": (("--scores", "."), "the file of expert scores . is a folder: name a file"),
    "too many windows": (("--samples", "100000"), "lower --samples"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_one_sentence(mixture: Attempt, case: str) -> None:
    more, sentence = WRONG[case]
    assert sentence in mixture.fails(words(mixture, *more, news=mixture.text))


def test_a_model_without_experts_is_refused(attempt: Attempt) -> None:
    told = attempt.fails(words(attempt, news=attempt.text))
    assert f"{attempt.model} has no experts: give a mixture of experts" in told


def test_weights_are_not_needed_to_refuse(mixture: Attempt) -> None:
    bare = mixture.folder / "bare"
    shutil.copytree(mixture.model, bare)
    (bare / "model.safetensors").unlink()
    again = Attempt(bare, mixture.text, mixture.folder, mixture.capsys)
    assert "--of cannot be 'code'" in again.fails(words(again, "--of", "code", news=mixture.text))
