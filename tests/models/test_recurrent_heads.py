"""Heads of recurrent mixers as units: removal is exact, and what is left runs, reloads, streams and is exported."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import optprune
from optprune import Allocation
from optprune.allocation.uniform import uniform
from optprune.calibration.stream import run_block
from optprune.errors import InputError
from optprune.export import GgufFile, export, save_model
from optprune.models import ARCHITECTURES, UNITS, Decoder, RecurrentHeads
from optprune.models.recurrent import Recurrent
from optprune.models.skeleton import one_block_model
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.pruning.measured_plan import BlockProbe
from optprune.recipe import Recipe, load_recipe
from optprune.report.block_values import widths
from tests.helpers.gguf_models import PROMPT, apart, expected_of, saved
from tests.helpers.gguf_models import made as made_for_gguf
from tests.helpers.mixed_models import generated, narrow
from tests.helpers.programs import program_of
from tests.helpers.tiny_models import ALL_MODELS
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

RECURRENT = [name for name, one in ARCHITECTURES.items() if one.recurrent is not None]
ABLE = [name for name in RECURRENT if "recurrent" not in ARCHITECTURES[name].indivisible]
of_able = pytest.mark.parametrize("name", ABLE)
FOUR_KEY_HEADS = {"linear_num_key_heads": 4, "linear_num_value_heads": 8}
FOUR = {name: {"n_groups": 4} if name == "nemotron_h" else FOUR_KEY_HEADS for name in ABLE}
"""the config fields of four units"""
TOKENS = torch.arange(10, 58)[None]
KEPT = torch.tensor([True, False, True, True])


def made(name: str) -> PreTrainedModel:
    """Return a model of four mixers, of which the first and the third are recurrent, with four units each."""
    return ALL_MODELS[name](num_hidden_layers=4, **FOUR[name])


def mixer_of(name: str) -> Recurrent:
    mixer = ARCHITECTURES[name].recurrent
    assert mixer is not None
    return mixer


def recurrent_in(decoder: Decoder) -> list[int]:
    return [block for block, shape in enumerate(decoder.shapes()) if shape.recurrent]


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=TOKENS, use_cache=False).logits


def test_the_families_of_which_heads_go() -> None:
    assert set(ABLE) == {"nemotron_h", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"}


@pytest.mark.parametrize("name", RECURRENT)
def test_units_of_a_mixer_share_nothing(name: str) -> None:
    """All parameters of one unit change: the inputs of the last layer change in its own columns alone."""
    fields = {"mamba_n_groups": 2} if name == "granitemoehybrid" else {}
    model, mixer = ALL_MODELS[name](num_hidden_layers=4, **fields), mixer_of(name)
    block, found = model.get_submodule("model.layers.0"), list[Tensor]()
    layer = block.get_submodule(mixer.output)
    layer.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].detach()))
    logits(model)
    config, heads, device = model.config, mixer.heads(model.config), torch.device("cpu")
    assert heads > 1
    own, there = {f"{path}.weight": runs for path, runs in mixer.reads.items()}, dict(block.named_parameters())
    with torch.no_grad():
        for parameter, runs in (own | dict(mixer.vectors)).items():
            if parameter in there:
                rows = mixer.rows(config, runs, heads, device)
                assert torch.equal(rows.flatten().sort().values, torch.arange(len(there[parameter]))), parameter
                there[parameter][rows[1]] *= 1.5
    logits(model)
    columns = mixer.rows(config, (mixer.width,), heads, device)
    changed = (found[0] != found[1]).flatten(0, 1).any(0)[columns].any(1)
    assert torch.equal(changed, torch.arange(heads) == 1)


@of_able
def test_every_parameter_with_rows_of_heads_is_known(name: str) -> None:
    """Beside the norm of a delta network, which has a gain for each dimension of any head."""
    mixer = mixer_of(name)
    own = dict(made(name).get_submodule(f"model.layers.0.{mixer.module}").named_parameters(prefix=mixer.module))
    linear = {f"{path}.weight" for path in (*mixer.reads, mixer.output)}
    assert {parameter for parameter in own if parameter not in linear} - {"linear_attn.norm.weight"} == {
        parameter for parameter in mixer.vectors if parameter in own
    }


@pytest.mark.parametrize("every", [True, False], ids=["of all blocks", "of one block"])
@of_able
def test_units_that_are_gone_equal_columns_of_zeros(name: str, every: bool, tmp_path: Path) -> None:
    model, zeroed = made(name), made(name)
    decoder, other, before = Decoder(model), Decoder(zeroed), logits(made(name))
    blocks = recurrent_in(decoder) if every else recurrent_in(decoder)[-1:]
    for block in blocks:
        [layers] = RecurrentHeads().layers(decoder, block)
        with torch.no_grad():
            other.layer(block, layers.consumer).weight[:, layers.channels.columns[~KEPT].flatten()] = 0
        whole = logits(model)
        with decoder.narrowed(block, layers, KEPT):
            inside = logits(model)
        assert torch.equal(logits(model), whole)
        decoder.keep_units(block, layers, KEPT)
        assert torch.equal(logits(model), inside)
        assert decoder.shape(block).recurrent == 3
        sizes = decoder.layer_sizes(decoder.shape(block))
        assert all(decoder.layer(block, path).weight.shape == sizes[path] for path in decoder.paths(block))
    expected, largest = logits(zeroed), before.abs().max()
    assert (logits(model) - expected).abs().max() <= 1e-4 * largest < (expected - before).abs().max()
    decoder.record_shapes()
    saved_as = save_model(model, tmp_path / "out")
    assert saved_as.stock == every
    plain: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=not every)
    assert type(plain).__module__.startswith("transformers.") == every
    for each in (plain, optprune.load_model(tmp_path / "out", device="cpu").model):
        assert torch.equal(logits(each), logits(model))
        assert generated(each) == generated(each, use_cache=False) == generated(model)
    shapes = Decoder(plain).shapes()
    assert [shapes[block].recurrent for block in blocks] == [3] * len(blocks)
    assert getattr(plain.config, mixer_of(name).counted[0]) == (3 if every else 4)


def test_the_rows_of_a_delta_network_by_hand() -> None:
    """Of four key heads of 8 dimensions and eight value heads of 12: the second key head goes with two value heads."""
    before = {key: value.clone() for key, value in made("qwen3_5_text").state_dict().items()}
    model = made("qwen3_5_text")
    [layers] = RecurrentHeads().layers(Decoder(model), 0)
    Decoder(model).keep_units(0, layers, KEPT)
    own = "model.layers.0.linear_attn"
    keys, values = [*range(8), *range(16, 32)], [*range(24), *range(48, 96)]
    three = torch.tensor([*keys, *(32 + key for key in keys), *(64 + value for value in values)])
    heads = torch.tensor([0, 1, 4, 5, 6, 7])
    rows = {
        "in_proj_qkv.weight": three,
        "conv1d.weight": three,
        "in_proj_z.weight": torch.tensor(values),
        **dict.fromkeys(("in_proj_b.weight", "in_proj_a.weight", "A_log", "dt_bias"), heads),
    }
    after = model.state_dict()
    for name, kept in rows.items():
        assert torch.equal(after[f"{own}.{name}"], before[f"{own}.{name}"][kept]), name
    assert torch.equal(after[f"{own}.out_proj.weight"], before[f"{own}.out_proj.weight"][:, values])
    assert torch.equal(after[f"{own}.norm.weight"], before[f"{own}.norm.weight"])
    mixer: Any = model.get_submodule(own)
    assert (mixer.num_k_heads, mixer.num_v_heads, mixer.conv1d.groups) == (3, 6, 120)


def test_the_rows_of_a_joined_delta_network_as_the_stock_class_takes_them_apart() -> None:
    """Its own function gives queries, keys, values, gates, strengths and steps of each head, key head by key head."""
    whole, model = made("qwen3_next"), made("qwen3_next")
    [layers] = RecurrentHeads().layers(Decoder(model), 0)
    Decoder(model).keep_units(0, layers, KEPT)

    def of_heads(model: PreTrainedModel) -> list[Tensor]:
        own: Any = model.get_submodule("model.layers.0.linear_attn")
        rows = (own.in_proj_qkvz.weight.T[None], own.in_proj_ba.weight.T[None])
        return [part.transpose(0, 2) for part in own.fix_query_key_value_ordering(*rows)]

    for before, after in zip(of_heads(whole), of_heads(model), strict=True):
        assert torch.equal(after, before[KEPT.repeat_interleave(len(before) // 4)])


# -- runs


@of_able
def test_a_uniform_ratio_restores_the_last_layers_and_the_folder_is_stock(name: str, tmp_path: Path) -> None:
    model = made(name)
    decoder = Decoder(model)
    total, dense = decoder.linear_weights(), decoder.shapes()
    blocks = recurrent_in(decoder)
    one = sum(decoder.weights_of(dense[block]) for block in blocks)
    one -= sum(decoder.weights_of(RecurrentHeads().with_count(dense[block], 3)) for block in blocks)
    recipe = load_recipe("osscar", {"units": "recurrent-heads", "sparsity": one / total})
    report = prune(model, batches(), recipe)
    assert report.sparsity_reached == pytest.approx(one / total)
    assert [layer.name for layer in report.layers] == [decoder.name(b, mixer_of(name).output) for b in blocks]
    assert all((layer.units, layer.kept) == (4, 3) for layer in report.layers)
    [changed] = [values for values in widths(report) if values.changed]
    assert changed.name == "key heads, or groups, of the recurrent mixer"
    assert save_model(model, tmp_path / "out").stock
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "out").config
    counts = [getattr(made(name).config, field) for field in mixer_of(name).counted]
    assert [getattr(config, field) for field in mixer_of(name).counted] == [count * 3 // 4 for count in counts]


@of_able
def test_the_choice_and_the_refit_lower_the_error_of_the_last_layers(name: str) -> None:
    """Below that of the first three units as they are."""
    best, first = made(name), made(name)
    sparsity = one_of_four(name)
    report = prune(best, batches(), load_recipe("osscar", {"units": "recurrent-heads", "sparsity": sparsity}))
    plain = prune(first, batches(), load_recipe("random", {"units": "recurrent-heads", "sparsity": sparsity}))
    errors, others = ([layer.relative_error for layer in each.layers] for each in (report, plain))
    assert errors[0] < others[0] and sum(errors) < sum(others)


def one_of_four(name: str) -> float:
    """Return the sparsity at which every recurrent mixer loses one of its four units."""
    decoder = Decoder(made(name))
    fewer = [RecurrentHeads().with_count(each, each.recurrent and 3) for each in decoder.shapes()]
    return 1 - sum(map(decoder.weights_of, fewer)) / decoder.linear_weights()


@pytest.mark.parametrize("currency", ["parameters", "time"])
@of_able
def test_a_budget_over_all_blocks(name: str, currency: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In time by a clock that runs a block and counts its weights."""

    def seconds(decoder: Decoder, block: int, stream: Any) -> float:
        run_block(decoder.blocks[block], stream.hidden[0], stream.arguments[0])
        return float(sum(decoder.layer(block, path).weight.numel() for path in decoder.paths(block)))

    monkeypatch.setattr("optprune.allocation.currency._seconds", seconds)
    model = made(name)
    settings = {"allocation.currency": currency, "allocation.probe_tokens": 96, "allocation.multiple": 8}
    recipe = load_recipe("structured_best", {"units": "all-recurrent", "sparsity": 0.1, **settings})
    kinds = {target.kind.name for target in targets(model, recipe)}
    report = prune(model, batches(), recipe)
    assert kinds == {"vo", "recurrent-heads", "mlp"} and report.sparsity_reached == pytest.approx(0.1, abs=0.03)
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model)) and Decoder(again).shapes() == Decoder(model).shapes()


