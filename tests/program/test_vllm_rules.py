"""Rules of vLLM: of each small model they say what vLLM did with it, by the table of benchmarks.vllm_loads."""

import json
from typing import Any

import pytest

from benchmarks.common import RESULTS
from benchmarks.tiny_models import tiny
from benchmarks.vllm_loads import NAME, PRUNINGS, made
from optprune.models import Decoder, is_stock
from optprune.program import RUNTIMES

ROWS = json.loads((RESULTS / f"{NAME}.json").read_text(encoding="utf-8"))["rows"]
NO_KERNEL = ("gpt_oss",)
"""families whose experts the CPU build cannot run, which says nothing of a GPU"""
OF_SHAPES = [row for row in ROWS if "w4a16" not in row["pruning"] and row["family"] not in NO_KERNEL]
VLLM = RUNTIMES["vllm"]


def test_the_families_that_are_said_to_be_tried_are_those_of_the_table() -> None:
    agreed = {row["family"].partition(",")[0] for row in ROWS if row["vLLM"] == "loads, agrees"}
    assert agreed == set(VLLM.tried_families)


@pytest.mark.parametrize("row", OF_SHAPES, ids=lambda row: f"{row['family']}: {row['pruning']}")
def test_the_rule_says_what_vllm_did(row: dict[str, Any]) -> None:
    pruning = next(each for each in PRUNINGS if each.name == row["pruning"])
    pruned, before = pruning.cut(made(row["family"])), Decoder(made(row["family"]))
    assert pruned is not None
    of_target = VLLM.refuses_model(before) or VLLM.refuses(before, Decoder(pruned).shapes())
    of_folder = VLLM.refuses_model(Decoder(pruned)) if is_stock(pruned.config) else "classes of optprune's own"
    assert [of_target is None, of_folder is None] == [row["vLLM"] == "loads, agrees"] * 2


@pytest.mark.parametrize(
    ("family", "fields", "sentence"),
    [
        ("deepseek_v2", {}, "biases of latent attention (attention_bias)"),
        ("deepseek_v3", {"attention_bias": False}, "put topk_method noaux_tc into config.json"),
        ("falcon_h1", {}, "a norm before a factor (mamba_norm_before_gate)"),
        ("glm4_moe_lite", {"attention_bias": False}, "put first_k_dense_replace 1 into config.json"),
        ("nemotron_h", {}, "experts of two layers"),
        ("qwen2_moe", {}, "windows in a mixture of Qwen2"),
        ("qwen3", {}, "windows in some blocks only"),
        ("gpt_oss", {}, "rotary embeddings without beta_fast"),
        ("lfm2", {}, "models of the kind lfm2: it takes deepseek_v2, "),
        ("ministral3", {}, "queries scaled by positions (llama_4_scaling_beta)"),
        # What a folder was pruned from is not known: its heads alone say so.
        (
            "qwen2_moe",
            {"head_dim": 32, "use_sliding_window": False},
            "models of the kind qwen2_moe with fewer heads than the hidden size says",
        ),
        ("qwen3_moe", {"head_dim": 32}, None),
    ],
)
def test_what_is_refused_is_named(family: str, fields: dict[str, Any], sentence: str | None) -> None:
    refusal = VLLM.refuses_model(Decoder(tiny(family, **fields)))
    assert refusal is None if sentence is None else sentence in (refusal or "")
