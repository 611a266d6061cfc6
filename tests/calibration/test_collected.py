"""`collect`: runs with collected statistics give the same weights and measure nothing twice."""

import copy
import functools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import optprune
from optprune.calibration import hold_out, moments_pass, propagation, stream
from optprune.calibration.moments_pass import moments_work
from optprune.calibration.statistics_cache import FolderCache
from optprune.calibration.stream import SLOW, block_pass
from optprune.errors import InputError
from optprune.models import Decoder, open_model
from optprune.numerics import linalg
from optprune.pruning import PartialSums
from optprune.recipe import Recipe
from tests.helpers.short_runs import same, told
from tests.helpers.tiny_models import save_tiny, tiny_llama, tiny_opt
from tests.helpers.token_batches import batches

RECIPES = ("fasp", "alps", "sparse_best", "structured_best", "wanda")
POLICIES = ("pruned", "dense", "intra", "cross", "partial", "local")
CASES = [(name, policy) for policy in ("pruned", "dense") for name in RECIPES] + [("structured_best", "intra")]
REST = [(name, policy) for policy in POLICIES for name in RECIPES if (name, policy) not in CASES]


def recipe(name: str, **settings: object) -> Recipe:
    return optprune.load_recipe(name, {"sparsity": 0.3, **settings})


@pytest.fixture(scope="module")
def dense() -> PreTrainedModel:
    return tiny_llama()


def test_recipes_are_given_by_their_names(dense: PreTrainedModel) -> None:
    statistics = optprune.collect(dense, batches(), recipes=["wanda"])
    optprune.prune(copy.deepcopy(dense), batches(), "wanda", sparsity=0.5, statistics=statistics)
    assert statistics.seconds_saved > 0
    with pytest.raises(InputError, match="did you mean wanda"):
        optprune.collect(dense, batches(), recipes=["wandda"])
    for one in ("wanda", recipe("wanda")):
        with pytest.raises(InputError, match=r"not a list: give them as in recipes=\[.wanda.\]"):
            optprune.collect(dense, batches(), recipes=one)


