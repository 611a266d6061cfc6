"""Costs that divide one budget: of all weights or of quantiles, with free biases, rescaled, within their limits."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import product

import pytest
import torch
from torch import Tensor
from transformers import OPTForCausalLM

from optprune.allocation.currency import Prices, prices_of
from optprune.allocation.knapsack import Curve, global_threshold, share_budget
from optprune.allocation.weight_costs import WeightBudget
from optprune.allocation.width_costs import Choices, WidthCurve
from optprune.calibration import DenseStatistics
from optprune.models import UNITS, Decoder, Mlp, Target
from optprune.moments import InputMoments
from optprune.patterns import InGroups, InMatrix, PatternFamily
from optprune.problems import LayerLoss
from optprune.recipe import Recipe, load_recipe
from tests.helpers.divided import divided
from tests.helpers.layer_inputs import inputs_of
from tests.helpers.tiny_models import tiny_llama, tiny_opt

PLAIN = {"metric": "none", "allocation.probe_tokens": 0}


def sparse(**settings: object) -> Recipe:
    return load_recipe("sparse_best", {**PLAIN, **settings})


@contextmanager
def received(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Tensor]]:
    """Record the costs by layer that the division of the budget receives."""
    found: dict[str, Tensor] = {}

    def listen(costs: dict[str, Tensor], keep: int, low: float, high: float) -> dict[str, int]:
        found.update(costs)
        return global_threshold(costs, keep, low, high)

    with monkeypatch.context() as patched:
        patched.setattr("optprune.allocation.weight_costs.global_threshold", listen)
        yield found


def test_a_sub_block_that_losses_call_worthless_costs_what_a_probe_measures() -> None:
    """A rate cannot make something of a loss of nothing."""
    curve = WidthCurve(0, Mlp(), 128, {64: 2.0, 0: 0.0}).rescaled({64: 1.0, 0: 0.5})
    assert curve.losses == {64: pytest.approx(1.0, rel=1e-4), 0: 0.5}


def test_of_too_many_costs_every_so_many_th_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_llama())
    with received(monkeypatch) as every:
        whole = divided(decoder, sparse())
    assert sum(map(len, every.values())) == decoder.linear_weights()
    stride = 16
    monkeypatch.setattr("optprune.allocation.weight_costs.MOST_COSTS", decoder.linear_weights() // stride)
    with received(monkeypatch) as some:
        few = divided(decoder, sparse())
    assert sum(map(len, some.values())) == decoder.linear_weights() // stride
    for name, costs in some.items():
        # One of each sixteen in order of size.
        groups = every[name].sort().values.view(-1, stride)
        assert ((groups[:, 0] <= costs) & (costs <= groups[:, -1])).all()
        # And not always the least or the greatest of them.
        assert costs.sum() == pytest.approx(float(groups.mean(1).sum()), rel=0.05)
    for old, new in zip(whole.blocks, few.blocks, strict=True):
        for path, share in old.shares.items():
            # A count above a threshold is known to 16, in each of 14 layers; so is what all layers keep together.
            size = len(every[decoder.name(0, path)])
            assert new.share(path) == pytest.approx(share, abs=16 * 16 / size)
    assert few.sparsity == pytest.approx(0.5, abs=1e-4)


def constant_units(model: OPTForCausalLM) -> OPTForCausalLM:
    """The first block's MLP has large units that hardly vary: a free bias makes up for them."""
    with torch.no_grad():
        layer = model.model.decoder.layers[0].fc1
        layer.weight *= 1e-2
        layer.bias.fill_(5.0)
    return model


def around_the_mean(model: OPTForCausalLM, name: str) -> tuple[Tensor, Tensor]:
    """W, and A of inputs around their mean, damped by a hundredth of its mean diagonal; in float64."""
    inputs = inputs_of(model, name)
    spread = inputs - inputs.mean(0)
    gram = spread.T @ spread / len(spread)
    gram += 0.01 * gram.diagonal().mean() * torch.eye(len(gram)).to(gram)
    return model.get_submodule(name).weight.detach().double(), gram


def test_a_free_bias_makes_up_for_weights_on_what_does_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    model = constant_units(tiny_opt())
    with received(monkeypatch) as costs:
        divided(Decoder(model), sparse(damping=0.01))
    for layer in ("0.fc1", "0.fc2", "1.self_attn.q_proj"):
        name = f"model.decoder.layers.{layer}"
        weight, gram = around_the_mean(model, name)
        expected = (weight.square() / (2 * torch.linalg.inv(gram).diagonal())).flatten().sort().values
        # The Gram matrix is of float32 activations; its inverse, damped by 0.01, has about a hundred times their error.
        assert torch.allclose(costs[name].double(), expected, rtol=1e-3)


