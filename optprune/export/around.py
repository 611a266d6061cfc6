"""The files around a language part: config and processor of the vision-language folder, copied into the output."""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from transformers import AutoConfig, AutoModelForImageTextToText, PretrainedConfig

from optprune.errors import InputError
from optprune.export.place import TAKEN_FILES, entries
from optprune.export.source_files import own_file
from optprune.models.checkpoint import own_or_cached
from optprune.models.vision import OF_CODE, VisionFolder, module_name
from optprune.system.files import read_json

HUB_FILES = (
    *("generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model", "tekken.json"),
    *("processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"),
    *("chat_template.json", "chat_template.jinja"),
)
"""the files to look for by name on a hub, where a folder cannot be listed"""


def files_around(whole: VisionFolder) -> dict[str, Path]:
    """Return the files of tokenizer and processor of a vision-language folder; InputError for a link out of it."""
    folder = Path(whole.where)
    if not folder.is_dir():
        found = {name: own_or_cached(whole.where, name) for name in HUB_FILES}
        return {name: Path(file) for name, file in found.items() if file is not None}
    names = [name for name, path in sorted(entries(folder).items()) if TAKEN_FILES.fullmatch(name) and path.exists()]
    for name in names:
        if own_file(folder, name) is None:
            raise InputError(
                f"{name} of {folder} is a link to a file outside of the folder, which the output would copy: put "
                "the file itself in its place, or delete the link"
            )
    return {name: folder / name for name in names}


def write_around(whole: VisionFolder, config: PretrainedConfig, draft: Path) -> None:
    """Write config.json with the language part of a config, and the files of tokenizer and processor as they are."""
    draft.mkdir(parents=True, exist_ok=True)
    text = json.dumps(whole.config_with(config), indent=2, ensure_ascii=False) + "\n"
    (draft / "config.json").write_text(text, encoding="utf-8")
    for file in whole.code(config):
        (draft / file.name).write_bytes(file.read_bytes())
    for name, file in files_around(whole).items():
        data = file.read_bytes()
        if name.endswith(".json") and b'"auto_map"' in data:
            fields = read_json(data.decode("utf-8"), name)
            kept = {key: value for key, value in fields.items() if key not in OF_CODE}
            data = (json.dumps(kept, indent=2, ensure_ascii=False) + "\n").encode()
        (draft / name).parent.mkdir(exist_ok=True)
        (draft / name).write_bytes(data)


def check_around(whole: VisionFolder, dtype: torch.dtype | None) -> None:
    """Raise InputError where a language part would be written in another dtype, or files cannot be copied."""
    stored = whole.config.dtype or whole.checkpoint().dtype
    if dtype not in (None, stored):
        kept, asked = (str(each).removeprefix("torch.") for each in (stored, dtype))
        raise InputError(
            f"the vision part of {whole.source} stays {kept}, so its language part is not written as {asked}: give "
            f"--save-dtype {kept}"
        )
    files_around(whole)


def places_around(folder: Path, places: dict[str, str | int], here: str | int) -> dict[str, str | int]:
    """Return a device map for the whole of a language part: its modules by their names there, the others `here`."""
    with init_empty_weights():
        model = AutoModelForImageTextToText.from_config(AutoConfig.from_pretrained(folder, trust_remote_code=False))
    inside = {module_name(name): place for name, place in places.items()}
    others = [f"model.{name}" for name, _ in model.get_submodule("model").named_children()]
    return {name: here for name in others if not any(each.startswith(f"{name}.") for each in inside)} | inside
