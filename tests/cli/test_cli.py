"""The commands, on tiny models in folders."""

import json
import math
import re
import subprocess
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import optprune
from optprune.cli import main
from optprune.cli.demo_run import run_demo
from optprune.errors import InputError, OptpruneError
from optprune.export import save_model
from optprune.measure import perplexity
from optprune.models import Weights, load_model, load_tokenizer
from optprune.patterns import InGroups
from optprune.recipe import Recipe, load_recipe, recipe_names
from optprune.recipe.groups import Refit
from optprune.recipe.names import SOLVERS
from optprune.solvers import ConjugateGradients, Magnitude, Restore
from optprune.system.files import read_yaml
from optprune.texts import demo_articles, evaluation_windows, read_documents, tokenise
from tests.helpers.html_pages import parsed
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama

WIDTH_FIELD = {"llama": "intermediate_size", "opt": "ffn_dim", "qwen2": "intermediate_size"}
SMALL = ["--samples", "8", "--seq-length", "64"]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    parent = tmp_path_factory.mktemp("models")
    return {name: str(save_tiny(build(), parent / name)) for name, build in TINY_MODELS.items()}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> str:
    file = tmp_path_factory.mktemp("text") / "articles.txt"
    file.write_text("\n\n".join(demo_articles("calibration")[:5]), encoding="utf-8")
    return str(file)


