"""The divergence of one distribution over a vocabulary from another."""

from jaxtyping import Float
from torch import Tensor


def divergence_terms(log_p: Float[Tensor, "*rows n"], log_q: Float[Tensor, "*rows n"]) -> Float[Tensor, "*rows n"]:
    """The terms p (log p - log q) of KL(p || q), in nats, of log-probabilities; a row of them comes to it.

    They are to be summed in float64: most of them cancel. Entries of probability zero, -inf in both, are NaN.
    """
    return log_p.exp() * (log_p - log_q)
