"""Products of float32 are made in float32, whatever torch was told, and torch is left as it was told."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from optprune import prune
from optprune.metric import OutputMetric
from optprune.moments import InputMoments, MomentSums
from optprune.patterns import Unstructured
from optprune.problems import LayerLoss, SparseLeastSquares
from optprune.recipe import load_recipe
from optprune.solvers import Admm, Chain, ConjugateGradients, Swaps, solve
from tests.helpers.tiny_models import tiny_llama

BACKENDS = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
PRODUCTS = {"mm", "addmm", "addmm_", "bmm", "baddbmm", "mv", "addmv", "dot"}


class Products(TorchDispatchMode):
    """Remembers by what precision the matrices of float32 were multiplied."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket.__name__ in PRODUCTS and args[0].dtype == torch.float32:
            self.seen.add(tuple(backend.fp32_precision for backend in BACKENDS))
        return func(*args, **(kwargs or {}))


def told():
    """All that torch says of the precision of products."""

    def older():
        try:
            return torch.backends.cuda.matmul.allow_tf32, torch.get_float32_matmul_precision()
        except RuntimeError:
            return "mixed"

    return torch.backends.fp32_precision, *(backend.fp32_precision for backend in BACKENDS), older()


@pytest.fixture(params=["newer", "newer, one backend", "older", "older, medium", "none"])
def reduced(request):
    """torch told to use less than float32, by either of its ways."""
    if request.param == "newer":
        torch.backends.fp32_precision = "tf32"
    elif request.param == "newer, one backend":
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    elif request.param.startswith("older"):
        torch.set_float32_matmul_precision("medium" if "medium" in request.param else "high")
    yield
    torch.backends.fp32_precision = "none"
    torch.set_float32_matmul_precision("highest")
    for backend in BACKENDS:
        backend.fp32_precision = "none"


def samples(seed):
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("reduced")
def test_moments_metrics_and_solvers_called_directly_multiply_in_float32():
    before = told()
    with Products() as products:
        moments = InputMoments.from_samples(samples(0), samples(0) + 0.1 * samples(1))
        metric = OutputMetric.from_samples(samples(2)[:, :4])
        loss = LayerLoss.of(samples(3)[:4], moments, 0.01)
        _ = loss.target, loss.pull
        problem = SparseLeastSquares(loss, Unstructured(32))
        solve(problem, Chain((Admm(), ConjugateGradients(), Swaps())))
        solve(SparseLeastSquares(LayerLoss.of(loss.weight, moments, 0.01, metric=metric), Unstructured(32)), Admm())
    assert products.seen == {("ieee", "ieee")}
    assert told() == before


@pytest.mark.usefixtures("reduced")
def test_prune_multiplies_in_float32():
    before, model = told(), tiny_llama()
    batches = [torch.randint(0, model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))]
    with Products() as products:
        prune(model, batches, load_recipe("sparsegpt"))
    assert products.seen == {("ieee", "ieee")}
    assert told() == before


def test_an_error_inside_leaves_torch_as_it_was_told():
    torch.set_float32_matmul_precision("high")
    try:
        before = told()
        with pytest.raises(RuntimeError):
            MomentSums(3, torch.device("cpu")).add(samples(0))
        assert told() == before
    finally:
        torch.set_float32_matmul_precision("highest")
