"""The model card of a pruned folder: what a hub reads, what a reader sees, and nothing of this machine."""

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard
from markdown_it import MarkdownIt

from optprune import LayerContext, Recipe
from optprune.export import save_model
from optprune.export.card import HEALED, MADE_AGAIN, NOT_MEASURED, healed_card, is_public
from optprune.export.source_files import origin_of
from optprune.models import Decoder, LoadedModel, load_model
from optprune.problems import MaskedLeastSquares
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama
from tests.helpers.token_batches import batches

LICENSED = "---\nlicense: other\nlicense_name: llama3\nlicense_link: LICENSE\nlanguage: [en, fr]\n---\n# Theirs\n"


def pruned(source: Path, folder: Path, **options: Any) -> tuple[Path, LoadedModel]:
    loaded = load_model(source)
    recipe = load_recipe("fasp", {"allocation.multiple": 1, **options})
    report = prune(loaded.model, batches(), recipe, source=str(source), calibration=f"{source}/news.txt, 4 windows")
    return save_model(loaded, folder, report=report, recipe=recipe, check_tokens=batches()[0][:1]).folder, loaded


def keep_the_larger_half(context: LayerContext) -> MaskedLeastSquares:
    size = context.loss.weight.abs()
    return MaskedLeastSquares(context.loss, size >= size.median())


def test_the_card_names_code_that_the_recipe_file_cannot_hold(tmp_path: Path) -> None:
    own = {"objective": keep_the_larger_half, "units": "weights", "sparsity": 0.5, "allocation": "uniform"}
    sentence = f"The recipe uses `{__name__}:keep_the_larger_half`, which no file holds"
    for options, named in (({}, False), (own, True)):
        loaded, recipe = load_model(save_tiny(tiny_llama(), tmp_path / "base")), Recipe(options)
        report = prune(loaded.model, batches(), recipe)
        folder = save_model(loaded, tmp_path / str(named), report=report, recipe=recipe).folder
        assert (sentence in (folder / "README.md").read_text()) == named


@pytest.mark.parametrize(("name", "units"), [("llama", "mlp"), ("opt", "all")])
def test_the_card_tells_the_run_the_base_and_its_licence(name: str, units: str, tmp_path: Path) -> None:
    source = save_tiny(TINY_MODELS[name](), tmp_path / "secret" / "tiny-base")
    (source / "README.md").write_text(LICENSED)
    for file, text in (("LICENSE", "Do as you like."), ("NOTICE.txt", "By us."), ("notes.txt", "not for you")):
        (source / file).write_text(text)
    folder, loaded = pruned(source, tmp_path / "secret" / "smaller", units=units)
    card = ModelCard.load(folder / "README.md")
    assert card.data.to_dict() == {
        "base_model": "tiny-base",
        "language": ["en", "fr"],
        "library_name": "transformers",
        "license": "other",
        "license_link": "LICENSE",
        "license_name": "llama3",
        "pipeline_tag": "text-generation",
        "tags": ["optprune", "pruning", "fasp"],
    }
    assert (folder / "LICENSE").read_text() == "Do as you like." and (folder / "NOTICE.txt").is_file()
    assert not (folder / "notes.txt").exists()
    left = Decoder(loaded.model)
    assert f"| {left.linear_weights():,} |" in card.text
    assert f"| MLP width | 128 | {left.shape(0).mlp_width} |" in card.text
    assert ("from_pretrained(folder, trust_remote_code=True)" in card.text) == (units == "all")
    assert (
        str(tmp_path) not in card.content
        and "secret" not in card.content
        and "smaller" not in card.content
        and "news.txt" not in card.content
    )


def test_the_card_of_a_healed_folder_is_true_of_it(tmp_path: Path) -> None:
    folder, _ = pruned(save_tiny(tiny_llama(), tmp_path / "base"), tmp_path / "smaller")
    card = (folder / "README.md").read_text()
    assert NOT_MEASURED in card and MADE_AGAIN in card
    healing = {"steps": 1, "tokens": 2, "held_out_tokens": 3, "dense_perplexity": 4.0}
    healing |= {when: {"divergence": 0.5, "perplexity": 6.0} for when in ("before", "after")}
    healed = healed_card(card, healing, "base")
    assert NOT_MEASURED not in healed and MADE_AGAIN not in healed
    assert all(sentence in healed for sentence in HEALED.values()) and "## Healing" in healed


