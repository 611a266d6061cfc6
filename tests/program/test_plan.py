"""The plan of a run: its parts against what a run holds, its phases, and the refusal of what cannot fit."""

import gc
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from optprune.calibration import first_inputs
from optprune.calibration.generated import generated_windows
from optprune.calibration.propagation import TwoPaths
from optprune.errors import InputError
from optprune.export.check import logits_of
from optprune.models import Decoder
from optprune.program import Program, Request, resolve
from optprune.program.memory import Part, moments, parts_of
from optprune.program.plan import planned_memory
from optprune.program.room import Room, alternatives, check_room, placed
from optprune.program.time import Rates, Surroundings, block_passes, seconds_of
from optprune.pruning import Measuring, measured_plan, plan, prune
from optprune.pruning.executors import SerialExecutor
from optprune.pruning.measured_plan import BlockProbe, Steps, _check_probe_fits
from optprune.recipe import load_recipe
from optprune.report import Event, LayerSolved
from optprune.system.wording import amount
from tests.helpers.memory import told
from tests.helpers.programs import LENGTH, program_of
from tests.helpers.short_runs import batches
from tests.helpers.tiny_models import ALL_MODELS, save_tiny, tiny_llama, tiny_opt

GB = 10**9


def part(parts: list[Part], name: str) -> int:
    return sum(each.bytes for each in parts if each.name == name)


# -- the parts are the sizes of tensors


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt])
def test_what_stays_and_a_block_are_counted_as_the_model_has_them(make: Any) -> None:
    decoder = Decoder(make())
    inside = {id(weight): weight.nbytes for weight in decoder.blocks.parameters()}
    every = {id(weight): weight.nbytes for weight in decoder.model.parameters()}
    work = program_of(decoder=decoder)
    assert work.resident_bytes == sum(every.values()) - sum(inside.values())
    assert work.block_bytes == sum(weight.nbytes for weight in decoder.blocks[0].parameters())
    whole = parts_of(replace(work, request=replace(work.request, whole=True)), "pruning", 0, 0)
    assert part(whole, "embeddings, head and norms") == sum(every.values())
    assert part(whole, "the block") == 0 < part(parts_of(work, "pruning", 0, 0), "the block")


@pytest.mark.parametrize("policy", ["dense", "pruned", "intra", "cross", "partial", "local"])
def test_hidden_states_are_counted_as_often_as_a_policy_holds_them(policy: str) -> None:
    model, given = tiny_llama(num_hidden_layers=3), batches()
    shapes = {(*batch.shape, model.config.hidden_size) for batch in given}
    held = set[int]()

    def on_event(event: Event) -> None:
        # In the second block, where streams that were one at the first have parted, before its first layer is written.
        if isinstance(event, LayerSolved) and ".1." in event.layer.name and not held:
            alive = [one for one in gc.get_objects() if type(one) is torch.Tensor and tuple(one.shape) in shapes]
            held.update(one.untyped_storage().data_ptr() for one in alive)

    recipe = load_recipe("fasp", {"propagation": policy, "units": "mlp"})
    prune(model, given, recipe, on_event=on_event)
    work = program_of(propagation=policy)
    assert len(held) == work.streams * len(given)
    assert part(parts_of(work, "pruning", 0, 0), "hidden states") == work.streams * 8 * LENGTH * 64 * 4


OWN = TwoPaths("own", independent=False, sequential=True, dense_target=False)
"""a policy whose dense blocks are needed for the second path alone"""


@pytest.mark.parametrize(
    "policy", ["dense", "pruned", "intra", "cross", "partial", "local", pytest.param(OWN, id="own")]
)
def test_the_dense_block_is_counted_where_a_policy_keeps_it_beside_the_pruned_one(policy: Any) -> None:
    model, copies = tiny_llama(num_hidden_layers=3), list[int]()
    shape = model.model.layers[1].mlp.down_proj.weight.shape

    def alive() -> list[torch.nn.Parameter]:
        return [one for one in gc.get_objects() if type(one) is torch.nn.Parameter and one.shape == shape]

    def on_event(event: Event) -> None:
        if isinstance(event, LayerSolved) and ".1." in event.layer.name and not copies:
            copies.append(len({id(one) for one in alive()} - {id(one) for one in before}))

    recipe, before = load_recipe("sparsegpt", {"propagation": policy}), alive()
    prune(model, batches(), recipe, on_event=on_event)
    work = program_of(recipe, decoder=Decoder(tiny_llama(num_hidden_layers=3)), whole=True)
    assert part(parts_of(work, "pruning", 0, 0), "the block") == copies[0] * work.block_bytes


