"""The run folder of a command: what is done is in it until the output is whole, so that it can go on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from optprune.errors import InputError, OptpruneError, WorkerError, is_out_of_memory, no_room, no_room_behind
from optprune.system.files import real_path

if TYPE_CHECKING:
    from optprune.pruning.journal import Journal
    from optprune.system.run_folder import RunFolder

Folder = TypeVar("Folder", bound="RunFolder")


def run_folder_of(output: Path) -> Path:
    """Where the run is that writes an output."""
    place = real_path(output)
    return place.with_name(f"{place.name}.run")


@contextmanager
def journalled(output: Path, *, resume: bool, overwrite: bool) -> Iterator["Journal"]:
    """The journal of a run of pruning in its run folder."""
    from optprune.pruning.journal import Journal

    with kept_in(Journal(run_folder_of(output), resume=resume, overwrite=overwrite)) as journal:
        yield journal


@contextmanager
def kept_in(journal: Folder) -> Iterator[Folder]:
    """A run whose folder goes when the output is whole, or when nothing in it is worth keeping.

    A run that fails for what it was given, and would fail again, keeps nothing; one that was stopped, lost a worker or
    lacked room or memory keeps what is finished, and the error says so.
    """
    try:
        yield journal
    except BaseException as error:
        if not journal.finished() or (isinstance(error, OptpruneError) and not journal.whole and not _for_want(error)):
            journal.discard()
            raise
        kept = f"{journal.told}, and kept in {journal.folder}: go on with --resume"
        if isinstance(error, OptpruneError):
            raise type(error)(f"{error}; {kept}") from error
        if isinstance(error, Exception) and (is_out_of_memory(error) or no_room(error)):
            raise InputError(f"{no_room(error) or 'the memory is not enough'}; {kept}") from error
        raise
    journal.discard()


def _for_want(error: BaseException) -> bool:
    """Whether an error, or what it came from, says that there is no room or no memory, or that a worker is gone."""
    causes = [cause for cause in (error, error.__cause__) if cause is not None]
    return isinstance(error, WorkerError) or no_room_behind(error) is not None or any(map(is_out_of_memory, causes))
