"""How a sentence counts."""

import pytest

from optprune.system.wording import counted


@pytest.mark.parametrize(
    ("number", "words", "said"),
    [
        (0, ("layer",), "0 layers"),
        (1, ("layer",), "1 layer"),
        (2, ("layer",), "2 layers"),
        (1, ("matrix", "matrices"), "1 matrix"),
        (1000, ("block is", "blocks are"), "1000 blocks are"),
    ],
)
def test_one_is_no_plural(number: int, words: tuple[str, ...], said: str) -> None:
    assert counted(number, *words) == said
