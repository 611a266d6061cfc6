"""`audit` and its plot against what a pruned model was before, which report.json tells."""

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from optprune.cli import main
from optprune.export import save_model
from optprune.models import Decoder, load_model
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import model_patterns, original_from_report, shares_kept
from tests.helpers.mixed_models import mixed
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches


def pruned_folder(folder: Path, model: Any, source: str, **options: Any) -> Path:
    recipe = load_recipe("fasp", {"units": "all", "width_multiple": 1, **options})
    report = prune(model, batches(), recipe, source=source)
    save_model(model, folder, files={"report.json": report.to_json()})
    return folder


def inspected(folder: Path, capsys: pytest.CaptureFixture[str]) -> tuple[dict[str, Any], str]:
    file = folder.parent / "found.json"
    assert main(["audit", str(folder), "--json", str(file)]) == 0
    return json.loads(file.read_text()), capsys.readouterr().out


@pytest.mark.parametrize("name", TINY_MODELS)
def test_sizes_of_a_shape_are_those_of_its_layers(name: str) -> None:
    decoder = Decoder(mixed(TINY_MODELS[name](num_hidden_layers=4)))
    for block, shape in enumerate(decoder.shapes()):
        sizes = decoder.layer_sizes(shape)
        there = {path: tuple(decoder.layer(block, path).weight.shape) for path in decoder.paths(block)}
        assert {path: size for path, size in sizes.items() if path in there} == there
        assert all(0 in size for path, size in sizes.items() if path not in there)


