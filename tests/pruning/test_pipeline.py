"""The pipeline: what each propagation policy sees, what is written back, and what the report says."""

import copy
import gc
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from optprune.allocation.uniform import uniform
from optprune.calibration import POLICIES
from optprune.errors import InputError, NoSolver, NumericalError, OwnCodeError, StrictError
from optprune.models import UNITS, Decoder, Mlp
from optprune.moments import InputMoments
from optprune.objectives import LayerContext, Objective, linked
from optprune.problems import LayerLoss, MaskedLeastSquares, Problem, StructuredLeastSquares
from optprune.pruning import prune
from optprune.recipe import Recipe, load_recipe
from optprune.report import BlockFinished, BlockStarted, Event, LayerSolved, PhaseFinished, PhaseStarted
from optprune.solvers import Answer, Chain, DirectSolver, FaspMetric, Restore, Solver
from optprune.work import Work
from tests.helpers.layer_inputs import inputs_of
from tests.helpers.recipes import ANY_MODEL
from tests.helpers.tiny_models import TINY_MODELS, tiny_llama, tiny_opt, tiny_sliding
from tests.helpers.token_batches import batches

STAGES = {"mlp": 1, "vo": 1, "all": 2, "weights": 7}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("make", [*TINY_MODELS.values(), tiny_sliding], ids=[*TINY_MODELS, "sliding window"])
def test_a_policy_sees_the_inputs_it_promises(make: Callable[[], PreTrainedModel], policy: str) -> None:
    """Moments at every layer against those of whole models, run from the embeddings without our block runner."""
    dense = make()
    model = copy.deepcopy(dense)
    promise = POLICIES[policy]
    seen: dict[str, InputMoments] = {}
    snapshots: dict[str, torch.nn.Module] = {}

    def objective(context: LayerContext) -> Problem:
        seen[context.name] = context.loss.moments
        snapshots[context.name] = copy.deepcopy(model)
        return linked(context)

    prune(model, batches(), Recipe(objective=objective, units="all", sparsity=0.3, propagation=policy))
    decoder = Decoder(dense)
    for layer, moments in seen.items():
        block = int(layer.removeprefix(decoder.architecture.blocks + ".").split(".")[0])
        # The model as it was when this layer's statistics were taken.
        at_the_time, target = copy.deepcopy(dense), copy.deepcopy(dense)
        for index in range(block + 1):
            pruned = Decoder(snapshots[layer]).blocks[index]
            if not promise.independent if index < block else promise.sequential:
                Decoder(at_the_time).blocks[index] = pruned
            if policy == "local" and index < block:
                Decoder(target).blocks[index] = pruned
        actual, ideal = inputs_of(at_the_time, layer), inputs_of(target, layer)
        if policy == "partial":
            ideal = (actual + ideal) / 2
        expected = InputMoments.from_samples(actual, ideal)
        scale = expected.gram.abs().max()
        # The model computes in float32: allow its rounding, relative to the largest entry.
        assert (moments.gram - expected.gram).abs().max() <= 1e-5 * scale
        assert moments.tokens == actual.shape[0]
        differs = bool((actual - ideal).abs().max() > 1e-6 * actual.abs().max())
        assert (moments.dense is not None) >= (promise.dense_target and differs)
        if moments.dense is not None:
            assert promise.dense_target
            assert (moments.dense.cross - expected.dense.cross).abs().max() <= 1e-5 * scale
            assert (moments.dense.gram - expected.dense.gram).abs().max() <= 1e-5 * scale


@pytest.mark.parametrize("units", ["mlp", "vo", "all"])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_the_report_tells_what_the_model_is(name: str, units: str) -> None:
    model = TINY_MODELS[name]()
    before = Decoder(model).linear_weights()
    recipe = load_recipe("fasp", {"units": units, "sparsity": 0.12, "refit.held_out": 0.25})
    report = prune(model, batches(), recipe, source="tiny")
    decoder = Decoder(model)
    assert report.sparsity_reached == 1 - decoder.linear_weights() / before
    # One step of the coarsest unit (a value dimension of every KV head) is 3.1 percent of the tiny models.
    assert abs(report.sparsity_reached - 0.12) < 0.032
    assert len(report.layers) == STAGES[units] * len(decoder.blocks)
    for layer in report.layers:
        assert 0 < layer.kept < layer.units
        assert layer.tokens == 3 * 2 * 48
        assert 0 <= layer.relative_error < 1
        assert layer.held_out_error is not None and layer.held_out_error >= 0
        assert layer.status == "converged"
        assert layer.solver == "FaspMetric > Restore"
    assert report.model == "tiny"
    assert 0 < report.floor_seconds <= report.seconds
    assert getattr(model.config, decoder.architecture.mlp_width) == Mlp().layers(decoder, 0)[0].channels.units


