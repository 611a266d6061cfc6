"""What a block of a shape holds: its linear layers and their sizes, by the description of its architecture."""

from torch import nn
from transformers import PretrainedConfig

from optprune.models.architecture import GATED, Architecture, BlockShape, Heads
from optprune.models.mixture import SeparateExperts, experts_in
from optprune.models.rows import counts_of_heads


def mlp_counts(architecture: Architecture, block: nn.Module) -> tuple[int, int]:
    """The units of a block's MLP, or of each of its experts, and how many experts there are; none of one MLP."""
    if architecture.mixture is None:
        return _linear(block, architecture.mlp_consumer).in_features, 0
    experts = experts_in(block, architecture.mixture)
    assert isinstance(experts, SeparateExperts)
    return _linear(experts["0"], GATED[2]).in_features, experts.count


def head_counts(architecture: Architecture, heads: Heads, block: nn.Module) -> tuple[int, int]:
    """The KV heads of a block's attention, and the value dimensions of each."""
    keys, mixed = _linear(block, architecture.key), _linear(block, architecture.output)
    return counts_of_heads(architecture.joined, heads, keys.out_features, mixed.in_features)


def layer_sizes(
    architecture: Architecture, config: PretrainedConfig, heads: Heads, shape: BlockShape
) -> dict[str, tuple[int, int]]:
    """The outputs and inputs of every linear layer in a block of this shape, zeros where the layer is not there."""
    names, hidden, queries = architecture, int(config.hidden_size), shape.kv_heads * heads.group
    outputs = dict.fromkeys(names.mlp_producers, shape.mlp_width * names.rows_of_unit)
    for path, width in ((names.query, heads.group * heads.dim), (names.key, heads.dim), (names.value, shape.value_dim)):
        outputs[path] = outputs.get(path, 0) + shape.kv_heads * width  # one layer may make them all
    inputs = {names.output: queries * shape.value_dim, names.mlp_consumer: shape.mlp_width}
    for place, width in _gated(architecture, config, shape).items():
        outputs |= {f"{place}.{layer}": width for layer in GATED[:2]}
        inputs[f"{place}.{GATED[2]}"] = width
    given = {path: (rows, hidden) for path, rows in outputs.items()} | {path: (hidden, n) for path, n in inputs.items()}
    return {path: given.get(path, (0, hidden)) for path in names.layers}


def linear_weights(architecture: Architecture, config: PretrainedConfig, heads: Heads, shape: BlockShape) -> int:
    """The linear weights of a block of a shape."""
    return sum(outputs * inputs for outputs, inputs in layer_sizes(architecture, config, heads, shape).values())


def _gated(architecture: Architecture, config: PretrainedConfig, shape: BlockShape) -> dict[str, int]:
    """The widths of the gated MLPs of a mixture, by their places."""
    mixture = architecture.mixture
    if mixture is None or not shape.mlp_width:
        return {}
    widths = {f"{mixture.experts}.{number}": shape.mlp_width for number in range(shape.experts)}
    return widths | ({mixture.shared: int(getattr(config, mixture.shared_width))} if mixture.shared else {})


def _linear(module: nn.Module, path: str) -> nn.Linear:
    return module.get_submodule(path)  # type: ignore[return-value]
