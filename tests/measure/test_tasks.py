"""Tasks of lm-eval, in an environment that has it: the scores of `answer_questions` on the same questions."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from optprune.cli import main
from optprune.errors import InputError
from optprune.measure import Tasks
from optprune.measure import tasks as of_tasks
from tests.helpers.mixed_models import mixed
from tests.helpers.pages import ROOT
from tests.helpers.tiny_models import save_tiny, tiny_llama

QUIET = {"PYTHONWARNINGS": "ignore"}
"""the warnings of pip and of lm-eval's many packages are not ours"""
HARNESS = "lm-eval==0.4.13"
QUESTIONS = [
    {
        "question": f"The minister said on day {number} that",
        "choices": ["they won", "a long road to the north of the city", "it rained on Monday"],
        "answer": number * number % 3,
    }
    for number in range(30)
]
TASK = """task: exam
dataset_path: json
dataset_kwargs:
  data_files:
    test: {questions}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list:
  - metric: acc
    aggregation: mean
    higher_is_better: true
  - metric: acc_norm
    aggregation: mean
    higher_is_better: true
"""


def test_without_the_package(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(of_tasks, "find_spec", lambda name: None)
    sentence = (
        "tasks need the package lm-eval, which is not installed: run pip install -e '.[eval]' in optprune's checkout"
    )
    with pytest.raises(InputError) as caught:
        Tasks.found(["hellaswag"])
    assert str(caught.value) == sentence
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    assert main(["evaluate", str(folder), "--tasks", "hellaswag,arc_easy"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {sentence}"


@pytest.mark.parametrize(
    ("names", "include", "sentence"),
    [
        (["exam", " "], None, "the tasks 'exam, ' hold an empty name"),
        (["exam"], "nowhere", "there is no folder of tasks nowhere"),
    ],
)
def test_what_names_no_tasks(
    names: list[str], include: str | None, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(of_tasks, "find_spec", lambda name: True)
    with pytest.raises(InputError, match=sentence):
        Tasks.found(names, None if include is None else Path(include))


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ([], "there is nothing to measure the model on: give --text, --questions or --tasks"),
        (["--tasks", "exam", "--generations", "2"], "--generations continues a text: give one by --text"),
        (["--tasks", "exam", "--limit", "0"], "--limit cannot be 0: it is at least 1"),
        (["--tasks", "exam", "--task-batch", "0"], "--task-batch cannot be 0: it is at least 1"),
    ],
)
def test_options_that_go_together(words: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["evaluate", "model", *words]) == 2
    assert sentence in capsys.readouterr().err


@pytest.fixture(scope="module")
def harness(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The interpreter of an environment that has lm-eval, and all that this one has."""
    place = tmp_path_factory.mktemp("harness")
    venv.create(place, with_pip=True)
    [packages] = place.glob("lib/python*/site-packages")
    (packages / "shared.pth").write_text("\n".join(path for path in sys.path if path.endswith("site-packages")))
    interpreter = place / "bin" / "python"
    install = [str(interpreter), "-m", "pip", "install", "--quiet", HARNESS]
    run = subprocess.run(install, capture_output=True, text=True, check=False, env=os.environ | QUIET)
    assert run.returncode == 0, run.stderr
    return interpreter


def evaluated(harness: Path, folder: Path, *words: str) -> "subprocess.CompletedProcess[str]":
    environment = (
        os.environ
        | QUIET
        | {
            "PYTHONPATH": str(ROOT),
            "HF_HUB_OFFLINE": "1",
            "HF_HOME": str(folder / "hub"),
        }
    )
    command = [str(harness), "-m", "optprune", "evaluate", str(folder), *words]
    return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)


@pytest.mark.slow
def test_the_scores_are_those_of_our_own_questions(harness: Path, tmp_path: Path) -> None:
    """An uneven model; a task by its path, and by its name in a folder."""
    folder = save_tiny(mixed(tiny_llama(num_hidden_layers=4)), tmp_path / "model")
    questions, task, record = tmp_path / "q.jsonl", tmp_path / "tasks" / "exam.yaml", tmp_path / "found.json"
    questions.write_text("\n".join(map(json.dumps, QUESTIONS)))
    task.parent.mkdir()
    task.write_text(TASK.format(questions=questions))
    own = ("--questions", str(questions), "--json", str(record))
    run = evaluated(harness, folder, "--tasks", str(task), *own, "--against", str(folder))
    assert run.returncode == 0, run.stderr
    found: dict[str, Any] = json.loads(record.read_text())
    scores, expected = found["tasks"]["exam"], found["questions"]
    assert (scores["acc"], scores["acc_norm"]) == (expected["accuracy"], expected["accuracy_by_byte"])
    assert 0 < scores["acc"] < 1 and scores["acc"] != scores["acc_norm"]
    assert (scores["questions"], scores["shots"]) == (30, 0)
    assert found["dense_tasks"] == found["tasks"]
    assert f"exam: acc {scores['acc']:.4g}" in run.stdout
    by_name = ("--tasks", "exam", "--include-path", str(task.parent), "--limit", "7", "--task-batch", "4")
    run = evaluated(harness, folder, *by_name, "--json", str(record))
    assert run.returncode == 0, run.stderr
    assert json.loads(record.read_text())["tasks"]["exam"]["questions"] == 7


@pytest.mark.slow
def test_tasks_that_are_not_there(harness: Path, tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    task = tmp_path / "exam.yaml"
    task.write_text(TASK.format(questions=tmp_path / "missing.jsonl"))
    for words, sentence in (
        (str(tmp_path / "none.yaml"), "there is no task file"),
        ("no_such_task", "lm-eval has no task 'no_such_task'"),
        (str(task), "cannot be read: "),
    ):
        run = evaluated(harness, folder, "--tasks", words)
        assert run.returncode == 2
        assert sentence in run.stderr.splitlines()[-1]
