"""Blocks pruned side by side: in whatever order they come back, the bytes and the report are those of a serial run."""

import copy
import pickle
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from benchmarks.tiny_models import TINY_MODELS
from optprune import load_recipe
from optprune.calibration import POLICIES, moments_pass, propagation, stream
from optprune.calibration.stream import run_block
from optprune.errors import InputError, OptpruneError, StrictError
from optprune.models import Decoder, open_model
from optprune.program.memory import AHEAD
from optprune.pruning import executors, prune, workers_of
from optprune.pruning import run as pruning_run
from optprune.pruning.journal import Journal
from optprune.pruning.workers import (
    BlockJob,
    BlockOutcome,
    Layers,
    ParallelWorkers,
    WorkerContext,
    WorkerPool,
    outcomes,
    run_job,
)
from optprune.report import BlockFinished, BlockStarted, Event, Report
from tests.helpers.short_runs import told
from tests.helpers.tiny_models import by_variant

INDEPENDENT = [name for name, policy in POLICIES.items() if policy.independent]
BLOCKS = 5


def batches() -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(0, 500, (size, 32), generator=generator) for size in (4, 4, 2)]


def tiny(**config) -> PreTrainedModel:
    return TINY_MODELS["llama"](num_hidden_layers=BLOCKS, **config)


class Packed(WorkerPool[bytes]):
    """Two workers of this process, whose jobs travel as pickle and of which the newest is always done first."""

    count = 2

    def __init__(self, context: WorkerContext) -> None:
        self.context, self.most, self.done, self.largest = context, 0, 0, 0

    def send(self, job: BlockJob) -> bytes:
        packed = pickle.dumps(job)
        self.largest = max(self.largest, len(packed))
        return packed

    def wait(self, handles: list[bytes]) -> list[bytes]:
        self.most = max(self.most, len(handles))
        return handles[-1:]

    def get(self, handle: bytes) -> BlockOutcome | OptpruneError:
        self.done += 1
        return pickle.loads(pickle.dumps(run_job(self.context, pickle.loads(handle))))


class Here(ParallelWorkers):
    """Workers of this process."""

    def __init__(self) -> None:
        self.packed: list[Packed] = []

    @contextmanager
    def pool(self, context: WorkerContext) -> Iterator[WorkerPool]:
        self.packed.append(Packed(context))
        yield self.packed[-1]


def assert_same(model: PreTrainedModel, other: PreTrainedModel) -> None:
    assert type(model) is type(other) and model.config.to_dict() == other.config.to_dict()
    one, two = model.state_dict(), other.state_dict()
    assert one.keys() == two.keys()
    for name, weight in one.items():
        assert torch.equal(weight, two[name]), name


RECIPES = [
    ("fasp", {}),
    ("sparsegpt", {}),
    ("spap", {"refit.recovery.tokens": 64}),
    ("fasp", {"metric": "diagonal", "metric.tokens": 64}),
]


@pytest.mark.parametrize(("recipe", "settings"), RECIPES, ids=["fasp", "sparsegpt", "recovery", "metric"])
@pytest.mark.parametrize("policy", INDEPENDENT)
@by_variant
def test_the_bytes_and_the_report_are_those_of_a_serial_run(make, policy, recipe, settings) -> None:
    serial = make()
    chosen = load_recipe(recipe, {**settings, "propagation": policy})
    shared = copy.deepcopy(serial)
    expected = prune(serial, batches(), chosen)
    report = prune(shared, batches(), chosen, workers=Here())
    assert_same(serial, shared)
    assert told(report) == told(expected)


def test_sub_blocks_that_go_whole_go_at_the_workers_too() -> None:
    serial, shared = tiny(), tiny()
    recipe = load_recipe("depth", {"sparsity": 0.4, "allocation.score_tokens": 64, "propagation": "dense"})
    expected, report = prune(serial, batches(), recipe), prune(shared, batches(), recipe, workers=Here())
    assert_same(serial, shared)
    assert told(report) == told(expected) and report.removed


def test_a_pruned_model_is_pruned_again_side_by_side() -> None:
    serial = tiny()
    prune(serial, batches(), load_recipe("fasp", {"sparsity": 0.3, "allocation.multiple": 1}))
    shared = copy.deepcopy(serial)
    again = load_recipe("fasp", {"sparsity": 0.1, "propagation": "intra"})
    prune(serial, batches(), again)
    prune(shared, batches(), again, workers=Here())
    assert_same(serial, shared)


