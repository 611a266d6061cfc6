"""Work folders: files in the manifest, damage and kills, and foreign files that are never changed."""

import json
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from optprune.errors import InputError
from optprune.system import files
from optprune.system.files import digest_of, exclusive_draft, is_draft, write_whole
from optprune.system.folders import ManifestFolder, check_manifest_folder


def kept(folder: Path, **content: Any) -> ManifestFolder:
    found = ManifestFolder(folder)
    found.begin({"the text": "a"})
    for name, value in content.items():
        found.write(name, value)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_file_is_read_back_only_as_it_was_written(tmp_path: Path) -> None:
    kept(tmp_path / "run", first=[1], second=[2]).release()
    (tmp_path / "run" / "second").write_text("[3]")
    again = ManifestFolder(tmp_path / "run")
    assert again.read("first") == [1]
    assert not again.holds("second")
    assert again.damaged_files == ["second"]
    with pytest.raises(InputError, match=r"second of the run in .* is damaged"):
        again.read("second")


def test_a_file_that_nobody_wrote_is_not_there(tmp_path: Path) -> None:
    found = kept(tmp_path / "run")
    (tmp_path / "run" / "stray").write_text("[1]")
    assert not found.holds("stray")
    with pytest.raises(InputError, match="stray was not written by this run: move it away"):
        found.write("stray", [2])
    assert (tmp_path / "run" / "stray").read_text() == "[1]"
    assert not [path for path in (tmp_path / "run").iterdir() if is_draft(path.name)]


class Killed(BaseException):
    """In place of a kill."""


@pytest.mark.parametrize("kill", ["before the manifest", "after the manifest"])
@pytest.mark.parametrize("there", [False, True], ids=["new", "there"])
def test_a_kill_while_a_file_is_written_leaves_it_as_before(
    kill: str, there: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kept(tmp_path / "run", **({"a": [1]} if there else {}))
    replace, renamed = Path.replace, list[Path]()

    def killed(self: Path, target: Path) -> Path:
        renamed.append(self)
        if len(renamed) == (1 if kill == "before the manifest" else 2):
            raise Killed
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", killed)
        patch.setattr(Path, "unlink", lambda *args, **more: None)  # a killed process tidies nothing
        with pytest.raises(Killed):
            found.write("a", [2])
    found.release()
    again = ManifestFolder(tmp_path / "run")
    assert again.holds("a") == there
    assert not there or again.read("a") == [1]
    again.begin({"the text": "a"})
    assert not [path for path in (tmp_path / "run").iterdir() if is_draft(path.name)]
    again.write("a", [3])
    again.release()
    assert ManifestFolder(tmp_path / "run").read("a") == [3]


def test_a_damaged_file_does_not_count_once_it_was_to_be_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = kept(tmp_path / "run", a=[1])
    (tmp_path / "run" / "a").write_text("[7]")
    manifest = ManifestFolder._write_manifest

    def killed(self: ManifestFolder) -> None:
        manifest(self)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(ManifestFolder, "_write_manifest", killed)
        with pytest.raises(Killed):
            found.write("a", [2])
    found.release()
    assert not ManifestFolder(tmp_path / "run").holds("a")


@pytest.mark.parametrize(
    "edit",
    [
        lambda content: content["facts"].update({"the text": "b"}),
        lambda content: content["files"].update({"a": ["0" * 64]}),
        lambda content: content["files"].update({"../../mine": ["0" * 64]}),
        lambda content: content.pop("digest"),
        lambda content: content.update({"format": 99}),
        lambda content: content.clear(),
    ],
)
def test_an_edited_manifest_is_refused_and_stays(edit: Callable[[dict], Any], tmp_path: Path) -> None:
    kept(tmp_path / "run", a=[1]).release()
    file = tmp_path / "run" / "run.json"
    content = json.loads(file.read_text())
    edit(content)
    file.write_text(json.dumps(content))
    before = contents(tmp_path)
    with pytest.raises(InputError, match="was not written by this version of optprune, or is damaged"):
        ManifestFolder(tmp_path / "run")
    assert contents(tmp_path) == before


def signed(folder: Path, **entries: Any) -> None:
    """Give the manifest of a folder other entries, and the digest that belongs to them."""
    file = folder / "run.json"
    content = {**json.loads(file.read_text()), **entries}
    content.pop("digest")
    file.write_text(json.dumps({**content, "digest": digest_of(content)}))


def refused(folder: Path) -> None:
    """Try everything that may delete what a manifest lists."""
    for use in (
        ManifestFolder,
        lambda place: check_manifest_folder(place, "run"),
        lambda place: ManifestFolder(place).discard(),
    ):
        with pytest.raises(InputError, match="was not written by this version of optprune, or is damaged"):
            use(folder)


@pytest.mark.parametrize(
    "name",
    ["../victim", "a/../../victim", "/victim", "..", ".", "", "a//b", "a/", "./a", "a/b/c", "..\\victim", "a\0b"],
)
def test_a_manifest_that_names_what_is_outside_its_folder_is_refused(name: str, tmp_path: Path) -> None:
    run, victim = tmp_path / "run", tmp_path / "victim"
    kept(run, a=[1]).release()
    victim.mkdir()
    (victim / ".x.0123abcd.part").write_text("mine")
    for entries in ({"files": {name: []}}, {"folders": [name]}, {"files": {f"../{victim.name}/.x.0123abcd.part": []}}):
        signed(run, **{"files": {}, "folders": [], **entries})
        before = contents(tmp_path)
        refused(run)
        assert contents(tmp_path) == before


@pytest.mark.parametrize(
    "entries",
    [
        {"files": ["a"]},
        {"files": None},
        {"files": {"a": "0" * 64}},
        {"files": {"a": [1]}},
        {"folders": {"work": []}},
        {"folders": [1]},
        {"folders": ["work/deep"]},
        {"made": "1"},
        {"made": None},
        {"made": -1},
        {"facts": []},
        {"facts": ""},
    ],
    ids=str,
)
def test_a_manifest_with_entries_of_another_type_is_refused(entries: dict[str, Any], tmp_path: Path) -> None:
    kept(tmp_path / "run", a=[1]).release()
    signed(tmp_path / "run", **entries)
    before = contents(tmp_path)
    refused(tmp_path / "run")
    assert contents(tmp_path) == before


def test_a_manifest_that_is_signed_as_ours_is_read(tmp_path: Path) -> None:
    """Else the tests above would pass whatever was in it."""
    kept(tmp_path / "run", a=[1]).release()
    signed(tmp_path / "run", facts={"the text": "b"}, made=0)
    assert ManifestFolder(tmp_path / "run").facts == {"the text": "b"}


def test_a_file_behind_a_link_is_neither_read_nor_written_nor_deleted(tmp_path: Path) -> None:
    found, target = kept(tmp_path / "run"), tmp_path / "target"
    found.subfolder("cells")
    found.write("cells/a.json", [1])
    (tmp_path / "run" / "cells").rename(target)
    (tmp_path / "run" / "cells").symlink_to(target)
    assert not found.holds("cells/a.json") and found.files == []
    for name in ("cells/a.json", "cells/b.json"):
        with pytest.raises(InputError, match="cells is a link, but this run created a folder there: move the link"):
            found.write(name, [2])
    found.forget(["cells/a.json"])
    found.release()
    assert ManifestFolder(tmp_path / "run").discard() == ["cells"]
    assert contents(target) == {"a.json": b"[\n  1\n]"}


@pytest.mark.parametrize("name", ["../mine", "/mine", "..", "", "cells/../../mine", "a\\b", "a/b/c"])
def test_a_name_that_leads_out_of_the_folder_is_not_written(name: str, tmp_path: Path) -> None:
    found = kept(tmp_path / "run")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"does not name a file or a folder in .*: choose another name"):
        found.write(name, [1])
    with pytest.raises(InputError, match=r"does not name a file or a folder in .*: choose another name"):
        found.subfolder(name)
    assert contents(tmp_path) == before and list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_a_folder_for_other_work_is_refused(tmp_path: Path) -> None:
    kept(tmp_path / "run").release()

    class Other(ManifestFolder):
        noun = "comparison"

    with pytest.raises(InputError, match="holds a run and not a comparison"):
        Other(tmp_path / "run")


