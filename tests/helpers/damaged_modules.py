"""Sub-modules with weights at zero, for recovery, and their errors as linear functions of the weights that are left."""

import copy

import torch
from torch import Tensor, nn

from optprune.calibration import calibrating, first_inputs
from optprune.calibration.calls import Calls, calls_of
from optprune.models import Decoder
from optprune.models.surgery import write
from tests.helpers.tiny_models import TINY_MODELS
from tests.helpers.token_batches import batches

PARTS = [
    ("llama", "mlp", ("up_proj", "down_proj")),
    ("llama", "self_attn", ("v_proj", "o_proj")),
    ("qwen2", "mlp", ("up_proj", "down_proj")),
    ("qwen2", "self_attn", ("v_proj", "o_proj")),
    ("opt", "self_attn", ("v_proj", "out_proj")),
]


def damaged(name: str, path: str, layers: tuple[str, ...], dtype: torch.dtype) -> tuple[nn.Module, Calls]:
    """A sub-module with a third of the weights of its layers at zero, and the calls of the whole one."""
    small = {"hidden_size": 16, "max_position_embeddings": 64}
    small |= {"ffn_dim": 24, "word_embed_proj_dim": 16} if name == "opt" else {"intermediate_size": 24}
    model = TINY_MODELS[name](**small).to(dtype)
    decoder = Decoder(model)
    with calibrating(decoder):
        calls = calls_of(decoder.blocks[0], path, first_inputs(decoder, batches(length=24)))
    module = decoder.blocks[0].get_submodule(path)
    generator = torch.Generator().manual_seed(1)
    for layer in layers:
        weight = module.get_submodule(layer).weight
        write(module.get_submodule(layer), weight * (torch.rand(weight.shape, generator=generator) > 1 / 3))
    return module, calls


def answers(module: nn.Module, calls: Calls) -> Tensor:
    """All outputs in a row."""
    found = []
    for args, kwargs in calls.arguments:
        output = module(*args, **kwargs)
        found.append((output[0] if isinstance(output, tuple) else output).reshape(-1))
    return torch.cat(found)


@torch.no_grad()
def linearised(module: nn.Module, path: str, calls: Calls) -> tuple[Tensor, Tensor, Tensor]:
    """(mask, J, change): outputs by the nonzero weights of one layer, column by column, and what is missing."""
    module = copy.deepcopy(module)
    layer: nn.Linear = module.get_submodule(path)  # type: ignore[assignment]
    start = layer.weight.detach().clone()
    base = answers(module, calls)
    columns = []
    for row, column in (start != 0).nonzero().tolist():
        moved = start.clone()
        moved[row, column] += 1
        write(layer, moved)
        columns.append(answers(module, calls) - base)
    return start != 0, torch.stack(columns, 1), torch.cat([target.reshape(-1) for target in calls.targets]) - base
