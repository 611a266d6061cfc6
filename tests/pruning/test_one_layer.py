"""One layer of a model: its loss and its problem are those that `prune` meets there, to the last bit."""

import copy
from dataclasses import dataclass, replace
from pathlib import Path as PathOnDisk
from typing import Any

import pytest
import torch
from torch import nn
from transformers import PreTrainedModel

import optprune
from optprune.allocation import Allocation
from optprune.calibration import POLICIES, Path, Propagation, Statistics, Stream
from optprune.errors import InputError
from optprune.models import BlockAllocation, Decoder
from optprune.moments import InputMoments
from optprune.objectives import LayerContext
from optprune.problems import LayerLoss, Problem, SparseLeastSquares
from optprune.recipe import Recipe, load_recipe
from tests.helpers.layer_inputs import inputs_of
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_opt, tiny_sliding
from tests.helpers.token_batches import batches

DOWN = "model.layers.1.mlp.down_proj"


@dataclass(frozen=True)
class AllAtOnce(Propagation):
    """A policy of other facts: all layers of a block at once, towards what its dense original gives."""

    name, independent, sequential, dense_target = "all at once", False, False, True

    def start(self, stream: Stream) -> Path:
        return Path(self, stream, stream.copy())


@dataclass(frozen=True)
class Met:
    """What `prune` met at a layer."""

    model: PreTrainedModel
    """as it was then"""
    loss: LayerLoss
    problem: Problem


def met(dense: PreTrainedModel, recipe: Recipe, allocation: Allocation | None = None) -> dict[str, Met]:
    """What `prune` meets at every layer that it prunes."""
    model, found = copy.deepcopy(dense), dict[str, Met]()

    def objective(context: LayerContext) -> Problem:
        problem = recipe.state(context)
        found[context.name] = Met(copy.deepcopy(model), context.loss, problem)
        return problem

    optprune.prune(model, batches(), recipe.model_copy(update={"objective": objective}), allocation=allocation)
    return found


def state(model: nn.Module) -> tuple[Any, ...]:
    """Everything of a model that could be changed."""
    modules = list(model.named_modules())
    return (
        {name: value.clone() for name, value in model.state_dict().items()},
        [(name, type(module), module.training, len(module._forward_pre_hooks)) for name, module in modules],
        {id(parameter) for parameter in model.parameters()},
        [parameter.requires_grad for parameter in model.parameters()],
    )


def unchanged(before: tuple[Any, ...], model: nn.Module) -> bool:
    weights, *rest = state(model)
    return rest == list(before[1:]) and all(torch.equal(value, before[0][name]) for name, value in weights.items())


def same(one: LayerLoss, other: LayerLoss) -> bool:
    """Whether W, A, B and c are the same numbers."""
    pairs = [(one.weight, other.weight), (one.gram, other.gram), (one.target, other.target)]
    return all(torch.equal(left, right) for left, right in pairs) and one.constant == other.constant


RECIPES = {
    "fasp": {"units": "all", "sparsity": 0.3},
    "sparsegpt": {"sparsity": 0.5},
}


@pytest.mark.e2e
@pytest.mark.parametrize("policy", [*POLICIES, AllAtOnce()], ids=str)
@pytest.mark.parametrize(
    ("name", "recipe"), [*((name, recipe) for name in TINY_MODELS for recipe in RECIPES), ("sliding window", "fasp")]
)
def test_a_layer_is_as_prune_meets_it(name: str, recipe: str, policy: str | Propagation) -> None:
    dense = (TINY_MODELS | {"sliding window": tiny_sliding})[name]()
    chosen = load_recipe(recipe, {**RECIPES[recipe], "propagation": policy})
    before, architecture = state(dense), Decoder(dense).architecture
    for layer, there in met(dense, chosen).items():
        options = {"damping": chosen.damping, "fit_bias": chosen.fit_bias}
        loss = optprune.layer_loss(there.model, batches(), layer, policy, dense=dense, **options)
        assert same(loss, there.loss), layer
        if layer.startswith(f"{architecture.blocks}.1.") and layer.endswith(architecture.mlp_consumer):
            problem = optprune.layer_problem(dense, batches(), layer, chosen)
            assert type(problem) is type(there.problem)
            assert problem.fingerprint() == there.problem.fingerprint()
    assert unchanged(before, dense)


@pytest.mark.parametrize("policy", [*POLICIES, AllAtOnce()], ids=str)
def test_a_layer_behind_an_attention_that_is_removed_whole(policy: str | Propagation) -> None:
    dense = tiny_opt()
    decoder = Decoder(dense)
    first, second = decoder.shapes()
    wanted = [replace(first, mlp_width=100), replace(second.without("attention"), mlp_width=77)]
    allocation = Allocation.of(decoder, map(BlockAllocation, wanted))
    recipe, before = load_recipe("fasp", {"propagation": policy}), state(dense)
    for layer, there in met(dense, recipe, allocation).items():
        assert same(optprune.layer_loss(there.model, batches(), layer, policy, dense=dense), there.loss)
        problem = optprune.layer_problem(dense, batches(), layer, recipe, allocation=allocation)
        assert problem.fingerprint() == there.problem.fingerprint()
    assert unchanged(before, dense)


