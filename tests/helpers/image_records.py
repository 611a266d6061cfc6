"""Folders of tiny vision-language models with a real processor, and records with images for them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import (
    AutoModelForImageTextToText,
    CLIPImageProcessorPil,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from benchmarks.tiny_models import VOCABULARY, randomise
from optprune.texts import demo_articles
from tests.helpers.tiny_models import tiny_tokenizer
from tests.helpers.tiny_vision import CONFIGS, PATCH, SIDE

TOKENS = {
    "llava": {"image_token": "<image>"},
    "gemma3": {"image_token": "<image_soft_token>", "boi_token": "<image>", "eoi_token": "</image>"},
}
"""the special tokens of an image, behind the vocabulary of the tiny tokenizer; a text says <image>"""
TEMPLATE = (
    "{% for message in messages %}{{ message.role }}: {% if message.content is string %}{{ message.content }}"
    "{% else %}{% for part in message.content %}{{ '<image>' if part.type == 'image' else part.text }}{% endfor %}"
    "{% endif %}\n{% endfor %}"
)
FAMILIES = tuple(TOKENS)


def _tokenizer(family: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tiny_tokenizer().backend_tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="</s>",
        extra_special_tokens=TOKENS[family],
    )


def save_with_processor(family: str, folder: Path, **text: Any) -> Path:
    """Write a model folder with the processor of its family; returns the folder."""
    tokenizer, config = _tokenizer(family), CONFIGS[family](vocab_size=VOCABULARY + 8, **text)
    numbers: Any = tokenizer.convert_tokens_to_ids(list(TOKENS[family].values()))
    config.image_token_id = numbers[0]
    if family == "gemma3":
        config.boi_token_index, config.eoi_token_index = numbers[1:]
    size = {"height": SIDE, "width": SIDE}
    if family == "llava":
        pixels = CLIPImageProcessorPil(size={"shortest_edge": SIDE}, crop_size=size)
        kind = {"patch_size": PATCH, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
        processor: Any = LlavaProcessor(pixels, tokenizer, chat_template=TEMPLATE, **kind)
    else:
        processor = Gemma3Processor(Gemma3ImageProcessorPil(size=size), tokenizer, TEMPLATE, image_seq_length=4)
    randomise(AutoModelForImageTextToText.from_config(config), 0).save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def write_records(folder: Path, count: int = 8, **changed: Any) -> Path:
    """Write records of different lengths with an image each, the last one a conversation; returns the .jsonl file.

    `changed` replaces fields of the second record, or removes those that are None.
    """
    folder.mkdir(exist_ok=True)
    generator, lines = np.random.default_rng(0), list[dict[str, Any]]()
    for number, text in enumerate(demo_articles("calibration")[:count]):
        pixels = generator.integers(0, 256, (20 + number, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        lines.append({"text": f"{text[:40]} <image> {text[40 : 120 + 9 * number]}", "images": [f"{number}.png"]})
    content = [{"type": "text", "text": lines[-1]["text"].replace("<image>", "")}, {"type": "image"}]
    talk = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat."}]
    lines[-1] = {"messages": talk, "images": lines[-1]["images"]}
    second = {name: value for name, value in (lines[1] | changed).items() if value is not None}
    lines[1] = second
    (file := folder / "records.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    return file


def inputs_of_stock(model: PreTrainedModel, records: list[Mapping[str, Any]], path: str) -> list[Tensor]:
    """The inputs of a layer of the language part, by record, as hooks find them in the stock model's own forward."""
    caught: list[Tensor] = []
    layer = model.model.language_model.get_submodule(path)
    handle = layer.register_forward_pre_hook(lambda _, args: caught.append(args[0][0].double()))
    with torch.no_grad():
        for record in records:
            model(**record, use_cache=False)
    handle.remove()
    return caught
