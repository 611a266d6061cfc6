"""Healing: what a tiny pruned model gains by it, what stays as it was, what is kept, and what is refused."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from optprune import heal, load_recipe, prune
from optprune.errors import InputError, NumericalError
from optprune.healing import HealingFolder, HealingSettings, HealReport, training
from optprune.healing.distillation import Reader
from optprune.healing.heal import in_epochs, work
from optprune.healing.training import HeldOut, Training
from optprune.measure import divergence_from
from optprune.models import Decoder
from optprune.report import DivergenceMeasured, PhaseFinished
from tests.helpers.faults import noticed
from tests.helpers.short_runs import same
from tests.helpers.thread_peers import together
from tests.helpers.tiny_models import tiny_llama, tiny_opt, tiny_qwen2
from tests.helpers.token_batches import batches
from tests.helpers.trained_tiny import halved, news, trained

RATE = 2e-3
SLOW = HealingSettings(learning_rate=RATE / 10)
WIDE = "gate_proj.weight"
"""the end of the names of parameters that are float32 in a model of mixed dtypes"""


def held_out() -> Tensor:
    """Windows of articles that nothing was trained on."""
    return news(60, 70)[:16]


def text(steps: int, size: int = 8) -> list[Tensor]:
    return list(news(10, 60)[: steps * size].split(size))


def healed(steps: int = 6, model: Any = None, **options: Any) -> tuple[HealReport, Any]:
    """A pruned tiny model after a few steps, and the report; options are of the settings or of `heal`."""
    model = halved(trained()) if model is None else model
    own = {name: options.pop(name) for name in ("folder", "peers", "on_event") if name in options}
    teacher = options.pop("teacher", None) or trained()
    settings = HealingSettings(**{"learning_rate": RATE, **options})
    return heal(model, teacher, text(steps), held_out=held_out(), settings=settings, **own), model


def test_a_pruned_model_is_healed() -> None:
    dense, model = trained(), halved(trained())
    before, kept = divergence_from(model, dense, held_out()), {n: w != 0 for n, w in model.named_parameters()}
    found = list[Any]()
    report, model = healed(60, model, on_event=found.append)
    after = divergence_from(model, dense, held_out())
    assert before.perplexity > 1.05 * before.dense_perplexity, "nothing was lost by pruning"
    assert after.divergence < before.divergence * 2 / 3
    assert after.perplexity < before.perplexity
    for told, measured in ((report.before, before), (report.after, after)):
        assert told.divergence == pytest.approx(measured.divergence, rel=1e-4)
        assert told.perplexity == pytest.approx(measured.perplexity, rel=1e-4)
    assert report.dense_perplexity == pytest.approx(after.dense_perplexity, rel=1e-4)
    for name, weight in model.named_parameters():
        zeros = weight.view(torch.int32)[~kept[name]]
        assert torch.equal(weight != 0, kept[name]) and not bool(zeros.any()), name
        assert weight.requires_grad and weight.grad is None
    assert not model.training
    assert (report.steps, report.tokens, report.held_out_tokens) == (60, 60 * 8 * 64, 16 * 64)
    told = [event for event in found if isinstance(event, DivergenceMeasured)]
    assert [event.step for event in told] == list(range(0, 61, 6)) == [one.step for one in report.measured]
    assert [event.phase.name for event in found if isinstance(event, PhaseFinished)] == ["healing"]


@pytest.mark.parametrize("make", [tiny_opt, tiny_qwen2, lambda: tiny_llama(tie_word_embeddings=True)])
def test_ties_and_uneven_widths_stay(make: Callable[[], Any]) -> None:
    dense, model = make(), make()
    prune(model, batches(), load_recipe("structured_best", {"sparsity": 0.3, "allocation.multiple": 1}))
    shapes = {name: weight.shape for name, weight in model.named_parameters()}
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    with torch.no_grad():  # restoration has left too little to heal
        for name, weight in model.named_parameters():
            if "layers" in name and weight.ndim == 2:
                weight.mul_(0.8)
    before = copy.deepcopy(model)
    report = heal(model, dense, batches()[:3], held_out=batches()[3], settings=SLOW)
    assert report.after.step
    assert {name: weight.shape for name, weight in model.named_parameters()} == shapes
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
    if model.config.tie_word_embeddings:
        assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert not same(model, before)


def test_checkpointing_and_autocast_and_half_precision() -> None:
    report, model = healed(gradient_checkpointing=True)
    plain, other = healed()
    assert same(model, other)
    rough, _ = healed(dtype="bfloat16")
    assert rough.after.divergence == pytest.approx(plain.after.divergence, rel=0.05)
    half = halved(trained()).to(torch.bfloat16)
    kept = {name: weight != 0 for name, weight in half.named_parameters()}
    report, half = healed(model=half)
    assert {weight.dtype for weight in half.parameters()} == {torch.bfloat16}
    assert all(torch.equal(weight != 0, kept[name]) for name, weight in half.named_parameters())
    assert report.after.divergence < report.before.divergence
    found = divergence_from(copy.deepcopy(half).float(), trained(), held_out())
    assert report.after.divergence == pytest.approx(found.divergence, rel=1e-4), "told of what is stored"


@pytest.mark.parametrize("make", [tiny_opt, tiny_qwen2, tiny_llama])
def test_embeddings_and_the_head_are_trained_only_if_it_is_asked_for(make: Callable[[], Any]) -> None:
    for wanted in (False, True):
        dense, model = make(), halved(make())
        before = copy.deepcopy(model)
        settings = replace(SLOW, embeddings=wanted)
        report = heal(model, dense, batches()[:3], held_out=batches()[3], settings=settings)
        assert report.after.step and report.settings["embeddings"] == wanted
        changed = {
            name for name, weight in before.named_parameters() if not torch.equal(weight, model.get_parameter(name))
        }
        tables = {name for name, _ in before.named_parameters() if "embed" in name or "lm_head" in name}
        assert tables and changed >= {name for name, weight in model.named_parameters() if weight.ndim > 1} - tables
        assert tables <= changed if wanted else not tables & changed
        assert all(weight.requires_grad and weight.grad is None for weight in model.parameters())


def test_the_learning_rate_rises_in_a_line_and_falls_along_a_cosine() -> None:
    rates = [HealingSettings(learning_rate=1.0, warmup=0.2).rate(step, 10) for step in range(10)]
    assert rates[:3] == [0.5, 1.0, 1.0]
    assert rates[2:] == pytest.approx([0.5 + 0.5 * math.cos(math.pi * step / 8) for step in range(8)])
    assert HealingSettings(learning_rate=1.0, warmup=0.0).rate(0, 1) == 1.0


def test_steps_have_the_rates_of_the_schedule(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()  # before its own training would be watched too
    rates = list[float]()
    step = torch.optim.AdamW.step

    def watched(self: torch.optim.AdamW, *args: Any) -> Any:
        rates.append(self.param_groups[0]["lr"])
        assert [group["weight_decay"] for group in self.param_groups] == [0.01, 0.0]
        assert all(
            (weight.ndim > 1) == (group["weight_decay"] > 0)
            for group in self.param_groups
            for weight in group["params"]
        )
        return step(self, *args)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)

    def test() -> None:
        rates.clear()
        healed(4, warmup=0.25)
        assert rates == pytest.approx([RATE, RATE, RATE * 0.75, RATE * 0.25])

    test()
    noticed(monkeypatch, HealingSettings, "rate", lambda self, step, steps: self.learning_rate, test)


def test_the_state_of_the_least_divergence_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """At a rate that destroys the model, what it was before any step; and no step more than patience allows."""
    before = halved(trained())

    def test() -> None:
        report, model = healed(8, learning_rate=1.0, clip=1e9, patience=2, warmup=0.0)
        assert report.after == report.before == report.measured[0]
        assert report.stopped_early and report.steps == 6
        assert same(model, before)

    test()
    noticed(monkeypatch, Training, "put", lambda self, weights: None, test)


def test_a_rise_in_the_first_half_of_the_steps_does_not_end_the_training(monkeypatch: pytest.MonkeyPatch) -> None:
    divergences = [3.0, 4.0, 4.0, 4.0, 4.0, 4.0, 2.0, 2.0, 2.0]
    rises = [HeldOut(step, divergence, 5.0) for step, divergence in enumerate(divergences)]
    monkeypatch.setattr(Training, "measure", lambda self, held_out, step: (rises[step], 5.0))
    report, _ = healed(8, every=1, patience=3)
    assert report.after.step == 6 and report.steps == 8 and not report.stopped_early


def test_every_parameter_keeps_its_own_dtype() -> None:
    """As a router that stays float32 in a bfloat16 model: unchanged if no step is kept, and else no bfloat16 number."""

    def mixed() -> Any:
        model = halved(trained())
        wide = {name: weight.detach().clone() for name, weight in model.named_parameters() if name.endswith(WIDE)}
        model.to(torch.bfloat16)
        for name, weight in wide.items():
            model.get_parameter(name).data = weight
        return model

    before = mixed()
    assert {weight.dtype for weight in before.parameters()} == {torch.bfloat16, torch.float32}
    for options, kept in (({"learning_rate": 1.0, "clip": 1e9, "patience": 2, "warmup": 0.0}, False), ({}, True)):
        report, model = healed(8, mixed(), **options)
        assert bool(report.after.step) == kept and same(model, before) != kept
        for name, weight in model.named_parameters():
            assert weight.dtype == before.get_parameter(name).dtype, name
            if name.endswith(WIDE):
                assert not torch.equal(weight, weight.bfloat16().float()), name
                assert torch.equal(weight, before.get_parameter(name)) != kept, name


def test_a_teacher_says_what_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = [HeldOut(0, 1.0, 9.0), HeldOut(1, 2.0, 7.0), HeldOut(2, 3.0, 8.0)]
    monkeypatch.setattr(Training, "measure", lambda self, held_out, step: (measured[step], 5.0))
    for decides, step in (("divergence", 0), ("perplexity", 1)):
        monkeypatch.setattr(Reader, "decides", decides)
        report, _ = healed(2, every=1)
        assert report.after == measured[step]


def test_gradients_are_clipped_without_those_of_zeros(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()  # before its own training would be watched too
    norms = list[float]()

    def step(self: Any, *_: Any) -> None:
        weights = [weight for group in self.param_groups for weight in group["params"]]
        squares = [weight.grad[weight != 0].double().square().sum() for weight in weights]
        norms.append(float(torch.stack(squares).sum().sqrt()))

    monkeypatch.setattr(torch.optim.AdamW, "step", step)
    healed(2, clip=1e-3)
    assert norms == pytest.approx([1e-3, 1e-3], rel=1e-3)


@pytest.mark.parametrize("embeddings", [False, True])
def test_the_gradient_of_a_step_is_that_of_the_mean_divergence(
    monkeypatch: pytest.MonkeyPatch, embeddings: bool
) -> None:
    """Over all predictions of the batch, by autograd, where nothing is clipped."""
    dense, model, (ids,) = trained(), halved(trained()), text(1)
    log_q, log_p = (each(input_ids=ids).logits[:, :-1].log_softmax(-1) for each in (model, dense))
    (log_p.exp() * (log_p - log_q)).sum(-1).mean().backward()
    expected = [
        torch.where(w != 0, w.grad, 0.0) if w.ndim > 1 else w.grad
        for name, w in model.named_parameters()
        if embeddings or "layers" in name or w.ndim == 1
    ]
    found = list[Tensor]()
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *_: None)
    clip = training.clip_grad_norm_

    def watched(weights: Any, largest: float) -> Tensor:
        every = list(weights)
        found.extend(weight.grad.clone() for weight in every)
        return clip(every, largest)

    monkeypatch.setattr(training, "clip_grad_norm_", watched)
    healed(1, clip=1e9, embeddings=embeddings)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6 * float(other.abs().max()) + 1e-9)


@pytest.mark.e2e
@pytest.mark.parametrize("count", [2, 3])
def test_processes_that_share_batches_do_what_one_does(count: int) -> None:
    alone, model = healed(3, halved(trained()))
    reports = together(count, lambda peers: healed(3, halved(trained()), peers=peers))
    for report, other in reports:
        assert [one.divergence for one in report.measured] == pytest.approx(
            [one.divergence for one in alone.measured], rel=1e-4
        )
        assert same(other, reports[0][1]), "all processes have the same model in the end"
        for weight, expected in zip(other.parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(weight, expected, rtol=1e-3, atol=RATE / 10)


class Stopped(Exception):
    pass


def stop_at(step: int) -> Callable[[Any], None]:
    def hear(event: Any) -> None:
        if isinstance(event, DivergenceMeasured) and event.step == step:
            raise Stopped

    return hear


def test_a_stopped_run_goes_on_to_the_same_bytes(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    expected, whole = healed(6, every=2)

    def test() -> None:
        first = HealingFolder(tmp_path / "run")
        with pytest.raises(Stopped):
            healed(6, every=2, folder=first, on_event=stop_at(6))
        assert (first.finished(), first.progress_text, first.complete) == ([4], "4 of 6 steps are done", False)
        with pytest.raises(
            InputError, match=r"holds an unfinished healing run \(4 of 6 steps are done\): continue it by"
        ):
            HealingFolder(tmp_path / "run")
        again = HealingFolder(tmp_path / "run", resume=True)
        report, model = healed(6, every=2, folder=again)
        assert again.complete
        assert report.measured == expected.measured and same(model, whole)
        once_more, model = healed(6, every=2, folder=HealingFolder(tmp_path / "run", resume=True))
        assert once_more.measured == expected.measured and same(model, whole)
        again.discard()
        assert not (tmp_path / "run").exists()

    test()
    restore = Training.restore
    lost = lambda self, state, step: restore(self, state, 0)  # noqa: E731
    noticed(monkeypatch, Training, "restore", lost, test)


def test_a_healing_that_is_refused_leaves_the_one_that_it_would_replace(tmp_path: Path) -> None:
    place = tmp_path / "run"
    with pytest.raises(Stopped):
        healed(4, every=1, folder=HealingFolder(place), on_event=stop_at(2))
    HealingFolder(place, resume=True).release()
    before = {path: path.read_bytes() for path in place.iterdir()}
    folder = HealingFolder(place, restart=True)
    assert (folder.progress(), folder.finished(), folder.progress_text) == (None, [], "no step is done")
    assert not folder.complete and not folder.worth_keeping
    with pytest.raises(InputError, match="a held-out window is also a training window"):
        heal(halved(trained()), trained(), [held_out()[:8]], held_out=held_out(), folder=folder)
    folder.close()
    assert {path: path.read_bytes() for path in place.iterdir()} == before
    report, _ = healed(2, every=1, folder=(again := HealingFolder(place, restart=True)))
    assert report.steps == 2 and again.finished() == [2]
    again.discard()


def test_a_run_begun_otherwise_does_not_go_on(tmp_path: Any) -> None:
    with pytest.raises(Stopped):
        healed(4, every=1, folder=HealingFolder(tmp_path / "run"), on_event=stop_at(2))
    folder = HealingFolder(tmp_path / "run", resume=True)
    with pytest.raises(InputError, match=r"cannot continue: the settings.clip was 1.0 and is 2.0"):
        healed(4, every=1, folder=folder, clip=2.0)
    with pytest.raises(InputError, match=r"cannot continue: the number of training tokens was \d+ and is \d+; nothing"):
        healed(5, every=1, folder=folder)
    with pytest.raises(InputError, match="cannot continue: the dense model was another one; nothing was changed"):
        healed(4, every=1, folder=folder, teacher=trained().to(torch.float64))
    (tmp_path / "run" / "progress.json").write_text("{}")
    with pytest.raises(InputError, match=r"progress.json of the healing run in .* is damaged"):
        healed(4, every=1, folder=folder)
    folder.discard()


def test_what_is_drawn_hangs_on_the_seed_alone() -> None:
    """Dropout, in a model that has it: the same by the same seed, and torch's generator is left as it was."""

    def with_dropout(seed: int) -> Any:
        model, teacher = tiny_opt(dropout=0.3), tiny_opt(1)
        state = torch.get_rng_state()
        report = heal(model, teacher, batches()[:2], held_out=batches()[3], settings=replace(SLOW, seed=seed))
        assert report.after.step
        assert torch.equal(torch.get_rng_state(), state)
        torch.rand(3)
        return model

    one, again, other = with_dropout(0), with_dropout(0), with_dropout(1)
    assert same(one, again) and not same(one, other)


