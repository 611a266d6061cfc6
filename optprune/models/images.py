"""Images among the tokens of a language part: their features stand for tokens behind the vocabulary."""

from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_vision_available

from optprune.errors import InputError
from optprune.models.sources import NO_CODE, reading
from optprune.models.vision import QUANTISED, SHAPES, TEXT, Masks, VisionFolder, language_name
from optprune.numerics.precision import full_precision

LANGUAGE = "model.language_model"
"""the module of the language part in the vision-language models of transformers"""
BLOCKS = "model.layers."
"""the beginning of the names of the blocks' tensors in the text model"""


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of images, which take the place of embeddings: row i is that of the token id `vocabulary` + i."""

    rows: Tensor
    """the features [n, hidden] of all images of some records, in their order"""
    vocabulary: int
    """the number of embeddings of the model"""
    masks: Masks | None = None
    """the masks of attention, where those of images are not those of text"""

    def inputs(self, model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
        """Return the arguments of a language part for token ids [batch, length], some of which are of images."""
        here = ids >= self.vocabulary
        embeddings: Tensor = model.get_input_embeddings()(ids.masked_fill(here, 0))
        rows = self.rows[(ids[here] - self.vocabulary).to(self.rows.device)]
        mixed = embeddings.masked_scatter(here[..., None], rows.to(embeddings))
        masks = {} if self.masks is None or not bool(here.any()) else self.masks(model.config, mixed, here)
        return {"inputs_embeds": mixed, **({"attention_mask": masks} if masks else {})}

    def form(self, ids: Tensor) -> Hashable:
        """Return all of a batch that decides its masks and positions."""
        return ids.shape, () if self.masks is None else tuple((ids >= self.vocabulary).flatten().tolist())


def load_processor(whole: VisionFolder) -> ProcessorMixin:
    """Return the processor of a vision-language model; InputError where its images cannot be read."""
    family = whole.family
    if family.images:
        raise InputError(f"images of {family.model_type} records are not read, because {family.images}: give a text")
    if not is_vision_available():
        raise InputError("images are read by Pillow, which is not installed: pip install 'optprune[images]'")
    with reading("processor", whole.source, whole.where, {}):
        processor = AutoProcessor.from_pretrained(whole.where, **NO_CODE)
    if not isinstance(processor, ProcessorMixin) or getattr(processor, "image_processor", None) is None:
        raise InputError(f"{whole.source} has no processor that reads images: save one in its folder, or give a text")
    return processor


@full_precision()
@torch.no_grad()
def image_features(
    whole: VisionFolder, inputs: Iterable[Mapping[str, Any]], *, dtype: torch.dtype, device: torch.device
) -> tuple[list[Tensor], ImageFeatures]:
    """Return the token ids [1, length] of records, and the features of their images, which some ids are numbers of.

    `inputs` are the outputs of the model's processor for one record each. The stock class embeds them, with the vision
    part computed in a dtype on a device. Of each record only the features are kept.
    """
    vision, vocabulary = _without_blocks(whole, dtype).to(device), int(whole.config.vocab_size)  # type: ignore[arg-type]
    token, every, features, count = vision.config.image_token_id, list[Tensor](), list[Tensor](), 0
    for each in inputs:
        ids: Tensor = each["input_ids"].clone()
        here = ids == token
        if bool(here.any()):
            features.append(_embedded(vision, each)[here.to(device)].cpu())
            ids[here] = torch.arange(vocabulary + count, vocabulary + count + len(features[-1]))
            count += len(features[-1])
        every.append(ids)
    empty = torch.zeros(0, whole.config.hidden_size, dtype=dtype)
    return every, ImageFeatures(torch.cat([empty, *features]), vocabulary, whole.family.masks)


class _Reached(Exception):  # control flow, not an error
    """Signal that ends a forward pass at the language part."""


def _embedded(vision: PreTrainedModel, inputs: Mapping[str, Any]) -> Tensor:
    """Return the embeddings [1, length, hidden] that a vision-language model gives its language part."""
    found = list[Tensor]()

    def catch(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.append(kwargs["inputs_embeds"])
        raise _Reached

    handle = vision.get_submodule(LANGUAGE).register_forward_pre_hook(catch, with_kwargs=True)
    try:
        with suppress(_Reached):
            vision(**{name: value.to(vision.device) for name, value in inputs.items()}, use_cache=False)
    finally:
        handle.remove()
    return found[0]


def _without_blocks(whole: VisionFolder, dtype: torch.dtype) -> PreTrainedModel:
    """Return a vision-language model without the blocks of its language part."""
    with reading("weights", whole.source, whole.where, {}):
        config: Any = AutoConfig.from_pretrained(whole.where, **NO_CODE)
        text = getattr(config, TEXT)
        vars(config).pop(QUANTISED, None)  # what is read are floats
        text.num_hidden_layers, text.layer_types = 0, []
        if getattr(text, SHAPES, None) is not None:
            setattr(text, SHAPES, [])
        with torch.device("meta"):
            cls: Any = type(AutoModelForImageTextToText.from_config(config, **NO_CODE))
        found = whole.checkpoint().tensors.items()
        state = {name: tensor.read() for name, tensor in found if not language_name(name).startswith(BLOCKS)}
        model, report = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
    if absent:
        raise InputError(f"the weights of {whole.source} are incomplete: {absent[0]} is missing; fetch them again")
    return model.eval()
