"""Expected counts of tokens: how often a model predicts each token behind those of a text."""

import torch
from torch import Tensor

from optprune.measure.evaluate import evaluating
from optprune.models import LoadedModel
from optprune.program.program import VOCABULARY_TOKENS
from optprune.tokens.token_models import Counts


@torch.no_grad()
def expected_counts(loaded: LoadedModel, windows: Tensor) -> Counts:
    """Return how often a model expects each of its tokens [rows] behind the tokens of windows of ids [n, length].

    These are sums of probabilities, so that tokens which the windows lack have counts too.
    """
    model, total = loaded.model, None
    with evaluating(model), loaded.decoder().running():
        for batch in windows.split(max(1, VOCABULARY_TOKENS // windows.shape[1])):
            logits = model(input_ids=batch.to(model.device), use_cache=False).logits
            found = logits.float().softmax(-1).sum((0, 1), dtype=torch.float64).cpu()
            total = found if total is None else total + found
    assert total is not None
    return total.numpy()