def test_every_step_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    trained()
    drawn, add = list[float](), training.add_gradient

    def drawing(*args: Any) -> float:
        drawn.append(float(torch.rand(())))
        return add(*args)

    monkeypatch.setattr(training, "add_gradient", drawing)
    healed(4)
    assert len(set(drawn)) == len(drawn) == 4


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"learning_rate": 0.0}, "the learning rate cannot be 0.0"),
        ({"learning_rate": math.nan}, "the learning rate cannot be nan"),
        ({"warmup": 1.5}, "the warm-up cannot be 1.5 of the steps"),
        ({"weight_decay": -1.0}, "the weight decay cannot be -1.0"),
        ({"clip": 0.0}, "clipped to a norm of 0.0"),
        ({"dtype": "float16"}, "the dtype 'float16' has too small a range for healing"),
        ({"dtype": "int"}, "the dtype 'int' is unknown for healing"),
        ({"every": 0}, "after every 0 steps"),
        ({"patience": 0}, "the patience cannot be 0"),
        ({"epochs": 0}, "number of epochs cannot be 0"),
        ({"epochs": 2**64}, "number of epochs cannot be 18446744073709551616: give 1 to 10000"),
        ({"seed": 2**64}, "the seed cannot be 18446744073709551616: give a smaller number"),
        ({"seed": -1}, "the seed cannot be -1: give a whole number of at least 0"),
        ({"generated": 2**62}, "cannot generate 4611686018427387904 windows: give 0 to 1000000"),
    ],
)
def test_bad_settings(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError, match=sentence):
        HealingSettings(**settings)