def targets(model: PreTrainedModel, recipe: Recipe) -> list[Any]:
    decoder = Decoder(model)
    return [target for block in range(len(decoder.blocks)) for target in recipe.units.candidates(decoder, block)]


@pytest.mark.parametrize("units", ["recurrent-heads", "all-recurrent"])
@of_able
def test_streamed_and_resumed_runs_give_the_same_weights(name: str, units: str, tmp_path: Path) -> None:
    sparsity = one_of_four(name) if units == "recurrent-heads" else 0.2
    recipe = load_recipe("osscar", {"units": units, "sparsity": sparsity})
    check_every_way_gives_the_same(name, recipe, tmp_path, shared=False, num_hidden_layers=4, **FOUR[name])


@of_able
def test_an_allocation_says_how_many_units_each_block_keeps(name: str, tmp_path: Path) -> None:
    """Whatever the units of the recipe; with none the mixer goes."""
    model, kept = made(name), iter((1, 0))
    shapes = [
        RecurrentHeads().with_count(shape, next(kept)) if shape.recurrent else shape
        for shape in Decoder(model).shapes()
    ]
    blocks = [shape.counts() for shape in shapes]
    wanted = Allocation.from_dict({"sparsity": 0.1, "blocks": blocks})
    prune(model, batches(), load_recipe("fasp", {"units": "mlp"}), allocation=wanted)
    left = [shape for shape in shapes if shape.parts]  # a block of Nemotron-H is gone with its mixer
    assert [shape for shape in Decoder(model).shapes() if shape.parts] == left
    save_model(model, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model))
    assert generated(again) == generated(again, use_cache=False)
    with pytest.raises(InputError, match="keeps recurrent 5 in block 0, which has 4"):
        five = {"sparsity": 0.1, "blocks": [blocks[0] | {"recurrent": 5}, *blocks[1:]]}
        prune(made(name), batches(), load_recipe("fasp"), allocation=Allocation.from_dict(five))


