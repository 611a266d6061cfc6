"""Small random model of a config, whose first block is run repeatedly to derive and test a description."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from optprune.errors import InputError
from optprune.models.draft import DRAFT_FIELD
from optprune.numerics.tensors import first_output

BLOCKS = 2
VOCABULARY = 128
SEQUENCES, TOKENS = 16, 8
"""the sequences are equal, so that a different row can be changed in each"""
MOVED = 2
"""the token at which a single row is changed: some tokens precede it and some follow"""
SEED = 0

Change = Callable[[Tensor], Tensor]
"""a change of a layer's output [sequences, tokens, out]"""


@dataclass(frozen=True)
class Call:
    """The input and the output of one call of a module."""

    path: str
    """its path in the model, or in the block"""
    module: nn.Module
    input: Tensor
    output: Tensor


def small_config(config: PretrainedConfig, **changes: Any) -> PretrainedConfig:
    """Return a copy of a config with few blocks and a small vocabulary, and with some fields changed."""
    count = config.num_hidden_layers
    config = copy.deepcopy(config)
    vars(config).pop(DRAFT_FIELD, None)
    for name in by_block(config):
        setattr(config, name, getattr(config, name)[:BLOCKS])
    small = {"num_hidden_layers": min(count, BLOCKS), "vocab_size": min(config.vocab_size, VOCABULARY)}
    for name, value in {**small, **changes}.items():
        setattr(config, name, value)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        try:
            setattr(config, name, None)
        except Exception:  # some configs require a number
            setattr(config, name, 0)
    return config


def by_block(config: PretrainedConfig) -> tuple[str, ...]:
    """Return the config fields that list something for each block."""
    return tuple(
        name
        for name, value in config.to_dict().items()
        if isinstance(value, list) and len(value) == config.num_hidden_layers and "token" not in name
    )


def shapes_only(config: PretrainedConfig) -> PreTrainedModel:
    """Return a model of a config whose weights have shapes only."""
    cls: Any = AutoModelForCausalLM
    with init_empty_weights(include_buffers=False):
        return cls.from_config(copy.deepcopy(config), trust_remote_code=False)


def random_model(config: PretrainedConfig) -> PreTrainedModel:
    """Return a float32 model of a config with random weights, biases and norms, so that nothing is zero or one."""
    cls: Any = AutoModelForCausalLM
    options = {"trust_remote_code": False, "dtype": torch.float32, "attn_implementation": "eager"}
    model = cls.from_config(copy.deepcopy(config), **options)
    generator = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.ndim > 1:
                parameter.copy_(noise / parameter.shape[-1] ** 0.5)
            else:
                parameter.add_(0.2 * noise)
    return model.eval()


class TracedModel:
    """A small model of a config, with the recorded calls of its modules, whose first block can be run again."""

    def __init__(self, config: PretrainedConfig) -> None:
        """Raise InputError where the model is no sequence of blocks, each reading the output of the one before it."""
        self.whole = config
        self.config = small_config(config)
        self.model = random_model(self.config)
        self.blocks = _blocks_of(self.model)
        generator = torch.Generator().manual_seed(SEED)
        one = torch.randint(0, self.config.vocab_size, (1, TOKENS), generator=generator)
        self.ids = one.expand(SEQUENCES, -1).contiguous()
        listed: Any = self.model.get_submodule(self.blocks)
        self.block: nn.Module = listed[0]
        received: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        handles = [
            block.register_forward_pre_hook(lambda _, args, kwargs: received.append((args, kwargs)), with_kwargs=True)
            for block in listed
        ]
        try:
            self.calls, self.logits = self._recorded()
        finally:
            for handle in handles:
                handle.remove()
        if len(received) != len(listed):
            raise InputError(f"not every block of {self.blocks} runs once: such a model needs a description by hand")
        self.arguments = received[0]
        self.outputs = [call.output for call in self.calls if call.module in set(listed)]
        for (args, kwargs), before in zip(received[1:], self.outputs, strict=False):
            hidden = args[0] if args else kwargs.get("hidden_states")
            if not isinstance(hidden, Tensor) or not torch.equal(hidden, before):
                raise InputError(
                    f"a block of {self.blocks} does not read the output of the one before it: such a model needs a "
                    "description by hand"
                )

    def _recorded(self) -> tuple[list[Call], Tensor]:
        calls: list[Call] = []

        def recorder(path: str) -> Any:
            def hook(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
                entered = args[0] if args else kwargs.get("hidden_states")
                first = first_output(output)
                if isinstance(entered, Tensor) and isinstance(first, Tensor):
                    calls.append(Call(path, module, entered, first))

            return hook

        modules = [(path, part) for path, part in self.model.named_modules() if path]
        handles = [part.register_forward_hook(recorder(path), with_kwargs=True) for path, part in modules]
        try:
            with torch.no_grad():
                logits = self.model(input_ids=self.ids, use_cache=False).logits
        finally:
            for handle in handles:
                handle.remove()
        return calls, logits

    @property
    def in_block(self) -> list[Call]:
        """The calls inside the first block, in order, with their paths in it."""
        prefix = f"{self.blocks}.0."
        return [
            Call(call.path.removeprefix(prefix), call.module, call.input, call.output)
            for call in self.calls
            if call.path.startswith(prefix)
        ]

    @property
    def linear(self) -> dict[str, Call]:
        """The calls of the first block's linear layers, in order."""
        return {call.path: call for call in self.in_block if type(call.module) in (nn.Linear, Conv1D)}

    def run(
        self, changes: Mapping[str, Change], watched: Sequence[str], *, frozen: bool = True
    ) -> tuple[dict[str, Tensor], Tensor]:
        """Return the inputs of the watched modules and the block's output when the outputs of some layers are changed.

        With `frozen` all other linear layers repeat their recorded outputs, so that a change only spreads along paths
        without another linear layer.
        """
        inputs: dict[str, Tensor] = {}
        linear = self.linear
        with ExitStack() as hooks, torch.no_grad():
            for path, call in linear.items():
                if path in changes:
                    own = changes[path]
                    hook: Any = lambda module, args, output, own=own: own(per_token(output)).view_as(output)  # noqa: E731
                elif frozen:
                    hook = lambda module, args, output, call=call: call.output  # noqa: E731
                else:
                    continue
                hooks.callback(call.module.register_forward_hook(hook).remove)
            for path in watched:

                def see(module: nn.Module, args: Any, path: str = path) -> None:
                    inputs[path] = per_token(args[0])

                hooks.callback(self.block.get_submodule(path).register_forward_pre_hook(see).remove)
            args, kwargs = self.arguments
            output = first_output(self.block(*args, **kwargs))
        return inputs, output

    @contextmanager
    def weight(self, layer: Any, weight: Tensor) -> Iterator[None]:
        """Replace the weight of a layer within the context."""
        before = layer.weight.data
        layer.weight.data = weight
        try:
            yield
        finally:
            layer.weight.data = before


def per_token(states: Tensor) -> Tensor:
    """Return states as [sequences, tokens, width]; some layers read all tokens as one list."""
    return states.reshape(SEQUENCES, TOKENS, -1)


def _blocks_of(model: PreTrainedModel) -> str:
    """Return the path of the list of modules with the most weights."""
    lists = [(name, part) for name, part in model.named_modules() if isinstance(part, nn.ModuleList) and len(part)]
    if not lists:
        raise InputError(f"a {model.config.model_type} model has no list of blocks: it needs a description by hand")
    return max(lists, key=lambda each: sum(weight.numel() for weight in each[1].parameters()))[0]