def test_models_and_texts_that_do_not_go_together() -> None:
    model, ids, apart = tiny_llama(), batches()[:2], batches()[3]
    with pytest.raises(InputError, match="the model is its own teacher"):
        heal(model, model, ids, held_out=apart)
    with pytest.raises(InputError, match="a vocabulary of 512 tokens and its teacher one of 600"):
        heal(model, tiny_llama(vocab_size=600), ids, held_out=apart)
    with pytest.raises(InputError, match="there are no batches"):
        heal(model, tiny_llama(1), [], held_out=apart)
    with pytest.raises(InputError, match="a held-out window is also a training window"):
        heal(model, tiny_llama(1), ids, held_out=ids[1][1:])
    with pytest.raises(InputError, match="windows are token ids"):
        heal(model, tiny_llama(1), ids, held_out=apart[0])
    with pytest.raises(InputError, match="token 700"):
        heal(model, tiny_llama(1), ids, held_out=torch.full((1, 8), 700))


def test_training_that_gives_nan_is_told() -> None:
    model = tiny_llama()
    with torch.no_grad():
        model.model.norm.weight[0] = math.inf
    with pytest.raises(NumericalError, match="the model gives NaN on held-out windows after 0 steps"):
        heal(model, tiny_llama(1), batches()[:2], held_out=batches()[3])


