"""Interrupts at any moment: all or nothing is written, and the message says which."""

import contextlib
import gc
import os
import signal
import stat
import sys
import threading
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import optprune.cli.outputs
import optprune.export.exporter
import optprune.export.folder
import optprune.recipe
import optprune.recipe.names
import optprune.recipe.recipe
import optprune.system.interrupts
from optprune.cli.outputs import write_file
from optprune.errors import InputError, OptpruneError
from optprune.export import save_model
from optprune.recipe import load_recipe
from optprune.system.interrupts import (
    check_interrupted,
    done_sentence,
    forget_done,
    interrupts_held,
    raise_on_signals,
    record_done,
)
from tests.helpers.tiny_models import tiny_llama

SENT: list[int] = []
"""the number of signals of every interrupted run"""
FILES = (optprune.export.exporter.__file__, optprune.export.folder.__file__, optprune.system.interrupts.__file__)
HOLDING = (optprune.system.interrupts.__file__, contextlib.__file__)


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A shell may start a test run with Ctrl-C switched off; and every test begins with nothing done."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    forget_done()
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(action: Callable[[], object], files: tuple[str, ...], line: int, again: int = 0) -> bool:
    """Run with Ctrl-C sent before the `line`-th line that is run of these files; False when there are not so many.

    With `again` it is sent a second time, so many calls and returns later.
    """
    run, events = 0, 0

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal run
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            run += 1
            if run == line:
                signal.raise_signal(signal.SIGINT)  # and tracing ends, because the trace function raised
        return trace

    def profile(frame: FrameType, event: str, arg: Any) -> None:
        nonlocal events
        if run >= line and frame.f_code.co_filename != __file__:
            events += 1
            if events == again:
                signal.raise_signal(signal.SIGINT)

    before = sys.gettrace(), sys.getprofile()
    gc.disable()  # hypothesis is called back by collections, where Python drops what is raised
    sys.settrace(trace)
    sys.setprofile(profile if again else None)
    try:
        action()
    except KeyboardInterrupt:
        SENT.append(1 + (0 < again <= events))
        return True
    finally:
        sys.settrace(before[0])
        sys.setprofile(before[1])
        gc.enable()
    assert run < line, "the interrupt was swallowed"
    return False


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    return {
        str(path.relative_to(folder)): (stat.S_IMODE(path.stat().st_mode), path.read_bytes() if path.is_file() else b"")
        for path in sorted(folder.rglob("*"))
    }


def is_intact() -> None:
    """Handlers and umask are those that every test begins with."""
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    umask = os.umask(0o22)
    os.umask(umask)
    assert umask != 0


@pytest.mark.e2e
@pytest.mark.parametrize("there", [False, True], ids=["new folder", "old folder"])
def test_saving_a_model_leaves_all_or_nothing_whatever_line_is_interrupted(there: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    target = "here/out" if there else "new/er/out"
    (tmp_path / "whole").mkdir()
    save_model(model, tmp_path / "whole" / target, files={"made": "new"})
    whole = tree(tmp_path / "whole")
    outcomes = []
    for line in range(1, 1000):
        folder = tmp_path / str(line)
        folder.mkdir()
        if there:
            save_model(model, folder / target, files={"made": "old"})
        before = tree(folder)
        forget_done()

        def save(output: Path = folder / target) -> None:
            save_model(model, output, files={"made": "new"}, overwrite=True)

        if not interrupted(save, FILES, line):
            break
        done = done_sentence() == f"the pruned model is in {folder / target}"
        assert done or done_sentence() == "nothing was written"
        assert tree(folder) == (whole if done else before), line
        is_intact()
        outcomes.append(done)
    else:
        pytest.fail("it never got to its end")
    # Nothing at first, everything at the end, and no way back.
    assert outcomes == sorted(outcomes)
    assert {True, False} == set(outcomes)
    assert len(outcomes) > 60


@pytest.mark.e2e
@pytest.mark.parametrize("again", [0, 1, 4, 9])
@pytest.mark.parametrize("there", [False, True], ids=["new file", "old file"])
def test_writing_a_file_leaves_all_or_nothing_whatever_line_is_interrupted(
    there: bool, again: int, tmp_path: Path
) -> None:
    file = tmp_path / "record.json"
    contents = []
    for line in range(1, 100):
        file.unlink(missing_ok=True)
        if there:
            file.write_text("old")
        files = (optprune.cli.outputs.__file__, optprune.system.interrupts.__file__)
        if not interrupted(lambda: write_file(file, b"new", "file", "all is well"), files, line, again):
            break
        assert [path.name for path in tmp_path.iterdir()] in ([], [file.name]), line
        contents.append(file.read_text() if file.exists() else "")
        is_intact()
    assert set(contents) <= {"old" if there else "", "new"}
    assert len(contents) > 6
    assert file.read_text() == "new"
    assert done_sentence() == "all is well"


def test_the_first_file_is_told_of_when_the_second_is_interrupted(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        write_file(tmp_path / "first.json", b"1", "file", "the first is written")
        raise KeyboardInterrupt
    assert done_sentence() == "the first is written"


@pytest.mark.e2e
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # what a generator swallows at its end
def test_an_interrupt_after_the_first_still_finds_everything_cleaned(tmp_path: Path) -> None:
    model = tiny_llama()

    def save() -> None:
        save_model(model, tmp_path / "new" / "out")

    SENT.clear()
    for line in range(30, 150, 3):
        for again in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89):
            if interrupted(save, FILES, line, again):
                assert not list(tmp_path.rglob(".*")), (line, again)
                assert not (tmp_path / "new" / "out").exists() or done_sentence() != "nothing was written"
                is_intact()
            if (tmp_path / "new").exists():
                for path in sorted(tmp_path.rglob("*"), reverse=True):
                    path.rmdir() if path.is_dir() else path.unlink()
            forget_done()
    assert SENT.count(2) > 50


# -- what is there already


def test_an_old_model_that_cannot_be_put_back_is_kept_and_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_llama(), tmp_path / "out", files={"NOTICE": ""})
    rename, renamed = Path.rename, []

    def failing(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) > 1:
            raise OSError(5, "Input/output error")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OptpruneError, match="the model that was there is now in") as failure:
        save_model(tiny_llama(), tmp_path / "out", overwrite=True)
    kept = Path(str(failure.value).split(" is now in ")[1])
    assert [path.name for path in tmp_path.iterdir()] == [kept.name]
    assert (kept / "NOTICE").exists()
    assert (kept / "model.safetensors").exists()