@of_able
def test_a_pruned_model_is_pruned_again(name: str, tmp_path: Path) -> None:
    """From four units in all blocks to three in one block, then to two in all, each as a folder of its own."""
    model = made(name)
    decoder = Decoder(model)
    narrow(decoder, recurrent_in(decoder)[0], RecurrentHeads(), 3)
    decoder.record_shapes()
    assert not save_model(model, tmp_path / "uneven").stock
    again = optprune.load_model(tmp_path / "uneven", device="cpu").model
    decoder = Decoder(again)
    for block in recurrent_in(decoder):
        narrow(decoder, block, RecurrentHeads(), 2)
    decoder.record_shapes()
    assert save_model(again, tmp_path / "even").stock
    stock: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "even")
    assert torch.equal(logits(stock), logits(again))
    assert [shape.recurrent for shape in Decoder(stock).shapes() if shape.recurrent] == [2, 2]


@of_able
def test_a_plan_counts_the_last_layers_of_the_mixers(name: str) -> None:
    decoder = Decoder(made(name))
    sparsity = one_of_four(name)
    program = program_of("osscar", decoder=decoder, fields={"units": "recurrent-heads", "sparsity": sparsity})
    listed = [(block, [target.path for target in targets]) for block, targets in enumerate(program.candidates())]
    assert [block for block, paths in listed if paths] == recurrent_in(decoder)
    assert {path for _, paths in listed for path in paths} == {mixer_of(name).output}
    expected = [program.expected(block).shape.recurrent for block in recurrent_in(decoder)]
    assert expected == [3, 3]
    model, last = made(name), recurrent_in(decoder)[-1]
    alone = one_block_model(model.config, torch.float32, torch.device("cpu"), last)
    for each, index in ((model, last), (alone, 0)):
        rates = BlockProbe(program, Decoder(each), batches(), index).rates()
        assert rates.passes > 0 and rates.solves > 0


