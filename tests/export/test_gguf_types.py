"""Types of GGUF files: chosen by llama.cpp's rules, packed by its quantiser, and read there."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType as Kind
from torch import Tensor

import optprune
from optprune.calibration.input_squares import mean_squares
from optprune.cli import main
from optprune.errors import InputError, OptpruneError
from optprune.export import GgufFile, Importance, ModelSource, export, ggml, importance_of
from optprune.export.ggml import BeyondType, packed
from optprune.export.gguf_families import FAMILIES
from optprune.export.gguf_tensors import Tensors
from optprune.export.gguf_types import SMALL_BLOCK, TYPES, Choice, fallback
from optprune.measure import llama_cpp_binding
from optprune.models import Decoder, Mlp
from optprune.objectives import LayerContext
from optprune.texts import demo_articles
from tests.helpers.gguf_models import PROMPT, apart, cut, expected_of, made, saved
from tests.helpers.llama_cpp import LlamaCpp
from tests.helpers.tiny_models import save_tiny, tiny_llama

SMALL = ["q4_0", "q5_0", "q4_K", "q5_K", "q6_K"]


def shapes_of_llama(
    *, blocks: int, hidden: int, width: int, kv: int, vocabulary: int, tied: bool, experts: int = 0
) -> dict[str, tuple[int, ...]]:
    """The tensors of a model of the family."""
    found: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocabulary, hidden), "output_norm.weight": (hidden,)}
    found |= {} if tied else {"output.weight": (vocabulary, hidden)}
    for block in range(blocks):
        several = (experts,) if experts else ()
        ending = "_exps" if experts else ""
        own = {
            "attn_norm": (hidden,),
            "attn_q": (hidden, hidden),
            "attn_k": (kv, hidden),
            "attn_v": (kv, hidden),
            "attn_output": (hidden, hidden),
            "ffn_norm": (hidden,),
            f"ffn_gate{ending}": (*several, width, hidden),
            f"ffn_up{ending}": (*several, width, hidden),
            f"ffn_down{ending}": (*several, hidden, width),
        }
        own |= {"ffn_gate_inp": (experts, hidden)} if experts else {}
        found |= {f"blk.{block}.{name}.weight": shape for name, shape in own.items()}
    return found


LLAMA_2_7B = {"blocks": 32, "hidden": 4096, "width": 11008, "kv": 4096, "vocabulary": 32000, "tied": False}
SMALL_LLAMA = {"blocks": 30, "hidden": 576, "width": 1536, "kv": 192, "vocabulary": 49152, "tied": True}
LLAMA_3_2_1B = {"blocks": 16, "hidden": 2048, "width": 8192, "kv": 512, "vocabulary": 128256, "tied": True}


@pytest.mark.parametrize(
    ("model", "kind", "counts", "mib"),
    [
        # What llama.cpp prints on loading the published files: llama-2-7b Q4_K_M and Q4_0, Llama-3.2-1B Q4_K_M.
        (LLAMA_2_7B, "q4_K", {"F32": 65, "Q4_K": 193, "Q6_K": 33}, None),
        (LLAMA_2_7B, "q4_0", {"F32": 65, "Q4_0": 225, "Q6_K": 1}, None),
        (LLAMA_3_2_1B, "q4_K", {"F32": 34, "Q4_K": 96, "Q6_K": 17}, 762.81),
    ],
)
def test_the_mix_is_that_of_published_files(model: dict, kind: str, counts: dict, mib: float | None) -> None:
    shapes = shapes_of_llama(**model)
    if model is LLAMA_3_2_1B:
        shapes["rope_freqs.weight"] = (32,)
    kinds = Choice(TYPES[kind], shapes, model["blocks"], shared_heads=model["kv"] < model["hidden"]).kinds()
    assert Counter(kind.name for kind in kinds.values()) == counts
    if mib is not None:
        bytes_of = (torch.Size(gguf.quant_shape_to_byte_shape(shape, kinds[name])) for name, shape in shapes.items())
        assert sum(size.numel() for size in bytes_of) / 2**20 == pytest.approx(mib, abs=0.01)


def literal_kinds(kind: str, shapes: dict[str, tuple[int, ...]], blocks: int, importance: bool) -> dict[str, str]:
    """The rules of llama-quant.cpp for one MLP, in its order: counters that go up with every tensor it meets."""
    base = {"q4_0": "Q4_0", "q5_0": "Q5_0", "q4_K": "Q4_K", "q5_K": "Q5_K", "q6_K": "Q6_K", "q8_0": "Q8_0"}[kind]
    block = 256 if base.endswith("K") else 32
    values = downs = 0
    count_of_values = sum("attn_v.weight" in name for name in shapes)
    more = [
        lambda i, n: i < n // 8,
        lambda i, n: i >= 7 * n // 8,
        lambda i, n: (i - n // 8) % 3 == 2,
    ]
    found = {}
    for name in sorted(shapes, key=lambda name: int(name.split(".")[1]) if name.startswith("blk") else -1):
        shape, wanted = shapes[name], base
        if len(shape) < 2:
            found[name] = "F32"
            continue
        if name == "output.weight" or (name == "token_embd.weight" and "output.weight" not in shapes):
            if shape[-1] % block:
                wanted = "Q8_0"
            elif wanted != "Q8_0":
                wanted = "Q6_K"
        elif "attn_v.weight" in name:
            if kind in ("q4_K", "q5_K") and any(rule(values, count_of_values) for rule in more):
                wanted = "Q6_K"
            values += 1
        elif "ffn_down" in name:
            if kind in ("q4_K", "q5_K") and any(rule(downs, blocks) for rule in more):
                wanted = "Q6_K"
            elif kind in ("q4_0", "q5_0") and importance and downs < blocks // 8:
                wanted = {"q4_0": "Q4_1", "q5_0": "Q5_1"}[kind]
            downs += 1
        if wanted.endswith("K") and shape[-1] % 256:
            wanted = {"Q4_K": "Q5_0", "Q5_K": "Q5_1", "Q6_K": "Q8_0"}[wanted]
        found[name] = "F16" if shape[-1] % 32 else wanted
    return found


@pytest.mark.parametrize("importance", [False, True])
@pytest.mark.parametrize("kind", [*SMALL, "q8_0"])
@pytest.mark.parametrize(
    "model",
    [LLAMA_2_7B, LLAMA_3_2_1B, SMALL_LLAMA, {**LLAMA_2_7B, "width": 1000}],
    ids=["7B", "1B", "135M", "odd"],
)
def test_the_types_are_those_of_the_rules_word_by_word(model: dict, kind: str, importance: bool) -> None:
    shapes = shapes_of_llama(**model)
    found = Choice(TYPES[kind], shapes, model["blocks"], importance=importance).kinds()
    assert {name: kind.name for name, kind in found.items()} == literal_kinds(kind, shapes, model["blocks"], importance)


def test_few_experts_have_rules_of_their_own() -> None:
    shapes = shapes_of_llama(**LLAMA_2_7B, experts=8)
    kinds = Choice(TYPES["q4_K"], shapes, 32, experts=8).kinds()
    named = {name.removeprefix("blk.5."): kind.name for name, kind in kinds.items() if name.startswith("blk.5.")}
    assert (named["attn_v.weight"], named["attn_k.weight"], named["attn_output.weight"]) == ("Q8_0", "Q8_0", "Q5_K")
    assert named["ffn_gate_inp.weight"] == "F32" and named["ffn_up_exps.weight"] == "Q4_K"
    assert kinds["blk.6.ffn_down_exps.weight"] == Kind.Q6_K and named["ffn_down_exps.weight"] == "Q4_K"
    large = shapes_of_llama(**{**LLAMA_2_7B, "blocks": 80, "kv": 1024})
    kinds = Choice(TYPES["q4_K"], large, 80, shared_heads=True).kinds()
    assert kinds["blk.10.attn_v.weight"] == Kind.Q5_K and kinds["blk.12.attn_v.weight"] == Kind.Q6_K


def test_rows_that_a_type_does_not_hold() -> None:
    assert [fallback(Kind.Q4_K, columns) for columns in (512, 576, 40)] == [Kind.Q4_K, Kind.Q5_0, Kind.F16]
    assert fallback(Kind.Q4_0, 40) == Kind.F16


def decoded(data, kind: Kind) -> Tensor:
    return torch.from_numpy(gguf.dequantize(data, kind).copy())


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q5_0, Kind.Q8_0, Kind.Q4_K, Kind.Q6_K], ids=lambda kind: kind.name)
def test_zeros_stay_zeros_and_numbers_come_near(kind: Kind) -> None:
    weight = torch.randn(12, 512, generator=torch.Generator().manual_seed(0))
    weight[:, 300:340] = 0.0
    weight[3] = 0.0
    found = decoded(packed(weight, kind), kind)
    assert found[3].abs().max() == 0.0
    # A k-quant has a minimum or a scale for 16 or 32 numbers, which zeros among others do not always meet.
    assert kind in (Kind.Q4_K, Kind.Q6_K) or found[:, 300:340].abs().max() == 0.0
    error = (found - weight).square().mean() / weight.square().mean()
    assert error < {"Q4_0": 0.01, "Q5_0": 0.003, "Q8_0": 1e-4, "Q4_K": 0.01, "Q6_K": 0.001}[kind.name]


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_K, Kind.Q5_K], ids=lambda kind: kind.name)
def test_by_an_importance_what_counts_loses_less(kind: Kind) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(64, 512, generator=generator)
    importance = torch.rand(512, generator=generator) ** 8 * 100
    plain, weighted = (decoded(packed(weight, kind, one), kind) - weight for one in (None, importance))
    counted = [(error.square() * importance).sum() for error in (plain, weighted)]
    assert counted[1] < 0.8 * counted[0]
    # Of an expert that no token reached all columns count the same; each expert has its own.
    three = torch.stack([weight] * 3)
    each = decoded(packed(three, kind, torch.stack([importance, torch.zeros(512), importance])), kind)
    assert torch.allclose(each[0], weight + weighted, atol=1e-5) and torch.equal(each[2], each[0])
    assert not torch.equal(each[1], each[0]) and bool(each[1].isfinite().all())


def test_what_cannot_be_packed_is_refused() -> None:
    with pytest.raises(InputError, match="rows of 40 numbers are no multiple of 32"):
        packed(torch.ones(2, 40), Kind.Q4_0)
    with pytest.raises(OptpruneError, match="40 importances for 64 columns"):
        packed(torch.randn(2, 64, generator=torch.Generator().manual_seed(0)), Kind.Q4_0, torch.ones(40))
    with pytest.raises(InputError, match="NaN or infinity"):
        packed(torch.full((2, 32), float("nan")), Kind.Q4_0)


@pytest.mark.parametrize(
    ("kind", "largest"),
    [(Kind.F16, 65_504.0), (Kind.Q8_0, 8e6), (Kind.Q5_0, 9e5), (Kind.Q4_0, 4e5), (Kind.Q6_K, 2e8), (Kind.Q4_K, 4e6)],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_no_number_becomes_infinite(kind: Kind, largest: float, weighted: bool) -> None:
    """Numbers up to the largest are in the file, up to rounding; others are refused, or are in the file too."""
    weight = torch.randn(3, 512, generator=torch.Generator().manual_seed(0))
    importance = torch.rand(512, generator=torch.Generator().manual_seed(1)) if weighted else None
    for number in (largest, -largest, 70_000.0, 1e7, 1e8, 1e12, 1e20, 1e38, -1e7, -1e30):
        weight[1, 77] = number
        try:
            found = packed(weight, kind, importance)
        except BeyondType as error:
            assert f"{abs(number):.6g} is beyond the numbers that {kind.name.lower()} holds" in str(error)
            assert abs(number) > largest
        else:
            written = decoded(found, kind)
            assert bool(written.isfinite().all()) and abs(float(written[1, 77]) / number - 1) < 0.15


@pytest.mark.parametrize("kind", SMALL)
def test_llama_cpp_reads_what_transformers_reads(kind: str, tmp_path: Path) -> None:
    """The file's weights, decoded by gguf, give in transformers the probabilities that llama.cpp gives from them."""
    folder = saved(tiny_llama(hidden_size=256, head_dim=64, intermediate_size=512), tmp_path / "model")
    written = export(folder, tmp_path / "model.gguf", GgufFile(kind=kind))
    stored = {tensor.name: tensor.tensor_type for tensor in gguf.GGUFReader(written.path).tensors}
    assert stored["blk.0.ffn_up.weight"] == TYPES[kind].kind and not written.notes
    model = optprune.load_model(written.path, device="cpu").model.float().eval()
    with torch.no_grad():
        expected = model(input_ids=PROMPT[None]).logits[0, -1].double().log_softmax(-1)
    dense, _ = expected_of(folder, PROMPT)
    rounding = float((expected - dense).abs().max())
    # llama.cpp rounds the inputs of products to 8 bits too, which is less than what the type does to the weights.
    assert 2 * apart(written.path, expected, PROMPT) < rounding