def test_hidden_states_are_where_they_are_to_be() -> None:
    work = program_of(samples=4096, propagation="intra")
    on_disk, on_host = (replace(work, request=replace(work.request, states=states)) for states in ("disk", "host"))
    filed, held = planned_memory(on_disk, 0, 0), planned_memory(work, 0, 0)
    assert filed.host_bytes < held.host_bytes - work.stream_bytes
    assert filed.disk_bytes > held.disk_bytes + 1.9 * work.stream_bytes
    gpu, moved = (
        planned_memory(replace(one, request=replace(one.request, device="cuda")), 0, 0) for one in (work, on_host)
    )
    assert moved.device_bytes < gpu.device_bytes and moved.host_bytes > gpu.host_bytes


def test_the_logits_that_are_compared_are_those_of_a_window() -> None:
    decoder = Decoder(tiny_llama())
    logits = logits_of(decoder, torch.zeros(1, LENGTH, dtype=torch.long))
    parts = parts_of(program_of(decoder=decoder), "checking", 0, 0)
    assert part(parts, "logits of a window") == logits.nbytes
    assert part(parts, "logits, compared") >= 2 * logits.nbytes


def test_the_process_that_reloads_counts_beside_this_one() -> None:
    work, base, fresh = program_of(), 400 << 20, 200 << 20
    phases = {phase.name: phase for phase in planned_memory(work, base, fresh).phases}
    assert phases["checking"].host_bytes > phases["pruning"].host_bytes + fresh - (50 << 20)
    assert planned_memory(work, base, fresh).host_bytes == phases["checking"].host_bytes


def test_a_head_of_many_words_is_what_a_metric_takes() -> None:
    plain, wide = (Decoder(tiny_llama(vocab_size=size)) for size in (512, 50_000))
    small, large = (planned_memory(program_of("sparse_best", decoder=one), 0, 0) for one in (plain, wide))
    metric = [phase.parts["backward pass"] for one in (small, large) for phase in one.phases if phase.name == "metric"]
    # For 128 positions at a time: logits and softmax in float32, and two in float64.
    assert metric[1] == 128 * 50_000 * 24 > metric[0]