def test_relative_error_is_that_of_the_written_layer_on_the_calibration_text() -> None:
    """For the first block under the plain policy the inputs are those of the dense model, so it can be redone."""
    dense = tiny_opt()
    model = copy.deepcopy(dense)
    report = prune(model, batches(), load_recipe("fasp", {"units": "mlp", "sparsity": 0.2, "propagation": "pruned"}))
    name = "model.decoder.layers.0.fc2"
    old, new = dense.get_submodule(name), model.get_submodule(name)
    with torch.no_grad():
        target = inputs_of(dense, name) @ old.weight.double().T + old.bias.double()
        output = inputs_of(model, name) @ new.weight.double().T + new.bias.double()
    signal = inputs_of(dense, name) @ old.weight.detach().double().T
    # fc2 has a bias that is refitted, so the error is relative to the outputs around their mean.
    expected = (output - target).square().sum() / (signal - signal.mean(0)).square().sum()
    assert report.layers[0].relative_error == pytest.approx(float(expected), rel=1e-4)


def test_restoration_lowers_the_error_of_the_same_choice() -> None:
    def errors(*stages: Solver) -> list[float]:
        recipe = Recipe(solver=Chain(stages), sparsity=0.2, propagation="dense")
        return [layer.relative_error for layer in prune(tiny_llama(), batches(), recipe).layers]

    plain, refitted = errors(FaspMetric()), errors(FaspMetric(), Restore())
    assert all(less < more for less, more in zip(refitted, plain, strict=True))


def test_events_come_in_order() -> None:
    events: list[object] = []
    prune(tiny_llama(), batches(), load_recipe("fasp"), on_event=events.append)
    blocks = [BlockStarted, LayerSolved, LayerSolved, BlockFinished] * 2
    assert [type(event) for event in events] == [
        *[PhaseStarted, PhaseFinished] * 2,
        PhaseStarted,
        *blocks,
        PhaseFinished,
    ]


def test_training_mode_and_gradients_come_back() -> None:
    model = tiny_llama().train()
    prune(model, batches(), load_recipe("fasp"))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_batches_may_be_a_generator_of_different_lengths() -> None:
    report = prune(tiny_llama(), (torch.randint(5, 500, (1, length)) for length in (17, 64, 64)), load_recipe("fasp"))
    assert report.tokens == 17 + 64 + 64


def test_an_objective_of_the_user_runs_on_single_weights() -> None:
    def keep_the_large_ones(context: LayerContext) -> Problem:
        weight = context.loss.weight
        threshold = weight.abs().flatten().kthvalue(weight.numel() - context.keep).values
        return MaskedLeastSquares(context.loss, weight.abs() > threshold)

    model = tiny_llama()
    report = prune(model, batches(), Recipe(objective=keep_the_large_ones, units="weights", sparsity=0.5))
    assert report.sparsity_reached == pytest.approx(0.5, abs=1e-3)
    assert len(report.layers) == 14
    assert all(layer.kind == "masked least squares" and layer.gap is not None for layer in report.layers)
    assert float((model.model.layers[0].mlp.up_proj.weight == 0).float().mean()) == pytest.approx(0.5, abs=1e-3)


def test_an_objective_that_writes_into_the_weight_or_states_no_problem_is_refused() -> None:
    def writes(context: LayerContext) -> Problem:
        context.loss.weight.zero_()
        return MaskedLeastSquares(context.loss, context.loss.weight == 0)

    def states_none(context: LayerContext) -> Any:
        return None

    for objective, sentence in (
        (writes, r"the objective writes into the weight of model\.layers\.0\.\S+, which changes the model"),
        (states_none, r"what the objective returns at model\.layers\.0\.\S+ cannot be None"),
    ):
        with pytest.raises(InputError, match=sentence):
            prune(tiny_llama(), batches(), Recipe(objective=objective, units="weights", sparsity=0.5))