def test_keywords_of_version_0_1_are_settings() -> None:
    model, again, ids = tiny_llama(), tiny_llama(), batches()
    settings = HealingSettings(learning_rate=RATE / 10, seed=3)
    report = heal(model, tiny_llama(1), ids[:2], held_out=ids[3], settings=settings)
    sentence = r"deprecated: pass settings=HealingSettings\(learning_rate=0.0002, seed=3\)"
    with pytest.warns(DeprecationWarning, match=sentence):
        other = heal(again, tiny_llama(1), ids[:2], held_out=ids[3], learning_rate=RATE / 10, seed=3)
    assert report.measured == other.measured and same(model, again)
    with pytest.raises(TypeError, match="unexpected keyword argument 'rate'"):
        heal(model, tiny_llama(1), ids, held_out=ids[3], rate=1.0)


def test_work_grows_with_the_text() -> None:
    model, dense, ids = Decoder(tiny_llama()), Decoder(tiny_llama(1)), batches()
    one, two = (work(model, dense, ids[:2], ids[3], HealingSettings(epochs=epochs)) for epochs in (1, 2))
    more = work(model, dense, ids[:2], ids[3], HealingSettings(generated=2))
    tokens = sum(batch.numel() for batch in ids[:2])
    assert one.flops > 2 * 4 * tokens * model.linear_weights()
    assert one.flops < more.flops and one.flops < two.flops < 2 * one.flops
    assert one.bytes == two.bytes > 20 * model.linear_weights()


