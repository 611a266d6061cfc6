"""A sparsity of 0: the model stays as it is, no layer is solved, and the folder is a baseline for other tools."""

import copy
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from optprune.allocation import Allocation
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import load_model
from optprune.pruning import Processes, prune
from optprune.recipe import load_recipe, recipe_names
from optprune.report import LayerSolved, PhaseAdvanced
from tests.helpers.attempts import Attempt
from tests.helpers.short_runs import batches, same
from tests.helpers.tiny_models import save_tiny, tiny_llama

NOTE = "the sparsity is 0: nothing is removed, and no layer is solved"


REMOVING = [name for name in recipe_names() if (recipe := load_recipe(name)).bits is None is recipe.vocabulary]
"""the recipes that do nothing but remove weights of blocks"""


@pytest.mark.parametrize("name", REMOVING)
def test_no_recipe_does_anything(name: str) -> None:
    model = tiny_llama(intermediate_size=100)  # no multiple of 8
    before = copy.deepcopy(model)
    recipe = load_recipe(name, {"sparsity": 0, "strict": True})
    events = []
    report = prune(model, batches(), recipe, on_event=events.append)
    assert not [event for event in events if isinstance(event, PhaseAdvanced | LayerSolved)]  # no pass, no solve
    assert same(model, before)
    assert (report.sparsity_requested, report.sparsity_reached) == (0, 0)
    assert report.layers == report.removed == report.recovered == ()
    assert all(block.before == block.after for block in report.blocks)
    assert report.notes == (NOTE,)
    assert report.recipe == recipe.to_dict()
    assert report.floor_seconds == 0


@pytest.mark.parametrize("pattern", ["2:4", "rows"])
def test_a_pattern_of_zeros_has_none_either(pattern: str) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model)
    recipe = load_recipe("sparsegpt", {"sparsity": 0, "units.weights": pattern, "propagation": "cross"})
    assert prune(model, batches(), recipe).sparsity_reached == 0
    assert same(model, before)
    with pytest.raises(InputError, match=r"the pattern 2:4 has a sparsity of 0\.5, not 0\.1"):
        load_recipe("sparsegpt", {"sparsity": 0.1, "units.weights": "2:4"})


def test_an_allocation_comes_before_it() -> None:
    model, other = tiny_llama(), tiny_llama()
    divided = prune(other, batches(), load_recipe("fasp", {"sparsity": 0.3})).allocation
    report = prune(model, batches(), load_recipe("fasp", {"sparsity": 0}), allocation=Allocation.from_dict(divided))
    assert same(model, other)
    assert report.sparsity_reached > 0.2 and report.layers


@pytest.mark.slow
def test_workers_have_nothing_to_do() -> None:
    model = tiny_llama()
    before = copy.deepcopy(model)
    recipe = load_recipe("sparsegpt", {"sparsity": 0, "propagation": "intra"})
    prune(model, batches(), recipe, workers=Processes(1))
    assert same(model, before)


def test_the_folder_is_a_stock_one_with_the_same_weights(tmp_path: Path) -> None:
    source = save_tiny(tiny_llama().to(torch.bfloat16), tmp_path / "dense")
    loaded, recipe = load_model(source), load_recipe("structured_best", {"sparsity": 0})
    report = prune(loaded.model, batches(), recipe)
    saved = save_model(loaded, tmp_path / "out", report=report, recipe=recipe, check_tokens=batches()[0][:1])
    assert saved.stock and saved.logits_difference == 0
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.dtype == torch.bfloat16
    assert same(again, AutoModelForCausalLM.from_pretrained(source))
    assert load_recipe(str(tmp_path / "out" / "recipe.yaml")).sparsity == 0


@pytest.mark.usefixtures("no_weights")
def test_there_is_nothing_to_plan(attempt: Attempt) -> None:
    assert "a sparsity of 0 needs no plan" in attempt.fails(["plan", str(attempt.model), "--sparsity", "0"])


def test_a_run_that_only_rounds_has_a_plan(attempt: Attempt) -> None:
    words = ["--recipe", "gptq", "--no-probe", "--seq-length", "64"]
    assert main(["plan", str(attempt.model), *words]) == 0
    assert "pruning" in attempt.capsys.readouterr().out


@pytest.mark.slow
def test_from_the_shell(attempt: Attempt) -> None:
    assert main(attempt.command("--sparsity", "0", "--recipe", "sparse_best")) == 0
    told = attempt.capsys.readouterr().out
    assert "0.00% of the decoder's linear weights removed (0.00% requested)" in told
    assert "zeros alone" not in told
    assert NOTE in told
    assert "logits differ by at most 0\n" in told
    assert same(
        AutoModelForCausalLM.from_pretrained(attempt.output), AutoModelForCausalLM.from_pretrained(attempt.model)
    )