def run(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def weights(folder: Path | str) -> dict[str, torch.Tensor]:
    return load_file(Path(folder) / "model.safetensors")


# -- prune


@pytest.mark.parametrize("architecture", TINY_MODELS)
def test_prune_writes_a_smaller_stock_model(
    architecture: str, models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output, record = tmp_path / "new" / "out", tmp_path / "record.json"
    source = models[architecture]
    command = ["prune", source, "--calibration", text, "--output", str(output), "--json", str(record), *SMALL]
    code, out, err = run([*command, "--sparsity", "0.3", "--units", "mlp"], capsys)
    assert code == 0, err

    config = json.loads((output / "config.json").read_text())
    width = config[WIDTH_FIELD[architecture]]
    assert width < 128
    assert width % 8 == 0
    pruned = AutoModelForCausalLM.from_pretrained(output)
    original = AutoModelForCausalLM.from_pretrained(source)
    removed = original.num_parameters() - pruned.num_parameters()
    assert removed > 0
    sizes = [(Path(folder) / "model.safetensors").stat().st_size for folder in (source, output)]
    assert sizes[0] - sizes[1] == pytest.approx(4 * removed, rel=0.01)
    assert load_tokenizer(str(output)) is not None

    report = json.loads((output / "report.json").read_text())
    assert json.loads(record.read_text()) == {"generator": "written by optprune", **report}
    assert report["model"] == source
    assert report["sparsity_requested"] == 0.3
    assert report["sparsity_reached"] == pytest.approx(0.3, abs=0.03)
    assert report["tokens"] == 8 * 64
    assert {"seconds", "floor_seconds", "seed", "versions", "recipe"} < set(report)
    assert len(report["layers"]) == 2
    assert yaml.safe_load((output / "recipe.yaml").read_text()) == report["recipe"]

    assert f"{report['sparsity_reached']:.2%}" in out
    assert f"AutoModelForCausalLM.from_pretrained('{output}')" in out
    assert "mean relative error" in out
    assert "pruning, block 2 of 2" in err
    assert "it/s" not in err


def test_value_dimensions_need_optprune_to_load(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["prune", models["llama"], "--calibration", text, "--output", str(output), *SMALL]  # by fasp
    code, out, err = run(command, capsys)
    assert code == 0, err
    assert f"optprune.load_model('{output}')" in out
    assert all(shape["value_dim"] < 16 for shape in load_model(output, device="cpu").model.config.optprune_shapes)
    code, out, err = run(["evaluate", str(output), "--text", text, "--seq-length", "64", "--windows", "2"], capsys)
    assert code == 0, err
    assert out.startswith("perplexity ")


def test_a_budget_in_operations_is_told_with_the_widths(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["prune", models["llama"], "--calibration", text, "--output", str(output), *SMALL]
    command += [
        "--recipe",
        "structured_best",
        "--units",
        "mlp",
        "--set",
        "allocation.currency=flops",
        "--set",
        "allocation.tokens=64",
    ]
    code, out, err = run(command, capsys)
    assert code == 0, err
    widths = [shape["mlp_width"] for shape in load_model(output, device="cpu").model.config.optprune_shapes]
    assert f"mlp_width by block: {' '.join(map(str, widths))}\n" in out
    assert "% of the operations requested)" in out
    assert "note: the budget was counted in flops: the allocation saves " in out


def test_the_same_command_gives_the_same_bytes(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    contents = []
    for name in ("one", "two"):
        command = ["prune", models["qwen2"], "--calibration", text, "--output", str(tmp_path / name), *SMALL]
        code, _, err = run(command, capsys)
        assert code == 0, err
        contents.append((tmp_path / name / "model.safetensors").read_bytes())
    assert contents[0] == contents[1]


def test_options_and_settings_reach_the_recipe_and_overwrite_replaces(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    foreign = save_tiny(TINY_MODELS["llama"](seed=7), tmp_path / "foreign")
    (foreign / "README.md").write_text("weeks of work")
    code, _, err = run(
        ["prune", models["llama"], "--calibration", text, "--output", str(foreign), "--overwrite"], capsys
    )
    assert code == 2 and "has no record of what optprune wrote there" in err and (foreign / "README.md").exists()
    output = save_model(TINY_MODELS["llama"](seed=7), tmp_path / "out").folder
    options = {"--seed": "3", "--propagation": "dense", "--width-multiple": "16", "--recipe": "random"}
    options["--units"] = "mlp"
    command = ["prune", models["llama"], "--calibration", text, "--output", str(output), "--overwrite", *SMALL]
    settings = ["--set", "damping=0.5", "--set", "solver=[{random: {seed: 5}}, restore]"]
    code, _, err = run([*command, *settings, *(word for pair in options.items() for word in pair)], capsys)
    assert code == 0, err
    recipe = json.loads((output / "report.json").read_text())["recipe"]
    assert (recipe["name"], recipe["seed"], recipe["propagation"]) == ("random", 3, "dense")
    assert recipe["allocation"] == {"kind": "uniform", "multiple": 16}
    assert (recipe["damping"], recipe["strict"]) == (0.5, False)
    assert recipe["solver"] == [{"random": {"seed": 5}}, "restore"]
    assert json.loads((output / "config.json").read_text())["intermediate_size"] % 16 == 0
    # The recipe beside the weights makes the same model again.
    again = tmp_path / "again"
    command[command.index(str(output))] = str(again)
    code, _, err = run([*command, "--recipe", str(output / "recipe.yaml")], capsys)
    assert code == 0, err
    assert all(torch.equal(value, weights(again)[name]) for name, value in weights(output).items())


@pytest.mark.e2e
@pytest.mark.parametrize("dtypes", [[], ["--dtype", "float32", "--save-dtype", "bfloat16"]], ids=["auto", "by hand"])
def test_a_bfloat16_checkpoint_is_pruned_in_float32_and_saved_as_it_was(
    dtypes: list[str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(TINY_MODELS["llama"]().to(torch.bfloat16), tmp_path / "half")
    output = tmp_path / "out"
    command = ["prune", str(source), "--calibration", text, "--output", str(output), *SMALL, "--recipe", "sparse_best"]
    code, out, err = run([*command, *dtypes], capsys)
    assert code == 0, err
    saved = weights(output)
    assert {value.dtype for value in saved.values()} == {torch.bfloat16}
    assert json.loads((output / "config.json").read_text())["dtype"] == "bfloat16"
    pruned = AutoModelForCausalLM.from_pretrained(output)
    assert pruned.dtype == torch.bfloat16
    layers = [value for name, value in saved.items() if "_proj" in name]
    zeros = sum(int((value == 0).sum()) for value in layers)
    assert zeros / sum(value.numel() for value in layers) == pytest.approx(0.5, abs=1e-3)
    # Rounded before the check, so that it compares like with like: in the dtype computed in they would differ.
    assert "logits differ by at most 0\n" in out


@pytest.mark.parametrize(
    ("options", "pattern", "destroyed"),
    [
        (["--recipe", "sparsegpt", "--pattern", "2:4"], "2:4", False),
        (["--recipe", "random", "--units", "weights", "--sparsity", "0.9"], "unstructured", True),
        (["--recipe", "fasp", "--sparsity", "0.1"], None, False),
    ],
)
def test_the_summary_says_what_zeros_do_not_bring_and_when_a_model_is_lost(
    options: list[str],
    pattern: str | None,
    destroyed: bool,
    models: dict[str, str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    command = ["prune", models["llama"], "--calibration", text, "--output", str(tmp_path / "out"), *SMALL, *options]
    code, out, err = run(command, capsys)
    assert code == 0, err
    assert ("neither smaller nor faster" in out) == (pattern is not None)
    assert pattern is None or f"a kernel for the pattern {pattern}\n" in out
    assert ("warning: the model is probably unusable" in out) == destroyed


def test_strict_makes_notes_errors(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["prune", models["llama"], "--calibration", text, "--output", str(output), "--samples", "1"]
    code, _, err = run([*command, "--seq-length", "64", "--strict"], capsys)
    assert code == 2
    assert "fewer calibration tokens (64) than inputs (128)" in err
    assert list(tmp_path.iterdir()) == []


# -- evaluate


def test_evaluate_measures_what_the_library_measures(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, source = tmp_path / "record.json", models["opt"]
    command = ["evaluate", source, "--text", text, "--seq-length", "64", "--windows", "5", "--json", str(record)]
    code, out, err = run(command, capsys)
    assert code == 0, err
    result = json.loads(record.read_text())
    every = {"model", "text", "seq_length", "begin", "perplexity", "tokens", "windows", "seconds", "bits_per_byte"} | {
        "weights"
    }
    assert set(result) == {"generator", *every} and result["begin"] == ""
    tokens = tokenise(load_tokenizer(source), read_documents(text))  # type: ignore[arg-type]
    expected = perplexity(load_model(source, device="cpu").model, evaluation_windows(tokens, 64, 5))
    assert result["perplexity"] == pytest.approx(expected.perplexity, rel=1e-6)
    assert (result["tokens"], result["windows"], result["seq_length"]) == (5 * 63, 5, 64)
    assert (result["model"], result["text"]) == (source, text)
    assert f"perplexity {result['perplexity']:.4f}, {result['bits_per_byte']:.4f} bits per byte, over 315 tokens" in out
    assert record.stat().st_mode & 0o400
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_hopeless_model_gives_json_too(
    models: dict[str, str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    record = tmp_path / "record.json"
    monkeypatch.setattr("optprune.measure.evaluate.math.exp", lambda _: math.inf)
    command = ["evaluate", models["opt"], "--text", text, "--seq-length", "64", "--windows", "2", "--json", str(record)]
    code, out, err = run(command, capsys)
    assert code == 0, err
    assert out.startswith("perplexity inf, inf bits per byte, ")
    assert json.loads(record.read_text(), parse_constant=pytest.fail)["perplexity"] is None


# -- recipes


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, out, _ = run(["recipes"], capsys)
    assert code == 0
    assert {line.split()[0] for line in out.splitlines() if line.startswith("  ")} >= set(recipe_names())
    for name in recipe_names():
        code, out, _ = run(["recipes", name], capsys)
        assert code == 0
        file = tmp_path / f"{name}.yaml"
        file.write_text(out)
        assert load_recipe(str(file)) == load_recipe(name)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("2:4", "2:4"),
        ("1:30:20", "1:30:20"),
        ("190:20:30.15", "190:20:30.15"),
        ("1e-3", 0.001),
        ("-2E+3", -2000.0),
        ("1.5e3", 1500.0),
        (".5", 0.5),
        ("0.1", 0.1),
        ("12", 12),
        ("-1_000", -1000),
        ("0x1f", 31),
        ("0", 0),
        ("-.inf", -math.inf),
        ("1-2", "1-2"),
        ("e3", "e3"),
        ("true", True),
        ("[1e-2, 2:4]", [0.01, "2:4"]),
    ],
)
def test_numbers_are_read_as_people_write_them(text: str, value: object) -> None:
    found = read_yaml(text, "the value")
    assert found == value
    assert type(found) is type(value)


def test_a_pattern_may_be_set_without_quotes(
    models: dict[str, str], text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    command = ["prune", models["llama"], "--calibration", text, "--output", str(output), *SMALL, "--recipe", "wanda"]
    code, _, err = run([*command, "--set", "units.weights=2:4", "--set", "damping=1e-3"], capsys)
    assert code == 0, err
    recipe = json.loads((output / "report.json").read_text())["recipe"]
    assert (recipe["units"], recipe["damping"]) == ({"weights": "2:4"}, 0.001)
    file = tmp_path / "by_hand.yaml"
    file.write_text("units: {weights: 2:4}\nsolver: wanda\nsparsity: 5e-1\n")
    assert load_recipe(str(file)).units == Weights(InGroups(2, 4))


def test_one_damping_is_a_list_of_one() -> None:
    assert load_recipe("fasp", {"refit.dampings": 0.1, "refit.held_out": 0.1}).refit == Refit(
        held_out=0.1, dampings=(0.1,)
    )


@pytest.mark.parametrize(
    "solver",
    [
        {"restore": {"factor_dtype": "float32"}},
        [{"greedy_obs": {"batch": 4}}, {"restore": {"factor_dtype": "float32"}}],
        {"spap": {"scale": "gram", "first": 2, "depth": 3}},
        {"conjugate_gradients": {"tolerance": "1e-2"}},
    ],
)
def test_options_of_solvers_survive_a_file(solver: object, tmp_path: Path) -> None:
    recipe = Recipe({"solver": solver})
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    assert load_recipe(str(file)) == recipe
    assert load_recipe(str(file)).to_dict() == recipe.to_dict()


def test_options_get_the_types_that_solvers_declare() -> None:
    assert Recipe({"solver": {"restore": {"factor_dtype": "float32"}}}).solver == Restore(torch.float32)
    assert Recipe({"solver": {"restore": {"factor_dtype": "torch.float64"}}}).solver == Restore(torch.float64)
    assert Recipe({"solver": {"conjugate_gradients": {"tolerance": "1e-2"}}}).solver == ConjugateGradients(0.01)


def test_what_a_solver_says_of_its_options_is_the_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    @dataclass(frozen=True)
    class Picky(Magnitude):
        most: int = 1

        def __post_init__(self) -> None:
            if self.most < 1:
                raise ValueError(f"most cannot be {self.most}: it is at least 1")

    monkeypatch.setitem(SOLVERS, "picky", Picky)
    with pytest.raises(InputError, match=r"'solver' cannot be .*: most cannot be 0: it is at least 1$"):
        Recipe({"solver": {"picky": {"most": 0}}})


# -- demo


def test_the_demo_tells_the_story(
    models: dict[str, str],
    text: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    small = {"calibration": text, "evaluation": text, "samples": 8, "windows": 4, "seq_length": 64}
    monkeypatch.setattr("optprune.cli.demo_run.run_demo", partial(run_demo, model=models["llama"], **small))
    output, record = tmp_path / "out", tmp_path / "record.json"
    code, out, err = run(["demo", "--output", str(output), "--json", str(record)], capsys)
    assert code == 0, err
    result = json.loads(record.read_text())
    before, after, reloaded = result["before"], result["after"], result["reloaded"]
    assert reloaded["perplexity"] == pytest.approx(after["perplexity"], rel=1e-4)
    assert before["perplexity"] != after["perplexity"]
    assert before["parameters"] - after["parameters"] == before["linear_weights"] - after["linear_weights"] > 0
    assert after["linear_weights"] == pytest.approx((1 - result["sparsity_reached"]) * before["linear_weights"])
    for part in (before, after, reloaded):
        assert f"{part['perplexity']:.3f}" in out
    assert "reload check passed" in out
    assert AutoModelForCausalLM.from_pretrained(output).num_parameters() == after["parameters"]
    root = parsed((output / "report.html").read_text())
    key = {part.all("dt")[0].text: part.all("dd")[0].text for part in root.all("dl")[0].all("div")}
    assert next(iter(key)) == "perplexity" and "mean relative error" not in key
    assert key["perplexity"] == f"{reloaded['perplexity']:.2f}{before['perplexity']:.2f} before"
    rows = {row[0]: row[1:] for row in root.tables()["The model before and after"]}
    assert rows["perplexity"][:2] == [f"{before['perplexity']:.4f}", f"{reloaded['perplexity']:.4f}"]
    assert rows["parameters in all"][:2] == [f"{before['parameters']:,}", f"{after['parameters']:,}"]
    assert rows["size of the weights in float32"][:2] == [f"{part['weights_mib']:,.1f} MiB" for part in (before, after)]
    assert "Perplexity and divergence are not measured" not in root.text
    command = f"optprune report {output} --against {models['llama']} --text heldout.txt"
    assert command in [code.text for code in root.all("code")]
    assert [row[0] for row in root.tables()["Time and largest memory of each phase"]] == [
        *("phase", "pruning", "saving", "checking", "all")
    ]
    code, _, err = run(["demo", "--output", str(output)], capsys)
    assert code == 2
    assert "exists already" in err


def test_the_demo_measures_the_folder_that_it_reloads(
    models: dict[str, str], text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Other:
        """A class that loads another model than the folder's."""

        @staticmethod
        def from_pretrained(folder: Path, **_: object) -> torch.nn.Module:
            return AutoModelForCausalLM.from_pretrained(models["llama"])

    monkeypatch.setattr("optprune.cli.demo_run.AutoModelForCausalLM", Other)
    small = {"calibration": text, "evaluation": text, "samples": 8, "windows": 4, "seq_length": 64}
    with pytest.raises(OptpruneError, match=r"the reloaded folder .* has a perplexity of .*, the model in memory"):
        run_demo(tmp_path / "out", model=models["llama"], sparsity=0.6, **small)


# -- the program itself


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"], capsys) == (0, f"optprune {optprune.__version__}\n", "")


def test_the_package_lists_its_names_without_importing_torch() -> None:
    code = "import sys, optprune; print(dir(optprune)); print('torch' in sys.modules)"
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.splitlines()
    assert {"__version__", "load_recipe", "prune", "save_model"} <= set(eval(lines[0]))
    assert lines[1] == "False"
    assert all(getattr(optprune, name) is not None for name in optprune.__all__)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from optprune.cli import main; main(['--help']); print(sorted(sys.modules))"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "prune" in run.stdout
    assert not re.search(r"'(torch|transformers|datasets)'", run.stdout)


@pytest.mark.parametrize("module", ["optprune", "optprune.cli"])
def test_the_package_runs_as_a_program(module: str) -> None:
    run = subprocess.run([sys.executable, "-m", module, "trim"], capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert run.stderr.startswith("error: No such command 'trim'")


def test_no_command_shows_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run([], capsys)
    assert code == 0
    assert "evaluate" in out


@pytest.mark.slow
def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m optprune.cli recipes | true"
    run = subprocess.run(["bash", "-c", f"set -o pipefail; {command}"], capture_output=True, text=True, check=False)
    assert run.stderr == ""


@pytest.mark.e2e
def test_bits_leave_weights_that_gguf_holds_exactly(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    source = save_tiny(tiny_llama(), tmp_path / "model")
    command = ["prune", str(source), "--calibration", text, "--samples", "4", "--seq-length", "64"]
    command += ["--output", str(tmp_path / "out"), "--recipe", "wanda", "--pattern", "2:4", "--bits", "q4_0"]
    assert main(command) == 0
    assert "of the decoder's linear weights are zero (50.00% requested)" in capsys.readouterr().out
    assert "decoder blocks are zero" in (tmp_path / "out" / "README.md").read_text()
    assert main(["export", str(tmp_path / "out"), "--type", "q4_0", "--output", str(tmp_path / "m.gguf")]) == 0
    pruned, read = (load_model(tmp_path / name, dtype="float32").decoder() for name in ("out", "m.gguf"))
    for path in pruned.paths(0):
        weight = pruned.layer(0, path).weight
        assert torch.equal(weight, read.layer(0, path).weight)
        assert int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) <= 2
    capsys.readouterr()
    assert main([*command, "--overwrite", "--save-dtype", "bfloat16"]) == 2
    assert "off the grid of --bits" in capsys.readouterr().err
