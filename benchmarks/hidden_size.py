"""A narrower residual stream against narrower MLPs: perplexity on held-out news at equal weights.

    .venv/bin/python -m benchmarks.hidden_size
    .venv/bin/python -m benchmarks.train_small qwen2 small-qwen2-untied --untied
    .venv/bin/python -m benchmarks.hidden_size --model small-qwen2-untied --keep 116 --samples 32 --seq-length 256

The stream is rotated so that its last directions matter least, and these are cut from every matrix: the model has the
stock class and a smaller hidden_size. RMS norms without gains commute with a rotation, so the rotation by itself
changes nothing. Rows of one model have the same calibration and evaluation windows.

Two rotations are tried. `variance`: the principal directions of the normalised stream that the layers read. `gradient`:
the eigenvectors of the geometric mean of that second moment and the one of the loss's gradients there, labels sampled
from the model. A direction is cheap to cut if it carries little or if the loss hardly depends on it.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.common import Setting, setting, with_earlier, write_table
from optprune.calibration import calibrating, first_inputs
from optprune.errors import InputError
from optprune.measure import perplexity
from optprune.models import Decoder
from optprune.pruning import prune
from optprune.recipe import load_recipe

INEXACT = {
    "deepseek_v2": "norms in its latent attention are of vectors of low rank, and not of the stream",
    "deepseek_v3": "norms in its latent attention are of vectors of low rank, and not of the stream",
    "exaone4": "norms behind its sub-blocks have gains that no linear layer reads",
    "gemma2": "norms behind its sub-blocks have gains that no linear layer reads",
    "gemma3_text": "norms behind its sub-blocks have gains that no linear layer reads",
    "gemma4_text": "norms behind its sub-blocks have gains that no linear layer reads",
    "glm4_moe_lite": "norms in its latent attention are of vectors of low rank, and not of the stream",
    "gpt2": "its layer norms subtract the mean, which a rotation does not keep",
    "gpt_neox": "its layer norms subtract the mean, which a rotation does not keep",
    "olmo2": "norms behind its sub-blocks have gains that no linear layer reads",
    "opt": "its layer norms subtract the mean, which a rotation does not keep",
    **dict.fromkeys(
        ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next"),
        "its norms multiply by one plus their gains, and its recurrent mixers are not tried",
    ),
}
"""the families that cannot be rotated, each with the reason"""
EXACT = (
    *("falcon_h1", "glm4_moe", "gpt_oss", "granite", "granitemoehybrid", "lfm2", "llama", "ministral3", "mistral"),
    *("mixtral", "nemotron_h", "olmoe"),
    *("phi3", "qwen2", "qwen2_moe", "qwen3", "qwen3_moe", "seed_oss", "smollm3"),
)
"""the families with an RMS norm before each sub-block and before the head, and no other norm of the stream"""
NARROWED = ("llama", "mistral", "qwen2", "qwen3", "smollm3")
"""the families of which narrower models are made: a head_dim of its own, one MLP, no multipliers of the branches"""
BASES = ("variance", "gradient")


def check_exact(model: PreTrainedModel) -> None:
    """Raise InputError where a rotation of the residual stream would change the model."""
    family = model.config.model_type
    if family not in EXACT:
        reason = INEXACT.get(family, "it is not known to have RMS norms before its sub-blocks and no others")
        raise InputError(f"the residual stream of a {family} model cannot be rotated: {reason}")


@dataclass(frozen=True, eq=False)
class Part:
    """A norm of the stream, the module behind it, and the layers in there that read the stream and write to it."""

    norm: nn.Module
    module: nn.Module
    reads: Sequence[nn.Module]
    writes: Sequence[nn.Module]


def parts(decoder: Decoder, index: int) -> Iterator[Part]:
    """Yield the mixer and the MLP of a block."""
    names, block = decoder.architecture, decoder.blocks[index]
    outputs = {names.output, *names.mlps, *([names.recurrent.output] if names.recurrent else [])}
    for norm, place in map(names.modules_of, decoder.shape(index).parts):
        own = [path for path in decoder.paths(index) if path.startswith(f"{place}.")]
        writes = [path for path in own if path in outputs]
        reads = [path for path in own if path not in writes]
        module = block.get_submodule(place)
        if names.mixture is not None and place == names.mixture.module:
            gates = (names.mixture.router, f"{place}.shared_expert_gate")
            reads += [path for path in gates if path.rpartition(".")[2] in module._modules]
        layers = ([block.get_submodule(path) for path in paths] for paths in (reads, writes))
        yield Part(block.get_submodule(norm), module, *layers)


def end(decoder: Decoder) -> Part:
    """Return the last norm and the head."""
    norm, head = decoder.after_blocks()
    return Part(norm, head, [head], [])


def every_part(decoder: Decoder) -> list[Part]:
    """Return what reads the stream or writes to it behind the embedding, in the order of the forward pass."""
    return [*(part for index in range(len(decoder.blocks)) for part in parts(decoder, index)), end(decoder)]


def parameter(module: nn.Module, name: str = "weight") -> Tensor:
    """Return a parameter of a module."""
    return module.get_parameter(name).data


def fold_gains(decoder: Decoder) -> None:
    """Move the gain of every norm into the layers that read it."""
    for part in every_part(decoder):
        for layer in part.reads:
            parameter(layer).mul_(parameter(part.norm))
    for part in every_part(decoder):  # two mixers may read one norm
        parameter(part.norm).fill_(1.0)


def untie(model: PreTrainedModel) -> None:
    """Give the head a weight of its own: with the last norm's gain it is no longer the embedding."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    head.weight = nn.Parameter(head.weight.detach().clone())
    model.config.tie_word_embeddings = False


