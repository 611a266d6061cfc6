"""Slicing of models with biases, grouped-query attention, rotary variants and caches."""

import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.utils.prune
from transformers import BloomConfig, BloomForCausalLM, PreTrainedModel
from transformers.cache_utils import DynamicLayer
from transformers.pytorch_utils import Conv1D

from optprune.errors import InputError
from optprune.models import ARCHITECTURES, Decoder, KvGroups, Mlp, Values, architecture_of
from optprune.models.surgery import write
from tests.helpers.sub_blocks import block_with
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS, tiny_llama, tiny_opt, tiny_qwen2

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
VARIANTS = {
    "llama, grouped-query attention": tiny_llama,
    "llama, one KV head": lambda: tiny_llama(num_key_value_heads=1),
    "llama, as many KV heads as heads": lambda: tiny_llama(num_key_value_heads=4),
    "llama, head_dim of its own": lambda: tiny_llama(head_dim=24),
    "llama, biases": lambda: tiny_llama(attention_bias=True, mlp_bias=True),
    "llama, tied embeddings": lambda: tiny_llama(tie_word_embeddings=True),
    "llama 3.1 rope": lambda: tiny_llama(rope_parameters=LLAMA3_ROPE),
    "qwen2": tiny_qwen2,
    "qwen2, sliding window": lambda: tiny_qwen2(
        use_sliding_window=True, sliding_window=8, max_window_layers=0, layer_types=["sliding_attention"] * 2
    ),
    "opt": tiny_opt,
    "opt, norm after attention": lambda: tiny_opt(do_layer_norm_before=False),
    "opt, projected embeddings": lambda: tiny_opt(word_embed_proj_dim=32),
} | {name: make for name, make in ALL_MODELS.items() if name not in TINY_MODELS}
COUNTS = {"mlp": "mlp_width", "vo": "value_dim", "kv": "kv_heads"}


def stays(name: str) -> set[str]:
    """Return the counts of a family that cannot be lowered."""
    return set(ARCHITECTURES[name].indivisible) if name in ARCHITECTURES else set()


KINDS = [("mlp",), ("vo",), ("kv",), ("vo", "mlp"), ("kv", "mlp")]
EAGER = ("gemma2", "gpt_oss")
CASES = [
    (variant, kinds, attention)
    for variant in VARIANTS
    for kinds in KINDS
    for attention in ("sdpa", "eager")
    # Some units of some families do not go, and soft caps and sinks are in no other attention.
    if not {COUNTS[kind] for kind in kinds} & stays(variant) and (variant in EAGER) <= (attention == "eager")
]


def tokens(batch: int = 2, length: int = 24) -> torch.Tensor:
    return torch.randint(5, 500, (batch, length), generator=torch.Generator().manual_seed(1))


