"""What a saved folder says to other readers: the words of transformers 4.x too, and no code of strangers."""

import json
import logging
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from transformers import AddedToken, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerFast

import optprune
from benchmarks.tiny_models import tiny
from optprune.export import save_model
from optprune.export.portable import make_portable
from optprune.models import load_model, load_tokenizer
from tests.helpers.mixed_models import mixed
from tests.helpers.tiny_models import LLAMA3, TINY_MODELS, save_tiny, tiny_llama, tiny_opt, tiny_qwen2, tiny_tokenizer

LONG = {"factor": 4.0, "long_factor": [2.5] * 8, "original_max_position_embeddings": 128, "rope_type": "longrope"}
LONG["short_factor"] = [1.5] * 8
PART = {"rope_type": "default", "rope_theta": 2e4, "partial_rotary_factor": 0.5}
TWO = {
    "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 2e5},
    "sliding_attention": {"rope_type": "default", "rope_theta": 3e3},
}


def written(folder: Path, name: str = "config.json") -> dict[str, Any]:
    return json.loads((folder / name).read_text(encoding="utf-8"))


@pytest.mark.parametrize(
    ("model", "said"),
    [
        (
            tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 1e5}),
            {"rope_theta": 1e5, "rope_scaling": None},
        ),
        (tiny_llama(rope_parameters={**LLAMA3, "rope_theta": 5e5}), {"rope_theta": 5e5, "rope_scaling": LLAMA3}),
        (
            tiny_llama(rope_parameters={**LONG, "rope_theta": 5e5}),
            {"rope_theta": 5e5, "rope_scaling": LONG, "original_max_position_embeddings": 128},
        ),
        (
            tiny_qwen2(rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e6}).bfloat16(),
            {
                "rope_theta": 1e6,
                "rope_scaling": {"rope_type": "linear", "factor": 3.0},
                "dtype": "bfloat16",
                "torch_dtype": "bfloat16",
            },
        ),
        (tiny_opt(), {"dtype": "float32", "torch_dtype": "float32"}),
        (
            tiny("gpt_neox", rope_parameters=PART),
            {"rotary_emb_base": 2e4, "rotary_pct": 0.5, "rope_scaling": None},
        ),
        (
            tiny("gemma3_text", rope_parameters=TWO),
            {"rope_theta": 2e5, "rope_local_base_freq": 3e3, "rope_scaling": {"rope_type": "linear", "factor": 3.0}},
        ),
        (mixed(tiny_qwen2(num_hidden_layers=4)), {"rope_theta": 1e4, "rope_scaling": None, "torch_dtype": "float32"}),
    ],
    ids=["llama", "llama3", "longrope", "qwen2", "opt", "gpt_neox", "gemma3", "mixed"],
)
def test_the_config_says_it_in_the_words_of_both_versions(
    model: PreTrainedModel, said: dict[str, Any], tmp_path: Path
) -> None:
    fields = written(save_model(model, tmp_path / "out").folder)
    assert {name: fields[name] for name in said} == said
    rotary = getattr(model.config, "rope_parameters", None)
    assert fields.get("rope_parameters") == rotary
    assert rotary is not None or not {"rope_theta", "rope_scaling"} & set(fields)
    # Nor does it change what transformers 5 reads, or what is written after that.
    again = optprune.load_model(tmp_path / "out", device="cpu").model
    assert getattr(again.config, "rope_parameters", None) == rotary
    assert again.dtype == model.dtype
    assert written(save_model(again, tmp_path / "again").folder) == fields


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", TINY_MODELS)
def test_a_saved_folder_loads_without_a_warning(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    caplog.set_level(logging.WARNING, logger="transformers")
    for model in (TINY_MODELS[name](), mixed(TINY_MODELS[name](num_hidden_layers=4))):
        save_model(model, tmp_path / "out", tokenizer=tiny_tokenizer(), overwrite=True)
        loaded = load_model(tmp_path / "out")
        assert loaded.tokenizer is not None
    assert caplog.records == []


def test_the_tokenizer_says_what_its_class_said(tmp_path: Path) -> None:
    state = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    state["pre_tokenizer"]["add_prefix_space"] = True
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", padding_side="left"
    )
    tokenizer.add_special_tokens({"extra_special_tokens": ["<x>", AddedToken("<y>", lstrip=True)]})
    save_model(tiny_llama(), tmp_path / "out", tokenizer=tokenizer)
    fields = written(tmp_path / "out", "tokenizer_config.json")
    said = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_input_names": ["input_ids", "attention_mask"],
        "padding_side": "left",
        "truncation_side": "right",
        "clean_up_tokenization_spaces": False,
        "add_prefix_space": True,
        "additional_special_tokens": ["<x>", "<y>"],
    }
    assert {name: fields[name] for name in said} == said
    assert "extra_special_tokens" not in fields
    again = load_tokenizer(tmp_path / "out")
    text = "Words <x> and  more </s><y>"
    assert again is not None and again(text).input_ids == tokenizer(text).input_ids
    assert again.extra_special_tokens == tokenizer.extra_special_tokens
    assert again.padding_side == "left"


