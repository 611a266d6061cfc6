"""Hidden states in memory or in a file: the same bytes, one batch at a time in memory, and nothing left behind."""

import errno
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optprune import load_recipe
from optprune.calibration import POLICIES, calibrating, first_inputs
from optprune.calibration.calls import Wanted, calls_of
from optprune.errors import InputError
from optprune.models import Decoder, open_model
from optprune.models.places import InFile, OnDevice, OnHost, States
from optprune.pruning import Journal, prune
from optprune.pruning.run import place_for
from optprune.report import BlockFinished, Event
from tests.helpers.attempts import Attempt
from tests.helpers.short_runs import same
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama
from tests.helpers.weights import weights_of

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "depth by influence": ("depth", {"sparsity": 0.3, "allocation.score": "influence"}),
    "depth by perplexity": ("depth", {"sparsity": 0.3, "allocation.score_tokens": 64}),
    "alps under intra": ("alps", {"propagation": "intra"}),
    "sparse_best": ("sparse_best", {"allocation.probe_tokens": 64}),
    "sparse_best under intra": ("sparse_best", {"propagation": "intra", "refit.held_out": 0.25, "refit.recovery": 1}),
    "structured_best": ("structured_best", {"sparsity": 0.3, "allocation.least": 0.1, "allocation.probe_tokens": 64}),
    "spap": ("spap", {"refit.recovery.tokens": 100, "refit.held_out": 0.25}),
}
"""recipes with the Fisher pass, probes, recovery, and scores that passes give"""


def batches(count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, 500, (2, 24), generator=generator) for _ in range(count)]


@contextmanager
def fetched(place: type) -> Iterator[list[int]]:
    """How many of the tensors that a kind of place gave are in memory, whenever it gives another."""
    there, seen, keep = list[weakref.ref[Tensor]](), list[int](), place.keep

    def kept(self: Any, tensor: Tensor) -> Callable[[], Tensor]:
        fetch = keep(self, tensor)

        def watched() -> Tensor:
            found = fetch()
            there.append(weakref.ref(found))
            there[:] = [reference for reference in there if reference() is not None]
            seen.append(len(there))
            return found

        return watched

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(place, "keep", kept)
        yield seen


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("name", "policy"), [*(("llama", policy) for policy in POLICIES), ("opt", "cross"), ("qwen2", "intra")]
)
def test_every_policy_gives_the_same_bytes_from_a_file(name: str, policy: str) -> None:
    settings = load_recipe("fasp", {"propagation": policy, "refit.held_out": 0.25, "refit.recovery": 1})
    memory, file = TINY_MODELS[name](), TINY_MODELS[name]()
    prune(memory, batches(), settings, states="device")
    with fetched(InFile) as seen:
        prune(file, batches(), settings, states="disk")
    assert same(memory, file)
    assert 2 * len(batches()) * len(Decoder(file).blocks) <= len(seen)
    # A batch, the one before that a loop still knows, and those of a dense model beside them.
    assert max(seen) <= 4


@pytest.mark.e2e
@pytest.mark.parametrize(
    ("run", "streamed"), [*((run, True) for run in RUNS), ("structured_best", False), ("spap", False)]
)
def test_every_pass_gives_the_same_bytes_from_a_file(run: str, streamed: bool, tmp_path: Path) -> None:
    recipe, settings = RUNS[run]
    save_tiny(tiny_llama(num_hidden_layers=3), tmp_path)
    memory = open_model(tmp_path)
    prune(memory.model, batches(), load_recipe(recipe, settings), store=memory.store, states="device")
    with fetched(InFile) as seen:
        if streamed:
            opened = open_model(tmp_path)
            model, store = opened.model, opened.store
        else:
            model, store = tiny_llama(num_hidden_layers=3), None
        prune(model, batches(), load_recipe(recipe, settings), store=store, states="disk")
    expected, found = weights_of(memory.decoder()), weights_of(Decoder(model, store))
    assert found.keys() == expected.keys()
    assert all(torch.equal(value, expected[key]) for key, value in found.items())
    # What a call or a layer's metric is made of is fetched together: a few tensors.
    assert max(seen) <= 6


def test_a_file_of_states_is_a_list_of_tensors(tmp_path: Path) -> None:
    tensors = [torch.randn(3, 4).bfloat16(), torch.randn(2, 5, dtype=torch.float64), torch.zeros(0, 7), torch.ones(())]
    for place in (InFile(tmp_path), OnHost(), OnDevice()):
        states = States(place, tensors)
        other = states[:]
        states[1] = torch.ones(2, 5)
        assert [value.dtype for value in other] == [tensor.dtype for tensor in tensors]
        assert all(map(torch.equal, other, tensors))
        assert torch.equal(states[1], torch.ones(2, 5))
        assert (len(states[1:3]), other.shapes) == (2, [tensor.shape for tensor in tensors])
        nested = States(place, [((tensors[0],), {"b": [tensors[1], None], "c": 3})])[0]
        assert torch.equal(nested[0][0], tensors[0])
        assert torch.equal(nested[1]["b"][0], tensors[1])
        assert (nested[1]["b"][1], nested[1]["c"]) == (None, 3)
    assert not list(tmp_path.iterdir()), "the file has no name"


