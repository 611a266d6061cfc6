"""What shipped recipes do is what their papers do: which structure, which biases, which start, which policy."""

import copy

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, OPTConfig, PretrainedConfig

from benchmarks.studies import digest
from optprune.allocation.uniform import uniform
from optprune.calibration import POLICIES, calibrating, first_inputs
from optprune.calibration.moments_pass import collect
from optprune.errors import StrictError
from optprune.models import UNITS, BlockShape, Decoder, Mlp, Values
from optprune.moments import InputMoments
from optprune.patterns import RowWise, Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.solvers import Answer, DirectSolver, SparseGpt, Wanda, solve
from optprune.work import Work
from tests.helpers.tiny_models import tiny_llama, tiny_opt
from tests.helpers.token_batches import batches

LLAMA_7B = LlamaConfig(hidden_size=4096, intermediate_size=11008, num_attention_heads=32, num_hidden_layers=2)
SMOLLM2 = LlamaConfig(
    hidden_size=576, intermediate_size=1536, num_attention_heads=9, num_key_value_heads=3, num_hidden_layers=2
)
OPT_3B = OPTConfig(
    hidden_size=2560, ffn_dim=10240, word_embed_proj_dim=2560, num_attention_heads=32, num_hidden_layers=2
)


def shapes_only(config: PretrainedConfig) -> Decoder:
    config.vocab_size = 64
    with torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(config))


# -- FASP's structure


def test_fasp_prunes_value_dimensions_and_mlp_units() -> None:
    model = tiny_llama()
    dense = Decoder(model).shape(0)
    report = prune(model, batches(), load_recipe("fasp", {"sparsity": 0.2}))
    shape = Decoder(model).shape(0)
    assert shape.value_dim < dense.value_dim and shape.mlp_width < dense.mlp_width and shape.kv_heads == dense.kv_heads
    assert {layer.name.split(".")[-1] for layer in report.layers} == {"o_proj", "down_proj"}


def test_spap_alternates_over_the_matrices_of_the_mlp() -> None:
    report = prune(tiny_llama(), batches(), load_recipe("spap", {"sparsity": 0.2}))
    assert [tuple(path.split(".")[-1] for path in part.layers) for part in report.recovered] == [
        ("up_proj", "down_proj")
    ] * len(report.recovered)
    assert len(report.recovered) == len(report.layers)
    assert sum(part.steps for part in report.recovered) > 0


def test_where_the_rows_cannot_be_refitted_spap_says_so() -> None:
    report = prune(tiny_opt(), batches(), load_recipe("spap", {"sparsity": 0.2}))
    assert not report.recovered and any("recovery has nothing to refit" in note for note in report.notes)
    with pytest.raises(StrictError, match="recovery has nothing to refit"):
        prune(tiny_opt(), batches(), load_recipe("spap", {"sparsity": 0.2, "strict": True}))


@pytest.mark.parametrize(
    ("config", "multiple", "value_dims"),
    [(LLAMA_7B, 64, (112, 96, 80)), (SMOLLM2, 32, (56, 48, 40)), (OPT_3B, 64, (64, 64, 48))],
    ids=["LLaMA-7B", "SmolLM2", "OPT-2.7B"],
)
def test_widths_are_multiples_and_meet_the_budget(
    config: PretrainedConfig, multiple: int, value_dims: tuple[int]
) -> None:
    decoder = shapes_only(config)
    one = decoder.weights_of(BlockShape(multiple, 1, 1)) - decoder.weights_of(BlockShape(0, 1, 1))
    for sparsity, value_dim in zip((0.1, 0.2, 0.3), value_dims, strict=True):
        recipe = load_recipe("fasp", {"sparsity": sparsity})
        allocation = uniform(decoder, sparsity, recipe.units, recipe.allocation.multiple)
        shape = allocation.blocks[0].shape
        assert shape.value_dim == value_dim and shape.mlp_width % multiple == 0
        # Half a step of the MLP width, rounded last, in every block.
        assert abs(allocation.sparsity - sparsity) <= one * len(decoder.blocks) / 2 / decoder.linear_weights()


