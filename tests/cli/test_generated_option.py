"""`prune --generated`: windows that the dense model generates, beside those of the text."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import optprune
from optprune.calibration import generated
from optprune.calibration.generated import with_generated
from optprune.cli import main
from optprune.errors import InputError
from optprune.pruning import executors
from optprune.texts import draw_windows, read_texts
from tests.helpers.attempts import Attempt

REAL = list(torch.arange(12).view(6, 2).split(4))
NEW = -torch.arange(1, 21).view(10, 2)


@pytest.mark.parametrize("share", [0.0, 0.125, 0.25])
def test_windows_are_mixed_and_only_real_ones_are_held_out(share: float) -> None:
    found = torch.cat(with_generated(REAL, NEW, held_out=share, seed=1))
    apart = round(16 * share)
    assert {tuple(row) for row in found.tolist()} == {tuple(row) for row in (*torch.cat(REAL).tolist(), *NEW.tolist())}
    assert torch.equal(found[16 - apart :], torch.cat(REAL)[6 - apart :])
    signs = (found[: 16 - apart, 0] < 0).tolist()
    assert signs != sorted(signs) and signs != sorted(signs, reverse=True)
    assert torch.equal(found, torch.cat(with_generated(REAL, NEW, held_out=share, seed=1)))
    assert not torch.equal(found, torch.cat(with_generated(REAL, NEW, held_out=share, seed=2)))
    assert [len(batch) for batch in with_generated(REAL, NEW)] == [4, 4, 4, 4]


def test_too_many_windows_are_not_held_out() -> None:
    with pytest.raises(InputError, match="8 of 16 windows are held out, and only 6 are from the text: give more"):
        with_generated(REAL, NEW, held_out=0.5)


def test_the_run_is_that_of_prune_on_the_mixed_windows(attempt: Attempt) -> None:
    assert main(attempt.command("--recipe", "fasp", "--generated", "4")) == 0
    report = json.loads((attempt.output / "report.json").read_text())
    assert report["tokens"] == 12 * 64
    assert report["calibration"].endswith(
        "8 windows of 64 tokens, seed 0, and 4 windows that the dense model generated"
    )
    assert "generating" in [phase["name"] for phase in report["phases"]]
    loaded = optprune.load_model(attempt.model)
    assert loaded.tokenizer is not None
    batches = draw_windows(loaded.tokenizer, read_texts(str(attempt.text)), 8, 64, seed=0).batches
    windows = generated.generated_windows(loaded.model, batches, 4)
    optprune.prune(loaded.model, with_generated(batches, windows), optprune.load_recipe("fasp"))
    there = optprune.load_model(attempt.output).model.state_dict()
    assert all(torch.equal(weight, there[name]) for name, weight in loaded.model.state_dict().items())


def test_a_run_that_goes_on_does_not_generate_again(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ("--recipe", "fasp", "--generated", "4")
    honest, made = generated.generated_windows, list[Tensor]()

    def counted(*arguments, **more) -> Tensor:
        made.append(honest(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(generated, "generated_windows", counted)
    solved, solve = list[str](), executors.solve_layer

    def stops(task, *moments):
        solved.append(task.name)
        if ".1." in task.name:
            raise KeyboardInterrupt
        return solve(task, *moments)

    with monkeypatch.context() as patch:
        patch.setattr(executors, "solve_layer", stops)
        assert main(attempt.command(*words)) == 130
    assert main(attempt.command(*words, "--resume")) == 0
    assert len(made) == 1
    first = (attempt.output / "model.safetensors").read_bytes()
    assert main(attempt.command(*words, "--overwrite")) == 0
    assert len(made) == 2 and torch.equal(*made)
    assert (attempt.output / "model.safetensors").read_bytes() == first


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--generated", "-1"], "--generated cannot be -1: it is at least 0"),
        (["--generated", "4", "--vocabulary", "0.5"], "in tokens that --vocabulary removes: leave out one of them"),
        (
            ["--generated", "40", "--set", "refit.held_out=0.5"],
            "24 of 48 windows are held out, and only 8 are from the text: give more samples, or fewer generated",
        ),
    ],
)
def test_what_does_not_go_together_is_refused_before_the_model_is_read(
    attempt: Attempt, more: list[str], sentence: str
) -> None:
    assert sentence in attempt.fails(attempt.command(*more))


def test_the_plan_has_a_phase_for_it(tmp_path: Path, attempt: Attempt) -> None:
    plans = []
    for count in ("0", "200"):
        file = tmp_path / f"{count}.json"
        words = ["plan", str(attempt.model), "--samples", "8", "--seq-length", "64", "--no-probe", "--json", str(file)]
        assert main([*words, "--generated", count]) == 0
        plans.append({phase["name"]: phase for phase in json.loads(file.read_text())["phases"]})
    assert set(plans[1]) - set(plans[0]) == {"generating"}
    assert plans[1]["generating"]["host_bytes"] > 0
    states = [plan["pruning"]["parts"]["hidden states"] for plan in plans]
    assert states[1] == 26 * states[0]
