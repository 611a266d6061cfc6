"""Where --json FILE writes: what links lead to, and straight to what is not a regular file."""

import json
import os
import stat
import sys
import threading
from pathlib import Path

import pytest

from optprune import Allocation
from optprune.cli import main
from optprune.cli.outputs import check_json, write_file, write_json
from optprune.errors import InputError, OptpruneError
from optprune.models import BlockAllocation, BlockShape
from optprune.recipe import load_recipe
from tests.helpers.attempts import Attempt


def test_a_named_pipe_stays_one_and_gets_the_results(attempt: Attempt) -> None:
    pipe = attempt.folder / "pipe"
    os.mkfifo(pipe)
    read: list[str] = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    assert main(attempt.evaluate("--json", str(pipe))) == 0
    reader.join(timeout=10)
    assert json.loads(read[0])["windows"] == 2
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    assert [file.name for file in attempt.folder.iterdir()] == ["pipe"]


def test_a_device_stays_one_and_gets_the_results(tmp_path: Path) -> None:
    ours, theirs = os.openpty()
    os.set_blocking(ours, False)
    try:
        link = tmp_path / "terminal"
        link.symlink_to(os.ttyname(theirs))
        check_json(link)
        write_file(link, b"{}\n", "JSON file", "all is well")
        assert os.read(ours, 100) == b"{}\r\n"
        assert link.is_char_device()
        assert link.is_symlink()
    finally:
        os.close(ours)
        os.close(theirs)


def test_a_device_in_a_folder_where_nothing_can_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    allowed = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path) != tmp_path and allowed(path, mode))
    check_json(tmp_path / "pipe")
    with pytest.raises(InputError, match=r"the folder .* is not writable"):
        check_json(tmp_path / "file")


def test_a_device_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    os.mkfifo(tmp_path / "pipe")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(InputError, match=r"the JSON file .*pipe cannot be written: it is not writable"):
        check_json(tmp_path / "pipe")


@pytest.mark.parametrize("there", [False, True], ids=["to nothing", "to a file"])
def test_a_link_stays_one_and_what_it_leads_to_is_written(tmp_path: Path, there: bool) -> None:
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "record.json", tmp_path / "link.json"
    link.symlink_to(Path("elsewhere") / "record.json")
    if there:
        write_json(target, '{"a": 1}', "all is well")
    check_json(link)
    write_json(link, '{"b": 1}', "all is well")
    assert link.is_symlink()
    assert json.loads(target.read_text()) == {"generator": "written by optprune", "b": 1}
    assert [file.name for file in target.parent.iterdir()] == ["record.json"]


def test_a_link_into_a_folder_that_is_not_there(tmp_path: Path) -> None:
    link = tmp_path / "link.json"
    link.symlink_to("missing/record.json")
    with pytest.raises(InputError, match=f"cannot be written: there is no folder {tmp_path / 'missing'}"):
        check_json(link)


def test_a_link_to_a_file_of_the_model(attempt: Attempt) -> None:
    link = attempt.folder / "link.json"
    link.symlink_to(attempt.model / "config.json")
    assert "has a name that a file of the model in" in attempt.fails(attempt.evaluate("--json", str(link)))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("option", ["--json", "--log"])
@pytest.mark.parametrize("form", ["{}", "{}:text", "{}:text=0.5,demo:calibration=0.5", "hard link", "link"])
def test_a_file_that_is_the_calibration_text(attempt: Attempt, option: str, form: str) -> None:
    text = attempt.folder / "text.jsonl"
    text.write_text(json.dumps({"text": attempt.text.read_text()}))
    given = text
    if "link" in form:
        given = attempt.folder / "other.jsonl"
        given.hardlink_to(text) if form == "hard link" else given.symlink_to(text)
    calibration = str(text) if "link" in form else form.format(text)
    sentence = attempt.fails(attempt.command(option, str(given), calibration=calibration))
    assert f"{given} is an input too ({calibration}): choose another" in sentence


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("option", ["--json", "--log"])
@pytest.mark.parametrize("given", ["--recipe", "--allocation", "--architecture", "--expert-scores", "--text"])
def test_a_file_that_is_another_input_of_prune(attempt: Attempt, option: str, given: str) -> None:
    names = {"--recipe": "recipe.yaml", "--architecture": "draft.yaml", "--text": "held out.txt"}
    file = attempt.folder / names.get(given, "given.json")
    contents = {
        "--recipe": load_recipe("fasp").to_yaml(),
        "--allocation": Allocation((BlockAllocation(BlockShape(40, 2, 16)),), 0.5).to_json(),
        "--expert-scores": '{"scores": {"0": [0.5, 0.1]}}',
    }
    file.write_text(contents.get(given, "some words"))
    more = ["--recipe", "reap"] if given == "--expert-scores" else []
    sentence = attempt.fails(attempt.command(given, str(file), option, str(file), *more))
    assert f"{file} is an input too ({file}): choose another" in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_file_with_other_content(attempt: Attempt) -> None:
    """Such as an image that a record names, or another tool's JSON."""
    file = attempt.folder / "a.png"
    for content in (b"\x89PNG", b'{"model_type": "llama"}', b"[build-system]", b"\0" * 200_000):
        file.write_bytes(content)
        sentence = attempt.fails(attempt.command("--json", str(file)))
        assert f"the JSON file {file} exists, and no such command of optprune wrote it: choose another" in sentence
        assert file.read_bytes() == content
    for former in (b"", b'{"rows": [%s], "generator": "written by optprune"}' % (b"1, " * 100_000 + b"1")):
        file.write_bytes(former)
        check_json(file)


