"""One budget over the whole model: it is met, within the limits, and no other division of it loses less."""

from itertools import product

import pytest
import torch
from torch import Tensor

from optprune.calibration import calibrating, collect_metrics, first_inputs, sampled
from optprune.calibration.moments_pass import collect
from optprune.errors import InputError, NoSolver, NumericalError, StrictError
from optprune.metric import OutputMetric
from optprune.models import Decoder, Mlp
from optprune.problems import LayerLoss, StructuredLeastSquares
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.solvers import GreedyObs, solve
from tests.helpers.divided import divided
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama
from tests.helpers.token_batches import batches


def metrics_of(decoder: Decoder) -> dict[str, OutputMetric]:
    return {name: metric.damped(0.01) for name, metric in collect_metrics(decoder, batches(), sampled(0)).items()}


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_shares_of_weights_meet_the_budget_within_the_limits(name: str, sparsity: float) -> None:
    decoder = Decoder(TINY_MODELS[name]())
    allocation = divided(decoder, load_recipe("sparse_best", {"sparsity": sparsity}), metrics_of(decoder))
    assert allocation.sparsity == pytest.approx(sparsity, abs=1e-4)
    shares = [share for block in allocation.blocks for share in block.shares.values()]
    assert len(shares) == len(decoder.blocks) * len(decoder.architecture.layers)
    most = max(0.8, 1 - sparsity / 2)
    assert all(0.2 - 1e-3 <= share <= most + 1e-3 for share in shares)
    assert max(shares) - min(shares) > 0.02


def test_a_layer_whose_outputs_matter_more_keeps_more() -> None:
    decoder = Decoder(tiny_llama())
    metrics = metrics_of(decoder)
    name = decoder.name(1, "mlp.up_proj")
    plain = divided(decoder, load_recipe("sparse_best"), metrics)
    dear = metrics[name]
    metrics[name] = OutputMetric(4 * dear.average, 4 * dear.damping, dear.tokens)
    weighed = divided(decoder, load_recipe("sparse_best"), metrics)
    assert weighed.blocks[1].share("mlp.up_proj") > plain.blocks[1].share("mlp.up_proj") + 0.05
    assert weighed.sparsity == pytest.approx(plain.sparsity, abs=1e-4)


def losses(decoder: Decoder, metrics: dict[str, OutputMetric], counts: list[int]) -> list[dict[int, float]]:
    """By literal greedy solves: the loss of each block's MLP at every width."""
    found = []
    path = decoder.architecture.mlp_consumer
    with calibrating(decoder):
        stream = first_inputs(decoder, batches())
        for index, block in enumerate(decoder.blocks):
            following = stream.copy()
            moments = collect(block, stream, [path], output=following).moments[path]
            stream = following
            layer = decoder.layer(index, path)
            loss = LayerLoss.of(layer.weight, moments, 0.01, metric=metrics[decoder.name(index, path)])
            channels = Mlp().layers(decoder, index)[0].channels
            solver = GreedyObs(batch=16)
            found.append({n: solve(StructuredLeastSquares(loss, channels, n), solver).objective for n in counts})
    return found


def test_no_other_widths_lose_less() -> None:
    decoder = Decoder(tiny_llama())
    metrics = metrics_of(decoder)
    settings = {"units": "mlp", "sparsity": 0.3, "allocation.multiple": 16, "allocation.least": 0.1}
    allocation = divided(decoder, load_recipe("structured_best", settings), metrics)
    widths = tuple(block.shape.mlp_width for block in allocation.blocks)
    counts = list(range(16, 129, 16))
    by_block = losses(decoder, metrics, counts)
    total = sum(losses[width] for losses, width in zip(by_block, widths, strict=True))
    rivals = {
        pair: sum(losses[width] for losses, width in zip(by_block, pair, strict=True))
        for pair in product(counts, repeat=2)
        if sum(pair) <= sum(widths)
    }
    # Greedy solves in batches and one long elimination may differ in the last of a batch.
    assert total <= min(rivals.values()) * (1 + 1e-3)
    per_unit = 3 * 64
    removed = sum(128 - width for width in widths) * per_unit / decoder.linear_weights()
    assert 0.3 <= removed <= 0.3 + 16 * per_unit / decoder.linear_weights()


@pytest.mark.parametrize("units", ["vo", "kv-groups", "all"])
def test_widths_of_every_kind_of_unit_meet_the_budget(units: str) -> None:
    decoder = Decoder(tiny_llama(num_hidden_layers=3))
    sparsity = {"vo": 0.05, "kv-groups": 0.06, "all": 0.3}[units]
    settings = {"units": units, "sparsity": sparsity, "allocation.least": 0.3}
    allocation = divided(decoder, load_recipe("structured_best", settings), metrics_of(decoder))
    assert allocation.sparsity >= sparsity
    assert allocation.sparsity <= sparsity + 0.1


def test_some_layers_stay_dense_under_an_n_m_pattern() -> None:
    model = tiny_llama()
    recipe = load_recipe("sparse_best", {"units.weights": "2:4", "sparsity": 0.3})
    report = prune(model, batches(), recipe)
    shares = [share for block in report.allocation["blocks"] for share in block["shares"].values()]
    assert set(shares) == {0.5, 1.0}
    assert 0.3 <= report.sparsity_reached < 0.5
    assert len(report.layers) == shares.count(0.5)


