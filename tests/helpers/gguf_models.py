"""Tiny models of every family that llama.cpp knows, cut and saved, and what it should say of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import optprune
from benchmarks.tiny_models import OTHER_FAMILIES, tiny
from optprune.export import save_model
from optprune.models import Decoder, Mlp
from optprune.models.units import LinkedUnits
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.mixed_models import narrow
from tests.helpers.tiny_models import tiny_tokenizer

NO_WINDOW = {"sliding_window": None, "use_sliding_window": False}
HEADS_OF_16 = {"query_pre_attn_scalar": 16}
FAR = {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e4}
NEAR = {"rope_type": "default", "rope_theta": 500.0}
YARN = {**OTHER_FAMILIES["ministral3"]["rope_parameters"], "mscale": 1.0, "mscale_all_dim": 1.0}
BENT = {**OTHER_FAMILIES["gpt_oss"]["rope_parameters"], "truncate": True}
SCALED = {
    **OTHER_FAMILIES["deepseek_v3"]["rope_parameters"],
    **{"rope_theta": 500.0, "original_max_position_embeddings": 2048, "mscale": 0.7, "mscale_all_dim": 0.7},
}
"""with bounds between which some dimensions lie"""
LOW_RANK: dict[str, Any] = {"attention_bias": False, "rope_parameters": SCALED}
EQUAL_DIMENSIONS = {"linear_value_head_dim": 8}
"""of keys and values of a delta network"""
MIXED = ["linear_attention", "moe", "full_attention", "moe"]
"""of the blocks of a Nemotron-H, whose MLPs are all of one kind there"""
THERE: dict[str, dict[str, Any]] = {
    "deepseek_v2": LOW_RANK,
    "deepseek_v3": LOW_RANK,
    "exaone4": {"head_dim": 16, "sliding_window": None, "layer_types": ["full_attention"] * 4},
    "falcon_h1": {"mamba_norm_before_gate": False},
    "gemma2": HEADS_OF_16,
    "gemma3_text": {**HEADS_OF_16, "rope_parameters": {"full_attention": FAR, "sliding_attention": NEAR}},
    "gemma4_text": {},
    "glm4_moe": {},
    "glm4_moe_lite": {**LOW_RANK, "rms_norm_eps": 1e-6},
    "gpt2": {},
    "gpt_neox": {},
    "gpt_oss": {"swiglu_alpha": 1.702, "swiglu_limit": 7.0, "rope_parameters": BENT},
    "granite": {},
    "granitemoehybrid": {},
    "lfm2": {"conv_bias": False},
    "ministral3": {"sliding_window": None, "rope_parameters": YARN},
    "mistral": NO_WINDOW,
    "mixtral": NO_WINDOW,
    "nemotron_h": {"num_hidden_layers": 2, "layer_types": MIXED},
    "olmo2": {},
    "olmoe": {"num_key_value_heads": 4},
    "phi3": NO_WINDOW,
    "qwen2_moe": NO_WINDOW,
    "qwen3": NO_WINDOW,
    "qwen3_5_moe_text": EQUAL_DIMENSIONS,
    "qwen3_5_text": EQUAL_DIMENSIONS,
    "qwen3_moe": NO_WINDOW,
    "qwen3_next": EQUAL_DIMENSIONS,
    "seed_oss": {"attention_out_bias": False, "mlp_bias": False},
    "smollm3": {**NO_WINDOW, "no_rope_layer_interval": 4},
}
"""what tiny models are to be, for llama.cpp to have words for all of them"""
PROMPT = torch.randint(5, 500, (24,), generator=torch.Generator().manual_seed(0))
ROUNDED = 1e-3
"""two tables of GELU differ by a step of float16 where an input lies between two of its numbers"""


class TableOfGelu(nn.Module):
    """GELU as llama.cpp computes it on a CPU: by tanh, from a table of all numbers of float16."""

    def forward(self, inputs: Tensor) -> Tensor:
        table = nn.functional.gelu(inputs.half().float(), approximate="tanh").half().float()
        return torch.where(inputs.abs() >= 10, inputs.relu(), table)


def made(family: str, **more: Any) -> PreTrainedModel:
    model = tiny(family, **{"num_hidden_layers": 4, **THERE[family], **more})
    # Scalars of some 0.02 shrink the states to the size of roundings.
    scalars = [buffer for name, buffer in model.named_buffers() if name.endswith("layer_scalar")]
    for number, scalar in enumerate(scalars):
        scalar.fill_(0.8 + 0.1 * number)
    return model


def cut(model: PreTrainedModel, counts: dict[LinkedUnits, int], blocks: Sequence[int] = range(4)) -> PreTrainedModel:
    """So many units of each kind left in these blocks, and three of four experts where there are any, of 40 units.

    Experts stay as wide as a shared one that has its width from theirs.
    """
    decoder = Decoder(model)
    mixture = decoder.architecture.mixture
    for block in blocks:
        for units, count in counts.items():
            kept = count
            if isinstance(units, Mlp) and mixture is not None and decoder.shape(block).experts:
                decoder.keep_experts(block, torch.tensor([True, False, True, True]))
                kept = 48 if mixture.shared_count else min(count, 40)
            narrow(decoder, block, units, kept)
    decoder.record_shapes()
    return decoder.joined()


def saved(model: PreTrainedModel, folder: Path) -> Path:
    save_model(model, folder, tokenizer=tiny_tokenizer())
    return folder


def expected_of(folder: Path, prompt: Tensor) -> tuple[Tensor, float]:
    """The log-probabilities of the token behind a prompt, and how far off llama.cpp may be."""
    model = optprune.load_model(folder, device="cpu").model.float().eval()
    tables = 0
    for module in model.modules():
        for name in ("act", "act_fn"):
            if "GELU" in type(getattr(module, name, None)).__name__:
                setattr(module, name, TableOfGelu())
                tables += 1
    with torch.no_grad():
        return model(input_ids=prompt[None]).logits[0, -1].double().log_softmax(-1), ROUNDED if tables else 1e-4


def apart(file: Path, expected: Tensor, prompt: Tensor) -> float:
    found = LlamaCpp(file).log_probabilities(prompt)
    assert len(found) == len(expected)
    return max(abs(found[token] - float(expected[token])) for token in found)
