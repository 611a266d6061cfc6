"""`optprune.prune_model`: one call that writes the folder that the command writes."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

import optprune
from optprune.cli import main
from optprune.cli.run_folder import run_folder_of
from optprune.errors import InputError
from optprune.patterns import NM, Unstructured
from optprune.problems import SparseLeastSquares
from optprune.report import Event, LayerSolved, PhaseFinished
from optprune.solvers import SparseGpt
from tests.helpers.attempts import Attempt


def test_the_folder_is_that_of_the_command(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    theirs, ours, events = attempt.folder / "command", attempt.folder / "call", list[Event]()
    words = ("--recipe", "structured_best", "--sparsity", "0.25", "--set", "damping=0.02")
    assert main(attempt.command(*words, output=theirs)) == 0
    capsys.readouterr()
    report = optprune.prune_model(
        attempt.model,
        "structured_best",
        sparsity=0.25,
        fields={"damping": 0.02},
        calibration=str(attempt.text),
        samples=8,
        seq_length=64,
        output=ours,
        on_event=events.append,
    )
    assert capsys.readouterr() == ("", "")
    for name in ("model.safetensors", "config.json", "recipe.yaml", "README.md"):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    assert report == optprune.prune_model(  # it is finished: the report is read
        attempt.model,
        "structured_best",
        sparsity=0.25,
        fields={"damping": 0.02},
        calibration=str(attempt.text),
        samples=8,
        seq_length=64,
        output=ours,
        resume=True,
    )
    assert report is not None
    assert [event.layer for event in events if isinstance(event, LayerSolved)] == list(report.layers)
    ended = [event.phase.name for event in events if isinstance(event, PhaseFinished)]
    assert ended[0] == "tokenising" and ended[-1] == "checking"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"recipe": "fsap"}, "fasp"),
        ({"sparsity": 1.5}, "sparsity"),
        ({"samples": 0}, "samples"),
        ({"fields": {"dampng": 0.1}}, "dampng"),
        ({"calibration": "nowhere.txt"}, "there is no text 'nowhere.txt'"),
        ({"target": "vlm"}, "vllm"),
        ({"dtype": "int3"}, "int3"),
    ],
)
def test_a_refusal_leaves_nothing(attempt: Attempt, changed: dict, sentence: str) -> None:
    before = sorted(attempt.folder.iterdir())
    words = {"model": attempt.model, "calibration": str(attempt.text), "samples": 8, "seq_length": 64}
    with pytest.raises(InputError, match=sentence):
        optprune.prune_model(**words | changed, output=attempt.output)
    assert sorted(attempt.folder.iterdir()) == before


def test_a_stopped_run_is_continued(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    words = {"model": attempt.model, "calibration": str(attempt.text), "samples": 8, "seq_length": 64}
    solved = list[LayerSolved]()

    def stop(event: Event) -> None:
        solved.extend([event] if isinstance(event, LayerSolved) else [])
        if len(solved) == 3:
            raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        optprune.prune_model(**words, output=attempt.output, on_event=stop)
    assert not attempt.output.exists() and run_folder_of(attempt.output).exists()
    again = list[Event]()
    optprune.prune_model(**words, output=attempt.output, resume=True, on_event=again.append, progress=True)
    assert not run_folder_of(attempt.output).exists()
    assert "the whole run, in" in capsys.readouterr().err
    other = attempt.folder / "other"
    report = optprune.prune_model(**words, output=other)
    assert report is not None
    assert 0 < sum(isinstance(event, LayerSolved) for event in again) < len(report.layers)
    assert (other / "model.safetensors").read_bytes() == (attempt.output / "model.safetensors").read_bytes()


def test_a_folder_that_exists_is_refused(attempt: Attempt) -> None:
    Path(attempt.output).mkdir(parents=True)
    with pytest.raises(InputError, match="exists"):
        optprune.prune_model(attempt.model, calibration=str(attempt.text), output=str(attempt.output))


@pytest.mark.parametrize(
    ("allocation", "expected"),
    [
        ("uniform", {"kind": "uniform", "multiple": None}),
        ({"kind": "uniform", "multiple": 16}, {"kind": "uniform", "multiple": 16}),
    ],
    ids=["a name", "a mapping"],
)
def test_the_allocation_is_a_field_like_any_other(attempt: Attempt, allocation: object, expected: dict) -> None:
    """The recipe's own allocation is global, and its metric has a clip, which null takes away."""
    report = optprune.prune_model(
        attempt.model,
        "structured_best",
        fields={"allocation": allocation, "metric.clip": None},
        calibration=str(attempt.text),
        samples=8,
        seq_length=64,
        output=attempt.output,
    )
    assert report is not None
    assert report.recipe["allocation"] == expected
    assert report.recipe["metric"]["clip"] is None


def test_a_field_that_an_argument_gives_too_is_refused(attempt: Attempt) -> None:
    with pytest.raises(InputError, match=r"the recipe field 'sparsity' is given twice, the second time as 0\.3 in"):
        optprune.prune_model(
            attempt.model,
            sparsity=0.25,
            fields={"sparsity": 0.3},
            calibration=str(attempt.text),
            samples=8,
            seq_length=64,
            output=attempt.output,
        )
    assert not attempt.output.parent.exists()


def pairs_in_attention(context: optprune.LayerContext) -> SparseLeastSquares:
    pattern = NM(2, 4) if "self_attn" in context.name else Unstructured(context.keep)
    return SparseLeastSquares(context.loss, pattern)


def test_an_objective_in_python_writes_a_folder_and_is_continued(attempt: Attempt) -> None:
    own = optprune.Recipe(objective=pairs_in_attention, solver=SparseGpt(), units="weights", sparsity=0.5)
    text = {"calibration": str(attempt.text), "samples": 8, "seq_length": 64}
    report = optprune.prune_model(attempt.model, own, output=attempt.output, **text)
    weights = load_file(attempt.output / "model.safetensors")
    groups = [tensor.unflatten(1, (-1, 4)) for name, tensor in weights.items() if "_proj" in name and "attn" in name]
    assert groups and all(((group == 0).sum(2) == 2).all() for group in groups)
    assert report == optprune.prune_model(attempt.model, own, output=attempt.output, resume=True, **text)


def test_a_recipe_of_a_name_is_pruned_by_as_the_name_is(attempt: Attempt) -> None:
    by_name, by_object = attempt.folder / "name", attempt.folder / "object"
    own = optprune.load_recipe("structured_best", {"damping": 0.02})
    text = {"calibration": str(attempt.text), "samples": 8, "seq_length": 64}
    optprune.prune_model(
        attempt.model, "structured_best", sparsity=0.25, fields={"damping": 0.02, "seed": 3}, output=by_name, **text
    )
    optprune.prune_model(attempt.model, own, sparsity=0.25, fields={"seed": 3}, output=by_object, **text)
    assert (by_object / "model.safetensors").read_bytes() == (by_name / "model.safetensors").read_bytes()
    with pytest.raises(InputError, match="a Recipe has no effort 'quick': leave the effort out"):
        optprune.prune_model(attempt.model, own, effort="quick", output=attempt.output, **text)
    assert not attempt.output.parent.exists()