def test_a_model_read_block_by_block_goes_on_with_its_journal(tmp_path: Path) -> None:
    recipe, serial = load_recipe("sparsegpt", {"propagation": "intra"}), tiny()
    serial.save_pretrained(tmp_path / "model")
    expected = prune(serial, batches(), recipe)

    def run(resume: bool, workers: Here, on_event) -> Report:
        journal = Journal(tmp_path / "run", resume=resume)
        opened = open_model(tmp_path / "model", sink=journal.sink)
        report = prune(
            opened.model,
            batches(),
            recipe,
            store=opened.store,
            journal=journal,
            workers=workers,
            on_event=on_event,
        )
        decoder = Decoder(opened.model, opened.store)
        for index, block in enumerate(Decoder(serial).blocks):
            with decoder.resident(index) as resident:
                for name, weight in block.named_parameters():
                    assert torch.equal(weight, resident.get_parameter(name)), name
        return report

    class Stopped(Exception):
        pass

    def stop(event: Event) -> None:
        if isinstance(event, BlockFinished) and event.done == 2:
            raise Stopped

    with pytest.raises(Stopped):
        run(False, Here(), stop)
    # With two workers, the newest first: neither the first blocks nor any whole stretch of them.
    assert Journal(tmp_path / "run", resume=True).finished() == [3, 4]
    workers, events = Here(), list[Event]()
    report = run(True, workers, events.append)
    assert workers.packed[0].done == BLOCKS - 2
    assert told(report).layers == told(expected).layers
    assert [event.done for event in events if isinstance(event, BlockFinished)] == [3, 4, 5]


def test_progress_counts_what_is_done_in_whatever_order() -> None:
    events: list[Event] = []
    prune(tiny(), batches(), load_recipe("magnitude", {"propagation": "dense"}), workers=Here(), on_event=events.append)
    started = [event for event in events if isinstance(event, BlockStarted)]
    finished = [event for event in events if isinstance(event, BlockFinished)]
    assert [event.block for event in started] == list(range(BLOCKS))
    assert [event.done for event in finished] == list(range(1, BLOCKS + 1))
    assert sorted(event.block for event in finished) == list(range(BLOCKS)) != [event.block for event in finished]


def test_no_more_is_under_way_than_workers_soon_need() -> None:
    workers = Here()
    model = TINY_MODELS["llama"](num_hidden_layers=12)
    prune(model, batches(), load_recipe("magnitude", {"propagation": "dense"}), workers=workers)
    assert workers.packed[0].most == AHEAD * Packed.count


def test_every_job_that_ends_makes_room_for_another() -> None:
    """Though several end at once."""
    under_way: list[int] = []

    class AllAtOnce(WorkerPool[int]):
        count = 3

        def send(self, job: Any) -> int:
            return int(job)

        def wait(self, handles: list[int]) -> list[int]:
            under_way.append(len(handles))
            return list(handles)

        def get(self, handle: int) -> Any:
            return handle

    jobs: Any = iter(range(4 * AHEAD * AllAtOnce.count))
    found: list[Any] = list(outcomes(AllAtOnce(), jobs))
    assert found == list(range(4 * AHEAD * AllAtOnce.count))
    assert under_way == [AHEAD * AllAtOnce.count] * 4


def test_a_job_holds_what_one_block_takes() -> None:
    """Of a view of a larger tensor its own part, and of the blocks' arguments those of the one block."""
    sizes = []
    for blocks in (2, 24):
        model = TINY_MODELS["llama"](num_hidden_layers=blocks)
        block = Decoder(model).blocks[0]
        whole, at = torch.cat([weight.detach().reshape(-1) for weight in block.parameters()]), 0
        for weight in block.parameters():
            weight.data = whole[at : at + weight.numel()].view_as(weight)
            at += weight.numel()
        workers = Here()
        prune(model, batches(), load_recipe("magnitude", {"propagation": "dense"}), workers=workers)
        sizes.append(workers.packed[0].largest)
    hidden = 64 * sum(batch.numel() for batch in batches())
    assert sizes[1] < 1.01 * sizes[0] < 1.5 * 4 * (hidden + len(whole))


