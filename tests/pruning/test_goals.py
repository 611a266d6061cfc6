"""Goals in place of a sparsity: the size of the folder, the speed of decoding, the loss on a text."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedModel

import optprune
from optprune.cli import main
from optprune.errors import InputError
from optprune.measure import ModelSpeed, Repeats, SpeedWorkload, measure_speed, perplexity
from optprune.models import Decoder
from optprune.program import Request, resolve
from optprune.pruning.goal import MOST_TRIALS, QualityGoal, find_sparsity, narrow_to, next_sparsity, parse_goal
from optprune.recipe import Recipe, load_recipe
from tests.helpers.attempts import Attempt, snapshot
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama
from tests.helpers.trained_tiny import news, trained

KIB = 1024


def weight_bytes(folder: Path) -> int:
    """The bytes of the numbers in a folder, by its headers."""
    total = 0
    for file in folder.glob("*.safetensors"):
        data = file.read_bytes()
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        total += sum(one["data_offsets"][1] - one["data_offsets"][0] for key, one in header.items() if key[0] != "_")
    return total


def dense_bytes(model: PreTrainedModel) -> int:
    return sum(weight.numel() * weight.element_size() for weight in model.parameters())


# -- size


@pytest.mark.parametrize(
    "words",
    [
        ("--recipe", "fasp"),
        ("--recipe", "fasp", "--units", "mlp"),
        ("--recipe", "structured_best"),
        ("--recipe", "fasp", "--vocabulary", "400", "--set", "vocabulary.tokens=0"),
        ("--recipe", "fasp", "--save-dtype", "bfloat16"),
    ],
    ids=lambda words: " ".join(words[1:]),
)
def test_a_folder_has_at_most_the_size_and_little_less(attempt: Attempt, words: tuple[str, ...]) -> None:
    model = optprune.load_model(attempt.model).model
    whole = dense_bytes(model) // (2 if "bfloat16" in words else 1)
    if "--vocabulary" in words:
        whole -= 2 * 112 * model.config.hidden_size * 4
    asked = int(0.9 * whole) // KIB
    assert main(attempt.command(*words, "--to", f"{asked}KiB")) == 0
    found = weight_bytes(attempt.output)
    # Widths are multiples of 8 of 128: a step is a sixteenth of the MLPs, of which these models have two.
    step = 8 * 3 * model.config.hidden_size * model.config.num_hidden_layers * (2 if "bfloat16" in words else 4)
    assert asked * KIB - step <= found <= asked * KIB
    report = json.loads((attempt.output / "report.json").read_text())
    assert report["goal"]["asked"] == f"{asked}KiB"
    assert report["goal"]["reached"] == pytest.approx(found, rel=0.01)
    line = f"for the goal {asked}KiB, a sparsity of"
    assert line in (attempt.output / "report.html").read_text()
    assert line in attempt.capsys.readouterr().out
    assert line in (attempt.output / "README.md").read_text()
    recipe = load_recipe(str(attempt.output / "recipe.yaml"))
    assert recipe.sparsity == report["goal"]["sparsity"], "the recipe alone makes the folder again"


def test_the_recipe_is_given_by_its_name_and_fields() -> None:
    model, fields = tiny_llama(), {"units": "mlp", "allocation": {"kind": "uniform", "multiple": 1}}
    asked = f"{0.93 * dense_bytes(model) / KIB:.2f}KiB"
    found = find_sparsity(model, "fasp", asked, **fields)
    assert found == find_sparsity(model, load_recipe("fasp", fields), asked)
    assert found != find_sparsity(model, "fasp", asked)
    with pytest.raises(InputError, match="did you mean fasp"):
        find_sparsity(model, "fassp", asked)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_size_of_every_family_is_met(name: str) -> None:
    model = TINY_MODELS[name]()
    recipe = load_recipe("fasp", {"units": "mlp", "allocation": {"kind": "uniform", "multiple": 1}})
    goal = int(0.93 * dense_bytes(model))
    found = find_sparsity(model, recipe, f"{goal / KIB:.2f}KiB")
    optprune.prune(model, batches(), recipe.with_sparsity(found.sparsity))
    # Biases go with their units, and are not counted before.
    assert 0.97 * goal <= dense_bytes(model) <= goal


# -- speed


class Clock:
    """Speeds by the number of weights that a token reads, in place of times."""

    def __init__(self, overhead: float) -> None:
        self.overhead, self.calls = overhead, 0

    def __call__(self, models: Mapping[str, PreTrainedModel], work: SpeedWorkload) -> list[ModelSpeed]:
        self.calls += 1
        numbers = [sum(weight.numel() for weight in model.parameters()) for model in models.values()]
        speeds = [Repeats((1 / (self.overhead * max(numbers) + number),)) for number in numbers]
        return [ModelSpeed(name, speed, speed, 0, 0, None) for name, speed in zip(models, speeds, strict=True)]


@pytest.mark.parametrize("overhead", [0.0, 0.3, 1.0])
def test_a_speed_is_met_whatever_a_token_costs_beside_its_weights(overhead, monkeypatch) -> None:
    monkeypatch.setattr("optprune.pruning.goal.measure_speed", clock := Clock(overhead))
    model, recipe = tiny_llama(), load_recipe("fasp", {"allocation": {"kind": "uniform", "multiple": 1}})
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    found = find_sparsity(model, recipe, "1.15x")
    assert found.reached == pytest.approx(1.15, rel=0.03)
    assert clock.calls == len(found.tried) <= MOST_TRIALS
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    numbers = sum(weight.numel() for weight in model.parameters())
    optprune.prune(model, batches(), recipe.with_sparsity(found.sparsity))
    after = sum(weight.numel() for weight in model.parameters())
    assert (1 + overhead) / (overhead + after / numbers) == pytest.approx(1.15, rel=0.03)


def test_a_speed_out_of_reach_is_refused_with_the_last_trial(monkeypatch) -> None:
    monkeypatch.setattr("optprune.pruning.goal.measure_speed", Clock(20.0))
    with pytest.raises(
        InputError, match=r"goal 1.3x is out of reach on this machine, where a sparsity of 0\.\d+ decodes"
    ):
        find_sparsity(tiny_llama(), load_recipe("fasp"), "1.3x")


@pytest.mark.parametrize("name", TINY_MODELS)
@pytest.mark.parametrize("units", ["mlp", "all"])
def test_a_narrowed_model_has_the_shapes_of_a_run_and_decodes(name: str, units: str) -> None:
    recipe = load_recipe("fasp", {"units": units, "sparsity": 0.2})
    narrow, pruned = TINY_MODELS[name](), TINY_MODELS[name]()
    narrow_to(Decoder(narrow), resolve(Decoder(narrow), Request(recipe=recipe)))
    optprune.prune(pruned, batches(), recipe)
    assert Decoder(narrow).shapes() == Decoder(pruned).shapes()
    (speed,) = measure_speed({"narrow": narrow}, SpeedWorkload(prompt_tokens=8, new_tokens=4, repeats=1))
    assert speed.decode.median > 0


# -- quality


@pytest.mark.parametrize(("units", "share"), [("mlp", 0.01), ("vo", 0.001)], ids=["from below", "from above"])
def test_a_loss_is_met_by_the_run_that_follows(units: str, share: float) -> None:
    model, held = trained(), news(60, 80)
    recipe = load_recipe("fasp", {"units": units, "sparsity": 0.1, "allocation": {"kind": "uniform", "multiple": 1}})
    said = list[str]()
    goal = QualityGoal("this quality", 1 + share)
    found = find_sparsity(model, recipe, goal, batches=[news(0, 20)], windows=held, say=said.append)
    assert (found.tried[0][1] > 1 + share) == (units == "vo"), "the first trial is on the other side"
    before = math.log(perplexity(model, held).perplexity)
    optprune.prune(model, [news(0, 20)], recipe.with_sparsity(found.sparsity))
    ratio = math.log(perplexity(model, held).perplexity) / before
    assert ratio == pytest.approx(found.reached, abs=1e-9), "the trial is the run"
    assert 1 + 0.8 * share <= ratio <= 1 + share
    assert len(found.tried) <= MOST_TRIALS and len(said) == len(found.tried) + 1


@given(scale=st.floats(0.02, 20), power=st.floats(0.6, 5), allowed=st.floats(0.005, 0.5))
def test_the_search_ends_close_below_the_goal(scale: float, power: float, allowed: float) -> None:
    """For losses that are powers of the sparsity."""
    known, share = {0.0: 0.0, 1.0: math.inf}, 0.1
    for _ in range(40):
        known[share] = scale * share**power
        following = next_sparsity(known, allowed, 0.15)
        if following is None:
            break
        assert 0 < following < 1 and following not in known
        share = following
    best = max(share for share, excess in known.items() if excess <= allowed)
    limit = (allowed / scale) ** (1 / power)
    assert known[best] >= 0.85 * allowed or limit - best <= 0.005 or (limit > 0.99 and best > 0.9)


def test_most_searches_end_within_the_trials() -> None:
    for scale in (0.2, 0.5, 1.0, 3.0):
        for power in (1.0, 1.5, 2.0, 3.0):
            known, share = {0.0: 0.0, 1.0: math.inf}, 0.1
            for _ in range(MOST_TRIALS):
                known[share] = scale * share**power
                following = next_sparsity(known, 0.05, 0.15)
                if following is None:
                    break
                share = following
            assert max(excess for excess in known.values() if excess <= 0.05) >= 0.02, (scale, power)


# -- the command


def test_a_stopped_run_is_continued_with_its_sparsity(attempt: Attempt, monkeypatch) -> None:
    words = ("--recipe", "fasp", "--to", "1.15x")
    monkeypatch.setattr("optprune.pruning.goal.measure_speed", Clock(0.0))
    from optprune.pruning.run import Run

    with monkeypatch.context() as broken:

        def stop(self: Run, index: int) -> None:
            if index:
                raise KeyboardInterrupt
            original(self, index)

        original = Run.prune_block
        broken.setattr(Run, "prune_block", stop)
        assert main(attempt.command(*words)) == 130
    # Another machine is slower: the search would end elsewhere.
    monkeypatch.setattr("optprune.pruning.goal.measure_speed", Clock(0.5))
    before = snapshot(attempt.folder)
    for other in ("1.2x", "900KiB"):
        attempt.capsys.readouterr()
        assert main(attempt.command("--recipe", "fasp", "--to", other, "--resume")) == 2
        said = attempt.capsys.readouterr().err
        assert f"was begun with the goal 1.15x and cannot continue with the goal {other}; nothing was changed" in said
        assert snapshot(attempt.folder) == before
    assert main(attempt.command(*words, "--resume")) == 0
    report = json.loads((attempt.output / "report.json").read_text())
    monkeypatch.setattr("optprune.pruning.goal.measure_speed", Clock(0.0))
    assert main(attempt.command(*words, output=attempt.folder / "again")) == 0
    again = attempt.folder / "again"
    assert json.loads((again / "report.json").read_text())["goal"] == report["goal"]
    assert (again / "model.safetensors").read_bytes() == (attempt.output / "model.safetensors").read_bytes()
    attempt.capsys.readouterr()
    assert main(attempt.command(*words, "--resume")) == 0
    assert "was already finished by this command" in attempt.capsys.readouterr().out


def test_a_quality_from_the_shell(attempt: Attempt, tmp_path: Path) -> None:
    save_tiny(trained(), tmp_path / "trained")
    other = tmp_path / "other.txt"
    from optprune.texts import demo_articles

    other.write_text("\n".join(demo_articles("evaluation")[:20]))
    words = ["--to-quality", "1.04", "--text", str(other), "--windows", "20", "--set", "allocation.multiple=1"]
    command = attempt.command("--recipe", "fasp", "--units", "mlp", *words)
    command[1] = str(tmp_path / "trained")
    assert main(command) == 0
    goal = json.loads((attempt.output / "report.json").read_text())["goal"]
    assert 1 < goal["reached"] <= 1.04 and goal["asked"] == "quality 1.04"
    found = tmp_path / "found.json"
    evaluate = ["evaluate", str(attempt.output), "--against", str(tmp_path / "trained"), "--text", str(other)]
    assert main([*evaluate, "--seq-length", "64", "--windows", "20", "--json", str(found)]) == 0
    figures = json.loads(found.read_text())
    assert figures["bits_per_byte"] / figures["dense_bits_per_byte"] == pytest.approx(goal["reached"], abs=1e-6)


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (["--to", "big"], "--to 'big' is neither a size such as 200MiB nor a speed such as 1.5x"),
        (["--to", "0.9x"], "--to '0.9x' is neither"),
        (["--to", "-3MiB"], "neither"),
        (["--to-quality", "0.9", "--text", "x.txt"], "--to-quality 0.9 is not above 1"),
        (["--to-quality", "nan", "--text", "x.txt"], "--to-quality nan is not above 1"),
        (["--to-quality", "1.05"], "--to-quality needs a text"),
        (["--text", "x.txt"], "--text and --windows are for --to-quality"),
        (["--to", "1.5x", "--to-quality", "1.05", "--text", "x.txt"], "two goals"),
        (["--to", "1KiB"], "the goal 1KiB is out of reach"),
        (["--to", "1GiB"], "give a goal below that"),
        (["--to", "900KiB", "--sparsity", "0.2"], "leave out --sparsity"),
        (["--to", "900KiB", "--recipe", "alps", "--pattern", "2:4"], "has one sparsity only"),
        (["--to", "900KiB", "--recipe", "wanda"], "zeros do not change the size"),
        (["--to", "1.5x", "--recipe", "wanda"], "zeros do not change the speed"),
        (["--to", "1.5x", "--recipe", "vocabulary", "--vocabulary", "400"], "has one sparsity only"),
        (["--to", "1.5x", "--vocabulary", "400"], "is measured with the whole vocabulary"),
        (["--to", "900KiB", "--allocation", "global", "--set", "allocation.currency=flops"], "a budget in parameters"),
        (["--to", "1.5x", "--recipe", "depth"], "needs units with a width"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_goals_that_are_refused(attempt: Attempt, words: list[str], reason: str) -> None:
    assert reason in attempt.fails(attempt.command(*words))


def test_a_quality_that_the_least_pruning_misses_is_refused() -> None:
    recipe = Recipe({"units": "mlp", "sparsity": 0.2, "allocation": {"kind": "uniform", "multiple": 64}})
    goal = QualityGoal("quality 1.0001", 1.0001)
    with pytest.raises(InputError, match=r"is out of reach|rounds to nothing"):
        find_sparsity(trained(), recipe, goal, batches=[news(0, 20)], windows=news(60, 70))


def test_a_goal_is_a_size_a_speed_or_a_ratio() -> None:
    assert [type(parse_goal(text)).__name__ for text in ("90MiB", "1.5 GB", "1.5x", "2X")] == [
        "SizeGoal",
        "SizeGoal",
        "SpeedGoal",
        "SpeedGoal",
    ]
    assert parse_goal(None, 1.05) == QualityGoal("quality 1.05", 1.05)
