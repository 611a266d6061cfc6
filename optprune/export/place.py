"""Place of an output: whether it can be written, scratch folders beside it, and how a draft takes the place."""

import contextlib
import glob
import json
import os
import re
import shutil
import stat
import tempfile
import weakref
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from filelock import BaseFileLock, FileLock, Timeout

from optprune.errors import InputError, OptpruneError
from optprune.models.sources import DEMO
from optprune.report.reading import PAGE, REPORT
from optprune.system.files import (
    GENERATOR,
    MARK,
    digest_of_file,
    flush_all,
    flush_name,
    is_marked,
    is_own_file,
    is_own_folder,
    json_text,
    real_path,
    write_whole,
)
from optprune.system.wording import shown

WRITTEN = "optprune.json"
"""name of the record of the files that optprune wrote into a folder, with their digests"""
REPORTS = (REPORT, PAGE)
"""files of a report, which commands write again, and which may hold paths of this machine"""
UNCHECKED = ".unchecked"
"""end of the name of a folder that failed its check"""
OLD = ".old"
"""end of the name of a folder that was moved away from its place: that of the scratch folder whose draft replaces it"""
LOCK = ".optprune-draft"
"""name of the file in a scratch folder that its process holds a lock on; the lock ends with the process"""
SCRATCH_MODE = 0o700
"""permissions of a folder of `tempfile.mkdtemp`"""
WEIGHTS_INDEX = r"model\.safetensors\.index(\.\w+)?\.json"
MODEL_FILES = re.compile(
    r"(report|optprune|(generation_)?config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab)\.json"
    r"|report\.html|recipe\.yaml|(vocab|merges)\.txt|README\.md|(LICEN[CS]E|NOTICE|COPYING|USE_POLICY)(\.txt|\.md)?"
    rf"|model(\.\w+)?(-\d{{5}}-of-\d{{5}})?\.safetensors|{WEIGHTS_INDEX}"
)
"""fixed file names of a saved model; `model_files` adds the shards in its index and the code that its configs name"""
TEMPLATES = "additional_chat_templates"
"""the folder of further chat templates beside a tokenizer"""
COMPILED = "__pycache__"
"""the folder in which Python keeps compiled modules"""
TAKEN_FILES = re.compile(
    r"(generation_config|tokenizer(_config)?|special_tokens_map|added_tokens|vocab|tekken|chat_template)\.json"
    r"|(video_)?(pre)?processor(_config)?\.json|(vocab|merges)\.txt|chat_template\.jinja"
    rf"|{TEMPLATES}/[^/]+\.jinja"
    r"|(tokenizer|spiece|sentencepiece(\.bpe)?|spm(_char)?|tiktoken)\.model"
)
"""the names of files of a tokenizer or a processor, which stay as they are around a language part"""
GRAPH_FILES = re.compile(r"model\.onnx([._]data)?")
"""the names that files of an exported graph may have"""


def check_output(folder: str | Path, overwrite: bool) -> None:
    """Raise InputError unless the output folder can be written: call it before the long work.

    A folder is overwritten only where it is empty, or holds unchanged files that optprune wrote and nothing else.
    """
    folder = Path(folder)
    place = real_path(folder)
    if place.exists():
        if Path.cwd().is_relative_to(place):
            raise InputError(
                f"the output folder {folder} is the current folder or a parent of it, so it cannot be replaced: "
                "name another"
            )
        if not place.is_dir():
            raise InputError(f"the output folder {folder} is a file: choose another name")
        if place.is_mount():
            raise InputError(
                f"the output folder {folder} is a mount point, so it cannot be replaced: name a folder in it"
            )
        if not overwrite:
            raise InputError(f"the output folder {folder} exists already: choose another, or pass --overwrite")
        if any(place.iterdir()):
            _check_written(folder, place)
        if not os.access(place, os.W_OK):
            raise InputError(f"the output folder {folder} cannot be replaced: it is not writable")
    _check_parent(f"the output folder {folder}", place)


def check_output_file(file: str | Path, overwrite: bool, magic: bytes = b"") -> None:
    """Raise InputError unless the output file can be written: call it before the long work.

    A file is overwritten only where it is empty or begins with the `magic` bytes of its format.
    """
    place = real_path(Path(file))
    if place.is_dir():
        raise InputError(f"the output {file} is a folder: name a file")
    if place.exists():
        if not place.is_file():
            raise InputError(f"the output {file} is a device or a pipe, so it cannot be replaced: name another file")
        if not overwrite:
            raise InputError(f"the file {file} exists: choose another, or pass --overwrite to replace it")
        if magic and not _begins_with(place, magic):
            raise InputError(
                f"the file {file} does not begin with {magic.decode(errors='replace')}, as files of this format do, so "
                "it is not overwritten: choose another"
            )
    _check_parent(f"the output {file}", place)