@torch.no_grad()
def rotate(model: PreTrainedModel, basis: Tensor) -> PreTrainedModel:
    """Return the model, changed so that its stream is x Q for an orthogonal basis Q [hidden, hidden]; same logits."""
    check_exact(model)
    untie(model)
    decoder, basis = Decoder(model), basis.double()
    fold_gains(decoder)
    found = every_part(decoder)
    for layer in (model.get_input_embeddings(), *(layer for part in found for layer in part.reads)):
        parameter(layer).copy_(parameter(layer).double() @ basis)
    for layer in (layer for part in found for layer in part.writes):
        for weight in layer.parameters(recurse=False):
            weight.copy_(basis.T @ weight.double())
    return decoder.joined()


@torch.no_grad()
def narrow(model: PreTrainedModel, keep: int) -> PreTrainedModel:
    """Return a model of the stock class with the first directions of a rotated model's stream.

    A norm over fewer numbers divides by another mean: what reads it is scaled as if the others were zero.
    """
    dense = Decoder(model)
    heads, hidden = dense.heads, int(model.config.hidden_size)
    if keep % heads.query:
        raise InputError(f"a hidden size of {keep} is not a multiple of the {heads.query} heads, as configs demand")
    family = dense.architecture.model_type
    if family not in NARROWED:
        raise InputError(f"{family} models are only rotated here; those of {', '.join(NARROWED)} are narrowed too")
    config = copy.deepcopy(model.config)
    config.hidden_size, config.head_dim = keep, heads.dim
    smaller = type(model)(config).to(model.dtype).eval()  # type: ignore[call-arg]
    state, shapes = model.state_dict(), smaller.state_dict()
    smaller.load_state_dict({name: state[name][tuple(map(slice, value.shape))] for name, value in shapes.items()})
    for layer in (layer for part in every_part(Decoder(smaller)) for layer in part.reads):
        parameter(layer).mul_(math.sqrt(hidden / keep))
    return smaller


def stream_basis(folded: PreTrainedModel, batches: Sequence[Tensor], kind: str, seed: int = 0) -> Tensor:
    """Return a basis [hidden, hidden] of the stream of a model without gains, whose last directions matter least."""
    size = int(folded.config.hidden_size)
    seen, slopes = (torch.zeros(size, size, dtype=torch.float64) for _ in range(2))
    generator = torch.Generator().manual_seed(seed)

    def add(total: Tensor, rows: Tensor) -> None:
        flat = rows.detach().reshape(-1, size)
        total.add_((flat.T @ flat).double())

    def catch(_: nn.Module, __: Any, normed: Tensor) -> None:
        add(seen, normed)
        if normed.requires_grad:
            normed.register_hook(lambda gradient: add(slopes, gradient))

    def begin(_: nn.Module, __: Any, rows: Tensor) -> Tensor:
        return rows.detach().requires_grad_(kind == "gradient")

    handles = [part.norm.register_forward_hook(catch) for part in every_part(Decoder(folded))]
    handles.append(folded.get_input_embeddings().register_forward_hook(begin))
    folded.requires_grad_(False)
    try:
        for ids in (row[None] for batch in batches for row in batch):
            logits = folded(input_ids=ids, use_cache=False).logits[0]
            if kind == "gradient":
                labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator)[:, 0]
                nn.functional.cross_entropy(logits, labels, reduction="sum").backward()
    finally:
        for handle in handles:
            handle.remove()
    return descending(seen if kind == "variance" else geometric_mean(seen, slopes))


