"""The log of a command: the lines of progress with the time, added to a file, or one sentence before anything costs."""

import re
from datetime import datetime
from pathlib import Path

import pytest

from optprune.cli import main
from optprune.cli.log import LogFile
from optprune.report import BlockStarted
from tests.helpers.attempts import Attempt


def test_a_log_holds_the_lines_of_progress_with_the_time(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    log = attempt.folder / "run.log"
    earlier = "2026-01-02T03:04:05+00:00 a line of an earlier run"
    log.write_text(f"{earlier}\n")
    assert main(attempt.command("--log", str(log))) == 0
    told = capsys.readouterr().err.splitlines()
    before, *lines = log.read_text().splitlines()
    assert before == earlier
    times, texts = zip(*(line.split(" ", 1) for line in lines), strict=True)
    assert list(texts) == told
    assert texts[-1].startswith("the whole run, in ")
    assert list(times) == sorted(times)
    assert all(datetime.fromisoformat(time).tzinfo is not None for time in times)
    for words in (
        "tokenising",
        "loading",
        "reading all weights",
        "pruning, block 2 of 2",
        "saving",
        "checking, block 2",
    ):
        assert any(text.startswith(words) for text in texts), words


@pytest.mark.usefixtures("no_weights")
def test_nothing_is_appended_to_what_is_no_log(attempt: Attempt) -> None:
    file = attempt.folder / "model.safetensors"
    file.write_bytes(b"\x08\0\0\0\0\0\0\0{}      ")
    assert "exists, and no such command of optprune wrote it" in attempt.fails(attempt.command("--log", str(file)))
    assert file.stat().st_size == 16


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("missing/run.log", "the log {file} cannot be written: there is no folder"),
        ("", "the log {file} is a folder: name a file"),
        ("new/out/run.log", "the log {file} lies in {folder}/new/out, which the run replaces: name another place"),
        ("new/out.run/run.log", "there is no folder"),
    ],
)
def test_a_log_that_cannot_be_written_is_told_before_anything(attempt: Attempt, file: str, reason: str) -> None:
    named = attempt.folder / file
    sentence = attempt.fails(attempt.command("--log", str(named)))
    assert reason.format(file=named, folder=attempt.folder) in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_log_in_place_of_a_file_of_the_model_that_is_read(attempt: Attempt) -> None:
    before = (attempt.model / "config.json").read_bytes()
    assert "may have" in attempt.fails(attempt.command("--log", str(attempt.model / "config.json")))
    assert (attempt.model / "config.json").read_bytes() == before


def test_a_log_that_stops_being_writable_is_told_once_and_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "logs"
    folder.mkdir()
    log = LogFile(folder / "run.log")
    log("first")
    (folder / "run.log").rename(tmp_path / "kept")
    folder.rmdir()
    log("second")
    log("third")
    assert re.fullmatch(r"\S+ first\n", (tmp_path / "kept").read_text())
    assert (
        capsys.readouterr().err
        == f"the log {folder / 'run.log'} cannot be written any more (No such file or directory)\n"
    )


def test_a_run_that_goes_on_goes_on_in_its_log(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    log = attempt.folder / "run.log"

    class Stopped(KeyboardInterrupt):
        pass

    def stop(event: object) -> None:
        if isinstance(event, BlockStarted) and event.block == 1:
            raise Stopped

    with monkeypatch.context() as patch:
        patch.setattr("optprune.report.estimate.PositionTracker.after", lambda self, event: stop(event))
        assert main(attempt.command("--log", str(log))) == 130
    begun = log.read_text()
    assert begun.splitlines()[-1].endswith(" stopped: Stopped")
    assert main(attempt.command("--log", str(log), "--resume")) == 0
    assert log.read_text().startswith(begun)
    assert "passing finished blocks by, in" in log.read_text()[len(begun) :]
