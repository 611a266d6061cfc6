"""Folders for the work of a run: a manifest lists the files of optprune with their digests."""

import hashlib
import json
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from filelock import FileLock, Timeout

from optprune.errors import InputError
from optprune.system.environment import differences
from optprune.system.files import digest_of_file, is_draft, is_own_file, is_own_folder, read_json, write_whole
from optprune.system.interrupts import interrupts_held
from optprune.system.wording import shown

MANIFEST, LOCK = "run.json", "in-use"
MARK, FORMAT = "optprune", 1
FACTS, FILES, FOLDERS, MADE, DIGEST = "facts", "files", "folders", "made", "digest"
"""the entries of a manifest"""


class ManifestFolder:
    """A folder that one process at a time works in, which knows each file that optprune wrote there.

    The manifest `run.json` holds our mark, the facts that decide all results, and the SHA-256 digest of every file.
    A file whose bytes have another digest counts as absent. Only files and folders of the manifest, and drafts of
    ours, are ever written over or deleted, and never through a link.
    """

    noun = "run"
    """the word for the content of the folder, which the manifest holds as well"""
    begin_anew = "begin anew with --restart, which deletes it"
    """how a user discards the content, in words"""
    written: tuple[str, ...] = ()
    """patterns of the names that may be written, as `fnmatch` has them: another's file of such a name is in the way"""

    def __init__(self, folder: str | Path) -> None:
        """Take the folder, which is made if need be.

        Raises InputError where it is a link, holds anything else, is damaged, or another process is at work in it.
        """
        self.folder = Path(folder)
        check_manifest_folder(self.folder, self.noun)
        with interrupts_held():
            made = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
            # A process that was killed before there was a manifest has left nothing but a lock or a draft of it.
            left = self.folder.exists() and any(self.folder.iterdir()) and _manifest(self.folder, self.noun) is None
            self.folder.mkdir(parents=True, exist_ok=True)
            # One lock for all objects of this process: one that was not released is no other process.
            self._lock = FileLock(self.folder / LOCK, is_singleton=True)
            if not _taken(self._lock):
                raise _busy(self.folder, self.noun)
            try:
                self._manifest = _manifest(self.folder, self.noun) or self._created(1 if left else len(made))
                self._sound: dict[str, bool] = {}
                self._tidy()
            except BaseException:
                self._lock.release(force=True)
                raise
        self.damaged_files: list[str] = []
        """the names of files whose bytes are not those that were written"""

    def _created(self, made: int) -> dict[str, Any]:
        self._manifest = {MARK: self.noun, "format": FORMAT, MADE: made, FACTS: None, FILES: {}, FOLDERS: []}
        self._write_manifest()
        return self._manifest

    def check_names(self) -> None:
        """Raise InputError where a file of another lies under a name that may be written."""
        for pattern in self.written:
            for path in sorted(self.folder.glob(pattern)):
                if not self.lists(str(path.relative_to(self.folder))):
                    raise self._in_the_way(path)

    def _in_the_way(self, path: Path) -> InputError:
        return InputError(f"{path} was not written by this {self.noun}: move it away, and run again")

    @property
    def begun(self) -> bool:
        """Whether the facts are there."""
        return self._manifest[FACTS] is not None

    @property
    def facts(self) -> dict[str, Any]:
        """The facts that the content was begun with; empty before."""
        return self._manifest[FACTS] or {}

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Keep what decides all results, or compare it with what is kept.

        Raises InputError, with the first fact that differs, and changes nothing.
        """
        plain = json.loads(json.dumps(facts))
        if self.begun:
            self.check_facts({**dict.fromkeys(self.facts), **plain})
        self.check_names()
        if not self.begun:
            self._manifest[FACTS] = plain
            self._write_manifest()

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError where one of these facts is not what the content was begun with."""
        before = {name: self.facts.get(name) for name in facts} if self.begun else dict(facts)
        for what, old, new in differences(before, json.loads(json.dumps(facts))):
            raise InputError(
                f"the {self.noun} in {self.folder} cannot go on: {what} was {shown(old)} and is {shown(new)}; it is "
                f"left as it is: give the command that began it, or {self.begin_anew}"
            )

    def keep(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file of the folder, whole or not at all, and keep its digest.

        Raises InputError where something lies there that optprune did not write.
        """
        file, files = self.folder / name, self._manifest[FILES]
        if file.exists() or file.is_symlink():
            if name not in files or not is_own_file(file):
                raise self._in_the_way(file)
            before = [digest for digest in [digest_of_file(file)] if digest in files[name]]
        else:
            before = []

        def commit(digest: str) -> None:
            # Until the file gets its name, the bytes before are sound too.
            files[name] = list(dict.fromkeys((*before, digest)))
            self._write_manifest()

        write_whole(file, write, commit=commit)
        self._sound[name] = True

    def write(self, name: str, content: Any) -> None:
        """Write plain data to a file of the folder."""
        # NaN and infinity, which a report may hold, are written as Python reads them.
        text = json.dumps(content, indent=2).encode()
        self.keep(name, lambda stream: stream.write(text))

    def read(self, name: str) -> Any:
        """Return the plain data in a file of the folder. Raises InputError where it is not as it was written."""
        if not self.holds(name):
            raise self.damaged(name)
        try:
            return read_json((self.folder / name).read_text(encoding="utf-8"), f"{name} of {self.folder}")
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise self.damaged(name) from error

    def lists(self, name: str) -> bool:
        """Return whether a file was written and is there, without a look at its bytes."""
        return name in self._manifest[FILES] and is_own_file(self.folder / name)

    def holds(self, name: str) -> bool:
        """Return whether a file is there with the bytes that were written."""
        if not self.lists(name):
            return False
        if name not in self._sound:
            self._sound[name] = digest_of_file(self.folder / name) in self._manifest[FILES][name]
            if not self._sound[name]:
                self.damaged_files.append(name)
        return self._sound[name]

    @property
    def files(self) -> list[str]:
        """The names of the files that were written and are there."""
        return [name for name in self._manifest[FILES] if self.lists(name)]

    @property
    def subfolders(self) -> list[str]:
        """The names of the folders that were made in this one."""
        return list(self._manifest[FOLDERS])

    def forget(self, names: list[str]) -> None:
        """Delete files that are needed no longer."""
        known = [name for name in names if name in self._manifest[FILES]]
        for name in known:
            self._delete(name)
            del self._manifest[FILES][name]
            self._sound.pop(name, None)
        if known:
            self._write_manifest()

    def subfolder(self, name: str) -> Path:
        """Return a folder in this one, which is made if need be.

        Raises InputError where something lies there that optprune did not make.
        """
        place = self.folder / name
        if name not in self._manifest[FOLDERS]:
            if place.exists() or place.is_symlink():
                raise InputError(f"{place} was not made by this {self.noun}: move it away, and run again")
            self._manifest[FOLDERS].append(name)
            self._write_manifest()
        if place.is_symlink():
            raise InputError(f"{place} is a link, and this {self.noun} made a folder there: move it away")
        place.mkdir(exist_ok=True)
        return place

    def remove_subfolder(self, name: str) -> None:
        """Delete a folder that `subfolder` made, with all that is in it."""
        if name in self._manifest[FOLDERS]:
            _delete_tree(self.folder / name)
            self._manifest[FOLDERS].remove(name)
            self._write_manifest()

    def damaged(self, name: str) -> InputError:
        """Return the error which says that a file of the folder is not what was written."""
        return InputError(
            f"{name} of the {self.noun} in {self.folder} is damaged: put back the file that was there, or "
            f"{self.begin_anew}"
        )

    def release(self) -> None:
        """Let another process have the folder."""
        if is_own_file(self.folder / LOCK):
            (self.folder / LOCK).unlink()
        self._lock.release(force=True)

    def discard(self) -> list[str]:
        """Delete all that optprune wrote, and the folders made for it as far as they are empty.

        Returns the names of what was not ours and stays.
        """
        with interrupts_held():
            made = int(self._manifest[MADE])
            self.clear()
            # The manifest goes last: until then the folder can be recognised.
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self.release()
            left = sorted(path.name for path in self.folder.iterdir())
            with suppress(OSError):
                for place in (self.folder, *self.folder.parents)[:made]:
                    place.rmdir()
        return left

    def clear(self) -> None:
        """Delete all files and folders of the manifest, and drafts; the manifest is as new then."""
        self._tidy()
        for name in self._manifest[FILES]:
            self._delete(name)
        for name in self._manifest[FOLDERS]:
            _delete_tree(self.folder / name)
        self._manifest |= {FACTS: None, FILES: {}, FOLDERS: []}
        self._sound.clear()
        self._write_manifest()

    def _tidy(self) -> None:
        """Delete drafts that a killed process left, and forget folders that are gone."""
        for place in (self.folder, *(self.folder / name for name in self._manifest[FOLDERS])):
            if is_own_folder(place):
                for path in place.iterdir():
                    if is_draft(path.name) and is_own_file(path):
                        path.unlink(missing_ok=True)
        there = [name for name in self._manifest[FOLDERS] if is_own_folder(self.folder / name)]
        if there != self._manifest[FOLDERS]:
            self._manifest[FOLDERS] = there
            self._write_manifest()

    def _delete(self, name: str) -> None:
        if is_own_file(self.folder / name):
            (self.folder / name).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        content = {name: value for name, value in self._manifest.items() if name != DIGEST}
        text = json.dumps({**content, DIGEST: _digest(content)}, indent=2).encode()
        write_whole(self.folder / MANIFEST, lambda stream: stream.write(text))


def check_manifest_folder(folder: Path, noun: str) -> dict[str, Any] | None:
    """Return the manifest of a folder that optprune keeps work in; None where there is none yet.

    Raises InputError where the folder cannot be used: a link, a file, the work of others, a manifest that is damaged or
    another version's, or a process that is at work in it. Nothing on the disk is changed.
    """
    if folder.is_symlink():
        raise InputError(f"{folder} is a link, and a {noun} is kept in a folder of its own: remove the link")
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, and a {noun} would be kept in a folder of that name: move it away")
    manifest = _manifest(folder, noun)
    if manifest is None:
        for path in sorted(folder.iterdir()):
            # What a process leaves that is killed before there is a manifest.
            left = (path.name == LOCK and path.stat().st_size == 0) or is_draft(path.name, MANIFEST)
            if not (left and is_own_file(path)):
                raise InputError(
                    f"{folder} holds something other than a {noun} ({shown(path.name)}), so it is left as it is: move "
                    "it away, or choose another name for the output"
                )
    if is_own_file(folder / LOCK):
        lock = FileLock(folder / LOCK, is_singleton=True)
        if not _taken(lock):
            raise _busy(folder, noun)
        lock.release()
    return manifest


def _taken(lock: FileLock) -> bool:
    """Acquire a lock, and return whether that was possible."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        raise InputError(f"{lock.lock_file} cannot be used to lock the folder ({error.strerror}): remove it") from error
    if Path(lock.lock_file).exists():
        return True
    lock.release()  # the process that had it has just removed it
    return False


def _busy(folder: Path, noun: str) -> InputError:
    return InputError(f"another process is at work on the {noun} in {folder}: wait for it, or stop it")


def _manifest(folder: Path, noun: str) -> dict[str, Any] | None:
    """Return the manifest in a folder; None where there is none. Raises InputError where it is not one of ours."""
    file = folder / MANIFEST
    if not file.is_symlink() and not file.exists():
        return None
    foreign = InputError(
        f"{file} was not written by this version of optprune, or is damaged, so {folder} is left as it is: move it "
        "away, or choose another name for the output"
    )
    if not is_own_file(file):
        raise foreign
    try:
        content = read_json(file.read_text(encoding="utf-8"), str(file))
        digest = content.pop(DIGEST)
    except (OSError, UnicodeDecodeError, InputError, AttributeError, KeyError, TypeError) as error:
        raise foreign from error
    if digest != _digest(content) or content.get("format") != FORMAT:
        raise foreign
    if content.get(MARK) != noun:
        raise InputError(f"{folder} holds a {content.get(MARK)} and not a {noun}: choose another name for the output")
    return content


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _delete_tree(folder: Path) -> None:
    """Delete a folder with all that is in it, and no link's target."""
    if is_own_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)


