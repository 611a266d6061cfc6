"""GPT-OSS: sinks of heads, biases of experts and of the router, and the choice of experts, by stock modules alone."""

from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import optprune
from optprune import Allocation
from optprune.errors import InputError
from optprune.export import GgufFile, export, save_model
from optprune.models import Decoder, KvGroups, open_model
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.cut_mixtures import cut
from tests.helpers.expert_tokens import inner, last, routed
from tests.helpers.mixed_models import generated, mixed
from tests.helpers.tiny_models import ALL_MODELS, save_tiny
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

TOKENS = torch.arange(10, 58)[None]


def made(**config: Any) -> Any:
    return ALL_MODELS["gpt_oss"](**config)


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS, use_cache=False).logits


# -- sinks


def keep_one_head(decoder: Decoder, block: int, kept: int) -> Any:
    [layers] = KvGroups().layers(decoder, block)
    return layers, torch.arange(2) == kept


@pytest.mark.parametrize("kept", [0, 1])
def test_heads_go_with_their_sinks(kept: int, tmp_path: Path) -> None:
    model, dense = made(), made()
    decoder = Decoder(model)
    for block in range(2):
        decoder.keep_units(block, *keep_one_head(decoder, block, kept))
        before, after = (each.model.layers[block].self_attn for each in (dense, model))
        assert torch.equal(after.sinks, before.sinks[2 * kept : 2 * kept + 2])
        with torch.no_grad():  # what the other heads mix has no effect
            before.o_proj.weight.unflatten(1, (2, -1))[:, 1 - kept] = 0
    decoder.record_shapes()
    expected = logits(dense)
    assert (logits(model) - expected).abs().max() <= 1e-5 * expected.abs().max()
    assert save_model(model, tmp_path / "out").stock
    again: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(logits(again), logits(model)) and again.config.num_attention_heads == 2
    assert generated(again) == generated(again, use_cache=False)


def test_a_trial_with_fewer_heads_leaves_the_sinks_as_they_were() -> None:
    model = made()
    decoder, before = Decoder(model), model.model.layers[0].self_attn.sinks
    with decoder.narrowed(0, *keep_one_head(decoder, 0, 1)):
        assert torch.equal(model.model.layers[0].self_attn.sinks, before[2:])
    assert model.model.layers[0].self_attn.sinks is before


# -- experts


def test_the_bias_of_an_expert_takes_the_mean_of_what_its_units_added() -> None:
    """Of the first block, on the tokens that reach each expert."""
    model, dense = made(), made()
    prune(model, batches(), load_recipe("fasp", {"units": "mlp", "sparsity": 0.25}))
    for expert, (own, _) in enumerate(routed(dense)):
        means = []
        for each in (dense, model):
            bias = each.model.layers[0].mlp.experts.down_proj_bias[expert].double()
            means.append((inner(each, expert, own) @ last(each, expert).double().T + bias).mean(0).detach())
        assert (means[0] - means[1]).abs().max() <= 1e-4 * means[0].abs().max()
        assert not torch.equal(*(each.model.layers[0].mlp.experts.down_proj_bias[expert] for each in (dense, model)))


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [
        ("fasp", {"units": "mlp", "sparsity": 0.2}),
        ("experts_best", {"sparsity": 0.17}),
        ("sparsegpt", {"sparsity": 0.5}),
        ("depth", {"sparsity": 0.6}),
    ],
)
def test_streamed_resumed_and_shared_runs_give_the_same_weights(
    recipe: str, settings: dict[str, Any], tmp_path: Path
) -> None:
    shared = {"propagation": "dense"} if recipe == "fasp" else {}
    check_every_way_gives_the_same(
        "gpt_oss", load_recipe(recipe, {**settings, **shared}), tmp_path, shared=bool(shared)
    )


def test_every_layer_gets_sparse_weights() -> None:
    model = made()
    report = prune(model, batches(), load_recipe("sparsegpt", {"sparsity": 0.5}))
    decoder = Decoder(model)
    every = [(block, path) for block in range(2) for path in decoder.paths(block)]
    assert len(every) == 2 * (4 + 4 * 3) and {layer.name for layer in report.layers} == {
        decoder.name(block, path) for block, path in every
    }
    for block, path in every:
        assert float((decoder.layer(block, path).weight == 0).float().mean()) == pytest.approx(0.5, abs=0.02)


def test_an_uneven_model_is_a_folder_with_our_file_that_generates_and_trains(tmp_path: Path) -> None:
    model = mixed(made(num_hidden_layers=4))
    saved = save_model(model, tmp_path / "out", check_tokens=TOKENS)
    assert not saved.stock and (tmp_path / "out" / "modeling_pruned_gpt_oss.py").is_file()
    again: Any = optprune.load_model(tmp_path / "out", device="cpu").model
    assert torch.equal(logits(again), logits(model))
    assert again.model.layers[1].self_attn.sinks.shape == (2,)
    assert again.model.layers[1].mlp.router.bias.shape == (3,)
    assert again.model.layers[1].mlp.experts.gate_up_proj_bias.shape == (3, 2 * 40)
    assert generated(again) == generated(again, use_cache=False) == generated(model)
    again.train()(TOKENS, labels=TOKENS).loss.backward()
    assert all(parameter.grad is not None for parameter in again.parameters() if parameter.requires_grad)


