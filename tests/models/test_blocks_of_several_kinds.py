"""Families whose blocks differ in kind: a dense MLP in the first, and experts in the others."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import optprune
from optprune import Allocation
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import ARCHITECTURES, Decoder, Mlp, open_model
from optprune.models.architecture import DenseMlp, Mixture
from optprune.models.mixture import experts_in
from optprune.models.skeleton import one_block_model
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.cut_mixtures import cut, mixture_in
from tests.helpers.mixed_models import generated, narrow
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, SINGLE, tiny_mixture
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

SEVERAL = [name for name, architecture in ARCHITECTURES.items() if len(architecture.mlp_kinds) > 1]
of_several = pytest.mark.parametrize("name", SEVERAL)
TOKENS = torch.arange(10, 58)[None]
GROUPS = {"n_group": 2, "topk_group": 1}


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def made(name: str, **fields: Any) -> PreTrainedModel:
    """Return a model of which the first two MLPs are dense."""
    mixers = ("linear_attention", "full_attention") * 2
    single = [kind for pair in zip(mixers, ("mlp", "mlp", "moe", "moe"), strict=True) for kind in pair]
    kinds = {"layer_types": single} if name in SINGLE else {}
    return ALL_MODELS[name](num_hidden_layers=4, **ARCHITECTURES[name].first_dense(2, 4), **kinds, **fields)


def mlps_of(decoder: Decoder) -> list[int]:
    """The blocks that have an MLP or experts."""
    return [block for block, shape in enumerate(decoder.shapes()) if shape.mlp_width]


def leading(model: PreTrainedModel) -> int:
    """How many of the first MLPs are dense, as the config says."""
    config = model.config
    if config.model_type in SINGLE:
        return config.layer_types.count("mlp")
    fields = ARCHITECTURES[config.model_type].first_dense(0, config.num_hidden_layers)
    [found] = (getattr(config, field) for field in fields)
    assert isinstance(found, int) or found == sorted(found)
    return found if isinstance(found, int) else found.count("dense")


@of_several
def test_the_shape_of_a_block_says_which_kind_it_has(name: str) -> None:
    decoder = Decoder(made(name))
    dense, mixture = decoder.architecture.mlp_kinds
    assert isinstance(dense, DenseMlp) and isinstance(mixture, Mixture)
    having = mlps_of(decoder)
    assert len(having) == 4
    for number, block in enumerate(having):
        shape = decoder.shape(block)
        assert (dense.describes(shape), mixture.describes(shape)) == (number < 2, number >= 2)
        assert (experts_in(decoder.blocks[block], mixture) is None) == (number < 2)
        assert (shape.mlp_width, shape.experts) == ((128, 0) if number < 2 else (48, 4))
    for block, shape in enumerate(decoder.shapes()):
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert set(sizes) == set(decoder.paths(block))
        assert all(decoder.layer(block, path).weight.shape == size for path, size in sizes.items())
    assert [len(Mlp().layers(decoder, block)) for block in having] == [1, 1, 4, 4]


@of_several
def test_a_first_block_that_goes_is_counted_in_the_config(name: str, tmp_path: Path) -> None:
    model = made(name)
    decoder = Decoder(model)
    first = {block_with(decoder, 0, part) for part in ("attention", "mlp")}
    for number, part in [(block, part) for block in first for part in decoder.shape(block).parts]:
        decoder.remove(number, part)
    expected = logits(model)
    decoder.record_shapes()
    assert leading(model) == 1
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    for each in (model, again):
        assert (logits(each) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert generated(again) == generated(model)


@of_several
def test_each_kind_is_even_by_itself_in_the_stock_class(name: str, tmp_path: Path) -> None:
    """Dense MLPs of one width beside experts of another; where blocks of one kind differ, the folder has our file."""
    model = made(name)
    decoder, width = Decoder(model), ARCHITECTURES[name].mlp_width
    for number, stock in ((0, False), (1, True)):
        narrow(decoder, block_with(decoder, number, "mlp"), Mlp(), 96)
        decoder.record_shapes()
        assert save_model(model, tmp_path / str(number)).stock is stock
        again = AutoModelForCausalLM.from_pretrained(tmp_path / str(number))
        assert torch.equal(logits(again), logits(model))
        decoder = Decoder(model)
    assert getattr(model.config, width) == 96
    place = ARCHITECTURES[name].mlp_consumer.rpartition(".")[0]
    dense = [decoder.blocks[block_with(decoder, number, "mlp")].get_submodule(place) for number in range(2)]
    assert [mlp.intermediate_size for mlp in dense] == [96, 96]


@of_several
def test_experts_go_with_their_rows_their_corrections_and_the_count_of_the_config(name: str, tmp_path: Path) -> None:
    model, dense = made(name), made(name)
    mixture, before = ARCHITECTURES[name].mixture, Decoder(dense)
    assert mixture is not None
    having = mlps_of(before)[2:]
    shapes = [before.shape(block) for block in having]
    one = sum(before.weights_of(each) - before.weights_of(replace(each, experts=3)) for each in shapes)
    settings = {"sparsity": one / before.linear_weights(), "refit.recovery": "none"}
    report = prune(model, batches(), load_recipe("experts_best", settings))
    kept = {int(layer.name.split(".")[2]): layer.kept for layer in report.layers}
    assert kept == dict.fromkeys(having, 3) and getattr(model.config, mixture.count) == 3
    Decoder(model).joined(), Decoder(dense).joined()
    for block in having:
        own, before = (mixture_in(each, block) for each in (model, dense))
        rows = [number for number in range(4) if (own.gate.weight == before.gate.weight[number]).all(1).any()]
        assert len(rows) == 3 and torch.equal(own.gate.weight, before.gate.weight[rows])
        if mixture.correction:
            now, then = (each.gate.get_buffer(mixture.correction) for each in (own, before))
            assert torch.equal(now, then[rows])
        dense = cut(dense, block, rows)
    assert (logits(model) - logits(dense)).abs().max() <= 1e-5 * logits(dense).abs().max()
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model)) and leading(again) == 2


@pytest.mark.parametrize("recipe", ["experts_best", "fasp", "sparse_best"])
@of_several
def test_streamed_and_resumed_runs_give_the_same_weights(name: str, recipe: str, tmp_path: Path) -> None:
    # The folder of narrower experts is not stock, and this check loads stock ones.
    settings = {"fasp": {"units": "vo", "sparsity": 0.05}, "experts_best": {"sparsity": 0.15}}
    check_every_way_gives_the_same(name, load_recipe(recipe, settings.get(recipe, {})), tmp_path, shared=False)


@of_several
def test_what_is_float32_stays_so_in_a_model_in_half_precision(name: str, tmp_path: Path) -> None:
    """In memory and from files, where blocks are computed in float32 in between."""
    exact = ARCHITECTURES[name].float32
    made(name).bfloat16().save_pretrained(tmp_path / "half")
    wide = made(name).state_dict()
    having = mlps_of(Decoder(made(name)))[2:]
    own = {f"model.layers.{block}.{path}": wide[f"model.layers.{block}.{path}"] for block in having for path in exact}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    model.load_state_dict({**model.state_dict(), **own})
    model.save_pretrained(tmp_path / "dense")
    streamed = open_model(tmp_path / "dense")
    recipe = load_recipe("structured_uniform_best", {"units": "vo", "sparsity": 0.05, "refit.held_out": 0})
    for each, store in ((model, None), (streamed.model, streamed.store)):
        prune(each, batches(), recipe, store=store)
    save_model(streamed, tmp_path / "out")
    again = optprune.load_model(tmp_path / "out", device="cpu").model.state_dict()
    expected = model.state_dict()
    assert again.keys() == expected.keys()
    for key, weight in again.items():
        assert weight.dtype == expected[key].dtype and torch.equal(weight, expected[key])
    for key, weight in own.items():
        assert again[key].dtype == torch.float32 and torch.equal(again[key], weight)


@pytest.mark.parametrize("fields", [{}, {"norm_topk_prob": False}, {"use_qk_norm": False, "n_shared_experts": 2}])
def test_options_of_glm4_moe(fields: dict[str, Any], tmp_path: Path) -> None:
    model, dense = (tiny_mixture("glm4_moe", **fields) for _ in range(2))
    shapes = [shape.counts() for shape in Decoder(model).shapes()]
    blocks = [{**shapes[0], "experts": 3, "mlp_width": 40, "value_dim": 16}, shapes[1]]
    allocation = Allocation.from_dict({"sparsity": 0.1, "blocks": blocks})
    prune(model, batches(), load_recipe("fasp"), allocation=allocation)
    assert not save_model(model, tmp_path / "out").stock
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model)) and not torch.equal(logits(model), logits(dense))
    assert Decoder(again).shape(0).counts() == blocks[0]


def test_experts_of_groups_of_equal_size_are_refused() -> None:
    with pytest.raises(InputError, match=r"chooses among 2 groups of equal size \(n_group\): choose a recipe with"):
        prune(made("glm4_moe", **GROUPS), batches(), load_recipe("experts_best"))


def test_other_units_of_a_model_with_groups_of_experts_go(tmp_path: Path) -> None:
    model = made("glm4_moe", **GROUPS)
    prune(model, batches(), load_recipe("fasp", {"units": "all", "sparsity": 0.2}))
    save_model(model, tmp_path / "out")
    assert torch.equal(logits(optprune.load_model(tmp_path / "out", device="cpu").model), logits(model))


@pytest.mark.parametrize("fields", [{"n_group": None, "topk_group": None}, {"norm_topk_prob": True}])
def test_experts_of_deepseek_v2_without_groups_go(fields: dict[str, Any], tmp_path: Path) -> None:
    """Its class never scales the weights of the chosen experts to add up to one, whatever the config says."""
    model, same = (made("deepseek_v2", **each) for each in (fields, {}))
    assert torch.equal(logits(model), logits(same))
    for each in (model, same):
        prune(each, batches(), load_recipe("experts_best", {"sparsity": 0.12}))
    assert torch.equal(logits(model), logits(same)) and model.config.n_routed_experts == 3
    assert save_model(model, tmp_path / "out").stock
    again = logits(AutoModelForCausalLM.from_pretrained(tmp_path / "out"))
    assert (again - logits(model)).abs().max() <= 1e-5 * again.abs().max()


def test_other_units_of_deepseek_v2_with_groups_of_experts_go(tmp_path: Path) -> None:
    fields = {**GROUPS, "topk_method": "group_limited_greedy"}
    model, greedy = made("deepseek_v2", **fields), made("deepseek_v2", **GROUPS)
    assert not torch.equal(logits(model), logits(greedy))
    with pytest.raises(InputError, match=r"this deepseek_v2 model chooses among 2 groups of equal size \(n_group\)"):
        prune(model, batches(), load_recipe("experts_best"))
    prune(model, batches(), load_recipe("fasp", {"units": "all", "sparsity": 0.2}))
    save_model(model, tmp_path / "out")
    assert torch.equal(logits(optprune.load_model(tmp_path / "out", device="cpu").model), logits(model))


def test_a_model_of_dense_blocks_alone_has_no_experts_to_remove() -> None:
    model = ALL_MODELS["glm4_moe"](first_k_dense_replace=2)
    assert {shape.experts for shape in Decoder(model).shapes()} == {0}
    with pytest.raises(InputError, match="units experts need a router, and no block of this glm4_moe model has one"):
        prune(model, batches(), load_recipe("experts_best"))


def test_one_expert_is_fewer_than_the_stock_router_works_with() -> None:
    model = tiny_mixture("glm4_moe", num_experts_per_tok=1)
    shapes = [{**shape.counts(), "experts": 1} for shape in Decoder(model).shapes()]
    with pytest.raises(InputError, match="keeps 1 expert in block 0, where the stock router works with 2 or more"):
        prune(
            model, batches(), load_recipe("reap"), allocation=Allocation.from_dict({"sparsity": 0.3, "blocks": shapes})
        )


@of_several
def test_a_block_with_experts_that_a_plan_measures_alone_has_them(name: str) -> None:
    model = made(name)
    shapes = Decoder(model).shapes()
    last = max(index for index, shape in enumerate(shapes) if shape.experts)
    alone = one_block_model(model.config, torch.float32, torch.device("cpu"), last)
    assert Decoder(alone).shapes() == (shapes[last],)
