"""docs/guide/export.md: the table of what llama.cpp refuses has each family once, with its rotary scalings."""

import re

from optprune.export.gguf_families import FAMILIES
from optprune.program import RUNTIMES
from tests.helpers.pages import TEXTS

PAGE = TEXTS["docs/guide/export.md"]
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in PAGE.partition("| family | blocks may differ |")[2].split("\n\n")[0].splitlines()[2:]
]
TYPES = [re.findall(r"`(\w+)`", row[0]) for row in ROWS]
LLAMA_CPP = RUNTIMES["gguf"]


def test_the_table_of_refusals_has_each_family_once() -> None:
    assert sorted(name for names in TYPES for name in names) == sorted(FAMILIES)


def test_the_table_of_refusals_names_the_rotary_scalings() -> None:
    wrong = {
        name: row[2]
        for names, row in zip(TYPES, ROWS, strict=True)
        for name in names
        if {"default", *row[2].split(", ")} != set(LLAMA_CPP.scalings(name))
    }
    assert wrong == {}


def test_the_table_of_refusals_names_blocks_that_may_differ_or_not_be_removed() -> None:
    for names, (_, differ, _, refused) in zip(TYPES, ROWS, strict=True):
        for name in names:
            assert (differ != "no") == (name in LLAMA_CPP.uneven or FAMILIES[name].lists), name
            assert ("fewer blocks" in refused) == (name in LLAMA_CPP.ordered), name
