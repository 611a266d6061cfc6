"""The weights of a GGUF file back in the model that it was written from."""

from pathlib import Path

import pytest
import torch

import optprune
from optprune.errors import OptpruneError
from optprune.export import GgufFile, ModelSource, export
from optprune.export.gguf_decoded import decode_into
from optprune.export.gguf_families import FAMILIES
from optprune.models import Mlp, Values
from tests.helpers.gguf_models import PROMPT, THERE, apart, cut, made, saved
from tests.helpers.tiny_models import tiny_llama


def of(family: str):
    """A model of a family with fewer units, whose rows and columns the file has in another order, or filled up."""
    model = tiny_llama(num_hidden_layers=4) if family not in THERE else made(family)
    # A norm goes over the values of each head of Gemma 4.
    return cut(model, {Mlp(): 88} if family == "gemma4_text" else {Values(): 12, Mlp(): 88})


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "qwen2"])
def test_every_number_returns_to_its_place(family: str, tmp_path: Path) -> None:
    folder = saved(of(family), tmp_path / "model")
    exporter = GgufFile(kind="f32")
    file = export(folder, tmp_path / "model.gguf", exporter).path
    model = optprune.load_model(folder, device="cpu").model.float()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1 and len(parameter) > 1:  # a gate of one row is a vector in the file
                parameter.zero_()
    decode_into(model, file, ModelSource(folder), exporter)
    # Numbers of Falcon-H1 are multiplied in the file, and divided again: two roundings.
    rtol = 2**-22 if family == "falcon_h1" else 0.0
    for name, parameter in optprune.models.Decoder(model).joined().named_parameters():
        torch.testing.assert_close(parameter, before[name], rtol=rtol, atol=0.0)


@pytest.mark.parametrize(("family", "kind"), [("llama", "q4_0"), ("phi3", "q8_0"), ("qwen3_moe", "q4_K")])
def test_it_computes_what_llama_cpp_computes(family: str, kind: str, tmp_path: Path) -> None:
    folder = saved(of(family), tmp_path / "model")
    file = export(folder, tmp_path / "model.gguf", GgufFile(kind=kind)).path
    model = optprune.load_model(folder, device="cpu").model.float().eval()
    answers = list[torch.Tensor]()
    for _ in range(2):
        with torch.no_grad():
            answers.append(model(input_ids=PROMPT[None]).logits[0, -1].double().log_softmax(-1))
        decode_into(model, file, ModelSource(folder), GgufFile(kind=kind))
        optprune.models.Decoder(model).joined()
    rounding = float((answers[1] - answers[0]).abs().max())
    assert apart(file, answers[1], PROMPT) < (0.5 * rounding if kind.startswith("q4") else 0.2)


def test_a_file_of_another_model_is_told(tmp_path: Path) -> None:
    folder = saved(of("llama"), tmp_path / "model")
    short = saved(cut(tiny_llama(num_hidden_layers=4), {}), tmp_path / "other")
    file = export(short, tmp_path / "x.gguf", GgufFile(kind="q8_0")).path
    deep = saved(tiny_llama(num_hidden_layers=5), tmp_path / "deep")
    model = optprune.load_model(deep, device="cpu").model
    with pytest.raises(OptpruneError, match=r"has no tensor blk\.4\..*: export the model again"):
        decode_into(model, file, ModelSource(deep), GgufFile(kind="q8_0"))
    assert folder.is_dir()