@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_narrowed_model_is_measured_against_its_original(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = TINY_MODELS[name]()
    whole, sizes = Decoder(model).linear_weights(), Decoder(model).layer_sizes(Decoder(model).shape(0))
    folder = pruned_folder(tmp_path / "out", model, "the dense one", sparsity=0.25)
    left = Decoder(model).linear_weights()
    found, told = inspected(folder, capsys)
    assert (found["original"], found["original_weights"]) == ("the dense one", whole)
    assert found["removed"] == pytest.approx(1 - left / whole, abs=1e-12) == pytest.approx(0.25, abs=0.02)
    assert f"{1 - left / whole:.2%} of the {whole} linear weights of the dense one are removed" in told
    down = Decoder(model).architecture.mlp_consumer
    layer = next(layer for layer in found["layers"] if layer["name"].endswith(f"1.{down}"))
    assert layer["original"] == list(sizes[down]) == [64, 128]
    assert f"1.{down} [64, {layer['inputs']}] of [64, 128], 0.00% zeros" in told
    decoder = Decoder(load_model(folder).model)
    shares = shares_kept(decoder, model_patterns(decoder), original_from_report(decoder, str(folder)))
    assert shares[down] == (layer["inputs"] / 128,) * 2
    assert shares[decoder.architecture.query] == (1.0, 1.0)


def test_the_plot_draws_the_shares_of_the_original(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pruned_folder(tmp_path / "out", tiny_llama(), "the dense one", units="mlp", sparsity=0.3)
    found, _ = inspected(folder, capsys)
    drawn: dict[str, list[float]] = {}

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        for axes in self.axes:
            drawn.update({str(line.get_label()): list(line.get_ydata()) for line in axes.lines})
            drawn[axes.get_title()] = drawn[axes.get_ylabel()] = []

    monkeypatch.setattr(Figure, "savefig", keep)
    assert main(["audit", str(folder), "--plot", str(tmp_path / "kept.png")]) == 0
    width = next(layer["inputs"] for layer in found["layers"] if layer["name"].endswith("down_proj"))
    assert drawn["mlp.down_proj"] == drawn["mlp.up_proj"] == [width / 128] * 2
    assert drawn["self_attn.q_proj"] == [1.0, 1.0]
    assert (drawn["MLP units"], drawn["MLP units before"]) == ([width] * 2, [128] * 2)
    assert {f"out: {found['removed']:.1%} removed", "weights kept of the original's"} < set(drawn)


def test_blocks_that_are_gone_count(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(num_hidden_layers=4)
    whole = Decoder(model).linear_weights()
    recipe = load_recipe("fasp", {"units": "blocks", "sparsity": 0.5, "depth_parts": "layers"})
    report = prune(model, batches(), recipe, source="four blocks")
    folder = save_model(model, tmp_path / "out", files={"report.json": report.to_json()}).folder
    assert model.config.num_hidden_layers == 2
    found, _ = inspected(folder, capsys)
    assert (found["original_weights"], found["removed"]) == (whole, 0.5)
    decoder = Decoder(load_model(folder).model)
    shares = shares_kept(decoder, model_patterns(decoder), original_from_report(decoder, str(folder)))
    gone = {part.block for part in report.removed}
    assert set(shares.values()) == {tuple(float(block not in gone) for block in range(4))}


def test_fewer_heads_in_every_block(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama(num_key_value_heads=4)
    whole = Decoder(model).linear_weights()
    folder = pruned_folder(tmp_path / "out", model, "four heads", units="kv-groups", sparsity=0.2)
    assert model.config.num_key_value_heads == 2
    found, _ = inspected(folder, capsys)
    assert found["original_weights"] == whole
    assert found["removed"] == 1 - Decoder(model).linear_weights() / whole
    assert next(layer["original"] for layer in found["layers"] if layer["name"].endswith("q_proj")) == [64, 64]


def test_zeros_and_what_was_cut_off_are_counted_together(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tiny_llama()
    report = prune(model, batches(), load_recipe("wanda", {"sparsity": 0.5}))
    folder = save_model(model, tmp_path / "out", files={"report.json": report.to_json()}).folder
    found, _ = inspected(folder, capsys)
    assert found["removed"] == found["sparsity"] == pytest.approx(report.sparsity_reached, abs=1e-12)


def test_a_model_pruned_twice_is_measured_against_the_last_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once = pruned_folder(tmp_path / "once", tiny_llama(), "the dense one", sparsity=0.2)
    model = load_model(once).model
    before = Decoder(model).linear_weights()
    found, _ = inspected(pruned_folder(tmp_path / "twice", model, str(once), sparsity=0.2), capsys)
    assert (found["original"], found["original_weights"]) == (str(once), before)


def without_blocks(text: str) -> str:
    return json.dumps({name: value for name, value in json.loads(text).items() if name != "blocks"})


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: None,
        lambda text: text[:-20],
        lambda text: "[" * 100_000,
        lambda text: "[]",
        without_blocks,
        lambda text: text.replace('"mlp_width": 128', '"mlp_width": 3'),
        lambda text: text.replace('"mlp_width": 128', '"mlp_width": 1e9'),
        lambda text: text.replace('"before"', '"between"'),
        lambda text: text.replace('"value_dim"', '"vlaue_dim"'),
    ],
    ids=["none", "cut", "deep", "list", "older", "narrower before", "no whole number", "no before", "no shape"],
)
def test_a_report_that_is_not_there_or_tells_of_other_weights(
    spoil: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = pruned_folder(tmp_path / "out", tiny_llama(), "the dense one", units="mlp", sparsity=0.3)
    text = spoil((folder / "report.json").read_text())
    (folder / "report.json").unlink()
    if text is not None:
        (folder / "report.json").write_text(text)
    found, told = inspected(folder, capsys)
    assert found["original"] is found["original_weights"] is found["removed"] is None
    assert {layer["original"] for layer in found["layers"]} == {None}
    assert "no report.json tells what these weights were before" in told
    decoder = Decoder(load_model(folder).model)
    assert set(shares_kept(decoder, model_patterns(decoder), None).values()) == {(1.0, 1.0)}


def test_the_report_of_another_model(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "out", tiny_llama(), "the dense one", sparsity=0.3)
    other = Decoder(tiny_llama())
    assert original_from_report(other, str(folder)) is None
    assert original_from_report(other, "demo") is None
