"""Audit: every planted fault of a folder is found, and saved folders have none."""

import json
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedModel

import optprune
from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import ARCHITECTURES, Decoder, load_model
from optprune.models.checkpoint import StoredTensor
from optprune.models.gguf import GgufTensor
from optprune.pruning import prune
from optprune.recipe import load_recipe
from optprune.report import model_patterns, original_from_report, shares_kept
from optprune.report.expectations import FORMS, read_expectation
from tests.helpers.mixed_models import mixed
from tests.helpers.tiny_gguf import write_gguf
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS, save_tiny, tiny_llama, tiny_opt
from tests.helpers.token_batches import batches

UP, DOWN = "model.layers.1.mlp.up_proj", "model.layers.1.mlp.down_proj"
Tensors = dict[str, Tensor]


def pruned(folder: Path, recipe: str, model: PreTrainedModel | None = None, **options: Any) -> Path:
    model = model or tiny_llama()
    report = prune(model, batches(), load_recipe(recipe, options), source="the dense one")
    return save_model(model, folder, files={"report.json": report.to_json()}).folder


@pytest.fixture(scope="module")
def sparse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which 2:4 holds."""
    return pruned(tmp_path_factory.mktemp("sparse") / "out", "wanda", units={"weights": "2:4"})


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with fewer MLP units, and the original beside it."""
    folder = tmp_path_factory.mktemp("narrow")
    save_tiny(tiny_llama(), folder / "dense")
    return pruned(folder / "out", "fasp", units="mlp", sparsity=0.3)