@pytest.fixture(scope="module")
def collected(dense: PreTrainedModel) -> Callable[[str], optprune.Statistics]:
    """By policy, for all recipes."""

    @functools.cache
    def of(policy: str) -> optprune.Statistics:
        return optprune.collect(dense, batches(), recipes=[recipe(name, propagation=policy) for name in RECIPES])

    return of


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "policy"), [*CASES, *(pytest.param(*case, marks=pytest.mark.slow) for case in REST)])
def test_weights_are_those_of_a_run_without(
    name: str, policy: str, dense: PreTrainedModel, collected: Callable[[str], optprune.Statistics]
) -> None:
    alone, shared, chosen = copy.deepcopy(dense), copy.deepcopy(dense), recipe(name, propagation=policy)
    expected = optprune.prune(alone, batches(), chosen)
    found = optprune.prune(shared, batches(), chosen, statistics=collected(policy))
    assert same(shared, alone)
    assert [layer.objective for layer in found.layers] == [layer.objective for layer in expected.layers]
    assert (found.allocation, found.notes) == (expected.allocation, expected.notes)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The blocks that a batch went through, whoever asked for it but for the metric and probes."""
    seen: list[nn.Module] = []
    run_block = stream.run_block

    def counted(block: nn.Module, *arguments: Any, **more: Any) -> Any:
        seen.append(block)
        return run_block(block, *arguments, **more)

    for module in (stream, moments_pass):
        monkeypatch.setattr(module, "run_block", counted)
    return seen


def test_under_dense_no_run_goes_through_the_model_again(dense: PreTrainedModel, passes: list[nn.Module]) -> None:
    statistics = optprune.collect(dense, batches())
    assert len(passes) == len(dense.model.layers) * len(batches())
    passes.clear()
    for name in ("fasp", "wanda"):
        for sparsity in (0.2, 0.4):
            model, alone = copy.deepcopy(dense), copy.deepcopy(dense)
            chosen = recipe(name, propagation="dense", sparsity=sparsity)
            optprune.prune(model, batches(), chosen, statistics=statistics)
            assert passes == []
            optprune.prune(alone, batches(), chosen)
            assert same(model, alone)
            passes.clear()


def test_under_pruned_the_first_block_is_gone_through_once_less(
    dense: PreTrainedModel, passes: list[nn.Module]
) -> None:
    statistics = optprune.collect(dense, batches(), recipes=[recipe("alps")])
    # The first block alone: nothing else of the dense model is met on this path.
    assert len(passes) == len(batches())
    passes.clear()
    optprune.prune(copy.deepcopy(dense), batches(), recipe("alps"))
    alone = len(passes)
    passes.clear()
    optprune.prune(copy.deepcopy(dense), batches(), recipe("alps"), statistics=statistics)
    assert len(passes) == alone - len(batches())


def test_the_costs_of_a_budget_are_measured_once(
    dense: PreTrainedModel, passes: list[nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = [
        recipe(name, **{"sparsity": 0.2, "allocation.probe_tokens": 0, "propagation": "pruned"})
        for name in ("structured_best", "sparse_best")
    ]
    statistics = optprune.collect(dense, batches(), recipes=chosen)

    def again(*_: object, **__: object) -> None:
        raise AssertionError("measured again")

    for place in ("calibration.dense_statistics.collect_metrics", "calibration.dense_statistics.removal_curve"):
        monkeypatch.setattr(f"optprune.{place}", again)
    monkeypatch.setattr("optprune.allocation.weight_costs.entry_costs", again)
    for one in chosen:
        passes.clear()
        other = one.with_sparsity(0.4)
        optprune.prune(copy.deepcopy(dense), batches(), other, statistics=statistics)
        # On the pruned path: on from the first block, and through the second to solve it and to its end.
        fitted, _ = hold_out(batches(), 0.0 if one.refit is None else one.refit.held_out)
        assert len(passes) == 3 * len(fitted)
    assert statistics.seconds_saved > 0


@pytest.mark.e2e
def test_in_a_folder_they_are_for_another_process_too(dense: PreTrainedModel, tmp_path: Path) -> None:
    chosen = [recipe(name, propagation="dense") for name in ("fasp", "sparse_best", "structured_best")]
    optprune.collect(dense, batches(), recipes=chosen, folder=tmp_path / "statistics")
    files = {file: file.read_bytes() for file in (tmp_path / "statistics").iterdir()}
    again = optprune.collect(dense, batches(), recipes=chosen, folder=tmp_path / "statistics")
    assert {file: file.read_bytes() for file in (tmp_path / "statistics").iterdir()} == files
    for one in chosen:
        alone, shared = copy.deepcopy(dense), copy.deepcopy(dense)
        optprune.prune(alone, batches(), one)
        optprune.prune(shared, batches(), one, statistics=again)
        assert same(shared, alone)
    again.forget()
    assert [file.name for file in (tmp_path / "statistics").iterdir()] == ["statistics.json"]


def test_files_of_others_stay(tmp_path: Path) -> None:
    cache, names = FolderCache(tmp_path, {}), {"notes.json", "notes.safetensors"}
    for name in (*names, f"{'0a' * 16}.json", f"{'0a' * 16}.safetensors"):
        (tmp_path / name).write_text("{}")
    cache.clear()
    assert {file.name for file in tmp_path.iterdir()} == {*names, "statistics.json"}


def test_a_folder_of_something_else_and_a_damaged_one_are_refused(dense: PreTrainedModel, tmp_path: Path) -> None:
    chosen = [recipe("alps")]
    optprune.collect(dense, batches(), recipes=chosen, folder=tmp_path / "one")
    with pytest.raises(InputError, match=r"the calibration tokens was .* choose another folder, or delete it"):
        optprune.collect(dense, batches(3), recipes=chosen, folder=tmp_path / "one")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not a folder of statistics"):
        optprune.collect(dense, batches(), recipes=chosen, folder=tmp_path / "two")
    facts = tmp_path / "one" / "statistics.json"
    now = facts.read_text()
    facts.write_text(json.dumps({key: value for key, value in json.loads(now).items() if key != "the format"}))
    with pytest.raises(InputError, match=r"where the format was None, and here it is 2: choose another folder"):
        optprune.collect(dense, batches(), recipes=chosen, folder=tmp_path / "one")
    facts.write_text(now)
    for file in (tmp_path / "one").glob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:100])
    damaged = optprune.collect(dense, batches(), recipes=chosen, folder=tmp_path / "one")
    with pytest.raises(InputError, match="is damaged: delete the folder"):
        optprune.prune(copy.deepcopy(dense), batches(), chosen[0], statistics=damaged)


def reversed_text() -> list[Tensor]:
    return [batch.flip(1) for batch in batches()]


@pytest.mark.parametrize(
    ("make", "text", "partial_sums", "what"),
    [
        (lambda: tiny_llama(1), batches, 1, "the model"),
        (lambda: tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}), batches, 1, "the model"),
        (lambda: tiny_llama().bfloat16(), batches, 1, "the model"),
        (tiny_llama, reversed_text, 1, "the calibration tokens"),
        (tiny_llama, lambda: batches(3), 1, "the calibration tokens"),
        (tiny_llama, batches, 2, "the number of partial sums"),
        (tiny_opt, batches, 1, "the model"),
    ],
    ids=["weights", "config", "dtype", "tokens", "fewer", "partial_sums", "architecture"],
)
def test_another_source_is_refused_by_name(
    make: Callable[[], PreTrainedModel], text: Callable[[], Sequence[Tensor]], partial_sums: int, what: str
) -> None:
    statistics = optprune.collect(tiny_llama(), batches(), recipes=[])
    model = make()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(InputError, match=rf"collected where {what} was .*, and here it is .*: collect them again"):
        optprune.prune(model, text(), recipe("fasp"), statistics=statistics, partial_sums=PartialSums(partial_sums))
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in before.items())


def test_blocks_that_are_read_from_files_are_the_same_source(dense: PreTrainedModel, tmp_path: Path) -> None:
    folder, chosen = save_tiny(dense, tmp_path / "model"), recipe("structured_best", propagation="dense")
    alone = copy.deepcopy(dense)
    expected = optprune.prune(alone, batches(), chosen)
    first = open_model(folder, device="cpu")
    of_files = optprune.collect(first.model, batches(), recipes=[chosen], store=first.store)
    in_memory = copy.deepcopy(dense)
    assert told(optprune.prune(in_memory, batches(), chosen, statistics=of_files)).layers == told(expected).layers
    assert same(in_memory, alone)
    again = open_model(folder, device="cpu")
    of_memory = optprune.collect(dense, batches(), recipes=[chosen])
    found = optprune.prune(again.model, batches(), chosen, statistics=of_memory, store=again.store)
    assert told(found).layers == told(expected).layers


def test_a_policy_whose_path_begins_elsewhere_uses_no_cache(dense: PreTrainedModel) -> None:
    class Halved(propagation.Propagation):
        name, independent, sequential, dense_target = "halved", True, False, False

        def start(self, stream: stream.Stream) -> propagation.Path:
            half = stream.with_hidden(hidden / 2 for hidden in stream.hidden)
            return propagation.Path(self, half, half)

    alone, shared, chosen = copy.deepcopy(dense), copy.deepcopy(dense), recipe("alps", propagation=Halved())
    optprune.prune(alone, batches(), chosen)
    optprune.prune(shared, batches(), chosen, statistics=optprune.collect(dense, batches()))
    assert same(shared, alone)


def test_a_block_without_attention_uses_no_cached_moments(dense: PreTrainedModel) -> None:
    """The inputs of its MLP differ from those in the dense model."""
    chosen = recipe("fasp", propagation="dense", units="mlp")
    model = copy.deepcopy(dense)
    blocks = optprune.prune(model, batches(), chosen).allocation["blocks"]
    blocks[0] |= {"kv_heads": 0, "value_dim": 0}
    allocation = optprune.Allocation.from_dict({"sparsity": 0.3, "blocks": blocks})
    alone, shared = copy.deepcopy(dense), copy.deepcopy(dense)
    optprune.prune(alone, batches(), chosen, allocation=allocation)
    optprune.prune(shared, batches(), chosen, allocation=allocation, statistics=optprune.collect(dense, batches()))
    assert same(shared, alone)


def test_what_solvers_keep_with_the_moments_stays_there(
    dense: PreTrainedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ALPS decomposes a Gram matrix once for all sparsities, where the moments are the dense model's."""
    statistics, calls, counts = optprune.collect(dense, batches()), list[Tensor](), list[int]()
    decompose = linalg.eigh_in_place

    def counted(matrix: Tensor) -> tuple[Tensor, Tensor]:
        calls.append(matrix)
        return decompose(matrix)

    monkeypatch.setattr(linalg, "eigh_in_place", counted)
    for sparsity in (0.3, 0.5):
        chosen = recipe("alps", propagation="dense", sparsity=sparsity)
        optprune.prune(copy.deepcopy(dense), batches(), chosen, statistics=statistics)
        counts.append(len(calls))
    assert counts[0] == counts[1] > 0


def test_the_work_of_a_pass_is_that_of_the_block_and_of_the_gram_products() -> None:
    decoder, tokens = Decoder(tiny_llama()), 96
    taps = decoder.paths(0)
    squares = sum(decoder.layer(0, tap).in_features ** 2 for tap in taps)
    expected = tokens * (block_pass(decoder, 0).flops + 2 * SLOW * squares)
    assert moments_work(decoder, 0, taps, tokens).flops == pytest.approx(expected)
    assert moments_work(decoder, 0, [], tokens).flops == pytest.approx(tokens * block_pass(decoder, 0).flops)
