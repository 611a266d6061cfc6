"""The divergence of two distributions against scipy's, and faults that this must notice."""

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, rel_entr
from torch import Tensor

from optprune.numerics.tensors import divergence_terms

LOGITS = torch.randn(2, 5, 400, generator=torch.Generator().manual_seed(0)) * 3


def by_scipy(log_p: Tensor, log_q: Tensor) -> np.ndarray:
    p, q = (np.exp(log_softmax(x.double().numpy(), axis=-1)) for x in (log_p, log_q))
    return rel_entr(p, q)


def test_the_terms_are_those_of_scipy() -> None:
    log_p, log_q = LOGITS.log_softmax(-1)
    found, expected = divergence_terms(log_p, log_q), by_scipy(*LOGITS)
    # Logarithms up to 32 are rounded to half a unit in the last place of 24 bits, their difference twice.
    assert np.abs(found.double().numpy() - expected).max() <= 4 * 32 * 2.0**-24
    rows = found.sum(-1, dtype=torch.float64).tolist()
    assert rows == pytest.approx(expected.sum(-1).tolist(), abs=4 * 32 * 2.0**-24)


def test_it_is_nothing_between_the_same_and_not_the_same_both_ways() -> None:
    log_p, log_q = LOGITS.log_softmax(-1)
    assert not divergence_terms(log_p, log_p).any()
    there, back = (divergence_terms(*pair).sum(-1) for pair in ((log_p, log_q), (log_q, log_p)))
    assert (there > 0.1).all() and ((there - back).abs() > 0.1).any()