def test_other_facts_are_named_and_change_nothing(tmp_path: Path) -> None:
    found = kept(tmp_path / "run", a=[1])
    before = contents(tmp_path)
    for facts, named in (
        ({"the text": "b"}, "the text was 'a' and is 'b'"),
        ({"the text": "a", "the seed": 1}, "the seed was None and is 1"),
        ({}, "the text was 'a' and is None"),
    ):
        with pytest.raises(InputError, match=named):
            found.begin(facts)
    assert contents(tmp_path) == before


def test_drafts_of_a_killed_process_are_deleted_only_when_a_run_begins(tmp_path: Path) -> None:
    found, run = kept(tmp_path / "run", a=[1]), tmp_path / "run"
    drafts = [run / ".a.0123abcd.part", found.subfolder("inner") / ".b.0123abcd.part"]
    found.release()
    for draft in drafts:
        draft.write_text("half")
    (run / ".c.0123abcd.part").symlink_to(run / "a")
    before, again = contents(run), ManifestFolder(run)
    with pytest.raises(InputError, match="the text was 'a' and is 'b'"):
        again.begin({"the text": "b"})
    assert contents(run) == before | {"in-use": b""}
    own = exclusive_draft(run / "d")  # of this process
    again.begin({"the text": "a"})
    assert not any(draft.exists() for draft in drafts)
    assert own.exists() and (run / ".c.0123abcd.part").is_symlink() and again.read("a") == [1]


def test_a_created_folder_that_is_gone_is_forgotten(tmp_path: Path) -> None:
    found = kept(tmp_path / "run")
    found.subfolder("inner").rmdir()
    found.release()
    again = ManifestFolder(tmp_path / "run")
    assert again.subfolders == []
    assert again.subfolder("inner").is_dir() and again.subfolders == ["inner"]


