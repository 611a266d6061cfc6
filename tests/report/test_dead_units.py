"""Dead units: what goes for free hangs on what the activation makes of zero."""

from pathlib import Path

import pytest
import torch

import optprune
from tests.helpers.tiny_models import ALL_MODELS, save_tiny, tiny_opt


@pytest.mark.parametrize(("activation", "rows"), [("relu", (4, 6)), ("gelu", (4, 6)), ("sigmoid", (6,))])
def test_a_unit_without_inputs_is_dead_where_its_activation_keeps_zero(
    activation: str, rows: tuple[int, ...], tmp_path: Path
) -> None:
    """Unit 4 is made of nothing, and sigmoid makes a half of that; unit 6 is read by nothing."""
    model = tiny_opt(activation_function=activation)
    first, second = (getattr(model.model.decoder.layers[0], name) for name in ("fc1", "fc2"))
    first.weight.data[4], first.bias.data[4] = 0, 0
    second.weight.data[:, 6] = 0
    found = optprune.audit(save_tiny(model, tmp_path / "out"))
    assert [(dead.block, dead.units, dead.numbers) for dead in found.dead] == [(0, "mlp", rows)]
    # What is dead may have any other weights on its other side.
    ids = torch.arange(5, 25)[None]
    before = model.eval()(ids).logits
    first.weight.data[6] += 1
    assert torch.equal(model(ids).logits, before)
    second.weight.data[:, 4] += 1
    assert torch.equal(model(ids).logits, before) == (4 in rows)


@pytest.mark.parametrize("architecture", ["gemma2", "gemma3_text"])
def test_the_activation_is_known_under_any_name_of_its_field(architecture: str, tmp_path: Path) -> None:
    model = ALL_MODELS[architecture]()
    model.model.layers[1].mlp.up_proj.weight.data[7] = 0
    found = optprune.audit(save_tiny(model, tmp_path / "out"))
    assert [(dead.block, dead.units, dead.numbers) for dead in found.dead] == [(1, "mlp", (7,))]
