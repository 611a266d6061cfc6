"""The dense model as the teacher of a model with fewer tokens, and healing by it."""

import contextlib
import copy
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from optprune import heal
from optprune.cli import main
from optprune.errors import InputError
from optprune.healing import HealingSettings
from optprune.models import LoadedModel
from optprune.texts import Text, demo_articles, tokenise
from optprune.tokens import PushedTeacher, PushForward, SmallerVocabulary, prune_vocabulary
from optprune.tokens.replacing import with_removed
from tests.helpers.fewer_tokens import KEEP, bits_per_byte, loaded
from tests.helpers.tiny_models import ALL_MODELS, save_tiny, tiny_llama, tiny_tokenizer
from tests.helpers.token_kinds import KINDS, tokenizer_of
from tests.helpers.trained_tiny import trained

LENGTH = 64


def smaller_of(kind: str, step: int = 2) -> SmallerVocabulary:
    """The tokens of a kind's tokenizer without some that were merged last."""
    tokenizer = tokenizer_of(kind)
    kept = [*range(400), *range(400, len(tokenizer), step), len(tokenizer) - 1]
    return SmallerVocabulary.of(tokenizer, dict.fromkeys(kept))


def teacher_of(student: LoadedModel, dense: LoadedModel) -> PushedTeacher:
    assert student.tokenizer is not None and dense.tokenizer is not None
    smaller = SmallerVocabulary.between(dense.tokenizer, student.tokenizer)
    assert smaller is not None
    return PushedTeacher(dense.model, smaller=smaller, precision=contextlib.nullcontext)


# -- from pieces to tokens


@given(ids=st.lists(st.integers(3, 690), min_size=1, max_size=30))
def test_any_ids_are_the_pieces_of_the_tokens_that_they_are_read_as(ids: list[int]) -> None:
    push = PushForward(smaller_of("merged bytes"), 720)
    new = push.new_ids(torch.tensor(ids))
    old = push.old_ids(new)
    assert push.new_ids(old).tolist() == new.tolist()
    assert len(old) <= len(ids), "the longest tokens are taken"


def test_the_token_with_the_id_0_is_read_too() -> None:
    smaller = smaller_of("merged bytes")
    first = next(old for old, own in smaller.pieces.items() if len(own) == 2)
    pieces = {0: smaller.pieces[first]} | {old: own for old, own in smaller.pieces.items() if old not in (0, first)}
    smaller.__dict__["pieces"] = pieces
    smaller.__dict__["new_ids"] = {old: new for old, new in smaller.new_ids.items() if old != 0}
    assert PushForward(smaller, 720).old_ids(torch.tensor(pieces[0])).tolist() == [0]


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_refused_where_few_tokens_are_written_by_their_pieces(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    smaller = smaller_of(kind, step=4)
    teacher = PushedTeacher(tiny_llama(vocab_size=720), smaller=smaller, precision=contextlib.nullcontext)
    text = "".join(demo_articles("evaluation")[:5])
    ids = torch.tensor(smaller.tokenizer(text, add_special_tokens=False)["input_ids"])
    windows = ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)
    teacher.check(windows)
    if "scored" in kind:
        return  # the removed tokens of these are rare
    monkeypatch.setattr(PushForward, "old_ids", lambda self, new: torch.tensor(self.vocabulary.kept)[new])
    with pytest.raises(InputError, match=r"only \d+% of the teacher's tokens in a text are written by their pieces"):
        teacher.check(windows)


@pytest.mark.parametrize("kind", KINDS)
def test_the_vocabulary_between_two_tokenizers_is_the_one_that_made_them(kind: str) -> None:
    smaller = smaller_of(kind)
    found = SmallerVocabulary.between(smaller.before, smaller.tokenizer)
    assert found is not None and found.kept == smaller.kept
    assert found.pieces == smaller.pieces
    assert SmallerVocabulary.between(smaller.before, smaller.before) is None
    assert SmallerVocabulary.between(smaller.tokenizer, smaller.before) is None
    others = {other: tokenizer_of(other) for other in KINDS if other != kind}
    assert all(SmallerVocabulary.between(other, smaller.tokenizer) is None for other in others.values())


# -- its predictions


