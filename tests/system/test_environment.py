"""Differences between two runs in words."""

import pytest

from optprune.system.environment import COUNTS, differences, in_words, stored_facts

ONE, OTHER = "0a" * 32, "1b" * 32


@pytest.mark.parametrize(
    ("what", "before", "now", "words"),
    [
        ("the seed", 1, 2, "the seed was 1 and is 2"),
        ("the model", None, ONE, f"the model was None and is '{ONE}'"),
        ("the model", ONE, OTHER, "the model was another one"),
        ("the weights", ONE, OTHER, "the weights were others"),
        ("the text", ONE, OTHER, "the text was another one (by another file, another number or length of windows, or "),
    ],
    ids=lambda value: str(value)[:20],
)
def test_digests_are_told_in_words(what: str, before: object, now: object, words: str) -> None:
    assert in_words(what, before, now).startswith(words)


def test_a_count_that_an_earlier_record_lacks_is_no_difference() -> None:
    asked = {COUNTS[0]: 2048, "the seed": 1}
    assert not list(differences(stored_facts({"the seed": 1}, asked), asked))
    assert list(differences(stored_facts({COUNTS[0]: 256}, asked), asked)) == [
        (COUNTS[0], 256, 2048),
        ("the seed", None, 1),
    ]
