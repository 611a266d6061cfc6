"""Values in files: YAML as people write it, and JSON that every program reads; and how long names of files may be."""

import json
import math
import os
import re
from typing import Any

import yaml

from optprune.errors import InputError

LONGEST_NAME = 240
"""bytes in the name of an output: a draft has a few more beside it, and file systems allow 255"""


def check_name(name: str) -> None:
    """Raise InputError when a file or folder of that name leaves no room for a draft beside it."""
    if len(os.fsencode(name)) > LONGEST_NAME:
        raise InputError(f"the name {name} is longer than {LONGEST_NAME} bytes: choose a shorter one")


class _Loader(yaml.SafeLoader):
    """Plain data, in which 2:4 is text (YAML 1.1 reads it in base 60) and 1e-3 a number (it reads that as text)."""


_NUMBERS = {
    "tag:yaml.org,2002:int": (r"[-+]?(?:0b[01_]+|0x[0-9a-fA-F_]+|0[0-7_]*|[1-9][0-9_]*)", "-+0123456789"),
    "tag:yaml.org,2002:float": (
        r"[-+]?(?:(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|\.(?:inf|Inf|INF))|\.(?:nan|NaN|NAN)",
        "-+0123456789.",
    ),
}
_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for _tag, (_pattern, _first) in _NUMBERS.items():
    _Loader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), list(_first))


def read_yaml(text: str, where: str) -> Any:
    """The plain data in a YAML text; InputError, in one sentence that says where it is, when it is not YAML."""
    try:
        return yaml.load(text, Loader=_Loader)  # a subclass of the safe loader
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"{where} is not valid YAML: {' '.join(str(error).split())}") from error


def json_text(value: Any) -> str:
    """Plain data as indented JSON; NaN and infinity, which JSON does not know, are null."""
    return json.dumps(_known_to_json(value), indent=2, allow_nan=False) + "\n"


def _known_to_json(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _known_to_json(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_known_to_json(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
