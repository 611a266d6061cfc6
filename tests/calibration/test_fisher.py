"""The Fisher information of layer outputs: against autograd's Jacobian, against one backward pass through the model."""

import sys
import weakref
from itertools import product

import pytest
import torch
from torch import nn

from optprune.calibration import collect_metrics, fisher_pass, from_text, sampled
from optprune.calibration.fisher_pass import NO_LABEL, next_tokens
from optprune.calibration.partial_sums import PartialSums
from optprune.errors import InputError, NumericalError
from optprune.models import Decoder, load_model, open_model
from tests.helpers.faults import noticed
from tests.helpers.thread_peers import together
from tests.helpers.tiny_models import ALL_MODELS, VARIANTS, by_variant, tiny_llama, tiny_opt, tiny_qwen2

EVERY = VARIANTS | ALL_MODELS
SMALL = {"hidden_size": 8, "num_attention_heads": 2, "vocab_size": 3, "pad_token_id": 0}


def tokens(batch: int = 3, length: int = 10, vocabulary: int = 500) -> torch.Tensor:
    return torch.randint(0, vocabulary, (batch, length), generator=torch.Generator().manual_seed(1))


def gradients_of_the_whole_model(decoder, ids, labels):
    """g at every linear layer's output, from one graph of the whole model: by name, [tokens, out]."""
    outputs, handles = {}, []
    for index in range(len(decoder.blocks)):
        for path in decoder.paths(index):

            def keep(_, __, output, index=index, path=path):
                outputs[decoder.name(index, path)] = output

            handles.append(decoder.layer(index, path).register_forward_hook(keep))
    logits = decoder.model(input_ids=ids).logits
    for handle in handles:
        handle.remove()
    wanted = labels(logits.detach().flatten(0, 1), next_tokens(ids).flatten()).reshape(ids.shape)
    counts = wanted != NO_LABEL
    loss = -logits.log_softmax(-1).gather(2, wanted.clamp(min=0)[..., None])[..., 0][counts].sum()
    found = torch.autograd.grad(loss, list(outputs.values()))
    return {name: g.reshape(-1, g.shape[-1]) for name, g in zip(outputs, found, strict=True)}


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY)
@pytest.mark.parametrize("labels", [lambda: sampled(3), lambda: from_text], ids=["sampled", "of the text"])
def test_block_by_block_equals_one_pass_through_the_model(make, labels):
    decoder, ids = Decoder(make().double()), tokens()
    consumer = decoder.architecture.mlp_consumer or decoder.architecture.layers[-1]  # one of an expert
    found = collect_metrics(decoder, [ids], labels(), full=[consumer])
    expected = gradients_of_the_whole_model(decoder, ids, labels())
    assert set(found) == set(expected)
    # A stock class that gives float32 logits has rounded them.
    rounding = 1e-9 if decoder.model(input_ids=ids).logits.dtype == torch.float64 else 1e-6
    for name, g in expected.items():
        average = g.T @ g / len(g)
        full = name.endswith(consumer)
        assert found[name].full == full
        assert found[name].tokens == len(g)  # of an expert those that are sent to it
        assert len(g) == ids.numel() or ".experts." in name
        apart = found[name].average - (average if full else average.diagonal())
        assert apart.abs().max() <= rounding * average.abs().max()


@pytest.mark.parametrize("make", [tiny_llama, tiny_opt, tiny_qwen2])
def test_the_mean_over_labels_is_the_fisher_information(make):
    """sum_y p(y) S(y) over every sequence of labels is the mean over tokens of J^T (diag(p) - p p^T) J."""
    decoder = Decoder(make(**SMALL, **({"word_embed_proj_dim": 8} if make is tiny_opt else {})).double())
    ids = tokens(1, 3, 3)
    with torch.no_grad():
        probabilities = decoder.model(input_ids=ids).logits.softmax(-1)[0]
    layers = decoder.architecture.layers
    mean = {}
    for choice in product(range(3), repeat=3):
        wanted = torch.tensor([choice])
        chance = float(probabilities.gather(1, wanted.T).prod())
        for name, metric in collect_metrics(decoder, [ids], lambda _, __, y=wanted[0]: y, full=layers).items():
            mean[name] = mean.get(name, 0) + chance * metric.average
    for index, path in product(range(2), layers):
        layer = decoder.layer(index, path)

        def logits(offset, layer=layer):
            handle = layer.register_forward_hook(lambda _, __, output: output + offset)
            try:
                return decoder.model(input_ids=ids).logits[0]
            finally:
                handle.remove()

        zero = torch.zeros(1, 3, layer.out_features, dtype=torch.float64)
        slope = torch.autograd.functional.jacobian(logits, zero)[:, :, 0]  # [prediction, label, token, out]
        spread = torch.diag_embed(probabilities) - probabilities[:, :, None] * probabilities[:, None, :]
        exact = torch.einsum("pasi,pab,pbsj->ij", slope, spread, slope) / 3
        # The norms of Llama and Qwen2 compute in float32 whatever the model's dtype.
        digits = 1e-9 if make is tiny_opt else 1e-5
        error = (mean[decoder.name(index, path)] - exact).abs().max()
        assert float(error) <= digits * float(exact.abs().max())


