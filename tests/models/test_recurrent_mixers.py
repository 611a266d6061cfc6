"""Blocks with a recurrent mixer: shapes, removal, sparse weights, caches and refusals."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.cache_utils import LinearAttentionCacheLayerMixin

import optprune
from optprune import Allocation
from optprune.errors import InputError
from optprune.export import GgufFile, OnnxFolder, PackedFolder, export, save_model
from optprune.grids import Grid
from optprune.models import ARCHITECTURES, BlockShape, Decoder, KvGroups, Values
from optprune.models.recurrent import Recurrent
from optprune.models.skeleton import one_block_model
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.pruning.measured_plan import BlockProbe
from optprune.recipe import Recipe, load_recipe
from tests.helpers.layer_inputs import check_wanda
from tests.helpers.mixed_models import check_layers_get_sparse, generated, mixed, mixer_first, narrow
from tests.helpers.programs import program_of
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, SINGLE
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

RECURRENT = [name for name, architecture in ARCHITECTURES.items() if architecture.recurrent is not None]
IN_PLACE = [name for name in RECURRENT if ("recurrent", "mlp") in ARCHITECTURES[name].whole]
"""those whose blocks have such a mixer in place of attention"""
of_recurrent = pytest.mark.parametrize("name", RECURRENT)
in_place = pytest.mark.parametrize("name", IN_PLACE)
GATED = [name for name in RECURRENT if ARCHITECTURES[name].heads(ALL_MODELS[name]().config).gated]
of_gated = pytest.mark.parametrize("name", GATED)
TOKENS = torch.arange(10, 58)[None]


def logits(model: Any, **inputs: Any) -> Tensor:
    with torch.no_grad():
        return model(**({"input_ids": TOKENS, "use_cache": False} | inputs)).logits


def mixer_of(name: str) -> Recurrent:
    mixer = ARCHITECTURES[name].recurrent
    assert mixer is not None
    return mixer


def made(name: str, **fields: Any) -> PreTrainedModel:
    """Return a model of four mixers, of which the first and the third are recurrent."""
    return ALL_MODELS[name](num_hidden_layers=4, **fields)


def recurrent_in(model: PreTrainedModel) -> list[int]:
    return [block for block, shape in enumerate(Decoder(model).shapes()) if shape.recurrent]


@in_place
def test_the_shape_of_a_block_says_which_mixer_it_has(name: str) -> None:
    decoder = Decoder(made(name))
    mixer = mixer_of(name)
    assert recurrent_in(decoder.model) == [0, 2]
    for block, shape in enumerate(decoder.shapes()):
        there = mixer.module in dict(decoder.blocks[block].named_modules())
        assert there == bool(shape.recurrent) != bool(shape.kv_heads)
        assert shape.parts == ("recurrent" if there else "attention", "mlp")
        assert ("recurrent" in shape.counts()) == there and BlockShape(**shape.counts()) == shape
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert set(sizes) == set(decoder.paths(block))
        assert all(decoder.layer(block, path).weight.shape == size for path, size in sizes.items())
        assert len(Values().layers(decoder, block)) == len(KvGroups().layers(decoder, block)) == (not there)


@in_place
def test_removing_the_mixer_equals_zeroing_its_last_layer(name: str) -> None:
    removed, zeroed, mixer = made(name), made(name), mixer_of(name)
    decoder, before = Decoder(removed), logits(removed)
    with torch.no_grad():
        for parameter in Decoder(zeroed).layer(2, mixer.output).parameters():
            parameter.zero_()
    with decoder.without([(2, "recurrent")]):
        inside = logits(removed)
    assert torch.equal(logits(removed), before)
    decoder.remove(2, "attention")  # which it has not
    assert torch.equal(logits(removed), before)
    decoder.remove(2, "recurrent")
    assert torch.equal(logits(removed), inside)
    assert decoder.shape(2) == Decoder(zeroed).shape(2).without("recurrent")
    assert (inside - logits(zeroed)).abs().max() <= 1e-6 * before.abs().max() < (inside - before).abs().max()


@pytest.mark.parametrize("gone", [[(0, "recurrent")], [(2, "recurrent")], [(1, "attention")], [(3, "attention")]])
@of_recurrent
def test_a_folder_without_a_mixer_generates_with_each_cache_as_without(
    name: str, gone: list[tuple[int, str]], tmp_path: Path
) -> None:
    model = made(name, **mixer_first(name))
    decoder = Decoder(model)
    for block, part in [(block_with(decoder, number, part), part) for number, part in gone]:
        decoder.remove(block, part)
    left, before = len(recurrent_in(model)), logits(decoder.joined())
    Decoder(model).record_shapes()
    assert torch.equal(logits(model), before)
    # A block that has nothing else is dropped with it.
    assert save_model(model, tmp_path / "out").stock == (name in SINGLE)
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    for each in (model, again):
        assert torch.equal(logits(each), before)
        assert generated(each) == generated(each, use_cache=False)
        with torch.no_grad():
            cache = each(TOKENS, use_cache=True).past_key_values
            assert cache.get_seq_length() == TOKENS.shape[1]
            states = [layer for layer in cache.layers if isinstance(layer, LinearAttentionCacheLayerMixin)]
            used = [layer.has_previous_state[0] for layer in states]
            step = each(TOKENS[:, :3] + 7, cache=cache).logits
        assert sum(used) == left and used[:left] == [True] * left
        whole = logits(each, input_ids=torch.cat([TOKENS, TOKENS[:, :3] + 7], 1))[:, -3:]
        assert (step - whole).abs().max() <= 1e-5 * whole.abs().max()
    assert Decoder(again).shapes() == Decoder(model).shapes()


@of_recurrent
def test_padding_is_left_out_as_in_the_stock_class(name: str) -> None:
    """A state would carry it on: an uneven model answers a padded text as a text alone."""
    # A bias would be added to padding too, in the stock class as well.
    model = mixed(made(name, **({"conv_bias": False} if name == "lfm2" else {})))
    padded = torch.cat([torch.full((1, 5), 3), TOKENS], 1)
    seen = torch.cat([torch.zeros(1, 5), torch.ones_like(TOKENS)], 1).long()
    found, alone = logits(model, input_ids=padded, attention_mask=seen)[:, 5:], logits(model)
    assert (found - alone).abs().max() <= 1e-4 * alone.abs().max()
    assert (logits(model, input_ids=padded)[:, 5:] - alone).abs().max() > 1e-2 * alone.abs().max()


@in_place
def test_a_block_without_anything_is_dropped_with_its_kind(name: str, tmp_path: Path) -> None:
    model = made(name)
    decoder = Decoder(model)
    for part in decoder.shape(2).parts:
        decoder.remove(2, part)
    before, kinds = logits(model), model.config.layer_types
    decoder.record_shapes()
    assert model.config.layer_types == [kinds[0], kinds[1], kinds[3]] and recurrent_in(model) == [0]
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for each in (model, again):
        assert (logits(each) - before).abs().max() <= 1e-5 * before.abs().max()
        assert generated(each) == generated(each, use_cache=False)


# -- heads and value dimensions of the attention beside it


@of_gated
def test_a_head_and_value_dimensions_go_with_the_rows_of_the_gate(name: str) -> None:
    """By hand: the query layer makes, head after head, the queries and then a factor for each value dimension."""
    model, other = made(name), made(name)
    decoder = Decoder(model)
    dim, group = decoder.heads.dim, decoder.heads.group
    before = {path: layer.weight.detach().clone() for path, layer in other.model.layers[1].self_attn.named_children()}
    narrow(decoder, 1, Values(), 10)
    narrow(decoder, 1, KvGroups(), 1)
    after = {path: layer.weight for path, layer in model.model.layers[1].self_attn.named_children()}
    rows = before["q_proj"].unflatten(0, (-1, 2 * dim))[:group]
    assert torch.equal(after["q_proj"], torch.cat([rows[:, :dim], rows[:, dim : dim + 10]], 1).flatten(0, 1))
    assert torch.equal(after["k_proj"], before["k_proj"][:dim])
    assert torch.equal(after["v_proj"], before["v_proj"][:10])
    assert torch.equal(after["o_proj"], before["o_proj"].unflatten(1, (-1, dim))[:, :group, :10].flatten(1))
    shape = decoder.shape(1)
    assert (shape.kv_heads, shape.value_dim) == (1, 10)
    assert decoder.weights_of(shape) == sum(decoder.layer(1, path).weight.numel() for path in decoder.paths(1))


@of_gated
def test_value_dimensions_go_as_coordinates_where_each_has_a_factor(name: str) -> None:
    model, other = ALL_MODELS[name](), ALL_MODELS[name]()
    fields = {"sparsity": 0.1, "allocation": "global", "metric": "full"}
    report = prune(model, batches(), load_recipe("fasp", {"units": "rotated-all", **fields}))
    prune(other, batches(), load_recipe("fasp", {"units": "all", **fields}))
    assert any(f"removed as coordinates, because those of a {name} model have a factor each" in n for n in report.notes)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(one, two)


@in_place
def test_a_uniform_ratio_of_heads_leaves_blocks_without_attention_as_they_are(name: str) -> None:
    model, dense = made(name), made(name).state_dict()
    before, own = Decoder(model).linear_weights(), Decoder(model).shapes()
    kept = sum(Decoder(model).weights_of(KvGroups().with_count(shape, shape.kv_heads and 1)) for shape in own)
    report = prune(model, batches(), load_recipe("osscar", {"units": "kv-groups", "sparsity": 1 - kept / before}))
    assert [shape.kv_heads for shape in Decoder(model).shapes()] == [0, 1, 0, 1]
    assert report.sparsity_reached == pytest.approx(1 - kept / before)
    for key, weight in Decoder(model).joined().state_dict().items():
        if any(key.startswith(f"model.layers.{block}.") for block in recurrent_in(model)):
            assert torch.equal(weight, dense[key])


# -- runs


@of_recurrent
def test_weights_of_the_mixer_go_by_the_inputs_that_its_layers_see(name: str) -> None:
    """By hand, in the first block: Wanda keeps the largest |W_ij| times the norm of input j, in every row."""
    model, dense, mixer = made(name), made(name), mixer_of(name)
    prune(model, batches(), load_recipe("wanda", {"sparsity": 0.5}))
    for path in (*mixer.reads, mixer.output):
        check_wanda(model, dense, f"model.layers.0.{path}")


@of_recurrent
def test_single_weights_of_every_layer_go_and_the_folder_is_stock(name: str, tmp_path: Path) -> None:
    check_layers_get_sparse(ALL_MODELS[name](), tmp_path / "out", logits)


@of_recurrent
def test_every_layer_of_whole_blocks_ends_on_the_grid(name: str) -> None:
    model = ALL_MODELS[name]()
    bits = {"kind": "w4a16", "group": 8}
    prune(model, batches(), Recipe.model_validate({"units": "weights", "sparsity": 0.0, "bits": bits}))
    decoder = Decoder(model)
    for block in range(len(decoder.blocks)):
        for path in decoder.paths(block):
            assert Grid(4, 8).off(decoder.layer(block, path).weight.detach()) == 0, path


@pytest.mark.parametrize("name", [name for name in RECURRENT if ARCHITECTURES[name].mixture is None])
def test_four_bits_are_packed_for_plain_transformers(name: str, tmp_path: Path) -> None:
    model = ALL_MODELS[name]()
    bits = {"kind": "w4a16", "group": 16}
    prune(model, batches(), Recipe.model_validate({"units": "weights", "sparsity": 0.0, "bits": bits}))
    save_model(model, tmp_path / "model")
    export(tmp_path / "model", tmp_path / "packed", PackedFolder())
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "packed")
    assert torch.equal(logits(packed), logits(model))


@pytest.mark.parametrize("recipe", ["fasp", "sparse_best"])
@of_recurrent
def test_streamed_and_resumed_runs_give_the_same_weights(name: str, recipe: str, tmp_path: Path) -> None:
    settings = {"fasp": {"units": "mlp", "sparsity": 0.1}}
    check_every_way_gives_the_same(name, load_recipe(recipe, settings.get(recipe, {})), tmp_path, shared=False)


@pytest.mark.parametrize("recipe", ["structured_best", "sparse_best"])
@of_recurrent
def test_a_plan_measures_the_largest_block_with_its_weights_and_without(name: str, recipe: str) -> None:
    program = program_of(recipe, decoder=Decoder(made(name)))
    alone = one_block_model(made(name).config, torch.float32, torch.device("cpu"), program.largest)
    for model, index in ((made(name), program.largest), (alone, 0)):
        assert Decoder(model).shape(index) == program.decoder.shape(program.largest)
        rates = BlockProbe(program, Decoder(model), batches(), index).rates()
        assert rates.passes > 0 and rates.solves > 0 and rates.budget > 0


@of_recurrent
def test_depth_names_the_recurrent_mixers_that_it_removes(name: str, tmp_path: Path) -> None:
    model = made(name)
    decoder = Decoder(model)
    before = decoder.shapes()
    third = block_with(decoder, 2, "recurrent")
    with torch.no_grad():  # so that the third mixer does least
        decoder.layer(third, mixer_of(name).output).weight.mul_(0.01)
    report = prune(model, batches(), load_recipe("depth", {"sparsity": 0.4, "allocation.score": "influence"}))
    assert (third, "recurrent") in {(part.block, part.part) for part in report.removed}
    left = [change.after for change in report.blocks]
    for part in report.removed:
        assert part.part in before[part.block].parts and part.part not in left[part.block].parts
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model)) and generated(again) == generated(model, use_cache=False)


@of_recurrent
def test_an_uneven_model_takes_a_step_of_training(name: str) -> None:
    model = mixed(made(name)).train()
    before = {key: weight.detach().clone() for key, weight in model.named_parameters()}
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    model(TOKENS, labels=TOKENS).loss.backward()
    optimiser.step()
    own = [key for key in before if mixer_of(name).module in key]
    assert own and all(not torch.equal(model.get_parameter(key), before[key]) for key in own)


def test_a_width_of_lfm2_is_that_of_the_config_once_it_is_recorded(tmp_path: Path) -> None:
    """The stock class computes another one from the same field."""
    model = made("lfm2", intermediate_size=300, block_multiple_of=8)
    assert {shape.mlp_width for shape in Decoder(model).shapes()} == {200}
    prune(model, batches(), load_recipe("fasp", {"units": "mlp", "sparsity": 0.2}))
    [width] = {shape.mlp_width for shape in Decoder(model).shapes()}
    assert width < 200 and save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.intermediate_size == width == again.model.layers[0].feed_forward.w2.in_features
    assert torch.equal(logits(again), logits(model))


def test_granite_4_with_rotary_embeddings(tmp_path: Path) -> None:
    model = mixed(made("granitemoehybrid", position_embedding_type="rope"))
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model))
    assert (logits(model) - logits(mixed(made("granitemoehybrid")))).abs().max() > 1e-2
    assert generated(again) == generated(again, use_cache=False)


def test_a_model_without_attention_is_refused() -> None:
    model = made("granitemoehybrid", layer_types=["linear_attention"] * 4)
    with pytest.raises(InputError, match="no block of this granitemoehybrid model has attention, which trans"):
        prune(model, batches(), load_recipe("wanda", {"sparsity": 0.5}))


def test_numbers_of_blocks_in_a_config_follow_those_that_are_left() -> None:
    model = made("lfm2")
    decoder = Decoder(model)
    for part in decoder.shape(0).parts:
        decoder.remove(0, part)
    decoder.record_shapes()
    assert model.config.full_attn_idxs == [0, 2] == [n for n, s in enumerate(decoder.shapes()) if s.kv_heads]


# -- refusals


@pytest.mark.parametrize("name", [name for name in RECURRENT if "recurrent" in ARCHITECTURES[name].indivisible])
def test_an_allocation_with_fewer_heads_of_a_recurrent_mixer_is_refused(name: str) -> None:
    model = ALL_MODELS[name]()
    shapes = [shape.counts() for shape in Decoder(model).shapes()]
    wanted = {"sparsity": 0.1, "blocks": [{**shapes[0], "recurrent": 1}, *shapes[1:]]}
    with pytest.raises(InputError, match=r"keeps recurrent 1 in block 0.*: the block's recurrent mixer keeps all its"):
        prune(model, batches(), load_recipe("fasp"), allocation=Allocation.from_dict(wanted))


IN_LLAMA_CPP = {
    "falcon_h1": r"a Mamba 2 with a norm before the gate \(mamba_norm_before_gate\)",
    "granitemoehybrid": "has no tokenizer to read text",
    "lfm2": "llama.cpp does not support biases of linear layers, as model.layers.0.conv.in_proj.bias",
    **dict.fromkeys(("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"), "8 key dimensions and 12 value dimensions"),
    "nemotron_h": "llama.cpp does not support a Nemotron-H with experts in some blocks and an MLP in others",
}
"""what it does not take of each family's tiny model"""


