"""Interrupts: one that comes at any moment leaves everything or nothing, and says which."""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import optprune.cli.outputs
import optprune.models.save
from optprune.cli.outputs import write_json
from optprune.interrupts import interrupts_held, when_interrupted
from optprune.models import save_model
from optprune.recipe import load_recipe
from tests.tiny_models import tiny_llama


@pytest.fixture(autouse=True)
def ctrl_c() -> Iterator[None]:
    """A shell may start a test run with Ctrl-C switched off."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def interrupted(action: Callable[[], object], file: str, line: int) -> KeyboardInterrupt | None:
    """Run with Ctrl-C sent before the `line`-th line that is run of the file; None when there are not so many."""
    left = line

    def trace(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal left
        if frame.f_code.co_filename != file:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                signal.raise_signal(signal.SIGINT)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        action()
    except KeyboardInterrupt as error:
        return error
    finally:
        sys.settrace(before)
    assert left > 0, "the interrupt was swallowed"
    return None


def tree(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else b""
        for path in sorted(folder.rglob("*"))
        if "weights" not in path.name
    }


@pytest.mark.parametrize("there", [False, True], ids=["new folder", "old folder"])
def test_saving_a_model_leaves_all_or_nothing_wherever_it_is_interrupted(there: bool, tmp_path: Path) -> None:
    model = tiny_llama()
    target = "here/out" if there else "new/er/out"
    (tmp_path / "whole").mkdir()
    save_model(model, tmp_path / "whole" / target, files={"made": "new"})
    whole = tree(tmp_path / "whole")
    outcomes = []
    for line in range(1, 500):
        folder = tmp_path / str(line)
        folder.mkdir()
        if there:
            save_model(model, folder / target, files={"made": "old"})
        before = tree(folder)

        def save(output: Path = folder / target) -> None:
            save_model(model, output, files={"made": "new"}, overwrite=True)

        error = interrupted(save, optprune.models.save.__file__, line)
        if error is None:
            break
        done = error.args == (f"the pruned model is in {folder / target}",)
        assert tree(folder) == (whole if done else before), line
        outcomes.append(done)
    else:
        pytest.fail("it never got to its end")
    # Nothing at first, everything at the end, and no way back.
    assert outcomes == sorted(outcomes)
    assert {True, False} == set(outcomes)
    assert len(outcomes) > 30


@pytest.mark.parametrize("there", [False, True], ids=["new file", "old file"])
def test_writing_a_file_leaves_all_or_nothing_wherever_it_is_interrupted(there: bool, tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    for line in range(1, 100):
        if there:
            file.write_text("old")
        else:
            file.unlink(missing_ok=True)
        error = interrupted(lambda: write_json(file, "new", "all is well"), optprune.cli.outputs.__file__, line)
        if error is None:
            break
        assert [path.name for path in tmp_path.iterdir() if path != file] == [], line
        assert not file.exists() or file.read_text() in ("old" if there else "new", "new"), line
    assert line > 8
    assert file.read_text() == "new"


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


def test_a_block_that_fails_is_interrupted_all_the_same() -> None:
    with pytest.raises(KeyboardInterrupt), interrupts_held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError
    with pytest.raises(ValueError, match="of its own"), interrupts_held():
        raise ValueError("of its own")
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_signals_that_are_ignored_stay_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts_held():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_another_thread_holds_nothing_and_needs_not() -> None:
    done = []

    def work() -> None:
        with interrupts_held():
            done.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [signal.default_int_handler]


def test_an_interrupt_says_what_is_done() -> None:
    with pytest.raises(KeyboardInterrupt, match="the file is there"), when_interrupted("the file is there"):
        raise KeyboardInterrupt


def test_pydantic_makes_no_error_of_its_own_of_an_interrupt() -> None:
    recipe = load_recipe("fasp")
    import optprune.recipe
    import optprune.recipe_fields

    lines = 0
    for file in (optprune.recipe.__file__, optprune.recipe_fields.__file__):
        for line in range(1, 200):
            if interrupted(recipe.to_yaml, file, line) is None:
                break
            lines += 1
    assert lines > 4
