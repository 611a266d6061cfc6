"""`prune --generated`: windows that the dense model generates, beside those of the text."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

import optprune
from optprune import pruning
from optprune.calibration import generated
from optprune.calibration.generated import kept_or_new, with_generated
from optprune.calibration.peers import SingleProcess
from optprune.cli import main
from optprune.errors import InputError
from optprune.pruning import executors, goal
from optprune.texts import demo_articles, draw_windows, read_texts
from tests.helpers.attempts import Attempt, snapshot
from tests.helpers.tiny_models import save_tiny
from tests.helpers.trained_tiny import trained

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


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The windows of every call that generates some."""
    honest, made = generated.generated_windows, list[Tensor]()

    def counted(*arguments, **more) -> Tensor:
        made.append(honest(*arguments, **more))
        return made[-1]

    monkeypatch.setattr(generated, "generated_windows", counted)
    return made


def stopped_in_block_1(command: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    solve = executors.solve_layer

    def stops(task, *moments):
        if ".1." in task.name:
            raise KeyboardInterrupt
        return solve(task, *moments)

    with monkeypatch.context() as patch:
        patch.setattr(executors, "solve_layer", stops)
        assert main(command) == 130


@pytest.mark.parametrize(("before", "now"), [(4, 40), (0, 4), (4, 0)])
def test_a_run_goes_on_with_as_many_windows_only(
    before: int, now: int, attempt: Attempt, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    stopped_in_block_1(attempt.command("--recipe", "fasp", "--generated", str(before)), monkeypatch)
    made.clear()
    left = snapshot(attempt.folder)
    attempt.capsys.readouterr()
    assert main(attempt.command("--recipe", "fasp", "--generated", str(now), "--resume")) == 2
    assert "the number of generated windows" in attempt.capsys.readouterr().err
    assert snapshot(attempt.folder) == left and not made


def test_a_quality_is_tried_on_the_windows_that_the_run_has(
    attempt: Attempt, tmp_path: Path, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    save_tiny(trained(), tmp_path / "trained")
    other = tmp_path / "other.txt"
    other.write_text("\n".join(demo_articles("evaluation")[:20]))
    seen = list[Tensor]()
    for module in (goal, pruning):
        honest = module.run_program

        def noted(program, decoder, batches, *arguments, honest=honest, **more):
            seen.append(torch.cat(list(batches)))
            return honest(program, decoder, batches, *arguments, **more)

        monkeypatch.setattr(module, "run_program", noted)
    words = ["--to-quality", "1.04", "--text", str(other), "--windows", "4", "--set", "allocation.multiple=1"]
    command = attempt.command("--recipe", "fasp", "--units", "mlp", "--generated", "4", *words)
    command[1] = str(tmp_path / "trained")
    assert main(command) == 0
    assert len(seen) > 1 and all(torch.equal(windows, seen[-1]) for windows in seen)
    assert len(seen[-1]) == 12 and len(made) == 1


def test_a_run_that_goes_on_does_not_generate_again(
    attempt: Attempt, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--recipe", "fasp", "--generated", "4")
    stopped_in_block_1(attempt.command(*words), monkeypatch)
    assert main(attempt.command(*words, "--resume")) == 0
    assert len(made) == 1
    first = (attempt.output / "model.safetensors").read_bytes()
    assert main(attempt.command(*words, "--overwrite")) == 0
    assert len(made) == 2 and torch.equal(*made)
    assert (attempt.output / "model.safetensors").read_bytes() == first


def test_windows_are_kept_as_soon_as_they_are_generated(
    attempt: Attempt, made: list[Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = attempt.command("--recipe", "fasp", "--generated", "4")

    def stop(*arguments, **more):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pruning, "run_program", stop)
        assert main(command) == 130
    assert "text is generated, and kept in" in attempt.capsys.readouterr().err
    assert main([*command, "--resume"]) == 0
    assert len(made) == 1


def test_nothing_is_generated_for_a_finished_output(attempt: Attempt, made: list[Tensor]) -> None:
    command = attempt.command("--recipe", "fasp", "--generated", "4")
    assert main(command) == 0
    left = snapshot(attempt.output)
    assert main([*command, "--resume"]) == 0
    assert "was already finished by this command" in attempt.capsys.readouterr().out
    assert snapshot(attempt.output) == left and len(made) == 1
    attempt.text.write_text(attempt.text.read_text() + "more text\n")
    assert main([*command, "--resume"]) == 2
    assert "the calibration tokens were others" in attempt.capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "sentence"),
    [
        (["--generated", "-1"], "--generated cannot be -1: it is at least 0"),
        (["--generated", "2000000"], "the dense model cannot generate 2000000 windows: give 0 to 1000000"),
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


def test_an_error_in_the_run_folder_of_the_first_process_is_raised_in_all() -> None:
    class Second(SingleProcess):
        def all_gather(self, value):
            return [InputError("the windows in the run folder are damaged"), value]

    with pytest.raises(InputError, match="damaged"):
        kept_or_new(None, lambda: NEW, Second(rank=1, size=2))


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
