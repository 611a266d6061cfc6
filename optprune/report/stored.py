"""Models as they are stored: tensors, differences from the config, the original, and how to load them."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from optprune.models import BlockShape, Decoder, Draft, gguf_tensors, is_gguf, is_stock, load_config, load_shapes
from optprune.models.checkpoint import Checkpoint
from optprune.models.skeleton import named_as_in, unknown_to
from optprune.models.surgery import put_parameters
from optprune.report.records import Report
from optprune.report.zeros import LayerPattern
from optprune.system.wording import counted, shown


class Readable(Protocol):
    """A tensor that can be read when it is needed."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """What it is stored in."""
        ...

    def read(self) -> Tensor:
        """Its values, in memory."""
        ...


@dataclass(frozen=True)
class Fault:
    """Something in a folder that is not as it should be."""

    kind: str
    """shape, missing, unknown, tied, nan, report, original or expected"""
    where: str
    """the tensor, the block or the file that it is in, or the expectation"""
    sentence: str


@dataclass(frozen=True, eq=False)
class StoredModel:
    """A model source as it is stored."""

    source: str
    config: PretrainedConfig
    tensors: Mapping[str, Readable]
    """the tensors, by the names that the model has for them"""
    decoder: Decoder
    """a model of the shapes that are stored, whose weights are views of a single number"""
    faults: tuple[Fault, ...]
    """what its config says otherwise"""
    ties: tuple[str, str] | None
    """the names of the head and of the embeddings, where the config says that they are one"""

    @property
    def shares_head(self) -> bool:
        """Whether head and embeddings are both stored, though the config says that they are one."""
        return self.ties is not None and all(name in self.tensors for name in self.ties)


def open_stored(source: str, draft: Draft | None = None) -> StoredModel:
    """What a model source holds, of which nothing is read yet but names and shapes.

    An architecture that is not known is read by a `draft`, or by that which the config carries. InputError where there
    is no config or no weights to be had.
    """
    config = load_config(source, draft)
    decoder = load_shapes(source, config)
    model, faults = decoder.model, list[Fault]()
    tensors: Mapping[str, Readable]
    if is_gguf(source):
        turned = decoder.architecture.is_turned
        found = gguf_tensors(source, model)
        tensors = {name: tensor.transposed() if turned(name) else tensor for name, tensor in found.items()}
    else:
        checkpoint = named_as_in(model, Checkpoint.open(source))
        tensors = checkpoint.tensors
        faults += [
            Fault(
                "unknown", name, f"{name} is stored, and a {config.model_type} model of config.json has no such tensor"
            )
            for name in unknown_to(model, checkpoint)
        ]
    ties = _ties(model)
    for name, weight in model.named_parameters(remove_duplicate=False):
        wanted, there = list(weight.shape), tensors.get(name)
        if there is None:
            if ties is None or name not in ties or not any(other in tensors for other in ties):
                faults.append(Fault("missing", name, f"{name} {wanted} is not stored, and config.json asks for it"))
        elif list(there.shape) != wanted:
            faults.append(
                Fault("shape", name, f"{name} is {list(there.shape)} in the weights and {wanted} by config.json")
            )
    _take_shapes(decoder, tensors)
    return StoredModel(source, config, tensors, decoder, tuple(faults), ties)


def _take_shapes(decoder: Decoder, tensors: Mapping[str, Readable]) -> None:
    """Let the blocks of a decoder have the shapes of these tensors, at the cost of one number each."""
    for index, block in enumerate(decoder.blocks):
        shapes = {name: tuple(weight.shape) for name, weight in block.named_parameters()}
        for name, shape in shapes.items():
            there = tensors.get(decoder.name(index, name))
            if there is not None and len(there.shape) == len(shape) and 0 not in there.shape:
                shapes[name] = there.shape
        put_parameters(block, {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()})


def _ties(model: PreTrainedModel) -> tuple[str, str] | None:
    """The names of the head's and the embeddings' weights, where the config ties them."""
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
)
"""fields of a config that decide what the weights mean, and that pruning leaves alone"""


@dataclass(frozen=True)
class Original:
    """The model that a folder was made from."""

    model: str
    """the name that it is called by"""
    shapes: tuple[BlockShape, ...]
    """the shapes of its blocks"""
    left: tuple[int, ...]
    """the numbers of the blocks that are still there"""

    def weights(self, decoder: Decoder) -> int:
        """The linear weights it had."""
        return sum(map(decoder.weights_of, self.shapes))

    def sizes(self, decoder: Decoder) -> dict[str, tuple[int, int]]:
        """The outputs and inputs that the linear layers had which are still there, by their name now."""
        return {
            decoder.name(block, path): size
            for block, number in enumerate(self.left)
            for path, size in decoder.layer_sizes(self.shapes[number]).items()
        }


def original_from_report(decoder: Decoder, folder: str) -> Original | None:
    """What report.json says that a folder's model was; None where there is none, or one that tells of other weights."""
    try:
        report = json.loads((Path(folder) / "report.json").read_text(encoding="utf-8"))
        before, after = ([_shape(block[when]) for block in report["blocks"]] for when in ("before", "after"))
        left = tuple(index for index, shape in enumerate(after) if shape.parts)
        pairs = zip(map(_counts, before), map(_counts, after), strict=True)
        grown = any(new > old for pair in pairs for old, new in zip(*pair, strict=True))
        if grown or tuple(after[index] for index in left) != decoder.shapes():
            return None
        return Original(str(report["model"]), tuple(before), left)
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def original_from_model(before: StoredModel, stored: StoredModel) -> Original | None:
    """The original, where it is at hand; None where it is not clear which of its blocks are left.

    Where blocks are gone, those that are left are told by their norms, which pruning leaves as they are.
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
    linear = stored.decoder.architecture.layers  # whose biases pruning may move
    vectors = [name for name, weight in stored.decoder.blocks[index].named_parameters() if weight.ndim == 1]
    pairs = [
        (before.tensors.get(before.decoder.name(number, name)), stored.tensors.get(stored.decoder.name(index, name)))
        for name in vectors
        if name.rpartition(".")[0] not in linear
    ]
    return bool(pairs) and all(
        was is not None and now is not None and torch.equal(was.read().to(torch.float64), now.read().to(torch.float64))
        for was, now in pairs
    )


def config_faults(before: StoredModel, stored: StoredModel) -> list[Fault]:
    """What a model cannot have from pruning the original: other numbers of its config, blocks that have grown."""
    faults = []
    for name in KEPT_FIELDS:
        was, now = (getattr(each.config, name, None) for each in (before, stored))
        if was != now:
            faults.append(f"{name} is {shown(now)} in config.json, and {shown(was)} in {before.source}")
    original = original_from_model(before, stored)
    if original is None:
        faults.append(
            f"its {counted(len(stored.decoder.blocks), 'block is', 'blocks are')} not known by norms among "
            f"{before.source}'s"
        )
    else:
        for index, (number, shape) in enumerate(zip(original.left, stored.decoder.shapes(), strict=True)):
            was = original.shapes[number]
            if any(new > old for old, new in zip(_counts(was), _counts(shape), strict=True)):
                faults.append(f"block {index} holds {shape}, more than the {was} of {before.source}")
    return [Fault("original", "config.json", sentence) for sentence in faults]


def shares_kept(
    decoder: Decoder, layers: Sequence[LayerPattern], original: Original | None
) -> dict[str, tuple[float, ...]]:
    """The weights of each kind of layer that are there and not zero, a block of the original, as a share of its own.

    Where the original is not known: in each block that is there, over the most in any.
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
        raise TypeError("the numbers of a shape are whole")
    return shape


