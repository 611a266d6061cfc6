"""Unfinished runs: a refusal changes nothing, whatever took time is kept, and nothing of anybody else's is deleted."""

import gc
import json
import re
import shutil
import signal
import time
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from optprune.cli.app import main
from optprune.comparison.kept_folder import ComparisonFolder
from optprune.healing import HealingFolder
from optprune.models.store import BlockStore
from optprune.pruning import Journal
from optprune.pruning.run import Run
from optprune.report import BlockStarted, Event, PhaseAdvanced
from optprune.report.progress import Reporter
from optprune.system.folders import ManifestFolder
from optprune.texts import demo_articles
from tests.helpers.busy_folders import held_by_another_process
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.torture.moments import INTERRUPT, TERMINATE, moments

PRUNE = ["--samples", "4", "--seq-length", "32"]
HEAL = ["--seq-length", "32", "--batch-size", "2", "--held-out", "2", "--tokens", "512"]


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, one of its shape with other weights, and a text."""
    folder = tmp_path_factory.mktemp("inputs")
    save_tiny(tiny_llama(num_hidden_layers=3), folder / "model")
    torch.manual_seed(1)
    save_tiny(tiny_llama(num_hidden_layers=3), folder / "teacher")
    (folder / "text.txt").write_text("\n".join(demo_articles("calibration")[:40]))
    return folder


@pytest.fixture
def prune(inputs: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `optprune prune` into tmp_path/out."""
    given = ["prune", str(inputs / "model"), "--calibration", str(inputs / "text.txt"), *PRUNE]
    return lambda *more: main([*given, "--output", str(tmp_path / "out"), *more])