@pytest.mark.parametrize(
    ("recipe", "settings"),
    [("structured_best", {"allocation.probe_tokens": 50, "refit.recovery": 1}), ("sparse_best", {}), ("spap", {})],
)
def test_the_problem_has_the_metric_and_the_budget_of_the_recipe(recipe: str, settings: dict) -> None:
    dense, statistics = tiny_llama(), Statistics()
    chosen = load_recipe(recipe, settings)
    found = list(met(dense, chosen).items())
    for layer, there in (found[0], found[-1]):
        problem = optprune.layer_problem(dense, batches(), layer, chosen, statistics=statistics)
        assert problem.fingerprint() == there.problem.fingerprint()
    assert statistics.seconds_saved > 0 or recipe == "spap"


@pytest.mark.parametrize("name", TINY_MODELS)
def test_of_a_model_that_is_not_pruned_every_policy_meets_the_same(name: str) -> None:
    model = TINY_MODELS[name]()
    layer = Decoder(model).name(1, Decoder(model).architecture.mlp_consumer)
    losses = [optprune.layer_loss(model, batches(), layer, policy) for policy in POLICIES]
    assert all(same(loss, losses[0]) for loss in losses)
    expected = InputMoments.from_samples(inputs_of(model, layer))
    # The model computes in float32: allow its rounding, relative to the largest entry.
    assert (losses[0].moments.gram - expected.gram).abs().max() <= 1e-5 * expected.gram.abs().max()


@pytest.mark.parametrize("policy", POLICIES)
def test_a_loop_of_ones_own_prunes_as_prune_does(policy: str) -> None:
    """Layer by layer, with no more than the loss, the recipe's solver and a weight that is written."""
    dense, recipe = tiny_llama(), load_recipe("sparsegpt", {"sparsity": 0.5, "propagation": policy})
    model, pruned = copy.deepcopy(dense), copy.deepcopy(dense)
    optprune.prune(pruned, batches(), recipe)
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and name != "lm_head":
            loss = optprune.layer_loss(model, batches(), name, policy, dense=dense, damping=recipe.damping)
            pattern = recipe.units.family.of(*layer.weight.shape, 0.5)
            layer.weight.data = optprune.solve(SparseLeastSquares(loss, pattern), recipe.solver).value
    assert all(torch.equal(value, pruned.state_dict()[name]) for name, value in model.state_dict().items())


def test_no_block_behind_the_layer_is_run() -> None:
    model = tiny_llama()

    def never(*_: object) -> None:
        pytest.fail("the block behind the layer's was run")

    model.model.layers[1].register_forward_pre_hook(never)
    layer = "model.layers.0.mlp.down_proj"
    for policy in POLICIES:
        optprune.layer_loss(model, batches(), layer, policy)
        optprune.layer_problem(model, batches(), layer, Recipe(propagation=policy))


def test_a_model_in_training_mode_stays_so() -> None:
    model, other = tiny_opt(dropout=0.5).train(), tiny_opt(dropout=0.5).eval()
    model.model.decoder.layers[0].eval()
    layer, before = "model.decoder.layers.1.fc2", state(model)
    assert same(optprune.layer_loss(model, batches(), layer), optprune.layer_loss(other, batches(), layer))
    assert unchanged(before, model)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        (
            "model.layers.1.mlp.downproj",
            "is not in the model, .* the nearest names are model.layers.1.mlp.down_proj",
        ),
        ("mlp.up_proj", r"the nearest names are model.layers.\d.mlp.up_proj"),
        ("model.layers.2.mlp.up_proj", r"the nearest names are model.layers.\d.mlp.up_proj"),
        ("model.layers.1.input_layernorm", "is a LlamaRMSNorm, not a linear layer of a decoder block"),
        ("model.layers.1", "is a LlamaDecoderLayer, not a linear layer"),
        ("lm_head", "is a Linear, not a linear layer of a decoder block: the nearest"),
        ("", "'' is a LlamaForCausalLM, not"),
        (3, "3 is not in the model"),
        (None, "None is not in the model"),
    ],
)
def test_a_name_that_is_not_that_of_a_layer(name: Any, reason: str) -> None:
    for call in (
        lambda: optprune.layer_loss(tiny_llama(), batches(), name),
        lambda: optprune.layer_problem(tiny_llama(), batches(), name, Recipe()),
    ):
        with pytest.raises(InputError, match=reason) as raised:
            call()
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        ([], "there are no calibration batches"),
        ([{"labels": torch.ones(1, 4, dtype=torch.long)}], r"batch 0 has no input_ids \(it has labels\)"),
        ([torch.tensor([[5, -100]])], "holds the token -100"),
        ([torch.ones(1, 600, dtype=torch.long)], "longer than the 512 positions"),
        ([torch.ones(4)], "of whole numbers"),
    ],
)
def test_batches_are_checked_as_prune_checks_them(wrong: list, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        optprune.layer_loss(tiny_llama(), wrong, DOWN)
    with pytest.raises(InputError, match=reason):
        optprune.layer_problem(tiny_llama(), wrong, DOWN, Recipe())


def test_one_tensor_is_one_batch() -> None:
    both = torch.cat(batches())
    assert same(optprune.layer_loss(tiny_llama(), both, DOWN), optprune.layer_loss(tiny_llama(), [both], DOWN))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"policy": "backwards"}, "'backwards' is not known: use one of cross, dense"),
        ({"damping": -1.0}, "damping fraction must be finite and not negative"),
        ({"dense": tiny_opt()}, "the model is a llama of 2 blocks and `dense` a opt of 2 blocks"),
        ({"dense": tiny_llama(num_hidden_layers=3)}, "and `dense` a llama of 3 blocks"),
    ],
    ids=str,
)
def test_what_does_not_fit(options: dict, reason: str) -> None:
    name = "model.decoder.layers.1.fc2" if isinstance(options.get("dense"), type(tiny_opt())) else DOWN
    with pytest.raises(InputError, match=reason):
        optprune.layer_loss(tiny_llama(), batches(), name, **options)