# -- the choice of experts, by stock modules


def stock_terms(model: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Of the first block: the router's logits [tokens, 4], whom it chose [tokens, 2], and all experts' answers."""
    found, mlp = list[Tensor](), model.model.layers[0].mlp
    handle = mlp.register_forward_pre_hook(lambda _, args: found.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch, use_cache=False)
        handle.remove()
        tokens = torch.cat(found)
        scores, _, chosen = mlp.router(tokens)
        alone = [torch.full((len(tokens), 1), number) for number in range(4)]
        outputs = [mlp.experts(tokens, number, torch.ones(len(tokens), 1)) for number in alone]
    return scores, chosen, torch.stack(outputs, 1)


def by_frequency(model: Any) -> list[int]:
    _, chosen, _ = stock_terms(model)
    counts = torch.bincount(chosen.flatten(), minlength=4)
    assert len(set(counts.tolist())) == 4
    return sorted(counts.topk(3).indices.tolist())


def by_reap(model: Any) -> list[int]:
    """REAP's code takes the softmax over all experts, biases among them, at the chosen ones."""
    scores, chosen, outputs = stock_terms(model)
    weighed = scores.softmax(1) * outputs.norm(dim=2)
    reached = torch.zeros_like(scores).scatter(1, chosen, 1.0)
    means = (weighed * reached).sum(0) / reached.sum(0).clamp(min=1)  # one that no token reaches has nothing
    return sorted(means.topk(3).indices.tolist())


def by_change(model: Any) -> list[int]:
    """The three whose stock mixture, made of these alone, answers nearest to that of all four."""

    def answers(each: Any) -> Tensor:
        return torch.cat([each.model.layers[0].mlp(tokens)[0].flatten(0, 1) for tokens in inputs])

    inputs = list[Tensor]()
    handle = model.model.layers[0].mlp.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch, use_cache=False)
        handle.remove()
        whole = answers(model)
        costs = {
            kept: float((answers(cut(model, 0, list(kept))) - whole).square().sum())
            for kept in combinations(range(4), 3)
        }
    return list(min(costs, key=lambda kept: costs[kept]))


def biased(seed: int, size: float = 1.0) -> Any:
    """A model whose first router has large biases."""
    model = made(seed=seed)
    with torch.no_grad():
        model.model.layers[0].mlp.router.bias.copy_(torch.tensor([2.3, -0.4, -3.3, 0.9]).roll(seed) * size)
    return model


LITERAL = {"expert_frequency": by_frequency, "reap": by_reap, "experts_best": by_change}


@pytest.mark.parametrize("literal", LITERAL.values(), ids=LITERAL)
def test_the_biases_of_the_router_decide(literal: Callable[[Any], list[int]]) -> None:
    """Or the test below shows nothing of them."""
    assert any(literal(biased(seed)) != literal(biased(seed, 0.0)) for seed in range(3))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("recipe", "literal"), LITERAL.items(), ids=LITERAL)
def test_the_experts_kept_are_those_of_a_literal_computation(
    recipe: str, literal: Callable[[Any], list[int]], seed: int, tmp_path: Path
) -> None:
    """Of the first block, whose inputs nothing changes; to the saved folder."""
    model, dense = biased(seed), biased(seed)
    wanted = literal(dense)
    shapes = [shape.counts() for shape in Decoder(model).shapes()]
    allocation = Allocation.from_dict({"sparsity": 0.1, "blocks": [{**shapes[0], "experts": 3}, shapes[1]]})
    prune(model, batches(), load_recipe(recipe, {"refit.held_out": 0}), allocation=allocation)
    assert not save_model(model, tmp_path / "out").stock  # the second block has four
    again: Any = optprune.load_model(tmp_path / "out", device="cpu").model
    mlp, before = again.model.layers[0].mlp, dense.model.layers[0].mlp
    for own, old in ((mlp.router, before.router), (mlp.experts, before.experts)):
        assert {name for name, _ in own.named_parameters()} == {name for name, _ in old.named_parameters()}
        for name, rows in own.named_parameters():
            assert torch.equal(rows, old.get_parameter(name)[wanted])
    expected = logits(cut(dense, 0, wanted))
    assert (logits(again) - expected).abs().max() <= 1e-5 * expected.abs().max()


# -- what is refused


def test_gguf_is_refused_with_another_activation(tmp_path: Path) -> None:
    folder = save_tiny(made(), tmp_path / "model")
    with pytest.raises(InputError, match=r"swiglu_alpha 1.4 in place of 1.702: the model cannot be exported to GGUF"):
        export(str(folder), tmp_path / "model.gguf", GgufFile())
    assert not (tmp_path / "model.gguf").exists()


def test_float_folders_are_read_whole_and_block_by_block(tmp_path: Path) -> None:
    model = made()
    model.save_pretrained(tmp_path)
    opened, whole = open_model(tmp_path).decoder(), Decoder(model)
    for block in range(2):
        with opened.resident(block):
            found, expected = opened.weights(block), whole.weights(block)
            assert found.keys() == expected.keys()
            for name, weight in expected.items():
                assert torch.equal(found[name], weight) and found[name].stride() == weight.stride()
    assert isinstance(whole.layer(0, "mlp.experts.1.up_proj"), nn.Linear)
