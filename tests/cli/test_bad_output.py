"""Folders that cannot be written: one sentence, and nothing half-written."""

import contextlib
import errno
import os
import resource
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

import optprune
from optprune.errors import InputError, OptpruneError
from optprune.export import reload_check, save_model
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_llama


@contextmanager
def limited(what: int, most: int) -> Iterator[None]:
    """A real limit of the operating system, as `ulimit` sets it."""
    before = resource.getrlimit(what)
    resource.setrlimit(what, (most, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(what, before)


@pytest.mark.usefixtures("no_weights")
def test_an_output_that_links_to_itself(attempt: Attempt) -> None:
    attempt.output.parent.mkdir()
    attempt.output.symlink_to("out")
    sentence = attempt.fails(attempt.command("--overwrite"))
    assert f"{attempt.output} is a link that leads back to itself: choose another name" in sentence


@pytest.mark.usefixtures("no_weights")
def test_an_output_in_a_folder_that_links_to_itself(attempt: Attempt) -> None:
    attempt.output.parent.symlink_to("new")
    assert "leads back to itself" in attempt.fails(attempt.command())


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("inner", [b"", b"/in"], ids=["the folder", "its parent"])
def test_an_output_whose_name_is_not_utf8(attempt: Attempt, inner: bytes) -> None:
    output = os.fsdecode(os.fsencode(attempt.folder) + b"/o\xff" + inner)
    assert "is not UTF-8: choose another" in attempt.fails(attempt.command(output=output))


OUTPUTS = {"itself": "models/mine", "a link to it": "link", "its parent": "models"}
"""outputs that would replace the model models/mine"""


def two_models(attempt: Attempt) -> tuple[Path, Path]:
    """A model and another one, in folders of their own, and a link to the first."""
    save_tiny(tiny_llama(), mine := attempt.folder / "models" / "mine")
    save_tiny(tiny_llama(), other := attempt.folder / "other")
    (attempt.folder / "link").symlink_to(mine)
    return mine, other


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("more", [(), ("--overwrite",), ("--resume",), ("--overwrite", "--restart")], ids=" ".join)
@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
def test_an_output_in_place_of_the_model_that_is_pruned(attempt: Attempt, output: str, more: tuple[str, ...]) -> None:
    attempt.model, _ = two_models(attempt)
    place = attempt.folder / output
    sentence = attempt.fails(attempt.command(*more, output=place))
    assert f"the output {place} would replace the model that is read ({attempt.model}): name another" in sentence
    with pytest.raises(InputError, match="would replace the model that is read"):
        optprune.prune_model(attempt.model, calibration=str(attempt.text), output=place, overwrite=True)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("output", OUTPUTS.values(), ids=OUTPUTS)
@pytest.mark.parametrize("role", ["model", "teacher"])
def test_an_output_in_place_of_the_model_that_is_healed_or_its_teacher(
    attempt: Attempt, output: str, role: str
) -> None:
    mine, other = two_models(attempt)
    model, teacher = (mine, other) if role == "model" else (other, mine)
    place = attempt.folder / output
    words = ["--teacher", str(teacher), "--text", str(attempt.text), "--output", str(place), "--overwrite"]
    sentence = attempt.fails(["heal", str(model), *words])
    assert f"the output {place} would replace the model that is read ({mine}): name another" in sentence


@pytest.mark.parametrize(
    ("number", "reason"),
    [
        (errno.ENOSPC, "the disk is full"),
        (errno.EDQUOT, "the quota of disk space is used up"),
        (errno.EFBIG, "a file would be larger than the file system or a limit (ulimit -f) allows"),
    ],
)
@pytest.mark.parametrize("of_python", [False, True], ids=["safetensors' words", "an error of Python"])
def test_no_room(attempt: Attempt, monkeypatch: pytest.MonkeyPatch, number: int, reason: str, of_python: bool) -> None:
    def half(_: PreTrainedModel, folder: Path, **__: Any) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half of it")
        if of_python:
            raise OSError(number, os.strerror(number))
        raise RuntimeError(f"Error while serializing: I/O error: {os.strerror(number)} (os error {number})")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", half)
    sentence = attempt.fails(attempt.command(), keeps_run=True)
    assert f"{reason}, so {attempt.output} was not written" in sentence


def test_a_limit_on_the_size_of_files(attempt: Attempt) -> None:
    with limited(resource.RLIMIT_FSIZE, 2**16):
        sentence = attempt.fails(attempt.command())
    assert f"a limit (ulimit -f) allows, so {attempt.output}.run" in sentence


def test_weights_whose_logits_float16_cannot_hold(attempt: Attempt) -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.lm_head.weight.mul_(2e4)  # each of them is in the range of float16
    attempt.model = save_tiny(model, attempt.folder / "large")
    sentence = attempt.fails(attempt.command("--save-dtype", "float16"), keeps_run=True)
    assert "logits of the saved model hold NaN or infinity" in sentence
    assert "save in bfloat16 or float32, whose range is larger" in sentence
    assert "report" not in sentence


def descriptors() -> set[int]:
    return {int(path.name) for path in Path("/dev/fd").iterdir()}


def free_descriptors(most: int) -> int:
    """The limit that leaves so many file descriptors."""
    used = descriptors()
    free = (number for number in range(2**16) if number not in used)
    return next(number for position, number in enumerate(free) if position == most)


@pytest.mark.parametrize("free", [0, 1, 2])  # more are enough for it to start
def test_a_reload_that_fails_for_want_of_file_descriptors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int
) -> None:
    start, output = subprocess.Popen, tmp_path / "new" / "out"

    def limited_start(*args: Any, **options: Any) -> Any:
        resource.setrlimit(resource.RLIMIT_NOFILE, (free_descriptors(free), before[1]))
        return start(*args, **options)

    monkeypatch.setattr(subprocess, "Popen", limited_start)
    monkeypatch.setattr(subprocess, "_USE_POSIX_SPAWN", False)  # Python 3.13 starts a process without any pipe by it
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    held = descriptors()
    try:
        with pytest.raises(OptpruneError, match=r"cannot be started \(.*Too many open files\)"):
            save_model(tiny_llama(), output, check_tokens=torch.arange(8)[None])
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
        for leaked in descriptors() - held:
            with contextlib.suppress(OSError):
                os.close(leaked)  # Python 3.11 leaves pipes open when a process cannot be started
    assert [path.name for path in output.parent.iterdir()] == ["out.unchecked"]


def test_a_draft_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def kept(path: Any, *_: Any, **__: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted", str(path))

    monkeypatch.setattr(reload_check, "CANNOT_IMPORT", 0)  # a reload that does not work
    for call in ("unlink", "rmdir"):
        monkeypatch.setattr(os, call, kept)
    with pytest.raises(
        OptpruneError, match=r"but its check failed: .*; .* could not be deleted: do that by hand"
    ) as told:
        save_model(tiny_llama(), tmp_path / "out", check_tokens=torch.arange(8)[None])
    [draft] = tmp_path.glob(".out.*")
    assert str(draft) in str(told.value)