def check_apart(output: str | Path, reads: Iterable[str]) -> None:
    """Raise InputError where an output would replace one of the models that are read, or a file of it.

    A model is read from a folder or a file; other sources, such as a name on the hub, are not looked at.
    """
    place = real_path(Path(output))
    for source in reads:
        paths = _paths_of(source)
        if any(_name_within(path, place) for path in paths):
            raise InputError(f"the output {output} would replace the model that is read ({source}): name another")
        name = _name_within(place, paths[0]) if paths else None
        if name is not None and may_be_of_model(name):
            raise InputError(f"the output {output} has a name that a file of the model {source} may have: name another")


def _paths_of(source: str) -> list[Path]:
    """Return the real paths of a model's folder and of the files in it, or of its file; none for other sources."""
    path = Path(source)
    with contextlib.suppress(OSError):
        if source not in ("", DEMO) and path.exists():
            files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
            return [Path(os.path.realpath(each)) for each in (path, *files)]
    return []


def _name_within(path: Path, place: Path) -> str | None:
    """Return a real path relative to a place that is the same, or one of its parents; None for other places."""
    for parent in (path, *path.parents):
        if parent == place or _is_same(parent, place):
            return path.relative_to(parent).as_posix()
    return None


def _is_same(path: Path, place: Path) -> bool:
    """Return whether two paths exist and are the same file or folder, such as two mounts of it."""
    with contextlib.suppress(OSError):
        return path.samefile(place)
    return False


def _begins_with(file: Path, magic: bytes) -> bool:
    """Return whether a file is empty or begins with these bytes; False where it cannot be read."""
    with contextlib.suppress(OSError), file.open("rb") as stream:
        return stream.read(len(magic)) in (b"", magic)
    return False


def _check_parent(described: str, place: Path) -> None:
    """Raise InputError where no file or folder can be made at this place."""
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"{described} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"{described} cannot be created: {parent} is not writable")


def record_written(folder: Path) -> None:
    """Write into a folder the digests of its files, by which a later command knows that it may replace them.

    The report and its page are not among them, since they may be made again, and have the seconds of a run.
    """
    if folder.is_file():
        return  # an output of one file is known by the first bytes of its format
    digests = {name: digest_of_file(path) for name, path in sorted(entries(folder).items()) if name not in REPORTS}
    text = json_text({GENERATOR: MARK, "files": digests}).encode()
    write_whole(folder / WRITTEN, lambda stream: stream.write(text), lasting=False)


def _check_written(folder: Path, place: Path) -> None:
    """Raise InputError where an output holds anything but unchanged files that optprune wrote there."""
    record = _json_in(place / WRITTEN) if is_own_file(place / WRITTEN) else None
    digests = record.get("files") if isinstance(record, dict) else None
    if not isinstance(digests, dict):
        raise InputError(
            f"the folder {folder} has no record of what optprune wrote there ({WRITTEN}), as folders of others and of "
            "earlier versions, so it is not overwritten: delete it, or choose another"
        )
    for name, path in sorted(entries(place).items()):
        compiled = name.startswith(f"{COMPILED}/") and name.endswith(".pyc")
        own = name in digests or name == WRITTEN or compiled or (name in REPORTS and _is_report(path))
        if not (own and is_own_file(path)):
            raise InputError(
                f"the folder {folder} holds {shown(name)}, which optprune did not write there, so it is not "
                "overwritten: move that file away, or choose another folder"
            )
        if name in digests and _digest(path, *_state(path)) != digests[name]:
            raise InputError(
                f"{shown(name)} in {folder} was changed after optprune wrote it, so the folder is not overwritten: "
                "move that file away, or choose another folder"
            )


def _is_report(path: Path) -> bool:
    """Return whether a file is a page or a report of a run, as it was written or made again."""
    if path.name == PAGE:
        return is_marked(path)
    content = _json_in(path)
    return isinstance(content, dict) and ("versions" in content or "healing" in content)


def _state(path: Path) -> tuple[int, int, int]:
    status = path.stat()
    return status.st_ino, status.st_size, status.st_mtime_ns


