"""Rotary pairs of queries and keys: a model without some of them, and the problem of removing them."""

import copy
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from optprune import Allocation, Recipe, heal, prune
from optprune.calibration.partial_sums import PartialSums
from optprune.errors import InputError
from optprune.export import GgufFile, export, save_model
from optprune.metric import OutputMetric
from optprune.models import UNITS, BlockAllocation, Decoder, KvGroups, Pairs, load_model, open_model
from optprune.moments import InputMoments
from optprune.problems import StructuredLeastSquares, loss_of_rows
from optprune.program import RUNTIMES
from optprune.report import original_from_report
from optprune.report.block_values import widths
from optprune.report.stored import config_faults, open_stored
from optprune.solvers import solve
from tests.helpers.gguf_models import PROMPT as WRITTEN
from tests.helpers.gguf_models import apart, saved
from tests.helpers.mixed_models import generated
from tests.helpers.thread_peers import ThreadPeers, together
from tests.helpers.tiny_models import ALL_MODELS, save_tiny, tiny_llama, tiny_qwen2
from tests.helpers.token_batches import batches
from tests.helpers.ways_to_run import check_every_way_gives_the_same

BY_PAIRS = [
    "gemma2",
    "granite",
    "llama",
    "ministral3",
    "mistral",
    "mixtral",
    "qwen2",
    "qwen2_moe",
    "seed_oss",
    "smollm3",
]
"""the families whose queries and keys are whole heads without norms, rotated by halves"""
METRIC = {"units": "qk", "metric": "full", "allocation": "global", "allocation.multiple": 2, "sparsity": 0.05}


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        return model(torch.arange(10, 42)[None], use_cache=False).logits


