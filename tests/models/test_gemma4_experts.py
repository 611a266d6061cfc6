"""Gemma 4 with experts beside an MLP that every token goes through: folders, recipes, streaming and training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, Gemma4TextConfig

import optprune
from benchmarks.tiny_models import tiny
from optprune.calibration import calibrating, first_inputs
from optprune.calibration.calls import expert_choice, mixture_calls
from optprune.calibration.expert_use import expert_use
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import Decoder, Mlp, load_config, load_model
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.mixed_models import check_layers_get_sparse, check_uneven_folder, generated, narrow
from tests.helpers.streams import logits_block_by_block
from tests.helpers.tiny_vision import save_vision, stock, tiny_vision, with_image
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

NEAR, FAR = "sliding_attention", "full_attention"
EXPERTS: dict[str, Any] = {
    **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 48},
    **{"use_double_wide_mlp": False, "layer_types": [NEAR, FAR, NEAR, FAR], "num_kv_shared_layers": 0},
}
LARGE: dict[str, Any] = {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_global_key_value_heads": 1}
"""as the published model: keys are values in blocks without a window, and tokens have no inputs of their own"""
SHARING = {"layer_types": [NEAR, FAR, NEAR, FAR], "num_kv_shared_layers": 2}
TOKENS = torch.arange(10, 58)[None]
by_variant = pytest.mark.parametrize("more", [{}, LARGE, SHARING], ids=["inputs of tokens", "large", "shared keys"])


def made(**more: Any) -> Any:
    """A model whose scalars do not shrink the states, and whose experts' factors differ."""
    return scaled(tiny("gemma4_text", **{"num_hidden_layers": 4, **EXPERTS, **more}))


def scaled(model: Any) -> Any:
    with torch.no_grad():
        for name, scalar in model.named_buffers():
            if name.endswith("layer_scalar"):
                scalar.fill_(0.9)
        for name, factors in model.named_parameters():
            if name.endswith("per_expert_scale"):
                factors.copy_(torch.tensor([0.5, 1.0, 1.5, 2.0])[: len(factors)])
    return model


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


