"""GGUF files of tiny models, as llama.cpp's converter writes them."""

import json
from pathlib import Path

import gguf
import numpy as np
from gguf import GGMLQuantizationType as Kind
from transformers import PreTrainedModel

from tests.helpers.tiny_models import tiny_tokenizer


def write_gguf(model: PreTrainedModel, file: Path, kind: Kind = Kind.F32) -> Path:
    """Write a model, with the tiny tokenizer; its matrices are of a kind. Returns the file."""
    config = model.config
    kinds = {name: arch for arch, name in gguf.MODEL_ARCH_NAMES.items()}
    family = config.model_type.removesuffix("_text")
    names = gguf.get_tensor_name_map(kinds[family], config.num_hidden_layers)
    writer = gguf.GGUFWriter(file, family)
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_key_length(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters.get("full_attention", config.rope_parameters)["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    _add_tokenizer(writer)
    for name, weight in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = weight.float().numpy()
        if family.startswith("gemma") and name.endswith("norm.weight"):
            values = values + 1  # where transformers adds it as it runs
        for part, heads in (("q_proj", config.num_attention_heads), ("k_proj", config.num_key_value_heads)):
            if part in name and config.model_type == "llama":
                # llama.cpp rotates neighbours, transformers the two halves of a head.
                halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        place, used = names.get_name(name, (".weight", ".bias")), kind if values.ndim == 2 else Kind.F32
        assert place is not None
        values = np.ascontiguousarray(values)
        writer.add_tensor(place, values if used is Kind.F32 else gguf.quantize(values, used), raw_dtype=used)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = tiny_tokenizer()
    words = tokenizer.get_vocab()
    data = json.loads(tokenizer.backend_tokenizer.to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(sorted(words, key=lambda word: words[word]))
    writer.add_token_types([gguf.TokenType.NORMAL] * len(words))
    writer.add_token_merges([" ".join(pair) for pair in data["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