@cache
def _digest(path: Path, *state: int) -> str:
    """Return the digest of a file, which is read once in a process as long as its state is the same."""
    return digest_of_file(path)


def entries(folder: Path) -> dict[str, Path]:
    """Return the paths in a model folder by name, as FOLDER/NAME for those in its template and bytecode folders."""
    found = {path.name: path for path in folder.iterdir()}
    for inner in (TEMPLATES, COMPILED):
        if inner in found and is_own_folder(found[inner]):
            found |= {f"{inner}/{path.name}": path for path in found.pop(inner).iterdir()}
    return found


def model_files(folder: Path) -> set[str]:
    """Return the names of the files of a saved model in a folder: no other is replaced or uploaded.

    They have names that transformers or optprune write, or an index of weights lists them, or they are modules that a
    config names, with those that these import.
    """
    there = {name for name, path in entries(folder).items() if is_own_file(path)}
    known = set(filter(_has_fixed_name, there))
    contents = {name: _json_in(folder / name) for name in known if name.endswith(".json")}
    shards, modules = set[str](), set[str]()
    for name, content in contents.items():
        if re.fullmatch(WEIGHTS_INDEX, name):
            listed = content.get("weight_map") if isinstance(content, dict) else None
            shards.update(str(file) for file in (listed.values() if isinstance(listed, dict) else ()))
        elif name.endswith("config.json"):
            modules.update(_modules_named(content))
    known |= {name for name in shards & there if name.endswith(".safetensors")}
    return known | _imported(folder, modules, there)


def may_be_of_model(name: str) -> bool:
    """Return whether a saved model may have a file of this name, whatever its other files are."""
    return _has_fixed_name(name) or name.endswith((".safetensors", ".py"))


def _has_fixed_name(name: str) -> bool:
    """Return whether transformers or optprune give files of a model this name."""
    return any(kind.fullmatch(name) for kind in (MODEL_FILES, TAKEN_FILES, GRAPH_FILES))


def _json_in(file: Path) -> Any:
    """Return the content of a JSON file, or None where it cannot be read."""
    with contextlib.suppress(OSError, ValueError, RecursionError):
        return json.loads(file.read_text(encoding="utf-8"))
    return None


def _modules_named(content: Any) -> Iterator[str]:
    """Yield the Python files in the same folder that the `auto_map` of a config, or of a nested config, names."""
    if not isinstance(content, dict):
        return
    for key, value in content.items():
        if key == "auto_map" and isinstance(value, dict):
            for entry in value.values():
                for name in entry if isinstance(entry, list) else [entry]:
                    if match := re.fullmatch(r"(\w+)\.\w+", str(name)):
                        yield f"{match[1]}.py"
        else:
            yield from _modules_named(value)


def _imported(folder: Path, modules: set[str], there: set[str]) -> set[str]:
    """Return those of the Python files `modules` that are `there`, and the files that they import relatively."""
    found, new = set[str](), modules & there
    if not new:
        return found
    from transformers.dynamic_module_utils import get_relative_imports

    while new:
        found |= new
        imported = set[str]()
        for name in new:
            with contextlib.suppress(OSError, ValueError):
                imported.update(f"{module}.py" for module in get_relative_imports(folder / name))
        new = (imported & there) - found
    return found


def missing_parents(place: Path) -> list[Path]:
    """Return the parents of an output that do not exist yet, innermost first."""
    return [parent for parent in place.parents if not parent.exists()]


class Scratch:
    """Folder beside an output, which is deleted by `discard`, or at the latest when nothing refers to it."""

    def __init__(self, place: Path) -> None:
        # A spare file descriptor for `_discard`, opened first so that no folder is made when there is none left.
        spare = os.open(os.devnull, os.O_RDONLY)
        # A sibling of the output, so that the rename at the end stays within one file system.
        self.folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        self._lock = FileLock(self.folder / LOCK)
        self.discard = weakref.finalize(self, _discard, self.folder, self._lock, spare)
        self._lock.acquire(timeout=0)


def left_behind(place: Path) -> list[Path]:
    """Return the scratch folders of an output whose processes were killed."""
    return [
        folder
        for folder in sorted(place.parent.glob(f".{glob.escape(place.name)}.????????"))
        if is_own_folder(folder) and ((is_own_file(folder / LOCK) and not in_use(folder)) or _is_empty_scratch(folder))
    ]


