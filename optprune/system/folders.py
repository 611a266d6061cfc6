"""Folders for the work of a run, with a manifest of the files and their digests."""

import json
import os
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, TypeGuard, TypeVar

from filelock import FileLock, Timeout

from optprune.errors import InputError, OptpruneError
from optprune.system.environment import differences, in_words, stored_facts
from optprune.system.files import (
    digest_of,
    digest_of_file,
    is_draft,
    is_own_file,
    is_own_folder,
    read_json,
    write_whole,
)
from optprune.system.interrupts import done_sentence, interrupts_held, record_done
from optprune.system.wording import shown

MANIFEST, LOCK = "run.json", "in-use"
MARK, FORMAT = "optprune", 1
FACTS, FILES, FOLDERS, MADE, DIGEST = "facts", "files", "folders", "made", "digest"
"""the entries of a manifest"""
GO_ON = "run again to continue"
"""what to do about results that are kept, as the end of a sentence on them"""
Value = TypeVar("Value")
Folder = TypeVar("Folder", bound="ManifestFolder")


class ManifestFolder:
    """Folder for one process at a time, with a record of each file that optprune wrote there.

    The manifest `run.json` holds our mark, the facts that determine all results, and the SHA-256 digest of every file.
    A file with another digest counts as absent. Only files and folders of the manifest, and our drafts, are ever
    overwritten or deleted, and links are never followed. Files are in the folder or in a folder of it, no deeper.
    """

    noun = "run"
    """the noun for the content of the folder, which is also in the manifest"""
    begin_anew = "start again with --restart, which deletes it"
    """the way to discard the content, for messages"""
    written: tuple[str, ...] = ()
    """`fnmatch` patterns of the names that may be written; a foreign file with such a name is an error"""

    goes_on: bool = False
    """whether `begin` was called, and has accepted the facts"""

    def __init__(self, folder: str | Path, *, again: bool = False) -> None:
        """Lock the folder, which is created if needed; `again` means that an earlier process may have created it.

        Raises InputError where it is a link, has foreign content, is damaged, or is locked by another process.
        """
        self.folder = Path(folder)
        check_manifest_folder(self.folder, self.noun)
        with interrupts_held():
            made = [parent for parent in (self.folder, *self.folder.parents) if not parent.exists()]
            # A process that was killed before it wrote a manifest leaves a lock, a draft of the manifest, or nothing.
            there = self.folder.exists() and (again or any(self.folder.iterdir()))
            left = there and _manifest(self.folder, self.noun) is None
            self.folder.mkdir(parents=True, exist_ok=True)
            # All objects of this process share one lock: an unreleased one is not another process.
            self._lock = FileLock(self.folder / LOCK, is_singleton=True)
            if not _acquired(self._lock):
                raise _busy(self.folder, self.noun)
            try:
                self._manifest = _manifest(self.folder, self.noun) or self._created(1 if left else len(made))
                self._valid: dict[str, bool] = {}
                self._manifest[FOLDERS] = [
                    name for name in self._manifest[FOLDERS] if is_own_folder(self.folder / name)
                ]
                self._left_behind = self._drafts()
            except BaseException:
                self._lock.release(force=True)
                raise
        self.damaged_files: list[str] = []
        """the names of files with changed bytes"""

    def _created(self, made: int) -> dict[str, Any]:
        self._manifest = {MARK: self.noun, "format": FORMAT, MADE: made, **_nothing()}
        self._write_manifest()
        return self._manifest

    def check_names(self) -> None:
        """Raise InputError where a foreign file has a name that may be written."""
        for pattern in self.written:
            for path in sorted(self.folder.glob(pattern)):
                if not self._wrote(path.relative_to(self.folder).as_posix()):
                    raise self._in_the_way(path)

    def _wrote(self, name: str) -> bool:
        """Return whether a file of the manifest exists, and is neither a link nor behind one."""
        file = self.folder / name
        return name in self._manifest[FILES] and is_own_file(file) and not file.parent.is_symlink()

    def _in_the_way(self, path: Path) -> InputError:
        return InputError(f"{path} was not written by this {self.noun}: move it away, and run again")

    def _linked(self, place: Path) -> InputError:
        return InputError(f"{place} is a link, but this {self.noun} created a folder there: move the link away")

    def _check_name(self, name: str, parts: int) -> None:
        """Raise InputError unless a name of at most so many parts is one of something in the folder."""
        if not _is_inside(name, parts):
            raise InputError(f"{shown(name)} does not name a file or a folder in {self.folder}: choose another name")

    @property
    def begun(self) -> bool:
        """Whether the facts were recorded."""
        return self._manifest[FACTS] is not None

    @property
    def facts(self) -> dict[str, Any]:
        """The recorded facts; empty before `begin`."""
        return self._manifest[FACTS] if self.begun else {}

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Record the facts that determine all results, or compare them with the recorded ones.

        What a killed process left behind is deleted then. Raises InputError with the first difference, and then changes
        nothing.
        """
        plain = json.loads(json.dumps(facts))
        if self.begun:
            self.check_facts({**dict.fromkeys(self.facts), **plain})
        self.check_names()
        if not self.begun:
            self._manifest[FACTS] = plain
            self._write_manifest()
        self.goes_on = True
        _delete_all(self._left_behind)

    def check_facts(self, facts: Mapping[str, Any]) -> None:
        """Raise InputError where one of these facts differs from the recorded one."""
        plain = json.loads(json.dumps(facts))
        for what, old, new in differences(stored_facts(self.facts, plain) if self.begun else plain, plain):
            raise InputError(
                f"the {self.noun} in {self.folder} cannot continue: {in_words(what, old, new)}; "
                f"nothing was changed: give the command that began it, or {self.begin_anew}"
            )

    def keep(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file of the folder as a whole or not at all, and record its digest.

        Raises InputError where a foreign file has the name, or the name leads out of the folder.
        """
        self._check_name(name, 2)
        file, files = self.folder / name, self._manifest[FILES]
        if file.parent.is_symlink():
            raise self._linked(file.parent)
        if file.exists() or file.is_symlink():
            if name not in files or not is_own_file(file):
                raise self._in_the_way(file)
            before = [digest for digest in [digest_of_file(file)] if digest in files[name]]
        else:
            before = []

        def commit(digest: str) -> None:
            # Until the file gets its name, the previous bytes are valid too.
            files[name] = list(dict.fromkeys((*before, digest)))
            self._write_manifest()

        write_whole(file, write, commit=commit)
        self._valid[name] = True

    def keep_texts(self, texts: Mapping[str, str]) -> None:
        """Write texts to files of the folder by name, each as a whole or not at all."""
        for name, text in texts.items():
            self.keep(name, lambda stream, text=text: stream.write(text.encode()))

    def write(self, name: str, content: Any) -> None:
        """Write plain data to a file of the folder as JSON."""
        # NaN and infinity are written in the form that Python reads.
        text = json.dumps(content, indent=2).encode()
        self.keep(name, lambda stream: stream.write(text))

    def read(self, name: str) -> Any:
        """Return the plain data in a file of the folder. Raises InputError where the file was changed."""
        if not self.holds(name):
            raise self.damaged(name)
        try:
            return read_json((self.folder / name).read_text(encoding="utf-8"), f"{name} of {self.folder}")
        except (OSError, UnicodeDecodeError, InputError) as error:
            raise self.damaged(name) from error

    def read_as(self, name: str, parse: Callable[[Any], Value]) -> Value:
        """Return what `parse` makes of the plain data in a file.

        Raises InputError where the file was changed, or `parse` raises ValueError.
        """
        plain = self.read(name)
        try:
            return parse(plain)
        except ValueError as error:
            raise self.damaged(name) from error

    def kept(self, name: str, parse: Callable[[Any], Value]) -> Value | None:
        """Return what `parse` makes of the plain data that an earlier process kept in a file.

        None where the facts were not recorded, which could be others now, and where the file is missing or changed.
        Raises InputError where `parse` raises ValueError.
        """
        return self.read_as(name, parse) if self.begun and self.holds(name) else None

    def lists(self, name: str) -> bool:
        """Return whether a written file exists, without a check of its bytes."""
        return self._wrote(name)

    def holds(self, name: str) -> bool:
        """Return whether a file exists with the written bytes."""
        if not self.lists(name):
            return False
        if name not in self._valid:
            self._valid[name] = digest_of_file(self.folder / name) in self._manifest[FILES][name]
            if not self._valid[name]:
                self.damaged_files.append(name)
        return self._valid[name]

    @property
    def files(self) -> list[str]:
        """The names of the written files that exist."""
        return [name for name in self._manifest[FILES] if self.lists(name)]

    @property
    def worth_keeping(self) -> bool:
        """Whether the folder has results that took time."""
        return bool(self.files)

    @property
    def subfolders(self) -> list[str]:
        """The names of the folders created in this one."""
        return list(self._manifest[FOLDERS])

    def forget(self, names: list[str]) -> None:
        """Delete files, and remove them from the manifest."""
        known = [name for name in names if name in self._manifest[FILES]]
        for name in known:
            self._delete(name)
            del self._manifest[FILES][name]
            self._valid.pop(name, None)
        if known:
            self._write_manifest()

    def subfolder(self, name: str) -> Path:
        """Return a folder in this one, which is created if needed.

        Raises InputError where a foreign file or folder has the name, or the name leads out of the folder.
        """
        self._check_name(name, 1)
        place = self.folder / name
        if name not in self._manifest[FOLDERS]:
            if place.exists() or place.is_symlink():
                raise InputError(f"{place} was not made by this {self.noun}: move it away, and run again")
            self._manifest[FOLDERS].append(name)
            self._write_manifest()
        if place.is_symlink():
            raise self._linked(place)
        place.mkdir(exist_ok=True)
        return place

    def remove_subfolder(self, name: str) -> None:
        """Delete a folder from `subfolder` with its content."""
        if name in self._manifest[FOLDERS]:
            _delete_tree(self.folder / name)
            self._manifest[FOLDERS].remove(name)
            self._write_manifest()

    def damaged(self, name: str) -> InputError:
        """Return the error for a changed file of the folder."""
        return InputError(
            f"{name} of the {self.noun} in {self.folder} is damaged: restore the file, or {self.begin_anew}"
        )

    def release(self) -> None:
        """Unlock the folder for other processes."""
        if is_own_file(self.folder / LOCK):
            (self.folder / LOCK).unlink()
        self._lock.release(force=True)

    def close(self) -> None:
        """Release the folder, or delete it where `begin` was not called."""
        if self.begun:
            self.release()
        else:
            self.discard()

    def discard(self) -> list[str]:
        """Delete all written files, and the created folders that are then empty.

        Returns the names of foreign files, which are kept.
        """
        with interrupts_held():
            made = int(self._manifest[MADE])
            self.clear()
            # The manifest is deleted last: until then the folder can be recognised.
            (self.folder / MANIFEST).unlink(missing_ok=True)
            self.release()
            left = sorted(path.name for path in self.folder.iterdir())
            with suppress(OSError):
                for place in (self.folder, *self.folder.parents)[:made]:
                    place.rmdir()
        return left

    def clear(self, but: Collection[str] = ()) -> None:
        """Delete all files and folders of the manifest, `but` these folders, and drafts, and reset the manifest."""
        _delete_all(self._drafts())
        for name in self._manifest[FILES]:
            self._delete(name)
        left = [name for name in self._manifest[FOLDERS] if name in but]
        for name in self._manifest[FOLDERS]:
            if name not in left:
                _delete_tree(self.folder / name)
        self._manifest |= _nothing() | {FOLDERS: left}
        self._valid.clear()
        self._write_manifest()

    def _drafts(self) -> list[Path]:
        """Return the unfinished files in this folder and in the folders of the manifest."""
        folders = [self.folder, *(self.folder / name for name in self._manifest[FOLDERS])]
        return [draft for folder in folders for draft in _drafts_in(folder)]

    def _delete(self, name: str) -> None:
        if self._wrote(name):
            (self.folder / name).unlink(missing_ok=True)

    def _write_manifest(self) -> None:
        content = {name: value for name, value in self._manifest.items() if name != DIGEST}
        text = json.dumps({**content, DIGEST: digest_of(content)}, indent=2).encode()
        write_whole(self.folder / MANIFEST, lambda stream: stream.write(text))


