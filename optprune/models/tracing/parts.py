"""Parts: the norms of a block and where they stand, and what of it has no place that is known."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from optprune.models.draft import NotUnderstood
from optprune.models.tracing.bench import Bench, Call
from optprune.models.tracing.roles import Fed
from optprune.numerics.modules import first_output

SCALED = 100.0
"""inputs so much larger make nothing of the constant under a norm's root"""
NEARLY = 1e-3
"""the relative difference that float32 may explain"""


def norms(bench: Bench) -> list[Call]:
    """The calls of modules without matrices or parts, whose answer is the same for inputs of any size."""
    return [call for call in bench.in_block if _is_norm(call)]


def _is_norm(call: Call) -> bool:
    if any(weight.ndim > 1 for weight in call.module.parameters()) or any(call.module.children()):
        return False
    with torch.no_grad():
        large, larger = (first_output(call.module(by * SCALED * call.entered)) for by in (1, 3))
    return nearly(larger, large)


def parts_of(bench: Bench, fed: Fed, module: str) -> tuple[str, ...]:
    """The modules of a block that make up a sub-block, with the norms before and behind it; `module` is "" for none."""
    linear = bench.linear
    first, last = linear[fed.producers[0]], linear[fed.consumer]
    inner = [module] if module else [path.partition(".")[0] for path in (*fed.producers, fed.consumer)]
    outside = [call for call in norms(bench) if not _within(call.path, inner)]
    before = [call.path for call in outside if same(call.left, first.entered)]
    behind = [call.path for call in outside if same(call.entered, last.left)]
    return tuple(dict.fromkeys((*before, *inner, *behind)))


def ends_with_norm(bench: Bench) -> bool:
    """Whether what a block gives is what a norm of it gives."""
    args, kwargs = bench.arguments
    with torch.no_grad():
        output = first_output(bench.block(*args, **kwargs))
    return any(same(call.left, output) for call in norms(bench))


def left_over(bench: Bench, known: Iterable[str], odd: dict[str, str]) -> list[NotUnderstood]:
    """The modules with weights of their own that are neither `known` linear layers nor norms, and why."""
    known, found = set(known), list[NotUnderstood]()
    placed = known | {call.path for call in norms(bench)}
    ran = [call.path for call in bench.in_block]
    prefix = f"{bench.blocks}.0"
    for path, module in bench.block.named_modules():
        own = list(module.parameters(recurse=False))
        why = odd.get(path)
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


def differing(model: nn.Module, blocks: str) -> list[NotUnderstood]:
    """The blocks of a model, which may be without memory, that do not hold what the first one holds."""
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


def affine(bench: Bench, module: str, layers: Iterable[str]) -> tuple[str, ...]:
    """The layers in whose weight the output of a sub-module is affine, while all other weights stay."""
    found: list[Tensor] = []
    handle = bench.block.get_submodule(module).register_forward_hook(lambda *call: found.append(first_output(call[2])))
    args, kwargs = bench.arguments
    affine_in = []
    try:
        for path in layers:
            layer = bench.linear[path].module
            weight: Tensor = layer.weight.data  # type: ignore[assignment]
            step = torch.randn(weight.shape, generator=torch.Generator().manual_seed(3)) * weight.std()
            found.clear()
            for count in range(3):
                with bench.weight(layer, weight + count * step), torch.no_grad():
                    bench.block(*args, **kwargs)
            if nearly(found[2] - found[1], found[1] - found[0]):
                affine_in.append(path)
    finally:
        handle.remove()
    return tuple(affine_in)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors hold the same numbers, in whatever shape."""
    return one.numel() == other.numel() and torch.equal(one.flatten(), other.flatten())


def nearly(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors differ by rounding."""
    return bool((one - other).abs().max() <= NEARLY * other.abs().max())


def _within(path: str, modules: Iterable[str]) -> bool:
    return any(f"{path}.".startswith(f"{module}.") for module in modules)


def common(paths: Iterable[str]) -> str:
    """The module that all of these are in, "" for the block itself."""
    split = [path.split(".")[:-1] for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
