"""The dense model writes further windows itself: what they are made of, when they are kept, and what they bring."""

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from optprune import heal
from optprune.calibration.generated import PIECE, PROMPT, _prompts, generated_windows, mixed
from optprune.errors import InputError
from optprune.healing import HealingFolder, HealingSettings, HealReport
from optprune.report import DivergenceMeasured, PhaseAdvanced
from tests.helpers.faults import noticed
from tests.helpers.short_runs import same
from tests.helpers.thread_peers import together
from tests.helpers.tiny_models import VARIANTS, tiny_llama
from tests.helpers.token_batches import batches
from tests.helpers.trained_tiny import halved, news, trained

module = importlib.import_module("optprune.calibration.generated")
SHORT = list(news(10, 12)[:8].split(2))
"""a text of eight windows"""


def written(count: int, text: list[Tensor] | None = None, model: Any = None, seed: int = 0) -> Tensor:
    return generated_windows(model or trained(), SHORT if text is None else text, count, seed=seed)


def healed(
    batches: int = 4, *, folder: HealingFolder | None = None, on_event: Any = lambda event: None, **settings: Any
) -> tuple[HealReport, PreTrainedModel]:
    model, held_out = halved(trained()), news(60, 70)[:16]
    chosen, more = HealingSettings(learning_rate=2e-3, **settings), {"folder": folder, "on_event": on_event}
    return heal(model, trained(), SHORT[:batches], held_out=held_out, settings=chosen, **more), model


@pytest.mark.e2e
def test_windows_begin_with_the_text() -> None:
    windows = written(40)
    assert windows.shape == (40, 64) and windows.dtype == torch.int64
    pieces = {
        tuple(one[at : at + PROMPT].tolist()) for batch in SHORT for one in batch for at in range(64 - PROMPT + 1)
    }
    begun = [tuple(window[:PROMPT].tolist()) for window in windows]
    assert set(begun) <= pieces and len(set(begun)) > 30, "drawn from all over the text"
    assert len({tuple(window[PROMPT:].tolist()) for window in windows}) == 40
    assert written(3, [news(10, 12)[:1, :7]]).shape == (3, 7), "half of a short window is the beginning"


def test_a_long_window_consists_of_pieces_that_each_begin_with_the_text() -> None:
    """So no token is further than a piece from the text."""
    text = [torch.cat([batch.flatten() for batch in SHORT])[None]]
    for length, begins in ((2 * PIECE, (0, PIECE)), (300, (0, 150)), (400, (0, 134, 268)), (PIECE + 40, (0,))):
        given = [text[0][:, :length]]
        there = {tuple(given[0][0, at : at + PROMPT].tolist()) for at in range(length - PROMPT + 1)}
        windows = written(2, given, VARIANTS["llama"]())
        assert windows.shape == (2, length)
        for at in range(length - PROMPT + 1):
            begun = all(tuple(window[at : at + PROMPT].tolist()) in there for window in windows)
            assert begun == (at in begins)


def test_a_piece_may_begin_at_every_place_of_a_window() -> None:
    """The first and the last too: of two places each is drawn about half of the times."""
    pieces = _prompts([torch.tensor([[0, 1, 2]])], 200, 2, torch.Generator().manual_seed(0))
    first = int((pieces[:, 0] == 0).sum())
    assert 70 <= first <= 130 and pieces[pieces[:, 0] == 1].unique().tolist() == [1, 2]


def test_pieces_begin_with_the_token_that_all_windows_begin_with() -> None:
    """As BOS: a model that was trained with it continues a text badly without."""
    bos = 500
    text = [torch.cat([torch.full((len(batch), 1), bos), batch[:, 1:]], dim=1) for batch in SHORT]
    windows = written(40, text)
    first = {tuple(one[at : at + PROMPT - 1].tolist()) for batch in text for one in batch for at in range(1, 50)}
    assert windows.shape == (40, 64) and (windows[:, 0] == bos).all()
    assert {tuple(window[1:PROMPT].tolist()) for window in windows} <= first
    pieces = _prompts(text, 30, PROMPT, torch.Generator().manual_seed(0))
    assert (pieces[:, 0] == bos).all() and (pieces[:, 1:] != bos).all()
    assert len(_prompts([text[0][:1]], 30, PROMPT, torch.Generator().manual_seed(0))[:, 0].unique()) > 5, "one window"


@pytest.mark.parametrize(
    "own", [None, GenerationConfig(do_sample=True, temperature=0.2, top_k=3, repetition_penalty=5.0)]
)
def test_tokens_are_drawn_from_the_whole_distribution(own: GenerationConfig | None, monkeypatch: Any) -> None:
    """Whatever the model's own settings are: the surprise of what is drawn is the entropy, within five deviations."""
    model, count = trained(), 4000
    if own is not None:
        model.generation_config = own
    before, first = model.generation_config, SHORT[0][0, 0]

    def test() -> None:
        drawn = generated_windows(model, [first.view(1, 1).repeat(1, 2)], count)
        assert bool((drawn[:, 0] == first).all()) and model.generation_config is before
        with torch.no_grad():
            log_p = model(input_ids=drawn[:1, :1]).logits[0, -1].double().log_softmax(-1)
        surprise, entropy = -log_p[drawn[:, 1]], -(log_p.exp() * log_p).sum()
        spread = float((log_p.exp() * (log_p + entropy).square()).sum().sqrt())
        assert abs(float(surprise.mean() - entropy)) < 5 * spread / math.sqrt(count)

    test()
    if own is None:
        likely = GenerationConfig(do_sample=True, top_k=20, pad_token_id=0)
        noticed(monkeypatch, module, "GenerationConfig", lambda **_: likely, test)