def same(one: Tensor, other: Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


@by_variant
def test_the_layers_of_a_block_are_those_of_its_shape(more: dict[str, Any]) -> None:
    decoder = Decoder(made(**more))
    for block, shape in enumerate(decoder.shapes()):
        assert (shape.mlp_width, shape.experts) == (48, 4)
        sizes = {path: size for path, size in decoder.layer_sizes(shape).items() if all(size)}
        assert set(sizes) == set(decoder.paths(block))
        assert all(decoder.layer(block, path).weight.shape == size for path, size in sizes.items())
        assert sizes["mlp.gate_proj"] == (128, 64) and sizes["experts.3.down_proj"] == (64, 48)


@by_variant
def test_layers_run_in_the_order_of_the_description(more: dict[str, Any]) -> None:
    decoder, seen = Decoder(made(**more)), list[str]()
    for path in decoder.paths(0):
        decoder.layer(0, path).register_forward_hook(lambda *_, path=path: seen.append(path))
    logits(decoder.model)
    stages = [decoder.architecture.stage_of(path) for path in seen]
    assert set(seen) == set(decoder.paths(0)) and stages == sorted(stages)


@by_variant
def test_a_pass_block_by_block_gives_the_logits_of_the_stock_class(more: dict[str, Any], tmp_path: Path) -> None:
    made(**more).save_pretrained(tmp_path)
    expected = logits(AutoModelForCausalLM.from_pretrained(tmp_path))
    assert torch.equal(expected, logits(made(**more)))
    torch.testing.assert_close(logits_block_by_block(Decoder(made(**more)), TOKENS), expected, rtol=1e-5, atol=1e-5)
    streamed = logits_block_by_block(optprune.open_model(tmp_path).decoder(), TOKENS)
    torch.testing.assert_close(streamed, expected, rtol=1e-5, atol=1e-5)


def without_expert(model: Any, block: int, expert: int) -> Any:
    """The stock model whose router never chooses an expert."""
    layer = getattr(model.model, "language_model", model.model).layers[block]
    router = layer.router

    def choose(states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        scores = router.proj(router.norm(states) * router.scale * router.scalar_root_size)
        scores[:, expert] = -torch.inf
        shares, chosen = scores.softmax(-1).topk(2, dim=-1)
        return scores, shares / shares.sum(-1, keepdim=True) * router.per_expert_scale[chosen], chosen

    router.forward = choose
    return model


@by_variant
def test_fewer_experts_equal_a_router_that_never_chooses_them(more: dict[str, Any]) -> None:
    model = made(**more)
    decoder = Decoder(model)
    decoder.keep_experts(1, torch.tensor([True, True, False, True]))
    decoder.record_shapes()
    assert model.model.layers[1].router.proj.out_features == 3
    same(logits(model), logits(without_expert(made(**more), 1, 2)))


def test_fewer_units_equal_zeroed_columns() -> None:
    sliced, zeroed = made(), made()
    decoder = Decoder(sliced)
    narrow(decoder, 1, Mlp(), 24)
    decoder.record_shapes()
    with torch.no_grad():
        zeroed.model.layers[1].experts.down_proj[:, :, 24:] = 0
    same(logits(sliced), logits(zeroed))


def test_the_choice_of_experts_measures_the_change_of_the_sum() -> None:
    """With the factor of each expert, by the stock class's own modules."""
    model = made()
    decoder = Decoder(model)
    kept = torch.tensor([True, False, True, True])
    with calibrating(decoder):
        calls = mixture_calls(decoder, 0, first_inputs(decoder, [TOKENS]))
        problem = expert_choice(decoder, 0, calls, 3)
    [(_, (tokens,), _, target)] = calls.each()
    dense, cut = made().model.layers[0], without_expert(made(), 0, 1).model.layers[0]

    def routed(layer: Any) -> Tensor:
        _, weights, chosen = layer.router(tokens)
        return layer.experts(layer.pre_feedforward_layernorm_2(tokens), chosen, weights)

    with torch.no_grad():
        torch.testing.assert_close(target, routed(dense), rtol=1e-4, atol=1e-4)
        change = (routed(cut) - routed(dense)).double().square().sum(1).mean() / 2
    assert problem.objective(kept) == pytest.approx(float(change), rel=1e-4)


def test_the_use_of_experts_counts_their_factors() -> None:
    model = made()
    with torch.no_grad():
        model.model.layers[0].router.per_expert_scale.mul_(2)
    once, twice = (expert_use(Decoder(each), {"a": [TOKENS]}).blocks[0]["a"] for each in (made(), model))
    torch.testing.assert_close(twice.reap, 2 * once.reap)
    assert torch.equal(twice.share, once.share) and float(once.share.sum()) == pytest.approx(2.0)


@by_variant
@pytest.mark.parametrize("recipe", ["experts_best", "reap"])
def test_experts_go_and_the_folder_is_that_of_the_stock_class(
    recipe: str, more: dict[str, Any], tmp_path: Path
) -> None:
    model = made(**more)
    report = prune(model, batches(), load_recipe(recipe, {"sparsity": 0.1}))
    assert all(change.after.experts == 3 for change in report.blocks)
    assert save_model(model, tmp_path / "out").stock
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert again.config.num_experts == 3
    assert torch.equal(logits(again), logits(model))
    assert generated(again) == generated(again, use_cache=False)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored["model.layers.0.experts.gate_up_proj"].shape == (3, 96, 64)
    assert stored["model.layers.0.router.per_expert_scale"].shape == (3,)


def uneven(model: Any) -> Any:
    """Blocks with fewer experts, narrower ones, without an MLP, and without attention."""
    decoder = Decoder(model)
    decoder.keep_experts(0, torch.tensor([True, True, False, True]))
    narrow(decoder, 1, Mlp(), 24)
    decoder.remove(2, "mlp")
    decoder.remove(3 if 0 in decoder.handed_on() else 0, "attention")
    decoder.record_shapes()
    return decoder.joined()


@by_variant
def test_blocks_that_differ_are_loaded_without_optprune(more: dict[str, Any], tmp_path: Path) -> None:
    """A fresh process compares the logits, with the files in the folder."""
    kinds = {} if "num_kv_shared_layers" in more else {"layer_types": [NEAR, NEAR, FAR, FAR]}
    again = check_uneven_folder(uneven(made(**more, **kinds)), tmp_path / "out", TOKENS, logits)
    assert again.decoder().shape(2).parts == ("attention",)


def test_single_weights_of_every_layer_go(tmp_path: Path) -> None:
    check_layers_get_sparse(made(), tmp_path / "out", logits)


@pytest.mark.parametrize("recipe", ["experts_best", "fasp"])
def test_streamed_and_resumed_runs_give_the_same_weights(recipe: str, tmp_path: Path) -> None:
    found = load_recipe(recipe, {"sparsity": 0.1, **({"units": "mlp"} if recipe == "fasp" else {})})
    check_every_way_gives_the_same("gemma4_text", found, tmp_path, shared=False, **EXPERTS)


def test_wider_mlps_beside_experts_are_refused(tmp_path: Path) -> None:
    fields = {**SHARING, "use_double_wide_mlp": True}
    Gemma4TextConfig(**(made().config.to_dict() | fields)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=r"has use_double_wide_mlp .*, which is not supported for a gemma4_text model"):
        load_config(tmp_path)


def test_experts_go_from_the_language_part_of_a_vision_folder(tmp_path: Path) -> None:
    source = save_vision(scaled(tiny_vision("gemma4", **EXPERTS)), tmp_path / "source")
    loaded = load_model(source)
    decoder = loaded.decoder()
    decoder.keep_experts(1, torch.tensor([True, True, False, True]))
    for block in (0, 2, 3):
        decoder.keep_experts(block, torch.tensor([True, False, True, True]))
    decoder.record_shapes()
    assert save_model(loaded, tmp_path / "out", check_tokens=TOKENS).stock
    expected = stock(source)
    for block, expert in enumerate((1, 2, 1, 1)):
        without_expert(expected, block, expert)
    with torch.no_grad():
        inputs = with_image(expected.config)
        same(stock(tmp_path / "out")(**inputs).logits, expected(**inputs).logits)
