"""Configs that are refused: of unknown architectures, or with numbers that make no model."""

import ast
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from benchmarks.tiny_models import tiny
from optprune.errors import InputError
from optprune.models import ARCHITECTURES, architecture_of, families
from optprune.models.registry import architecture_named
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_opt, tiny_sliding

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SMALL |= {"intermediate_size": 48, "vocab_size": 64, "pad_token_id": None}


def refused(family: str, **fields: Any) -> str:
    config = AutoConfig.for_model(family, **{**SMALL, **fields})
    with pytest.raises(InputError) as caught:
        architecture_of(config)
    sentence = str(caught.value)
    # What config.json holds says as much.
    with pytest.raises(InputError) as again:
        architecture_named(family, {**config.to_dict(), "auto_map": {"AutoConfig": "foo.Foo"}})
    assert str(again.value) == sentence
    assert sentence.startswith(f"the architecture '{family}' is not known: optprune prunes deepseek_v2, deepseek_v3, ")
    assert sentence.endswith("; optprune inspect MODEL drafts one for --architecture, where that is safe")
    return sentence


def test_experts_and_their_router_are_named() -> None:
    sentence = refused("flex_olmo", num_experts=4)
    assert "the nearest architecture to model.layers.0, exaone4, lacks mlp.gate (" in sentence
    assert "mlp.experts (FlexOlmoExperts)" in sentence
    assert "and needs mlp.gate_proj, mlp.up_proj, mlp.down_proj;" in sentence


def test_fused_layers_are_named() -> None:
    assert "self_attention.query_key_value (Linear), self_attention.dense (Linear)" in refused("bloom")


def test_a_block_of_a_known_kind_says_so() -> None:
    words = "; the linear layers of model.layers.0 are those of exaone4, so the entry may be short; optprune"
    assert words in refused("cohere")


@pytest.mark.parametrize(
    "config",
    [None, {}, {"model_type": "foo"}, {"model_type": ["flex_olmo"]}, {"model_type": "flex_olmo", "hidden_size": -1}],
)
def test_where_there_is_no_model_there_is_nothing_to_say(config: Any) -> None:
    kind = None if config is None else config.get("model_type")
    with pytest.raises(
        InputError, match=r"is not known: optprune prunes .* of optprune/models/families\.py\); optprune inspect"
    ):
        architecture_named(kind, config)


def spoiled(attempt: Attempt, fields: dict[str, Any]) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("field", "value", "reason"),
    [
        ("text_config", [], "has a text_config"),
        ("dtype", 1, "has dtype 1, which is not a floating-point dtype"),
        ("dtype", "int8", "has dtype torch.int8, which is not a floating-point dtype"),
        ("num_key_value_heads", 3, "has num_key_value_heads 3, which is not a divisor of num_attention_heads 4"),
        ("num_key_value_heads", 0, "has num_key_value_heads 0, which is not a whole number from 1 to"),
        ("head_dim", 3, "has head_dim 3, which is not an even number, since the halves of a head are rotated"),
        ("head_dim", 0, "has head_dim 0, which is not a whole number from 1 to"),
        ("hidden_size", -64, "has hidden_size -64, which is not a whole number from 1 to"),
        ("num_hidden_layers", 0, "has num_hidden_layers 0, which is not a whole number from 1 to 10000"),
        ("num_hidden_layers", 10**9, "has num_hidden_layers 1000000000, which is not a whole number from 1 to 10000"),
        ("return_dict", False, "has return_dict False, which is not True"),
        ("output_attentions", True, "has output_attentions True, which is not False"),
        ("hidden_act", "nope", "cannot be loaded: KeyError: 'nope'; correct config.json"),
        ("pad_token_id", 9999, "cannot be loaded: Padding_idx must be within num_embeddings"),
        ("rope_parameters", {"rope_type": "x"}, "cannot be loaded: KeyError: 'x'; correct config.json"),
        ("attn_implementation", "nope", 'cannot be loaded: Specified `attn_implementation="nope"` is not supported'),
    ],
)
def test_a_field_that_is_wrong(attempt: Attempt, field: str, value: Any, reason: str) -> None:
    spoiled(attempt, {field: value})
    sentence = attempt.fails(attempt.command())
    assert sentence.startswith(f"error: the config of {attempt.model} ")
    assert reason in sentence


@pytest.mark.parametrize("listed", ["xxxx", ["modeling_x.X"]])
def test_classes_that_are_no_table(attempt: Attempt, listed: Any) -> None:
    spoiled(attempt, {"auto_map": listed})
    sentence = attempt.fails(attempt.command())
    assert "has auto_map" in sentence and "which is not an object with the names of classes" in sentence


@pytest.mark.parametrize("window", [0, -3])
def test_a_sliding_window_of_nothing(attempt: Attempt, window: int) -> None:
    attempt.model = save_tiny(tiny_sliding(), attempt.folder / "sliding")
    spoiled(attempt, {"sliding_window": window})
    sentence = attempt.fails(attempt.evaluate())
    assert f"has sliding_window {window}, which is not a whole number of at least 1" in sentence


def test_attention_in_both_directions(attempt: Attempt) -> None:
    attempt.model = save_tiny(tiny("gemma2"), attempt.folder / "gemma2")
    spoiled(attempt, {"use_bidirectional_attention": True})
    sentence = attempt.fails(attempt.evaluate())
    assert "has use_bidirectional_attention True, which is not supported for a gemma2 model" in sentence


def test_a_width_of_opt(attempt: Attempt) -> None:
    attempt.model = save_tiny(tiny_opt(), attempt.folder / "opt")
    spoiled(attempt, {"ffn_dim": 0})
    assert "has ffn_dim 0, which is not a whole number from 1" in attempt.fails(attempt.evaluate())


@pytest.mark.parametrize("longest", ["x", [], {"a": 1}])
def test_a_tokenizer_that_fails_only_when_it_is_used(attempt: Attempt, longest: Any) -> None:
    attempt.model = Path(shutil.copytree(attempt.model, attempt.folder / "model"))
    file = attempt.model / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "model_max_length": longest}))
    sentence = attempt.fails(attempt.evaluate())
    assert f"the tokenizer of {attempt.model} cannot be loaded: " in sentence


OFFLINE = """
import sys, time
time.sleep = lambda seconds: None  # between the attempts to reach the hub
from optprune.cli import main
sys.exit(main())
"""


@pytest.mark.e2e
def test_a_hub_that_is_out_of_reach(attempt: Attempt) -> None:
    command = [sys.executable, "-c", OFFLINE, "evaluate", "someone/tiny", "--text", str(attempt.text)]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(attempt.folder)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    [sentence] = run.stderr.splitlines()
    assert sentence.startswith("error: the config of someone/tiny cannot be loaded: We couldn't connect to ")


def test_no_entry_of_the_table_is_longer_than_forty_lines() -> None:
    source = Path(families.__file__).read_text(encoding="utf-8")
    entries = [node for node in ast.parse(source).body if isinstance(node, ast.Assign)]
    lengths = [(entry.end_lineno or entry.lineno) - entry.lineno + 1 for entry in entries]
    assert len(lengths) > len(ARCHITECTURES) and max(lengths) <= 40
