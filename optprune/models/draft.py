"""Drafts: descriptions of an architecture in a YAML file, traced or written by hand."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import yaml
from pydantic import TypeAdapter, ValidationError
from transformers import PretrainedConfig

from optprune.errors import InputError
from optprune.models.architecture import Architecture, Heads
from optprune.system.files import read_yaml
from optprune.system.wording import one_line, shown

DRAFT_FIELD = "optprune_architecture"
"""the config field that holds a draft, so that a model and its saved folder record how they were read"""
OF_STOCK = "the stock class cannot hold fewer, and a draft has no class of its own: prune units mlp"


@dataclass(frozen=True)
class NotUnderstood:
    """A module of a block that has no place in a draft."""

    module: str
    """its path in the model"""
    kind: str
    """its class"""
    why: str


@dataclass(frozen=True)
class Draft:
    """The part of an `Architecture` that is plain data; fields of the same name mean the same.

    A draft has no pruned classes: after pruning the blocks are alike, as the stock classes require.
    """

    model_type: str
    blocks: str
    after_blocks: tuple[str, ...]
    stages: tuple[tuple[str, ...], ...]
    mlp_producers: tuple[str, ...]
    mlp_consumer: str
    mlp_width: str
    attention: str
    query: str
    key: str
    value: str
    output: str
    heads: Mapping[str, str]
    """the config fields that hold the numbers of query heads and of KV heads, and the dimension of a head"""
    head_dim_is_free: bool
    attention_parts: tuple[str, ...]
    mlp_parts: tuple[str, ...]
    recoverable: tuple[tuple[str, tuple[str, ...]], ...]
    ends_with_norm: bool = False
    joined: str = ""
    rows_of_unit: int = 1
    by_block: tuple[str, ...] = ("layer_types",)
    indivisible: Mapping[str, str] = field(default_factory=dict)
    transposed: tuple[str, ...] = ()
    stored_names: Mapping[str, str] = field(default_factory=dict)
    logits_divisor: str = ""
    logits_factor: str = ""
    logits_cap: str = ""
    not_understood: tuple[NotUnderstood, ...] = ()
    """the modules without a place; a draft that has any cannot be used"""

    @classmethod
    def from_dict(cls, data: Any, where: str) -> "Draft":
        """Return a draft from plain data; InputError that names a wrong field. `where` names the data's origin."""
        if not isinstance(data, dict):
            raise InputError(f"{where} does not hold fields and values: write a draft by optprune inspect")
        known = {each.name for each in fields(cls)}
        odd = [str(name) for name in data if name not in known]
        if odd:
            raise InputError(f"{where} has an unknown field {shown(odd[0])}: remove it")
        try:
            return TypeAdapter(cls).validate_python(data)
        except ValidationError as error:
            first = error.errors()[0]
            name = ".".join(map(str, first["loc"]))
            raise InputError(f"{where} has an invalid {name} ({one_line(first['msg'])}): correct it") from error

    @classmethod
    def read(cls, file: str | Path) -> "Draft":
        """Return a draft from a YAML file, as `optprune inspect` writes it; InputError where it cannot be used."""
        where = f"the architecture file {file}"
        try:
            text = Path(file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"{where} cannot be read: {error}") from error
        return cls.from_dict(read_yaml(text, where), where)

    def to_dict(self) -> dict[str, Any]:
        """Return the draft as plain data that JSON can hold."""
        return json.loads(json.dumps(asdict(self)))

    def to_yaml(self) -> str:
        """Return the draft as YAML, in the order of its fields."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True, width=100)

    def architecture(self) -> Architecture:
        """Return the architecture; InputError where something is not understood."""
        if self.not_understood:
            first, more = self.not_understood[0], len(self.not_understood) - 1
            others = f" (and {more} more)" if more else ""
            raise InputError(
                f"the draft of {self.model_type} does not understand {first.module} ({first.kind}){others}: "
                f"{first.why}; write the description of this model by hand"
            )
        return _architecture(json.dumps(self.to_dict(), sort_keys=True))

    def put_into(self, config: PretrainedConfig) -> None:
        """Record this draft in the config of a model that it describes; InputError where it describes another."""
        if config.model_type != self.model_type:
            raise InputError(
                f"the architecture file describes {self.model_type} models, and this one is a {config.model_type}: "
                "write its own by optprune inspect"
            )
        self.architecture()
        setattr(config, DRAFT_FIELD, self.to_dict())


def draft_in(config: PretrainedConfig | Mapping[str, Any] | None) -> Draft | None:
    """Return the draft in a config or in the contents of config.json, or None."""
    found = config.get(DRAFT_FIELD) if isinstance(config, Mapping) else getattr(config, DRAFT_FIELD, None)
    return None if found is None else Draft.from_dict(found, f"{DRAFT_FIELD} in the config")


@lru_cache(maxsize=32)
def _architecture(text: str) -> Architecture:
    """Return one object for each draft, so that models read by the same draft have the same architecture."""
    draft = Draft.from_dict(json.loads(text), "the draft")
    own = asdict(draft) | {"recoverable": draft.recoverable, "stages": draft.stages}
    for name in ("not_understood", "ends_with_norm", "heads", "indivisible"):
        del own[name]
    return Architecture(
        **own,
        heads=partial(heads_from_fields, draft.heads),
        ends_with_norm=lambda config: draft.ends_with_norm,
        indivisible={**draft.indivisible, "value_dim": OF_STOCK},
        stock=None,
        pruned=None,
    )


def heads_from_fields(names: Mapping[str, str], config: PretrainedConfig) -> Heads:
    """Return the head layout from config fields of these names; without KV heads, each query head has its own."""
    query = getattr(config, names["query"])
    dim = getattr(config, names.get("dim", ""), None) or config.hidden_size // query
    return Heads(query, getattr(config, names.get("kv", ""), None) or query, dim)