def test_a_free_bias_makes_up_for_units_that_do_not_vary(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without any units what is left of a layer is its bias, and the loss half the variance of its outputs."""
    model = constant_units(tiny_opt())
    found: dict[str, Curve] = {}

    def listen(curves: dict[str, Curve], budget: float) -> dict[str, int]:
        found.update(curves)
        return share_budget(curves, budget)

    monkeypatch.setattr("optprune.allocation.width_costs.share_budget", listen)
    settings = {**PLAIN, "units": "all", "sparsity": 0.2, "damping": 0.01, "allocation.least": 0.0}
    divided(Decoder(model), load_recipe("structured_best", settings))
    for block, (part, layer) in product((0, 1), (("mlp", "fc2"), ("attention", "self_attn.out_proj"))):
        weight, gram = around_the_mean(model, f"model.decoder.layers.{block}.{layer}")
        expected = float(((weight @ gram) * weight).sum()) / 2
        assert float(found[f"{block} {part}"].errors[0]) == pytest.approx(expected, rel=1e-3)


# -- what must stay


def by_formula(cost: float) -> Prices:
    return Prices("units", (128 * cost,), lambda block, kind, count: count * cost)


@pytest.mark.parametrize(
    ("least", "counts"), [(0.0, [0, 32, 64, 96, 128]), (0.25, [32, 64, 96, 128]), (0.3, [64, 96, 128]), (1.0, [128])]
)
def test_a_width_keeps_its_least_share(least: float, counts: list[int]) -> None:
    losses = {128: 0.0, 96: 1.0, 64: 3.0, 32: 7.0, 0: 20.0}
    choices = Choices.of([WidthCurve(0, Mlp(), 128, losses)], least, by_formula(2.0))
    assert [kept.count for kept in choices.kept] == counts
    curve = choices.curve
    assert curve.prices.tolist() == [2.0 * (count - 128) for count in counts]
    assert curve.errors.tolist() == [losses[count] for count in counts]


@pytest.mark.parametrize("budget", ["parameters", "flops"])
@pytest.mark.parametrize(("units", "field"), [("mlp", "mlp_width"), ("vo", "value_dim"), ("kv-groups", "kv_heads")])
def test_no_width_is_below_its_least_share(units: str, field: str, budget: str) -> None:
    """A sub-block that costs nothing would go whole, but must keep half."""
    model = tiny_llama()
    block = model.model.layers[1]
    torch.nn.init.zeros_((block.mlp.down_proj if units == "mlp" else block.self_attn.o_proj).weight)
    decoder = Decoder(model)
    prices = prices_of(decoder, budget, 64, UNITS[units].kinds)
    there = getattr(decoder.shape(0), field)
    # As much as half of one of the two blocks, which would leave the other block whole.
    half = (prices.whole[1] - prices.narrowed(1, UNITS[units].kinds[0], there // 2)) / sum(prices.whole)
    settings = {**PLAIN, "units": units, "allocation.currency": budget, "allocation.tokens": 64, "sparsity": half}
    for least, kept in ((0.5, there // 2), (0.0, 0)):
        allocation = divided(decoder, load_recipe("structured_best", {**settings, "allocation.least": least}))
        assert getattr(allocation.blocks[1].shape, field) == kept
        assert all(getattr(block.shape, field) >= least * there for block in allocation.blocks)


def test_no_layer_keeps_less_or_more_of_its_weights_than_its_limits() -> None:
    """A layer that no output depends on, and one that everything depends on."""
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.zero_()
        model.model.layers[1].mlp.up_proj.weight.mul_(1e3)
    decoder = Decoder(model)
    for least, most in ((0.2, 0.8), (0.1, 0.75), (0.25, 0.9)):
        allocation = divided(decoder, sparse(**{"allocation.least": least, "allocation.most": most}))
        size = decoder.layer(0, "mlp.down_proj").weight.numel()
        assert allocation.blocks[0].share("mlp.down_proj") == pytest.approx(least, abs=1 / size)
        assert allocation.blocks[1].share("mlp.up_proj") == pytest.approx(most, abs=1 / size)
        shares = [share for block in allocation.blocks for share in block.shares.values()]
        assert all(least <= share <= most for share in shares)


def test_between_two_measurements_the_rate_is_between_theirs() -> None:
    predicted = {count: 128.0 - count for count in (96, 64, 32, 0)}
    curve = WidthCurve(0, Mlp(), 128, predicted, in_nats=False)
    assert curve.rescaled({}).losses == predicted
    assert curve.rescaled({64: 128.0}).losses == pytest.approx({96: 64, 64: 128, 32: 192, 0: 256}, rel=1e-5)
    both = curve.rescaled({64: 128.0, 0: 512.0}).losses
    # Twice what was predicted of 64, four times of none: three times of 32, and above 64 twice.
    assert both == pytest.approx({96: 64, 64: 128, 32: 288, 0: 512}, rel=1e-5)
    # Of a loss of nothing no rate makes what was measured.
    assert WidthCurve(0, Mlp(), 128, {64: 0.0, 0: 0.0}).rescaled({0: 7.0}).losses == {64: 0.0, 0: 7.0}


@pytest.mark.parametrize("family", [InMatrix(), InGroups(2, 4)], ids=["shares", "which layers"])
def test_a_loss_of_few_tokens_counts_by_their_share(family: PatternFamily) -> None:
    decoder = Decoder(tiny_llama())
    costs = WeightBudget(family, 0.5, 0.2, 0.8).costs(decoder, DenseStatistics(), None, in_nats=True)
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments.from_samples(torch.randn(60, 8, generator=generator))
    loss = LayerLoss.of(torch.randn(4, 8, generator=generator), moments, damping=0.01)
    few = replace(loss, moments=replace(loss.moments, tokens=15))
    for path, each in (("self_attn.q_proj", loss), ("mlp.up_proj", few)):
        costs.add(0, Target(path, path, family=family), each)
    found = costs.every or {name: curve.errors for name, curve in costs.curves.items()}
    all_tokens, some_tokens = (found[decoder.name(0, path)] for path in ("self_attn.q_proj", "mlp.up_proj"))
    assert all_tokens.max() > 0
    torch.testing.assert_close(some_tokens, all_tokens / 4)
