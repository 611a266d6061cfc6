"""Experts as separate modules: the same function and memory, for all names in checkpoints."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from optprune.calibration.moments_pass import same_routes
from optprune.errors import InputError
from optprune.models import ARCHITECTURES, Decoder, load_model, open_model
from tests.helpers.cut_mixtures import mixture_in
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, save_tiny

MIXTURES = [name for name, architecture in ARCHITECTURES.items() if architecture.mixture is not None]
TOKENS = torch.arange(10, 58)[None]
of_mixtures = pytest.mark.parametrize("name", MIXTURES)


@of_mixtures
def test_experts_share_the_memory_of_the_stock_tensors_and_answer_the_same(name: str) -> None:
    """Except where the rows of both matrices alternate: those are copied."""
    model: Any = ALL_MODELS[name]()
    block, gated = block_with(Decoder(model), 1, "mlp"), name != "nemotron_h"
    experts = mixture_in(Decoder(model).joined(), block).experts
    fused, shared = experts.gate_up_proj if gated else experts.up_proj, name != "gpt_oss"
    with torch.no_grad():
        expected, state = model(TOKENS).logits, {key: value.clone() for key, value in model.state_dict().items()}
        decoder = Decoder(model)
        up = decoder.layer(block, f"{decoder.architecture.mixture.experts}.2.up_proj").weight  # type: ignore[union-attr]
        assert torch.equal(up, fused[2, 48 * gated :] if shared else fused[2, :, 1::2].T)
        assert (up.untyped_storage().data_ptr() == fused.untyped_storage().data_ptr()) is shared
        assert (model(TOKENS).logits - expected).abs().max() <= 1e-5 * expected.abs().max()
        decoder.joined()
        assert torch.equal(model(TOKENS).logits, expected)
    again = model.state_dict()
    assert again.keys() == state.keys() and all(torch.equal(again[key], value) for key, value in state.items())


@pytest.mark.parametrize("original", [True, False], ids=["a matrix for each expert", "two tensors"])
@of_mixtures
def test_a_store_reads_either_form(name: str, original: bool, tmp_path: Path) -> None:
    model = ALL_MODELS[name]()
    model.save_pretrained(tmp_path, save_original_format=original)
    loaded = open_model(tmp_path)
    decoder, whole = loaded.decoder(), Decoder(model)
    for block in range(len(decoder.blocks)):
        with decoder.resident(block):
            found, expected = decoder.weights(block), whole.weights(block)
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_loaded_model_is_stock(tmp_path: Path) -> None:
    loaded = load_model(save_tiny(ALL_MODELS["mixtral"](), tmp_path))
    experts: Any = loaded.model.model.layers[0].mlp.experts  # type: ignore[union-attr]
    assert type(experts).__name__ == "MixtralExperts" and experts.gate_up_proj.shape == (4, 96, 64)


def test_a_reference_sends_tokens_where_the_other_block_sent_them() -> None:
    one: Any = Decoder(ALL_MODELS["mixtral"](0)).blocks[0]
    other: Any = Decoder(ALL_MODELS["mixtral"](1)).blocks[0]
    hidden = torch.randn(1, 30, 64, generator=torch.Generator().manual_seed(0))
    reached: dict[str, list[int]] = {"one": [], "other": []}
    for label, block in (("one", one), ("other", other)):
        for expert in block.mlp.experts.values():
            expert.gate_proj.register_forward_pre_hook(lambda _, args, label=label: reached[label].append(len(args[0])))
    with torch.no_grad():
        one.mlp(hidden), other.mlp(hidden)
        assert reached["one"] != reached["other"]
        reached["one"].clear(), reached["other"].clear()
        with same_routes(one, other):
            one.mlp(hidden), other.mlp(hidden)
    assert reached["one"] == reached["other"] and sum(reached["one"]) == 60


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("qwen3_moe", {"mlp_only_layers": [0]}),
        ("qwen2_moe", {"decoder_sparse_step": 2}),
        ("mixtral", {"output_router_logits": True}),
        ("olmoe", {"clip_qkv": 8.0}),
    ],
)
def test_fields_that_are_not_understood_are_refused(name: str, fields: dict[str, Any], tmp_path: Path) -> None:
    model = ALL_MODELS[name]()
    model.save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    [field] = fields
    with pytest.raises(InputError, match=f"has {field} .*, which is not supported for a {name} model"):
        load_model(tmp_path)
