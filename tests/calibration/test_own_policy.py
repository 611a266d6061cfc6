"""A user's own propagation policy: one class, used by `prune`."""

import copy
import inspect
import textwrap
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from optprune.calibration import (
    OnePath,
    Path,
    Propagation,
    Stream,
    TwoPaths,
    advance,
    calibrating,
    first_inputs,
    hold_out,
)
from optprune.calibration.calls import calls_of
from optprune.models import Decoder
from optprune.numerics.tensors import first_output
from optprune.objectives import LayerContext, linked
from optprune.problems import LayerLoss, Problem
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.layer_inputs import apart, inputs_of, statistics
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches


@dataclass(frozen=True)
class Between(Propagation):
    """The dense block of the target gets the pruned one's inputs, those of the dense model, or something between."""

    share: float
    name, independent, sequential, dense_target = "between", False, True, True

    def start(self, stream: Stream) -> Path:
        return Path(self, stream, stream.copy())

    def reference(self, path: Path) -> Stream:
        pairs = zip(path.actual.hidden, path.dense.hidden, strict=True)
        return path.actual.with_hidden([torch.lerp(actual, dense, self.share) for actual, dense in pairs])


def pruned(name: str, recipe: str, policy: str | Propagation) -> list[Tensor]:
    model = TINY_MODELS[name]()
    settings = {"propagation": policy, "refit.held_out": 0.25, "refit.recovery": 1}
    report = prune(model, batches(), load_recipe(recipe, settings))
    assert report.recipe["propagation"] == (policy if isinstance(policy, str) else "between")
    return list(model.parameters())


@pytest.mark.parametrize(("name", "recipe"), [("llama", "fasp"), ("opt", "sparsegpt"), ("qwen2", "sparsegpt")])
def test_its_ends_are_policies_that_we_know(name: str, recipe: str) -> None:
    """Not one bit is another, though `local` follows one stream where this policy follows two."""
    found = {share: pruned(name, recipe, Between(share)) for share in (0.0, 0.5, 1.0)}
    known = {0.0: pruned(name, recipe, "local"), 1.0: pruned(name, recipe, "cross")}
    for share, weights in found.items():
        for end, expected in known.items():
            same = all(torch.equal(one, other) for one, other in zip(weights, expected, strict=True))
            assert same == (share == end)


def test_the_example_of_the_docstring_aims_half_way() -> None:
    example = "    class Halfway" + inspect.getdoc(Propagation).split("class Halfway")[1]
    names = {"Propagation": Propagation, "Path": Path}
    exec(textwrap.dedent(example), names)
    dense, losses = tiny_llama(), dict[str, LayerLoss]()
    model = copy.deepcopy(dense)

    def objective(context: LayerContext) -> Problem:
        losses[context.name] = context.loss
        return linked(context)

    prune(model, batches(), Recipe(objective=objective, sparsity=0.4, propagation=names["Halfway"](), damping=0.0))
    block, layer = "model.layers.1", "model.layers.1.mlp.down_proj"
    entering = list(inputs_of(model, block).float().split(batches()[0].numel()))

    def halfway(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((args[0] + entering.pop(0).view(args[0].shape)) / 2, *args[1:])

    whole, before = copy.deepcopy(dense), copy.deepcopy(dense)
    whole.get_submodule(block).register_forward_pre_hook(halfway)
    before.model.layers[0] = model.model.layers[0]
    expected = statistics(dense.get_submodule(layer).weight.detach(), inputs_of(before, layer), inputs_of(whole, layer))
    # The model computes in float32: a few hundred roundings of the largest entry at most.
    assert apart((losses[layer].gram.double(), losses[layer].target.double()), expected) <= 1e-5


@pytest.mark.parametrize(("name", "parts"), [("llama", ("self_attn", "mlp")), ("opt", ("self_attn",))])
def test_recovery_aims_at_the_targets_of_a_policy_of_other_facts(name: str, parts: tuple[str, ...]) -> None:
    """Layer by layer, each towards what its original weight gives on the pruned inputs: so do sub-modules."""
    dense = TINY_MODELS[name]()
    model = copy.deepcopy(dense)
    policy = OnePath("in order", independent=False, sequential=True, dense_target=False)
    settings = {"sparsity": 0.5, "propagation": policy, "refit.held_out": 0.25, "refit.recovery": 1}
    report = prune(model, batches(), load_recipe("sparsegpt", settings))
    decoder, original = Decoder(model), Decoder(dense)
    used, count = hold_out(batches(), 0.25)
    recovered = {part.name: part for part in report.recovered}
    assert len(recovered) == 2 * len(parts)
    with calibrating(decoder):
        stream = first_inputs(decoder, used)
        advance(decoder.blocks[0], stream)
        for path in parts:
            calls = calls_of(decoder.blocks[1], path, stream)
            module = original.blocks[1].get_submodule(path)
            answers = [module(*args, **kwargs) for args, kwargs in calls.arguments[-count:]]
            targets = [answer[0] if isinstance(answer, tuple) else answer for answer in answers]
            change = sum(
                float((one - two).square().sum()) for one, two in zip(calls.targets[-count:], targets, strict=True)
            )
            signal = sum(float(target.square().sum()) for target in targets)
            assert recovered[decoder.name(1, path)].held_out_after == pytest.approx(change / signal, rel=1e-4)


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_recovery_corrects_for_the_share_of_the_drift_that_layers_correct_for(share: float) -> None:
    """The target is between the dense sub-module's output on what arrives and its output in the dense model."""
    dense = tiny_llama()
    model = copy.deepcopy(dense)
    policy = TwoPaths("a share", independent=False, sequential=True, dense_target=True, correction=share)
    settings = {"sparsity": 0.5, "propagation": policy, "refit.held_out": 0.25, "refit.recovery": 1}
    report = prune(model, batches(), load_recipe("sparsegpt", settings))
    decoder, original = Decoder(model), Decoder(dense)
    used, count = hold_out(batches(), 0.25)
    recovered = {part.name: part for part in report.recovered}
    with calibrating(decoder):
        arriving, undisturbed = first_inputs(decoder, used), first_inputs(original, used)
        advance(decoder.blocks[0], arriving)
        advance(original.blocks[0], undisturbed)
        for path in ("self_attn", "mlp"):
            calls = calls_of(decoder.blocks[1], path, arriving)
            ideal = calls_of(original.blocks[1], path, undisturbed).targets
            module = original.blocks[1].get_submodule(path)
            change = signal = 0.0
            last = (calls.arguments[-count:], calls.targets[-count:], ideal[-count:])
            for (args, kwargs), output, goal in zip(*last, strict=True):
                target = (1 - share) * first_output(module(*args, **kwargs)) + share * goal
                change += float((output - target).square().sum())
                signal += float(target.square().sum())
            assert recovered[decoder.name(1, path)].held_out_after == pytest.approx(change / signal, rel=1e-4)
