"""The comparison of weights before and after a change: it repeats itself, and sees a change of one bit."""

import json

import pytest
import torch
from torch import nn

from benchmarks import same_bytes
from optprune.calibration import POLICIES
from optprune.models import ARCHITECTURES
from optprune.recipe import recipe_names

ONE = "llama magnitude dense"


def test_it_prunes_three_architectures_by_every_recipe_under_every_policy_and_all_by_some() -> None:
    found = set(same_bytes.combinations())
    three = {"llama", "opt", "qwen2"}
    assert {f"{name} {recipe} {policy}" for name in three for recipe in recipe_names() for policy in POLICIES} <= found
    assert {f"{name} {recipe} pruned" for name in ARCHITECTURES for recipe in same_bytes.FEW} <= found


@pytest.mark.e2e
def test_two_runs_agree_and_a_weight_of_another_last_bit_is_told(tmp_path, capsys, monkeypatch) -> None:
    before, again, after = (tmp_path / f"{name}.json" for name in ("before", "again", "after"))
    assert same_bytes.main([str(before), "--only", ONE]) == 0
    assert same_bytes.main([str(again), "--only", ONE, "--against", str(before)]) == 0
    assert again.read_bytes() == before.read_bytes()
    prune = same_bytes.prune

    def another(model, batches, recipe):
        report = prune(model, batches, recipe)
        weight = model.model.layers[1].mlp.up_proj.weight
        with torch.no_grad():
            weight[0, 0] = torch.nextafter(weight[0, 0], torch.tensor(9.0))
        return report

    monkeypatch.setattr(same_bytes, "prune", another)
    capsys.readouterr()
    assert same_bytes.main([str(after), "--only", ONE, "--against", str(before)]) == 1
    [_, line] = capsys.readouterr().out.splitlines()
    digests = [json.loads(file.read_text())["results"][ONE]["parameters"] for file in (before, after)]
    assert line == f"{ONE}: parameters: {digests[0]} before, {digests[1]} after"


def test_a_refusal_is_a_result() -> None:
    architecture, recipe, settings = same_bytes.combinations()["opt spap cross"]
    found = same_bytes.pruned(same_bytes.TINY_MODELS[architecture](), recipe, {**settings, "strict": True})
    assert found["refused"] == "StrictError" and found["because"].startswith("recovery has nothing to refit: of opt")


def test_results_that_are_there_only_once_or_count_otherwise_are_told() -> None:
    no, never = ({"refused": "InputError", "because": sentence} for sentence in ("no", "never"))
    counts, others = ({"kept": {"up": 3, "down": down}, "blocks": list(range(down))} for down in (2, 1))
    before = {"a": counts, "b": no, "c": no, "d": no, "e": counts}
    after = {"a": others, "b": no, "c": never, "d": counts, "f": no}
    assert same_bytes.differences(before, before) == []
    assert same_bytes.differences(before, after) == [
        "a: kept: down: 2 before, 1 after",
        "a: blocks: 1: 1 before, nothing after",
        "c: InputError (no) before, InputError (never) after",
        "d: InputError (no) before, weights after",
        "e: weights before, nothing after",
        "f: nothing before, InputError (no) after",
    ]


def test_the_same_bytes_in_another_shape_or_under_another_name_have_another_digest() -> None:
    flat = nn.Module()
    flat.weight, flat.other = nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(6))
    first = same_bytes.digest(flat)
    flat.weight = nn.Parameter(torch.ones(3, 2))
    second = same_bytes.digest(flat)
    flat.weight = nn.Parameter(torch.ones(2, 3))
    assert same_bytes.digest(flat) == first != second
    renamed = nn.Module()
    renamed.weights, renamed.other = flat.weight, flat.other
    assert same_bytes.digest(renamed) not in (first, second)


def test_what_matches_nothing_is_not_the_same(tmp_path, capsys) -> None:
    with pytest.raises(SystemExit):
        same_bytes.main([str(tmp_path / "none.json"), "--only", "bloom"])
    assert "no name has 'bloom' in it" in capsys.readouterr().err
