"""Stored models: their tensors, their agreement with the config, the original model, and code that loads them."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from optprune.models import (
    BlockShape,
    Decoder,
    Draft,
    gguf_tensors,
    is_gguf,
    is_stock,
    load_config,
    load_shapes,
    vision_folder,
)
from optprune.models.load import read_config, stored_checkpoint
from optprune.models.skeleton import unexpected_tensors, with_model_names
from optprune.models.surgery import put_parameters
from optprune.report.records import Report
from optprune.report.zeros import LayerPattern
from optprune.system.wording import counted, shown


class Readable(Protocol):
    """Tensor of a file, which is read on demand."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tensor."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in the file."""
        ...

    def read(self) -> Tensor:
        """Return the values."""
        ...


@dataclass(frozen=True)
class Fault:
    """An error in a model folder, or an expectation that is not met."""

    kind: str
    """shape, missing, unknown, tied, nan, report, original or expected"""
    where: str
    """the tensor, block or file with the error, or the expectation"""
    sentence: str


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model source, whose weights are read on demand."""

    source: str
    config: PretrainedConfig
    tensors: Mapping[str, Readable]
    """the tensors by their names in the model"""
    decoder: Decoder
    """a model of the stored shapes, whose weights are views of a single number"""
    faults: tuple[Fault, ...]
    """the differences between tensors and config"""
    ties: tuple[str, str] | None
    """the names of head and embeddings, where the config ties them"""

    @property
    def shares_head(self) -> bool:
        """Whether head and embeddings are both stored although the config ties them."""
        return self.ties is not None and all(name in self.tensors for name in self.ties)


def open_stored(source: str, draft: Draft | None = None) -> StoredModel:
    """Open a model source, and read the names and shapes of its tensors.

    An unknown architecture is read by a `draft`, or by the draft within the config. InputError where the config or the
    weights are missing.
    """
    config, quantised = read_config(source, draft)
    decoder = load_shapes(source, config)
    model, faults = decoder.model, list[Fault]()
    tensors: Mapping[str, Readable]
    if is_gguf(source):
        turned = decoder.architecture.is_transposed
        found = gguf_tensors(source, model)
        tensors = {name: tensor.transposed() if turned(name) else tensor for name, tensor in found.items()}
    else:
        checkpoint = with_model_names(model, stored_checkpoint(source, quantised, vision_folder(source)))
        tensors = checkpoint.tensors
        faults += [
            Fault(
                "unknown", name, f"{name} is stored, but a {config.model_type} model of config.json has no such tensor"
            )
            for name in unexpected_tensors(model, checkpoint)
        ]
    ties = _ties(model)
    for name, weight in model.named_parameters(remove_duplicate=False):
        wanted, there = list(weight.shape), tensors.get(name)
        if there is None:
            if ties is None or name not in ties or not any(other in tensors for other in ties):
                faults.append(Fault("missing", name, f"{name} {wanted} is not stored, but config.json requires it"))
        elif list(there.shape) != wanted:
            faults.append(
                Fault("shape", name, f"{name} is {list(there.shape)} in the weights and {wanted} by config.json")
            )
    _take_shapes(decoder, tensors)
    return StoredModel(source, config, tensors, decoder, tuple(faults), ties)


def _take_shapes(decoder: Decoder, tensors: Mapping[str, Readable]) -> None:
    """Give the blocks of a decoder the shapes of these tensors, as views of one number each."""
    for index, block in enumerate(decoder.blocks):
        shapes = {name: tuple(weight.shape) for name, weight in block.named_parameters()}
        for name, shape in shapes.items():
            there = tensors.get(decoder.name(index, name))
            if there is not None and len(there.shape) == len(shape) and 0 not in there.shape:
                shapes[name] = there.shape
        put_parameters(block, {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})


def _ties(model: PreTrainedModel) -> tuple[str, str] | None:
    """Return the names of the head's and the embeddings' weights, where the config ties them."""
    head, embeddings = model.get_output_embeddings(), model.get_input_embeddings()
    if not model.config.tie_word_embeddings or head is None:
        return None
    names = {module: f"{name}.weight" for name, module in model.named_modules()}
    return names[head], names[embeddings]