@pytest.mark.parametrize("family", sorted({*FAMILIES} - {"llama", "qwen2"}))
def test_hidden_units_of_zeros_change_nothing(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, where nothing else is rounded; of experts and of a shared one too."""
    monkeypatch.setattr(Tensors, "filled", lambda self: replace(self, fill=SMALL_BLOCK))
    folder = saved(cut(made(family), {Mlp(): 88}), tmp_path / "model")
    file = export(folder, tmp_path / "model.gguf", GgufFile(kind="f32")).path
    widths = {
        tensor.name: int(tensor.shape[0]) for tensor in gguf.GGUFReader(file).tensors if "ffn_down" in tensor.name
    }
    assert widths and all(width % SMALL_BLOCK == 0 for name, width in widths.items() if name.endswith("weight"))
    expected, tolerance = expected_of(folder, PROMPT)
    assert apart(file, expected, PROMPT) < tolerance


@pytest.mark.parametrize(
    ("kind", "width", "filled"), [("q8_0", 200, 224), ("q4_0", 200, 224), ("q4_K", 200, 224), ("q4_K", 950, 1024)]
)
def test_a_width_is_filled_up_to_whole_blocks_and_told(kind: str, width: int, filled: int, tmp_path: Path) -> None:
    """For q4_K to 256 where that file is smaller: q5_0 and q8_0 in its place are larger."""
    model = tiny_llama(hidden_size=256, head_dim=64, intermediate_size=width)
    written = export(saved(model, tmp_path / "model"), tmp_path / "model.gguf", GgufFile(kind=kind))
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(written.path).tensors}
    down, up = stored["blk.0.ffn_down.weight"], stored["blk.0.ffn_up.weight"]
    assert list(down.shape) == [filled, 256] and down.tensor_type != Kind.F16
    assert float(decoded(up.data, up.tensor_type)[width:].abs().max()) == 0.0
    multiple = 256 if filled % 256 == 0 else SMALL_BLOCK
    assert f"in units: {width} to {filled}; multiples of {multiple} need none" in written.notes[0]
    LlamaCpp(written.path).log_probabilities(PROMPT)


def test_a_narrower_model_is_no_larger(tmp_path: Path) -> None:
    """Rows that fell back from q6_K to q8_0 would make the down projections larger than the dense model's."""
    sizes = {}
    for width in (512, 384, 256 + 32):
        folder = saved(tiny_llama(hidden_size=256, head_dim=64, intermediate_size=width), tmp_path / f"{width}")
        for kind in ("q4_K", "q6_K", "q4_0"):
            sizes[kind, width] = export(folder, tmp_path / f"{kind}-{width}.gguf", GgufFile(kind=kind)).bytes
    for kind in ("q4_K", "q6_K", "q4_0"):
        assert sizes[kind, 512] >= sizes[kind, 384] >= sizes[kind, 288]
    assert sizes["q4_0", 512] > sizes["q4_0", 384] > sizes["q4_0", 288]


def test_rows_that_are_no_units_are_told(tmp_path: Path) -> None:
    folder = saved(tiny_llama(hidden_size=40, num_attention_heads=2, head_dim=20), tmp_path / "model")
    notes = " ".join(export(folder, tmp_path / "model.gguf", GgufFile(kind="q4_0")).notes)
    assert "rows of 40 numbers are not multiples of 32 and stay float16" in notes
    notes = " ".join(export(saved(tiny_llama(), tmp_path / "m"), tmp_path / "m.gguf", GgufFile(kind="q4_K")).notes)
    assert "rows of 64, 128 numbers are not multiples of 256 and have larger types" in notes


# -- the importance


def batches() -> list[Tensor]:
    return list(torch.randint(5, 500, (3, 2, 24), generator=torch.Generator().manual_seed(1)))


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_mean_squares_are_the_diagonals_of_gram_matrices(family: str) -> None:
    model = tiny_llama() if family == "llama" else made(family)
    decoder, context = Decoder(model), list[LayerContext]()
    found = mean_squares(decoder, batches())
    statistics = optprune.collect(model, batches(), recipes=[optprune.load_recipe("wanda")])
    assert context == [] and set(found) == {
        decoder.name(block, path) for block in range(len(decoder.blocks)) for path in decoder.paths(block)
    }
    name = decoder.name(1, decoder.architecture.taps[decoder.paths(1)[-1]])
    inputs = list[Tensor]()
    handle = model.get_submodule(name).register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches():
            model(input_ids=batch)
    handle.remove()
    rows = torch.cat([each.reshape(-1, each.shape[-1]) for each in inputs]).double()
    assert torch.allclose(found[name], rows.square().mean(0), rtol=1e-5)
    assert statistics is not None


@pytest.mark.e2e
@pytest.mark.parametrize(
    "family", ["gpt2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("llama", "qwen3_moe"))]
)
def test_the_importance_stands_in_the_file_s_columns(family: str, tmp_path: Path) -> None:
    """What is given as the importance arrives at the tensor whose columns it is of, filled up as they are."""
    model = tiny_llama(num_hidden_layers=4) if family == "llama" else made(family)
    folder = saved(cut(model, {Mlp(): 40}), tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n".join(demo_articles("calibration")[:5]))
    text = str(tmp_path / "text.txt")
    importance = importance_of(folder, text, samples=2, seq_length=32)
    seen = dict[tuple[int, ...], Tensor | None]()
    taken = ggml.packed

    def recorded(weight: Tensor, kind: Kind, one: Tensor | None = None):
        seen[tuple(weight.shape)] = one
        return taken(weight, kind, one)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("optprune.export.gguf_file.packed", recorded)
        export(folder, tmp_path / "model.gguf", GgufFile(kind="q4_0", importance=importance))
    given = [one for one in seen.values() if one is not None]
    assert given and all(one.shape[-1] % SMALL_BLOCK == 0 for one in given)
    filled = [
        one for shape, one in seen.items() if one is not None and shape[-1] == 64 and one[..., 40:].abs().max() == 0
    ]
    assert filled, "the zeros of the hidden units count nothing"
    fields = gguf.GGUFReader(tmp_path / "model.gguf").fields
    assert fields["quantize.imatrix.dataset"].contents() == text


def test_the_columns_that_fill_up_a_block_have_no_importance(tmp_path: Path) -> None:
    folder = saved(tiny_llama(intermediate_size=40), tmp_path / "model")
    targets = {target.name: target for target in GgufFile(kind="q4_0").targets(ModelSource(folder))}
    found = targets["blk.0.ffn_down.weight"].importance({"model.layers.0.mlp.down_proj": torch.arange(1.0, 41)})
    assert found is not None and found.tolist() == [*range(1, 41), *[0] * 24]


def test_keys_of_latent_attention_have_no_importance(tmp_path: Path) -> None:
    """The columns of their matrix in the file are key dimensions, and those of the values' are the layer's inputs."""
    folder = saved(made("deepseek_v3"), tmp_path / "model")
    targets = {target.name: target for target in GgufFile(kind="q4_0").targets(ModelSource(folder))}
    squares = {"model.layers.0.self_attn.kv_b_proj": torch.arange(24.0)}
    values = targets["blk.0.attn_v_b.weight"].importance(squares)
    assert values is not None and torch.equal(values, torch.arange(24.0)[None])
    assert targets["blk.0.attn_k_b.weight"].importance(squares) is None
    weight = torch.randn(4, 16, 32, generator=torch.Generator().manual_seed(0))
    for one in (torch.ones(1, 32), torch.ones(4, 32)):
        assert (packed(weight, Kind.Q4_0, one) == packed(weight, Kind.Q4_0, torch.ones(32))).all()


def test_the_command_takes_a_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    (tmp_path / "text.txt").write_text("The minister said on Monday that houses which they had built were sold. " * 40)
    plain = ["export", str(folder), "--type", "q4_0", "--output"]
    text = ["--calibration", str(tmp_path / "text.txt"), "--samples", "2", "--seq-length", "32"]
    assert main([*plain, str(tmp_path / "plain.gguf")]) == 0
    assert main([*plain, str(tmp_path / "weighted.gguf"), *text]) == 0
    first, second = ((tmp_path / f"{name}.gguf").read_bytes() for name in ("plain", "weighted"))
    assert first != second
    capsys.readouterr()
    assert main(["export", str(folder), "--type", "q8_0", "--output", str(tmp_path / "x.gguf"), *text]) == 2
    assert "--calibration applies to gguf types from q6_K on only: leave it out for q8_0" in capsys.readouterr().err
    with pytest.raises(InputError, match="the type f16 rounds each number alone"):
        GgufFile(kind="f16", importance=Importance({}, "text"))


def test_without_the_package_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")

    def missing() -> None:
        raise InputError("llama.cpp is needed for this: run pip install -e '.[llama]'")

    monkeypatch.setitem(__import__("sys").modules, "xllamacpp", None)
    with pytest.raises(InputError, match=r"through the package xllamacpp .*: run pip install -e '\.\[llama\]'"):
        llama_cpp_binding.binding()
    with pytest.raises(InputError, match=r"llama\.cpp is needed for this"):
        export(folder, tmp_path / "x.gguf", GgufFile(kind="q4_0"))
    assert export(folder, tmp_path / "x.gguf", GgufFile(kind="q8_0")).bytes
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "x.gguf"]