@contextmanager
def kept_or_discarded(place: Folder, *, stays: bool = True) -> Iterator[Folder]:
    """Close a folder at the end; delete it where it was begun here and the work failed before it had any result.

    Facts without results would only refuse the next call, which may have other options. An error names the folder that
    keeps results, unless it is a temporary one, which does not stay.
    """
    had = place.begun
    try:
        yield place
    except BaseException as error:
        if not had and not place.worth_keeping:
            place.discard()
            raise
        place.close()
        if not (place.goes_on and stays):  # where it did not go on it was refused, and nothing was changed
            raise
        if not done_sentence().endswith(GO_ON):
            record_done(f"what is finished is kept in {place.folder}: {GO_ON}")
        if isinstance(error, OptpruneError):
            raise type(error)(f"{error}; {done_sentence()}") from error
        raise
    place.close()


def check_manifest_folder(folder: Path, noun: str) -> dict[str, Any] | None:
    """Return the manifest of a work folder; None where there is none yet.

    Raises InputError where the folder cannot be used: a link, a file, foreign content, a manifest that is damaged or of
    another version, a lock that is a link or has content, or one of another process. Nothing on the disk is changed.
    """
    if folder.is_symlink():
        raise InputError(f"{folder} is a link, but a {noun} needs a folder: remove the link")
    if not folder.exists():
        return None
    if not folder.is_dir():
        raise InputError(f"{folder} is a file, but a {noun} needs a folder of that name: move it away")
    manifest = _manifest(folder, noun)
    if manifest is None:
        for path in sorted(folder.iterdir()):
            # Leftovers of a process that was killed before it wrote a manifest.
            left = (path.name == LOCK and path.stat().st_size == 0) or is_draft(path.name, MANIFEST)
            if not (left and is_own_file(path)):
                raise InputError(
                    f"{folder} is not the folder of a {noun} (it holds {shown(path.name)}), so it was not changed: "
                    "move it away, or choose another name for the output"
                )
    place = folder / LOCK
    if os.path.lexists(place) and not is_own_file(place):
        # Opening a lock may empty the file that a link leads to.
        raise InputError(f"{place} is a link or no regular file, so it cannot lock the {noun}: remove it")
    if place.exists() and place.stat().st_size:
        # The lock files of optprune are empty where the system can lock files; elsewhere they name their process.
        raise InputError(
            f"{place} is not empty, so it is a file of yours or the lock of another process: wait for that process, or "
            "move the file away"
        )
    if place.exists():
        lock = FileLock(place, is_singleton=True)
        if not _acquired(lock):
            raise _busy(folder, noun)
        lock.release()
    return manifest


