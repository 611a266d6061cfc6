"""Vision-language folders: the language part in them, read as a text model, and what stays as it is around it.

The text model is one of a family that optprune knows, under the names of its own checkpoints. Everything else in the
folder (vision tower, projector, processor) is copied, byte for byte.
"""

import inspect
import math
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers.dynamic_module_utils import get_relative_import_files

from optprune.errors import InputError
from optprune.models.architecture import PART_FIELD, Classes, pruned_module, pruned_type, register
from optprune.models.checkpoint import ENDING, Checkpoint, is_plain, own_or_cached, stated
from optprune.models.families import ARCHITECTURES
from optprune.models.quantised import Quantisation
from optprune.models.sources import NO_CODE
from optprune.system.files import read_json

TEXT = "text_config"
"""the field of the config, and of config.json, that describes the language part"""
PREFIXES = (
    ("model.language_model.", "model."),
    ("language_model.model.", "model."),
    ("language_model.lm_head.", "lm_head."),
    ("lm_head.", "lm_head."),
)
"""the beginnings of tensor names of the language part in files, as transformers has written them at one time or
another, each with that in the text model's own checkpoints"""
MODULES = (("lm_head.", "lm_head."), ("model.", "model.language_model."))
"""the beginnings of names in the text model, each with that in the vision-language model of transformers"""
DEEP = (8, 16, 24)
"""the layers of Qwen3-VL's vision tower whose features are added to blocks, by default"""
PLACEHOLDERS = ("image_token_id", "video_token_id", "audio_token_id")
"""the config fields that hold a token in whose place an image, a film or a sound is put"""


SHAPES = "optprune_shapes"
"""the field of the config that lists the shapes of blocks that differ"""
AUTO = "AutoModelForImageTextToText"
"""the class of transformers that loads vision-language models"""
PRUNED = "Pruned"
"""the beginning of the names of our classes"""
QUANTISED = "quantization_config"
"""the field of config.json that says how numbers stand for weights"""
OF_CODE = ("auto_map", "custom_pipelines")
"""the fields of config.json that name code"""
OF_SAVING = ("_name_or_path", "transformers_version", "architectures", "dtype", "model_type", "auto_map", SHAPES)
"""the fields of a config that say how it was loaded and saved, not what the model is"""


Further = Callable[[PreTrainedModel, Tensor, Tensor, Tensor], dict[str, Any]]
"""a function from a language part, token ids [batch, length] with 0 for those of images, embeddings [batch, length,
hidden] and whether a token is of an image to further arguments of the language part"""


def _of_gemma3(model: PreTrainedModel, ids: Tensor, embeddings: Tensor, images: Tensor) -> dict[str, Any]:
    """Return the masks of Gemma 3 by the kind of block: the tokens of an image see each other."""
    return _seen_together("gemma3", model, embeddings, images) if bool(images.any()) else {}


def _of_gemma4(model: PreTrainedModel, ids: Tensor, embeddings: Tensor, images: Tensor) -> dict[str, Any]:
    """Return the numbers of each token for every block, those of padding for an image, and masks as Gemma 3 has."""
    config, found = model.config, dict[str, Any]()
    if config.hidden_size_per_layer_input:
        inner: Any = model.model
        found["per_layer_inputs"] = inner.get_per_layer_inputs(ids.masked_fill(images, config.pad_token_id), embeddings)
    if config.use_bidirectional_attention == "vision" and bool(images.any()):
        found |= _seen_together("gemma4", model, embeddings, images)
    return found


def _seen_together(family: str, model: PreTrainedModel, embeddings: Tensor, images: Tensor) -> dict[str, Any]:
    """Return the masks by which the tokens of an image see each other, as the stock class has them."""
    stock: Any = import_module(f"transformers.models.{family}.modeling_{family}")
    spans = stock.get_block_sequence_ids_for_mask(images.long(), device=embeddings.device)
    given = {"config": model.config, "inputs_embeds": embeddings, "block_sequence_ids": spans}
    none = dict.fromkeys(("attention_mask", "cache", "position_ids"))
    return {"attention_mask": stock.create_masks_for_vision_model(**given, **none)}


