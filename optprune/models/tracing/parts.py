"""Parts of a block: its norms and their places, and the modules that have no place."""

from collections.abc import Iterable
from inspect import signature

import torch
from torch import Tensor, nn

from optprune.models.draft import NotUnderstood
from optprune.models.tracing.roles import ResidualBranch
from optprune.models.tracing.traced_model import Call, TracedModel
from optprune.numerics.tensors import first_output

SCALED = 100.0
"""the factor of inputs that makes the constant under a norm's root negligible"""
NEARLY = 1e-3
"""the relative difference allowed to float32"""


def norms(traced: TracedModel) -> list[Call]:
    """Return the calls of modules without matrices or sub-modules whose output does not depend on the input's scale."""
    return [call for call in traced.in_block if _is_norm(call)]


def _is_norm(call: Call) -> bool:
    if any(weight.ndim > 1 for weight in call.module.parameters()) or any(call.module.children()):
        return False
    needed = [each for each in signature(call.module.forward).parameters.values() if each.default is each.empty]
    if sum(each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD) for each in needed) > 1:
        return False  # a factor comes with its input
    with torch.no_grad():
        large, larger = (first_output(call.module(by * SCALED * call.input)) for by in (1, 3))
    return nearly(larger, large)


def parts_of(traced: TracedModel, branch: ResidualBranch, module: str) -> tuple[str, ...]:
    """Return the modules that make up a sub-block, with the norms before and behind it; `module` is "" for none."""
    linear = traced.linear
    first, last = linear[branch.producers[0]], linear[branch.consumer]
    inner = [module] if module else [path.partition(".")[0] for path in (*branch.producers, branch.consumer)]
    outside = [call for call in norms(traced) if not _within(call.path, inner)]
    before = [call.path for call in outside if same(call.output, first.input)]
    behind = [call.path for call in outside if same(call.input, last.output)]
    return tuple(dict.fromkeys((*before, *inner, *behind)))


def ends_with_norm(traced: TracedModel) -> bool:
    """Return whether a block's output is the output of a norm."""
    args, kwargs = traced.arguments
    with torch.no_grad():
        output = first_output(traced.block(*args, **kwargs))
    return any(same(call.output, output) for call in norms(traced))


def unplaced_modules(traced: TracedModel, known: Iterable[str], unplaced: dict[str, str]) -> list[NotUnderstood]:
    """Return the modules with weights of their own that are neither `known` linear layers nor norms, with reasons."""
    known, found = set(known), list[NotUnderstood]()
    placed = known | {call.path for call in norms(traced)}
    ran = [call.path for call in traced.in_block]
    prefix = f"{traced.blocks}.0"
    for path, module in traced.block.named_modules():
        own = list(module.parameters(recurse=False))
        why = unplaced.get(path)
        if why is None and path in known and ran.count(path) != 1:
            why = f"it runs {ran.count(path)} times in a block"
        elif why is None and own and path not in placed:
            why = _why_not(module, own, ran.count(path))
        if why is not None:
            found.append(NotUnderstood(f"{prefix}.{path}" if path else prefix, type(module).__name__, why))
    return found


def _why_not(module: nn.Module, own: list[nn.Parameter], runs: int) -> str:
    shapes = [list(weight.shape) for weight in own]
    if any(weight.ndim > 2 for weight in own):
        return f"weights of shape {shapes[0]} hold several matrices, as those of experts do"
    if any(weight.ndim > 1 for weight in own):
        return (
            f"it multiplies by a matrix {shapes[0]} and is no plain linear layer" if runs else "it does not run alone"
        )
    return f"it has weights {shapes[0]} and is no norm"


def differing_blocks(model: nn.Module, blocks: str) -> list[NotUnderstood]:
    """Return the first block whose weights have other shapes than those of block 0, as a list of one, or none."""
    held = [
        (block, {name: tuple(weight.shape) for name, weight in block.named_parameters()})
        for block in model.get_submodule(blocks).children()
    ]
    return [
        NotUnderstood(
            f"{blocks}.{index}",
            type(block).__name__,
            f"it holds other weights than {blocks}.0: {_first(own, held[0][1])}",
        )
        for index, (block, own) in enumerate(held)
        if own != held[0][1]
    ][:1]


def _first(own: dict[str, tuple[int, ...]], other: dict[str, tuple[int, ...]]) -> str:
    name = min(name for name in own.keys() | other.keys() if own.get(name) != other.get(name))
    return f"{name} {list(own.get(name, ()))} in place of {list(other.get(name, ()))}"


def affine_layers(traced: TracedModel, module: str, layers: Iterable[str]) -> tuple[str, ...]:
    """Return the layers in whose weight alone the output of a sub-module is affine."""
    found: list[Tensor] = []
    handle = traced.block.get_submodule(module).register_forward_hook(lambda *call: found.append(first_output(call[2])))
    args, kwargs = traced.arguments
    affine_in = []
    try:
        for path in layers:
            layer = traced.linear[path].module
            weight: Tensor = layer.weight.data  # type: ignore[assignment]
            step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * weight.std()
            found.clear()
            for count in range(3):
                with traced.weight(layer, weight + count * step), torch.no_grad():
                    traced.block(*args, **kwargs)
            if nearly(found[2] - found[1], found[1] - found[0]):
                affine_in.append(path)
    finally:
        handle.remove()
    return tuple(affine_in)


def same(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors hold the same numbers, in any shape."""
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def nearly(one: Tensor, other: Tensor) -> bool:
    """Return whether two tensors differ by rounding only."""
    return bool((one - other).abs().max() <= NEARLY * other.abs().max())


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def common_module(paths: Iterable[str]) -> str:
    """Return the innermost module that holds all of these, "" for the block itself."""
    split = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
