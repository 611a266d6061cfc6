"""Block matching in a run: every kept weight moves, what is gone stays gone, and held-out tokens decide."""

import copy
import json
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune.calibration import POLICIES, calibrating, first_inputs, hold_out
from optprune.calibration.calls import Calls, calls_of
from optprune.errors import InputError, StrictError
from optprune.metric import OutputMetric
from optprune.models import Decoder
from optprune.models.places import States
from optprune.pruning import prune, refinement
from optprune.pruning.refinement import Sequences, match_block
from optprune.recipe import load_recipe
from optprune.report import Report
from optprune.solvers import Adam, Lbfgs
from tests.helpers.damaged_blocks import LAYERS, damaged_block
from tests.helpers.tiny_models import TINY_MODELS, VARIANTS
from tests.helpers.token_batches import batches

MATCHED = {"refit.held_out": 0.25, "refit.matching": 4}
RECIPES = [
    ("wanda", {"units.weights": "2:4"}),
    ("wanda", {"units.weights": "rows", "sparsity": 0.5}),
    ("magnitude", {"units.weights": "unstructured", "sparsity": 0.6}),
    ("fasp", {"units": "all", "sparsity": 0.3}),
]


def run(make, recipe: str, settings: dict) -> tuple[PreTrainedModel, Report]:
    model = make()
    return model, prune(model, batches(8, 96), load_recipe(recipe, settings))


CASES = [
    *(("llama", case, "intra") for case in RECIPES),
    *(("llama", RECIPES[number % 4], policy) for number, policy in enumerate(POLICIES) if policy != "intra"),
    *((variant, RECIPES[-(number % 2)], "intra") for number, variant in enumerate(VARIANTS) if variant != "llama"),
]


@pytest.mark.e2e
@pytest.mark.parametrize(("variant", "case", "policy"), CASES)
def test_masks_and_widths_are_those_of_a_run_without(variant: str, case: tuple[str, dict], policy: str) -> None:
    (recipe, settings), make = case, VARIANTS[variant]
    # Under policies whose later blocks hang on those before, masks are those of other inputs: one block is enough.
    settings = {**settings, "propagation": policy, "refit.held_out": 0.25}
    blocks = None if POLICIES[policy].independent else 1

    def shallow() -> PreTrainedModel:
        model = make()
        if blocks:
            decoder = Decoder(model)
            del decoder.blocks[blocks:]
            model.config.num_hidden_layers = blocks
            if getattr(model.config, "layer_types", None):
                model.config.layer_types = model.config.layer_types[:blocks]
        return model

    plain, _ = run(shallow, recipe, settings)
    matched, report = run(shallow, recipe, {**settings, "refit.matching": 4})
    states = zip(plain.state_dict().items(), matched.state_dict().values(), strict=True)
    inside = Decoder(plain).architecture.blocks
    for (name, before), after in states:
        assert before.shape == after.shape
        if name.startswith(inside) and name.endswith("_proj.weight"):
            assert torch.equal(before != 0, after != 0), name
        if not name.startswith(inside):
            assert torch.equal(before, after), name
    assert len(report.recovered) == len(Decoder(plain).blocks)
    for number, part in enumerate(report.recovered):
        assert part.name == Decoder(plain).block_name(number)
        assert part.held_out_after <= part.held_out_before
    assert json.loads(report.to_json())["recovered"][0]["layers"]


@pytest.mark.parametrize("name", TINY_MODELS)
def test_every_kept_weight_moves(name: str) -> None:
    """Of q, k, v, o, the MLP (OPT's fc1 too) and the norms, with the biases."""
    settings = {"units.weights": "2:4", "refit.held_out": 0.25, "propagation": "dense"}
    plain, _ = run(TINY_MODELS[name], "wanda", settings)
    matched, report = run(TINY_MODELS[name], "wanda", {**settings, "refit.matching": 4})
    before, after = (dict(Decoder(model).blocks[0].named_parameters()) for model in (plain, matched))
    assert report.recovered[0].steps > 0 and set(report.recovered[0].layers) == set(before)
    for key, weight in before.items():
        # A bias of the keys changes all scores of a token alike, which a softmax does not see.
        if not (key == "self_attn.k_proj.bias" and name == "opt"):
            kept = weight != 0
            assert float((after[key] != weight)[kept].float().mean()) > 0.9, key