@dataclass(frozen=True, kw_only=True)
class VisionFamily:
    """One family of vision-language models, as data."""

    model_type: str
    """config.model_type"""
    text: str = ""
    """the only model_type of its language part; empty where that may be any family of Llama's layout"""
    read_as: str = ""
    """the family that computes the same on text, where the language part has a class of its own"""
    dropped: tuple[str, ...] = ()
    """the entries of the rotary embeddings that make no difference on text, and that the other family does not know"""
    names: tuple[str, str]
    """the names of the classes of configs and of models whose language part has blocks that differ in shape"""
    uneven: tuple[str, ...]
    """the families of the language part that these classes take"""
    scales: bool = False
    """whether it scales its logits as its language part does alone"""
    ordered: str = ""
    """why blocks cannot be removed whole, where the number of a block says what it gets"""
    further: Further | None = None
    """further arguments of the language part, where images change more than the embeddings"""
    deep: bool = False
    """whether tokens have positions in three dimensions, and features of images are added to outputs of blocks"""

    @property
    def classes(self) -> Classes:
        """The classes of models whose language part has blocks that differ in shape."""
        return Classes(pruned_module(self.model_type), *self.names)


VISION_FAMILIES = {
    family.model_type: family
    for family in (
        VisionFamily(
            model_type="gemma3",
            text="gemma3_text",
            names=("PrunedGemma3VisionConfig", "PrunedGemma3ForConditionalGeneration"),
            uneven=("gemma3_text",),
            further=_of_gemma3,
        ),
        # Among tokens of text its language part sees no later ones.
        VisionFamily(
            model_type="gemma4",
            text="gemma4_text",
            names=("PrunedGemma4VisionConfig", "PrunedGemma4ForConditionalGeneration"),
            uneven=("gemma4_text",),
            scales=True,
            further=_of_gemma4,
        ),
        VisionFamily(
            model_type="llava",
            names=("PrunedLlavaConfig", "PrunedLlavaForConditionalGeneration"),
            uneven=("llama", "mistral", "qwen2"),
        ),
        VisionFamily(
            model_type="mistral3",
            names=("PrunedMistral3Config", "PrunedMistral3ForConditionalGeneration"),
            uneven=("mistral", "ministral3"),
        ),
        # Tokens of text have the same position in all three dimensions, so the sections of the angles are as in Qwen3.
        VisionFamily(
            model_type="qwen3_vl",
            text="qwen3_vl_text",
            read_as="qwen3",
            dropped=("mrope_section", "mrope_interleaved"),
            names=("PrunedQwen3VLConfig", "PrunedQwen3VLForConditionalGeneration"),
            uneven=("qwen3",),
            ordered="the first blocks are those that features of the image are added to",
            deep=True,
        ),
    )
}
"""every family of vision-language models, by the model_type of its config"""