def _acquired(lock: FileLock) -> bool:
    """Acquire a lock, and return whether that succeeded."""
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return False
    except OSError as error:
        raise InputError(f"{lock.lock_file} cannot be used to lock the folder ({error.strerror}): remove it") from error
    if Path(lock.lock_file).exists():
        return True
    lock.release()  # its former owner has just removed it
    return False


def _busy(folder: Path, noun: str) -> InputError:
    return InputError(f"another process is using the {noun} in {folder}: wait for it, or stop it")


def _manifest(folder: Path, noun: str) -> dict[str, Any] | None:
    """Return the manifest in a folder; None where there is none. Raises InputError for a foreign one."""
    file = folder / MANIFEST
    if not file.is_symlink() and not file.exists():
        return None
    foreign = InputError(
        f"{file} was not written by this version of optprune, or is damaged, so {folder} was not changed: move it "
        "away, or choose another name for the output"
    )
    if not is_own_file(file):
        raise foreign
    try:
        content = read_json(file.read_text(encoding="utf-8"), str(file))
        digest = content.pop(DIGEST)
    except (OSError, UnicodeDecodeError, InputError, AttributeError, KeyError, TypeError) as error:
        raise foreign from error
    if digest != digest_of(content) or content.get("format") != FORMAT or not _is_sound(content):
        raise foreign
    if content.get(MARK) != noun:
        raise InputError(f"{folder} holds a {content.get(MARK)} and not a {noun}: choose another name for the output")
    return content