def _counts(shape: BlockShape) -> tuple[int, ...]:
    return tuple(asdict(shape).values())


@dataclass(frozen=True)
class ModelSummary:
    """The model in a folder."""

    stock: bool
    """whether plain transformers loads it without the modelling file"""
    tokenizer: bool
    dtype: str
    parameters: int
    bytes: int
    """the size of the weights files"""
    linear_weights: int
    """the linear weights of the decoder blocks"""
    linear_before: int
    """how many there were before"""

    @property
    def itemsize(self) -> int | None:
        """The bytes of a number of its dtype; None of a dtype that is not known."""
        dtype = getattr(torch, self.dtype, None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else None

    @classmethod
    def of(cls, decoder: Decoder, report: Report, size: int, *, tokenizer: bool) -> "ModelSummary":
        """What a folder holds whose model this is, with weights files of so many bytes."""
        config = decoder.model.config
        return cls(
            stock=is_stock(config),
            tokenizer=tokenizer,
            dtype=str(config.dtype or decoder.model.dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in decoder.model.parameters()),
            bytes=size,
            linear_weights=decoder.linear_weights(),
            linear_before=sum(decoder.weights_of(change.before) for change in report.blocks),
        )


def summarise_model(folder: Path, report: Report) -> ModelSummary | None:
    """What a folder holds, of which no weight is read; None where it has no model, or one of other shapes.

    InputError where there is a config that cannot be read.
    """
    files = list(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        return None
    decoder = load_shapes(str(folder), load_config(str(folder)))
    if report.blocks and original_from_report(decoder, str(folder)) is None:
        return None
    size = sum(file.stat().st_size for file in files)
    return ModelSummary.of(decoder, report, size, tokenizer=any(folder.glob("tokenizer*")))


def loading_code(held: ModelSummary) -> str:
    """The Python that loads the folder that it is written in."""
    trust = "" if held.stock else ", trust_remote_code=True"
    # AutoTokenizer asks whether to run the code beside the config, which no tokenizer needs.
    tokenizer = "AutoTokenizer" if held.stock else "PreTrainedTokenizerFast"
    names = f"AutoModelForCausalLM, {tokenizer}" if held.tokenizer else "AutoModelForCausalLM"
    lines = [f"from transformers import {names}", "", 'folder = "."  # the one that this file is in']
    if held.tokenizer:
        lines += [f"tokenizer = {tokenizer}.from_pretrained(folder)"]
    return "\n".join([*lines, f"model = AutoModelForCausalLM.from_pretrained(folder{trust})"])