def spoilt(folder: Path, target: Path, change: Callable[[Tensors], None], *, report: bool = True) -> Path:
    """A copy of a folder with other weights."""
    target.mkdir()
    for file in folder.iterdir():
        if file.suffix != ".safetensors" and (report or file.name != "report.json"):
            (target / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


def fill_one(tensors: Tensors) -> None:
    """One more weight in the first full group of four from row 3 on."""
    weight = tensors[f"{UP}.weight"]
    weight[3, int((weight[3] == 0).nonzero()[0])] = 0.5


def empty_one(tensors: Tensors) -> None:
    weight = tensors[f"{UP}.weight"]
    weight[3, int(weight[3].nonzero()[0])] = 0


def kinds(found: optprune.Audit) -> set[str]:
    return {fault.kind for fault in found.faults}


# -- clean folders


@pytest.mark.parametrize("kind", ["png", "pdf", "svg"])
def test_a_plot_replaces_only_a_plot(kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, plot = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / f"kept.{kind}"
    for _ in range(2):
        assert main(["audit", str(folder), "--plot", str(plot)]) == 0
    plot.write_bytes(b"a photograph")
    assert main(["audit", str(folder), "--plot", str(plot)]) == 2
    assert f"the plot {plot} exists, and no such command of optprune wrote it" in capsys.readouterr().err
    assert plot.read_bytes() == b"a photograph"


@pytest.mark.parametrize("name", ALL_MODELS)
def test_what_transformers_saved_passes(name: str, tmp_path: Path) -> None:
    for number, model in enumerate((ALL_MODELS[name](), ALL_MODELS[name]().bfloat16())):
        folder = save_tiny(model, tmp_path / str(number))
        found = optprune.audit(folder, expect=["sparsity=0", "dead=0", "rows"])
        assert found.passed and not found.notes and found.original is None
    model.base_model.save_pretrained(tmp_path / "headless")
    if model.config.tie_word_embeddings:
        assert optprune.audit(tmp_path / "headless").passed
    model.save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    assert optprune.audit(tmp_path / "shards").layers == found.layers


@pytest.mark.parametrize("name", ALL_MODELS)
def test_what_we_saved_passes(name: str, tmp_path: Path) -> None:
    save_model(mixed(ALL_MODELS[name](num_hidden_layers=4)), tmp_path / "mixed")
    assert optprune.audit(tmp_path / "mixed").passed
    save_tiny(ALL_MODELS[name](), tmp_path / "dense")
    experts = ARCHITECTURES[name].mixture is not None
    units, least, most = ("vo", 0.04, 0.07) if experts else ("all", 0.27, 0.33)
    units = "mlp" if "value_dim" in ARCHITECTURES[name].indivisible else units
    folder = pruned(tmp_path / "out", "fasp", ALL_MODELS[name](), units=units, sparsity=(least + most) / 2)
    for against in (None, tmp_path / "dense"):
        found = optprune.audit(folder, against, expect=[f"sparsity={least}..{most}", "multiple=8", "dead=0"])
        assert found.passed and found.removed is not None and least <= found.removed <= most


def test_what_is_half_zero_passes(sparse: Path, tmp_path: Path) -> None:
    found = optprune.audit(sparse, expect=["2:4", "4:8", "rows", "sparsity=0.5"])
    assert found.passed and found.removed == 0.5 and found.patterns == ("2:4", "4:8")
    for pattern, share in (("rows", 0.3), ("unstructured", 0.45)):
        folder = pruned(tmp_path / pattern, "wanda", units={"weights": pattern}, sparsity=share)
        assert optprune.audit(folder, expect=[f"sparsity={share}"]).passed


def narrowed(model: LlamaForCausalLM, width: int) -> LlamaForCausalLM:
    """Fewer units in every block, and the config says so: what other tools write."""
    for block in model.model.layers:
        for layer in (block.mlp.gate_proj, block.mlp.up_proj):
            layer.weight = torch.nn.Parameter(layer.weight.detach()[:width].clone())
        block.mlp.down_proj.weight = torch.nn.Parameter(block.mlp.down_proj.weight.detach()[:, :width].clone())
    model.config.intermediate_size = width
    return model


def test_a_uniformly_narrowed_model_of_another_tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_tiny(tiny_llama(), tmp_path / "dense")
    folder = save_tiny(narrowed(tiny_llama(), 96), tmp_path / "narrow")
    found = optprune.audit(folder)
    assert found.passed and found.removed is None and {shape.mlp_width for shape in found.blocks} == {96}
    beside = optprune.audit(folder, dense, expect=["multiple=32"])
    assert beside.passed and beside.removed == pytest.approx(32 * 64 * 3 / (128 * 64 * 3 + 64 * 64 * 3), abs=0.02)
    assert beside.shares["mlp.up_proj"] == (0.75, 0.75) and beside.shares["self_attn.q_proj"] == (1.0, 1.0)
    drawn: list[dict[str, list[float]]] = []

    def keep(self: Figure, *args: Any, **kwargs: Any) -> None:
        drawn.append({str(line.get_label()): list(line.get_ydata()) for axes in self.axes for line in axes.lines})

    monkeypatch.setattr(Figure, "savefig", keep)
    for options in ([], ["--against", str(dense)]):
        assert main(["audit", str(folder), *options, "--plot", str(tmp_path / "kept.png")]) == 0
    assert drawn[0]["MLP units"] == drawn[1]["MLP units"] == [96, 96]
    assert drawn[1]["MLP units before"] == [128, 128] and "MLP units before" not in drawn[0]


def test_blocks_that_are_gone_are_known_by_their_norms(tmp_path: Path) -> None:
    def with_norms() -> PreTrainedModel:
        model = tiny_llama(num_hidden_layers=4)
        for number, block in enumerate(model.model.layers):
            block.input_layernorm.weight.data += number
        return model

    dense, model = save_tiny(with_norms(), tmp_path / "dense"), with_norms()
    del model.model.layers[1]
    model.config.num_hidden_layers = 3
    found = optprune.audit(save_tiny(model, tmp_path / "out"), dense, expect=["sparsity=0.25"])
    assert found.passed and found.original is not None and found.original.left == (0, 2, 3)
    model.model.layers[1].input_layernorm.weight.data += 9
    assert kinds(optprune.audit(save_tiny(model, tmp_path / "other"), dense)) == {"original"}


# -- planted faults


def test_a_broken_group(sparse: Path, tmp_path: Path) -> None:
    told = spoilt(sparse, tmp_path / "told", fill_one)
    sentence = next(fault.sentence for fault in optprune.audit(told).faults if "groups" in fault.sentence)
    weight = load_file(told / "model.safetensors")[f"{UP}.weight"]
    first = int((weight.reshape(-1, 4) != 0).sum(1).argmax()) * 4
    place = f"row {first // 64}, inputs {first % 64} to {first % 64 + 3}"
    assert (
        sentence.startswith(f"1 of the {weight.numel() // 4} groups of {UP} keep more than 2 of 4")
        and place in sentence
    )
    # Without a report, a broken 2:4 is a note, unless it is expected.
    alone = spoilt(sparse, tmp_path / "alone", fill_one, report=False)
    found = optprune.audit(alone)
    assert found.passed and any(note.startswith("almost 2:4: 1 of") and place in note for note in found.notes)
    assert kinds(optprune.audit(alone, expect=["2:4"])) == {"expected"}


@pytest.mark.parametrize("change", [fill_one, empty_one])
def test_a_share_that_is_off_by_one_entry(change: Callable[[Tensors], None], sparse: Path, tmp_path: Path) -> None:
    told, alone = (spoilt(sparse, tmp_path / str(report), change, report=report) for report in (True, False))
    assert "report" in kinds(optprune.audit(told))
    [fault] = optprune.audit(alone, expect=["sparsity=0.5"]).faults
    assert fault.kind == "expected" and fault.sentence.startswith("sparsity=0.5: ")
    assert any("rows" in fault.sentence for fault in optprune.audit(alone, expect=["rows"]).faults)


def test_a_zero_that_is_in_another_row(tmp_path: Path) -> None:
    """The layer keeps as many as it says, and its rows should be alike."""

    def move(tensors: Tensors) -> None:
        weight = tensors[f"{UP}.weight"]
        weight[3, int((weight[3] == 0).nonzero()[0])] = 0.5
        weight[4, int(weight[4].nonzero()[0])] = 0

    rows = pruned(tmp_path / "rows", "wanda", units={"weights": "rows"}, sparsity=0.5)
    assert optprune.audit(rows).passed
    sentences = [fault.sentence for fault in optprune.audit(spoilt(rows, tmp_path / "moved", move)).faults]
    assert f"the rows of {UP} have unequal numbers of zeros, unlike those in report.json" in sentences


def test_rows_of_which_fewer_bits_make_more_zero_pass(tmp_path: Path) -> None:
    fields = {"units": {"weights": "rows"}, "sparsity": 0.3, "bits": "q4_0"}
    folder = pruned(tmp_path / "rows", "wanda", **fields)
    figures = [weight for weight in load_file(folder / "model.safetensors").values() if weight.ndim == 2]
    assert any(len({*(weight == 0).sum(1).tolist()}) > 1 for weight in figures), "no row has more zeros than others"
    assert optprune.audit(folder).passed


def test_layers_behind_a_block_that_is_gone(tmp_path: Path) -> None:
    """The report names layers by their old blocks, and the audit by their current blocks."""
    model = tiny_llama(num_hidden_layers=3)
    block = Decoder(model).shape(0).counts()
    shares = [dict.fromkeys(Decoder(model).paths(0), share) for share in (0.25, 0.5)]
    gone = dict.fromkeys(block, 0)
    entries = [{**block, "shares": shares[0]}, gone, {**block, "shares": shares[1]}]
    allocation = optprune.Allocation.from_dict({"sparsity": 0.7, "blocks": entries})
    report = prune(model, batches(), load_recipe("wanda", {"sparsity": 0.7}), allocation=allocation)
    folder = save_model(model, tmp_path / "out", files={"report.json": report.to_json()}).folder
    assert optprune.audit(folder).passed and len(Decoder(optprune.load_model(folder, device="cpu").model).blocks) == 2
    found = optprune.audit(spoilt(folder, tmp_path / "filled", fill_one))
    kept = round(0.5 * 64 * 128)
    sentences = [fault.sentence for fault in found.faults]
    assert f"{UP} keeps {kept + 1} weights, not {kept} as report.json says" in sentences


@pytest.mark.parametrize("name", [f"{UP}.weight", "model.embed_tokens.weight", "model.norm.weight"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_value_that_is_no_number(name: str, value: float, narrow: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors[name][*place] = value

    place = [2] if name == "model.norm.weight" else [2, 1]
    [fault] = optprune.audit(spoilt(narrow, tmp_path / "out", spoil)).faults
    assert (fault.kind, fault.where) == (
        "nan",
        name,
    ) and f"has 1 value of NaN or infinity, the first at {place}" in (fault.sentence)


def test_a_width_against_the_config(narrow: Path, tmp_path: Path) -> None:
    config = json.loads((narrow / "config.json").read_text())
    width = config["intermediate_size"]
    folder = spoilt(narrow, tmp_path / "out", lambda tensors: None)
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": width + 8}))
    found = optprune.audit(folder)
    assert kinds(found) == {"shape"} and len(found.faults) == 6
    assert f"{DOWN}.weight is [64, {width}] in the weights and [64, {width + 8}] by config.json" in {
        fault.sentence for fault in found.faults
    }
    assert {shape.mlp_width for shape in found.blocks} == {width}

    def one_block(tensors: Tensors) -> None:
        tensors[f"{UP}.weight"] = tensors[f"{UP}.weight"][:-1]

    [fault] = optprune.audit(spoilt(narrow, tmp_path / "one", one_block)).faults
    assert (fault.kind, fault.where) == ("shape", f"{UP}.weight")


@pytest.mark.parametrize(("part", "unit"), [("column", 5), ("row", 7), ("gate", 7), ("value", 3)])
def test_a_dead_unit(part: str, unit: int, narrow: Path, tmp_path: Path) -> None:
    def kill(tensors: Tensors) -> None:
        if part == "column":
            tensors[f"{DOWN}.weight"][:, unit] = 0
        else:
            path = {"row": UP, "gate": UP.replace("up", "gate"), "value": "model.layers.1.self_attn.v_proj"}[part]
            tensors[f"{path}.weight"][unit] = 0

    folder = spoilt(narrow, tmp_path / "out", kill)
    found = optprune.audit(folder)
    [dead] = found.dead
    assert (dead.block, dead.units, dead.numbers) == (1, "vo" if part == "value" else "mlp", (unit,)) and found.passed
    assert kinds(optprune.audit(folder, expect=["dead=0"])) == {"expected"}
    assert optprune.audit(folder, expect=["dead=1"]).passed


def test_experts_could_lose_as_many_units_as_each_has_dead(tmp_path: Path) -> None:
    model: Any = ALL_MODELS["mixtral"]()
    experts = model.model.layers[1].mlp.experts
    experts.down_proj.data[:, :, 7] = 0
    experts.down_proj.data[2, :, 3:6] = 0
    found = optprune.audit(save_tiny(model, tmp_path / "out"))
    assert [(dead.block, dead.units, dead.numbers) for dead in found.dead] == [(1, "mlp", (7, 48 + 7, 96 + 3, 144 + 7))]
    experts.gate_up_proj.data[0, 7] = 0  # one half of it is as good, and no unit more
    assert optprune.audit(save_tiny(model, tmp_path / "again")).dead == found.dead


def test_a_unit_with_a_bias_is_not_dead(tmp_path: Path) -> None:
    model = tiny_opt()
    layer = model.model.decoder.layers[0].fc1
    layer.weight.data[4:6] = 0
    layer.bias.data[4:6] = torch.tensor([0.0, 0.5])
    found = optprune.audit(save_tiny(model, tmp_path / "out"))
    assert [(dead.block, dead.units, dead.numbers) for dead in found.dead] == [(0, "mlp", (4,))]


def test_tensors_that_are_missing_unknown_or_tied_to_others(narrow: Path, tmp_path: Path) -> None:
    def spoil(tensors: Tensors) -> None:
        tensors["model.layers.1.mlp.extra"] = tensors.pop("model.layers.0.input_layernorm.weight")

    assert kinds(optprune.audit(spoilt(narrow, tmp_path / "out", spoil))) == {"missing", "unknown"}
    save_tiny(tiny_llama(tie_word_embeddings=True), tmp_path / "tied")
    assert optprune.audit(tmp_path / "tied").passed

    def head(tensors: Tensors) -> None:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1

    assert kinds(optprune.audit(spoilt(tmp_path / "tied", tmp_path / "two", head))) == {"tied"}


def test_a_config_that_is_not_the_originals(narrow: Path, tmp_path: Path) -> None:
    folder = spoilt(narrow, tmp_path / "out", lambda tensors: None)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = config["rope_theta"] = 123.0
    (folder / "config.json").write_text(json.dumps(config))
    [fault] = optprune.audit(folder, narrow.parent / "dense").faults
    assert fault.kind == "original" and fault.sentence.startswith("rope_parameters is ")
    [fault, *_] = optprune.audit(narrow.parent / "dense", narrow).faults
    assert fault.kind == "original" and "more than" in fault.sentence


# -- the command


def test_the_exit_status(sparse: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = spoilt(sparse, tmp_path / "out", fill_one)
    assert main(["audit", str(sparse), "--expect", "2:4", "--expect", "sparsity=0.5"]) == 0
    assert main(["audit", str(broken), "--json", str(tmp_path / "found.json")]) == 1
    assert "fault: " in capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    assert not found["passed"] and {fault["kind"] for fault in found["faults"]} == {"report"}
    assert main(["audit", str(sparse), "--expect", "half"]) == 2
    assert main(["audit", str(tmp_path / "nowhere")]) == 2


@pytest.mark.parametrize("text", ["4:2", "2:2", "0:4", "sparsity=1.5", "sparsity=0.3..0.2", "multiple=0", "", "2:4 "])
def test_an_expectation_that_is_none(text: str) -> None:
    with pytest.raises(InputError, match="is not known: use N:M"):
        read_expectation(text)
    assert all(form in FORMS for form in ("2:4", "rows", "sparsity=0.5", "multiple=64", "dead=0"))


@pytest.fixture
def in_memory(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """By tensor that was read, how many were in memory then."""
    alive, counts = list[weakref.ref[Tensor]](), list[int]()

    def watch(kind: type) -> None:
        read = kind.read  # type: ignore[attr-defined]

        def counted(self: Any) -> Tensor:
            tensor = read(self)
            alive.append(weakref.ref(tensor))
            counts.append(sum(each() is not None for each in alive))
            return tensor

        monkeypatch.setattr(kind, "read", counted)

    watch(StoredTensor)
    watch(GgufTensor)
    return counts


def test_one_tensor_is_in_memory_at_a_time(narrow: Path, in_memory: list[int]) -> None:
    assert optprune.audit(narrow).passed
    assert len(in_memory) == len(load_file(narrow / "model.safetensors")) and max(in_memory) <= 2


def test_a_gguf_file_is_what_a_folder_of_its_weights_is(tmp_path: Path, in_memory: list[int]) -> None:
    folder, file = save_tiny(tiny_llama(), tmp_path / "model"), write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    expected = optprune.audit(folder)
    in_memory.clear()
    found = optprune.audit(file, expect=["sparsity=0"])
    assert found.passed and (found.layers, found.blocks, found.dead) == (expected.layers, expected.blocks, ())
    assert len(in_memory) == len(load_file(folder / "model.safetensors")) and max(in_memory) <= 2
    assert optprune.audit(folder, file).original_weights == expected.weights


def pruned_folder(folder: Path, model: Any, source: str, **options: Any) -> Path:
    recipe = load_recipe("fasp", {"units": "all", "allocation.multiple": 1, **options})
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
    recipe = load_recipe("fasp", {"units": "blocks", "sparsity": 0.5, "allocation.parts": "layers"})
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
    assert "without a report.json the original sizes are unknown" in told
    decoder = Decoder(load_model(folder).model)
    assert set(shares_kept(decoder, model_patterns(decoder), None).values()) == {(1.0, 1.0)}


def test_the_report_of_another_model(tmp_path: Path) -> None:
    folder = pruned_folder(tmp_path / "out", tiny_llama(), "the dense one", sparsity=0.3)
    other = Decoder(tiny_llama())
    assert original_from_report(other, str(folder)) is None
    assert original_from_report(other, "demo") is None


@pytest.mark.parametrize(("activation", "rows"), [("relu", (4, 6)), ("gelu", (4, 6)), ("sigmoid", (6,))])
def test_a_unit_without_inputs_is_dead_where_its_activation_keeps_zero(
    activation: str, rows: tuple[int, ...], tmp_path: Path
) -> None:
    """Unit 4 is made of nothing, and sigmoid makes a half of that; unit 6 is read by nothing."""
    model = tiny_opt(activation_function=activation)
    first, second = (getattr(model.model.decoder.layers[0], name) for name in ("fc1", "fc2"))
    first.weight.data[4], first.bias.data[4] = 0, 0
    second.weight.data[:, 6] = 0
    found = optprune.audit(save_tiny(model, tmp_path / "out"))
    assert [(dead.block, dead.units, dead.numbers) for dead in found.dead] == [(0, "mlp", rows)]
    # What is dead may have any other weights on its other side.
    ids = torch.arange(5, 25)[None]
    before = model.eval()(ids).logits
    first.weight.data[6] += 1
    assert torch.equal(model(ids).logits, before)
    second.weight.data[:, 4] += 1
    assert torch.equal(model(ids).logits, before) == (4 in rows)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_the_activation_is_known_under_any_name_of_its_field(architecture: str, tmp_path: Path) -> None:
    model = ALL_MODELS[architecture]()
    model.model.layers[1].mlp.up_proj.weight.data[7] = 0
    found = optprune.audit(save_tiny(model, tmp_path / "out"))
    assert [(dead.block, dead.units, dead.numbers) for dead in found.dead] == [(1, "mlp", (7,))]


def test_an_original_whose_config_describes_other_heads_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    dense = save_tiny(tiny_llama(), tmp_path / "in")
    folder = pruned_folder(tmp_path / "out", tiny_llama(), str(dense), sparsity=0.25)
    config = json.loads((dense / "config.json").read_text())
    (dense / "config.json").write_text(json.dumps(config | {"head_dim": 16000}))
    assert main(["audit", str(folder), "--against", str(dense)]) == 2
    assert "less than one head of 16000 dimensions: config.json describes other weights" in capsys.readouterr().err