@pytest.mark.parametrize(
    ("family", "setting"),
    [
        ("granite", {"logits_scaling": 9.0}),
        ("gemma2", {"final_logit_softcapping": 0.2}),
    ],
)
def test_its_logits_are_scaled_and_capped_as_the_model_does(family: str, setting: dict[str, float]) -> None:
    model = ALL_MODELS[family](vocab_size=720)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(40)
    plain, ids = model, torch.tensor([5, 9, 300, 41])
    for name, value in setting.items():
        setattr(model.config, name, value)
        if hasattr(model, name):
            setattr(model, name, value)
    teacher = PushedTeacher(plain, smaller=smaller_of("merged bytes"), precision=contextlib.nullcontext)
    with torch.no_grad():
        whole = teacher.push.probabilities(model(input_ids=ids[None]).logits[0])
        assert torch.allclose(teacher._probabilities(ids), whole, atol=1e-6)
        bare = teacher.push.probabilities(teacher.rows.head(model.base_model(input_ids=ids[None]).last_hidden_state[0]))
    assert not torch.allclose(whole, bare, atol=1e-3), "the setting changes the predictions"


def test_half_of_the_training_windows_hold_removed_tokens_where_it_expects_them(
    student: LoadedModel, dense: LoadedModel
) -> None:
    teacher, text = teacher_of(student, dense), windows(student, 0, 20)[:40]
    push, found = teacher.push, teacher.training_windows(text, 3)
    assert found.shape == text.shape and found.dtype == text.dtype and int(found.max()) < KEEP
    removed = set(push.removed.tolist())

    def shares(some: Tensor) -> list[float]:
        old = [push.old_ids(window) for window in some]
        return [sum(token in removed for token in ids.tolist()) / len(ids) for ids in old]

    changed = (found != text).any(1)
    assert 10 <= int(changed.sum()) <= 30, "7 of 10,000 fair draws of 40 are further from a half"
    before, after = (torch.tensor(shares(some[changed])).mean() for some in (text, found))
    assert 0.1 < after - before < 0.2
    assert torch.equal(teacher.training_windows(text, 3), found)
    assert not torch.equal(teacher.training_windows(text, 4), found)
    assert len(teacher.training_windows(text[:0], 3)) == 0


def test_a_removed_token_is_drawn_as_often_as_it_is_expected(student: LoadedModel, dense: LoadedModel) -> None:
    """By weights, over many draws at one position."""
    push = teacher_of(student, dense).push
    probabilities = torch.randn(2, push.rows, generator=torch.Generator().manual_seed(0)).mul(3).softmax(-1)
    generator, found = torch.Generator().manual_seed(1), torch.zeros(push.rows, dtype=torch.float64)
    draws = 20_000
    for _ in range(draws):
        new, weights = with_removed(push, torch.tensor([5, 7]), probabilities, generator)
        found[new[1]] += float(weights[1])
    chance = float(probabilities[0, push.removed].sum())
    # The number of replacements is binomial, with the probability 0.15.
    assert float(found.sum()) / draws == pytest.approx(chance, rel=5 * (0.85 / 0.15 / draws) ** 0.5)
    share = found[push.removed] / found.sum()
    expected = probabilities[0, push.removed].double() / chance
    assert float((share - expected).abs().max()) < 5 * (float(expected.max()) / 0.15 / draws) ** 0.5
    others = torch.ones(push.rows, dtype=torch.bool)
    others[push.removed] = False
    assert not bool(found[others].any())


@pytest.fixture(scope="module")
def dense() -> LoadedModel:
    return loaded(trained(200))


@pytest.fixture(scope="module")
def student(dense: LoadedModel) -> LoadedModel:
    """The dense model with fewer tokens, whose rows are not refitted."""
    texts = [Text("news", demo_articles("calibration")[:40])]
    return prune_vocabulary(copy.deepcopy(dense), texts, KEEP, tokens=0)[0]