def test_a_folder_that_another_run_made_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compare = optprune.export.folder.compare

    def meanwhile(*args: Any) -> float:
        monkeypatch.setattr("optprune.export.folder.compare", compare)
        save_model(tiny_llama(), tmp_path / "out", files={"theirs": ""})
        return 0.0

    monkeypatch.setattr("optprune.export.folder.compare", meanwhile)
    with pytest.raises(OptpruneError, match=r"exists already: .*; the pruned model is in .*out\.unchecked"):
        save_model(tiny_llama(), tmp_path / "out", check_tokens=tiny_llama().dummy_inputs["input_ids"])
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.unchecked"}
    assert (tmp_path / "out" / "theirs").exists()


def test_an_old_folder_that_cannot_be_deleted_does_not_fail_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_model(tiny_llama(), tmp_path / "out", files={"NOTICE": ""})
    unlink = os.unlink

    def failing(path: Any, **more: Any) -> None:
        if str(path).endswith("NOTICE"):
            raise PermissionError(13, "Permission denied")
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", failing)
    saved = save_model(tiny_llama(), tmp_path / "out", overwrite=True, files={"new": ""})
    assert (saved.folder / "new").exists()
    assert not (saved.folder / "NOTICE").exists()


def test_what_could_not_be_replaced_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match="longer than 240 bytes"):
        save_model(model, tmp_path / ("x" * 241))
    (tmp_path / "mounted").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda self: self.name == "mounted")
    with pytest.raises(InputError, match="is a mount point"):
        save_model(model, tmp_path / "mounted", overwrite=True)
    save_model(model, tmp_path / ("x" * 240))


# -- holding


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_held_signal_takes_effect_after_the_block(sent: signal.Signals) -> None:
    reached = []

    def handler(number: int, frame: Any) -> None:
        reached.append("handler")

    before = signal.signal(sent, handler)
    try:
        with interrupts_held():
            with interrupts_held():
                signal.raise_signal(sent)
                signal.raise_signal(sent)
                reached.append("inner")
            reached.append("outer")
        assert reached == ["inner", "outer", "handler"]
        assert signal.getsignal(sent) is handler
    finally:
        signal.signal(sent, before)


def test_of_two_held_signals_both_are_delivered() -> None:
    reached = []

    def handler(number: int, frame: Any) -> None:
        reached.append(number)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pytest.raises(KeyboardInterrupt), interrupts_held():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        assert sorted(reached) == [signal.SIGINT, signal.SIGTERM]
    finally:
        for number, old in before.items():
            signal.signal(number, old)


def test_a_block_that_fails_is_interrupted_all_the_same() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    with pytest.raises(ValueError, match="of its own"), interrupts_held():
        raise ValueError("of its own")
    is_intact()


def test_signals_that_are_ignored_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_held():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_handlers_are_back_wherever_holding_itself_is_interrupted() -> None:
    def hold() -> None:
        with interrupts_held():
            pass

    lines = 0
    for line in range(1, 200):
        if not interrupted(hold, HOLDING, line):
            break
        is_intact()
        lines += 1
    assert lines > 15


def test_an_interrupt_that_python_ignores_is_not_printed_and_is_raised_by_the_next_step(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Key:
        pass

    def lose(error: str) -> None:
        key = Key()
        reference = weakref.ref(key, lambda _: signal.raise_signal(signal.SIGTERM) if error == "signal" else 1 / 0)
        del key
        assert reference() is None

    monkeypatch.setattr(sys, "unraisablehook", sys.__unraisablehook__)
    restore = raise_on_signals()
    try:
        lose("signal")
        assert capsys.readouterr().err == ""
        with pytest.raises(KeyboardInterrupt):
            check_interrupted()
        lose("error")
        assert "ZeroDivisionError" in capsys.readouterr().err
    finally:
        restore()
    assert sys.unraisablehook is sys.__unraisablehook__
    is_intact()


def test_another_thread_holds_nothing() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def test_what_is_done_is_the_last_that_was_recorded() -> None:
    assert done_sentence() == "nothing was written"
    record_done("one")
    record_done("two")
    assert done_sentence() == "two"
    forget_done()
    assert done_sentence() == "nothing was written"


def test_pydantic_makes_no_error_of_its_own_of_an_interrupt() -> None:
    recipe = load_recipe("fasp")
    lines = 0
    for file in (optprune.recipe.recipe.__file__, optprune.recipe.names.__file__):
        for line in range(1, 200):
            if not interrupted(recipe.to_yaml, (file,), line):
                break
            lines += 1
    assert lines > 4