def test_errors_that_are_independent_from_token_to_token_cost_what_the_metric_says():
    decoder = Decoder(tiny_opt(**SMALL, word_embed_proj_dim=8).double())
    ids, draws, size = tokens(1, 3, 3), 2000, 1e-3
    layer, name = decoder.layer(0, "fc1"), decoder.name(0, "fc1")
    with torch.no_grad():
        plain = decoder.model(input_ids=ids).logits.log_softmax(-1)[0]
    average = 0
    for choice in torch.cartesian_prod(*[torch.arange(3)] * 3):
        chance = float(plain.exp().gather(1, choice[:, None]).prod())
        metric = collect_metrics(decoder, [ids], lambda _, __, y=choice: y, full=["fc1"])[name]
        average = average + chance * metric.average
    generator = torch.Generator().manual_seed(0)
    errors = size * torch.randn(draws * 3, layer.out_features, generator=generator, dtype=torch.float64)
    handle = layer.register_forward_hook(lambda _, __, output: output + errors.reshape(output.shape))
    with torch.no_grad():
        changed = decoder.model(input_ids=ids.expand(draws, -1)).logits.log_softmax(-1)
    handle.remove()
    costs = (plain.exp() * (plain - changed)).sum((1, 2)) / 3
    # Within four standard errors.
    assert abs(float(costs.mean()) - size**2 * float(average.trace()) / 2) < 4 * float(costs.std()) / draws**0.5


def test_labels_follow_the_predictions():
    logits = torch.tensor([0.5, -1.0, 2.0, -torch.inf, 0.0])
    draws = 20000
    drawn = sampled(0)(logits.expand(draws, 5), torch.zeros(draws))
    expected = logits.softmax(0) * draws
    counts = torch.bincount(drawn, minlength=5)
    assert counts[3] == 0
    # Five standard deviations of a binomial count.
    assert bool(((counts - expected).abs() <= 5 * (expected * (1 - expected / draws)).sqrt()).all())


def test_labels_of_the_text_are_the_next_tokens():
    following = next_tokens(torch.tensor([[4, 5, 6]]))
    assert from_text(torch.zeros(1, 3, 7), following).tolist() == [[5, 6, NO_LABEL]]


def test_a_seed_reproduces_and_another_does_not():
    decoder = Decoder(tiny_llama())
    first, second, other = (collect_metrics(decoder, [tokens()], sampled(seed)) for seed in (0, 0, 1))
    for name in first:
        assert torch.equal(first[name].average, second[name].average)
        assert not torch.equal(first[name].average, other[name].average)


def test_batches_may_be_cut_in_any_way(monkeypatch):
    decoder, ids = Decoder(tiny_llama().double()), tokens(4)
    whole = collect_metrics(decoder, [ids], sampled(0))
    monkeypatch.setattr("optprune.calibration.fisher_pass.TOKENS_AT_ONCE", 20)
    monkeypatch.setattr("optprune.calibration.fisher_pass.POSITIONS_AT_ONCE", 7)
    for name, metric in collect_metrics(decoder, list(ids.split(3)), sampled(0)).items():
        assert metric.tokens == whole[name].tokens
        assert torch.allclose(metric.average, whole[name].average, rtol=1e-10)


@pytest.mark.parametrize("batch", [1, 3, 4])
def test_long_gradients_are_shortened_sequence_by_sequence(batch, monkeypatch):
    decoder, ids, clip = Decoder(tiny_llama().double()), tokens(4), 0.8
    layers = decoder.architecture.layers
    monkeypatch.setattr("optprune.calibration.fisher_pass.TOKENS_AT_ONCE", 20)
    found = collect_metrics(decoder, list(ids.split(batch)), sampled(3), full=layers, clip=clip)
    for name, g in gradients_of_the_whole_model(decoder, ids, sampled(3)).items():
        shorter = []
        for sequence in g.reshape(*ids.shape, -1):
            norms = sequence.norm(dim=1)
            limit = clip * norms[norms > 0].quantile(0.5)
            shorter.append(sequence * torch.where(norms > limit, limit / norms, 1)[:, None])
        kept = torch.cat(shorter)
        expected = kept.T @ kept / len(g)
        assert (found[name].average - expected).abs().max() <= 1e-9 * expected.abs().max()
        assert expected.trace() < 0.9 * (g.T @ g / len(g)).trace()