def test_to_discard_deletes_what_is_ours_and_tells_the_rest(tmp_path: Path) -> None:
    found = kept(tmp_path / "deep" / "run", a=[1], b=[2])
    (found.subfolder("scratch") / "part").write_text("ours")
    run, target = tmp_path / "deep" / "run", tmp_path / "target"
    target.mkdir()
    (target / "notes").write_text("mine")
    (run / "b").unlink()
    (run / "b").symlink_to(target / "notes")  # a link where a file of ours was
    (run / "scratch" / "link").symlink_to(target)
    (run / ".a.0123abcd.part").write_text("a draft of ours")
    (run / "notes").write_text("mine")
    assert found.discard() == ["b", "notes"]
    assert sorted(path.name for path in run.iterdir()) == ["b", "notes"]
    assert contents(target) == {"notes": b"mine"}


def test_folders_that_were_made_are_deleted_as_far_as_they_are_empty(tmp_path: Path) -> None:
    kept(tmp_path / "a" / "b" / "run").release()
    assert ManifestFolder(tmp_path / "a" / "b" / "run").discard() == []
    assert not (tmp_path / "a").exists()
    (tmp_path / "mine").mkdir()
    assert kept(tmp_path / "mine").discard() == []
    assert (tmp_path / "mine").is_dir()


def test_a_kill_before_there_is_a_manifest_leaves_no_folder_for_ever(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "in-use").touch()
    (tmp_path / "run" / ".run.json.0123abcd.part").write_text("{")
    assert kept(tmp_path / "run").discard() == []
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["link", "link to nothing", "folder"])
def test_a_lock_that_is_no_regular_file_is_refused_before_it_is_opened(kind: str, tmp_path: Path) -> None:
    kept(tmp_path / "run", a=[1]).release()
    lock, target = tmp_path / "run" / "in-use", tmp_path / "mine"
    if kind == "folder":
        lock.mkdir()
    else:
        lock.symlink_to(target)
    if kind == "link":
        target.write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match="in-use is a link or no regular file, so it cannot lock the run: remove it"):
        ManifestFolder(tmp_path / "run")
    assert contents(tmp_path) == before and target.exists() == (kind == "link")
    lock.rmdir() if kind == "folder" else lock.unlink()
    assert ManifestFolder(tmp_path / "run").read("a") == [1]


@pytest.mark.parametrize("begun", [False, True])
def test_a_lock_with_content_is_somebody_elses(begun: bool, tmp_path: Path) -> None:
    found = kept(tmp_path / "run") if begun else ManifestFolder(tmp_path / "run")
    assert (tmp_path / "run" / "in-use").stat().st_size == 0, "our own are empty"
    found.release()
    (tmp_path / "run" / "in-use").write_text("mine")
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"in-use is not empty, so it is a file of yours or .*, or move the file away"):
        ManifestFolder(tmp_path / "run")
    assert contents(tmp_path) == before


@pytest.mark.parametrize("link", [False, True], ids=["folder", "link"])
def test_a_subfolder_of_somebody_elses_is_refused(link: bool, tmp_path: Path) -> None:
    found, place, target = kept(tmp_path / "run"), tmp_path / "run" / "work", tmp_path / "target"
    target.mkdir()
    (target / "notes").write_text("mine")
    if link:
        place.symlink_to(target)
    else:
        target.rename(place)
    with pytest.raises(InputError, match="work was not made by this run: move it away"):
        found.subfolder("work")
    found.remove_subfolder("work")
    assert (place / "notes").read_text() == "mine"


def test_a_draft_is_never_a_file_or_a_link_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, names = tmp_path / "mine", iter(["00000000", "11111111", "22222222"])
    target.write_text("mine")
    (tmp_path / ".x.00000000.part").symlink_to(target)
    (tmp_path / ".x.11111111.part").write_text("mine too")
    monkeypatch.setattr(secrets, "token_hex", lambda size: next(names))
    write_whole(tmp_path / "x", lambda stream: stream.write(b"new"))
    assert (tmp_path / "x").read_bytes() == b"new"
    assert target.read_text() == "mine"
    assert (tmp_path / ".x.11111111.part").read_text() == "mine too"


def test_two_drafts_of_one_file_are_two_files(tmp_path: Path) -> None:
    first, second = exclusive_draft(tmp_path / "x"), exclusive_draft(tmp_path / "x")
    assert first != second
    assert is_draft(first.name, "x") and not is_draft(first.name, "y")


def test_a_longest_name_still_has_a_draft(tmp_path: Path) -> None:
    write_whole(tmp_path / ("x" * files.LONGEST_NAME), lambda stream: stream.write(b""))


def test_a_folder_that_a_killed_process_made_is_deleted_with_the_rest(tmp_path: Path) -> None:
    folder = tmp_path / "out.run"
    folder.mkdir()
    (folder / ".run.json.0123abcd.part").write_text("{")  # killed before the manifest had its name
    assert ManifestFolder(folder).discard() == []
    assert not folder.exists()
