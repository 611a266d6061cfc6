"""Every architecture: the walk block by block, whole runs, recovery, the folders, and what healing reads."""

from pathlib import Path

import pytest
import torch

import optprune
from optprune.errors import InputError
from optprune.export import save_model
from optprune.healing.distillation import Reader
from optprune.models import ARCHITECTURES, Decoder, open_model
from optprune.models.checkpoint import Checkpoint
from optprune.pruning import prune
from optprune.recipe import load_recipe
from tests.helpers.programs import program_of
from tests.helpers.streams import logits_block_by_block
from tests.helpers.tiny_models import ALL_MODELS, TINY_MODELS
from tests.helpers.token_batches import batches

TOKENS = torch.arange(10, 58)[None]
OTHERS = [name for name in ALL_MODELS if name not in TINY_MODELS]
by_family = pytest.mark.parametrize("name", OTHERS)


@pytest.mark.parametrize(
    ("name", "attention"),
    # The soft caps of Gemma 2 and the sinks of GPT-OSS are in no other attention.
    [
        (name, kind)
        for name in ALL_MODELS
        for kind in ("sdpa", "eager")
        if (name in ("gemma2", "gpt_oss")) <= (kind == "eager")
    ],
)
def test_a_pass_block_by_block_gives_the_models_own_logits(name: str, attention: str, tmp_path: Path) -> None:
    """Each block gets its own mask and its own rotary embeddings, and the head its scales and caps."""
    model = ALL_MODELS[name](num_hidden_layers=4)
    model.set_attn_implementation(attention)
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        stock = model(TOKENS, use_cache=False).logits
        decoder = Decoder(model)
        expected = model(TOKENS, use_cache=False).logits
    if decoder.architecture.mixture is None:
        assert torch.equal(expected, stock)
    else:  # one by one, experts add up in another order
        assert (expected - stock).abs().max() <= 1e-5 * stock.abs().max()
    assert torch.equal(logits_block_by_block(decoder, TOKENS), expected)
    opened = open_model(tmp_path)
    opened.model.set_attn_implementation(attention)
    assert torch.equal(logits_block_by_block(opened.decoder(), TOKENS), expected)


@by_family
def test_healing_reads_the_models_own_logits(name: str) -> None:
    model = ALL_MODELS[name]()
    reader = Reader(model, lambda: torch.autocast("cpu", enabled=False))
    reader.check(TOKENS)
    with torch.no_grad():
        found, expected = reader.log_probabilities(reader.hidden(TOKENS)), model(TOKENS).logits.log_softmax(-1)
    assert torch.equal(found, expected)


RUNS = {
    "value dimensions and MLP units": ("fasp", {"refit.recovery": 1, "refit.held_out": 0.25, "sparsity": 0.2}),
    "a budget over all blocks": (
        "structured_best",
        {"refit.held_out": 0.25, "sparsity": 0.2, "allocation.multiple": 1},
    ),
    "single weights in a metric": ("sparse_best", {"units.weights": "2:4", "sparsity": 0.4}),
    "sub-blocks": ("depth", {"sparsity": 0.3}),
}


WITH_EXPERTS = {
    "value dimensions and MLP units": RUNS["value dimensions and MLP units"],
    "single weights, on two paths": ("sparsegpt", {"propagation": "cross", "sparsity": 0.5}),
    "a budget over all blocks": ("structured_best", {"refit.held_out": 0.25, "sparsity": 0.2}),
    "single weights in a metric": RUNS["single weights in a metric"],
    "sub-blocks": ("depth", {"sparsity": 0.4}),
}
FEW = ("gemma3_text", "olmo2", "qwen2_moe")
"""the families whose blocks are least alike Llama's"""


def runs_of(name: str) -> dict[str, tuple[str, dict]]:
    """The runs of a family, few of those that are like another."""
    runs = RUNS if ARCHITECTURES[name].mixture is None else WITH_EXPERTS
    return dict(list(runs.items())[: None if name in FEW else 2])


@pytest.mark.e2e
@pytest.mark.parametrize(("name", "run"), [(name, run) for name in OTHERS for run in runs_of(name)])
def test_a_run_leaves_a_folder_that_answers_as_the_model_does(name: str, run: str, tmp_path: Path) -> None:
    model = ALL_MODELS[name](num_hidden_layers=3)
    before = Decoder(model).linear_weights()
    recipe, settings = runs_of(name)[run]
    if "value_dim" in ARCHITECTURES[name].indivisible and recipe in ("fasp", "structured_best"):
        settings = {"units": "mlp", **settings}
    report = prune(model, batches(), load_recipe(recipe, settings))
    decoder = Decoder(model)
    zeros = sum(
        int((decoder.layer(block, path).weight == 0).sum())
        for block in range(len(decoder.blocks))
        for path in decoder.paths(block)
    )
    assert report.sparsity_reached == pytest.approx(1 - (decoder.linear_weights() - zeros) / before)
    assert report.sparsity_reached == pytest.approx(settings["sparsity"], abs=0.07)
    places = [{path for path, _ in block.named_modules()} for block in decoder.blocks]
    affine = sum(place.issuperset(layers) for place in places for _, layers in decoder.architecture.recoverable)
    recovered = "refit.recovery" in settings
    assert len(report.recovered) == (affine if recovered else 0)
    assert any("recovery has nothing to refit" in note for note in report.notes) == (affine == 0 and recovered)
    for part in report.recovered:
        assert part.held_out_after <= part.held_out_before
    save_model(model, tmp_path / "out")
    # Under the names that transformers writes.
    model.save_pretrained(tmp_path / "theirs")
    ours, theirs = (Checkpoint.open(tmp_path / folder).tensors.keys() for folder in ("out", "theirs"))
    assert ours == theirs
    with torch.no_grad():
        assert torch.equal(
            optprune.load_model(tmp_path / "out", device="cpu").model(TOKENS).logits, model(TOKENS).logits
        )


@pytest.mark.parametrize("settings", [{}, {"allocation": "global"}], ids=str)
def test_heads_under_one_norm_are_refused_before_anything_is_computed(settings: dict) -> None:
    decoder = Decoder(ALL_MODELS["olmo2"]().to("meta"))  # type: ignore[arg-type]
    sentence = "units kv-groups remove kv_heads, but olmo2 models must keep all or none of them: one norm"
    with pytest.raises(InputError, match=sentence):
        program_of("osscar", decoder=decoder, fields={"units": "kv-groups", **settings})


def test_an_allocation_that_narrows_heads_under_one_norm_is_refused() -> None:
    decoder = Decoder(ALL_MODELS["olmo2"]())
    shapes = decoder.shapes()
    whole, narrow = ({"mlp_width": 128, "kv_heads": heads, "value_dim": 16} for heads in (2, 1))
    assert shapes[0].kv_heads == 2
    allocation = optprune.Allocation.from_dict({"sparsity": 0.1, "blocks": [whole, narrow]})
    with pytest.raises(InputError, match="keeps kv_heads 1 in block 1, which has 2, but olmo2 models"):
        prune(decoder.model, batches(), load_recipe("fasp"), allocation=allocation)