@pytest.mark.usefixtures("no_weights")
def test_one_file_for_two_outputs(attempt: Attempt, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place, model = tmp_path / "both", str(attempt.model)
    (tmp_path / "link").symlink_to("both")
    both = [str(place), str(tmp_path / "link")]
    sentence = "name the file {} as their output: name two files"
    assert sentence.format(both[1]) in attempt.fails(attempt.command("--json", both[0], "--log", both[1]))
    for command in (
        ["audit", model, "--json", f"{place}.png", "--plot", f"{place}.png"],
        ["solve", str(tmp_path / "p"), "--json", both[0], "--output", both[0]],
        ["experts", model, "--text", f"a={attempt.text}", "--json", both[0], "--scores", both[0]],
    ):
        assert main(command) == 2
        assert sentence.format(command[-1]) in capsys.readouterr().err


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", ["compare", "frontier"])
def test_a_file_in_the_folder_of_a_comparison(
    attempt: Attempt, command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    more = {"compare": ["--calibration", "demo:calibration", "--sparsities", "0.1", "--recipes", "fasp"]}
    words = [command, str(attempt.model), "--text", "demo:evaluation", *more.get(command, []), "--output", str(out)]
    assert main([*words, "--json", str(out / "run.json")]) == 2
    assert f"{out / 'run.json'} lies in {out}, which gets the same content" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.usefixtures("no_weights")
def test_a_file_that_would_be_a_text_of_the_folder_that_is_read(attempt: Attempt) -> None:
    """A log would be read as a text, even if it is new."""
    folder = attempt.folder / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(attempt.text.read_text())
    for name in ("run.txt", "run.TXT"):
        assert "is an input too" in attempt.fails(attempt.command("--log", str(folder / name), calibration=folder))
    check_json(folder / "run.json", inputs=[str(folder)])


def test_a_file_that_is_an_input_of_another_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Refused before anything is read: neither the model nor the file is a good one."""
    file, model = tmp_path / "input.txt", str(tmp_path / "model")
    file.write_text("mine")
    named, more = str(file), ["--output", str(tmp_path / "out"), "--sparsities", "0.1", "--recipes", "fasp"]
    for command in (
        ["plan", model, "--calibration", named, "--json", named],
        ["evaluate", model, "--text", named, "--json", named],
        ["compare", model, "--calibration", named, "--text", "demo:evaluation", *more, "--json", named],
        ["compare", model, "--calibration", "demo:calibration", "--text", named, *more, "--json", named],
        ["frontier", model, "--text", named, "--output", str(tmp_path / "out"), "--json", named],
        ["experts", model, "--text", f"mine={named}", "--json", named],
        ["experts", model, "--text", f"mine={named}", "--scores", named],
        ["export", model, "--output", named, "--type", "q4_0", "--calibration", named, "--overwrite"],
        ["solve", named, "--json", named],
        ["solve", named, "--output", named],
    ):
        assert main(command) == 2
        assert f"{file} is an input too" in capsys.readouterr().err, command
    assert [path.name for path in tmp_path.iterdir()] == ["input.txt"] and file.read_text() == "mine"


@pytest.mark.usefixtures("no_weights")
def test_a_link_to_itself(attempt: Attempt) -> None:
    link = attempt.folder / "link.json"
    link.symlink_to("link.json")
    sentence = attempt.fails(attempt.evaluate("--json", str(link)))
    assert f"{link} is a link that leads back to itself: choose another name" in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_name_that_is_not_utf8(attempt: Attempt) -> None:
    sentence = attempt.fails(attempt.evaluate("--json", str(attempt.folder / os.fsdecode(b"r\xff.json"))))
    assert r"r\udcff.json' is not UTF-8: choose another" in sentence


def test_standard_output_that_is_a_file_gets_the_results_before_what_is_printed(tmp_path: Path) -> None:
    file = tmp_path / "out"
    with file.open("w+") as stream, pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", stream)
        print("first")
        check_json(file)
        write_file(file, b"{}\n", "JSON file", "all is well")
        print("last")
    assert file.read_text() == "first\n{}\nlast\n"


def test_a_reader_that_has_gone(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    data = b"x" * 2**20
    closing = threading.Timer(0.2, os.close, [reader])
    closing.start()
    with pytest.raises(OptpruneError, match=r"the JSON file .*pipe cannot be written \(Broken pipe\), but all is well"):
        write_file(pipe, data, "JSON file", "all is well")
    closing.join()
