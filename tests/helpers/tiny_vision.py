"""Small random vision-language models of every family, and inputs with an image for them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    Gemma3Config,
    Gemma4Config,
    LlavaConfig,
    Mistral3Config,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3VLConfig,
)

from benchmarks.tiny_models import OTHER_FAMILIES, SHAPE, randomise, with_shared_keys
from optprune.models.vision import VISION_FAMILIES
from tests.helpers.tiny_models import save_tiny

IMAGE, SIDE, PATCH = 500, 16, 4
"""the token that stands for an image, and the pixels of the side of an image and of a patch"""
TEXT: dict[str, Any] = {**SHAPE, "num_key_value_heads": 2, "intermediate_size": 128, "head_dim": 16}
TOWER: dict[str, Any] = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": SIDE, "patch_size": PATCH},
}
VISION_TOKENS = {"video_token_id": 501, "vision_start_token_id": 502, "vision_end_token_id": 503}


def _config(kind: type[PretrainedConfig], text: dict[str, Any], vision: dict[str, Any], **more: Any) -> Any:
    return kind(text_config={**TEXT, **text}, vision_config=vision, **more)


def llava(**text: Any) -> PretrainedConfig:
    """CLIP and Llama."""
    tower = {**TOWER, "model_type": "clip_vision_model", "projection_dim": 32}
    return _config(LlavaConfig, {"model_type": "llama", **text}, tower, image_token_index=IMAGE)


def gemma3(**text: Any) -> PretrainedConfig:
    """SigLIP and Gemma 3, with tied embeddings."""
    own = {"model_type": "gemma3_text", "query_pre_attn_scalar": 12, "sliding_window": 8, "sliding_window_pattern": 2}
    tower = {**TOWER, "model_type": "siglip_vision_model", "vision_use_head": False}
    tokens = {"image_token_index": IMAGE, "boi_token_index": 501, "eoi_token_index": 502}
    return _config(Gemma3Config, {**own, **text}, tower, mm_tokens_per_image=4, **tokens)


def gemma4(**text: Any) -> PretrainedConfig:
    """A tower of Gemma's own and Gemma 4 of at least four blocks, with tied embeddings and a cap of the logits."""
    blocks = text.get("num_hidden_layers", 4)
    own = {**OTHER_FAMILIES["gemma4_text"], **with_shared_keys(blocks), "num_hidden_layers": blocks}
    own["use_double_wide_mlp"] = False
    tower = {
        **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
        **{"num_key_value_heads": 2, "head_dim": 16, "patch_size": PATCH, "pooling_kernel_size": 2},
        "position_embedding_size": 16,
    }
    tokens = {"video_token_id": 501, "audio_token_id": 502, "boi_token_id": 503, "eoi_token_id": 504}
    return _config(Gemma4Config, {**own, **text}, tower, image_token_id=IMAGE, audio_config=None, **tokens)


def mistral3(**text: Any) -> PretrainedConfig:
    """Pixtral and Mistral."""
    own = {"model_type": "mistral", "sliding_window": None}
    tower = {**TOWER, "model_type": "pixtral"}
    return _config(Mistral3Config, {**own, **text}, tower, image_token_index=IMAGE, tie_word_embeddings=False)


def qwen3_vl(**text: Any) -> PretrainedConfig:
    """A tower whose features are added to the first blocks, and angles of three dimensions."""
    rotary = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2], "mrope_interleaved": True}
    tower = {
        **{"depth": 3, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2, "patch_size": PATCH},
        **{"out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]},
    }
    return _config(Qwen3VLConfig, {"rope_parameters": rotary, **text}, tower, image_token_id=IMAGE, **VISION_TOKENS)


CONFIGS: dict[str, Callable[..., PretrainedConfig]] = {
    "gemma3": gemma3,
    "gemma4": gemma4,
    "llava": llava,
    "mistral3": mistral3,
    "qwen3_vl": qwen3_vl,
}
assert CONFIGS.keys() == VISION_FAMILIES.keys()
by_vision_family = pytest.mark.parametrize("family", CONFIGS)


def tiny_vision(family: str, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A tiny vision-language model; keywords replace fields of the text_config."""
    return randomise(AutoModelForImageTextToText.from_config(CONFIGS[family](**text)), seed)


def save_vision(model: PreTrainedModel, folder: Path) -> Path:
    """Write a model folder with the tiny tokenizer and the settings of a processor; returns the folder."""
    save_tiny(model, folder)
    (folder / "preprocessor_config.json").write_text('{"size":  16}', encoding="utf-8")
    (folder / "chat_template.jinja").write_text("{{ messages }}", encoding="utf-8")
    return folder


def stock(folder: Path) -> PreTrainedModel:
    """The model of a folder as plain transformers loads it."""
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=False)
    assert not model.config.is_remote_code()
    return model.eval()


def with_image(config: PretrainedConfig, seed: int = 0) -> dict[str, Tensor]:
    """Inputs with one image between tokens of text."""
    generator = torch.Generator().manual_seed(seed)
    patches = (SIDE // PATCH) ** 2
    kind = config.model_type.removeprefix("pruned_")
    count = patches if kind == "llava" else patches // 4
    before, after = torch.randint(3, IMAGE, (2, 1, 7), generator=generator)
    ids = torch.cat((before, torch.full((1, count), IMAGE), after), 1)
    pixels = torch.randn(1, 3, SIDE, SIDE, generator=generator)
    if kind == "gemma4":
        pixels = torch.randn(1, patches, 3 * PATCH**2, generator=generator)
    if kind == "qwen3_vl":
        pixels = torch.randn(patches, 3 * 2 * PATCH**2, generator=generator)
    more: dict[str, Tensor] = {
        "gemma3": {"token_type_ids": (ids == IMAGE).long()},
        "gemma4": {
            "image_position_ids": torch.cartesian_prod(*[torch.arange(SIDE // PATCH)] * 2).flip(1)[None],
            "mm_token_type_ids": (ids == IMAGE).long(),
        },
        "mistral3": {"image_sizes": torch.tensor([[SIDE, SIDE]])},
        "qwen3_vl": {
            "image_grid_thw": torch.tensor([[1, SIDE // PATCH, SIDE // PATCH]]),
            "mm_token_type_ids": (ids == IMAGE).long(),
        },
    }.get(kind, {})
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **more}


def answer(model: PreTrainedModel, seed: int = 0, more: int = 6) -> tuple[Tensor, list[int]]:
    """The logits for an input with an image, and the tokens that are generated after it."""
    inputs: Any = with_image(model.config, seed)
    with torch.no_grad():
        logits = model(**inputs).logits
        ids = model.generate(**inputs, max_new_tokens=more, do_sample=False)
    return logits, ids[0].tolist()