def test_the_width_alone_says_what_a_default_width_is_a_multiple_of() -> None:
    for width, multiple in ((511, 8), (512, 32), (4095, 32), (4096, 64), (14336, 64)):
        assert Mlp().multiple(BlockShape(width, 8, 128), None) == multiple
        assert Mlp().multiple(BlockShape(width, 8, 128), 16) == 16
    assert Values().multiple(BlockShape(14336, 8, 128), None) == 16


def test_a_small_head_loses_value_dimensions_at_ten_percent_as_well() -> None:
    small = LlamaConfig(hidden_size=128, intermediate_size=384, num_attention_heads=4, num_hidden_layers=2)
    shape = uniform(shapes_only(small), 0.1, UNITS["all"], 8).blocks[0].shape
    assert shape.value_dim == 28 and shape.mlp_width % 8 == 0


def test_a_width_multiple_of_one_cuts_value_dimensions_one_by_one() -> None:
    assert uniform(shapes_only(LLAMA_7B), 0.2, UNITS["all"], 1).blocks[0].shape.value_dim == 97


# -- biases


@pytest.mark.parametrize("settings", [{}, {"units": "mlp", "sparsity": 0.3}], ids=["weights", "units"])
@pytest.mark.parametrize("name", ["magnitude", "wanda", "random", "sparsegpt"])
def test_a_baseline_that_restores_nothing_leaves_biases_alone(name: str, settings: dict) -> None:
    if settings and name in ("wanda", "sparsegpt"):
        return  # of single weights only
    dense = tiny_opt()
    model = copy.deepcopy(dense)
    report = prune(model, batches(), load_recipe(name, settings))
    assert report.recipe["fit_bias"] is False
    for key, before in dense.state_dict().items():
        after = model.state_dict()[key]
        if settings and ("fc1" in key or key.endswith("fc2.weight")):
            continue  # whole rows and columns are gone
        if key.endswith("bias"):
            assert torch.equal(after, before)
        elif name != "sparsegpt" and ".layers." in key:
            assert torch.equal(after, torch.where(after != 0, before, 0.0))