@pytest.mark.parametrize(("length", "piece"), [(128, 128), (20, 20), (48, 7)])
def test_at_most_16384_tokens_are_cached(length: int, piece: int, monkeypatch: Any) -> None:
    """The rows of a part, by the tokens that each has at its end."""
    model, cached = tiny_llama(), list[int]()

    def generate(ids: Tensor, *, max_length: int, **_: Any) -> Tensor:
        cached.append(len(ids) * max_length)
        return torch.zeros(len(ids), max_length, dtype=torch.long)

    monkeypatch.setattr(model, "generate", generate)
    text, count = [torch.randint(5, 500, (8, length), generator=torch.Generator().manual_seed(0))], 2 * 16384 // length
    assert len(generated_windows(model, text, count, piece=piece)) == count
    assert len(cached) > 1 and 16384 - length < max(cached) <= 16384


def test_it_goes_on_from_what_was_written(monkeypatch: Any) -> None:
    """By the model, a window that it wrote is no less likely than what follows in the text, and far above chance."""
    model, windows = trained(), written(32)
    with torch.no_grad():
        log_p = model(input_ids=windows).logits[:, PROMPT - 1 : -1].log_softmax(-1)
    surprise = -float(log_p.gather(2, windows[:, PROMPT:, None]).mean())
    entropy = -float((log_p.exp() * log_p).sum(-1).mean())
    assert surprise == pytest.approx(entropy, rel=0.05) and surprise < 0.9 * math.log(log_p.shape[-1])


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_architecture_writes(variant: str) -> None:
    windows = written(3, batches()[:1], VARIANTS[variant]())
    assert windows.shape == (3, batches()[0].shape[1]) and bool((windows >= 0).all())


@pytest.mark.e2e
def test_what_is_drawn_hangs_on_the_seed_and_not_on_the_processes(monkeypatch: Any) -> None:
    trained()  # made once, which sets torch's seed
    state = torch.get_rng_state()
    expected = written(6)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(written(6), expected) and not torch.equal(written(6, seed=1), expected)
    for windows in together(3, lambda peers: generated_windows(trained(), SHORT, 6, peers=peers)):
        assert torch.equal(windows, expected)
    monkeypatch.setattr(module, "TOKENS_AT_ONCE", 64)
    parts, text = list[int](), [torch.full((2, 64), 7)]

    def test() -> None:
        parts.clear()
        windows = generated_windows(trained(), text, 6, on_part=lambda done, total: parts.append(total))
        assert parts == [6] * 6 and (windows[:, :PROMPT] == 7).all(), "all parts begin equally"
        assert len({tuple(window.tolist()) for window in windows}) == 6, "each part draws its own"

    test()
    noticed(monkeypatch, module, "LARGEST_SEED", 1, test)


def test_they_are_mixed_in() -> None:
    windows = torch.arange(6).view(3, 2)
    found = mixed(SHORT, windows, 0)
    assert [len(batch) for batch in mixed(SHORT, windows, 0)].count(1) == 1 and len(found) == 6
    given = [next((n for n, batch in enumerate(SHORT) if batch.equal(one)), None) for one in found]
    assert sorted(n for n in given if n is not None) == [0, 1, 2, 3]
    assert torch.cat([one for one, n in zip(found, given, strict=True) if n is None]).sort(0).values.equal(windows)
    assert any(
        given != [next((n for n, b in enumerate(SHORT) if b.equal(x)), None) for x in mixed(SHORT, windows, s)]
        for s in range(1, 9)
    )


@pytest.mark.e2e
def test_a_short_text_heals_more_with_them() -> None:
    """As many steps on the text alone learn it by heart."""
    alone, _ = healed(1, epochs=41, patience=99)
    more, _ = healed(1, generated=80, patience=99)
    assert alone.steps == more.steps == 41
    assert more.after.divergence < 0.9 * alone.after.divergence
    assert (more.generated_windows, more.tokens, more.to_dict()["generated_windows"]) == (80, 82 * 64, 80)


def test_a_stopped_run_writes_nothing_again(tmp_path: Path, monkeypatch: Any) -> None:
    settings = {"generated": 8, "every": 2}
    expected, whole = healed(**settings)

    class Stopped(Exception):
        pass

    def stop(event: Any) -> None:
        if isinstance(event, DivergenceMeasured) and event.step == 4:
            raise Stopped

    with pytest.raises(Stopped):
        healed(**settings, folder=HealingFolder(tmp_path / "run"), on_event=stop)
    kept = tmp_path / "run" / "generated.json"
    assert kept.is_file()
    monkeypatch.setattr(module, "_prompts", None)  # to write is an error now
    report, model = healed(**settings, folder=HealingFolder(tmp_path / "run", resume=True))
    assert report.measured == expected.measured and same(model, whole)
    kept.write_text("[[1], 2]")
    monkeypatch.undo()
    report, model = healed(**settings, folder=HealingFolder(tmp_path / "run", resume=True))
    assert report.measured == expected.measured and same(model, whole)


def test_the_share_of_the_time_is_told() -> None:
    events = list[Any]()
    healed(generated=8, on_event=events.append)
    told = [(event.step, event.begins, event.ends) for event in events if isinstance(event, PhaseAdvanced)]
    assert told[0][0] == "generating text" and told[0][1:] == (0.0, told[1][1])
    assert 0 < told[1][1] < 0.5 and told[-1][2] == 1.0


def test_bad_counts_are_refused() -> None:
    with pytest.raises(InputError, match="the dense model cannot generate -1 windows: give 0 to 1000000"):
        healed(generated=-1)