@pytest.mark.parametrize(
    ("layer", "sentence"),
    [
        ("mlp.up_proj", r"has a weight \[64, 64\] in torch\.float32 on cpu, but that of the layer is \[\d+, \d+\] in"),
        ("self_attn.o_proj", "is the problem of another layer: state it with context.loss"),
    ],
)
def test_a_problem_of_another_layer_is_refused_before_it_is_solved(layer: str, sentence: str) -> None:
    stated: list[Problem] = []
    asked: list[str] = []

    def objective(context: LayerContext) -> Problem:
        asked.append(context.name)
        own = MaskedLeastSquares(context.loss, context.loss.weight > 0)
        stated.append(own)
        return stated[0] if context.name.endswith(layer) else own

    with pytest.raises(InputError, match=rf"what the objective returns at model\.layers\.0\.{layer} {sentence}"):
        prune(tiny_llama(), batches(), Recipe(objective=objective, units="weights", sparsity=0.5))
    assert asked[-1].endswith(layer)


def test_an_objective_may_change_the_loss_of_its_layer() -> None:
    def damped(context: LayerContext) -> Problem:
        return MaskedLeastSquares(context.loss.damped(0.5), context.loss.weight > 0)

    report = prune(tiny_llama(), batches(), Recipe(objective=damped, units="weights", sparsity=0.5))
    assert len(report.layers) == 14


def test_an_objective_that_fails_is_a_sentence_with_its_place() -> None:
    def fails(context: LayerContext) -> Problem:
        return context.missing  # type: ignore[attr-defined]

    with pytest.raises(
        OwnCodeError, match=r"test_pipeline\.py, line \d+, raises AttributeError: 'LayerContext' object"
    ):
        prune(tiny_llama(), batches(), Recipe(objective=fails, units="weights", sparsity=0.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int64], ids=str)
def test_a_solver_with_answers_of_another_dtype_is_refused(dtype: torch.dtype) -> None:
    model = tiny_llama()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=f"the answer of Converting is {dtype} on cpu"):
        prune(model, batches(), Recipe(solver=Converting(dtype), units="weights", sparsity=0.5))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@dataclass(frozen=True)
class Converting(DirectSolver[Problem]):
    """Returns the start in another dtype."""

    dtype: torch.dtype

    def answer(self, problem: Problem, start: torch.Tensor) -> Answer:
        return Answer(start.to(self.dtype))

    def work(self, outputs: int, inputs: int, *, coupled: bool = False) -> Work:
        return Work()


@dataclass(frozen=True)
class MostEnergy:
    """An objective with a parameter."""

    power: float

    def __call__(self, context: LayerContext) -> Problem:
        return most_energy(context, self.power)


def most_energy(context: LayerContext, power: float) -> Problem:
    energy = context.loss.weight.abs().pow(power).sum(0)
    return MaskedLeastSquares(context.loss, (energy > energy.kthvalue(energy.numel() - context.keep).values)[None])


@pytest.mark.parametrize(
    ("objective", "name"),
    [
        (partial(most_energy, power=2), "functools:partial"),
        (MostEnergy(2), "tests.pruning.test_pipeline:MostEnergy"),
        (lambda context: most_energy(context, 2), "tests.pruning.test_pipeline:<lambda>"),
    ],
)
def test_any_callable_is_an_objective_but_no_code_is_imported_for_a_file(
    objective: Objective, name: str, tmp_path: Path
) -> None:
    recipe = Recipe(objective=objective, sparsity=0.1)
    assert prune(tiny_llama(), batches(), recipe).recipe["objective"] == name
    file = tmp_path / "recipe.yaml"
    file.write_text(recipe.to_yaml())
    with pytest.raises(
        InputError,
        match=rf"'objective' cannot be '{name}': a file can only name the objectives of optprune; pass your own ",
    ):
        load_recipe(str(file))
    assert load_recipe(str(file), {"objective": objective}) == recipe


def test_strict_mode_makes_a_division_by_squared_errors_an_error_before_any_block() -> None:
    settings = {"metric": "none", "allocation.probe_tokens": 0, "sparsity": 0.2}
    report = prune(tiny_llama(), batches(), load_recipe("structured_best", settings))
    assert any("by squared errors without an output metric" in note for note in report.notes)
    events: list[Event] = []
    with pytest.raises(StrictError, match="by squared errors without an output metric"):
        strict = load_recipe("structured_best", {**settings, "strict": True})
        prune(tiny_llama(), batches(), strict, on_event=events.append)
    assert not any(isinstance(event, BlockStarted) for event in events)


def test_strict_mode_makes_a_dead_input_an_error() -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[7] = 0
        model.model.decoder.layers[1].fc1.bias[7] = -1
    report = prune(copy.deepcopy(model), batches(), load_recipe("fasp"))
    assert report.layers[3].dead_inputs >= 1
    assert any("zero on every calibration token" in note for note in report.notes)
    with pytest.raises(StrictError, match="zero on every calibration token"):
        prune(model, batches(), load_recipe("fasp", {"strict": True}))


