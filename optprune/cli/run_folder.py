"""The run folder of a command: what is done is in it until the output is whole, so that it can go on."""

import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from optprune.errors import InputError, OptpruneError, WorkerError, is_out_of_memory, no_room, no_room_behind
from optprune.system.facts import differences
from optprune.system.files import read_json, real_path
from optprune.system.interrupts import NOTHING, record_done, what_is_done
from optprune.system.run_folder import RunFolder
from optprune.system.wording import shown

Folder = TypeVar("Folder", bound=RunFolder)
REPORT = "report.json"
FINISHED = "{} is finished, and this command made it: nothing is left to do"
OF_THE_MACHINE = ("the version", "the versions", "the machine")
"""the facts that a command does not say: another machine may find its output finished"""


def run_folder_of(output: Path) -> Path:
    """Return the place of the run that writes an output."""
    place = real_path(output)
    return place.with_name(f"{place.name}.run")


def check_resume(*, resume: bool, restart: bool) -> None:
    """Raise InputError where a command is to go on with a run and to delete it."""
    if resume and restart:
        raise InputError("--resume goes on with an unfinished run and --restart deletes it: give one of them")


@contextmanager
def kept_in(journal: Folder, say: Callable[[str], None]) -> Iterator[Folder]:
    """Delete a run's folder when the output is whole, or when it holds nothing of worth; else keep it and say so.

    A run that could not go on stays as it was. One that began here and fails for what it was given would fail again,
    and keeps nothing; one that was stopped, lost a worker or lacked room or memory keeps what is finished.
    """
    try:
        yield journal
    except BaseException as error:
        refused = isinstance(error, OptpruneError) and not _for_want(error)
        if journal.resumed and (refused or not journal.worth_keeping):
            journal.release()
            raise
        if not journal.worth_keeping or (refused and not journal.complete):
            _discard(journal, say)
            raise
        kept = f"{journal.progress_text}, and kept in {journal.folder}: go on with --resume"
        record_done(f"{done}; {kept}" if (done := what_is_done()) != NOTHING else kept)
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
        say(f"{journal.folder} stays, with what this {journal.noun} did not write: {', '.join(left)}")


def _for_want(error: BaseException) -> bool:
    """Return whether an error, or its cause, says that there is no room or no memory, or that a worker is gone."""
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    return isinstance(error, WorkerError) or no_room_behind(error) is not None or any(map(is_out_of_memory, causes))


def check_finished(
    output: Path, stored: Mapping[str, Any] | None, facts: Mapping[str, Any], *, overwrite: bool
) -> bool:
    """Return whether an output is that of a run with these facts, so that nothing is left to do.

    `stored` are the facts in the output's report. Raises InputError where they are others, unless the output may be
    overwritten.
    """
    if not stored:
        if overwrite:
            return False
        raise InputError(
            f"{output} exists, and does not say which command made it, so --resume leaves it as it is: choose another "
            "output, or pass --overwrite"
        )
    plain = json.loads(json.dumps({name: value for name, value in facts.items() if name not in OF_THE_MACHINE}))
    for what, old, new in differences({name: stored.get(name) for name in plain}, plain):
        if overwrite:
            return False
        raise InputError(
            f"{output} is finished, and another command made it: {what} was {shown(old)} and is {shown(new)}; choose "
            "another output, or pass --overwrite"
        )
    return True


def stored_facts(output: Path, *path: str) -> Mapping[str, Any] | None:
    """Return the facts in the report of an output, below some names; None where there are none."""
    try:
        found = read_json((output / REPORT).read_text(encoding="utf-8"), str(output / REPORT))
        for name in (*path, "run_facts"):
            found = found[name]
    except (OSError, UnicodeDecodeError, InputError, KeyError, TypeError):
        return None
    return found if isinstance(found, dict) else None