KEPT_FIELDS = (
    "hidden_size",
    "vocab_size",
    "rope_parameters",
    "rms_norm_eps",
    "hidden_act",
    "activation_function",
    "tie_word_embeddings",
    "do_layer_norm_before",
    "word_embed_proj_dim",
    "sliding_window",
    "hidden_activation",
    "query_pre_attn_scalar",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "attention_multiplier",
    "embedding_multiplier",
    "logits_scaling",
    "residual_multiplier",
    "swiglu_alpha",
    "swiglu_limit",
)
"""the fields of a config that change the meaning of the weights; pruning leaves them unchanged"""


@dataclass(frozen=True)
class Original:
    """The model before pruning."""

    model: str
    shapes: tuple[BlockShape, ...]
    """the shapes of its blocks"""
    left: tuple[int, ...]
    """the numbers of the blocks that were kept"""

    def weights(self, decoder: Decoder) -> int:
        """Return its number of linear weights."""
        return sum(map(decoder.weights_of, self.shapes))

    def sizes(self, decoder: Decoder) -> dict[str, tuple[int, int]]:
        """Return the original outputs and inputs of the kept linear layers, by their current names."""
        return {
            decoder.name(block, path): size
            for block, number in enumerate(self.left)
            for path, size in decoder.layer_sizes(self.shapes[number]).items()
            if path in decoder.architecture.layers  # not a removed expert
        }


def original_from_report(decoder: Decoder, folder: str) -> Original | None:
    """Return the original by a folder's report.json; None without a report, or where it describes other weights."""
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        before, after = ([_shape(block[when]) for block in report["blocks"]] for when in ("before", "after"))
        left = tuple(index for index, shape in enumerate(after) if shape.parts)
        grown = any(_grown(was, now) for was, now in zip(before, after, strict=True))
        if grown or tuple(after[index] for index in left) != decoder.shapes():
            return None
        return Original(str(report["model"]), tuple(before), left)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def original_from_model(before: StoredModel, stored: StoredModel) -> Original | None:
    """Return the original, from the model itself; None where it is not clear which of its blocks were kept.

    If blocks were removed, the others are recognised by their norm weights, which pruning leaves unchanged.
    """
    shapes, there = before.decoder.shapes(), stored.decoder.shapes()
    left: list[int] = list(range(len(shapes))) if len(shapes) == len(there) else []
    for index in range(0 if left else len(there)):
        start = left[-1] + 1 if left else 0
        same = (number for number in range(start, len(shapes)) if _same_norms(before, number, stored, index))
        number = next(same, None)
        if number is None:
            return None
        left.append(number)
    return Original(before.source, shapes, tuple(left))


def _same_norms(before: StoredModel, number: int, stored: StoredModel, index: int) -> bool:
    linear = stored.decoder.architecture.layers  # their biases may change by pruning
    mixture = stored.decoder.architecture.mixture
    router = "" if mixture is None else mixture.router  # as may its correction
    vectors = [name for name, weight in stored.decoder.blocks[index].named_parameters() if weight.ndim == 1]
    pairs = [
        (before.tensors.get(before.decoder.name(number, name)), stored.tensors.get(stored.decoder.name(index, name)))
        for name in vectors
        if name.rpartition(".")[0] not in (*linear, router) and name not in stored.decoder.architecture.per_head
    ]
    return bool(pairs) and all(
        was is not None and now is not None and torch.equal(was.read().to(torch.float64), now.read().to(torch.float64))
        for was, now in pairs
    )


def config_faults(before: StoredModel, stored: StoredModel) -> list[Fault]:
    """Return differences from the original that pruning cannot make: other values of the config, and larger blocks."""
    faults = []
    for name in KEPT_FIELDS:
        was, now = (getattr(each.config, name, None) for each in (before, stored))
        fewer_tokens = name == "vocab_size" and was is not None and now is not None and now < was
        if was != now and not fewer_tokens:
            faults.append(f"{name} is {shown(now)} in config.json, and {shown(was)} in {before.source}")
    original = original_from_model(before, stored)
    if original is None:
        faults.append(
            f"the norm weights of its {counted(len(stored.decoder.blocks), 'block')} are not among those of "
            f"{before.source}"
        )
    else:
        for index, (number, shape) in enumerate(zip(original.left, stored.decoder.shapes(), strict=True)):
            was = original.shapes[number]
            if _grown(was, shape):
                faults.append(f"block {index} holds {shape}, more than the {was} of {before.source}")
    return [Fault("original", "config.json", sentence) for sentence in faults]