def test_a_layer_whose_inputs_are_no_longer_there() -> None:
    dense = tiny_llama()
    narrow, gone = copy.deepcopy(dense), copy.deepcopy(dense)
    optprune.prune(narrow, batches(), load_recipe("fasp", {"units": "mlp"}))
    with pytest.raises(InputError, match=f"{DOWN} reads .* as it was before the layer's units were removed"):
        optprune.layer_loss(narrow, batches(), DOWN, dense=dense)
    Decoder(gone).remove(1, "mlp")
    with pytest.raises(InputError, match=f"{DOWN} was removed from the model"):
        optprune.layer_loss(gone, batches(), DOWN, dense=dense)


@pytest.mark.parametrize(
    ("recipe", "reason"),
    [
        ("fasp", "states no problem at model.layers.1.self_attn.q_proj: in this block it prunes .*o_proj, .*down_proj"),
        ("depth", "it prunes no single layer"),
    ],
)
def test_a_layer_that_the_recipe_does_not_prune(recipe: str, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        optprune.layer_problem(tiny_llama(), batches(), "model.layers.1.self_attn.q_proj", load_recipe(recipe))


@pytest.mark.parametrize("field", ["sparsity", "allocation"])
def test_a_recipe_by_its_name_and_fields(field: str, tmp_path: PathOnDisk) -> None:
    dense = tiny_llama()
    value = 0.4 if field == "sparsity" else {"kind": "uniform", "multiple": 48}
    fields = {"units": "mlp", field: value}
    there = met(dense, load_recipe("fasp", fields))[DOWN].problem.fingerprint()
    assert there != met(dense, load_recipe("fasp", {"units": "mlp"}))[DOWN].problem.fingerprint()
    file = tmp_path / "own.yaml"
    file.write_text(load_recipe("fasp").to_yaml())
    for recipe in ("fasp", str(file), load_recipe("fasp")):
        assert optprune.layer_problem(dense, batches(), DOWN, recipe, **fields).fingerprint() == there


@pytest.mark.parametrize(
    ("recipe", "fields", "reason"),
    [
        ("fassp", {}, "did you mean fasp?"),
        ("fasp", {"sparsitty": 0.4}, "sparsitty"),
        (None, {}, "the recipe"),
        ("vocabulary", {"vocabulary": 400}, "call prune_vocabulary first"),
    ],
    ids=str,
)
def test_recipes_are_refused_as_prune_refuses_them(recipe: Any, fields: dict, reason: str) -> None:
    sentences = []
    for call in (
        lambda: optprune.prune(tiny_llama(), batches(), recipe, **fields),
        lambda: optprune.layer_problem(tiny_llama(), batches(), DOWN, recipe, **fields),
    ):
        with pytest.raises(InputError, match=reason) as raised:
            call()
        sentences.append(str(raised.value))
    assert sentences[0] == sentences[1]


def test_a_recipe_that_prune_would_refuse() -> None:
    recipe = load_recipe("sparsegpt", {"units.weights": "3:5", "sparsity": 0.4})
    with pytest.raises(InputError, match="needs a multiple of 5 inputs"):
        optprune.layer_problem(tiny_llama(), batches(), DOWN, recipe)


def test_the_loss_holds_the_metric_and_the_bias_that_are_asked_for() -> None:
    model, layer = tiny_opt(), "model.decoder.layers.1.fc2"
    metric = optprune.metric.OutputMetric.from_samples(torch.eye(64), full=False)
    assert optprune.layer_loss(model, batches(), layer, metric=metric).metric is not None
    for fit in (False, True):
        assert optprune.layer_loss(model, batches(), layer, fit_bias=fit).fit_bias == fit
    assert not optprune.layer_loss(tiny_llama(), batches(), DOWN, fit_bias=True).fit_bias


def test_the_problem_outlives_the_model() -> None:
    """It holds its own weight, so that writing to the model does not change it."""
    model = tiny_llama()
    problem = optprune.layer_problem(model, batches(), DOWN, Recipe())
    before = problem.fingerprint()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert problem.fingerprint() == before