def descending(moment: Tensor) -> Tensor:
    """Return the eigenvectors of a symmetric matrix as columns, the largest eigenvalue first."""
    return torch.linalg.eigh(moment).eigenvectors.flip(1)


def geometric_mean(first: Tensor, second: Tensor) -> Tensor:
    """Return A # B = A^(1/2) (A^(-1/2) B A^(-1/2))^(1/2) A^(1/2) of positive semidefinite matrices, damped a little."""
    damped = [each / each.trace() + 1e-6 / len(each) * torch.eye(len(each)) for each in (first, second)]
    root = power(damped[0], 0.5)
    inverse = power(damped[0], -0.5)
    return root @ power(inverse @ damped[1] @ inverse, 0.5) @ root


def power(matrix: Tensor, exponent: float) -> Tensor:
    """Return a power of a symmetric positive definite matrix."""
    values, vectors = torch.linalg.eigh((matrix + matrix.T) / 2)
    return vectors * values.clamp_min(1e-14) ** exponent @ vectors.T


class Sums:
    """Second moments of inputs z [tokens, in], and of targets t [tokens, any] with them, over weighted tokens."""

    def __init__(self) -> None:
        self.gram: Tensor | float = 0.0
        self.cross: Tensor | float = 0.0

    def add(self, inputs: Tensor, targets: Tensor, weights: Tensor | float = 1.0) -> None:
        """Add the tokens of a batch."""
        rows, wanted = (each.flatten(0, -2).double() for each in (inputs, targets))
        weighted = rows * weights
        self.gram = self.gram + rows.T @ weighted
        self.cross = self.cross + wanted.T @ weighted

    def refit(self, weight: Tensor, target: Tensor | None, damping: float) -> None:
        """Set V to the least squares answer (M T + d V0) (G + d)^-1, where T = E[t z^T] and M is the target or 1."""
        assert isinstance(self.gram, Tensor) and isinstance(self.cross, Tensor)
        ridge = damping * self.gram.diagonal().mean()
        cross = self.cross if target is None else target.double() @ self.cross
        damped = self.gram + ridge * torch.eye(len(self.gram))
        weight.copy_(torch.linalg.solve(damped, (cross + ridge * weight.double()).T).T)


@dataclass
class Streams:
    """The streams of a rotated model and of a narrower one between two blocks, a tensor for each batch."""

    wide: list[Tensor]
    own: list[Tensor]

    def refit_readers(self, wide: Part, own: Part, damping: float) -> None:
        """Fit the layers that read the narrower stream to the outputs of the rotated model's."""
        sums = Sums()
        for states, ours in zip(self.wide, self.own, strict=True):
            sums.add(own.norm(ours), wide.norm(states))
        for layer, target in zip(own.reads, wide.reads, strict=True):
            sums.refit(parameter(layer), parameter(target), damping)

    def pass_part(self, wide: Part, own: Part, others: list[dict[str, Any]], damping: float) -> None:
        """Take both streams through a sub-block, whose last layer is fitted to the first directions behind it."""
        [layer], sums, inputs = own.writes, Sums(), list[Tensor]()
        assert isinstance(layer, nn.Linear)
        handle = layer.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
        for number, more in enumerate(others):
            states, ours = self.wide[number], self.own[number]
            states = self.wide[number] = states + _first(wide.module(wide.norm(states), **more))
            own.module(own.norm(ours), **more)
            bias = torch.zeros(()) if layer.bias is None else layer.bias  # which stays as it is
            weights = 1 / states.flatten(0, -2).double().square().mean(1, keepdim=True)
            sums.add(inputs[number], states[..., : ours.shape[-1]] - ours - bias, weights)
        handle.remove()
        sums.refit(parameter(layer), None, damping)
        self.own = [ours + layer(seen) for ours, seen in zip(self.own, inputs, strict=True)]


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def restore(smaller: PreTrainedModel, rotated: PreTrainedModel, batches: Sequence[Tensor], damping: float) -> Streams:
    """Refit every layer of the blocks of a narrower model on its own inputs; return the streams behind the blocks.

    Layers that read the stream are fitted to the outputs of the rotated model, and those that write to the first
    directions of its stream, so that drift is corrected. Tokens count by the inverse of their stream's mean square,
    as the next norm sees them.
    """
    dense, thin = Decoder(rotated), Decoder(smaller)
    with calibrating(dense), calibrating(thin):
        arguments = first_inputs(dense, batches)
        streams = Streams(list(arguments.hidden), list(first_inputs(thin, batches).hidden))
        for index in range(len(dense.blocks)):
            others = [blocks[index] for blocks in arguments.others]
            for wide, own in zip(parts(dense, index), parts(thin, index), strict=True):
                streams.refit_readers(wide, own, damping)
                streams.pass_part(wide, own, others, damping)
                others = [{} for _ in others]  # an MLP takes nothing but its input
    return streams