def shares_kept(
    decoder: Decoder, layers: Sequence[LayerPattern], original: Original | None
) -> dict[str, tuple[float, ...]]:
    """Return the number of nonzero weights of each layer, by path and block, over that in the original.

    Without an original: for each stored block, over the largest layer of that path.
    """
    there = {layer.name: layer.outputs * layer.inputs - layer.zeros for layer in layers}
    shapes = decoder.shapes() if original is None else original.shapes
    place = {block: index for index, block in enumerate(range(len(shapes)) if original is None else original.left)}
    sizes = [{path: rows * columns for path, (rows, columns) in decoder.layer_sizes(s).items()} for s in shapes]
    shares = {}
    for path in decoder.architecture.layers:
        widest = max(size[path] for size in sizes)
        kept = [there.get(decoder.name(place[b], path), 0) if b in place else 0 for b in range(len(shapes))]
        whole = [size[path] if original else widest for size in sizes]
        if widest:  # a block that never had the layer keeps nothing of it
            shares[path] = tuple(count / (full or 1) for count, full in zip(kept, whole, strict=True))
    return shares


def _shape(counts: Mapping[str, Any]) -> BlockShape:
    shape = BlockShape(**counts)
    if not all(type(count) is int and count >= 0 for count in _counts(shape)):
        raise TypeError("a shape has counts only")
    return shape


def _counts(shape: BlockShape) -> tuple[int, ...]:
    return tuple(asdict(shape).values())


def _grown(before: BlockShape, after: BlockShape) -> bool:
    """Return whether any size of a block is larger than before; zero pairs means all."""
    counts = zip(_counts(replace(before, pairs=0)), _counts(replace(after, pairs=0)), strict=True)
    return any(new > old for old, new in counts) or 0 < before.pairs < (after.pairs or math.inf)


@dataclass(frozen=True)
class ModelSummary:
    """Properties of a saved model that the page of its run shows."""

    stock: bool
    """whether plain transformers loads it without the modelling file"""
    tokenizer: bool
    dtype: str
    parameters: int
    bytes: int
    """the size of the weights files"""
    linear_weights: int
    """the number of linear weights of the decoder blocks"""
    linear_before: int
    """the number of linear weights before pruning"""
    auto_class: str = "AutoModelForCausalLM"
    """the class of transformers that loads it"""

    @property
    def itemsize(self) -> int | None:
        """The bytes of an element; None for an unknown dtype."""
        dtype = getattr(torch, self.dtype, None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else None

    @classmethod
    def of(cls, decoder: Decoder, report: Report, size: int, *, tokenizer: bool) -> "ModelSummary":
        """Return the properties of a model whose weights files have `size` bytes."""
        config = decoder.model.config
        return cls(
            stock=is_stock(config),
            tokenizer=tokenizer,
            dtype=str(config.dtype or decoder.model.dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in decoder.model.parameters()),
            bytes=size,
            linear_weights=decoder.linear_weights(),
            linear_before=sum(decoder.weights_of(change.before) for change in report.blocks),
            auto_class=decoder.architecture.auto_class,
        )


def summarise_model(folder: Path, report: Report) -> ModelSummary | None:
    """Return the properties of the model in a folder; None without a model, or with one of other shapes.

    No weights are read. InputError where the config cannot be read.
    """
    files = list(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        return None
    decoder = load_shapes(str(folder), load_config(str(folder)))
    if report.blocks and original_from_report(decoder, str(folder)) is None:
        return None
    size = sum(file.stat().st_size for file in files)
    return ModelSummary.of(decoder, report, size, tokenizer=any(folder.glob("tokenizer*")))


def loading_code(model: ModelSummary) -> str:
    """Return Python code that loads the model from the folder of the page."""
    trust = "" if model.stock else ", trust_remote_code=True"
    # AutoTokenizer would ask to trust the code beside the config, which the tokenizer does not need.
    tokenizer = "AutoTokenizer" if model.stock else "PreTrainedTokenizerFast"
    names = f"{model.auto_class}, {tokenizer}" if model.tokenizer else model.auto_class
    lines = [f"from transformers import {names}", "", 'folder = "."  # the one that this file is in']
    if model.tokenizer:
        lines += [f"tokenizer = {tokenizer}.from_pretrained(folder)"]
    return "\n".join([*lines, f"model = {model.auto_class}.from_pretrained(folder{trust})"])