@pytest.mark.parametrize("policy", INDEPENDENT)
def test_every_block_is_passed_through_once_to_get_on_wherever_that_is(policy: str, monkeypatch) -> None:
    """By a clock that counts passes: the floor is that of a serial run, and a worker spares the pass of the run."""
    passes, whole = [0], [0]

    def counted(block, hidden, arguments, taps=(), *, to_end=True):
        passes[0] += 1
        whole[0] += to_end
        return run_block(block, hidden, arguments, taps, to_end=to_end)

    for module in (moments_pass, stream):
        monkeypatch.setattr(module, "run_block", counted)
    for module in (moments_pass, propagation, pruning_run):
        monkeypatch.setattr(module, "clock", lambda device: float(passes[0]))
    found = []
    for workers in (None, Here()):
        whole[0] = 0
        report = prune(tiny(), batches(), load_recipe("fasp", {"propagation": policy}), workers=workers)
        found.append((report.floor_seconds, whole[0]))
    assert found[0] == found[1] == (2 * BLOCKS * len(batches()), BLOCKS * len(batches()))


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in INDEPENDENT])
def test_a_policy_that_lets_blocks_depend_on_each_other_is_refused(policy: str) -> None:
    with pytest.raises(InputError, match=f"under the policy {policy} every block depends .* dense or intra"):
        workers_of(load_recipe("fasp", {"propagation": policy}).propagation, 2, ray="local")


@pytest.mark.parametrize("policy", [name for name in POLICIES if name not in INDEPENDENT])
def test_workers_that_a_script_gives_are_refused_too(policy: str) -> None:
    model, before, workers = tiny(), tiny(), Here()
    with pytest.raises(InputError, match=f"under the policy {policy} every block depends on those before it"):
        prune(model, batches(), load_recipe("fasp", {"propagation": policy}), workers=workers)
    assert not workers.packed
    assert_same(model, before)


def test_what_stops_a_worker_stops_the_run_with_its_sentence() -> None:
    recipe, few = load_recipe("fasp", {"propagation": "dense", "strict": True}), [torch.ones(1, 8, dtype=torch.long)]
    messages = []
    for workers in (None, Here()):
        with pytest.raises(StrictError, match="strict mode makes this an error") as caught:
            prune(tiny(), few, recipe, workers=workers)
        messages.append(str(caught.value).partition(": ")[2])
    assert messages[0] == messages[1]


def test_a_worker_that_would_round_otherwise_is_refused() -> None:
    class Elsewhere(Here):
        @contextmanager
        def pool(self, context: WorkerContext) -> Iterator[WorkerPool]:
            yield Packed(replace(context, facts=context.facts.replace(torch.__version__, "1.13")))

    with pytest.raises(InputError, match=r"the version\.torch is '1\.13' here and '.*' there"):
        prune(tiny(), batches(), load_recipe("magnitude", {"propagation": "dense"}), workers=Elsewhere())


@pytest.mark.parametrize("count", [0, -1])
@pytest.mark.parametrize("ray", [None, "local"])
def test_no_worker_at_all_is_refused(count: int, ray: str | None) -> None:
    with pytest.raises(InputError, match=f"the number of workers cannot be {count}"):
        workers_of(load_recipe("fasp", {"propagation": "dense"}).propagation, count, ray)


@pytest.mark.parametrize("count", [1001, 1_000_000, 10**30])
@pytest.mark.parametrize(("policy", "ray"), [("dense", None), ("dense", "local"), ("pruned", None)])
def test_more_workers_than_any_run_has_use_for_are_refused(count: int, policy: str, ray: str | None) -> None:
    with pytest.raises(InputError, match="the number of workers cannot be 10"):
        workers_of(load_recipe("fasp", {"propagation": policy}).propagation, count, ray)


def test_no_more_threads_are_started_than_there_are_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []

    class Pool(ThreadPoolExecutor):
        def __init__(self, count: int) -> None:
            started.append(count)
            super().__init__(count)

    monkeypatch.setattr(executors, "ThreadPoolExecutor", Pool)
    prune(tiny(), batches(), load_recipe("magnitude", {"propagation": "pruned"}), workers=Layers(1000))
    assert started and max(started) <= 7
