"""What a pruned model was before, by its report.json or the model itself, and how much of it each block still has."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from optprune.models import BlockShape, Decoder
from optprune.report.layer_pattern import LayerPattern
from optprune.report.stored import Fault, Stored
from optprune.system.wording import counted, shown

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


def original_of(decoder: Decoder, folder: str) -> Original | None:
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


def original_in(before: Stored, stored: Stored) -> Original | None:
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


def _same_norms(before: Stored, number: int, stored: Stored, index: int) -> bool:
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


def config_faults(before: Stored, stored: Stored) -> list[Fault]:
    """What a model cannot have from pruning the original: other numbers of its config, blocks that have grown."""
    faults = []
    for name in KEPT_FIELDS:
        was, now = (getattr(each.config, name, None) for each in (before, stored))
        if was != now:
            faults.append(f"{name} is {shown(now)} in config.json, and {shown(was)} in {before.source}")
    original = original_in(before, stored)
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
