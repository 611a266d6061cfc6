"""optprune problems: what a run meets at the layers of a model, as files."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import optprune
from optprune.cli import main
from optprune.problems import origin_of
from optprune.pruning.saved_problems import save_problems
from tests.helpers.attempts import SMALL, Attempt
from tests.helpers.memory import told


def words(attempt: Attempt, *more: str) -> list[str]:
    given = {"--calibration": attempt.text, "--output": attempt.output, **SMALL}
    return ["problems", str(attempt.model), *(str(word) for pair in given.items() for word in pair), *more]


@pytest.mark.parametrize(
    ("recipe", "settings", "layer"),
    [
        ("fasp", {"units": "mlp", "sparsity": 0.2}, "model.layers.1.mlp.down_proj"),
        ("alps", {"units": {"weights": "2:4"}, "sparsity": 0.5}, "model.layers.1.self_attn.q_proj"),
        ("structured_best", {"sparsity": 0.2}, "model.layers.1.mlp.down_proj"),
    ],
)
def test_a_file_holds_the_problem_that_prune_meets(attempt: Attempt, recipe: str, settings, layer: str) -> None:
    more = {"units": "--units", "sparsity": "--sparsity"}
    flags = [
        word for name, value in settings.items() if isinstance(value, str | float) for word in (more[name], str(value))
    ]
    flags += ["--pattern", "2:4"] if recipe == "alps" else []
    assert main(words(attempt, "--recipe", recipe, *flags, "--layers", "*.1.*")) == 0
    file = attempt.output / f"{layer}.safetensors"
    names = {path.name.removesuffix(".safetensors") for path in attempt.output.iterdir()}
    assert layer in names and all(".1." in name for name in names)
    loaded = optprune.load_model(attempt.model)
    from optprune.texts import draw_windows, read_texts

    assert loaded.tokenizer is not None
    batches = draw_windows(loaded.tokenizer, read_texts(str(attempt.text)), 8, 64, seed=0).batches
    problem = optprune.layer_problem(loaded.model, batches, layer, optprune.load_recipe(recipe, settings))
    assert optprune.load_problem(file).fingerprint() == problem.fingerprint()
    origin = origin_of(file)
    assert origin["layer"] == layer and origin["recipe"] == recipe and origin["tokens"] == 512
    said = attempt.capsys.readouterr().out
    assert f"{len(names)} problem" in said
    assert main(["solve", str(file)]) == 0


@told
@pytest.mark.e2e
def test_a_wide_problem_takes_at_most_twice_its_memory_beside_the_model(tmp_path: Path) -> None:
    """From the first sums to the file."""
    # What the C library keeps of what is freed is no part of it.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    words = [sys.executable, "-m", "tests.helpers.problem_memory", str(tmp_path)]
    run = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    taken, held = map(int, run.stdout.split())
    assert held < taken < 2 * held


def test_nothing_is_pruned_after_the_last_layer_that_is_written(attempt: Attempt, tmp_path: Path) -> None:
    """The first layer's problem depends on no answer; a later one's depends on those before it."""
    for layer, pruned in (("model.layers.0.self_attn.q_proj", False), ("model.layers.1.self_attn.q_proj", True)):
        loaded, recipe = optprune.load_model(attempt.model), optprune.load_recipe("wanda", {"sparsity": 0.5})
        before = {name: weight.clone() for name, weight in loaded.model.named_parameters()}
        batches = [torch.randint(0, 64, (2, 16))]
        save_problems(loaded.model, batches, recipe, tmp_path, layers=layer)
        changed = {name for name, weight in loaded.model.named_parameters() if not torch.equal(weight, before[name])}
        assert bool(changed) is pruned and not any(".layers.1." in name for name in changed)


def test_save_problems_takes_a_recipe_by_its_name_and_fields(attempt: Attempt, tmp_path: Path) -> None:
    layer, found = "model.layers.1.mlp.down_proj", set[str]()
    batches = [torch.randint(0, 64, (2, 16), generator=torch.Generator().manual_seed(0))]
    fields = {"units": "mlp", "sparsity": 0.25}
    for recipe, more in (("fasp", fields), (optprune.load_recipe("fasp", fields), {})):
        model = optprune.load_model(attempt.model).model
        (file,) = save_problems(model, batches, recipe, tmp_path, layers=layer, **more)
        found.add(optprune.load_problem(file).fingerprint())
    assert len(found) == 1


@pytest.mark.parametrize(
    ("more", "reason"),
    [
        (["--layers", "*.7.*"], "matches no layer that the recipe fasp prunes, such as model.layers.0."),
        (["--recipe", "fassp"], "did you mean fasp?"),
        (
            ["--recipe", "magnitude", "--sparsity", "0"],
            "none of the layers that match '*' loses a weight at a sparsity of 0",
        ),
        (["--samples", "0"], "--samples"),
        (["--recipe", "vocabulary", "--set", "vocabulary=400"], "has no problems of its own"),
    ],
)
def test_what_is_refused(attempt: Attempt, more: list[str], reason: str) -> None:
    assert reason in attempt.fails(words(attempt, *more))


def test_a_folder_that_exists_stays(attempt: Attempt) -> None:
    attempt.output.mkdir(parents=True)
    (attempt.output / "mine.txt").write_text("mine")
    assert "exists: name a new folder" in attempt.fails(words(attempt))
    assert [path.name for path in attempt.output.parent.iterdir()] == [attempt.output.name]


def test_an_interrupted_run_leaves_nothing(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    from optprune.pruning.run import Run

    def stop(self: Run, index: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "prune_block", stop)
    assert main(words(attempt)) == 130
    assert not (attempt.folder / "new").exists()