@dataclass(frozen=True, eq=False)
class VisionFolder:
    """A vision-language model, of whose files only the language part is read as a model."""

    source: str
    """the source as the user named it"""
    where: str
    """the folder or the hub name"""
    fields: Mapping[str, Any]
    """the contents of config.json"""
    config: PretrainedConfig = field(repr=False)
    """the config of the language part, as it was read"""

    @classmethod
    def of(cls, source: str, where: str, fields: Any = None) -> "VisionFolder | None":
        """Return the vision-language model in a folder or of a hub name; None for a model of text alone.

        `fields` are the contents of its config.json, where they were read already.
        """
        fields = PretrainedConfig.get_config_dict(where)[0] if fields is None else fields
        family = _family(fields.get("model_type")) if isinstance(fields, dict) else None
        if family is None:
            return None
        register(family.classes, AutoModelForImageTextToText)
        stored = read_json(Path(str(own_or_cached(where, "config.json"))).read_text(encoding="utf-8"), "config.json")
        return cls(source, where, stored, _text_config(AutoConfig.from_pretrained(where, **NO_CODE), source))

    @property
    def family(self) -> VisionFamily:
        """The family of the whole model."""
        return _known(self.fields["model_type"])

    def refused(self, why: str) -> InputError:
        """Return the error for a use that is for models of text alone."""
        return InputError(
            f"{self.source or 'the model'} is a {self.family.model_type} model, and {why}: save the language part "
            "alone, load_model(FOLDER).model.save_pretrained(TEXT_FOLDER)"
        )

    def config_with(self, pruned: PretrainedConfig) -> dict[str, Any]:
        """Return the contents of config.json with the language part of another shape; the rest is as it was."""
        before, after = _plain(self.config), _plain(pruned)
        changed = {name: value for name, value in after.items() if before.get(name) != value}
        for name in OF_SAVING:
            changed.pop(name, None)
        fields = {name: value for name, value in self.fields.items() if name not in (*OF_CODE, QUANTISED)}
        text = {name: value for name, value in fields.get(TEXT, {}).items() if name != SHAPES}
        family, uneven = self.family, after.get(SHAPES) is not None
        classes = [family.classes.model_name.removeprefix(PRUNED)]
        fields |= {"model_type": family.model_type}
        if uneven:
            module, classes = pruned_module(family.model_type).rpartition(".")[2], [family.classes.model_name]
            auto = {"AutoConfig": family.classes.config_name, AUTO: family.classes.model_name}
            fields |= {"model_type": pruned_type(family.model_type), "architectures": classes}
            fields |= {"auto_map": {name: f"{module}.{cls}" for name, cls in auto.items()}}
            text[SHAPES] = after[SHAPES]
        elif before.get(SHAPES) is not None:
            fields["architectures"] = classes
        return {**fields, TEXT: text | changed} if changed or uneven or before.get(SHAPES) else fields

    def code(self, pruned: PretrainedConfig) -> list[Path]:
        """Return the modelling files that a folder with the language part of this config needs."""
        if getattr(pruned, SHAPES, None) is None:
            return []
        own = Path(str(inspect.getsourcefile(self.family.classes.model)))
        return [own, *map(Path, get_relative_import_files(own))]

    @property
    def quantisation(self) -> Quantisation | None:
        """The method by which the language part is quantised, if it is."""
        stored = stated(self.fields.get(QUANTISED), self.where)
        return None if stored is None else Quantisation.of(stored)

    def checkpoint(self) -> Checkpoint:
        """Return all tensors, those of the language part as floats, by their names in the files.

        InputError where other parts are quantised: their numbers stay, and no config would say what they stand for.
        """
        method = self.quantisation
        readable = is_plain if method is None else method.readable
        found = Checkpoint.open(
            self.where, self.source, lambda name, dtype: not is_language(name) or readable(name, dtype)
        )
        if method is None:
            return found
        own = {name: tensor for name, tensor in found.tensors.items() if is_language(name)}
        around = {name: tensor for name, tensor in found.tensors.items() if name not in own}
        for name in method.layers(around, self.source).keys() ^ around.keys():
            raise InputError(
                f"{name} of {self.source} is in {method.name} and not of the language part, and other parts are read "
                "in plain weights only: load the unquantised original"
            )
        return replace(found, tensors=around | method.layers(own, self.source))

    def features(self) -> int:
        """Return how many vectors of features a token of an image has, with those that are added later."""
        vision = self.fields.get("vision_config") or {}
        return 1 + (len(vision.get("deepstack_visual_indexes", DEEP)) if self.family.deep else 0)

    def bytes_around(self) -> int:
        """Return the size of the tensors beside the language part; 0 where the weights are not in a folder here."""
        if not any(Path(self.where).glob(f"*{ENDING}")):
            return 0
        around = (tensor for name, tensor in self.checkpoint().tensors.items() if not is_language(name))
        return sum(math.prod(tensor.shape) * tensor.dtype.itemsize for tensor in around)

    def language_checkpoint(self) -> Checkpoint:
        """Return the tensors of the language part, by their names in the text model."""
        named = ((language_name(name), tensor) for name, tensor in self.checkpoint().tensors.items())
        return Checkpoint(self.source, {name: tensor for name, tensor in named if name})

    def stored_names(self, stored: Iterable[str], names: Iterable[str]) -> dict[str, str]:
        """Return the names in the files for tensors of the text model, which may be fewer than were stored."""
        known = {language_name(name): name for name in stored}
        begins = next(there for there, here in PREFIXES if here == "model." and _any_begins(stored, there))
        return {name: known.get(name) or name.replace("model.", begins, 1) for name in names}

    def without_images(self, ids: Tensor) -> Tensor:
        """Return token ids with another token in the place of those that stand for an image."""
        standing = [self.fields.get(name, self.fields.get(name.replace("_id", "_index"))) for name in PLACEHOLDERS]
        known = torch.tensor([token for token in standing if isinstance(token, int)], dtype=ids.dtype)
        return ids.masked_fill(torch.isin(ids, known.to(ids.device)), 0)