def windows(student: LoadedModel, first: int, last: int) -> torch.Tensor:
    assert student.tokenizer is not None
    ids = tokenise(student.tokenizer, demo_articles("calibration")[first:last]).long()
    return ids[: len(ids) // LENGTH * LENGTH].view(-1, LENGTH)


@pytest.mark.e2e
def test_the_predictions_are_the_dense_models_of_the_same_text(student: LoadedModel, dense: LoadedModel) -> None:
    """At each whole token they are the sums over the tokens that begin with a piece."""
    teacher, ids = teacher_of(student, dense), windows(student, 50, 52)[:2]
    found = teacher.log_probabilities(teacher.hidden(ids)).exp()
    assert found.shape == (*ids.shape, KEEP) and teacher.vocabulary == KEEP
    assert torch.allclose(found.sum(-1), torch.ones(found.shape[:2]), atol=1e-5)
    push = teacher.push
    for window, targets in zip(ids, found, strict=True):
        old = push.old_ids(window)
        assert len(old) < len(window), "some tokens were removed"
        with torch.no_grad():
            whole = dense.model(input_ids=old[None]).logits[0].softmax(-1)
        ends, written = push.ends(old).nonzero()[:, 0].tolist(), set(push.vocabulary.pieces.values())
        pieces = push.vocabulary.pieces
        begins = {piece[:count] for piece in written for count in range(1, len(piece))}
        checked = 0
        for number, place in enumerate(ends):
            if pieces[int(old[number])] in begins and number:
                continue  # a longer token may go on here
            expected = torch.zeros(KEEP)
            for token, own in pieces.items():
                expected[own[0]] += whole[number, token]
            torch.testing.assert_close(targets[place], expected, atol=1e-5, rtol=1e-4)
            checked += 1
        assert checked > 5


def test_inside_of_a_token_it_predicts_what_goes_on(student: LoadedModel, dense: LoadedModel) -> None:
    """By the definition: the tokens that go on with a piece, and else what the dense model says behind the pieces."""
    teacher, window = teacher_of(student, dense), windows(student, 50, 52)[0]
    found, push = teacher.log_probabilities(teacher.hidden(window[None])).exp()[0], teacher.push
    pieces, kept = push.vocabulary.pieces, torch.tensor(push.vocabulary.kept)
    old = push.old_ids(window)
    with torch.no_grad():
        whole = dense.model(input_ids=old[None]).logits[0].softmax(-1)
        apart = dense.model(input_ids=kept[window][None]).logits[0].softmax(-1)
    place = checked = 0
    for number, token in enumerate(old.tolist()):
        own = pieces[token]
        if len(own) == 2 and number:
            going_on = {
                other: written for other, written in pieces.items() if written[:1] == own[:1] and len(written) > 1
            }
            ended = whole[number - 1, [other for other, written in pieces.items() if written == own[:1]]].sum()
            expected = torch.zeros(KEEP)
            for other, written in pieces.items():
                expected[written[0]] += ended * apart[place, other]
            for other, written in going_on.items():
                expected[written[1]] += whole[number - 1, other]
            expected /= ended + whole[number - 1, list(going_on)].sum()
            torch.testing.assert_close(found[place], expected, atol=1e-5, rtol=1e-4)
            checked += 1
        place += len(own)
    assert checked > 3


@pytest.mark.e2e
def test_healing_by_it_brings_the_bits_per_byte_back(student: LoadedModel, dense: LoadedModel) -> None:
    articles, healed = demo_articles("evaluation")[:60], copy.deepcopy(student)
    text = list(windows(student, 0, 60)[:240].split(8))
    settings = HealingSettings(learning_rate=1e-3)
    report = heal(
        healed.model, teacher_of(student, dense), text, held_out=windows(student, 60, 70)[:16], settings=settings
    )
    assert report.after.divergence < 0.7 * report.before.divergence
    assert report.after.perplexity == min(measured.perplexity for measured in report.measured)
    whole, before, after = (bits_per_byte(each, articles) for each in (dense, student, healed))
    assert after - whole < 0.6 * (before - whole)


def test_it_generates_no_text_in_tokens_that_the_model_lacks(student: LoadedModel, dense: LoadedModel) -> None:
    text = list(windows(student, 0, 10)[:8].split(4))
    with pytest.raises(InputError, match="the teacher generates text in its own tokens"):
        heal(
            copy.deepcopy(student.model),
            teacher_of(student, dense),
            text,
            held_out=windows(student, 60, 64)[:4],
            settings=HealingSettings(generated=4),
        )


def test_a_folder_of_fewer_tokens_is_healed_from_the_shell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_tiny(trained(200), tmp_path / "dense")
    (tmp_path / "text.txt").write_text("\n".join(demo_articles("calibration")[:40]))
    text = str(tmp_path / "text.txt")
    given = ["--samples", "8", "--seq-length", "64", "--set", "vocabulary.tokens=0"]
    prune = ["prune", str(tmp_path / "dense"), "--recipe", "vocabulary", "--vocabulary", str(KEEP), *given]
    assert main([*prune, "--calibration", text, "--output", str(tmp_path / "small")]) == 0
    given = ["--seq-length", "32", "--batch-size", "4", "--held-out", "4", "--tokens", "2048"]
    healing = ["heal", str(tmp_path / "small"), "--teacher", str(tmp_path / "dense"), "--text", text, *given]
    assert main([*healing, "--output", str(tmp_path / "healed")]) == 0
    section = json.loads((tmp_path / "healed" / "report.json").read_text())["healing"]
    assert section["after"]["divergence"] < section["before"]["divergence"]
    assert main([*healing, "--output", str(tmp_path / "healed"), "--resume"]) == 0
    assert main([*healing, "--output", str(tmp_path / "more"), "--generated", "4"]) == 2
    assert not (tmp_path / "more").exists()
    assert tiny_tokenizer().vocab_size > KEEP
