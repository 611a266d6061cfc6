"""Portability of saved folders: configs that transformers 4.57 reads too, and that refer to no code elsewhere."""

import json
import re
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.models.registry import architecture_named

ROTARY = ("rope_theta", "partial_rotary_factor")
"""fields that transformers 5 has in `rope_parameters`, and 4.x beside `rope_scaling`"""
OF_ITS_CLASS = ("model_input_names", "padding_side", "truncation_side", "clean_up_tokenization_spaces")
"""attributes that a tokenizer may inherit from its class only"""


def make_portable(folder: Path, tokenizer: Tokenizer | None) -> None:
    """Rewrite config.json and tokenizer_config.json of a folder that transformers 5 has written."""
    own = {file.stem for file in folder.glob("*.py")}
    for name in ("config.json", "tokenizer_config.json"):
        file = folder / name
        if not file.is_file():
            continue
        fields = json.loads(file.read_text(encoding="utf-8"))
        _keep_own_code(fields, own)
        if name == "config.json":
            _add_older_fields(fields)
        elif tokenizer is not None and tokenizer.is_fast:
            _set_tokenizer(fields, tokenizer)
        file.write_text(json.dumps(fields, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")


def _add_older_fields(fields: dict[str, Any]) -> None:
    """Add the fields of 4.x for the dtype and the rotary embeddings, where 4.x would silently use its defaults."""
    if "dtype" in fields:
        fields["torch_dtype"] = fields["dtype"]
    architecture = architecture_named(fields.get("model_type"), fields)
    older = architecture.older_names
    fields |= {named: fields[name] for name, named in older.items() if name in fields}
    rotary = fields.get("rope_parameters")
    if not rotary or not architecture.in_transformers_4:  # Gemma 4's config takes no older names
        return
    if "full_attention" in rotary:  # each kind of attention has its own, as in Gemma 3
        fields["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    kind = rotary["rope_type"]
    fields |= {older.get(name, name): rotary[name] for name in ROTARY if name in rotary}
    fields["rope_scaling"] = None
    if kind != "default":
        fields["rope_scaling"] = {name: value for name, value in rotary.items() if name not in ROTARY}
    if kind == "longrope":  # 4.x looks for it there
        fields["original_max_position_embeddings"] = rotary["original_max_position_embeddings"]


def _set_tokenizer(fields: dict[str, Any], tokenizer: Any) -> None:
    """Set the class that follows tokenizer.json in 4.x and 5 alike, and the fields of 4.x.

    Other classes differ between the two: Llama's in 4.x adds a first token whatever tokenizer.json says.
    """
    fields |= {"tokenizer_class": "PreTrainedTokenizerFast"} | {name: getattr(tokenizer, name) for name in OF_ITS_CLASS}
    if "extra_special_tokens" in fields:
        fields["additional_special_tokens"] = fields.pop("extra_special_tokens")
    first = json.loads(tokenizer.backend_tokenizer.to_str())["pre_tokenizer"] or {}
    if "add_prefix_space" in first:  # 4.x sets it from this file, or to false
        fields["add_prefix_space"] = first["add_prefix_space"]


def _keep_own_code(fields: dict[str, Any], own: set[str]) -> None:
    """Remove references to code outside of the folder: trusting this folder must not mean trusting another."""
    fields.pop("custom_pipelines", None)
    listed = fields.pop("auto_map", None)
    if isinstance(listed, dict):
        kept = {name: where for name, where in listed.items() if _lies_in(where, own)}
        fields |= {"auto_map": kept} if kept else {}


def _lies_in(where: Any, own: set[str]) -> bool:
    """Return whether an entry, MODULE.CLASS or a list of them, names these modules; REPOSITORY--... does not."""
    entries = where if isinstance(where, list) else [where]
    found = [re.fullmatch(r"(\w+)\.\w+", str(entry), re.ASCII) for entry in entries if entry is not None]
    return all(match is not None and match[1] in own for match in found)