def is_language(name: str) -> bool:
    """Return whether a tensor of a vision-language model is of its language part, by its name in a file."""
    return name.startswith(tuple(there for there, _ in PREFIXES))


def language_name(name: str) -> str:
    """Return the name in the text model of a tensor of a vision-language model; empty for one of another part."""
    for there, here in PREFIXES:
        if name.startswith(there):
            return here + name.removeprefix(there)
    return ""


def module_name(name: str) -> str:
    """Return the name in the vision-language model of a module of the text model."""
    for here, there in MODULES:
        if f"{name}.".startswith(here):
            return (there + f"{name}.".removeprefix(here)).removesuffix(".")
    return name


def _family(model_type: object) -> VisionFamily | None:
    """Return the family of a model_type in config.json, pruned or not; None for other models."""
    every = VISION_FAMILIES.values()
    return next((one for one in every if model_type in (one.model_type, pruned_type(one.model_type))), None)


def _known(model_type: str) -> VisionFamily:
    found = _family(model_type)
    assert found is not None
    return found


def stand_alone(config: PretrainedConfig) -> None:
    """Make the config of a language part that of a text model of its own, in place."""
    vars(config).pop(PART_FIELD, None)


def _any_begins(names: Iterable[str], start: str) -> bool:
    return any(name.startswith(start) for name in names)


def _plain(config: PretrainedConfig) -> dict[str, Any]:
    fields = config.to_dict()
    fields.pop(PART_FIELD, None)
    return fields


def _text_config(whole: PretrainedConfig, source: str) -> PretrainedConfig:
    """Return the config of the language part, as one of a family of text models; InputError where there is none."""
    family, config = _known(whole.model_type), deepcopy(getattr(whole, TEXT))
    kind = config.model_type
    known = ARCHITECTURES.get(family.read_as or kind)
    layout = known is not None and known.blocks == "model.layers" and known.mixture is None
    if known is None or not layout or kind != (family.text or kind):
        raise InputError(
            f"the language part of {source} is a {kind} model, which is not pruned in a {family.model_type} folder: "
            f"optprune takes {family.text or 'dense families with the layout of Llama'}"
        )
    shapes = getattr(config, SHAPES, None)
    if family.read_as or shapes is not None:
        fields = config.to_dict()
        rotary = fields.get("rope_parameters") or {}
        fields["rope_parameters"] = {name: value for name, value in rotary.items() if name not in family.dropped}
        assert known.pruned is not None
        register(known.pruned, AutoModelForCausalLM)
        kind_read = known.model_type if shapes is None else pruned_type(known.model_type)
        config = AutoConfig.for_model(**{**fields, "model_type": kind_read})
    scales = () if family.scales else (known.logits_divisor, known.logits_factor, known.logits_cap)
    for name in filter(None, scales):
        if getattr(config, name, None) not in (None, 1, 1.0):
            raise InputError(
                f"the {TEXT} of {source} has {name}, which a {kind} model scales its logits by and a "
                f"{family.model_type} model does not: give a text model"
            )
    config.tie_word_embeddings = whole.tie_word_embeddings
    config.dtype = whole.dtype or config.dtype
    setattr(config, PART_FIELD, family.model_type)
    return config