def test_a_note_of_several_layers_gives_the_range_of_their_numbers() -> None:
    model = tiny_llama()
    with torch.no_grad():
        for block, units in ((0, 5), (1, 90)):
            model.model.layers[block].mlp.up_proj.weight[:units] = 0
    report = prune(model, batches(), load_recipe("wanda"))
    single = [note for layer in report.layers for note in layer.notes if "zero on every calibration token" in note]
    assert [note.split()[0] for note in single] == ["5", "90"]
    assert report.notes == (f"2 layers: 5 to {single[1]}",)


def test_fewer_tokens_than_inputs_is_told() -> None:
    report = prune(tiny_llama(), [torch.randint(5, 500, (1, 40))], load_recipe("fasp"))
    assert any("fewer calibration tokens (40) than inputs (64 to 128)" in note for note in report.notes)


def test_nan_activations_are_an_error_and_not_magnitude_pruning() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[:] = float("nan")
    with pytest.raises(NumericalError, match="NaN or infinity"):
        prune(model, batches(), load_recipe("fasp"))


def test_a_solver_that_refuses_the_problem_says_why() -> None:
    def masked(context: LayerContext) -> Problem:
        return MaskedLeastSquares(context.loss, torch.ones(1, context.loss.weight.shape[1], dtype=torch.bool))

    with pytest.raises(
        NoSolver, match="accepts structured least squares problems, and this is a masked least squares problem"
    ):
        prune(tiny_llama(), batches(), Recipe(objective=masked, solver=FaspMetric()))


def test_a_linked_objective_needs_units() -> None:
    with pytest.raises(InputError, match="'linked' removes whole units"):
        load_recipe("fasp", {"units": "weights"})

    def wrapped(context: LayerContext) -> StructuredLeastSquares:
        return linked(context)

    with pytest.raises(InputError, match="has no units"):
        prune(tiny_llama(), batches(), Recipe(objective=wrapped, units="weights"))


def test_no_batches_is_an_error() -> None:
    with pytest.raises(InputError, match="no calibration batches"):
        prune(tiny_llama(), [], load_recipe("fasp"))


@pytest.mark.parametrize("multiple", [1, 8, 32])
@pytest.mark.parametrize("units", ["mlp", "vo", "all"])
@pytest.mark.parametrize("sparsity", [0.05, 0.2, 0.31])
@pytest.mark.parametrize("name", TINY_MODELS)
def test_uniform_allocation_meets_the_budget_as_nearly_as_rounding_can(
    name: str, sparsity: float, units: str, multiple: int
) -> None:
    decoder = Decoder(TINY_MODELS[name]())
    total, heads = decoder.linear_weights(), decoder.heads
    value_step = len(decoder.blocks) * 64 * heads.kv * (1 + heads.group) / total
    mlp_step = len(decoder.blocks) * 64 * (len(decoder.architecture.mlp_producers) + 1) * multiple / total
    if units == "vo" and multiple > 1:
        # A head of 16 dimensions is narrower than any multiple leaves room for.
        with pytest.raises(InputError, match="has no effect on units 'vo'"):
            uniform(decoder, sparsity, UNITS[units], multiple)
        return
    reachable = {"mlp": mlp_step * 128 / multiple, "vo": value_step * heads.dim, "all": 1.0}[units]
    if sparsity >= reachable:
        with pytest.raises(InputError, match="out of reach"):
            uniform(decoder, sparsity, UNITS[units], multiple)
        return
    step = value_step if units == "vo" else mlp_step
    if units == "mlp" and sparsity < step / 2:
        with pytest.raises(InputError, match="rounds to nothing"):
            uniform(decoder, sparsity, UNITS[units], multiple)
        return
    allocation = uniform(decoder, sparsity, UNITS[units], multiple)
    assert len({block.shape for block in allocation.blocks}) == 1
    shape = allocation.blocks[0].shape
    assert abs(allocation.sparsity - sparsity) <= step / 2 + 1e-12 or shape.mlp_width == multiple
    assert shape.mlp_width % multiple == 0
    assert shape.mlp_width == 128 if units == "vo" else shape.mlp_width < 128 or sparsity < step
    assert (shape.value_dim == heads.dim) == (units == "mlp")
    assert shape.kv_heads == heads.kv


