"""An output metric in a run: the recipe asks for it, every layer's problem has it, and the loss of the model gains."""

import pytest
import torch

from optprune.calibration import collect_metrics, sampled
from optprune.errors import InputError, NoSolver
from optprune.models import Decoder
from optprune.objectives import linked
from optprune.problems import SparseLeastSquares
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches

SPARSE = {"units": "weights", "sparsity": 0.5, "damping": 0.01}


def problems_of(recipe, model):
    """Prune, and return every layer's problem."""
    seen = {}

    def objective(context):
        seen[context.name] = SparseLeastSquares(context.loss, context.pattern)
        return seen[context.name]

    report = prune(model, batches(), recipe.model_copy(update={"objective": objective}))
    return seen, report


@pytest.mark.e2e
@pytest.mark.parametrize("make", TINY_MODELS.values(), ids=TINY_MODELS)
@pytest.mark.parametrize("kind", ["none", "diagonal", "full"])
def test_every_layer_has_the_metric_of_the_dense_model(kind, make):
    solver = ["admm", "conjugate_gradients"]
    tokens = {} if kind == "none" else {"metric.tokens": 100}
    recipe = Recipe({**SPARSE, "objective": "sparse", "solver": solver, "metric": kind, "seed": 7, **tokens})
    decoder = Decoder(make())
    first = [batches()[0], batches()[1][:1]]  # whole sequences, the fewest that hold 100 tokens
    expected = collect_metrics(decoder, first, sampled(7), full=decoder.architecture.layers)
    problems, report = problems_of(recipe, make())
    assert set(problems) == set(expected)
    assert report.sparsity_reached == pytest.approx(0.5, abs=1e-3)
    for name, problem in problems.items():
        if kind == "none":
            assert problem.loss.metric is None
            continue
        metric = expected[name] if kind == "full" else expected[name].only_diagonal()
        assert torch.allclose(problem.loss.metric.matrix, metric.damped(0.01).matrix, rtol=1e-5, atol=1e-12)
        assert problem.loss.metric.tokens == 144


@pytest.mark.parametrize("damping", [0.0, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_the_metric_is_damped_as_the_recipe_says(kind, damping):
    solver = ["admm", "conjugate_gradients"]
    settings = {"objective": "sparse", "solver": solver, "metric": kind, "metric.damping": damping}
    problems, _ = problems_of(Recipe({**SPARSE, **settings}), tiny_llama(num_hidden_layers=1))
    for problem in problems.values():
        metric = problem.loss.metric
        mean = float((metric.average.diagonal() if kind == "full" else metric.average).mean())
        assert mean > 0
        # A product in float32.
        assert metric.damping.tolist() == pytest.approx([damping * mean] * metric.width, rel=1e-6)


def test_gradients_are_clipped_as_the_recipe_says():
    settings = {"objective": "sparse", "solver": ["admm", "conjugate_gradients"], "metric": "full", "seed": 7}
    decoder = Decoder(tiny_llama(num_hidden_layers=1))
    expected = collect_metrics(decoder, batches(), sampled(7), full=decoder.architecture.layers, clip=0.5)
    problems, _ = problems_of(Recipe({**SPARSE, **settings, "metric.clip": 0.5}), tiny_llama(num_hidden_layers=1))
    plain, _ = problems_of(Recipe({**SPARSE, **settings}), tiny_llama(num_hidden_layers=1))
    for name, problem in problems.items():
        metric = problem.loss.metric
        assert torch.allclose(metric.average, expected[name].average, rtol=1e-5, atol=1e-12)
        assert metric.average.trace() < plain[name].loss.metric.average.trace()


def test_a_solver_that_cannot_couple_rows_says_so():
    recipe = load_recipe("alps_plus", {"metric": "full"})
    with pytest.raises(NoSolver, match="take its diagonal"):
        prune(tiny_llama(), batches(), recipe)


@pytest.mark.parametrize("kind", ["diagonal", "full"])
def test_units_are_pruned_under_the_metric_of_the_dense_model(kind):
    seen = {}

    def objective(context):
        seen[context.name] = context.loss.metric
        return linked(context)

    recipe = Recipe({"units": "all", "metric": kind, "seed": 7})
    decoder = Decoder(tiny_llama())
    expected = collect_metrics(decoder, batches(), sampled(7), full=decoder.architecture.layers)
    report = prune(tiny_llama(), batches(), recipe.model_copy(update={"objective": objective}))
    assert {name.split(".")[-1] for name in seen} == {"o_proj", "down_proj"}
    for name, metric in seen.items():
        assert metric.full == (kind == "full")
        whole = expected[name] if metric.full else expected[name].only_diagonal()
        assert torch.allclose(metric.matrix, whole.damped(0.01).matrix, rtol=1e-5, atol=1e-12)
    assert all(layer.relative_error < 1 for layer in report.layers)


@pytest.mark.e2e
def test_layers_wider_than_the_recipe_says_get_the_diagonal_and_a_note():
    model = tiny_llama()
    widths = {path: Decoder(model).layer(0, path).out_features for path in Decoder(model).architecture.layers}
    limit = min(widths.values())
    recipe = Recipe({**SPARSE, "metric": "full", "metric.width": limit})
    problems, report = problems_of(recipe, model)
    for name, problem in problems.items():
        path = name.split(".", 3)[-1]
        assert problem.loss.metric.full == (widths[path] <= limit)
    wider = [path for path, width in widths.items() if width > limit]
    assert wider
    assert any(", ".join(wider) in note and "metric.width" in note for note in report.notes)
    _, whole = problems_of(Recipe(recipe.to_dict(), {"metric.width": max(widths.values())}), tiny_llama())
    assert not any("metric.width" in note for note in whole.notes)


def test_bad_fields_are_refused():
    with pytest.raises(InputError, match="metric"):
        Recipe({"metric": "fisher"})
    with pytest.raises(InputError, match=r"metric\.damping"):
        Recipe({"metric.damping": -1})
    with pytest.raises(InputError, match=r"metric\.width"):
        Recipe({"metric.width": 0})
    with pytest.raises(InputError, match=r"metric\.clip"):
        Recipe({"metric.clip": 0})