def test_a_source_without_a_card_or_with_one_that_is_none(tmp_path: Path) -> None:
    for text in (
        None,
        "---\n[: no yaml\n---\n",
        "---\n- a list\n---\n",
        "---\nlicense: [1]\nlicense_link: ../up\n---\n",
    ):
        if text is not None:
            (tmp_path / "README.md").write_text(text)
        origin = origin_of(str(tmp_path))
        assert (origin.name, origin.licence, origin.licence_link) == (tmp_path.name, None, None)
    assert not origin_of(str(tmp_path / "my folder")).is_repository_name


HOSTILE = "a<script>alert(1)</script>[x](javascript:y)`|<img src=x onerror=z>\x1b[31m"


@pytest.mark.parametrize("healed", [False, True])
def test_a_name_is_text_in_the_card_whatever_is_in_it(healed: bool, tmp_path: Path) -> None:
    name = HOSTILE.replace("/", "\u2215")  # no folder has a slash in its name
    source = save_tiny(tiny_llama(), tmp_path / name)
    if healed:
        healing = {"steps": 1, "tokens": 2, "held_out_tokens": 3, "dense_perplexity": 4.0}
        healing |= {when: {"divergence": 0.5, "perplexity": 6.0} for when in ("before", "after")}
        window, loaded = batches()[0][0], load_model(source)
        folder = save_model(
            loaded, tmp_path / "out", healing=healing, teacher=str(source), check_tokens=window[None]
        ).folder
    else:
        names = f"license_name: {json.dumps(HOSTILE)}\nlicense: '[x](javascript:y)`'\n"
        (source / "README.md").write_text(f"---\n{names}---\n")
        folder, _ = pruned(source, tmp_path / "out")
    text = (folder / "README.md").read_text()
    shown = MarkdownIt("gfm-like", {"linkify": False}).render(text)
    assert "\x1b" not in text
    assert not re.search(r"<(script|img|a)\b", shown)
    assert html.unescape(re.sub(r"<[^>]*>", "", shown)).count(name[:-5]) == (2 if healed else 3)


def test_the_demo_is_called_by_its_public_name() -> None:
    origin = origin_of("demo")
    assert (origin.name, origin.licence) == ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


def test_a_text_of_the_hub_is_named(tmp_path: Path) -> None:
    source = save_tiny(tiny_llama(), tmp_path / "base")
    loaded, recipe = load_model(source), load_recipe("wanda", {"units.weights": "2:4", "sparsity": 0.5})
    report = prune(loaded.model, batches(), recipe, source=str(source), calibration="hf:owner/news:train, 4 windows")
    text = (
        save_model(loaded, tmp_path / "out", report=report, recipe=recipe, check_tokens=batches()[0][:1]).folder
        / "README.md"
    ).read_text()
    assert "(hf:owner/news:train, 4 windows)" in text and "pattern of the zeros: 2:4" in text


@pytest.mark.parametrize(
    ("calibration", "public"),
    [
        ("demo:calibration, 8 windows of 64 tokens, seed 0", True),
        ("demo:calibration (share 0.7, 6 windows); hf:a/b:train (share 0.3, 2 windows); 8 windows of 64 tokens", True),
        ("demo:calibration (share 0.7, 6 windows); /data/a.txt (share 0.3, 2 windows); 8 windows of 64", False),
        ("/data/a.txt (share 0.3, 2 windows); demo:calibration (share 0.7, 6 windows); 8 windows of 64", False),
        ("/data/a; demo:b.txt, 8 windows of 64 tokens, seed 0", False),
        ("", False),
        ("wikitext2, 8 windows of 64 tokens, seed 0", True),
        ("c4:validation (share 0.7, 6 windows); ultrachat (share 0.3, 2 windows); 8 windows of 64 tokens", True),
        ("c4_of_mine.txt, 8 windows of 64 tokens", False),
    ],
)
def test_the_card_names_a_calibration_only_if_all_its_texts_are_public(calibration: str, public: bool) -> None:
    assert is_public(calibration) == public
