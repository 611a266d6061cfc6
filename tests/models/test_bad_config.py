"""Configs that make no model: one sentence, before any weight is loaded."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.tiny_models import tiny
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_opt, tiny_sliding


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
    assert "has use_bidirectional_attention True, and what a gemma2 model computes then is not known" in sentence


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


def test_a_hub_that_is_out_of_reach(attempt: Attempt) -> None:
    command = [sys.executable, "-c", OFFLINE, "evaluate", "someone/tiny", "--text", str(attempt.text)]
    environment = {**os.environ, "HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(attempt.folder)}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert run.returncode == 2
    [sentence] = run.stderr.splitlines()
    assert sentence.startswith("error: the config of someone/tiny cannot be loaded: We couldn't connect to ")