@pytest.fixture
def heal(inputs: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `optprune heal` into tmp_path/out."""
    given = ["heal", str(inputs / "model"), "--teacher", str(inputs / "teacher"), "--text", str(inputs / "text.txt")]
    return lambda *more: main([*given, *HEAL, "--output", str(tmp_path / "out"), *more])


@pytest.fixture
def compare(inputs: Path, tmp_path: Path) -> Callable[..., int]:
    """Run `optprune compare` into tmp_path/out."""
    (inputs / "other.txt").write_text("\n".join(demo_articles("evaluation")[:20]))
    given = ["compare", str(inputs / "model"), "--recipes", "magnitude", "--sparsities", "0.3", *PRUNE]
    texts = ["--calibration", str(inputs / "text.txt"), "--text", str(inputs / "other.txt"), "--windows", "2"]
    return lambda *more: main([*given, *texts, "--output", str(tmp_path / "out"), *more])


def contents(folder: Path) -> dict[str, bytes | None]:
    """All files and folders, but for an empty lock."""
    every = {str(path.relative_to(folder)): path for path in folder.rglob("*")}
    found = {name: path for name, path in every.items() if path.name != "in-use" or path.stat().st_size}
    return {name: path.read_bytes() if path.is_file() else None for name, path in found.items()}


def weights(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.stem != "report"}


def stopped(run: Callable[..., int], *words: str, share: float = 0.6, how: str = INTERRUPT) -> None:
    """Begin a run and interrupt it when that share of its moments is over."""
    with moments(None) as seen:
        assert run(*words) == 0
    with moments(round(share * len(seen)), how):
        assert run(*words, "--overwrite") == 130


@pytest.fixture
def stop_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[Event], bool]], None]:
    """Interrupt a run at the first event that a function chooses."""
    events = Reporter.events

    def at(chosen: Callable[[Event], bool]) -> None:
        from contextlib import contextmanager

        @contextmanager
        def interrupting(self: Reporter, expected) -> Iterator[Callable[[Event], None]]:
            with events(self, expected) as on_event:

                def hear(event: Event) -> None:
                    if chosen(event):
                        signal.raise_signal(signal.SIGTERM)
                    on_event(event)

                yield hear

        monkeypatch.setattr(Reporter, "events", interrupting)

    return at


def begun(prune: Callable[..., int], stop_at, monkeypatch: pytest.MonkeyPatch, *words: str, block: int = 2) -> None:
    """Begin a run that is stopped before a block."""
    with monkeypatch.context():
        stop_at(lambda event: isinstance(event, BlockStarted) and event.block == block)
        assert prune(*words) == 130
    monkeypatch.undo()


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("other", "named"),
    [
        (["--sparsity", "0.3"], "the recipe.sparsity was 0.2 and is 0.3"),
        (["--seed", "1"], "the recipe.seed was 0 and is 1"),
        (["--samples", "3"], "the calibration tokens were others"),
        (["--recipe", "flap"], "the recipe."),
    ],
)
def test_another_command_leaves_the_run_as_it_is(other, named, prune, stop_at, monkeypatch, tmp_path, capsys) -> None:
    begun(prune, stop_at, monkeypatch)
    before = contents(tmp_path)
    capsys.readouterr()
    assert prune(*other, "--resume") == 2
    said = capsys.readouterr().err
    assert named in said
    assert "nothing was changed" in said and "--restart" in said
    assert contents(tmp_path) == before
    assert prune("--resume") == 0
    assert not (tmp_path / "out.run").exists()


def test_another_number_of_threads_leaves_the_run_as_it_is(prune, stop_at, monkeypatch, tmp_path, capsys) -> None:
    begun(prune, stop_at, monkeypatch)
    before, threads = contents(tmp_path), torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        assert prune("--resume") == 2
    finally:
        torch.set_num_threads(threads)
    assert "the machine.threads was" in capsys.readouterr().err
    assert contents(tmp_path) == before


def test_the_seconds_of_finished_work_are_counted(prune, stop_at, monkeypatch, tmp_path) -> None:
    def slow(event: Event) -> bool:
        time.sleep(1.0 if isinstance(event, BlockStarted) and event.block == 1 else 0.0)
        return isinstance(event, BlockStarted) and event.block == 2

    stop_at(slow)
    assert prune() == 130
    monkeypatch.undo()
    assert prune("--resume") == 0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    seconds = {phase["name"]: phase["seconds"] for phase in report["phases"]}
    assert 1.0 < seconds["earlier processes"] < 60.0
    assert report["seconds"] > seconds["earlier processes"]


def test_an_unfinished_run_is_neither_deleted_nor_gone_on_with_unasked(
    prune, stop_at, monkeypatch, tmp_path, capsys
) -> None:
    begun(prune, stop_at, monkeypatch)
    before = contents(tmp_path)
    for words in ([], ["--overwrite"]):
        assert prune(*words) == 2
        assert "holds an unfinished run (2 of 3 blocks are done)" in capsys.readouterr().err
    assert contents(tmp_path) == before
    assert prune("--resume", "--restart") == 2
    (tmp_path / "out.run" / ".block-00002.json.0123abcd.part").write_text("of a killed process")
    before = contents(tmp_path)
    assert prune("--resume", "--sparsity", "0.3") == 2
    assert contents(tmp_path) == before
    assert prune("--sparsity", "0.3", "--restart") == 0
    assert not (tmp_path / "out.run").exists()


@pytest.fixture
def short(tmp_path: Path) -> list[str]:
    """A text of too few tokens, which is known only when it is tokenised."""
    (tmp_path / "short.txt").write_text("nine tokens")
    return ["--calibration", str(tmp_path / "short.txt")]


def test_a_restart_that_is_refused_leaves_the_run_as_it_is(
    prune, short, stop_at, monkeypatch, tmp_path, capsys
) -> None:
    begun(prune, stop_at, monkeypatch)
    before = contents(tmp_path)
    assert prune(*short, "--restart") == 2
    assert "the calibration text has" in capsys.readouterr().err.splitlines()[-1]
    assert contents(tmp_path) == before
    assert prune("--resume") == 0
    assert not (tmp_path / "out.run").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_a_restart_that_ends_before_it_has_begun_leaves_the_run(error, prune, stop_at, monkeypatch, tmp_path) -> None:
    begun(prune, stop_at, monkeypatch)
    before = contents(tmp_path)

    def ends(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr("optprune.pruning.run.facts", ends)
        assert prune("--restart") != 0
    gc.collect()
    assert contents(tmp_path) == before
    assert prune("--restart") == 0


def left_by_a_kill(output: Path) -> Path:
    """Make the draft of a run that was killed."""
    draft = output.with_name(f".{output.name}.0123abcd")
    (draft / "model").mkdir(parents=True)
    (draft / ".optprune-draft").touch()
    (draft / "model" / "config.json").write_text("{}")
    return draft


def test_drafts_of_killed_runs_are_deleted_only_by_a_run_that_begins(prune, short, tmp_path, capsys) -> None:
    draft = left_by_a_kill(tmp_path / "out")
    before = contents(tmp_path)
    assert prune(*short) == 2
    assert contents(tmp_path) == before
    assert prune("--resume") == 0
    assert not draft.exists() and f"deleting {draft}, which a killed run left behind" in capsys.readouterr().err
    left_by_a_kill(tmp_path / "out")
    assert prune("--resume") == 0, "a finished output is tidied too"
    assert not draft.exists()


@pytest.mark.e2e
def test_drafts_of_killed_healings_stay_where_a_healing_is_refused(heal, tmp_path, capsys) -> None:
    draft = left_by_a_kill(tmp_path / "out")
    for _ in ("new", "finished"):
        assert heal("--resume") == 0
        assert not draft.exists() and f"deleting {draft}, which a killed run left behind" in capsys.readouterr().err
        left_by_a_kill(tmp_path / "out")
    before = contents(tmp_path)
    assert heal("--resume", "--tokens", "256") == 2
    assert re.search("another command: the number of training tokens was [0-9]+ and is 256;", capsys.readouterr().err)
    assert contents(tmp_path) == before


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("what", "event"),
    [
        ("the output metric is measured", lambda event: isinstance(event, PhaseAdvanced) and event.phase == "budget"),
        (
            "the costs of",
            lambda event: isinstance(event, PhaseAdvanced) and event.phase == "budget" and event.done == 2,
        ),
        ("the budget is divided", lambda event: isinstance(event, BlockStarted)),
    ],
)
def test_what_is_measured_before_the_first_block_is_kept(
    what, event, prune, stop_at, monkeypatch, tmp_path, capsys
) -> None:
    words = ["--recipe", "structured_best", "--units", "mlp"]
    assert prune(*words) == 0
    expected = weights(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with monkeypatch.context():
        stop_at(event)
        assert prune(*words) == 130
    monkeypatch.undo()
    said = capsys.readouterr().err
    assert what in said and "and kept in" in said
    with monkeypatch.context() as patch:
        # What is kept is not measured again.
        never = lambda *_, **__: pytest.fail("measured again")  # noqa: E731
        patch.setattr("optprune.calibration.dense_statistics.collect_metrics", never)
        if "divided" in what:
            patch.setattr("optprune.calibration.dense_statistics.removal_curve", never)
        elif "costs" in what:
            from optprune.calibration import dense_statistics

            curves, measure = [], dense_statistics.removal_curve
            patch.setattr(dense_statistics, "removal_curve", lambda *a, **b: (curves.append(1), measure(*a, **b))[1])
        assert prune(*words, "--resume") == 0
        if "costs" in what:
            assert len(curves) == 1  # of the third block
    assert weights(tmp_path / "out") == expected
    assert not (tmp_path / "out.run").exists()


def test_the_same_command_again_finds_its_output_finished(prune, tmp_path, capsys) -> None:
    assert prune("--resume") == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert prune("--resume", "--json", str(tmp_path / "record.json")) == 0
    assert "was already finished by this command" in capsys.readouterr().out
    report = (tmp_path / "out" / "report.json").read_bytes()
    record = json.loads((tmp_path / "record.json").read_text())
    assert record == {"generator": "written by optprune", **json.loads(report)}
    (tmp_path / "record.json").unlink()
    assert contents(tmp_path) == before
    for other, named in ((["--sparsity", "0.3"], "the recipe.sparsity"), (["--samples", "3"], "calibration tokens")):
        assert prune("--resume", *other) == 2
        said = capsys.readouterr().err
        assert "was finished by another command" in said and named in said
        assert contents(tmp_path) == before
    assert prune("--resume", "--overwrite", "--sparsity", "0.3") == 0
    assert contents(tmp_path) != before


@pytest.mark.e2e
def test_a_finished_healing_is_found_too(heal, tmp_path, capsys) -> None:
    assert heal("--resume") == 0
    before = contents(tmp_path)
    capsys.readouterr()
    assert heal("--resume") == 0
    assert "was already finished by this command" in capsys.readouterr().out
    assert heal("--resume", "--seed", "3") == 2
    assert "the settings.seed was 0 and is 3" in capsys.readouterr().err
    assert contents(tmp_path) == before


@pytest.mark.e2e
def test_healing_with_other_settings_leaves_the_run_as_it_is(heal, tmp_path, capsys) -> None:
    stopped(heal, how=TERMINATE)
    assert "and kept in" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    before = contents(tmp_path)
    for other in (["--seed", "1"], ["--epochs", "2"], ["--tokens", "256"]):
        assert heal("--resume", *other) == 2
        assert "nothing was changed" in capsys.readouterr().err
        assert contents(tmp_path) == before
    assert heal("--resume") == 0
    assert not (tmp_path / "out.run").exists()


def plant_notes(place: Path) -> None:
    place.mkdir()
    (place / "notes.txt").write_text("mine")


def plant_manifest(place: Path) -> None:
    place.mkdir()
    (place / "run.json").write_text('{"the blocks": 3}')
    (place / "block-00000.json").write_text("{}")


def plant_link(place: Path) -> None:
    target = place.with_name("elsewhere")
    target.mkdir()
    (target / "notes.txt").write_text("mine")
    place.symlink_to(target)


def plant_link_to_empty(place: Path) -> None:
    place.with_name("elsewhere").mkdir()
    place.symlink_to(place.with_name("elsewhere"))


def plant_file(place: Path) -> None:
    place.write_text("mine")


def plant_lock(place: Path) -> None:
    place.mkdir()
    (place / "in-use").write_text("mine")


def plant_lock_of_a_run(place: Path) -> None:
    Journal(place).release()
    (place / "in-use").write_text("mine")


@pytest.mark.parametrize(
    "plant",
    [plant_notes, plant_manifest, plant_link, plant_link_to_empty, plant_file, plant_lock, plant_lock_of_a_run],
)
@pytest.mark.parametrize("words", [[], ["--resume"], ["--restart"], ["--overwrite"]], ids=" ".join)
def test_what_others_put_at_the_place_of_the_run_stays(plant, words, prune, tmp_path, capsys) -> None:
    plant(tmp_path / "out.run")
    before = contents(tmp_path), (tmp_path / "out.run").is_symlink()
    assert prune(*words) == 2
    assert "out.run" in capsys.readouterr().err
    assert (contents(tmp_path), (tmp_path / "out.run").is_symlink()) == before


def test_an_empty_folder_of_the_users_is_used_and_stays(prune, tmp_path) -> None:
    (tmp_path / "out.run").mkdir()
    assert prune() == 0
    assert (tmp_path / "out.run").is_dir()
    assert not list((tmp_path / "out.run").iterdir())


def test_an_empty_folder_that_a_kill_left_goes_with_the_run_that_is_continued(prune, tmp_path) -> None:
    (tmp_path / "out.run").mkdir()
    assert prune("--resume") == 0
    assert not (tmp_path / "out.run").exists()


def test_files_of_the_users_in_a_run_folder_stay(prune, stop_at, monkeypatch, tmp_path, capsys) -> None:
    begun(prune, stop_at, monkeypatch)
    run = tmp_path / "out.run"
    target = tmp_path / "target.txt"
    target.write_text("mine")
    (run / "notes.txt").write_text("mine")
    (run / "more").mkdir()
    (run / "more" / "notes.txt").write_text("mine")
    (run / "block-x.json").write_text("mine")
    (run / "link").symlink_to(target)
    assert prune("--resume") == 0
    assert sorted(path.name for path in run.iterdir()) == ["block-x.json", "link", "more", "notes.txt"]
    assert (
        "is not deleted, because it holds files of others: block-x.json, link, more, notes.txt"
        in capsys.readouterr().err
    )
    assert target.read_text() == "mine"


def test_a_file_of_the_users_is_not_written_over(prune, stop_at, monkeypatch, tmp_path, capsys) -> None:
    begun(prune, stop_at, monkeypatch)
    file = tmp_path / "out.run" / "block-00002.json"
    file.write_text("mine")
    before = contents(tmp_path)
    for words in (["--resume"], ["--restart"]):
        assert prune(*words) == 2
        assert "block-00002.json was not written by this run: move it away" in capsys.readouterr().err
        assert contents(tmp_path) == before
    file.unlink()
    assert prune("--resume") == 0


FOLDERS: dict[str, tuple[type[ManifestFolder], str]] = {
    "prune": (Journal, "out.run"),
    "heal": (HealingFolder, "out.run"),
    "compare": (ComparisonFolder, "out"),
}


@pytest.mark.e2e
@pytest.mark.parametrize("command", FOLDERS)
def test_a_second_run_at_the_same_time_is_told_of_the_first(
    command: str, prune, heal, compare, tmp_path, capsys
) -> None:
    run = {"prune": prune, "heal": heal, "compare": compare}[command]
    kind, name = FOLDERS[command]
    kind(tmp_path / name).release()
    with held_by_another_process(tmp_path / name):
        before = contents(tmp_path)
        for words in ([], *([] if command == "compare" else [["--resume"], ["--restart"], ["--overwrite"]])):
            assert run(*words) == 2
            assert f"another process is using the {kind.noun} in" in capsys.readouterr().err
        assert contents(tmp_path) == before
    assert run() == 0


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_an_interrupt_in_a_finaliser_ends_the_run(prune, monkeypatch, tmp_path, capsys) -> None:
    """Python drops what a finaliser raises: the next step must raise it again."""
    started = Run.prune_block

    def prune_block(self, index: int) -> None:
        if index == 1:
            thing = BlockStore.__new__(BlockStore)
            weakref.finalize(thing, signal.raise_signal, signal.SIGINT)
            del thing
            gc.collect()
        started(self, index)

    monkeypatch.setattr(Run, "prune_block", prune_block)
    assert prune() == 130
    assert "interrupted; 1 of 3 blocks are done, and kept in" in capsys.readouterr().err
    monkeypatch.undo()
    assert prune("--resume") == 0