def _nothing() -> dict[str, Any]:
    """Return the entries of a manifest before anything is recorded."""
    return {FACTS: None, FILES: {}, FOLDERS: []}


def _is_sound(content: Mapping[str, Any]) -> bool:
    """Return whether the entries of a manifest have the types and the names that optprune writes."""
    files, folders, made = content.get(FILES), content.get(FOLDERS), content.get(MADE)
    return (
        isinstance(content.get(FACTS, ""), dict | None)
        and isinstance(made, int)
        and made >= 0
        and isinstance(files, dict)
        and all(_is_inside(name, 2) and _are_texts(digests) for name, digests in files.items())
        and _are_texts(folders)
        and all(_is_inside(name, 1) for name in folders)
    )


def _are_texts(values: Any) -> TypeGuard[list[str]]:
    """Return whether plain data is a list of texts."""
    return isinstance(values, list) and all(isinstance(value, str) for value in values)


def _is_inside(name: str, parts: int) -> bool:
    """Return whether a relative path of at most so many parts leads to something in its folder on every system."""
    found = name.split("/")
    return len(found) <= parts and not any(part in ("", ".", "..") or "\\" in part or "\0" in part for part in found)


def _drafts_in(folder: Path) -> list[Path]:
    """Return the unfinished files in a folder; none where it is missing or a link."""
    paths = folder.iterdir() if is_own_folder(folder) else ()
    return [path for path in paths if is_draft(path.name) and is_own_file(path)]


def _delete_all(paths: Iterable[Path]) -> None:
    """Delete files, and folders with their content; skip links and missing paths."""
    for path in paths:
        if is_own_file(path):
            path.unlink(missing_ok=True)
        else:
            _delete_tree(path)