SCRATCH = "scratch"
"""the folder for what a run puts aside"""


class RunFolder(ManifestFolder, ABC):
    """The folder of a run, which is deleted when the run's output is whole."""

    stays: tuple[str, ...] = ()
    """the names in the scratch folder that another process can use"""

    def __init__(self, folder: str | Path, *, resume: bool = False, restart: bool = False) -> None:
        """Take the folder: `resume` goes on with the run in it, if there is one, and `restart` deletes that run.

        Raises InputError where there is an unfinished run and neither is asked for.
        """
        super().__init__(folder)
        self.resumed = self.begun and not restart
        """whether there is a run that an earlier process began"""
        if self.resumed and not resume:
            self.release()
            raise InputError(
                f"{self.folder} holds an unfinished {self.noun} ({self.progress_text}): go on with it by --resume, or "
                f"{self.begin_anew}"
            )
        if restart:
            self._restart()
        self._tidy_scratch()

    def _restart(self) -> None:
        """Delete the run, unless a file of another is in the way of the next one."""
        try:
            self.check_names()
        except InputError:
            self.release()
            raise
        self.clear()

    def _tidy_scratch(self) -> None:
        """Delete what an earlier process put aside, but for what this one can use."""
        scratch = self.folder / SCRATCH
        if SCRATCH not in self.subfolders or not is_own_folder(scratch):
            return
        for place in filter(is_own_folder, scratch.iterdir()):
            if place.name not in self.stays:
                shutil.rmtree(place, ignore_errors=True)
                continue
            for file in place.iterdir():
                if is_draft(file.name) and is_own_file(file):
                    file.unlink(missing_ok=True)

    @classmethod
    def check(cls, folder: Path, *, resume: bool, restart: bool, facts: Mapping[str, Any]) -> None:
        """Raise InputError where a run could not use its folder, before any work is done.

        `facts` are those that are known already: a run that was begun with others cannot go on.
        """
        manifest = check_manifest_folder(folder, cls.noun)
        if manifest is None or manifest[FACTS] is None or restart:
            return
        found = cls(folder, resume=resume)
        try:
            found.check_facts(facts)
        finally:
            found.release()

    @property
    def scratch(self) -> Path:
        """The folder for what does not stay."""
        return self.subfolder(SCRATCH)

    @property
    def worth_keeping(self) -> bool:
        """Whether anything is kept that took time."""
        return bool(self.files) or self.has_scratch

    @property
    def has_scratch(self) -> bool:
        """Whether there is something in the scratch folder that another process can use."""
        return any((self.folder / SCRATCH / name).exists() for name in self.stays)

    @abstractmethod
    def finished(self) -> list[int]:
        """Return the numbers of what is finished: of blocks, or of steps."""

    @property
    @abstractmethod
    def progress_text(self) -> str:
        """How far the run is, and of how much, in words."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether all is finished but the output."""
