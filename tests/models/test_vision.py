"""Language parts of vision-language models, read as text models."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from optprune.errors import InputError
from optprune.models import architecture_of, load_config, load_model, open_model, trace, vision_folder
from optprune.models.vision import VISION_FAMILIES
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.tiny_vision import CONFIGS, by_vision_family, save_vision, tiny_vision

IDS = torch.randint(0, 490, (2, 40), generator=torch.Generator().manual_seed(1))
OTHER_NAMES = (("language_model.model.", "model.language_model."), ("language_model.lm_head.", "lm_head."))
"""the beginnings of names that transformers writes, and those that it wrote at other times"""


def renamed(folder: Path) -> None:
    """Give the tensors of a folder the other names that transformers loads."""
    file, found = folder / "model.safetensors", dict[str, torch.Tensor]()
    names = (*OTHER_NAMES, ("vision_tower.", "model.vision_tower."))
    for name, tensor in load_file(file).items():
        before, after = next((each for each in names if name.startswith(each[0])), ("", ""))
        found[after + name.removeprefix(before)] = tensor
    save_file(found, file, metadata={"format": "pt"})


@by_vision_family
@pytest.mark.parametrize("names", ["as written", "other"])
def test_the_language_part_gives_the_logits_of_the_whole_model(family: str, names: str, tmp_path: Path) -> None:
    model = tiny_vision(family)
    folder = save_vision(model, tmp_path / "model")
    if names == "other":
        renamed(folder)
    whole, streamed = load_model(folder), open_model(folder)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        assert torch.equal(whole.model(input_ids=IDS).logits, expected)
        with streamed.decoder().running():
            assert torch.equal(streamed.model(input_ids=IDS, use_cache=False).logits, expected)
    assert whole.whole is not None and whole.whole.family.model_type == family
    assert f"the language part of a {family} model" in repr(whole)


@by_vision_family
def test_a_part_that_is_saved_alone_is_a_text_model(family: str, tmp_path: Path) -> None:
    loaded = load_model(save_vision(tiny_vision(family), tmp_path / "model"))
    loaded.model.save_pretrained(tmp_path / "text")
    alone = load_model(tmp_path / "text")
    assert alone.whole is None and not architecture_of(alone.model.config).part_of
    with torch.no_grad():
        assert torch.equal(alone.model(input_ids=IDS).logits, loaded.model(input_ids=IDS).logits)


def test_whether_embeddings_are_tied_is_said_by_the_whole_model(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("mistral3"), tmp_path / "model")
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    for tied in (False, True):
        fields |= {"tie_word_embeddings": tied}
        fields["text_config"]["tie_word_embeddings"] = not tied
        (folder / "config.json").write_text(json.dumps(fields), encoding="utf-8")
        assert load_config(folder).tie_word_embeddings is tied


def changed(folder: Path, **fields: Any) -> Path:
    """The folder with other fields of config.json, those of the text_config by a name with two underscores."""
    file = folder / "config.json"
    found = json.loads(file.read_text(encoding="utf-8"))
    for name, value in fields.items():
        where, _, inner = name.partition("__")
        if inner:
            found[where][inner] = value
        else:
            found[name] = value
    file.write_text(json.dumps(found), encoding="utf-8")
    return folder


@pytest.mark.parametrize("text", [None, "float32", "bfloat16"])
@pytest.mark.parametrize("whole", ["float32", "bfloat16"])
def test_the_dtype_is_said_by_the_whole_model(whole: str, text: str | None, tmp_path: Path) -> None:
    """As transformers reads the folder."""
    folder = save_vision(tiny_vision("mistral3"), tmp_path / "model")
    changed(folder, dtype=whole, text_config__dtype=text)
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto")
    assert open_model(folder).model.dtype == model.dtype == getattr(torch, whole)


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        ({"text_config__model_type": "gpt2"}, "is a gpt2 model, which is not pruned in a llava folder"),
        ({"text_config__model_type": "qwen3_moe"}, "dense families with the layout of Llama"),
        ({"text_config__model_type": "granite", "text_config__logits_scaling": 2.0}, "has logits_scaling"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, r"is quantised \(bitsandbytes\)"),
        ({"text_config__num_key_value_heads": 3}, "num_key_value_heads 3"),
    ],
)
def test_what_is_not_understood_is_refused(fields: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    folder = changed(save_vision(tiny_vision("llava"), tmp_path / "model"), **fields)
    for read in (load_config, load_model, open_model):
        with pytest.raises(InputError, match=sentence):
            read(folder)


def test_a_missing_or_foreign_tensor_is_refused(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    tensors = load_file(folder / "model.safetensors")
    name = "language_model.model.layers.1.mlp.up_proj.weight"
    for changes, sentence in (({name: None}, "incomplete"), ({f"{name}_scale": torch.ones(2)}, "does not have")):
        found = {key: tensor for key, tensor in (tensors | changes).items() if tensor is not None}
        save_file(found, folder / "model.safetensors", metadata={"format": "pt"})
        for read in (load_model, open_model):
            with pytest.raises(InputError, match=sentence):
                read(folder)


def test_whole_numbers_around_the_language_part_are_no_matter(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    file = folder / "model.safetensors"
    tensors = load_file(file) | {"vision_tower.embeddings.position_ids": torch.arange(17)}
    save_file(tensors, file, metadata={"format": "pt"})
    load_model(folder)
    save_file(tensors | {"language_model.model.ids": torch.arange(17)}, file, metadata={"format": "pt"})
    with pytest.raises(InputError, match="holds tensors of I64"):
        load_model(folder)


def test_a_draft_describes_no_vision_language_model(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    with pytest.raises(InputError, match="whose folder is known: leave out --architecture"):
        load_config(folder, trace(tiny_llama().config))


def test_other_models_with_a_text_config_are_refused(tmp_path: Path) -> None:
    folder = changed(save_vision(tiny_vision("llava"), tmp_path / "model"), model_type="idefics3")
    with pytest.raises(InputError, match=f"the language part of {', '.join(sorted(VISION_FAMILIES))}"):
        load_model(folder)
    assert vision_folder("demo") is None and CONFIGS.keys() == VISION_FAMILIES.keys()
