"""Models in half precision whose parts compute in float32, one at a time, and are restored exactly."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from optprune.calibration import first_inputs
from optprune.calibration.stream import calibrating, run_block
from optprune.models import Decoder, load_model, open_model
from optprune.models.surgery import parameters_in
from tests.helpers.tiny_models import by_variant, tiny_llama, tiny_opt

IDS = torch.arange(24).reshape(2, 12)
HALVES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def logits(decoder: Decoder) -> Tensor:
    """Return the logits of a decoder, computed one part at a time."""
    with calibrating(decoder):
        stream = first_inputs(decoder, [IDS])
        for index in range(len(decoder.blocks)):
            with decoder.resident(index) as block:
                stream.past([run_block(block, stream.hidden[0], stream.arguments[0])[1]])
        with decoder.head_in_dtype():
            return decoder.logits(stream.hidden[0])


def bits(model: PreTrainedModel) -> dict[str, Tensor]:
    return {name: weight.detach().clone().view(torch.uint8) for name, weight in model.named_parameters()}


@contextmanager
def one_block_in_float32(model: PreTrainedModel, decoder: Decoder) -> Iterator[set[int]]:
    """Check that while a linear layer of a block runs, nothing outside that block is in float32."""
    seen, blocks = set[int](), list(decoder.blocks)

    def look(index: int) -> None:
        wide = [i for i, block in enumerate(blocks) if any(w.dtype == torch.float32 for w in block.parameters())]
        assert wide == [index]
        around = [model.get_input_embeddings(), model.get_output_embeddings()]
        assert all(weight.dtype == model.dtype != torch.float32 for module in around for weight in module.parameters())
        seen.add(index)

    handles = [
        module.register_forward_pre_hook(lambda *_, index=index: look(index))
        for index, block in enumerate(blocks)
        for module in block.modules()
        if isinstance(module, nn.Linear)
    ]
    yield seen
    for handle in handles:
        handle.remove()


@HALVES
@by_variant
def test_the_logits_are_those_of_the_same_weights_in_float32(make, dtype: torch.dtype, tmp_path: Path) -> None:
    make().to(dtype).save_pretrained(tmp_path)
    expected = logits(load_model(tmp_path, dtype="float32").decoder())
    for loaded in (load_model(tmp_path), open_model(tmp_path)):
        before = bits(loaded.model) if loaded.store is None else {}
        with one_block_in_float32(loaded.model, loaded.decoder()) as seen:
            assert torch.equal(logits(loaded.decoder().precise()), expected)
        assert seen == set(range(len(loaded.decoder().blocks)))
        assert loaded.model.dtype == dtype
        assert loaded.store is not None or all(torch.equal(value, before[n]) for n, value in bits(loaded.model).items())
        # In its own dtype it computes as before.
        assert logits(loaded.decoder()).dtype == dtype


def test_every_number_of_half_precision_comes_back() -> None:
    every = torch.arange(-(2**15), 2**15).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        layer = nn.Linear(2**16, 1, bias=False, dtype=dtype)
        numbers = every.view(dtype)
        finite = numbers[~numbers.isnan()]
        layer.weight = nn.Parameter(finite[None].clone())
        parameter = layer.weight
        with parameters_in(torch.float32, layer), parameters_in(torch.float32, layer):
            assert layer.weight.dtype == torch.float32
        assert layer.weight is parameter
        assert torch.equal(parameter[0].view(torch.int16), finite.view(torch.int16))


def test_what_became_of_a_block_is_rounded_whatever_ended_it(tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    decoder, wanted = Decoder(model).precise(), torch.full((64, 128), 1.0 + 2**-12)
    with pytest.raises(ValueError, match="halfway"), decoder.resident(0), decoder.resident(0):
        layer = decoder.layer(0, "mlp.down_proj")
        layer.weight.data.copy_(wanted)
        assert torch.equal(layer.weight, wanted)
        raise ValueError("halfway")
    assert torch.equal(layer.weight, torch.ones(64, 128).bfloat16())
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}


def test_a_model_with_digits_enough_is_left_alone() -> None:
    for model in (tiny_opt(), tiny_opt().double()):
        decoder = Decoder(model)
        assert decoder.precise() is decoder
    half = Decoder(tiny_opt().half()).precise()
    assert half.precise().computes_in == torch.float32
    assert half.as_stored().computes_in is None
