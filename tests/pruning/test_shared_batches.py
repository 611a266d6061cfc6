"""Calibration batches divided into partial sums: the bytes depend on their number, not on the processes."""

import shutil
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from optprune import LayerContext, load_recipe
from optprune.calibration import DenseStatistics
from optprune.calibration.partial_sums import PartialSums
from optprune.errors import InputError, NumericalError
from optprune.problems import Problem
from optprune.pruning import Journal, Layers, prune
from optprune.report import BlockFinished, Event, Report
from tests.helpers.short_runs import same, told
from tests.helpers.thread_peers import ThreadPeers, together
from tests.helpers.tiny_models import ALL_MODELS, tiny_llama, tiny_opt


def batches() -> list[Tensor]:
    """Six batches, of which four partial sums have one or two each."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 500, (2, 24), generator=generator) for _ in range(6)]


RUNS = {
    "fasp": ("fasp", {}),
    "alps": ("alps", {}),
    "fistapruner": ("fistapruner", {}),
    "wanda": ("wanda", {"propagation": "local"}),
    "sparsegpt": ("sparsegpt", {"propagation": "cross"}),
    "metric": ("sparse_best", {"metric.tokens": 200}),
    "a metric of one batch, which one process has": ("sparse_best", {"metric.tokens": 48}),
    "probes": ("structured_best", {"refit.held_out": 0.2, "metric.tokens": 600}),
    "recovery": ("spap", {"refit.recovery.tokens": 96}),
    "recovery in a metric": (
        "sparse_best",
        {"refit.held_out": 0.2, "refit.recovery": 1, "metric.tokens": 96, "sparsity": 0.3},
    ),
    "rotated": ("fasp", {"units": "rotated-vo", "sparsity": 0.08}),
    "permuted": ("wanda", {"units.weights": "2:4", "permuted": True, "propagation": "intra"}),
    "dense": ("sparsegpt", {"propagation": "dense"}),
    "intra": ("fasp", {"propagation": "intra", "refit.held_out": 0.2, "refit.dampings": 0.1}),
}


def run(model: PreTrainedModel, name: str, partial_sums: PartialSums, **more) -> Report:
    recipe, settings = RUNS[name]
    return prune(model, batches(), load_recipe(recipe, settings), partial_sums=partial_sums, **more)


@pytest.mark.e2e
@pytest.mark.parametrize("name", RUNS)
def test_processes_give_the_bytes_of_one_process_with_as_many_partial_sums(name: str) -> None:
    make = tiny_opt if name in ("sparsegpt", "intra") else tiny_llama
    one, models = make(), dict[int, PreTrainedModel]()
    expected = run(one, name, PartialSums(4))

    def shared(peers: ThreadPeers) -> Report:
        models[peers.rank] = make()
        report = run(models[peers.rank], name, PartialSums(4, peers))
        assert peers.sent or peers.rank == 1
        return report

    for report in together(2, shared):
        assert told(report) == told(expected)
    assert same(models[0], one) and same(models[1], one)


def test_experts_are_chosen_by_the_tokens_of_all_processes() -> None:
    """And those held out of the last partial sum alone are heard of by all."""
    budget = {"allocation": "global", "allocation.probe_tokens": 96}
    recipe = load_recipe("experts_best", {"refit.held_out": 0.2, "sparsity": 0.2, **budget})
    one, models = ALL_MODELS["mixtral"](), dict[int, PreTrainedModel]()
    expected = prune(one, batches(), recipe, partial_sums=PartialSums(4))

    def shared(peers: ThreadPeers) -> Report:
        models[peers.rank] = ALL_MODELS["mixtral"]()
        return prune(models[peers.rank], batches(), recipe, partial_sums=PartialSums(4, peers))

    for report in together(2, shared):
        assert told(report) == told(expected)
    assert same(models[0], one) and same(models[1], one)


def stopping(event: Event) -> None:
    if isinstance(event, BlockFinished) and event.block == 1:
        raise KeyboardInterrupt


def quiet(event: Event) -> None:
    pass


@pytest.mark.e2e
def test_a_run_that_was_stopped_goes_on_with_any_number_of_processes(tmp_path: Path) -> None:
    whole = tiny_llama()
    expected = run(whole, "alps", PartialSums(4))

    def part(journal: Journal, on_event, models: dict[int, PreTrainedModel]):
        def shared(peers: ThreadPeers) -> Report:
            models[peers.rank] = tiny_llama()
            own = None if peers.rank else journal
            return run(models[peers.rank], "alps", PartialSums(4, peers), journal=own, on_event=on_event)

        return shared

    with pytest.raises(KeyboardInterrupt):
        together(2, part(Journal(tmp_path / "run"), stopping, {}))
    assert Journal(tmp_path / "run", resume=True).finished() == [0]
    shutil.copytree(tmp_path / "run", tmp_path / "again")
    for size, folder in ((2, tmp_path / "run"), (1, tmp_path / "again")):
        models: dict[int, PreTrainedModel] = {}
        for report in together(size, part(Journal(folder, resume=True), quiet, models)):
            assert told(report).layers == told(expected).layers
        assert all(same(model, whole) for model in models.values())
    with pytest.raises(InputError, match="the number of partial sums was 4 and is 3"):
        run(tiny_llama(), "alps", PartialSums(3), journal=Journal(tmp_path / "run", resume=True))


class Unasked(DenseStatistics):
    """For a run that has nothing left to measure of its metrics."""

    def metrics(self, *_, **__):
        raise AssertionError("the metrics are in the run folder")


@pytest.mark.e2e
def test_processes_that_go_on_are_told_the_metrics_in_the_folder(tmp_path: Path) -> None:
    whole = tiny_llama()
    expected = run(whole, "metric", PartialSums(4))

    def part(journal: Journal, on_event, models: dict[int, PreTrainedModel], statistics: DenseStatistics):
        def shared(peers: ThreadPeers) -> Report:
            models[peers.rank] = tiny_llama()
            more = {"on_event": on_event, "statistics": statistics}
            return run(
                models[peers.rank], "metric", PartialSums(4, peers), journal=None if peers.rank else journal, **more
            )

        return shared

    with pytest.raises(KeyboardInterrupt):
        together(2, part(Journal(tmp_path / "run"), stopping, {}, DenseStatistics()))
    assert Journal(tmp_path / "run", resume=True).finished() == [0]
    models: dict[int, PreTrainedModel] = {}
    for report in together(2, part(Journal(tmp_path / "run", resume=True), quiet, models, Unasked())):
        assert told(report).layers == told(expected).layers and report.notes == expected.notes
    assert len(models) == 2 and all(same(model, whole) for model in models.values())


@pytest.mark.e2e
def test_where_hidden_states_wait_changes_no_byte_of_a_shared_run_in_half_precision() -> None:
    one, models = tiny_llama().bfloat16(), dict[int, PreTrainedModel]()
    expected = run(one, "recovery in a metric", PartialSums(4), states="device")

    def shared(peers: ThreadPeers) -> Report:
        models[peers.rank] = tiny_llama().bfloat16()
        states = ("disk", "host")[peers.rank]
        return run(models[peers.rank], "recovery in a metric", PartialSums(4, peers), states=states)

    for report in together(2, shared):
        assert told(report) == told(expected)
        assert [phase.name for phase in report.phases] == ["loading", "metric", "budget", "pruning"]
    assert one.dtype == torch.bfloat16 and same(models[0], one) and same(models[1], one)


def test_an_error_at_one_layer_is_raised_in_all_processes() -> None:
    def fails(context: LayerContext) -> Problem:
        if context.name.endswith("up_proj"):
            raise NumericalError(f"no problem at {context.name}")
        return load_recipe("magnitude").state(context)

    recipe = load_recipe("magnitude").model_copy(update={"objective": fails})

    def shared(peers: ThreadPeers) -> str:
        with pytest.raises(NumericalError) as caught:
            prune(tiny_llama(), batches(), recipe, partial_sums=PartialSums(2, peers))
        return str(caught.value)

    assert together(2, shared) == ["no problem at model.layers.0.mlp.up_proj"] * 2


def test_processes_that_are_not_alike_are_refused() -> None:
    def shared(peers: ThreadPeers) -> str:
        tokens = [batch + peers.rank for batch in batches()]
        with pytest.raises(InputError) as caught:
            prune(tiny_llama(), tokens, load_recipe("magnitude"), partial_sums=PartialSums(2, peers))
        return str(caught.value)

    for message in together(2, shared):
        assert "differ: the calibration tokens is" in message and "number 1" in message


def test_impossible_partial_sums_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the number of partial sums cannot be 0"):
        PartialSums(0)
    with pytest.raises(InputError, match="7 partial sums need at least as many calibration batches, and there are 6"):
        run(tiny_llama(), "wanda", PartialSums(7))

    def shared(peers: ThreadPeers) -> None:
        with pytest.raises(InputError, match="3 partial sums cannot be shared equally by 2 processes"):
            PartialSums(3, peers)
        with pytest.raises(InputError, match="the processes that share the partial sums are already the workers"):
            run(tiny_llama(), "wanda", PartialSums(2, peers), workers=Layers(2))
        if peers.rank:
            with pytest.raises(InputError, match="only the first process of a run has a journal"):
                run(tiny_llama(), "wanda", PartialSums(2, peers), journal=Journal(tmp_path / "run"))

    together(2, shared)


@pytest.mark.e2e
def test_the_partial_sums_of_one_process_go_to_workers_too() -> None:
    one, shared = tiny_llama(), tiny_llama()
    expected = run(one, "alps", PartialSums(3))
    report = run(shared, "alps", PartialSums(3), workers=Layers(2, ("cpu", "cpu")))
    assert same(one, shared) and told(report) == told(expected)
    assert not same(run_with_one_partial_sum(), one)


def run_with_one_partial_sum() -> PreTrainedModel:
    model = tiny_llama()
    run(model, "alps", PartialSums())
    return model
