"""The output of a command and its run folder, which holds finished work until the output is whole."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from optprune.errors import InputError, OptpruneError, WorkerError, is_out_of_memory, no_room, no_room_behind
from optprune.system.environment import differences, in_words, is_first, stored_facts
from optprune.system.files import read_json, real_path
from optprune.system.folders import FACTS, RunFolder, check_manifest_folder
from optprune.system.interrupts import NOTHING, done_sentence, record_done

Folder = TypeVar("Folder", bound=RunFolder)
FINISHED = "{} was already finished by this command: nothing is left to do"
OF_THE_MACHINE = ("the version", "the versions", "the machine")
"""the facts that do not come from the command, so that another machine may find its output finished"""


def run_folder_of(output: Path) -> Path:
    """Return the run folder of an output."""
    place = real_path(output)
    return place.with_name(f"{place.name}.run")


@dataclass(frozen=True)
class Output:
    """The output folder of a command, with the options on existing outputs and runs."""

    folder: Path
    overwrite: bool = False
    """whether an existing output may be replaced"""
    resume: bool = False
    """whether to continue an unfinished run"""
    restart: bool = False
    """whether to delete an unfinished run"""
    section: tuple[str, ...] = ()
    """the keys in report.json under which the facts of the run are stored"""
    reads: tuple[str, ...] = ()
    """the sources of the models that are read, which the output may not replace"""

    def check(self) -> None:
        """Raise InputError unless the output can be written, whatever the run."""
        from optprune.export.place import check_apart, check_output

        if self.resume and self.restart:
            raise InputError("--resume continues an unfinished run and --restart deletes it: give one of them")
        check_apart(self.folder, self.reads)
        if self.overwrite or not self.may_be_finished:
            check_output(self.folder, self.overwrite)

    @property
    def may_be_finished(self) -> bool:
        """Whether an output exists that an earlier call of the same command may have finished."""
        return self.resume and real_path(self.folder).is_dir()

    def check_run(self, kind: type[RunFolder], known: Mapping[str, Any]) -> None:
        """Raise InputError unless a run with these facts can continue here; other facts may not be known yet.

        Of processes that share a run only the first one checks, because the others would see its lock.
        """
        if not is_first():
            return
        kind.check(run_folder_of(self.folder), resume=self.resume, restart=self.restart, facts=known)
        if self.may_be_finished:
            self._is_of(known)

    def earlier_facts(self, kind: type[RunFolder]) -> Mapping[str, Any] | None:
        """Return the facts of the run that --resume continues, or of the finished output; None where there is none."""
        if not self.resume:
            return None
        manifest = check_manifest_folder(run_folder_of(self.folder), kind.noun)
        begun = None if manifest is None else manifest[FACTS]
        return begun or (self._stored() if self.may_be_finished else None)

    def run_folder(self, kind: type[Folder]) -> Folder:
        """Return the run folder, locked."""
        return kind(run_folder_of(self.folder), resume=self.resume, restart=self.restart)

    def delete_left_behind(self, say: Callable[[str], None]) -> None:
        """Delete the drafts that killed runs left beside the output.

        It is called once the run has begun, since a command that is refused changes nothing.
        """
        from optprune.export.place import delete_left_behind

        delete_left_behind(real_path(self.folder), say)

    def is_finished(self, run: RunFolder, facts: Mapping[str, Any]) -> bool:
        """Return whether the output was finished by a run with these facts.

        Raises InputError where the output or the unfinished run belongs to another command and may not be replaced.
        """
        if not self._is_of(facts):
            return False
        if run.begun:
            run.check_facts(facts)
        return True

    def _is_of(self, facts: Mapping[str, Any]) -> bool:
        stored = self._stored()
        if not stored:
            if self.overwrite:
                return False
            raise InputError(
                f"{self.folder} exists without a record of the command that wrote it, so --resume cannot continue it: "
                "choose another output, or pass --overwrite"
            )
        plain = json.loads(json.dumps({name: value for name, value in facts.items() if name not in OF_THE_MACHINE}))
        for what, old, new in differences(stored_facts(stored, plain), plain):
            if self.overwrite:
                return False
            raise InputError(
                f"{self.folder} was finished by another command: {in_words(what, old, new)}; "
                "choose another output, or pass --overwrite"
            )
        return True

    def _stored(self) -> Mapping[str, Any] | None:
        """Return the facts in the report of the output; None where there are none."""
        from optprune.report.reading import REPORT

        file = self.folder / REPORT
        try:
            found = read_json(file.read_text(encoding="utf-8"), str(file))
            for name in (*self.section, "run_facts"):
                found = found[name]
        except (OSError, UnicodeDecodeError, InputError, KeyError, TypeError):
            return None
        return found if isinstance(found, dict) else None


@contextmanager
def keep_or_delete(journal: Folder, say: Callable[[str], None]) -> Iterator[Folder]:
    """Delete a run folder when the output is whole or the folder holds nothing useful; else keep it and print that.

    A resumed run that is refused stays as it was, and so does a run that a new one replaces, until that has begun. A
    new run that fails because of its input would fail again and is deleted. A run that was stopped, lost a worker or
    lacked disk or memory keeps its finished work.
    """
    try:
        yield journal
    except BaseException as error:
        refused = isinstance(error, OptpruneError) and not _lacks_resources(error)
        if journal.replaces or (journal.resumed and (refused or not journal.worth_keeping)):
            journal.release()
            raise
        if not journal.worth_keeping or (refused and not journal.complete):
            _discard(journal, say)
            raise
        kept = f"{journal.progress_text}, and kept in {journal.folder}: continue with --resume"
        record_done(f"{done}; {kept}" if (done := done_sentence()) != NOTHING else kept)
        journal.release()
        if isinstance(error, OptpruneError):
            raise type(error)(f"{error}; {kept}") from error
        if isinstance(error, Exception) and (is_out_of_memory(error) or no_room(error)):
            raise InputError(f"{no_room(error) or 'the memory is not enough'}; {kept}") from error
        raise
    _discard(journal, say)


def _discard(journal: RunFolder, say: Callable[[str], None]) -> None:
    left = journal.discard()
    if left:
        say(f"{journal.folder} is not deleted, because it holds files of others: {', '.join(left)}")


def _lacks_resources(error: BaseException) -> bool:
    """Return whether an error or its cause is a lack of disk or memory, or a lost worker."""
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    return isinstance(error, WorkerError) or no_room_behind(error) is not None or any(map(is_out_of_memory, causes))
