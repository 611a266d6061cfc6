"""The journal of a run: stopped anywhere and taken up again, it ends with the bytes of a run that was not stopped."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from transformers import PreTrainedModel

from benchmarks.tiny_models import TINY_MODELS
from optprune import LayerContext, Recipe, load_recipe
from optprune.calibration.dense_statistics import DenseStatistics, Removal
from optprune.errors import InputError
from optprune.models import Decoder, open_model
from optprune.problems import MaskedLeastSquares, StructuredLeastSquares
from optprune.pruning import journal as journal_module
from optprune.pruning import prune
from optprune.pruning.journal import Journal, Measured, digest_of_model
from optprune.report import BlockFinished, BlockStarted, Event, LayerSolved
from tests.helpers.short_runs import batches, same
from tests.helpers.structured_cases import grouped_query
from tests.helpers.tiny_models import save_tiny

RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "fasp": ("fasp", {"sparsity": 0.3}),
    "alps under intra": ("alps", {"propagation": "intra"}),
    "sparse_best": ("sparse_best", {"allocation.probe_tokens": 32}),
    "structured_best": (
        "structured_best",
        {"units": "all-heads", "allocation.probe_tokens": 32, "refit.held_out": 0.25},
    ),
    "fasp under cross": ("fasp", {"propagation": "cross"}),
    "depth": ("depth", {"sparsity": 0.4, "allocation.score_tokens": 64}),
    "spap": ("spap", {"refit.recovery.tokens": 64}),
}
BLOCKS = 3


def tiny(name: str = "llama") -> PreTrainedModel:
    return TINY_MODELS[name](num_hidden_layers=BLOCKS)


def test_the_digest_of_a_model_on_disk_is_that_of_the_bytes_of_its_files(tmp_path: Path) -> None:
    folder = save_tiny(tiny(), tmp_path / "model")
    [file] = folder.glob("*.safetensors")
    data, digests = file.read_bytes(), list[str]()
    for last in (data[-1:], data[-1:], bytes([data[-1] ^ 1])):
        file.write_bytes(data[:-1] + last)
        opened = open_model(folder, device="cpu")
        assert opened.store is not None
        digests.append(digest_of_model(opened.decoder()))
    assert digests[0] == digests[1] != digests[2]


class Stopped(Exception):
    """In place of a kill."""


class Stop:
    """Ends a run at the n-th event of a kind."""

    def __init__(self, kind: type, number: int) -> None:
        self.kind, self.left = kind, number

    def __call__(self, event: Event) -> None:
        if isinstance(event, self.kind):
            self.left -= 1
            if self.left < 0:
                raise Stopped


@pytest.mark.parametrize(("kind", "number"), [(BlockFinished, 1), (LayerSolved, -1)], ids=["block", "layer"])
@pytest.mark.parametrize("run", RUNS)
def test_a_stopped_run_ends_with_the_same_bytes(run: str, kind: type, number: int, tmp_path: Path) -> None:
    name, settings = RUNS[run]
    recipe, whole, first, second = load_recipe(name, settings), tiny(), tiny(), tiny()
    expected = prune(whole, batches(), recipe)
    if kind is LayerSolved and not expected.layers:
        kind = BlockStarted  # no layer of it is solved: whole sub-blocks go
    stop = Stop(kind, number % (len(expected.layers) if kind is LayerSolved else BLOCKS))
    with pytest.raises(Stopped):
        prune(first, batches(), recipe, journal=Journal(tmp_path / "run"), on_event=stop)
    report = prune(second, batches(), recipe, journal=Journal(tmp_path / "run", resume=True))
    assert same(whole, second)
    assert whole.config.to_dict() == second.config.to_dict()
    assert type(whole) is type(second)
    assert [(layer.name, layer.objective) for layer in report.layers] == [
        (layer.name, layer.objective) for layer in expected.layers
    ]
    assert (report.allocation, report.blocks, report.removed, report.notes) == (
        expected.allocation,
        expected.blocks,
        expected.removed,
        expected.notes,
    )


@pytest.mark.e2e
@pytest.mark.parametrize("architecture", TINY_MODELS)
@pytest.mark.parametrize("run", ["fasp", "alps under intra", "fasp under cross", "depth"])
def test_a_model_read_block_by_block_goes_on_too(run: str, architecture: str, tmp_path: Path) -> None:
    name, settings = RUNS[run]
    recipe, whole = load_recipe(name, settings), tiny(architecture)
    whole.save_pretrained(tmp_path / "model")
    prune(whole, batches(), recipe)
    for number in range(2):
        journal = Journal(tmp_path / "run", resume=number > 0)
        opened = open_model(tmp_path / "model", sink=journal.sink)
        with pytest.raises(Stopped):
            prune(
                opened.model,
                batches(),
                recipe,
                store=opened.store,
                journal=journal,
                on_event=Stop(BlockStarted, number),
            )
    journal = Journal(tmp_path / "run", resume=True)
    opened = open_model(tmp_path / "model", sink=journal.sink)
    prune(opened.model, batches(), recipe, store=opened.store, journal=journal)
    decoder, expected = Decoder(opened.model, opened.store), Decoder(whole)
    assert decoder.shapes() == expected.shapes()
    for index in range(len(expected.blocks)):
        with decoder.resident(index) as block:
            assert same(block, expected.blocks[index])


def test_a_finished_run_solves_nothing_again(tmp_path: Path) -> None:
    recipe, first, second = load_recipe("fasp"), tiny(), tiny()
    prune(first, batches(), recipe, journal=Journal(tmp_path / "run"))
    events: list[Event] = []
    prune(second, batches(), recipe, journal=Journal(tmp_path / "run", resume=True), on_event=events.append)
    assert same(first, second)
    assert not any(isinstance(event, LayerSolved | BlockStarted) for event in events)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def begun(folder: Path) -> None:
    with pytest.raises(Stopped):
        prune(tiny(), batches(), load_recipe("fasp"), journal=Journal(folder), on_event=Stop(BlockStarted, 2))


def test_an_unfinished_run_is_not_written_over(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(InputError, match=r"unfinished run \(2 of 3 blocks are done\): .* --resume, or .*--restart"):
        Journal(tmp_path / "run")


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """The folder of a run that was stopped after two blocks, with a converted file, and unlocked."""
    begun(tmp_path / "run")
    converted = Journal(tmp_path / "run", resume=True).scratch / "converted"
    converted.mkdir()
    (converted / "old").write_text("of the earlier run")
    Journal(tmp_path / "run", resume=True).release()
    return tmp_path / "run"


def test_a_run_that_waits_to_replace_another_is_new_and_empty(unfinished: Path) -> None:
    before, journal = contents(unfinished), Journal(unfinished, restart=True)
    assert journal.replaces and not (journal.resumed or journal.begun or journal.complete)
    assert (journal.facts, journal.files, journal.subfolders, journal.finished()) == ({}, [], [], [])
    assert not (journal.worth_keeping or journal.has_scratch or journal.metrics.measured or journal.costs.names)
    assert not (journal.holds("division.json") or journal.lists("block-00000.json"))
    assert journal.division() is None and journal.kept("division.json", dict) is None
    assert journal.progress_text == "0 of 0 blocks are done"
    with pytest.raises(InputError, match="is damaged"):
        journal.read("division.json")
    journal.close()
    assert contents(unfinished) == before
    assert Journal(unfinished, resume=True).finished() == [0, 1]


def test_a_run_begins_anew_with_the_bytes_of_a_first_one(unfinished: Path) -> None:
    recipe, expected, model = load_recipe("fasp", {"sparsity": 0.3}), tiny(), tiny()
    prune(expected, batches(), recipe)
    journal = Journal(unfinished, restart=True)
    prune(model, batches(), recipe, journal=journal)
    assert same(model, expected)
    assert journal.begun and not journal.replaces and journal.finished() == [0, 1, 2]


@pytest.mark.parametrize("how", ["begin", "write"])
def test_the_first_that_is_written_deletes_the_earlier_run(how: str, unfinished: Path) -> None:
    journal = Journal(unfinished, restart=True)
    journal.begin({"the blocks": 1}) if how == "begin" else journal.write("division.json", {})
    assert contents(unfinished).keys() == {"in-use", "run.json", *([] if how == "begin" else ["division.json"])}
    assert journal.files == ([] if how == "begin" else ["division.json"])


def test_a_file_that_came_in_the_way_keeps_the_earlier_run(unfinished: Path) -> None:
    journal = Journal(unfinished, restart=True)
    (unfinished / "block-00002.json").write_text("mine")
    before = contents(unfinished)
    for use in (lambda: journal.begin({}), lambda: journal.write("division.json", {})):
        with pytest.raises(InputError, match=r"block-00002\.json was not written by this run: move it away"):
            use()
    assert contents(unfinished) == before and journal.replaces


def test_temporary_files_of_an_earlier_process_are_deleted_only_when_a_run_begins(unfinished: Path) -> None:
    scratch = unfinished / "scratch"
    (scratch / "states").mkdir()
    (scratch / "states" / "of-a-killed-process").write_text("")
    (scratch / "converted" / ".new.0123abcd.part").write_text("")
    before, journal = contents(unfinished), Journal(unfinished, resume=True)
    (journal.scratch / "own").mkdir()
    with pytest.raises(InputError, match="cannot continue"):
        journal.begin({"the blocks": 1})
    assert contents(unfinished) == before | {"in-use": b""}
    journal.begin(journal.facts)
    assert sorted(path.name for path in scratch.rglob("*")) == ["converted", "old", "own"]


def test_a_run_that_replaces_another_keeps_converted_weights_and_no_other_temporary_files(unfinished: Path) -> None:
    (unfinished / "scratch" / "states").mkdir()
    (unfinished / "scratch" / "states" / "of-a-killed-process").write_text("")
    journal = Journal(unfinished, restart=True)
    assert [path.name for path in journal.scratch.rglob("*")] == ["converted", "old"]
    (journal.scratch / "converted" / "new").write_text("of this run")
    assert not journal.has_scratch and "run.json" in contents(unfinished) and journal.replaces
    journal.begin({"the blocks": 1})
    assert contents(unfinished).keys() == {"in-use", "run.json", "scratch/converted/new", "scratch/converted/old"}
    assert journal.has_scratch and journal.scratch.is_dir()
    journal.release()
    assert contents(unfinished).keys() == {"run.json", "scratch/converted/new", "scratch/converted/old"}
    assert Journal(unfinished, resume=True).discard() == []


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not the folder of a run"):
        Journal(tmp_path, resume=True)


def test_to_resume_where_nothing_was_begun_is_to_begin(tmp_path: Path) -> None:
    model, again = tiny(), tiny()
    prune(model, batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run", resume=True))
    prune(again, batches(), load_recipe("fasp"))
    assert same(model, again)


def other_weight() -> PreTrainedModel:
    model = tiny()
    with torch.no_grad():
        model.get_input_embeddings().weight[0, 0] += 1
    return model


@pytest.mark.parametrize(
    ("model", "text", "settings", "named"),
    [
        (other_weight, 3, {}, "the model was"),
        (lambda: tiny().double(), 3, {}, "the model was"),
        (tiny, 4, {}, "the calibration tokens were others"),
        (tiny, 3, {"sparsity": 0.25}, r"the recipe\.sparsity was 0\.2 and is 0\.25"),
        (tiny, 3, {"propagation": "intra"}, r"the recipe\.propagation was 'pruned' and is 'intra'"),
        (tiny, 3, {"seed": 1}, r"the recipe\.seed was 0 and is 1"),
    ],
    ids=["weights", "dtype", "text", "sparsity", "policy", "seed"],
)
def test_what_changed_is_refused_by_its_name(model: Any, text: int, settings: Any, named: str, tmp_path: Path) -> None:
    begun(tmp_path / "run")
    with pytest.raises(InputError, match=named):
        prune(model(), batches(text), load_recipe("fasp", settings), journal=Journal(tmp_path / "run", resume=True))


def keeps_large(context: LayerContext) -> MaskedLeastSquares:
    weight = context.loss.weight
    return MaskedLeastSquares(context.loss, weight.abs() >= weight.abs().median())


def keeps_small(context: LayerContext) -> MaskedLeastSquares:
    weight = context.loss.weight
    return MaskedLeastSquares(context.loss, weight.abs() <= weight.abs().median())


def test_changed_code_of_the_users_own_objective_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = Recipe(objective=keeps_large, units="weights", sparsity=0.5)
    prune(tiny(), batches(), recipe, journal=Journal(tmp_path / "run"))
    monkeypatch.setattr(keeps_large, "__code__", keeps_small.__code__)
    before = contents(tmp_path / "run")
    with pytest.raises(InputError, match=f"the user's own code.{__name__}:keeps_large was"):
        prune(tiny(), batches(), recipe, journal=Journal(tmp_path / "run", resume=True))
    assert contents(tmp_path / "run") == before


def test_other_threads_are_refused_since_they_round_otherwise(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        with pytest.raises(InputError, match=rf"the machine\.threads was {threads} and is {threads + 1}"):
            prune(tiny(), batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run", resume=True))
    finally:
        torch.set_num_threads(threads)


DAMAGES = {
    "a flipped bit": lambda data: bytes([*data[:-1], data[-1] ^ 1]),
    "cut": lambda data: data[:40],
    "other JSON": lambda data: b'{"a": 1}',
}


@pytest.mark.parametrize("damage", [*DAMAGES, "gone"])
@pytest.mark.parametrize("name", ["division.json", "block-00001.json", "model.layers.1.safetensors"])
def test_a_damaged_file_of_a_run_is_made_again(name: str, damage: str, tmp_path: Path) -> None:
    begun(tmp_path / "run")
    file, expected, model = tmp_path / "run" / name, tiny(), tiny()
    prune(expected, batches(), load_recipe("fasp"))
    if damage == "gone":
        file.unlink()
    else:
        file.write_bytes(DAMAGES[damage](file.read_bytes()))
    report = prune(model, batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run", resume=True))
    assert same(model, expected)
    assert ("was damaged" in " ".join(report.notes)) == (damage != "gone")


def test_weights_of_another_block_under_its_name_are_noticed(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    expected, model = tiny(), tiny()
    prune(expected, batches(), load_recipe("fasp"))
    first, second = (tmp_path / "run" / f"model.layers.{index}.safetensors" for index in range(2))
    first.write_bytes(second.read_bytes())
    prune(model, batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run", resume=True))
    assert same(model, expected)


def test_a_division_that_is_gone_is_made_again_from_a_metric_of_all_blocks(tmp_path: Path) -> None:
    recipe, settings = RUNS["structured_best"]
    chosen, expected, model = load_recipe(recipe, settings), tiny(), tiny()
    prune(expected, batches(), chosen)
    with pytest.raises(Stopped):
        prune(tiny(), batches(), chosen, journal=Journal(tmp_path / "run"), on_event=Stop(BlockStarted, 2))
    assert not (tmp_path / "run" / "metric-00000.sums").exists()
    (tmp_path / "run" / "division.json").unlink()
    prune(model, batches(), chosen, journal=Journal(tmp_path / "run", resume=True))
    assert same(model, expected)


class CountedCosts(DenseStatistics):
    """Costs of removal with notes; how often they were computed is counted."""

    times = 0

    def removal(self, problem: StructuredLeastSquares, batch: int) -> Removal:
        self.times += 1
        return torch.tensor([2, 0, 1]), torch.tensor([0.0, self.times, batch]), ("a note", f"of {batch}")


def test_costs_of_removal_are_kept_for_their_batch_with_their_notes(tmp_path: Path) -> None:
    counted, problem, found = CountedCosts(), grouped_query(0, "mixed"), []
    for resume in (False, True):
        journal = Journal(tmp_path / "run", resume=resume)
        journal.begin({})
        statistics = journal.keeping_costs(counted)
        found += [(batch, *statistics.removal(problem, batch)) for batch in (4, 4, 1)]
        journal.release()
    assert counted.times == 2
    assert [losses.tolist() for _, _, losses, _ in found] == [[0, 1, 4], [0, 1, 4], [0, 2, 1]] * 2
    assert [notes for *_, notes in found] == [("a note", f"of {batch}") for batch, *_ in found]


def test_costs_that_were_kept_are_read_onto_the_device_of_their_layer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    journal, devices, opening = Journal(tmp_path / "run"), list[str](), safe_open
    journal.begin({})

    def opened(file: Path, framework: str, device: str) -> Any:
        devices.append(device)
        return opening(file, framework=framework, device="cpu")

    monkeypatch.setattr(journal_module, "safe_open", opened)
    for device in (torch.device("cuda:1"), torch.device("cuda:1"), torch.device("cpu")):
        costs = journal.costs.once(("a layer",), lambda: Measured({"costs": torch.ones(2)}), device)
        assert torch.equal(costs.tensors["costs"], torch.ones(2))
    assert devices == ["cuda:1", "cpu"]


def test_a_stray_file_is_told_before_any_work(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    (tmp_path / "run" / "block-00002.json").write_text("{}")
    events: list[Event] = []
    with pytest.raises(InputError, match=r"block-00002\.json was not written by this run: move it away"):
        run = Journal(tmp_path / "run", resume=True)
        prune(tiny(), batches(), load_recipe("fasp"), journal=run, on_event=events.append)
    assert not any(isinstance(event, BlockStarted | BlockFinished) for event in events)


def test_an_edited_number_of_a_division_changes_nothing(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    file, expected, model = tmp_path / "run" / "division.json", tiny(), tiny()
    prune(expected, batches(), load_recipe("fasp"))
    division = json.loads(file.read_text())
    division["allocation"]["blocks"][2]["intermediate"] = 8
    file.write_text(json.dumps(division))
    prune(model, batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run", resume=True))
    assert same(model, expected)


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_manifest_is_refused_by_its_name(damage: str, tmp_path: Path) -> None:
    begun(tmp_path / "run")
    file = tmp_path / "run" / "run.json"
    file.write_bytes(DAMAGES[damage](file.read_bytes()))
    before = contents(tmp_path)
    with pytest.raises(InputError, match=r"run\.json was not written by this version of optprune, or is damaged"):
        Journal(tmp_path / "run", resume=True)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("order", ["weights", "record"])
def test_a_block_is_finished_only_with_both_its_record_and_its_weights(
    order: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill between the two leaves a block that is pruned again, whichever of them was written first."""
    keep, stop = Journal.keep, {"weights": "block-00001.json", "record": "model.layers.1.safetensors"}[order]

    def stopping(self: Journal, name: str, write: Any) -> None:
        if name == stop:
            raise Stopped
        keep(self, name, write)

    finish = Journal.finish

    def record_first(self: Journal, decoder: Decoder, result: Any) -> None:
        name = decoder.block_name(result.record.index)
        record = {"weights": f"{name}.safetensors", "record": {}}
        self.write(f"block-{result.record.index:05d}.json", record)
        finish(self, decoder, result)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "keep", stopping)
        if order == "record":
            patch.setattr(Journal, "finish", record_first)
        with pytest.raises(Stopped):
            prune(tiny(), batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run"))
    journal, model, expected = Journal(tmp_path / "run", resume=True), tiny(), tiny()
    assert journal.finished() == [0]
    prune(model, batches(), load_recipe("fasp"), journal=journal)
    prune(expected, batches(), load_recipe("fasp"))
    assert same(model, expected)


def test_records_of_blocks_outlive_numbers_that_json_does_not_know(tmp_path: Path) -> None:
    begun(tmp_path / "run")
    journal = Journal(tmp_path / "run", resume=True)
    stored = journal.read("block-00000.json")
    stored["record"]["layers"][0]["objective"] = float("inf")
    journal.write("block-00000.json", stored)
    assert Journal(tmp_path / "run", resume=True).record(0).layers[0].objective == float("inf")


def test_the_model_given_is_not_what_decides(tmp_path: Path) -> None:
    """The same weights in another object are the same model."""
    begun(tmp_path / "run")
    prune(copy.deepcopy(tiny()), batches(), load_recipe("fasp"), journal=Journal(tmp_path / "run", resume=True))