@pytest.mark.e2e
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_report_says_what_a_pass_of_the_written_block_says(name: str, policy: str) -> None:
    """The last block's error on the tokens kept apart, measured anew along the policy's path."""
    dense, settings = TINY_MODELS[name](), {"units.weights": "2:4", "propagation": policy, **MATCHED}
    model = copy.deepcopy(dense)
    report = prune(model, batches(8, 96), load_recipe("wanda", settings))
    whole, pruned = Decoder(dense), Decoder(model)
    used, count = hold_out(batches(8, 96), 0.25)
    with calibrating(whole), torch.no_grad():
        actual, reference = first_inputs(pruned, used), first_inputs(whole, used)
        for index in range(len(whole.blocks)):
            found = calls_of(pruned.blocks[index], "", actual)
            ideal = calls_of(whole.blocks[index], "", reference)
            for calls, part in zip((Calls(ideal.arguments, found.targets), ideal), ("answers", "targets"), strict=True):
                assert len(calls.targets) == len(used), part
            error = by_token(found.targets[-count:], ideal.targets[-count:])
            assert report.recovered[index].held_out_after == pytest.approx(error, rel=1e-3)
            onwards = {"dense": ideal, "intra": ideal}.get(policy, found)
            actual.past(onwards.targets)
            reference.past((ideal if policy in ("dense", "intra", "cross") else found).targets)


def by_token(answers: States[Tensor], targets: States[Tensor]) -> float:
    shares = []
    for answer, target in zip(answers, targets, strict=True):
        shares.append(((answer - target).square().sum(-1) / target.square().sum(-1)).reshape(-1))
    return float(torch.cat(shares).mean())


@pytest.mark.parametrize("solver", [Adam(8, 0.02), Lbfgs(8)], ids=["adam", "lbfgs"])
@pytest.mark.parametrize("name", LAYERS)
def test_much_of_the_error_goes(name: str, solver: Adam | Lbfgs) -> None:
    block, calls = damaged_block(name, torch.float32)
    part = match_block(block, *calls.split(1), solver, name="x")
    assert part.held_out_after < 0.95 * part.held_out_before
    assert part.error_after < 0.8 * part.error_before
    assert part.name == "x" and part.layers == tuple(key for key, _ in block.named_parameters())


def test_a_metric_acts() -> None:
    """Matched in a metric, its error is less than where errors count alike."""
    gradients = torch.randn(200, 16, generator=torch.Generator().manual_seed(2)) * torch.logspace(-2, 2, 16)
    metric = OutputMetric.from_samples(gradients)
    errors = []
    for chosen in (metric, None):
        block, calls = damaged_block("llama", torch.float32)
        match_block(block, calls, calls, Adam(12, 0.02), metric=chosen)
        errors.append(match_block(block, calls, calls, Adam(1, 1e-9), metric=metric).held_out_before)
    assert errors[0] < 0.7 * errors[1]


@pytest.mark.e2e
def test_the_metric_is_that_of_the_residual_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The metric of what is added last: the gradient there is that at the block's output."""
    seen = []
    honest = refinement.match_block

    def watched(*args, **more):
        seen.append(more["metric"])
        return honest(*args, **more)

    monkeypatch.setattr(refinement, "match_block", watched)
    settings = {"units.weights": "2:4", "sparsity": 0.5, "metric.tokens": 96, **MATCHED}
    for name, make in TINY_MODELS.items():
        seen.clear()
        model = make()
        prune(model, batches(8, 96), load_recipe("sparse_best", settings))
        assert [metric.width for metric in seen] == [model.config.hidden_size] * 2, name
        assert all(metric.full for metric in seen)