def test_the_sides_that_a_tokenizer_was_given_later_are_told(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.padding_side, tokenizer.truncation_side = "left", "left"
    save_model(tiny_llama(), tmp_path / "out", tokenizer=tokenizer)
    fields = written(tmp_path / "out", "tokenizer_config.json")
    assert (fields["padding_side"], fields["truncation_side"]) == ("left", "left")


STRANGER = {"AutoConfig": "mallory/evil--code.Config", "AutoModelForCausalLM": "mallory/evil--code.Model"}


def of_a_stranger(folder: Path, model: PreTrainedModel, tokenizers: Any) -> Path:
    """A model folder whose files name code in another repository."""
    save_tiny(model, folder)
    for name, extra in (
        ("config.json", {"auto_map": STRANGER, "custom_pipelines": {"text-generation": {"impl": "mallory/evil--p.P"}}}),
        ("tokenizer_config.json", {"auto_map": tokenizers}),
    ):
        (folder / name).write_text(json.dumps(written(folder, name) | extra))
    return folder


@pytest.mark.parametrize(
    "tokenizers",
    [["mallory/evil--t.Slow", None], {"AutoTokenizer": [None, "local_code.Fast"], "AutoProcessor": "mallory/p--p.P"}],
    ids=["list", "map"],
)
@pytest.mark.parametrize("name", TINY_MODELS)
def test_no_code_of_a_stranger_is_named(name: str, tokenizers: Any, tmp_path: Path) -> None:
    source = of_a_stranger(tmp_path / "source", TINY_MODELS[name](num_hidden_layers=4), tokenizers)
    loaded = load_model(source)
    save_model(loaded.model, tmp_path / "even", tokenizer=loaded.tokenizer)
    save_model(mixed(loaded.model), tmp_path / "uneven", tokenizer=loaded.tokenizer)
    again = load_model(tmp_path / "uneven")
    save_model(again.model, tmp_path / "again", tokenizer=again.tokenizer)
    classes = f"modeling_pruned_{name}.{type(again.model).__name__.removesuffix('ForCausalLM')}"
    ours = {"AutoConfig": f"{classes}Config", "AutoModelForCausalLM": f"{classes}ForCausalLM"}
    for folder, listed in (("even", None), ("uneven", ours), ("again", ours)):
        assert written(tmp_path / folder).get("auto_map") == listed
        assert "auto_map" not in written(tmp_path / folder, "tokenizer_config.json")
        for file in (tmp_path / folder).glob("*.json"):
            assert "mallory" not in file.read_text() and "local_code" not in file.read_text()


def test_a_list_that_names_our_file_and_that_of_a_stranger(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("")
    for listed in (["own.Slow", "mallory/evil--t.Fast"], ["mallory/evil--t.Slow", "own.Fast"], ["own.Slow", None]):
        maps = {"AutoTokenizer": listed, "AutoProcessor": "own.Processor"}
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"auto_map": maps}))
        make_portable(tmp_path, None)
        kept = maps if None in listed else {"AutoProcessor": "own.Processor"}
        assert written(tmp_path, "tokenizer_config.json")["auto_map"] == kept


@pytest.mark.parametrize("where", ["modeling_pruned_llama.x/repo--file.Class", "../modeling_pruned_llama.Class", "", 3])
def test_a_stranger_who_names_our_file(where: Any, tmp_path: Path) -> None:
    model = mixed(tiny_llama(num_hidden_layers=4))
    model.config.auto_map = {"AutoModel": where}
    save_model(model, tmp_path / "out")
    assert set(written(tmp_path / "out")["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}


@pytest.mark.parametrize("listed", ["mallory/evil--code.Model", ["mallory/evil--code.Model"]], ids=["text", "list"])
def test_an_auto_map_that_is_no_map(listed: Any, tmp_path: Path) -> None:
    model = tiny_llama(num_hidden_layers=4)
    model.config.auto_map = listed
    save_model(mixed(model), tmp_path / "out")
    assert set(written(tmp_path / "out")["auto_map"]) == {"AutoConfig", "AutoModelForCausalLM"}


class OwnTokenizer(PreTrainedTokenizerFast):
    """A class whose file transformers copies into the folder."""


def test_code_that_lies_in_the_folder_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OwnTokenizer, "_auto_class", "AutoTokenizer")
    tokenizer = OwnTokenizer(tokenizer_object=tiny_tokenizer().backend_tokenizer, eos_token="</s>")
    save_model(tiny_llama(), tmp_path / "out", tokenizer=tokenizer)
    assert (tmp_path / "out" / "test_portable.py").is_file()
    listed = written(tmp_path / "out", "tokenizer_config.json")["auto_map"]
    assert listed == {"AutoTokenizer": ["test_portable.OwnTokenizer", None]}
    assert AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=False)("a").input_ids


def test_the_tokenizer_of_an_uneven_folder_is_read_without_a_question(tmp_path: Path) -> None:
    """By the line of the card, in a process without optprune whose terminal would answer yes."""
    save_model(mixed(tiny_llama(num_hidden_layers=4)), tmp_path / "out", tokenizer=tiny_tokenizer())
    (tmp_path / "out" / "modeling_pruned_llama.py").write_text("raise SystemExit('the code of the folder was run')")
    program = (
        "import sys; sys.modules['optprune'] = None; from transformers import PreTrainedTokenizerFast;"
        "print(PreTrainedTokenizerFast.from_pretrained(sys.argv[1])('The minister').input_ids)"
    )
    words = [sys.executable, "-c", program, str(tmp_path / "out")]
    run = subprocess.run(words, input="y\n", capture_output=True, text=True, check=True)
    assert "custom code" not in run.stdout and json.loads(run.stdout) == tiny_tokenizer()("The minister").input_ids
