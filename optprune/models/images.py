"""Images among the tokens of a language part: their features stand for tokens behind the vocabulary."""

from bisect import bisect_right
from collections.abc import Hashable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel, ProcessorMixin
from transformers.utils.import_utils import is_vision_available

from optprune.errors import InputError, is_out_of_memory
from optprune.models.sources import NO_CODE, cause, reading
from optprune.models.vision import QUANTISED, SHAPES, TEXT, Further, VisionFolder, language_name
from optprune.numerics.precision import full_precision
from optprune.system.wording import install

ADDED = "optprune_added"
"""the entry of a block's arguments with features that are added to its outputs"""
LANGUAGE = "model.language_model"
"""the module of the language part in the vision-language models of transformers"""
ENDS = ("", "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")
"""the tensors of a text model without blocks, by their names there, and those of other parts"""
EMPTY = {"num_hidden_layers": 0, "layer_types": [], "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0}
"""the fields of the config of a language part without blocks"""


@dataclass(frozen=True, eq=False)
class ImageFeatures:
    """Features of images, which take the place of embeddings: row i is that of the token id `vocabulary` + i."""

    rows: Tensor
    """the features [n, hidden] of all images of some records, in their order"""
    vocabulary: int
    """the number of embeddings of the model"""
    further: Further | None = None
    """further arguments of the language part, where images change more than the embeddings"""
    deep: "DeepFeatures | None" = None
    """what the blocks get beside, where images have positions in three dimensions"""

    @property
    def content(self) -> tuple[Tensor, ...]:
        """All tensors that images decide."""
        return (self.rows,) if self.deep is None else (self.rows, *self.deep.added, *self.deep.positions)

    def inputs(self, model: PreTrainedModel, ids: Tensor) -> dict[str, Any]:
        """Return the arguments of a language part for token ids [batch, length], some of which are of images."""
        here = ids >= self.vocabulary
        text = ids.masked_fill(here, 0)
        embeddings: Tensor = model.get_input_embeddings()(text)
        rows = self.rows[(ids[here] - self.vocabulary).to(self.rows.device)]
        mixed = embeddings.masked_scatter(here[..., None], rows.to(embeddings))
        further = {} if self.further is None else self.further(model, text, mixed, here)
        return {"inputs_embeds": mixed, **further}

    def form(self, ids: Tensor) -> Hashable:
        """Return all of a batch that decides its masks and positions, and what is added to it."""
        if self.deep is not None:
            return ids.shape, tuple(ids.flatten().tolist())
        return ids.shape, () if self.further is None else tuple((ids >= self.vocabulary).flatten().tolist())

    def arguments(self, ids: Tensor, hidden: Tensor, blocks: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the arguments of each block for token ids [batch, length], by those for ids of text."""
        here = ids >= self.vocabulary
        if self.deep is None or not bool(here.any()):
            return blocks
        return self.deep.arguments(ids - self.vocabulary, here, hidden, blocks)


@dataclass(frozen=True, eq=False)
class DeepFeatures:
    """Positions of tokens in three dimensions, and features that are added to the outputs of the first blocks."""

    rotary: nn.Module
    """the module that makes the angles of attention of positions"""
    positions: tuple[Tensor, ...]
    """the positions [3, length] of the tokens of each record with images"""
    firsts: tuple[int, ...]
    """the number of the first feature of each such record"""
    added: tuple[Tensor, ...]
    """for each of the first blocks features [n, hidden], in the order of the rows"""

    def arguments(
        self, numbers: Tensor, here: Tensor, hidden: Tensor, blocks: list[dict[str, Any]]
    ) -> list[dict[str, Any]]:
        """Return the arguments of each block, where `numbers` are those of features `here`."""
        positions = [self._of_sequence(*pair) for pair in zip(numbers, here, strict=True)]
        angles = self.rotary.to(hidden.device)(hidden, torch.stack(positions, 1).to(hidden.device))
        wanted = numbers[here].cpu()
        added = [{ADDED: (here, features[wanted].to(hidden))} for features in self.added]
        added += [{} for _ in blocks[len(added) :]]
        pairs = zip(blocks, added, strict=False)
        return [{**arguments, "position_embeddings": angles, **more} for arguments, more in pairs]

    def _of_sequence(self, numbers: Tensor, here: Tensor) -> Tensor:
        """Return the positions [3, length] of a sequence, which is a whole record where it has images."""
        if not bool(here.any()):
            return torch.arange(len(numbers)).expand(3, -1)
        return self.positions[bisect_right(self.firsts, int(numbers[here][0])) - 1]


def with_added(output: Tensor, added: tuple[Tensor, Tensor]) -> Tensor:
    """Return the output of a block with features added where the first tensor is True."""
    here, features = added
    return output.index_put((here,), features.to(output), accumulate=True)


def load_processor(whole: VisionFolder) -> ProcessorMixin:
    """Return the processor of a vision-language model; InputError where its images cannot be read."""
    if not is_vision_available():
        raise InputError(f"images are read by Pillow, which is not installed: {install('images')}")
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
    token, every, features, count = vision.config.image_token_id, list[Tensor](), list[tuple[Tensor, ...]](), 0
    firsts, positions = list[int](), list[Tensor]()
    for each in inputs:
        ids: Tensor = each["input_ids"].clone()
        here = ids == token
        if bool(here.any()):
            given = _given_to_language(whole, vision, each)
            found = given["inputs_embeds"][here.to(device)].cpu()
            if whole.family.deep:
                positions.append(given["position_ids"][-3:, 0].cpu())
                features.append((found, *(part.cpu() for part in given["deepstack_visual_embeds"])))
            else:
                features.append((found,))
            firsts.append(count)
            ids[here] = torch.arange(vocabulary + count, vocabulary + count + len(found))
            count += len(found)
        every.append(ids)
    empty = torch.zeros(0, whole.config.hidden_size, dtype=dtype)
    rows, *added = map(torch.cat, zip(*features, strict=True)) if features else [empty]
    deep = None
    if whole.family.deep:
        rotary = vision.get_submodule(LANGUAGE).get_submodule("rotary_emb").cpu()
        deep = DeepFeatures(rotary, tuple(positions), tuple(firsts), tuple(added))
    return every, ImageFeatures(rows, vocabulary, whole.family.further, deep)


class _Reached(Exception):  # control flow, not an error
    """Signal that ends a forward pass at the language part."""


def _given_to_language(whole: VisionFolder, vision: PreTrainedModel, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments that a vision-language model gives its language part; InputError where it cannot."""
    found = dict[str, Any]()

    def catch(_: nn.Module, __: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        found.update(kwargs)
        raise _Reached

    handle = vision.get_submodule(LANGUAGE).register_forward_pre_hook(catch, with_kwargs=True)
    given = {name: value.to(vision.device) for name, value in inputs.items()}
    given = {name: value.to(vision.dtype) if value.is_floating_point() else value for name, value in given.items()}
    try:
        with suppress(_Reached):
            vision(**given, use_cache=False)
    except Exception as error:  # of the stock class, for inputs that it does not expect
        if is_out_of_memory(error):
            raise
        raise InputError(
            f"the model {whole.source} cannot read the images that its processor makes ({cause(error)}): their configs "
            "do not fit together, so fetch them again"
        ) from error
    finally:
        handle.remove()
    return found


def _without_blocks(whole: VisionFolder, dtype: torch.dtype) -> PreTrainedModel:
    """Return a vision-language model without the blocks of its language part."""
    with reading("weights", whole.source, whole.where, {}):
        config: Any = AutoConfig.from_pretrained(whole.where, **NO_CODE)
        text = getattr(config, TEXT)
        vars(config).pop(QUANTISED, None)  # what is read are floats
        for name, value in EMPTY.items():
            if getattr(text, name, None) is not None:
                setattr(text, name, value)
        if getattr(text, SHAPES, None) is not None:
            setattr(text, SHAPES, [])
        with torch.device("meta"):
            cls: Any = type(AutoModelForImageTextToText.from_config(config, **NO_CODE))
        found = whole.checkpoint().tensors.items()
        state = {name: tensor.read() for name, tensor in found if language_name(name) in ENDS}
        model, report = cls.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, output_loading_info=True
        )
    absent = sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])})
    if absent:
        raise InputError(f"the weights of {whole.source} are incomplete: {absent[0]} is missing; fetch them again")
    return model.eval()
