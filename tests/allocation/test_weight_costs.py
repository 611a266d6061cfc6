"""What single weights cost where a layer sees some of the tokens: an expert those that are sent to it."""

from dataclasses import replace

import pytest
import torch

from optprune.allocation.weight_costs import WeightBudget
from optprune.calibration import DenseStatistics
from optprune.models import Decoder, Target
from optprune.moments import InputMoments
from optprune.patterns import InGroups, InMatrix, PatternFamily
from optprune.problems import LayerLoss
from tests.helpers.tiny_models import tiny_llama


@pytest.mark.parametrize("family", [InMatrix(), InGroups(2, 4)], ids=["shares", "which layers"])
def test_a_loss_of_few_tokens_counts_by_their_share(family: PatternFamily) -> None:
    decoder = Decoder(tiny_llama())
    costs = WeightBudget(family, 0.5, 0.2, 0.8).costs(decoder, DenseStatistics(), None, in_nats=True)
    generator = torch.Generator().manual_seed(0)
    moments = InputMoments.from_samples(torch.randn(60, 8, generator=generator))
    loss = LayerLoss.of(torch.randn(4, 8, generator=generator), moments, damping=0.01)
    few = replace(loss, moments=replace(loss.moments, tokens=15))
    for path, each in (("self_attn.q_proj", loss), ("mlp.up_proj", few)):
        costs.add(0, Target(path, path, family=family), each)
    found = costs.every or {name: curve.errors for name, curve in costs.curves.items()}
    all_tokens, some_tokens = (found[decoder.name(0, path)] for path in ("self_attn.q_proj", "mlp.up_proj"))
    assert all_tokens.max() > 0
    torch.testing.assert_close(some_tokens, all_tokens / 4)