def halve(decoder: Decoder, block: int, kind: str, generator: torch.Generator, cut: bool) -> None:
    """Give the consumers random weights on a random half of each slot's units (rounded up), and remove the others."""
    for layers in {"mlp": Mlp(), "vo": Values(), "kv": KvGroups()}[kind].layers(decoder, block):
        channels = layers.channels
        size = channels.units // channels.slot_count
        choice = torch.cat(
            [torch.randperm(size, generator=generator) < (size + 1) // 2 for _ in range(channels.slot_count)]
        )  # slots are contiguous
        consumer = decoder.layer(block, layers.consumer)
        mask = channels.column_mask(choice, consumer.in_features)
        weight = torch.randn(consumer.weight.shape, generator=generator) / 8 * mask
        bias = None if consumer.bias is None else torch.randn(consumer.bias.shape, generator=generator) / 8
        write(consumer, weight, bias)
        if cut:
            decoder.keep_units(block, layers, choice)


@pytest.mark.parametrize(("variant", "kinds", "attention"), CASES, ids=str)
def test_slicing_equals_zeroed_columns(variant: str, kinds: tuple[str, ...], attention: str) -> None:
    sliced, zeroed = VARIANTS[variant](), VARIANTS[variant]()
    for model in (sliced, zeroed):
        model.set_attn_implementation(attention)
        decoder = Decoder(model)
        generator = torch.Generator().manual_seed(0)
        for block in range(len(decoder.blocks)):
            for kind in kinds:
                halve(decoder, block, kind, generator, cut=model is sliced)
    smaller = Decoder(sliced).linear_weights() < Decoder(zeroed).linear_weights()
    assert smaller or (variant == "llama, one KV head" and kinds == ("kv",))
    with torch.no_grad():
        small, full = sliced(tokens()).logits, zeroed(tokens()).logits
    # The sums skip exact zeros, so only their order differs: a few float32 roundings of the largest logit.
    assert (small - full).abs().max() <= 1e-5 * full.abs().max()


@pytest.mark.parametrize("gone", [0, 1])
@pytest.mark.parametrize("name", [name for name in ALL_MODELS if "kv_heads" not in stays(name)])
def test_a_kv_head_whose_values_were_narrowed_before_goes_whole(name: str, gone: int) -> None:
    """Removing a head equals zeros in the columns of the output projection that read it."""
    sliced = narrowed(ALL_MODELS[name]())
    zeroed = copy.deepcopy(sliced)
    decoder, other = Decoder(sliced), Decoder(zeroed)
    block = block_with(decoder, 1, "attention")
    before, group = decoder.shape(block), decoder.heads.group
    assert before.value_dim < decoder.heads.dim
    [units] = KvGroups().layers(decoder, block)
    decoder.keep_units(block, units, torch.arange(before.kv_heads) != gone)
    assert decoder.shape(block) == replace(before, kv_heads=before.kv_heads - 1)
    layer = other.layer(block, other.architecture.output)
    with torch.no_grad():
        width = group * before.value_dim
        layer.weight[:, gone * width : (gone + 1) * width] = 0
        small, full = sliced(tokens()).logits, zeroed(tokens()).logits
    assert (small - full).abs().max() <= 1e-5 * full.abs().max()


def narrowed(model: PreTrainedModel) -> PreTrainedModel:
    decoder = Decoder(model)
    generator = torch.Generator().manual_seed(0)
    kind = "vo" if "value_dim" not in decoder.architecture.indivisible else "mlp"
    for block in range(len(decoder.blocks)):
        halve(decoder, block, kind, generator, cut=True)
    decoder.record_shapes()
    return model


@pytest.mark.parametrize("name", [name for name in ALL_MODELS if "value_dim" not in stays(name)])
def test_narrow_values_make_the_cache_smaller_and_generation_the_same(name: str) -> None:
    model = narrowed(ALL_MODELS[name]())
    with torch.no_grad():
        output = model(tokens(), use_cache=True)
        layer = next(each for each in output.past_key_values.layers if isinstance(each, DynamicLayer))
        step = model(tokens(2, 1), cache=output.past_key_values).logits
        whole = model(torch.cat([tokens(), tokens(2, 1)], 1), use_cache=False).logits[:, -1:]
    # The cache of latent attention holds the vectors that keys and values are made from.
    latent = ARCHITECTURES[name].latent is not None
    assert latent or layer.values.shape[-1] == layer.keys.shape[-1] // 2
    assert (step - whole).abs().max() <= 1e-5 * whole.abs().max()


@pytest.mark.parametrize("name", ALL_MODELS)
def test_a_narrow_model_trains(name: str) -> None:
    model = narrowed(ALL_MODELS[name]()).train()
    model(tokens(), labels=tokens()).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


def test_an_unknown_architecture_lists_the_known_ones() -> None:
    model = BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=2, vocab_size=64))
    with pytest.raises(InputError, match=r"'bloom' is not known.*llama, .*lacks self_attention"):
        Decoder(model)


def test_a_layer_that_is_not_plain_linear_is_refused() -> None:
    model = tiny_llama()
    model.model.layers[0].mlp.down_proj = torch.nn.Sequential(model.model.layers[0].mlp.down_proj)
    with pytest.raises(InputError, match=r"mlp.down_proj is a Sequential, not a plain linear layer"):
        Decoder(model)


def test_a_weight_that_is_computed_in_each_forward_pass_is_refused() -> None:
    """It would be computed again from its parts, without the pruning."""
    model = tiny_llama()
    torch.nn.utils.prune.l1_unstructured(model.model.layers[1].mlp.down_proj, "weight", 0.3)
    with pytest.raises(InputError, match=r"the weight of mlp.down_proj is computed in each forward pass"):
        Decoder(model)
    torch.nn.utils.prune.remove(model.model.layers[1].mlp.down_proj, "weight")
    Decoder(model)


@pytest.mark.parametrize("name", ALL_MODELS)
def test_the_data_of_an_architecture_agrees_with_the_model(name: str) -> None:
    model = ALL_MODELS[name]()
    decoder = Decoder(model)
    stock = ALL_MODELS[name]().get_submodule(decoder.architecture.blocks)
    conv = {path for block in stock for path, module in block.named_modules() if isinstance(module, Conv1D)}
    parts = [part for block in decoder.blocks for part in block.named_modules()]
    linear = {path for path, module in parts if isinstance(module, torch.nn.Linear)}
    architecture = architecture_of(model.config)
    # One scales what it makes for a token as a router does, and is as little pruned.
    assert set(architecture.layers) == linear - {"mlp.shared_expert_gate"}
    assert set(architecture.transposed) == conv
    # The stages are the order of the forward pass, and layers of one stage read the very same tensor.
    found: list[list[tuple[str, int]]] = [[] for _ in decoder.blocks]
    for block, seen in enumerate(found):
        for path in decoder.paths(block):
            decoder.layer(block, path).register_forward_pre_hook(
                lambda module, args, path=path, seen=seen: seen.append((path, args[0].data_ptr()))
            )
    with torch.no_grad():
        model(tokens())
    for seen in found:
        assert sorted(seen, key=lambda entry: architecture.stage_of(entry[0])) == seen
        for stage in architecture.stages:
            for place in {path.rpartition(".")[0] for path, _ in seen if path in stage}:
                inside = {pointer for path, pointer in seen if path in stage and path.rpartition(".")[0] == place}
                assert len(inside) == 1
                assert len({architecture.taps[path] for path in stage if path.rpartition(".")[0] == place}) == 1
    assert {path for seen in found for path, _ in seen} == set(architecture.layers)