@pytest.mark.slow
@told
def test_a_block_takes_what_is_planned_whatever_is_the_most() -> None:
    # As in benchmarks/workspace.py: what the C library keeps of what is freed is no part of the plan.
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": str(64 * 1024)}
    words = [sys.executable, "-m", "tests.helpers.planned_block"]
    run = subprocess.run(words, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    for regime, (measured, planned) in json.loads(run.stdout).items():
        # So near below that no part can be missing: the smallest that counts is a seventh.
        assert 0.87 * measured < planned < 1.2 * measured, (regime, measured, planned)


# -- workers


def test_workers_are_counted_each() -> None:
    one, two, four = (
        planned_memory(program_of("alps", propagation="intra", workers=count, samples=64), 0, 100 << 20)
        for count in (1, 2, 4)
    )
    imports = [plan.phases[4].parts.get("imports of the workers", 0) for plan in (one, two, four)]
    assert imports[0] == 0 < 2 * imports[1] == imports[2]
    assert one.host_bytes < two.host_bytes < four.host_bytes
    elsewhere = planned_memory(program_of("alps", propagation="intra", workers=4, ray=True, samples=64), 0, 100 << 20)
    assert elsewhere.host_bytes < four.host_bytes


@pytest.mark.parametrize(
    ("recipe", "policy", "workers", "sentence"),
    [
        ("flap", "pruned", 8, "of 8 workers no more than 1 are used, because 1 layer can be pruned at a time"),
        ("fasp", "pruned", 8, "of 8 workers no more than 2 are used, because 2 layers can be pruned at a time"),
        ("wanda", "pruned", 8, "of 8 workers no more than 7 are used, because 7 layers can be pruned at a time"),
        ("wanda", "pruned", 7, ""),
        ("wanda", "intra", 3, "of 3 workers no more than 2 are used, because 2 blocks can be pruned at a time"),
        ("wanda", "intra", 2, ""),
        ("depth", "pruned", 2, "of 2 workers no more than 1 is used, because the recipe solves no layer"),
        ("fasp", "pruned", 1, ""),
    ],
)
def test_workers_that_a_recipe_cannot_use_are_told(recipe: str, policy: str, workers: int, sentence: str) -> None:
    assert program_of(recipe, propagation=policy, workers=workers).spare_workers == sentence


# -- times


RATES = Rates(passes=1e-9, head=1e-9, solves=1e-9, refinement=1e-9, metric=1e-9, budget=1e-9, fixed=0.1, read=0.01)
AROUND = Surroundings(reload=3.0, start=4.0, draw=0.5, fresh=1, write=1e-9, write_file=0.0, digest=1e-9)


def times(program: Program) -> dict[str, float]:
    return seconds_of(program, RATES, AROUND, opening=0.5, tokenising=1.5, starting=4.0)


def test_passes_go_with_the_tokens_and_all_with_the_blocks() -> None:
    few, many = (program_of(samples=samples) for samples in (1000, 3000))
    passes = 2 * block_passes(few, 0).flops * RATES.passes
    assert times(many)["pruning"] - times(few)["pruning"] == pytest.approx(2000 * LENGTH * passes)
    deep = times(program_of(samples=1000, decoder=Decoder(tiny_llama(num_hidden_layers=6))))
    assert deep["pruning"] == pytest.approx(3 * times(few)["pruning"])
    assert times(few)["checking"] > AROUND.reload and times(few)["tokenising"] == 1.5


def test_only_phases_that_a_recipe_has_take_time() -> None:
    plain, best = times(program_of()), times(program_of("structured_best"))
    assert plain["metric"] == plain["budget"] == 0
    assert best["metric"] > 0 and best["budget"] > 0
    deep = Decoder(tiny_llama(num_hidden_layers=12))
    probed, unprobed = (
        program_of("structured_best", decoder=deep, fields={"allocation.probe_tokens": tokens}) for tokens in (64, 0)
    )
    # Each of two changes in twelve blocks goes through those behind it, half of them on average.
    forward = 2 * deep.linear_weights() / 12 * probed.probe_tokens
    along = times(probed)["budget"] - times(unprobed)["budget"]
    assert along > 12 * 2 * 11 / 2 * forward * RATES.budget


def test_a_smaller_vocabulary_has_a_phase_of_its_own() -> None:
    few, many, none = (program_of("vocabulary", fields={"vocabulary.tokens": tokens}) for tokens in (1024, 4096, 0))
    assert "vocabulary" not in times(none) and "vocabulary" not in {phase.name for phase in planned_memory(none).phases}
    once = sum(block_passes(many, index).flops for index in range(many.block_count)) / 2
    three_passes = 3 * 3072 * once * RATES.passes
    assert times(many)["vocabulary"] - times(few)["vocabulary"] > three_passes
    needed = [planned_memory(work).phases[3].parts["predictions and states"] for work in (few, many)]
    # At least one prediction of each receiving token, in two bytes, for every token of the text.
    assert needed[1] - needed[0] > 2 * 3072 * many.vocabulary / 6
    removed = many.dense_numbers - many.pruned_numbers
    assert removed == pytest.approx(2 * many.vocabulary / 3 * many.hidden, rel=0.01), "embedding and head are not tied"


def test_the_choice_of_tokens_is_a_phase_with_the_predictions_of_the_dense_model() -> None:
    plain = program_of()
    assert "choosing" not in times(plain) and "choosing" not in {phase.name for phase in planned_memory(plain).phases}
    many, few, none = (program_of("vocabulary", fields={"vocabulary.predictions": n}) for n in (65536, 1024, 0))
    once = sum(block_passes(many, index).flops for index in range(many.block_count)) / 2
    assert times(many)["tokenising"] == times(plain)["tokenising"] < times(none)["choosing"], "the text is read twice"
    assert times(many)["choosing"] - times(few)["choosing"] > 64512 * once * RATES.passes
    planned = [{phase.name: phase for phase in planned_memory(work, base=0).phases} for work in (many, few, none)]
    assert [phases["choosing"].parts.get("predictions of tokens") for phases in planned] == [
        *(2 * [12 * 1024 * many.vocabulary]),
        None,
    ]
    # Blocks are in memory one at a time.
    model = many.resident_bytes + many.block_bytes
    assert [phases["choosing"].parts.get("the dense model") for phases in planned] == [model, model, None]
    assert all(set(phases["tokenising"].parts) == {"imports", "token ids"} for phases in planned)


def test_a_smaller_vocabulary_is_refitted_on_less_text_where_memory_is_short() -> None:
    work = program_of("vocabulary", fields={"vocabulary.tokens": 10**8})
    with pytest.raises(InputError, match=r"with --set vocabulary.tokens=8192 it needs [\d.]+ [GM]B"):
        check_room(work, Room(host=8 * GB))


def test_workers_share_the_solves() -> None:
    decoder = Decoder(tiny_llama(num_hidden_layers=12))
    alone, shared = (
        times(program_of("alps", propagation="intra", decoder=decoder, workers=count))["pruning"] - AROUND.start
        for count in (1, 3)
    )
    assert (alone + AROUND.start) / 3 < shared + AROUND.start < (alone + AROUND.start) * 0.6 + AROUND.start


def test_the_choice_of_experts_takes_time() -> None:
    decoder = Decoder(ALL_MODELS["mixtral"]())
    few, many = (program_of("reap", samples=samples, decoder=decoder) for samples in (8, 16))
    shape, hidden = decoder.shape(0), decoder.model.config.hidden_size
    # Three layers of every expert for each token, and the products of the answers of two experts.
    each = 3 * hidden * shape.mlp_width * shape.experts + shape.experts**2 * hidden
    passes = sum(block_passes(many, index).flops for index in range(many.block_count)) * RATES.passes
    more = times(many)["pruning"] - times(few)["pruning"] - 8 * LENGTH * passes
    assert more > 8 * LENGTH * many.block_count * 2 * each * RATES.solves > 0
    probed = BlockProbe(many, decoder, batches(), 1).rates()
    assert probed.solves > 0


@pytest.mark.parametrize("recipe", ["fasp", "structured_best", "sparse_best", "spap"])
def test_a_probe_times_what_a_recipe_does_and_leaves_the_model(recipe: str) -> None:
    model = tiny_llama(num_hidden_layers=2)
    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    program = program_of(recipe, decoder=Decoder(model))
    rates = BlockProbe(program, Decoder(model), batches(), 1).rates()
    assert rates.passes > 0 and rates.solves > 0 and rates.head > 0 and rates.budget > 0
    assert (rates.metric > 0) == (program.metric is not None)
    assert (rates.refinement > 0) == (program.method.recovery is not None)
    after = model.state_dict()
    assert all(torch.equal(weight, after[name]) for name, weight in before.items())


def test_a_probe_leaves_out_what_would_take_over_a_tenth_of_the_run() -> None:
    model, seen = tiny_llama(num_hidden_layers=2), list[tuple[int, int]]()
    program = program_of("structured_best", decoder=Decoder(model))
    probe = BlockProbe(program, Decoder(model), batches(), 1)
    steps = Steps(lambda done, total: seen.append((done, total)))
    assert probe.rates_within(steps)[1] == () and seen == [(0, 5), (1, 5), (2, 5), (3, 5)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(BlockProbe, "metric", None)  # it would fail where it is called
        rates, guessed = probe.rates_within(Steps(seconds=0.0))
    assert guessed == ("solves", "refinement", "metric", "budget")
    assert rates.solves == rates.metric == rates.budget >= rates.passes > 0


def test_a_probe_has_a_tenth_of_the_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    given = list[float]()
    monkeypatch.setattr(measured_plan, "expected_seconds", lambda *_: {"pruning": 20.0, "saving": 10.0})
    monkeypatch.setattr(measured_plan, "Steps", lambda _, seconds: given.append(seconds) or Steps(seconds=0.0))
    monkeypatch.setattr(Surroundings, "measured", None)  # it starts a process, which takes longer than nothing
    tiny_llama().config.save_pretrained(tmp_path)
    planned = plan(tmp_path, load_recipe("fasp"), samples=8, seq_length=LENGTH, device="cpu", measuring=Measuring())
    assert given == [pytest.approx(3.0)] and planned.guessed[0] == "solves"


def test_times_of_a_probe_are_those_of_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of passes that take 2 seconds and half a second for each token, and of a metric that takes a second for each."""
    decoder, given = Decoder(tiny_llama(num_hidden_layers=2)), batches()
    program = program_of(decoder=decoder)
    probe = BlockProbe(program, decoder, given, 1)
    tokens = sum(batch.numel() for batch in given)

    def pruned(method: Any, metrics: Any, count: int) -> measured_plan.Times:
        return measured_plan.Times(2.0 + 0.5 * sum(batch.numel() for batch in given[:count]), 3.0, 0.0)

    monkeypatch.setattr(probe, "prune", pruned)
    monkeypatch.setattr(measured_plan, "_timed", lambda device, run: 6.0)
    rates = probe.rates()
    assert rates.passes * block_passes(program, program.largest).flops == pytest.approx(0.5)
    assert rates.fixed == pytest.approx(2.0)
    assert probe.forward() == 6.0 / tokens
    assert probe.head() == 6.0 / min(128, given[0].numel())
    # Of a first batch, of all four, and of the gradient at the head of one.
    ticks = iter([0.0, 1.0, 1.0, 1.0 + tokens, 500.0, 500.0 + given[0].numel() / 4])
    weighed = BlockProbe(program_of("sparse_best", decoder=decoder), decoder, given, 1)
    monkeypatch.setattr(measured_plan, "clock", lambda device: next(ticks))
    monkeypatch.setattr(weighed, "forward", lambda: 0.0)
    assert weighed.metric()[1:] == (0.75, 0.25)


@pytest.mark.parametrize(("recipe", "pairs"), [("fasp", 1), ("spap_plus", 2)])
def test_moments_of_held_out_tokens_are_counted_as_they_are_held(
    recipe: str, pairs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = list[int]()
    solve = SerialExecutor.solve

    def solving(self: SerialExecutor, tasks: Any, collected: Any, take: Any) -> None:
        every = [*collected.moments.values(), *collected.held_out.values()]
        held.append(sum(each.covariance.nbytes for each in every))
        solve(self, tasks, collected, take)

    monkeypatch.setattr(SerialExecutor, "solve", solving)
    fields = {"propagation": "pruned", "units": "mlp"}
    prune(tiny_llama(), batches(), load_recipe(recipe, fields))
    program = program_of(recipe, fields=fields)
    [stage] = program.example.stages
    assert held == [pairs * 4 * 128**2] * 2  # the inputs of the last matrix of an MLP, in two blocks
    assert moments(program, program.taps(stage.targets), False, bool(program.held_out)) == held[0]


def test_a_probe_is_fed_with_what_enters_its_block() -> None:
    decoder, given = Decoder(tiny_llama(num_hidden_layers=2)), batches()
    probe = BlockProbe(program_of(decoder=decoder), decoder, given, 1)
    with torch.no_grad():
        [first, *_] = first_inputs(decoder, given).hidden
        assert not torch.equal(probe.hidden[0], first)
        want = decoder.model.model(input_ids=given[0], output_hidden_states=True).hidden_states[1]
    assert torch.allclose(probe.hidden[0], want, atol=1e-5)


@pytest.mark.e2e
def test_a_config_alone_is_planned_and_timed(tmp_path: Path) -> None:
    tiny_llama().config.save_pretrained(tmp_path)
    planned = plan(tmp_path, load_recipe("fasp"), samples=8, seq_length=LENGTH, device="cpu", measuring=None)
    assert planned.seconds is None and planned.host_bytes > 0
    timed = plan(tmp_path, load_recipe("fasp"), samples=8, seq_length=LENGTH, device="cpu", measuring=Measuring())
    assert timed.seconds is not None and timed.seconds > 1
    assert [phase.name for phase in timed.phases] == [
        *("loading", "tokenising", "metric", "budget", "pruning", "saving", "checking")
    ]


# -- what cannot fit


def test_a_block_that_cannot_fit_is_not_measured(tmp_path: Path) -> None:
    config = tiny_llama().config
    config.head_dim = 10**6
    config.save_pretrained(tmp_path)
    of_it = partial(plan, tmp_path, load_recipe("fasp"), samples=4, seq_length=32, device="cpu")
    with pytest.raises(InputError, match=r"measuring one block takes .* of memory, and .* are free: use --no-probe"):
        of_it()
    assert of_it(measuring=None).host_bytes > 10**13


def test_windows_that_are_generated_are_not_in_a_measured_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optprune.pruning.measured_plan.free_memory", lambda: GB)
    work = program_of("fasp", samples=8)
    few, many = (replace(work, request=replace(work.request, generated=count)) for count in (0, 10**6))
    assert [_check_probe_fits(each, 2, 0) for each in (few, many)] == [None, None]


@pytest.mark.parametrize("length", [32, 2048])
def test_the_logits_of_all_pieces_that_are_generated_at_once_are_counted(length: int) -> None:
    rows, planned = list[int](), list[int]()
    for words in (64, 128):
        decoder = Decoder(tiny_llama(max_position_embeddings=4096, vocab_size=words))
        request = program_of(decoder=decoder, length=length, generated=520).request
        planned.append(part(parts_of(resolve(decoder, request), "generating", 0, 0), "keys, values and logits"))
    decoder.model.get_output_embeddings().register_forward_hook(lambda _, __, logits: rows.append(len(logits)))
    generated_windows(decoder.model, [torch.randint(1, 60, (2, length))], 520 if length == 32 else 9)
    # Float32 logits, their softmax and its cumulated sum.
    assert planned[1] - planned[0] == max(rows) * 3 * 4 * 64


@pytest.mark.parametrize(
    ("room", "what"),
    [(Room(host=GB), "GB of memory"), (Room(process=GB), "(ulimit -v)"), (Room(disk=1000), "MB of the disk")],
)
def test_what_cannot_fit_is_refused_in_a_sentence(room: Room, what: str) -> None:
    work = program_of("alps", samples=10**6, propagation="cross", states="device")
    with pytest.raises(InputError) as refused:
        check_room(work, room)
    sentence = str(refused.value)
    assert what in sentence and "--no-plan begins all the same" in sentence and "\n" not in sentence
    assert ("the most of it for the output" if room.disk is not None else "hidden states") in sentence


def test_a_refusal_proposes_what_fits_and_nothing_else() -> None:
    work = program_of("structured_best", samples=800_000, propagation="cross")
    room = Room(host=5 * GB, disk=GB)
    with pytest.raises(InputError, match=r"with --samples \d+ it needs") as refused:
        check_room(work, room)
    proposed = re.findall(r"with (--[^()]*?) it needs ([\d.]+ [GM]B)", str(refused.value))
    every = {words: other for variants in alternatives(work) for words, other in variants}
    assert proposed
    for words, needed in proposed:
        check_room(every[words], room)
        assert needed == amount(planned_memory(placed(every[words], room)).host_bytes)
    assert "--set metric=diagonal" not in str(refused.value)
    assert len({words.split()[0] for words, _ in proposed}) == len(proposed), "each option once, the nearest value"


@pytest.fixture
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process holds nothing, which otherwise changes from one look to the next."""
    monkeypatch.setattr("optprune.program.plan.held_bytes", lambda: 0)


def test_fewer_generated_windows_are_proposed_and_never_so_little_text_that_they_are_held_out() -> None:
    work = program_of("alps", samples=64, generated=800_000, propagation="cross")
    with pytest.raises(InputError, match=r"with --generated \d+ it needs"):
        check_room(work, Room(host=5 * GB, disk=GB))
    work = program_of("spap_plus", samples=64, generated=100)
    assert round((100 + 8) * work.held_out) > 8
    proposed = {words for variants in alternatives(work) for words, _ in variants if words.startswith("--samples")}
    assert proposed == {"--samples 32", "--samples 16"}


def test_another_policy_is_proposed_where_that_is_enough() -> None:
    work = program_of("alps", samples=40_000, propagation="cross", states="device")
    # What imports take differs between machines: the room is that of the other policy.
    other = program_of("alps", samples=40_000, propagation="pruned", states="device")
    room = Room(host=planned_memory(other).host_bytes)
    with pytest.raises(InputError, match="with --propagation pruned it needs"):
        check_room(work, room)


@pytest.mark.usefixtures("nothing_held")
@pytest.mark.parametrize("lacking", ["host", "device", "disk"])
def test_a_shortfall_of_one_byte_is_refused(lacking: str) -> None:
    work = program_of("alps", samples=40_000, propagation="cross", device="cuda", states="device")
    planned = planned_memory(work)
    need = {"host": planned.host_bytes, "device": planned.device_bytes, "disk": planned.disk_bytes}[lacking]
    check_room(work, Room(**{lacking: need}))
    with pytest.raises(InputError, match=r"the run needs .* are there"):
        check_room(work, Room(**{lacking: need - 1}))


def eight_billion() -> Program:
    """structured_best, at its defaults, for the shapes of Llama 3 8B in bfloat16 on a GPU."""
    sizes: Any = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "vocab_size": 128256}
    heads: Any = {
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "max_position_embeddings": 8192,
    }
    with torch.device("meta"):
        model: Any = LlamaForCausalLM(LlamaConfig(**sizes, **heads))
    return resolve(
        Decoder(model.to(torch.bfloat16)),
        Request(recipe=load_recipe("structured_best"), device="cuda", dtype=torch.bfloat16),
    )


def test_hidden_states_are_kept_where_the_plan_fits() -> None:
    """By the figures that the guide names."""
    work = eight_billion()
    assert [placed(work, Room(device=size * GB)).request.states for size in (26, 24, 17)] == ["device", "host", "host"]
    assert placed(work, Room(device=24 * GB, host=8 * GB, disk=10**12)).request.states == "disk"
    told_of = check_room(work, Room(device=24 * GB))
    assert "16.5 GB of the GPU" in told_of
    assert "hidden states are kept on the host, because they would need 25.1 GB of the GPU's memory" in told_of
    fixed = replace(work, request=replace(work.request, states="device"))
    with pytest.raises(InputError) as refused:
        check_room(fixed, Room(device=24 * GB, host=64 * GB))
    assert "needs 25.1 GB of the GPU's memory in the phase pruning" in str(refused.value)
    assert "and 24.0 GB are there: with --states host it needs 16.5 GB, with --samples 64 it needs" in str(
        refused.value
    )
    guide = Path("docs/guide/large.md").read_text()
    assert "25.1 GB" in guide and "16.5 GB" in guide


def test_a_refusal_proposes_two_options_where_none_alone_is_enough() -> None:
    work = eight_billion()
    fixed = replace(work, request=replace(work.request, states="device"))
    with pytest.raises(InputError, match=r"are there: with --states disk --propagation pruned it needs 12.6 GB \("):
        check_room(fixed, Room(device=16 * GB))


def test_a_run_that_was_begun_has_the_disk_that_it_has_filled(tmp_path: Path) -> None:
    begun = tmp_path / "out.run"
    begun.mkdir()
    with (begun / "block.safetensors").open("wb") as file:
        file.truncate(10**12)
    without, there = (Room.measured(torch.device("cpu"), tmp_path / "out", *more) for more in ((), (begun,)))
    assert without.disk is not None and there.disk is not None
    assert 0.95 * 10**12 < there.disk - without.disk < 1.05 * 10**12


def test_what_fits_is_told_in_a_line() -> None:
    told_of = check_room(program_of(), Room.measured(torch.device("cpu"), Path("out")))
    assert told_of.startswith("planned: at most ") and "of the disk" in told_of


def test_the_gpu_has_room_of_its_own() -> None:
    work = program_of(samples=10**6, device="cuda", states="device")
    assert planned_memory(work).device_bytes > 8 * GB > planned_memory(work).host_bytes
    with pytest.raises(InputError, match="of the GPU's memory"):
        check_room(work, Room(host=8 * GB, device=GB))


def test_the_plan_of_a_saved_folder_is_that_of_its_shapes(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    planned = plan(folder, load_recipe("fasp"), samples=8, seq_length=LENGTH, device="cpu", measuring=None)
    pruning = next(phase for phase in planned.phases if phase.name == "pruning")
    assert pruning.parts["hidden states"] == 8 * LENGTH * 64 * 4
