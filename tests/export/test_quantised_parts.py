"""Vision-language folders whose language part is quantised: read as floats, and written as floats in its place."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.models import Decoder, load_model, open_model
from optprune.models.vision import is_language, language_name
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.quantised_folders import fp8, gptq, quantise_layers
from tests.helpers.short_runs import batches
from tests.helpers.tiny_vision import save_vision, tiny_vision

FP8 = {"quant_method": "fp8", "activation_scheme": "static", "weight_block_size": None}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 16, "desc_act": False, "sym": False}
METHODS = {"fp8": (fp8((10**6, 10**6)), FP8), "gptq": (gptq(), GPTQ)}
TOKENS = torch.arange(10, 42)[None]


def language_layers(folder: Path) -> str:
    """The beginning of the names of the language part's layers in the files."""
    names = (name for name in load_file(folder / "model.safetensors") if is_language(name) and ".layers." in name)
    return next(names).partition("layers.")[0] + "layers."


@pytest.mark.parametrize("family", ["mistral3", "gemma3"])
@pytest.mark.parametrize("method", METHODS)
def test_layers_are_read_as_what_they_stand_for(method: str, family: str, tmp_path: Path) -> None:
    quantise, config = METHODS[method]
    folder = save_vision(tiny_vision(family), tmp_path / "model")
    weights = quantise_layers(folder, quantise, config, language_layers(folder))
    assert len(weights) == 14
    found, streamed = load_model(folder).model, open_model(folder)
    for name, weight in weights.items():
        own = found.state_dict()[language_name(name)]
        assert torch.allclose(own.double(), weight, rtol=torch.finfo(torch.float32).eps, atol=0), name
    decoder, whole = streamed.decoder(), Decoder(found)
    for block in range(2):
        with decoder.resident(block):
            assert all(torch.equal(weight, whole.weights(block)[own]) for own, weight in decoder.weights(block).items())


@pytest.mark.parametrize("family", ["mistral3", "gemma3"])
def test_a_pruned_folder_holds_floats_and_the_vision_part_as_it_was(family: str, tmp_path: Path) -> None:
    folder = save_vision(tiny_vision(family), tmp_path / "model")
    quantise_layers(folder, *METHODS["fp8"], language_layers(folder))
    loaded, before = load_model(folder), load_file(folder / "model.safetensors")
    prune(loaded.model, batches(), load_recipe("fasp", {"sparsity": 0.2, "units": "mlp"}))
    assert save_model(loaded, tmp_path / "out", check_tokens=TOKENS).stock
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "out")
    after = load_file(tmp_path / "out" / "model.safetensors")
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text(encoding="utf-8"))
    with torch.no_grad():
        assert torch.equal(model(input_ids=TOKENS).logits, loaded.model(input_ids=TOKENS).logits)
    around = {name for name in before if not is_language(name)}
    assert around and around == {name for name in after if not is_language(name)}
    assert all(torch.equal(before[name], after[name]) for name in around)
    assert all(tensor.dtype == torch.float32 for tensor in after.values())
    assert main(["audit", str(tmp_path / "out"), "--against", str(folder)]) == 0


def test_a_quantised_vision_part_is_refused(tmp_path: Path) -> None:
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    quantise_layers(folder, *METHODS["fp8"], "vision_tower.")
    for read in (load_model, open_model):
        with pytest.raises(InputError, match="in fp8 and not of the language part, and other parts are read in plain"):
            read(folder)