def _is_empty_scratch(folder: Path) -> bool:
    """Return whether a folder is empty and has the permissions that only a scratch folder is created with.

    A process that is killed between the two last steps of `discard` leaves one.
    """
    return stat.S_IMODE(folder.stat().st_mode) == SCRATCH_MODE and not any(folder.iterdir())


def delete_left_behind(place: Path, say: Callable[[str], None] = lambda sentence: None) -> None:
    """Delete the scratch folders of an output whose processes were killed, and say so, and what else is left.

    A former output is deleted only if the scratch folder beside it shows that its draft has taken the place.
    """
    for folder in left_behind(place):
        former, drafts = folder.with_name(f"{folder.name}{OLD}"), [one for one in folder.iterdir() if one.name != LOCK]
        if is_own_folder(former) and not drafts and (place / "config.json").is_file():
            # Before the scratch folder, without which it could not be recognised.
            say(f"deleting {former}, which a killed run had replaced")
            shutil.rmtree(former, ignore_errors=True)
        say(f"deleting {folder}, which a killed run left behind")
        discard(folder)
    for note in former_notes(place):
        say(note)


def former_notes(place: Path) -> list[str]:
    """Return a message for each folder that may be a former output, left by a run that was killed."""
    folders = sorted(place.parent.glob(f".{glob.escape(place.name)}.????????{OLD}"))
    return [
        f"{folder} may be what was in {place} before a run was killed: rename it, or delete it"
        for folder in folders
        if is_own_folder(folder) and not folder.with_name(folder.name.removesuffix(OLD)).exists()
    ]


def in_use(folder: Path) -> bool:
    """Return whether a process holds the lock of a scratch folder."""
    lock = FileLock(folder / LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    lock.release()
    return False


def discard(folder: Path) -> None:
    """Delete as much of a folder as possible with one file descriptor at a time: shutil.rmtree needs more."""
    with contextlib.suppress(OSError):
        # The lock is deleted last: until then the folder can be recognised.
        for path in sorted(folder.iterdir(), key=lambda path: path.name == LOCK):
            if path.is_dir() and not path.is_symlink():
                discard(path)
            else:
                path.unlink()
        folder.rmdir()


def _discard(folder: Path, lock: BaseFileLock, spare: int) -> None:
    os.close(spare)
    lock.release()
    discard(folder)


def set_aside(draft: Path, place: Path) -> Path:
    """Rename a draft to NAME.unchecked beside its place, or NAME.unchecked-2 and so on, and return the new path."""
    number, unchecked = 1, place.with_name(f"{place.name}{UNCHECKED}")
    while unchecked.exists() or unchecked.is_symlink():
        number += 1
        unchecked = place.with_name(f"{place.name}{UNCHECKED}-{number}")
    draft.rename(unchecked)
    return unchecked


def put_in_place(draft: Path, place: Path, overwrite: bool, magic: bytes = b"") -> None:
    """Flush a draft to the disk and rename it to its place; files of the format begin with the `magic` bytes.

    An old folder is deleted after the new name is on the disk too, and put back if the rename fails.
    """
    flush_all(draft)
    if draft.is_file():
        if overwrite:
            # Another process may have made it meanwhile.
            check_output_file(place, overwrite, magic)
            draft.replace(place)
        else:
            _name_anew(draft, place)
        flush_name(place)
        return
    old = place.with_name(f".{place.name}.{draft.parent.name.rpartition('.')[2]}{OLD}")
    replaced = place.exists()
    if replaced:
        # Another process may have made it meanwhile.
        check_output(place, overwrite)
        place.rename(old)
    try:
        draft.rename(place)
    except BaseException as error:
        if replaced:
            try:
                old.rename(place)
            except OSError:
                raise OptpruneError(
                    f"{place} could not be replaced ({error}): the model that was there is now in {old}"
                ) from error
        raise
    flush_name(place)
    if replaced:
        # The new folder is in place, even if parts of the old one cannot be deleted.
        shutil.rmtree(old, ignore_errors=True)


def _name_anew(draft: Path, file: Path) -> None:
    """Rename a draft to a name that no file has. Raises InputError where a file has it."""
    there = InputError(f"another command wrote {file} meanwhile: pass --overwrite to replace it")
    try:
        os.link(draft, file, follow_symlinks=False)  # unlike a rename, this replaces nothing
    except FileExistsError:
        raise there from None
    except OSError:  # a file system without links
        if file.exists() or file.is_symlink():
            raise there from None
        draft.rename(file)
    else:
        draft.unlink()