def _delete_tree(folder: Path) -> None:
    """Delete a folder with its content; links are not followed."""
    if is_own_folder(folder):
        shutil.rmtree(folder, ignore_errors=True)


SCRATCH = "scratch"
"""the folder for temporary files of a run"""


class RunFolder(ManifestFolder, ABC):
    """Folder of a run, which is deleted when the output of the run is complete.

    A run that replaces an unfinished one (`restart`) counts as new and empty from the start, but the earlier run is
    deleted only when the new one begins or keeps its first file: a command that is refused before changes nothing.
    """

    stays: tuple[str, ...] = ()
    """the names in the scratch folder that a later process can use"""
    replaces: bool = False
    """whether the folder still holds an earlier run, which is deleted when this one begins"""

    def __init__(self, folder: str | Path, *, resume: bool = False, restart: bool = False) -> None:
        """Lock the folder; `resume` continues the run in it, if there is one, and `restart` replaces that run.

        Raises InputError for an unfinished run without either.
        """
        super().__init__(folder, again=resume)
        self.resumed = self.begun and not restart
        """whether the run was begun by an earlier process"""
        self._has_own_scratch = False
        if self.resumed and not resume:
            self.release()
            raise InputError(
                f"{self.folder} holds an unfinished {self.noun} ({self.progress_text}): continue it by --resume, or "
                f"{self.begin_anew}"
            )
        if restart:
            self._check_restart()
            self.replaces = self.begun
            if not self.replaces:
                self.clear()
        if not self.replaces:
            self._left_behind += self._left_in_scratch()

    def _check_restart(self) -> None:
        """Raise InputError where a foreign file would prevent the next run."""
        try:
            self.check_names()
        except InputError:
            self.release()
            raise

    @property
    def begun(self) -> bool:
        return not self.replaces and super().begun

    def begin(self, facts: Mapping[str, Any]) -> None:
        """Record the facts of the run, or compare them, as `ManifestFolder.begin`; delete the run that it replaces."""
        self._replace()
        super().begin(facts)

    def keep(self, name: str, write: Callable[[BinaryIO], object]) -> None:
        """Write a file as `ManifestFolder.keep` does, after the run that this one replaces is deleted."""
        self._replace()
        super().keep(name, write)

    def lists(self, name: str) -> bool:
        return not self.replaces and super().lists(name)

    @property
    def subfolders(self) -> list[str]:
        return [] if self.replaces else super().subfolders

    def close(self) -> None:
        """Release the folder, or delete it where no run was begun in it."""
        if self.replaces:
            self.release()
        else:
            super().close()

    def _replace(self) -> None:
        """Delete the run that this one replaces, unless a foreign file would prevent this one."""
        if not self.replaces:
            return
        self.check_names()
        with interrupts_held():
            self.clear(but=(SCRATCH,) if self._has_own_scratch else ())
            self.replaces = False

    def _left_in_scratch(self) -> list[Path]:
        """Return the temporary folders of an earlier process, and the drafts in those that this one can use."""
        scratch = self.folder / SCRATCH
        if SCRATCH not in self._manifest[FOLDERS] or not is_own_folder(scratch):
            return []
        found = list[Path]()
        for folder in filter(is_own_folder, scratch.iterdir()):
            found += _drafts_in(folder) if folder.name in self.stays else [folder]
        return found

    @classmethod
    def check(cls, folder: Path, *, resume: bool, restart: bool, facts: Mapping[str, Any]) -> None:
        """Raise InputError, before any work, where a run could not use its folder.

        `facts` are the facts known so far; a run that was begun with other facts cannot continue.
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
        """The folder for temporary files; weights converted for a run that this one replaces stay in it."""
        place = self.subfolder(SCRATCH)
        if self.replaces and not self._has_own_scratch:
            _delete_all(self._left_in_scratch())
            self._has_own_scratch = True
        return place

    @property
    def worth_keeping(self) -> bool:
        return super().worth_keeping or self.has_scratch

    @property
    def has_scratch(self) -> bool:
        """Whether the scratch folder has files that a later process can use."""
        scratch = self.folder / SCRATCH
        return SCRATCH in self.subfolders and any((scratch / name).exists() for name in self.stays)

    @abstractmethod
    def finished(self) -> list[int]:
        """Return the numbers of the finished blocks or steps."""

    @property
    @abstractmethod
    def progress_text(self) -> str:
        """The progress of the run, in words."""

    @property
    @abstractmethod
    def complete(self) -> bool:
        """Whether everything but the output is finished."""
