"""The files that transformers would read a model's weights from: safetensors in its own folder, or InputError."""

from pathlib import Path, PurePath
from typing import Any

from transformers import PretrainedConfig
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from optprune.errors import InputError
from optprune.system.files import read_json
from optprune.system.wording import shown

ENDING = ".safetensors"


def check_weights_named(config: PretrainedConfig, source: str) -> None:
    """Raise InputError when a config names the file of its weights, which may be anywhere and of any kind."""
    named = getattr(config, "transformers_weights", None)
    if named is not None:
        raise InputError(
            f"the config of {source} names its weights itself (transformers_weights {shown(named)}), and only "
            f"{SAFE_WEIGHTS_NAME} or its shards are read: rename the file, and take the field out of config.json"
        )


def has_weights(source: str) -> bool:
    """Whether a model source is more than a folder with a config."""
    return not Path(source).is_dir() or any(Path(source).glob(f"*{ENDING}"))


def check_weights_files(source: str, where: str) -> None:
    """Raise InputError when a folder or hub name would have its weights read from anything but safetensors of its own.

    Shards may be links, as in the hub's cache; what leads out of the folder is a name with a path.
    """
    if own_or_cached(where, SAFE_WEIGHTS_NAME) is None:  # the index is not read then
        _shards(source, where)  # from_pretrained says what is missing


def weights_files(source: str, where: str) -> list[Path]:
    """The safetensors files that hold the weights of a folder or hub name; InputError where one of them is missing."""
    whole = own_or_cached(where, SAFE_WEIGHTS_NAME)
    if whole is not None:
        return [Path(whole)]
    names = _shards(source, where)
    files = {name: own_or_cached(where, name) for name in names}
    missing = [name for name, file in files.items() if file is None] if names else [SAFE_WEIGHTS_NAME]
    if missing:
        raise InputError(f"the weights of {source} are incomplete: there is no {missing[0]}; copy the folder again")
    return [Path(file) for file in files.values() if file is not None]


def _shards(source: str, where: str) -> list[str]:
    """The names of the shards that an index names, which are safetensors of the folder's own; none without one."""
    index = own_or_cached(where, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    what = f"{SAFE_WEIGHTS_INDEX_NAME} of {source}"
    try:
        text = Path(index).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} is not UTF-8: fetch it again") from error
    data = read_json(text, what)
    shards = data.get("weight_map") if isinstance(data, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise InputError(f"{what} has no weight_map that says which tensor is in which file: fetch it again")
    for name in shards.values():
        if not _is_own(name):
            raise InputError(
                f"{what} names {shown(name)} for weights, which is not a name such as model-00001-of-00002{ENDING}: "
                "pickle is not read, nor is what lies outside the folder; fetch the weights again as safetensors"
            )
    return sorted(set(shards.values()))


def own_or_cached(where: str, name: str) -> str | None:
    """Return the path of a file of a model folder or hub name; None where there is none, or the hub is out of reach."""
    return cached_file(
        where, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )


def _is_own(name: Any) -> bool:
    if not isinstance(name, str) or not name.endswith(ENDING):
        return False
    path = PurePath(name)
    return not path.is_absolute() and ".." not in path.parts