def test_sparsegpt_sees_the_gram_matrix_that_is_not_centred() -> None:
    dense = tiny_opt()
    model, decoder = copy.deepcopy(dense), Decoder(dense)
    prune(model, batches(), load_recipe("sparsegpt"))
    with calibrating(decoder):
        moments = collect(decoder.blocks[0], first_inputs(decoder, batches()), ["fc1"]).moments["fc1"]
    weight = decoder.layer(0, "fc1").weight
    gram = (moments.covariance + torch.outer(moments.mean, moments.mean)).double()
    # The same second moments about a mean of zero.
    plain = InputMoments(gram.float(), torch.zeros_like(moments.mean), moments.tokens)
    problem = SparseLeastSquares(LayerLoss.of(weight, plain, 0.01), Unstructured(weight.numel() // 2))
    expected = solve(problem, SparseGpt()).value
    found = Decoder(model).layer(0, "fc1").weight
    assert torch.equal(found != 0, expected != 0)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


@pytest.mark.parametrize("name", ["flap", "fasp"])
def test_a_recipe_that_fits_biases_says_so(name: str) -> None:
    dense = tiny_opt()
    model = copy.deepcopy(dense)
    report = prune(model, batches(), load_recipe(name, {"sparsity": 0.2}))
    assert report.recipe["fit_bias"] is True
    assert not torch.equal(model.model.decoder.layers[0].fc2.bias, dense.model.decoder.layers[0].fc2.bias)
    without = copy.deepcopy(dense)
    prune(without, batches(), load_recipe(name, {"sparsity": 0.2, "fit_bias": False}))
    assert torch.equal(without.model.decoder.layers[0].fc2.bias, dense.model.decoder.layers[0].fc2.bias)


def test_a_probe_of_a_recipe_that_fits_no_bias_changes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LayerLoss, "bias_change", lambda *_: pytest.fail("a bias was fitted"))
    settings = {"allocation.probe_tokens": 96, "fit_bias": False, "metric.tokens": 96, "sparsity": 0.2}
    prune(tiny_opt(), batches(), load_recipe("structured_best", settings))


# -- FISTAPruner's starts


def test_fistapruner_starts_from_wanda_as_well() -> None:
    ours, theirs = load_recipe("fistapruner"), load_recipe("fistapruner_wanda")
    assert (ours.to_dict()["solver"], theirs.to_dict()["solver"]) == (
        ["sparsegpt", "fistapruner"],
        [{"wanda": {"by_row": True}}, "fistapruner"],
    )
    same = ours.model_dump(exclude={"name", "summary", "source", "solver"})
    assert same == theirs.model_dump(exclude={"name", "summary", "source", "solver"})


@pytest.mark.parametrize("keep", [96, 97, 98, 99])
def test_wanda_by_row_is_wanda_under_a_pattern_over_the_matrix(keep: int) -> None:
    generator = torch.Generator().manual_seed(keep)
    weight = torch.randn(12, 16, generator=generator) * torch.arange(1, 13)[:, None]
    weight[:, 5] = weight[:, 4]  # ties
    inputs = torch.randn(64, 16, generator=generator)
    inputs[:, 5] = inputs[:, 4]
    loss = LayerLoss.of(weight, InputMoments.from_samples(inputs))
    found = solve(SparseLeastSquares(loss, Unstructured(keep)), Wanda(by_row=True)).value
    fewer = solve(SparseLeastSquares(loss, RowWise(keep // 12)), Wanda()).value
    more = solve(SparseLeastSquares(loss, RowWise(-(-keep // 12))), Wanda()).value
    assert int((found != 0).sum()) == keep
    assert bool(((fewer != 0) <= (found != 0)).all() and ((found != 0) <= (more != 0)).all())


# -- the propagation policy


@pytest.mark.parametrize("settings", [{}, {"units.weights": "2:4"}, {"bits": "q4_0"}], ids=str)
def test_sparse_best_corrects_for_half_of_the_drift_whatever_is_pruned(settings: dict) -> None:
    recipe = load_recipe("sparse_best", settings)
    assert recipe.propagation is POLICIES["partial"]
    assert Recipe(recipe.to_dict()) == recipe
    assert load_recipe("sparse_best", {**settings, "propagation": "cross"}).propagation is POLICIES["cross"]


def test_structured_best_corrects_for_half_of_the_drift() -> None:
    assert load_recipe("structured_best").propagation is POLICIES["partial"]


def test_policies_default_to_pruned() -> None:
    assert Recipe(units={"weights": "2:4"}, sparsity=0.5).propagation is POLICIES["pruned"]


# -- the digest of a benchmark's row


def test_a_digest_sees_what_is_done_and_not_how_it_is_said() -> None:
    def of(recipe: str, **settings: object) -> str:
        return digest(recipe, {"sparsity": 0.5, **settings}, 8192)

    assert of("sparse_best") == of("sparse_best", propagation="partial") != of("sparse_best", propagation="pruned")
    assert of("sparse_best") == of("sparse_best", fit_bias=True) != of("sparse_best", fit_bias=False)
    assert of("fasp", units="mlp") != of("fasp")


def test_the_summary_of_a_recipe_that_was_changed_says_so() -> None:
    shipped = load_recipe("fasp")
    assert "value dimensions" in shipped.summary
    assert load_recipe("fasp", {"sparsity": 0.3, "seed": 2}).summary == shipped.summary
    changed = load_recipe("fasp", {"units": "mlp", "allocation": "uniform"})
    assert changed.summary == f"{shipped.summary} (changed here: units mlp)"
    assert load_recipe("structured_best", {"allocation": "uniform"}).summary.endswith(
        "(changed here: allocation uniform)"
    )
    assert load_recipe("fasp", {"units": "mlp", "summary": "mine"}).summary == "mine"


def test_an_own_solver_without_options_need_not_be_a_dataclass() -> None:
    class Largest(DirectSolver[SparseLeastSquares]):
        accepts = (SparseLeastSquares,)

        def answer(self, problem: SparseLeastSquares, start: torch.Tensor) -> Answer:
            return Answer(start)

        def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
            return Work()

    assert Recipe(solver=Largest(), units="weights", sparsity=0.5).to_dict()["solver"] == "Largest"