def all_weights(model: PreTrainedModel) -> int:
    """Return the number of a model's weights, those that are tied once."""
    return sum(weight.numel() for weight in model.parameters())


@dataclass(frozen=True, eq=False)
class Case:
    """The dense model with its texts, the same without gains and with a head of its own, and the directions to keep."""

    base: Setting
    folded: PreTrainedModel
    keep: int
    damping: float

    @property
    def dense(self) -> PreTrainedModel:
        """The model as it is."""
        return self.base.loaded.model

    def as_it_is(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """Yield the dense model."""
        yield "dense", self.dense

    def hidden(self, kind: str) -> Iterator[tuple[str, PreTrainedModel]]:
        """Yield the narrower models by one rotation, and the rotated model."""
        rotated = rotate(copy.deepcopy(self.folded), stream_basis(self.folded, self.base.batches, kind))
        yield f"rotated by {kind}, all directions", rotated
        smaller = narrow(rotated, self.keep)
        yield f"hidden size, {kind}, cut", smaller
        streams = restore(smaller, rotated, self.base.batches, self.damping)
        yield f"hidden size, {kind}, restored", smaller
        with torch.no_grad():
            streams.refit_readers(end(Decoder(rotated)), end(Decoder(smaller)), self.damping)
        yield f"hidden size, {kind}, restored with the head", smaller

    def widths(self) -> Iterator[tuple[str, PreTrainedModel]]:
        """Yield the models with narrower MLPs; nothing is to be removed where the other's head makes it larger."""
        smaller, linear = narrow(self.folded, self.keep), Decoder(self.dense).linear_weights()
        fewer = {
            "of the blocks": linear - Decoder(smaller).linear_weights(),
            "in all": all_weights(self.dense) - all_weights(smaller),
        }
        for counted, weights in fewer.items():
            for recipe in ("fasp", "structured_uniform_best") if weights > 0 else ():
                model = copy.deepcopy(self.dense)
                prune(model, self.base.batches, load_recipe(recipe, {"units": "mlp", "sparsity": weights / linear}))
                yield f"MLP width, {recipe}, as many weights {counted}", model


GROUPS: dict[str, Callable[[Case], Iterator[tuple[str, PreTrainedModel]]]] = {
    "dense": Case.as_it_is,
    "widths": Case.widths,
    **{kind: partial(Case.hidden, kind=kind) for kind in BASES},
}
"""the groups of rows"""


def main() -> None:
    """Measure the rows, and write the table after each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--only", nargs="+", default=list(GROUPS), choices=list(GROUPS), help="groups of rows")
    parser.add_argument("--keep", type=int, default=513, help="directions, a multiple of the heads")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--damping", type=float, default=0.01, help="of restoration, a share of the mean diagonal")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    base = setting(options.samples, options.seq_length, options.windows, options.seed, options.model)
    name = "SmolLM2-135M-Instruct" if options.model == "demo" else Path(options.model).name
    title = (
        f"Hidden size against MLP width: perplexity of held-out news, {options.samples * options.seq_length} "
        f"calibration tokens, {options.windows * options.seq_length} evaluated, seed {options.seed}"
    )
    found, began = list[dict[str, Any]](), time.perf_counter()
    dense = base.loaded.model
    folded = rotate(copy.deepcopy(dense), torch.eye(dense.config.hidden_size))
    case = Case(base, folded, options.keep, options.damping)
    for how, model in (row for group in options.only for row in GROUPS[group](case)):
        row = {"model": name, "how": how, "damping": options.damping, "hidden size": model.config.hidden_size}
        row |= {"MLP width": Decoder(model).shape(0).mlp_width}
        row |= {"weights of the blocks": Decoder(model).linear_weights(), "all weights": all_weights(model)}
        row |= {"seconds to make": round(time.perf_counter() - began)}
        found.append({**row, "perplexity": round(perplexity(model, base.windows).perplexity, 2)})
        every = with_earlier("hidden_size", found, ("model", "how", "damping"))
        print(write_table("hidden_size", title, every).splitlines()[-1], flush=True)
        began = time.perf_counter()


if __name__ == "__main__":
    main()