def without_pairs(model: PreTrainedModel, block: int, removed: Tensor) -> None:
    """Set the rows of the queries and keys of these pairs [kv_heads, pairs] of a block to zero, one head at a time."""
    attention = model.model.layers[block].self_attn
    kv_heads, pairs = removed.shape
    group = attention.q_proj.out_features // attention.k_proj.out_features
    for layer, share in ((attention.q_proj, group), (attention.k_proj, 1)):
        for head in range(kv_heads * share):
            for pair in removed[head // share].nonzero().flatten().tolist():
                for row in (head * 2 * pairs + pair, head * 2 * pairs + pairs + pair):
                    layer.weight.data[row] = 0
                    if layer.bias is not None:
                        layer.bias.data[row] = 0


def remove(decoder: Decoder, block: int, removed: Tensor) -> None:
    [layers] = Pairs().within(decoder).layers(decoder, block)
    decoder.keep_units(block, layers, ~removed.flatten())


def some(kv_heads: int, pairs: int) -> Tensor:
    """Three pairs of each KV head, other ones of each."""
    return torch.stack([torch.isin(torch.arange(pairs), torch.arange(3) + head) for head in range(kv_heads)])


def test_these_families_keep_pairs_by_head() -> None:
    assert [name for name in sorted(ALL_MODELS) if Decoder(ALL_MODELS[name]()).architecture.pairs_kept_by_head] == (
        BY_PAIRS
    )


@pytest.mark.parametrize("name", BY_PAIRS)
def test_a_block_without_pairs_computes_what_rows_of_zeros_do(name: str) -> None:
    zeros = ALL_MODELS[name]().eval()
    for parameter in zeros.parameters():
        if parameter.ndim == 1:  # biases are zeros in a new model
            parameter.data.add_(0.1 * torch.rand(parameter.shape, generator=torch.Generator().manual_seed(0)))
    model = copy.deepcopy(zeros)
    decoder, heads = Decoder(model), Decoder(zeros).heads
    removed = some(heads.kv, heads.dim // 2)
    before = decoder.shape(1)
    remove(decoder, 1, removed)
    Decoder(zeros).joined()
    without_pairs(zeros, 1, removed)
    assert decoder.shape(1).pairs == heads.dim // 2 - 3 and decoder.shape(0) == before
    gone = decoder.weights_of(before) - decoder.weights_of(decoder.shape(1))
    assert gone == 3 * 2 * heads.kv * (heads.group + 1) * model.config.hidden_size
    torch.testing.assert_close(logits(model), logits(zeros), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_a_folder_is_read_by_transformers_and_writes_with_a_cache(name: str, tmp_path: Path) -> None:
    model = ALL_MODELS[name]().eval()
    decoder = Decoder(model)
    remove(decoder, 0, some(decoder.heads.kv, decoder.heads.dim // 2))
    decoder.record_shapes()
    assert not save_model(model, tmp_path / "m").stock
    for dtype in (torch.float32, torch.bfloat16):
        again = AutoModelForCausalLM.from_pretrained(tmp_path / "m", trust_remote_code=True, dtype=dtype).eval()
        assert torch.equal(again.model.layers[0].self_attn.kept_pairs, model.model.layers[0].self_attn.kept_pairs)
    again = load_model(tmp_path / "m", device="cpu")
    assert torch.equal(logits(again.model.eval()), logits(model))
    assert again.decoder().shapes() == Decoder(model).shapes()
    assert generated(model) == generated(model, use_cache=False)
    trained = {name for name, parameter in again.decoder().joined().named_parameters() if parameter.requires_grad}
    assert trained and not any("pairs" in name for name in trained)


def test_pairs_go_again_and_then_heads() -> None:
    """A model that lacks pairs loses more of them, and a KV head takes its list with it."""
    model = tiny_llama().eval()
    decoder = Decoder(model)
    remove(decoder, 0, some(2, 8))
    torch.manual_seed(0)
    zeros = copy.deepcopy(model)
    # Of the pairs left, the first: 3 of head 0, and 0 of head 1.
    left = decoder.kept_pairs(0)
    assert left is not None and left.tolist() == [[3, 4, 5, 6, 7], [0, 4, 5, 6, 7]]
    remove(decoder, 0, torch.arange(5).repeat(2, 1) == 0)
    for layer, rows in (
        (zeros.model.layers[0].self_attn.q_proj, range(4)),
        (zeros.model.layers[0].self_attn.k_proj, range(2)),
    ):
        for head in rows:
            layer.weight.data[[10 * head, 10 * head + 5]] = 0
    assert decoder.kept_pairs(0).tolist() == [[4, 5, 6, 7], [4, 5, 6, 7]]
    torch.testing.assert_close(logits(model), logits(zeros), rtol=1e-5, atol=1e-5)
    [groups] = KvGroups().layers(decoder, 0)
    decoder.keep_units(0, groups, torch.tensor([False, True]))
    zeros.model.layers[0].self_attn.o_proj.weight.data[:, :32] = 0
    assert decoder.kept_pairs(0).tolist() == [[4, 5, 6, 7]] and decoder.shape(0).kv_heads == 1
    torch.testing.assert_close(logits(model), logits(zeros), rtol=1e-5, atol=1e-5)


# -- the problem


def layer(bias: bool, seed: int = 0) -> tuple[Tensor, Tensor | None, InputMoments, OutputMetric]:
    """A weight [8, 5] with statistics of its inputs and output gradients, which are not white."""
    generator = torch.Generator().manual_seed(seed)

    def sample(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    moments = InputMoments.from_samples(sample(200, 5) @ sample(5, 5) + 0.3)
    metric = OutputMetric.from_samples(sample(300, 8) @ sample(8, 8)).damped(0.1)
    return sample(8, 5), sample(8) if bias else None, moments, metric


@pytest.mark.parametrize("bias", [False, True])
def test_the_loss_is_that_of_the_outputs(bias: bool) -> None:
    """1/2 E e^T S e for the changes e of the outputs, with the damping of the inputs, by hand."""
    weight, own, moments, metric = layer(bias)
    loss = loss_of_rows(weight, own, moments, 0.03, metric)
    change, more = torch.randn(8, 5, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    value = (weight + change).T
    gram, square = moments.gram, moments.gram
    if bias:
        value = torch.cat([value, (own + more)[None]])
        change = torch.cat([change, more[:, None]], 1)
        mean = moments.mean
        square = torch.cat([torch.cat([gram, mean[:, None]], 1), torch.cat([mean, torch.ones(1)])[None]])
    damped = square + 0.03 * square.diagonal().mean() * torch.eye(len(square), dtype=torch.float64)
    expected = 0.5 * float(torch.trace(metric.matrix @ change @ damped @ change.T))
    assert loss.value(value) == pytest.approx(expected, rel=1e-10)
    assert loss.value(loss.weight) == 0


@pytest.mark.parametrize("bias", [False, True])
def test_the_cheapest_pair_goes_and_the_rows_that_stay_are_those_of_least_squares(bias: bool) -> None:
    """Among all choices of one pair of four, each with its refit by S alone, whatever the inputs."""
    weight, own, moments, metric = layer(bias)
    decoder = Decoder(tiny_llama(hidden_size=8, num_attention_heads=1, num_key_value_heads=1, head_dim=8))
    [layers] = Pairs().within(decoder).layers(decoder, 0)
    loss = loss_of_rows(weight, own, moments, 0.0, metric)
    dense, matrix, found = loss.weight.T, metric.matrix, []
    for pair in range(4):
        gone = [pair, pair + 4]
        stay = [row for row in range(8) if row not in gone]
        fitted = torch.zeros_like(dense)
        fitted[stay] = dense[stay] + torch.linalg.solve(matrix[stay][:, stay], matrix[stay][:, gone] @ dense[gone])
        found.append((loss.value(fitted.T), fitted))
    best = min(found, key=lambda each: each[0])
    answer = solve(StructuredLeastSquares(loss, layers.channels, 3), Recipe(solver=["greedy_obs", "restore"]).solver)
    torch.testing.assert_close(answer.value.T, best[1], rtol=1e-6, atol=1e-8)


# -- the run


def test_a_run_says_what_it_kept_and_refits_queries_alone() -> None:
    dense, model = tiny_qwen2(), tiny_qwen2()
    report = prune(model, batches(), Recipe(**METRIC))
    decoder = Decoder(model)
    heads, half = decoder.heads, decoder.heads.dim // 2
    narrowed = [index for index, shape in enumerate(decoder.shapes()) if shape.pairs]
    assert narrowed and report.sparsity_reached == pytest.approx(0.05, abs=0.01)
    assert [each.name for each in report.layers] == [decoder.name(index, "self_attn.q_proj") for index in narrowed]
    for index, each in zip(narrowed, report.layers, strict=True):
        pairs = decoder.kept_pairs(index)
        assert pairs is not None
        assert each.kept == pairs.numel() and each.units == heads.kv * half and 0 < each.relative_error < 1
        # Keys lose rows only; rows of queries take over for those that went.
        for path, group in (("k_proj", 1), ("q_proj", heads.group)):
            rows = [
                head * heads.dim + part + pair
                for head in range(heads.kv * group)
                for part in (0, half)
                for pair in pairs[head // group].tolist()
            ]
            was, now = (each.model.layers[index].self_attn.get_submodule(path) for each in (dense, model))
            assert torch.allclose(now.weight, was.weight[rows], rtol=0, atol=1e-6) == (path == "k_proj")
            assert torch.allclose(now.bias, was.bias[rows], rtol=0, atol=1e-6) == (path == "k_proj")


@pytest.mark.parametrize("propagation", ["dense", "pruned"])
def test_every_way_gives_the_same_bytes(propagation: str, tmp_path: Path) -> None:
    recipe = Recipe(**{**METRIC, "units": "rotated-all-qk", "sparsity": 0.3, "propagation": propagation})
    check_every_way_gives_the_same("qwen2", recipe, tmp_path, shared=propagation == "dense", num_hidden_layers=3)


def test_a_pruned_folder_is_pruned_again_in_every_way(tmp_path: Path) -> None:
    """Where blocks that lack pairs are read from files, one at a time."""
    model = tiny_llama()
    prune(model, batches(), Recipe(**METRIC))
    save_model(model, tmp_path / "first")
    whole, streamed = load_model(tmp_path / "first", device="cpu"), open_model(tmp_path / "first")
    again = Recipe(**{**METRIC, "units": "rotated-all-qk", "sparsity": 0.3, "propagation": "intra"})
    report = prune(whole.model, batches(), again)
    assert any(change.before.pairs for change in report.blocks)
    assert report.sparsity_reached == pytest.approx(0.3, abs=0.02)
    prune(streamed.model, batches(), again, store=streamed.store)
    save_model(streamed, tmp_path / "second")
    found = load_model(tmp_path / "second", device="cpu").model.state_dict()
    assert found.keys() == whole.model.state_dict().keys()
    assert all(torch.equal(value, found[name]) for name, value in whole.model.state_dict().items())


def test_processes_that_share_batches_give_the_same_bytes() -> None:
    """Where queries have other numbers of outputs and inputs."""
    one, models = tiny_llama(head_dim=32), dict[int, PreTrainedModel]()
    recipe = Recipe(**METRIC)
    prune(one, batches(), recipe, partial_sums=PartialSums(4))

    def shared(peers: ThreadPeers) -> None:
        models[peers.rank] = tiny_llama(head_dim=32)
        prune(models[peers.rank], batches(), recipe, partial_sums=PartialSums(4, peers))

    together(2, shared)
    assert any("kept_pairs" in name for name in one.state_dict())
    for model in models.values():
        assert model.state_dict().keys() == one.state_dict().keys()
        assert all(torch.equal(value, one.state_dict()[name]) for name, value in model.state_dict().items())


def test_recovery_refits_the_values_of_heads_without_some_pairs() -> None:
    model = tiny_llama()
    fields = {"units": "rotated-all-qk", "sparsity": 0.4, "refit": {"held_out": 0.25, "recovery": 1}}
    report = prune(model, batches(), Recipe(**{**METRIC, **fields}))
    assert any(change.after.pairs for change in report.blocks)
    assert any(part.name.endswith("self_attn") for part in report.recovered)


def test_an_audit_knows_the_original_and_the_page_lists_the_pairs(tmp_path: Path) -> None:
    loaded, recipe = load_model(save_tiny(tiny_llama(), tmp_path / "dense"), device="cpu"), Recipe(**METRIC)
    report = prune(loaded.model, batches(), recipe)
    save_model(loaded, tmp_path / "out", report=report, recipe=recipe)
    decoder = load_model(tmp_path / "out", device="cpu").decoder()
    original = original_from_report(decoder, str(tmp_path / "out"))
    assert original is not None and not any(shape.pairs for shape in original.shapes)
    [before, after] = (open_stored(str(tmp_path / name)) for name in ("dense", "out"))
    assert config_faults(before, after) == []
    assert config_faults(after, before)
    [pairs] = [each for each in widths(report) if "pairs" in each.name]
    kept = [float(change.after.pairs or 8) for change in report.blocks]
    assert pairs.before == (8.0, 8.0) and list(pairs.after) == kept and pairs.changed
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| rotary pairs of a head of queries and keys | all |" in card


def test_pairs_share_a_budget_with_values_and_mlp_units() -> None:
    model = tiny_llama()
    report = prune(model, batches(), Recipe(**{**METRIC, "units": "rotated-all-qk", "sparsity": 0.4}))
    after = [change.after for change in report.blocks]
    whole = report.blocks[0].before
    for field in ("mlp_width", "value_dim", "pairs"):
        assert any(getattr(shape, field) not in (0, getattr(whole, field)) for shape in after), field
    assert report.sparsity_reached == pytest.approx(0.4, abs=0.02)


def test_pairs_of_a_removed_attention_save_nothing_more() -> None:
    """Where sub-blocks may go whole, the budget is met all the same."""
    model = tiny_llama(num_hidden_layers=4)
    fields = {**METRIC, "units": "rotated-all-qk", "allocation.least": 0.0, "sparsity": 0.8}
    report = prune(model, batches(), Recipe(**fields))
    assert any(not change.after.kv_heads for change in report.blocks)
    assert report.sparsity_reached >= 0.79


@pytest.mark.parametrize("name", ["opt", "qwen3"])
def test_other_families_keep_their_queries_and_keys(name: str) -> None:
    with pytest.raises(InputError, match=rf"units qk remove rotary pairs .* but a {name} model needs whole heads"):
        prune(ALL_MODELS[name](), batches(), Recipe(**METRIC))
    fields = {**METRIC, "sparsity": 0.2}
    both = [ALL_MODELS[name]() for _ in range(2)]
    for model, units in zip(both, ("rotated-all", "rotated-all-qk"), strict=True):
        prune(model, batches(), Recipe(**{**fields, "units": units}))
    assert torch.equal(logits(both[0]), logits(both[1]))


def test_refusals_say_what_to_do() -> None:
    for metric in ("none", "diagonal"):
        with pytest.raises(InputError, match=r"^units qk need a full output metric, .*: set metric to full$"):
            prune(tiny_llama(), batches(), Recipe(**{**METRIC, "metric": metric}))
    decoder = Decoder(tiny_llama())
    shapes = [BlockAllocation(UNITS["qk"].within(decoder).with_count(shape, 6)) for shape in decoder.shapes()]
    given = Allocation.of(decoder, shapes)
    with pytest.raises(InputError, match=r"removes pairs of queries and keys in block 0: use a recipe with units qk"):
        prune(tiny_llama(), batches(), Recipe(units="all"), allocation=given)
    both = [BlockAllocation(replace(each.shape, kv_heads=1)) for each in shapes]
    with pytest.raises(InputError, match=r"removes KV heads and pairs of block 0: choose one of the two"):
        Allocation.of(decoder, both)
    with pytest.raises(InputError, match=r"keeps pairs 9 in block 0, which has 8"):
        Allocation.of(decoder, [BlockAllocation(replace(shape, pairs=9)) for shape in decoder.shapes()])


def test_an_allocation_lists_pairs_and_is_read_again() -> None:
    decoder = Decoder(tiny_llama())
    shapes = [BlockAllocation(UNITS["qk"].within(decoder).with_count(shape, 6)) for shape in decoder.shapes()]
    given = Allocation.from_json(Allocation.of(decoder, shapes).to_json())
    model = tiny_llama()
    report = prune(model, batches(), Recipe(**{**METRIC, "allocation": "uniform"}), allocation=given)
    assert {change.after.pairs for change in report.blocks} == {6}
    assert report.sparsity_reached == pytest.approx(given.sparsity)
    assert "pairs by block: all 6" in Allocation.of(decoder, [BlockAllocation(decoder.shape(0)), shapes[1]]).lines()


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_a_gguf_file_has_rows_of_zeros(name: str, tmp_path: Path) -> None:
    """llama.cpp computes the same model from whole heads."""
    model = ALL_MODELS[name](num_hidden_layers=3).eval()
    decoder = Decoder(model)
    for block in (0, 2):
        remove(decoder, block, some(decoder.heads.kv, decoder.heads.dim // 2))
    decoder.record_shapes()
    folder = saved(model, tmp_path / "model")
    file = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32")).path
    with torch.no_grad():
        answer = model(input_ids=WRITTEN[None]).logits[0, -1].double().log_softmax(-1)
    assert apart(file, answer, WRITTEN) < 1e-3


def test_healing_leaves_the_list_of_pairs() -> None:
    model, dense = tiny_llama(), tiny_llama()
    prune(model, batches(), Recipe(**METRIC))
    before = {name: buffer.clone() for name, buffer in model.named_buffers() if "pairs" in name}
    weights = copy.deepcopy(dict(model.named_parameters()))
    heal(model, dense, batches(), held_out=torch.randint(5, 500, (2, 48), generator=torch.Generator().manual_seed(9)))
    Decoder(model).joined()
    after = {name: buffer for name, buffer in model.named_buffers() if "pairs" in name}
    assert before.keys() == after.keys() and before
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(buffer.dtype == torch.int64 for buffer in after.values())
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(dict(model.named_parameters())[name], weights[name])


def test_a_head_keeps_at_least_one_step_of_pairs() -> None:
    model = tiny_llama()
    with pytest.raises(InputError, match="out of reach with units 'qk'"):
        prune(tiny_llama(), batches(), Recipe(**{**METRIC, "sparsity": 0.3}))
    report = prune(model, batches(), Recipe(**{**METRIC, "allocation.least": 0.0, "sparsity": 0.145}))
    assert {change.after.pairs for change in report.blocks} == {1}
    assert torch.isfinite(logits(model)).all()


def test_an_attention_without_some_pairs_goes_whole_by_an_allocation() -> None:
    model = tiny_llama()
    decoder = Decoder(model)
    remove(decoder, 0, some(2, 8))
    shapes = [shape.without("attention") if index == 0 else shape for index, shape in enumerate(decoder.shapes())]
    decoder.record_shapes()
    given = Allocation.of(Decoder(model), map(BlockAllocation, shapes))
    report = prune(model, batches(), Recipe(units="all"), allocation=given)
    assert report.blocks[0].after.parts == ("mlp",)


@pytest.mark.parametrize("name", ["llama", "qwen3", "opt"])
def test_equal_shares_are_fitted_to_a_runtime(name: str) -> None:
    """The shapes of a uniform allocation are those of the units that the family allows."""
    recipe = Recipe(units="rotated-all-qk", metric="full", sparsity=0.25)
    decoder = Decoder(ALL_MODELS[name]())
    fitted, _ = RUNTIMES["onnx"].fitted(recipe, decoder, None)
    assert fitted.units == recipe.units
