"""Folders in transformers 4.57, which other tools still stand on: the same logits, words and tokens."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

import optprune
from optprune.export import save_model
from optprune.export.check import TOLERANCE
from optprune.models import ARCHITECTURES, load_tokenizer, need_tokenizer
from tests.helpers.mixed_models import generated, mixed
from tests.helpers.pruned_demo import PrunedDemo
from tests.helpers.tiny_models import ALL_MODELS, LLAMA3, SLIDING, TINY_MODELS, tiny_tokenizer

OLDER = ("transformers==4.57.6", "huggingface_hub==0.36.2", "tokenizers==0.22.2")
"""with what this environment has, torch first of all, they are all that it takes"""
PARTS_OF_HEADS = {
    "glm4_moe": {"partial_rotary_factor": 0.5},
    "gpt_neox": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5},
}
TEXT = "The committee <s> met  on Monday."
CHECK_TOKENS = torch.arange(600).remainder(500).reshape(2, 300)
PROGRAM = """
import json, sys
sys.modules["optprune"] = None  # importing it is an error
import torch, transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, place, text, tokens = *sys.argv[1:], torch.arange(600).remainder(500).reshape(2, 300)
config = json.load(open(f"{folder}/config.json"))
# The attention that it takes by itself passes over soft caps.
attention = {"attn_implementation": "eager"} if config.get("attn_logit_softcapping") else {}
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="auto_map" in config, **attention)
tokenizer = AutoTokenizer.from_pretrained(folder)
inputs = tokenizer(text, return_tensors="pt")
prompt = torch.arange(10, 20)[None]
with torch.no_grad():
    save_file({"logits": model(tokens).logits, "words": model(**inputs).logits}, f"{place}/found.safetensors")
greedy = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 12, "do_sample": False}
new = model.generate(prompt, **greedy)
# Twice, since the cache is kept for the next text.
static = [model.generate(prompt, cache_implementation="static", **greedy)[0].tolist() for _ in range(2)]
print(json.dumps({
    "version": transformers.__version__, "new": new[0].tolist(), "static": static,
    "tokens": inputs.input_ids[0].tolist(),
    "chat": tokenizer.apply_chat_template([{"role": "user", "content": text}], tokenize=False),
    "again": tokenizer.decode(inputs.input_ids[0]), "special": tokenizer.all_special_tokens,
}))
"""


@pytest.fixture(scope="module")
def older(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of packages that stand before those of this environment."""
    place = tmp_path_factory.mktemp("older")
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(place), *OLDER]
    run = subprocess.run(install, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return place


def in_older(older: Path, folder: Path, place: Path) -> dict[str, Any]:
    """What the older version says of a folder; its logits go to a place beside."""
    environment = os.environ | {
        "PYTHONPATH": str(older),
        "HF_HUB_OFFLINE": "1",
        "HF_MODULES_CACHE": str(place / "modules"),
    }
    words = [sys.executable, "-c", PROGRAM, str(folder), str(place), TEXT]
    run = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def check_alike(model: PreTrainedModel, tokenizer: Tokenizer, folder: Path, older: Path, place: Path) -> None:
    """The folder of a model is in the older version what the model is here."""
    outside = in_older(older, folder, place)
    assert outside["version"].startswith("4.57.")
    tokens = tokenizer(TEXT, return_tensors="pt")
    assert outside["tokens"] == tokens.input_ids[0].tolist()
    assert outside["again"] == tokenizer.decode(tokens.input_ids[0])
    assert sorted(outside["special"]) == sorted(tokenizer.all_special_tokens)
    message = [{"role": "user", "content": TEXT}]
    assert outside["chat"] == tokenizer.apply_chat_template(message, tokenize=False)
    found = load_file(place / "found.safetensors")
    with torch.no_grad():
        for here, there in ((model(CHECK_TOKENS), found["logits"]), (model(**tokens), found["words"])):
            assert (here.logits - there).abs().max() <= TOLERANCE[torch.float32] * here.logits.abs().max()
    assert outside["new"] == generated(model)
    assert outside["static"] == [generated(model)] * 2


def model_of(name: str) -> PreTrainedModel:
    rotary = {} if name == "opt" else {"rope_parameters": {**LLAMA3, "rope_theta": 5e5}}
    window = {"layer_types": ["full_attention", "sliding_attention"] * 2, **SLIDING} if name == "qwen2" else {}
    if name not in TINY_MODELS:
        plain = {"rope_type": "default", "rope_theta": 5e5}
        kinds = {"full_attention": plain, "sliding_attention": plain | {"rope_theta": 3e3}}
        rotary = {"rope_parameters": kinds if name == "gemma3_text" else plain | PARTS_OF_HEADS.get(name, {})}
    # The Qwen2 with experts of the older version gives blocks that see all tokens a window too.
    window |= {"use_sliding_window": False, "sliding_window": None} if name == "qwen2_moe" else {}
    # The older version computes what GPT-OSS's own numbers say.
    fixed = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0} if name == "gpt_oss" else {}
    return ALL_MODELS[name](num_hidden_layers=4, **rotary, **window, **fixed)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "uneven"),
    [
        (name, uneven)
        for name in ALL_MODELS
        for uneven in (False, True)
        # The modelling file of experts needs transformers 5.
        if ARCHITECTURES[name].in_transformers_4 and not (uneven and ARCHITECTURES[name].mixture)
    ],
)
def test_a_folder_in_transformers_4(name: str, uneven: bool, older: Path, tmp_path: Path) -> None:
    model, tokenizer = model_of(name), tiny_tokenizer()
    if uneven:
        mixed(model)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>"]})
    tokenizer.chat_template = "{% for message in messages %}<x>{{ message['content'] }}{% endfor %}"
    folder = save_model(model, tmp_path / "out", tokenizer=tokenizer).folder
    assert tokenizer.apply_chat_template([{"role": "user", "content": TEXT}], tokenize=False) == f"<x>{TEXT}"
    check_alike(model, tokenizer, folder, older, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("recipe", ["fasp", "structured_best"])
def test_a_pruned_model_in_transformers_4(recipe: str, pruned_demo: PrunedDemo, older: Path, tmp_path: Path) -> None:
    """Of its own modelling file, where its blocks differ in shape."""
    folder = pruned_demo.by(recipe)
    uneven = "auto_map" in json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert uneven or recipe != "structured_best"
    tokenizer = need_tokenizer(load_tokenizer(folder), str(folder))
    check_alike(optprune.load_model(folder, device="cpu").model.float(), tokenizer, folder, older, tmp_path)