@pytest.mark.parametrize("trainable", [True, False])
def test_the_model_is_left_as_it_was(trainable):
    model = tiny_llama().requires_grad_(trainable).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    collect_metrics(Decoder(model), [tokens()], sampled(0))
    assert model.training
    assert torch.is_grad_enabled()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(parameter.requires_grad == trainable for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def peak_of_saved_activations(blocks: int) -> int:
    """The largest number of bytes that graphs held at any one time, without parameters."""
    model = tiny_llama(num_hidden_layers=blocks)
    parameters = {parameter.data_ptr() for parameter in model.parameters()}
    live, peak = 0, 0

    class Saved:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def free(size: int) -> None:
        nonlocal live
        live -= size

    def pack(tensor: torch.Tensor) -> Saved:
        nonlocal live, peak
        saved = Saved(tensor)
        size = 0 if tensor.data_ptr() in parameters else tensor.numel() * tensor.element_size()
        weakref.finalize(saved, free, size)
        live += size
        peak = max(peak, live)
        return saved

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved.tensor):
        collect_metrics(Decoder(model), [tokens()], sampled(0))
    return peak


def test_the_activations_of_one_block_are_kept_however_many_there_are():
    assert 0 < peak_of_saved_activations(6) <= peak_of_saved_activations(1)


def test_a_process_without_batches_has_the_metrics_of_all():
    """There are more processes than batches."""
    expected = collect_metrics(Decoder(tiny_llama()), [tokens()], sampled(0))

    def shared(peers):
        return collect_metrics(Decoder(tiny_llama()), [tokens()], sampled(0), partial_sums=PartialSums(2, peers))

    for found in together(2, shared):
        assert sorted(found) == sorted(expected)
        assert all(torch.equal(found[name].average, expected[name].average) for name in expected)


def test_layers_that_are_too_wide_get_the_diagonal():
    decoder = Decoder(tiny_llama())
    layers = decoder.architecture.layers
    width = decoder.layer(0, "self_attn.q_proj").out_features
    whole = collect_metrics(decoder, [tokens()], sampled(0), full=layers)
    cut = collect_metrics(decoder, [tokens()], sampled(0), full=layers, widest=width)
    wider = [name for name, metric in whole.items() if metric.width > width]
    assert cut.diagonal_only() == wider
    assert {name.split(".")[-1] for name in wider} == {"gate_proj", "up_proj"}
    for name, metric in cut.items():
        expected = whole[name].only_diagonal() if name in wider else whole[name]
        assert torch.equal(metric.average, expected.average)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@by_variant
def test_in_half_precision_it_is_that_of_the_same_weights_in_float32(make, dtype, tmp_path):
    make().to(dtype).save_pretrained(tmp_path)
    layers = Decoder(make()).architecture.layers
    expected = collect_metrics(load_model(tmp_path, dtype="float32").decoder(), [tokens()], sampled(0), full=layers)
    for loaded in (load_model(tmp_path), open_model(tmp_path)):
        found = collect_metrics(loaded.decoder(), [tokens()], sampled(0), full=layers)
        assert found.keys() == expected.keys()
        assert all(torch.equal(metric.average, expected[name].average) for name, metric in found.items())
        assert {weight.dtype for weight in loaded.model.parameters()} == {dtype}


def test_what_is_refused():
    decoder = Decoder(tiny_llama())
    with pytest.raises(InputError, match="no batches"):
        collect_metrics(decoder, [], sampled(0))
    with pytest.raises(InputError, match=r"mlp\.up"):
        collect_metrics(decoder, [tokens()], sampled(0), full=["mlp.up"])
    damaged = tiny_llama()
    nn.init.constant_(damaged.lm_head.weight, torch.nan)
    with pytest.raises(NumericalError, match="NaN"):
        collect_metrics(Decoder(damaged), [tokens()], sampled(0))


# -- faults planted

backward = fisher_pass._backward


def gradients_of_inputs(decoder, index, hidden, arguments, gradient):
    """The gradient that goes on to the block before is not that of the block's input."""
    found, _ = backward(decoder, index, hidden, arguments, gradient)
    return found, gradient


def most_likely(seed):
    return lambda logits, ids: logits.argmax(-1)


def test_a_gradient_that_is_not_passed_on_is_noticed(monkeypatch):
    def check():
        test_block_by_block_equals_one_pass_through_the_model(tiny_llama, lambda: sampled(3))

    noticed(monkeypatch, fisher_pass, "_backward", gradients_of_inputs, check)


def test_labels_that_are_not_drawn_are_noticed(monkeypatch):
    noticed(monkeypatch, sys.modules[__name__], "sampled", most_likely, test_labels_follow_the_predictions)