def test_the_file_grows_no_larger_than_what_is_kept_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import tempfile

    made, make = list[Any](), tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **how: made.append(make(**how)) or made[-1])
    states = States(InFile(tmp_path), [torch.zeros(1000) for _ in range(4)])
    for turn in range(20):
        for index in range(4):
            states[index] = torch.full((1000,), float(turn))
    assert [value.tolist() for value in states] == [[19.0] * 1000] * 4
    [file] = made
    assert file.seek(0, 2) == 5 * 4000
    del states
    assert file.closed


@pytest.mark.e2e
def test_recovery_keeps_no_more_calls_than_it_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = Decoder(tiny_llama())
    with calibrating(decoder):
        stream = first_inputs(decoder, batches())
        every, wanted = (calls_of(decoder.blocks[0], "mlp", stream, which) for which in (Wanted(), Wanted(100, 2)))
        # Of 48 tokens each: three batches hold a hundred.
        expected = [0, 1, 2, 6, 7]
        assert len(every.targets) == 8
        assert [int(x) for x in Wanted(100, 2).of(stream)] == expected
        assert all(map(torch.equal, wanted.targets, [every.targets[number] for number in expected]))
        for policy in POLICIES.values():
            for_path = policy.start(first_inputs(decoder, batches()))
            with for_path.visit(decoder.blocks[0], held_out=2, calls=Wanted(100, 2)) as visit:
                visit.collect(["mlp.down_proj"], ["mlp"])
                assert len(visit.calls("mlp").targets) == len(visit.calls("mlp").arguments) == len(expected)
    caught, append = list[int](), States.append
    monkeypatch.setattr(
        States, "append", lambda self, value: (caught.append(1) if isinstance(value, tuple) else 0, append(self, value))
    )
    settings = {"refit.recovery.tokens": 100, "refit.held_out": 0.25, "propagation": "pruned"}
    prune(tiny_llama(), batches(), load_recipe("spap", settings), states="disk")
    assert sum(caught) == 2 * 5  # the MLPs of two blocks, whose fit and held-out batches are five


@pytest.mark.parametrize("free", [None, 10**9, 4 * 8 * 48 * 64 * 4 * 2, 4 * 8 * 48 * 64 * 4 * 2 - 1])
def test_auto_is_the_first_place_with_room_enough(
    free: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four copies of 8 x 48 tokens of 64 numbers of 4 bytes must fit in half of what is free."""
    decoder = Decoder(tiny_llama())
    assert decoder.model.config.hidden_size == 64
    monkeypatch.setattr("optprune.pruning.run.free_memory", lambda device=None: free)
    place = place_for("auto", decoder, batches(), tmp_path)
    assert isinstance(place, OnDevice) == (free is None or free >= 4 * 8 * 48 * 64 * 4 * 2)
    assert isinstance(place, InFile) == (not isinstance(place, OnDevice))


def test_a_run_has_no_file_in_its_folder_beside_the_journal_s(tmp_path: Path) -> None:
    seen: list[set[str]] = []

    def look(event: Event) -> None:
        if isinstance(event, BlockFinished):
            seen.append({path.suffix for path in (tmp_path / "run").iterdir()})

    recipe = load_recipe("fasp")
    prune(tiny_llama(), batches(), recipe, states="disk", journal=Journal(tmp_path / "run"), on_event=look)
    assert seen
    assert set().union(*seen) <= {".json", ".safetensors", ""}


def test_what_a_killed_run_has_put_aside_goes_with_the_next(tmp_path: Path) -> None:
    recipe = load_recipe("fasp")
    prune(tiny_llama(), batches(), recipe, journal=Journal(tmp_path / "run"))
    left = tmp_path / "run" / "scratch" / "optprune-left"
    (left / "aside").mkdir(parents=True)
    (left / "aside" / "x").write_bytes(b"0" * 100)
    prune(tiny_llama(), batches(), recipe, journal=Journal(tmp_path / "run", resume=True))
    assert not left.exists()


class Full:
    """A file on a disk that is full."""

    def seek(self, place: int) -> None:
        pass

    def write(self, data: Any) -> None:
        raise OSError(errno.ENOSPC, "no space")

    def close(self) -> None:
        pass


def test_a_full_disk_is_told(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.TemporaryFile", lambda **_: Full())
    sentence = attempt.fails(attempt.command(states="disk"))
    assert "the disk is full, so hidden states cannot be kept in " in sentence
    assert "--states host" in sentence


@pytest.mark.usefixtures("no_weights")
def test_a_place_that_is_not_known(attempt: Attempt) -> None:
    sentence = attempt.fails(attempt.command(states="cloud"))
    assert "--states cannot be 'cloud': use auto, device, host or disk" in sentence
    with pytest.raises(InputError, match="'cloud'"):
        prune(tiny_llama(), batches(), load_recipe("fasp"), states="cloud")


def test_the_command_hands_it_on(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(program: Any, *_: Any, **__: Any) -> None:
        raise InputError(f"asked for {program.request.states}")

    monkeypatch.setattr("optprune.pruning.run_program", stop)
    assert "asked for disk" in attempt.fails(attempt.command(states="disk"))