# -- refusals


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("granitemoehybrid", "keeps all its heads, whose width goes by the hidden size"),
        ("falcon_h1", "keeps all its heads, because a vector of multipliers lies over all of them"),
        ("lfm2", "keeps all its channels, which are as many as inputs"),
    ],
)
def test_mixers_that_stay_whole_are_named_with_the_reason(name: str, reason: str) -> None:
    sentence = f"^units recurrent-heads remove recurrent, but {name} models must keep all or none of them: .*{reason}"
    with pytest.raises(InputError, match=f"{sentence}; choose others, such as --units mlp$"):
        prune(ALL_MODELS[name](), batches(), load_recipe("osscar", {"units": "recurrent-heads", "sparsity": 0.1}))


@pytest.mark.parametrize(
    ("name", "fields", "reason"),
    [
        ("llama", {}, "but a block of this llama model has no recurrent mixer"),
        ("nemotron_h", {"n_groups": 1}, "but a block of this nemotron_h model has one such unit, which goes with its"),
    ],
)
def test_models_without_several_units_are_refused(name: str, fields: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=f"^units recurrent-heads are key heads of delta networks.*{reason}"):
        prune(
            ALL_MODELS[name](**fields),
            batches(),
            load_recipe("osscar", {"units": "recurrent-heads", "sparsity": 0.1}),
        )