def healed_by_a_short_text(**settings: Any) -> HealReport:
    """A pruned tiny model after four steps an epoch."""
    text = list(news(10, 60)[:32].split(8))
    chosen = HealingSettings(learning_rate=2e-3, **settings)
    return heal(halved(trained()), trained(), text, held_out=news(60, 70)[:16], settings=chosen)


def test_every_epoch_has_all_batches_and_an_order_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    seen, step = list[int](), Training.step

    def recorded(self: Training, number: int, steps: int, windows: Tensor) -> None:
        seen.append(next(index for index, batch in enumerate(text) if torch.equal(batch, windows)))
        step(self, number, steps, windows)

    text = list(news(10, 60)[:32].split(8))
    monkeypatch.setattr(Training, "step", recorded)
    report = healed_by_a_short_text(epochs=4, patience=99)
    epochs = [seen[first : first + 4] for first in range(0, 16, 4)]
    assert all(sorted(epoch) == [0, 1, 2, 3] for epoch in epochs) and epochs[0] == [0, 1, 2, 3]
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert (report.steps, report.steps_planned, report.tokens) == (16, 16, 4 * 32 * text[0].shape[1])
    assert report.settings["epochs"] == 4


def test_the_seed_draws_the_orders() -> None:
    text = list(torch.arange(8).view(8, 1))
    orders = {tuple(int(batch) for batch in in_epochs(text, 2, seed)) for seed in range(5)}
    assert len(orders) == 5 and all(order[:8] == tuple(range(8)) for order in orders)


@pytest.mark.e2e
def test_a_second_look_at_a_short_text_helps() -> None:
    assert healed_by_a_short_text(epochs=4).after.divergence < 0.9 * healed_by_a_short_text().after.divergence


@pytest.mark.parametrize("steps", [4, 10, 19, 25])
def test_held_out_windows_are_measured_at_most_ten_times(steps: int) -> None:
    """As docs/explanation/recovery.md says: before the first step, then after each tenth of the steps."""
    report, _ = healed(steps, patience=steps)
    before, *after = [found.step for found in report.measured]
    apart = [later - earlier for earlier, later in pairwise([before, *after])]
    assert before == 0 and len(after) == min(steps, 10) and after[-1] == steps
    assert max(apart) - min(apart) <= 1
    assert "before the training and after each tenth of it" in Path("docs/explanation/recovery.md").read_text()
