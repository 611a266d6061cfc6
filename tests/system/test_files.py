"""YAML and JSON: unusual input is refused quickly in one line; and the wording of messages."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from optprune.allocation import Allocation
from optprune.errors import InputError
from optprune.models import Decoder
from optprune.recipe import Recipe, load_recipe
from optprune.recipe.names import SOLVERS
from optprune.solvers import Chain, Magnitude, Random, Restore
from optprune.system.files import DEEPEST, MOST_VALUES, read_json, read_yaml
from optprune.system.wording import counted, shown
from optprune.texts import read_documents
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import tiny_llama

LINE = 400
"""the limit of characters of a sentence with one value"""


@pytest.fixture(autouse=True)
def at_once() -> Iterator[None]:
    began = time.monotonic()
    yield
    assert time.monotonic() - began < 20


def bomb(levels: int, wide: int = 9) -> str:
    """Lists that name the one before them: wide ** levels values in a few lines."""
    lines = [f"a0: &a0 [{', '.join(['lol'] * wide)}]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * wide)}]" for n in range(1, levels)]
    return "\n".join(lines)


@pytest.mark.parametrize("levels", [5, 8, 20])
def test_a_bomb_of_aliases(levels: int) -> None:
    with pytest.raises(InputError, match=f"it has more than {MOST_VALUES} values") as told:
        read_yaml(bomb(levels), "the file")
    assert len(str(told.value)) < LINE


def test_a_bomb_as_a_recipe(attempt: Attempt) -> None:
    file = attempt.folder / "bomb.yaml"
    file.write_text(bomb(6))
    sentence = attempt.fails(attempt.command(recipe=file))
    assert "values" in sentence
    assert len(sentence) < LINE + len(str(file))


def test_a_chain_of_aliases_that_is_deep() -> None:
    text = "a0: &a0 [1]\n" + "\n".join(f"a{n}: &a{n} [*a{n - 1}]" for n in range(1, 3000))
    with pytest.raises(InputError, match=f"more than {DEEPEST} levels deep"):
        read_yaml(text, "the file")


def test_an_alias_within_what_it_names() -> None:
    with pytest.raises(InputError, match="it contains itself"):
        read_yaml("a: &a [*a]", "the file")


def test_aliases_as_people_use_them() -> None:
    assert read_yaml("a: &a {x: 1, y: 2}\nb: *a\nc: {<<: *a, y: 3}", "the file") == {
        "a": {"x": 1, "y": 2},
        "b": {"x": 1, "y": 2},
        "c": {"x": 1, "y": 3},
    }


@pytest.mark.parametrize("text", ["a: 1\nb: 2\na: 3", "{a: 1, a: 1}", "x: [{a: 1, 'a': 2}]"])
def test_duplicate_keys_in_yaml(text: str) -> None:
    with pytest.raises(InputError, match="the file is not valid YAML: the key 'a' is given twice"):
        read_yaml(text, "the file")


def test_duplicate_keys_in_json() -> None:
    with pytest.raises(InputError, match="the file is not valid JSON: the key 'a' is given twice"):
        read_json('{"x": {"a": 1, "a": 1}}', "the file")


@pytest.mark.parametrize("text", ["[" * 30, "[" * 100_000, "{a: " * 5000, "- " * 5000, "[" * 25 + "]" * 25])
def test_yaml_that_is_deep(text: str) -> None:
    with pytest.raises(InputError, match=f"the file is not valid YAML: it is more than {DEEPEST} levels deep"):
        read_yaml(text, "the file")


def test_deep_nesting_given_to_the_command(attempt: Attempt) -> None:
    deep = "[" * 20_000
    assert "deep" in attempt.fails(attempt.command("--set", f"solver={deep}"))
    for name in ("recipe.yaml", "allocation.json"):
        file = attempt.folder / name
        file.write_text(deep)
        assert "deep" in attempt.fails(attempt.command(**{name.partition(".")[0]: file}))


def test_a_line_of_jsonl_that_is_deep(tmp_path: Path) -> None:
    file = tmp_path / "deep.jsonl"
    file.write_text('{"text": "one"}\n' + "[" * 100_000)
    with pytest.raises(InputError, match=r"line 2 of .* is nested too deeply"):
        read_documents(str(file))


@pytest.mark.parametrize("number", ["9" * 5000, "-" + "9" * 5000])
def test_numbers_of_more_digits_than_python_reads(tmp_path: Path, number: str) -> None:
    for read, kind in ((read_yaml, "YAML"), (read_json, "JSON")):
        with pytest.raises(InputError, match=f"the file is not valid {kind}: it holds a number of over 4300 digits"):
            read(f'{{"seed": {number}}}', "the file")
    file = tmp_path / "long.jsonl"
    file.write_text(f'{{"text": {number}}}\n')
    with pytest.raises(InputError, match=r"line 1 of .* holds a number of over 4300 digits"):
        read_documents(str(file))


@pytest.mark.parametrize("field", ["seed", "damping", "sparsity", "samples", "units", "solver", "strict", "pattern"])
@pytest.mark.parametrize("value", ["0x" + "f" * 5000, "'" + "x" * 5000 + "'", "{" + "x" * 500 + ": 1}", "1e4000"])
def test_a_value_is_cut_to_a_line(tmp_path: Path, field: str, value: str) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"{field}: {value}")
    with pytest.raises(InputError) as told:
        load_recipe(str(file))
    assert len(str(told.value)) < 1200 if field == "samples" else 700  # all known names may follow


def test_a_key_is_cut_to_a_line() -> None:
    with pytest.raises(InputError) as told:
        Recipe({"x" * 5000: 1})
    assert len(str(told.value)) < 1200


@pytest.mark.parametrize(
    ("blocks", "reason"),
    [
        ([{"mlp_width": 8, "kv_heads": 1, "value_dim": 1, "shares": {"q": 10**400}}], "not an allocation"),
        ([{"mlp_width": "8" * 5000, "kv_heads": 1, "value_dim": 1}], "must be whole numbers"),
        (["8" * 5000], "not an allocation"),
    ],
    ids=shown,
)
def test_an_allocation_with_numbers_beyond_sense(blocks: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason) as told:
        Allocation.from_dict({"sparsity": 0.1, "blocks": blocks})
    assert len(str(told.value)) < 600


def test_an_allocation_of_more_digits_than_python_writes() -> None:
    block = {"mlp_width": 16**4000, "kv_heads": 1, "value_dim": 1}
    with pytest.raises(InputError, match="keeps mlp_width a whole number of 16001 bits in block 0, which has 128"):
        Allocation.from_dict({"sparsity": 0.1, "blocks": [block, block]}).check(Decoder(tiny_llama()))


def test_an_allocation_whose_sparsity_is_beyond_a_float() -> None:
    with pytest.raises(InputError, match="not an allocation"):
        Allocation.from_json(json.dumps({"sparsity": 10**400, "blocks": []}))


def test_what_is_shown_of_a_value() -> None:
    assert shown("heads") == "'heads'"
    assert shown({"greedy_obs": {"batch": 1.5}}) == "{'greedy_obs': {'batch': 1.5}}"
    assert shown(16**4000) == "a whole number of 16001 bits"
    for value in ("x" * 10**6, list(range(10**6)), {str(n): n for n in range(10**4)}, [["x" * 100] * 100] * 100):
        assert len(shown(value)) <= 200


# -- solvers


def test_solvers_nested_beyond_sense(attempt: Attempt) -> None:
    nested: Any = ["magnitude"]
    for _ in range(300):
        nested = [nested]
    with pytest.raises(InputError, match="a chain of chains is more than 8 deep: write one chain"):
        Recipe({"solver": nested})
    assert "deep" in attempt.fails(attempt.command("--set", f"solver={json.dumps(nested)}"))


def test_solvers_nested_as_people_might() -> None:
    nested = Chain((Chain((Magnitude(),)), Restore()))
    assert Recipe({"solver": nested, "units": "weights"}).to_dict()["solver"] == [["magnitude"], "restore"]


@pytest.mark.parametrize(
    ("solver", "option", "value"),
    [
        ("admm", "rho", 1e300),
        ("admm", "rho", 1e-300),
        ("admm", "every", 10**8),
        ("fistapruner", "inner_steps", 10**8),
        ("fista_path", "inner_steps", 10**8),
        ("spap", "growth", 1e300),
        ("spap", "depth", 10**8),
        ("greedy_obs", "batch", 16**4000),
        ("conjugate_gradients", "tolerance", 1e-300),
        ("swaps", "candidates", 10**9),
        ("random", "seed", 2**64),
        ("random", "seed", -1),
    ],
    ids=shown,
)
@pytest.mark.usefixtures("no_weights")
def test_solver_options_that_make_no_sense(attempt: Attempt, solver: str, option: str, value: Any) -> None:
    text = hex(value) if isinstance(value, int) and value > 0 else repr(value)
    sentence = attempt.fails(attempt.command("--set", f"solver={{{solver}: {{{option}: {text}}}}}"))
    assert f"{option} of {SOLVERS[solver]().label} must be " in sentence


def test_the_seed_of_a_random_choice() -> None:
    assert Random(seed=2**63 - 1).seed == 2**63 - 1


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
