"""Layers of one block shared among devices: the bytes and the report of a run that solves one after the other."""

import copy
import threading

import pytest
import torch

from optprune import LayerContext, load_recipe
from optprune.errors import InputError, NumericalError, OwnCodeError, StrictError
from optprune.problems import Problem
from optprune.pruning import Layers, prune, workers_of
from optprune.report import Event, LayerSolved
from tests.helpers.short_runs import batches, same, told
from tests.helpers.tiny_models import tiny_llama, tiny_opt

TWO = Layers(2, ("cpu", "cpu"))
RUNS = [
    ("alps", {}),
    ("sparsegpt", {"propagation": "cross"}),
    ("fasp", {}),
    ("sparse_best", {"refit.held_out": 0.25, "refit.dampings": 0.1}),
    ("spap", {"refit.recovery.tokens": 64}),
    ("wanda", {"units.weights": "2:4", "permuted": True}),
]


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("recipe", "settings"), RUNS, ids=["alps", "sparsegpt", "fasp", "metric", "recovery", "permuted"]
)
@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_the_bytes_and_the_report_are_those_of_one_device(make, recipe: str, settings) -> None:
    serial, chosen = make(), load_recipe(recipe, settings)
    shared = copy.deepcopy(serial)
    expected = prune(serial, batches(), chosen)
    report = prune(shared, batches(), chosen, workers=TWO)
    assert same(serial, shared)
    assert told(report) == told(expected)


class Meeting:
    """An objective whose first two layers wait for each other."""

    def __init__(self) -> None:
        self.both, self.lock, self.arrived = threading.Barrier(2, timeout=30), threading.Lock(), 0
        self.threads = set[int]()
        self.grad, self.pinned = set[bool](), set[int]()

    def __call__(self, context: LayerContext) -> Problem:
        with self.lock:
            self.arrived += 1
            first = self.arrived <= 2
        self.threads.add(threading.get_ident())
        self.grad.add(torch.is_grad_enabled())
        self.pinned.add(torch.get_num_threads())
        if first:
            self.both.wait()
        return load_recipe("magnitude").state(context)


def test_two_layers_are_under_way_at_a_time() -> None:
    meeting = Meeting()
    recipe = load_recipe("magnitude").model_copy(update={"objective": meeting})
    events: list[Event] = []
    prune(tiny_llama(), batches(), recipe, workers=TWO, on_event=events.append)
    assert len(meeting.threads) > 1
    assert meeting.grad == {False}
    assert meeting.pinned == {torch.get_num_threads()}
    names = [event.layer.name for event in events if isinstance(event, LayerSolved)]
    assert names == [name.removesuffix(".weight") for name, _ in tiny_llama().named_parameters() if "_proj" in name]


def test_layers_one_after_the_other_do_not_meet() -> None:
    meeting = Meeting()
    meeting.both = threading.Barrier(2, timeout=0.1)
    recipe = load_recipe("magnitude").model_copy(update={"objective": meeting})
    with pytest.raises(OwnCodeError, match="BrokenBarrierError"):
        prune(tiny_llama(), batches(), recipe)


def test_the_first_error_in_the_order_of_the_pass_is_raised() -> None:
    def fails(context: LayerContext) -> Problem:
        if context.name.endswith(("k_proj", "down_proj")):
            raise NumericalError(f"no problem at {context.name}")
        return load_recipe("magnitude").state(context)

    recipe = load_recipe("magnitude").model_copy(update={"objective": fails})
    with pytest.raises(NumericalError, match=r"no problem at model\.layers\.0\.self_attn\.k_proj"):
        prune(tiny_llama(), batches(), recipe, workers=TWO)


def test_an_error_that_is_no_answer_ends_all_threads() -> None:
    def fails(context: LayerContext) -> Problem:
        raise MemoryError(context.name)

    recipe, before = load_recipe("magnitude").model_copy(update={"objective": fails}), threading.active_count()
    with pytest.raises(MemoryError):
        prune(tiny_llama(), batches(), recipe, workers=TWO)
    assert threading.active_count() == before


def test_strict_mode_stops_at_the_layer_where_one_device_stops() -> None:
    recipe, few = load_recipe("alps", {"strict": True}), [torch.ones(1, 8, dtype=torch.long)]
    messages = []
    for workers in (None, TWO):
        with pytest.raises(StrictError, match="strict mode makes this an error") as caught:
            prune(tiny_llama(), few, recipe, workers=workers)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def test_devices_of_another_kind_and_of_another_number_are_refused() -> None:
    with pytest.raises(InputError, match="cannot be solved on cuda:0, cuda:1: name devices of that kind"):
        prune(tiny_llama(), batches(), load_recipe("magnitude"), workers=Layers(2, ("cuda:0", "cuda:1")))
    with pytest.raises(InputError, match="3 layers at a time need 3 devices, not 1"):
        Layers(3, ("cpu",))


def test_gpus_after_the_models_own_are_taken_in_turn(monkeypatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert [str(device) for device in Layers(3).over(torch.device("cuda", 2))] == ["cuda:2", "cuda:3", "cuda:0"]
    assert Layers(2).over(torch.device("cpu")) == (torch.device("cpu"),) * 2


@pytest.mark.parametrize("policy", ["pruned", "cross", "local"])
def test_workers_share_layers_where_blocks_hang_on_each_other(policy: str) -> None:
    assert workers_of(load_recipe("alps", {"propagation": policy}).propagation, 2) == Layers(2)
