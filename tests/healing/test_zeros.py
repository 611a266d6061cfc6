"""Masks: zeros stay zeros, bit for bit, however a model is trained, and an adapter's merge leaves them alone."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer, TrainingArguments

import optprune
from optprune.errors import InputError
from optprune.healing import KeepZeros, Masks, keep_zeros, masks
from tests.helpers.tiny_models import tiny_llama, tiny_opt
from tests.helpers.token_batches import batches
from tests.helpers.trained_tiny import halved

OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adamw": lambda weights: torch.optim.AdamW(weights, lr=1e-2, weight_decay=0.3),
    "adam, with decay as a penalty": lambda weights: torch.optim.Adam(weights, lr=1e-2, weight_decay=0.3, amsgrad=True),
    "sgd": lambda weights: torch.optim.SGD(weights, lr=1e-2, momentum=0.9, nesterov=True, weight_decay=0.3),
}


def bits_are_zero(weight: Tensor, kept: Tensor) -> bool:
    """Whether every number outside the mask is +0, by its bits, and every number inside is another."""
    bits = weight.detach().view(torch.int32)
    return not bool(bits[~kept].any()) and bool(bits[kept].all())


def kept_of(model: PreTrainedModel) -> dict[str, Tensor]:
    """What is not zero in the linear weights of the blocks, without the code under test."""
    return {
        name: weight.detach() != 0
        for name, weight in model.named_parameters()
        if "layers" in name and weight.ndim == 2 and bool((weight == 0).any())
    }


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> None:
    for ids in batches(steps):
        optimizer.zero_grad()
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()


@pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_zeros_stay_zeros_in_weights_and_momentum(make: Callable[..., torch.optim.Optimizer]) -> None:
    model = halved(tiny_llama())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight[3] = -0.0  # a unit that is zero as a whole, and with the wrong sign
    before, kept = copy.deepcopy(model), kept_of(model)
    optimizer = make(model.parameters())
    handle = keep_zeros(optimizer, masks(model))
    train(model, optimizer)
    for name, weight in model.named_parameters():
        assert not torch.equal(weight, before.get_parameter(name)), f"{name} was not trained"
        if name in kept:
            assert bits_are_zero(weight, kept[name]), name
            moments = [value for value in optimizer.state[weight].values() if value.shape == weight.shape]
            assert moments and not any(value.view(torch.int32)[~kept[name]].any() for value in moments), name
    handle.remove()
    train(model, optimizer, 1)
    assert not any(bits_are_zero(model.get_parameter(name), mask) for name, mask in kept.items())


def test_momentum_from_before_the_masks_is_cleared_at_once() -> None:
    """An optimizer that has trained the dense model would push the zeros on, and its momentum is told of."""
    model = tiny_llama()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, 1)
    kept = kept_of(halved(model))
    keep_zeros(optimizer, masks(model))
    for name, mask in kept.items():
        for value in optimizer.state[model.get_parameter(name)].values():
            assert value.shape != mask.shape or not bool(value[~mask].any()), name
            assert value.shape != mask.shape or bool(value[mask].any()), name


def test_masks_are_of_the_matrices_that_hold_zeros() -> None:
    model = tiny_opt()
    with torch.no_grad():
        model.model.decoder.layers[1].fc1.weight[:, :16] = 0
        model.model.decoder.layers[1].fc1.bias[:] = 0  # no matrix
        model.model.decoder.embed_tokens.weight[0] = 0  # not in the blocks
    found = optprune.masks(model)
    assert found.shares == {"model.decoder.layers.1.fc1.weight": 0.25}
    assert found.zeros == 128 * 16
    assert str(found) == "1 matrix with zeros: 2048 of their 8192 weights (25.00%)"


def test_a_dense_model_has_no_masks_and_is_trained_as_ever() -> None:
    model = tiny_llama()
    found = masks(model)
    assert not found.kept
    keep_zeros(torch.optim.SGD(model.parameters(), lr=1.0), found)


def test_zeros_that_were_filled_are_told_and_put_back() -> None:
    model, other = halved(tiny_llama()), halved(tiny_llama())
    found = masks(model)
    found.check()
    found.check(other)
    with torch.no_grad():
        weight = other.model.layers[1].mlp.down_proj.weight
        weight.view(-1)[(weight == 0).view(-1).nonzero()[:3]] = 1e-30
    with pytest.raises(
        InputError,
        match=r"^model.layers.1.mlp.down_proj.weight has 3 nonzero weights where its mask is zero: train with",
    ):
        found.check(other)
    found.apply(other)
    found.check(other)
    with pytest.raises(InputError, match=r"self_attn.q_proj.weight is \[32, 64\], but its mask is \[64, 64\]"):
        found.check(tiny_llama(num_attention_heads=2, num_key_value_heads=2, head_dim=16))
    with pytest.raises(InputError, match=r"model.layers.1.self_attn.q_proj.weight is missing"):
        found.apply(tiny_llama(num_hidden_layers=1))


def test_the_optimizer_inside_that_of_accelerate_is_the_one_that_steps() -> None:
    model = halved(tiny_llama())
    kept = kept_of(model)
    optimizer = Accelerator(cpu=True).prepare(torch.optim.AdamW(model.parameters(), lr=1e-2))
    keep_zeros(optimizer, masks(model))
    train(model, optimizer)
    assert all(bits_are_zero(model.get_parameter(name), mask) for name, mask in kept.items())


def test_an_optimizer_of_other_weights_is_refused() -> None:
    found = masks(halved(tiny_llama()))
    with pytest.raises(InputError, match="the optimizer holds none of the masked weights"):
        keep_zeros(torch.optim.AdamW(tiny_llama().parameters()), found)


class Windows(torch.utils.data.Dataset):
    """What the Trainer trains on."""

    def __init__(self) -> None:
        self.rows = torch.cat(batches())

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def by_trainer(model: nn.Module, folder: Any, *callbacks: KeepZeros) -> None:
    arguments = TrainingArguments(
        str(folder), max_steps=3, per_device_train_batch_size=2, learning_rate=1e-2, weight_decay=0.1,
        report_to=[], save_strategy="no", disable_tqdm=True, logging_strategy="no", use_cpu=True,
        dataloader_pin_memory=False,
    )  # fmt: skip
    Trainer(model, arguments, train_dataset=Windows(), callbacks=list(callbacks)).train()


def test_the_trainer_keeps_zeros_by_the_callback_and_not_without(tmp_path: Any) -> None:
    model = halved(tiny_llama())
    other, kept = copy.deepcopy(model), kept_of(model)
    by_trainer(model, tmp_path, KeepZeros(masks(model)))
    assert all(bits_are_zero(model.get_parameter(name), mask) for name, mask in kept.items())
    by_trainer(other, tmp_path)
    assert not any(bits_are_zero(other.get_parameter(name), mask) for name, mask in kept.items())


def adapted() -> tuple[Masks, Any]:
    """A pruned model with an adapter that has learned something, and its masks."""
    model = halved(tiny_llama())
    found = masks(model)
    torch.manual_seed(0)
    peft_model: Any = get_peft_model(
        model, LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    return found, peft_model


def test_a_merge_leaves_zeros_and_a_plain_one_is_told() -> None:
    kept = kept_of(halved(tiny_llama()))
    plain, merged = (
        make(*adapted()) for make in (lambda _, own: own.merge_and_unload(), lambda own, other: own.merge(other))
    )
    for name, weight in merged.named_parameters():
        expected = plain.get_parameter(name)
        assert torch.equal(weight, torch.where(kept[name], expected, 0.0) if name in kept else expected), name
        assert name not in kept or bits_are_zero(weight, kept[name])
    with pytest.raises(
        InputError, match=r"model.layers.0.self_attn.q_proj.weight has .* where its mask is zero, and so do 3"
    ):
        adapted()[0].check(plain)


def test_what_has_no_adapter_or_one_around_it_is_refused() -> None:
    found, peft_model = adapted()
    with pytest.raises(InputError, match="a LlamaForCausalLM is not a peft model"):
        found.merge(tiny_llama())
    with pytest.raises(InputError, match="a PeftModel is not a transformers model"):
        masks(peft_model)
    with pytest.raises(InputError, match="the optimizer holds none"):
        keep_zeros(torch.optim.AdamW(w for w in peft_model.parameters() if w.requires_grad), found)