@of_able
def test_a_target_that_takes_stock_classes_alone_wants_equal_counts(name: str) -> None:
    decoder = Decoder(made(name))
    narrow(decoder, recurrent_in(decoder)[0], RecurrentHeads(), 3)
    assert "blocks of different shapes" in str(RUNTIMES["vllm"].refuses(Decoder(made(name)), decoder.shapes()))
    narrow(decoder, recurrent_in(decoder)[1], RecurrentHeads(), 3)
    assert RUNTIMES["vllm"].refuses(Decoder(made(name)), decoder.shapes()) is None


@pytest.mark.parametrize("kept", [1, 2])
def test_groups_of_a_nemotron_h_that_are_gone_in_llama_cpp(kept: int, tmp_path: Path) -> None:
    decoder = Decoder(made_for_gguf("nemotron_h", n_groups=4, mamba_num_heads=8))
    for block in recurrent_in(decoder):
        narrow(decoder, block, RecurrentHeads(), kept)
    decoder.record_shapes()
    folder = saved(decoder.joined(), tmp_path / "model")
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32"))
    expected, tolerance = expected_of(folder, PROMPT)
    assert apart(written.path, expected, PROMPT) < tolerance


def test_groups_that_differ_from_block_to_block_are_not_exported_to_gguf(tmp_path: Path) -> None:
    kinds = ["linear_attention", "mlp", "full_attention", "mlp"]
    decoder = Decoder(made_for_gguf("nemotron_h", num_hidden_layers=4, layer_types=kinds * 2))
    narrow(decoder, recurrent_in(decoder)[0], RecurrentHeads(), 1)
    decoder.record_shapes()
    folder = saved(decoder.joined(), tmp_path / "model")
    with pytest.raises(InputError, match=r"llama.cpp does not support blocks of a nemotron_h model that differ in sh"):
        export(folder, tmp_path / "model.gguf", GgufFile())


def test_uniform_shares_leave_other_blocks_alone() -> None:
    decoder = Decoder(made("qwen3_next"))
    allocation = uniform(decoder, one_of_four("qwen3_next"), UNITS["recurrent-heads"], None)
    assert [block.shape.recurrent for block in allocation.blocks] == [3, 0, 3, 0]
    assert [block.shape.kv_heads for block in allocation.blocks] == [each.kv_heads for each in decoder.shapes()]