def test_a_linked_problem_reaches_the_objective_with_its_link() -> None:
    contexts: list[LayerContext] = []

    def objective(context: LayerContext) -> StructuredLeastSquares:
        contexts.append(context)
        return linked(context)

    prune(tiny_llama(), batches(), Recipe(objective=objective, units="all", sparsity=0.3))
    output, down = contexts[:2]
    assert output.channels is not None and output.channels.columns.shape == (32, 2) and output.channels.slot_count == 2
    # Unit 17 is dimension 1 of KV head 1, which the query heads 2 and 3 read.
    assert output.channels.columns[17].tolist() == [2 * 16 + 1, 3 * 16 + 1]
    assert down.channels is not None and down.channels.columns.shape == (128, 1)


def test_a_last_stage_that_did_not_end_is_told_of() -> None:
    settings = {"solver": [{"admm": {"most": 1}}]}
    report = prune(tiny_llama(), batches(), load_recipe("alps", settings))
    assert all(layer.status == "step_limit" and "step limit" in layer.notes[0] for layer in report.layers)
    assert "step limit" in report.notes[0]
    with pytest.raises(StrictError, match="step limit"):
        prune(tiny_llama(), batches(), load_recipe("alps", {**settings, "strict": True}))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ([torch.arange(10)], r"batch 0 is a torch.int64 of shape \[10\]: give tensors of token ids \[batch, length\]"),
        (torch.arange(10), r"batch 0 is a torch.int64 of shape \[\]"),
        ([torch.ones(2, 8, dtype=torch.long), [[1, 2]]], "batch 1 is list: give tensors"),
        ([{"ids": torch.ones(2, 8, dtype=torch.long)}], r"batch 0 has no input_ids \(it has ids\): give tensors"),
        ([torch.ones(2, 8)], r"batch 0 is a torch.float32 of shape \[2, 8\]"),
        ([torch.ones(2, 0, dtype=torch.long)], "holds no token"),
        ([torch.full((2, 8), 512)], "batch 0 holds the token 512, but the model has embeddings for 0 to 511 only"),
        ([torch.full((2, 8), -100)], "batch 0 holds the token -100"),
        ([torch.ones(1, 513, dtype=torch.long)], "sequences of 513 tokens, longer than the 512 positions"),
    ],
)
def test_batches_that_the_model_cannot_read(given: Any, reason: str) -> None:
    with pytest.raises(InputError, match=reason):
        prune(tiny_opt(), given, load_recipe("fasp"))


def test_one_tensor_is_one_batch() -> None:
    alone, listed = tiny_llama(), tiny_llama()
    prune(alone, batches()[0], load_recipe("fasp"))
    prune(listed, batches()[:1], load_recipe("fasp"))
    assert all(torch.equal(a, b) for a, b in zip(alone.parameters(), listed.parameters(), strict=True))


@pytest.mark.parametrize(
    ("name", "recipe", "settings", "reason"),
    [
        ("opt", "structured_best", {"units": "mlp", "refit.recovery": 1, "strict": True}, "recovery has nothing"),
        (
            "llama",
            "sparse_best",
            {"units.weights": "2:5", "sparsity": 0.6},
            "a 2:5 pattern needs a multiple of 5 inputs",
        ),
        ("llama", "structured_best", {"sparsity": 0.9}, "out of reach"),
    ],
)
def test_what_shapes_rule_out_is_refused_before_the_metric(
    name: str, recipe: str, settings: dict[str, Any], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "optprune.calibration.dense_statistics.collect_metrics",
        lambda *_, **__: pytest.fail("the metric was collected"),
    )
    with pytest.raises((InputError, StrictError), match=reason):
        prune(TINY_MODELS[name](), batches(), load_recipe(recipe, settings))


@pytest.mark.e2e
@pytest.mark.parametrize("name", [name for name in ANY_MODEL if name != "depth"])
def test_nothing_of_a_layer_outlives_its_answer(name: str) -> None:
    """Reference counts alone free a problem with its moments: the garbage collector comes when it likes."""
    alive: list[int] = []

    def losses() -> int:
        return sum(type(each) is LayerLoss for each in gc.get_objects())

    def count(event: Event) -> None:
        if isinstance(event, BlockFinished):
            alive.append(losses() - before)

    gc.collect()
    gc.disable()
    before = losses()  # which other tests keep
    try:
        prune(tiny_llama(), batches(), load_recipe(name), on_event=count)
    finally:
        gc.enable()
    assert alive == [0, 0]