@of_recurrent
def test_a_runtime_that_is_not_known_to_take_them_refuses_them(name: str) -> None:
    decoder = Decoder(ALL_MODELS[name]().to("meta"))  # type: ignore[arg-type]
    with pytest.raises(InputError, match=f"the target onnx does not take models of the kind {name}"):
        RUNTIMES["onnx"].fitted(Recipe(units="mlp"), decoder)


@of_recurrent
def test_exports_name_what_they_do_not_take(name: str, tmp_path: Path) -> None:
    ALL_MODELS[name]().save_pretrained(tmp_path / "model")
    for exporter, sentence in (
        (
            OnnxFolder(),
            f"a {name} model cannot be exported to ONNX, because the states of its recurrent mixers are not",
        ),
        (
            GgufFile(),
            IN_LLAMA_CPP[name],
        ),
    ):
        with pytest.raises(InputError, match=sentence):
            export(tmp_path / "model", tmp_path / "out", exporter)
    assert not (tmp_path / "out").exists()


@of_recurrent
def test_plain_transformers_takes_what_is_alike(name: str) -> None:
    decoder = Decoder(made(name).to("meta"))  # type: ignore[arg-type]
    RUNTIMES["transformers"].fitted(Recipe(units="mlp", sparsity=0.1), decoder)
    with pytest.raises(InputError, match="heads with fewer value dimensions"):
        RUNTIMES["transformers"].fitted(Recipe(units="vo", sparsity=0.02), decoder)


def test_a_recurrent_mixer_has_no_other_linear_layers() -> None:
    for name in RECURRENT:
        own = made(name).get_submodule(f"model.layers.0.{mixer_of(name).module}")
        linear = {path for path, module in own.named_modules() if isinstance(module, nn.Linear)}
        assert {f"{mixer_of(name).module}.{path}" for path in linear} == {*mixer_of(name).sizes(made(name).config, 1)}