def test_where_a_norm_comes_last_the_metric_is_not_that(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    honest = refinement.match_block
    monkeypatch.setattr(
        refinement, "match_block", lambda *args, **more: seen.append(more["metric"]) or honest(*args, **more)
    )
    settings = {"units.weights": "2:4", "sparsity": 0.5, "metric.tokens": 96, **MATCHED}
    prune(TINY_MODELS["opt"](do_layer_norm_before=False), batches(8, 96), load_recipe("sparse_best", settings))
    assert seen == [None, None]


@pytest.mark.e2e
def test_fewer_tokens_are_as_many_as_are_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    honest = refinement.match_block

    def watched(block, fit, apart, solver, **more):
        seen.append((fit.tokens, apart.tokens))
        return honest(block, fit, apart, solver, **more)

    monkeypatch.setattr(refinement, "match_block", watched)
    for policy in POLICIES:
        run(TINY_MODELS["llama"], "wanda", {"propagation": policy, **MATCHED, "refit.matching.tokens": 100})
    assert len(set(seen)) == 1
    [(fit, apart)] = set(seen)
    used, count = hold_out(batches(8, 96), 0.25)
    sizes = [batch.numel() for batch in used]
    assert apart == sum(sizes[-count:]) and sizes[0] <= fit < 100 + sizes[0]


def test_sequences_of_a_batch_are_called_one_by_one() -> None:
    """What a block answers to a sequence alone is its part of what it answers to the batch."""
    for name in LAYERS:
        block, calls = damaged_block(name, torch.float64)
        examples = Sequences(calls, 3)
        whole = torch.cat([block_answers(block, args, kwargs) for args, kwargs in calls.arguments])
        rows: list[Tensor] = []

        def terms(example, block=block, rows=rows):
            rows.append(block_answers(block, example.args, example.kwargs))
            return (torch.zeros(()),)

        examples.sums(terms, lambda: (torch.zeros(()),))
        torch.testing.assert_close(torch.cat(rows), whole, rtol=1e-10, atol=1e-12)
        assert all(len(row) == 1 for row in rows)


def test_every_epoch_takes_the_sequences_in_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them once, and in the same orders when it is run again."""
    honest, epochs = Sequences.sums, 4

    def run_orders() -> list[list[float]]:
        drawn = list[float]()

        def watched(self, terms, zeros, draw=None):
            def noted(example):
                drawn.append(float(example.target.double().sum()))
                return terms(example)

            return honest(self, noted if draw is not None else terms, zeros, draw)

        monkeypatch.setattr(Sequences, "sums", watched)
        block, calls = damaged_block("llama", torch.float32)
        fit, apart = calls.split(1)
        match_block(block, fit, apart, Adam(epochs, 1e-4))
        count = sum(shape[0] for shape in fit.targets.shapes)
        assert count > 3 and len(drawn) == epochs * count
        return [drawn[start : start + count] for start in range(0, len(drawn), count)]

    orders = run_orders()
    assert all(sorted(one) == sorted(orders[0]) and len(set(one)) == len(one) for one in orders)
    assert all(one != other for one, other in pairwise(orders))
    assert run_orders() == orders


def test_what_one_sequence_gives_is_gone_before_the_next_is_called() -> None:
    """A block needs its room for what is inside it."""
    _, calls = damaged_block("llama", torch.float64)
    given = list[weakref.ref[Tensor]]()

    def terms(example):
        assert not any(one() is not None for one in given), "what was given before is still there"
        found = torch.ones(3)
        given.append(weakref.ref(found))
        return (found,)

    [total] = Sequences(calls, 3).sums(terms, lambda: (torch.zeros(3),))
    assert len(given) > 1 and torch.equal(total, torch.full((3,), float(len(given))))


@torch.no_grad()
def block_answers(block, args, kwargs) -> Tensor:
    output = block(*args, **kwargs)
    return output[0] if isinstance(output, tuple) else output


@pytest.mark.slow
@pytest.mark.parametrize("policy", POLICIES)
def test_a_block_without_its_attention_aims_at_the_whole_one(policy: str) -> None:
    """What is removed whole is what the rest is matched for."""
    dense = TINY_MODELS["llama"]()
    settings = {"allocation.least": 0.0, "sparsity": 0.5, "allocation": "global", "units": "all", "propagation": policy}
    model = copy.deepcopy(dense)
    report = prune(model, batches(8, 96), load_recipe("fasp", {**settings, **MATCHED}))
    assert all(part.held_out_after <= part.held_out_before for part in report.recovered)
    whole, (used, count) = Decoder(dense), hold_out(batches(8, 96), 0.25)
    with calibrating(whole), torch.no_grad():
        ideal = calls_of(whole.blocks[0], "", first_inputs(whole, used))
        found = calls_of(Decoder(model).blocks[0], "", first_inputs(whole, used))
    if report.recovered and report.recovered[0].name == whole.block_name(0):
        error = by_token(found.targets[-count:], ideal.targets[-count:])
        assert report.recovered[0].held_out_after == pytest.approx(error, rel=1e-3)


def test_it_follows_the_recovery_of_sub_modules() -> None:
    settings = {"units.weights": "2:4", "refit.recovery": 1, **MATCHED}
    _, report = run(TINY_MODELS["llama"], "wanda", settings)
    last = [part.name.rpartition(".")[2] for part in report.recovered]
    assert last == ["self_attn", "mlp", "0", "self_attn", "mlp", "1"]


def test_it_asks_for_what_it_needs() -> None:
    with pytest.raises(InputError, match=r"'refit\.matching' has no effect without refit\.held_out: set that too"):
        load_recipe("wanda", {"refit.matching": 4})
    with pytest.raises(StrictError, match="matching has nothing to match"):
        prune(
            TINY_MODELS["llama"](),
            batches(),
            load_recipe("depth", {**MATCHED, "allocation.score_tokens": 64, "strict": True}),
        )


@pytest.mark.slow
def test_states_in_a_file_give_the_same_bytes(tmp_path: Path) -> None:
    models = [TINY_MODELS["qwen2"]() for _ in range(2)]
    for model, states in zip(models, ("device", "disk"), strict=True):
        settings = {"units.weights": "2:4", "propagation": "cross", **MATCHED}
        prune(model, batches(8, 96), load_recipe("wanda", settings), states=states)
    pairs = zip(models[0].parameters(), models[1].parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)