@pytest.mark.parametrize("recipe", ["sparse_best", "structured_best", "structured_uniform_best"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_recommended_recipes_run_on_every_architecture(name: str, recipe: str) -> None:
    model = TINY_MODELS[name]()
    report = prune(model, batches(), load_recipe(recipe, {"sparsity": 0.2}))
    assert report.sparsity_reached == pytest.approx(0.2, abs=0.03)
    ids = torch.arange(5, 25)[None]
    logits: Tensor = model(input_ids=ids).logits
    assert bool(torch.isfinite(logits).all())


def test_a_budget_out_of_reach_is_an_input_error() -> None:
    with pytest.raises(InputError, match=r"out of reach with units 'mlp' and allocation\.least 0\.45"):
        divided(Decoder(tiny_llama()), load_recipe("structured_best", {"units": "mlp", "sparsity": 0.7}))
    with pytest.raises(InputError, match=r"2:4 has a sparsity of 0\.5"):
        Recipe({"units": "weights", "units.weights": "2:4", "sparsity": 0.6, "allocation": "global"})


def test_a_budget_divided_without_a_metric_gives_a_note() -> None:
    settings = {"metric": "none", "sparsity": 0.2, "allocation.probe_tokens": 0}
    report = prune(tiny_llama(), batches(), load_recipe("structured_best", settings))
    assert any("do not compare between layers" in note for note in report.notes)
    report = prune(tiny_llama(), batches(), load_recipe("structured_best", {"sparsity": 0.2}))
    assert not any("do not compare between layers" in note for note in report.notes)
    with pytest.raises(StrictError, match="set metric to diagonal"):
        prune(tiny_llama(), batches(), load_recipe("structured_best", {**settings, "strict": True}))


def test_the_budget_of_a_pattern_is_filled() -> None:
    decoder = Decoder(tiny_llama())
    recipe = load_recipe("sparse_best", {"units.weights": "2:4", "sparsity": 0.3})
    allocation = divided(decoder, recipe, metrics_of(decoder))
    left = (allocation.sparsity - 0.3) * decoder.linear_weights()
    thinned = [
        decoder.layer(index, path).weight.numel() / 2
        for index, block in enumerate(allocation.blocks)
        for path, share in block.shares.items()
        if share < 1
    ]
    assert 0 <= left < min(thinned)


@pytest.mark.parametrize("recipe", ["sparse_best", "structured_best"])
def test_something_is_left_where_nothing_seems_to_matter(recipe: str) -> None:
    """With a least share of 0: a layer that no output depends on, and attention that costs nothing anywhere."""
    model = tiny_llama()
    for block in model.model.layers:
        if recipe == "sparse_best":
            block.mlp.down_proj.weight.data.zero_()
        else:
            block.self_attn.o_proj.weight.data.zero_()
    report = prune(model, batches(), load_recipe(recipe, {"allocation.least": 0.0, "sparsity": 0.3}))
    assert report.sparsity_reached >= 0.3 - 1e-3
    assert any(block["kv_heads"] for block in report.allocation["blocks"])
    assert all(share > 0 for block in report.allocation["blocks"] for share in block.get("shares", {}).values())


def test_a_gram_matrix_that_must_be_damped_gives_a_warning() -> None:
    few = batches()[0][:1, :20]
    settings = {"damping": 0.0, "units": "mlp", "sparsity": 0.2, "refit": "none"}
    report = prune(tiny_llama(), few, load_recipe("structured_best", settings))
    assert any("layers.0.mlp.down_proj" in note for note in report.notes)
    with pytest.raises(StrictError, match=r"layers\.0\.mlp\.down_proj"):
        prune(tiny_llama(), few, load_recipe("structured_best", {**settings, "strict": True}))
    with pytest.raises(NumericalError, match=r"layers\.0\.self_attn\.q_proj"):
        prune(tiny_llama(), few, load_recipe("sparse_best", {"damping": 0.0}))


@pytest.mark.parametrize(
    ("recipe", "settings", "error", "reason"),
    [
        ("structured_best", {"units": "mlp", "sparsity": 0.55}, InputError, "allocation.least 0.45: at most 33.3%"),
        (
            "structured_best",
            {"units": "all", "sparsity": 0.6, "allocation.currency": "flops"},
            InputError,
            "of the blocks' oper",
        ),
        ("structured_uniform_best", {"refit.held_out": 0.9}, InputError, "leaves none for calibration"),
        ("sparsegpt", {"metric": "full"}, NoSolver, "take its diagonal"),
        ("sparse_best", {"solver": ["admm", "restore"]}, NoSolver, "ConjugateGradients"),
        ("fasp", {"solver": "sparsegpt", "metric": "diagonal"}, NoSolver, "accepts sparse least squares"),
    ],
)
def test_what_shapes_tell_is_refused_before_a_pass_over_the_text(
    recipe: str, settings: dict, error: type[Exception], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_pass(*_: object, **__: object) -> None:
        raise AssertionError("a pass over the text")

    monkeypatch.setattr("optprune.calibration.dense_statistics.collect_metrics", no_pass)
    for module in ("pruning.run", "allocation.by_cost"):
        monkeypatch.setattr(f"optprune.{module}.first_inputs", no_pass)
    with pytest.raises(error, match=reason):
        prune(tiny_llama(), batches()[0][:1], load_recipe(recipe, settings))
