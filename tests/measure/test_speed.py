"""Speed and memory: the stated work is done, models run in turn, and the figures agree with the clock."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from optprune.cli import main
from optprune.errors import InputError
from optprune.export import save_model
from optprune.measure import Repeats, SpeedWorkload, measure_speed, memory, speed
from optprune.measure.speed import weight_bytes
from optprune.models import Decoder, Mlp, Values, load_model
from optprune.models.sources import demo_model_file, file_bytes
from tests.helpers.memory import MIB, told
from tests.helpers.tiny_models import TINY_MODELS, save_tiny, tiny_llama, tiny_qwen2

WORK = SpeedWorkload(prompt_tokens=7, new_tokens=4, batch=3, repeats=2)


def narrow_values() -> PreTrainedModel:
    """A model that only optprune loads: half the value dimensions, half the MLP."""
    model = tiny_llama()
    decoder = Decoder(model)
    for block in range(len(decoder.blocks)):
        for units in (*Values().layers(decoder, block), *Mlp().layers(decoder, block)):
            decoder.keep_units(block, units, torch.arange(units.channels.units) % 2 == 0)
    decoder.record_shapes()
    return model


BUILDERS = {**TINY_MODELS, "narrow": narrow_values}


@pytest.fixture
def steady(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock on which everything takes a quarter of a second more than what came before."""

    def times() -> Iterator[float]:
        now = 0.0
        for step in range(10000):
            now += 0.25 * step
            yield now

    clock = times()
    monkeypatch.setattr(speed, "clock", lambda device: next(clock))


def seen_inputs(model: PreTrainedModel) -> list[torch.Tensor]:
    """A list that grows by the token ids of every forward pass."""
    seen: list[torch.Tensor] = []
    model.register_forward_pre_hook(lambda _, args, given: seen.append(given["input_ids"]), with_kwargs=True)
    return seen


@pytest.mark.parametrize("name", BUILDERS)
def test_a_run_is_a_prompt_and_greedy_decoding_as_generate_does_it(name: str) -> None:
    model = BUILDERS[name]()
    seen = seen_inputs(model)
    measure_speed({name: model}, WORK)
    passes = 1 + WORK.new_tokens
    assert [ids.shape[1] for ids in seen] == [7, 1, 1, 1, 1] * (2 + WORK.repeats)
    prompt = seen[0]
    assert prompt.shape == (3, 7)
    assert prompt.unique().numel() > 10
    expected = model.generate(prompt, max_new_tokens=4, min_new_tokens=4, do_sample=False)  # type: ignore[operator]
    for run in range(2 + WORK.repeats):
        assert torch.equal(torch.cat(seen[run * passes : (run + 1) * passes], 1), expected)


def test_models_take_turns() -> None:
    order: list[str] = []
    models = {"one": tiny_llama(), "other": tiny_qwen2()}
    for name, model in models.items():
        model.register_forward_pre_hook(
            lambda _, args, given, name=name: order.append(name) if given["input_ids"].shape[1] > 1 else None,
            with_kwargs=True,
        )
    runs: list[tuple[int, int]] = []
    measure_speed(models, WORK, on_run=lambda done, total: runs.append((done, total)))
    assert order == ["one", "other"] * (2 + WORK.repeats)
    assert runs == [(done, 8) for done in range(1, 9)]


@pytest.mark.usefixtures("steady")
def test_figures_are_those_of_the_clock() -> None:
    one, other = measure_speed({"one": tiny_llama(), "other": narrow_values()}, WORK)
    # Each run reads the clock three times, and four runs come before the timed ones.
    taken = [(0.25 * (3 * run + 1), 0.25 * (3 * run + 2)) for run in range(4, 8)]
    assert one.prefill.values == pytest.approx([21 / taken[0][0], 21 / taken[2][0]])
    assert other.prefill.values == pytest.approx([21 / taken[1][0], 21 / taken[3][0]])
    assert one.decode.values == pytest.approx([12 / taken[0][1], 12 / taken[2][1]])
    ratios = other.over(one)
    assert ratios.decode.values == pytest.approx([taken[0][1] / taken[1][1], taken[2][1] / taken[3][1]])
    assert ratios.prefill.values == pytest.approx([taken[0][0] / taken[1][0], taken[2][0] / taken[3][0]])
    assert ratios.weights == other.weight_bytes / one.weight_bytes < 1


def test_a_model_is_left_as_it_was() -> None:
    model = tiny_llama().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    measure_speed({"model": model}, WORK)
    assert model.training
    assert all(parameter.requires_grad and not parameter.is_inference() for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.get_rng_state(), state)


def test_weights_are_counted_once() -> None:
    model = tiny_qwen2()  # its head is its embedding
    buffers = sum(buffer.numel() for buffer in model.buffers())
    [found] = measure_speed({"model": model}, WORK)
    assert found.parameters == model.num_parameters()
    assert found.weight_bytes == weight_bytes(model) == 4 * (model.num_parameters() + buffers)


# -- memory


@pytest.mark.e2e
@told
def test_the_peak_of_a_model_counts_what_a_pass_takes() -> None:
    greedy, plain = tiny_llama(), tiny_llama()

    def take(*_: object) -> None:
        torch.ones(100 * MIB // 4)

    greedy.lm_head.register_forward_hook(take)
    found = {one.name: one for one in measure_speed({"greedy": greedy, "plain": plain}, WORK)}
    assert found["greedy"].peak_bytes is not None
    assert found["plain"].peak_bytes is not None
    assert 98 * MIB < found["greedy"].peak_bytes - found["greedy"].weight_bytes < 110 * MIB
    assert 0 <= found["plain"].peak_bytes - found["plain"].weight_bytes < 10 * MIB
    assert found["greedy"].over(found["plain"]).peak_memory == found["greedy"].peak_bytes / found["plain"].peak_bytes


def test_a_system_that_does_not_tell_is_said_to_be_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(memory, "CLEAR", tmp_path / "missing")
    models = {"one": tiny_llama(), "other": narrow_values()}
    seen = seen_inputs(models["one"])
    one, other = measure_speed(models, WORK)
    assert len(seen) == (1 + WORK.new_tokens) * (2 + WORK.repeats)  # the work is the same
    assert one.peak_bytes is None
    assert one.over(other).peak_memory is None


# -- small parts


def test_medians_quartiles_and_ratios_by_hand() -> None:
    measured = Repeats((5.0, 1.0, 2.0, 4.0, 3.0))
    assert (measured.median, measured.quartiles) == (3.0, (2.0, 4.0))
    assert Repeats((7.0,)).quartiles == (7.0, 7.0)
    assert measured.over(Repeats((1.0, 2.0, 4.0, 4.0, 6.0))).values == (5.0, 0.5, 0.5, 1.0, 0.5)


def test_what_cannot_be_compared_is_refused() -> None:
    model, half = tiny_llama(), tiny_llama().to(torch.bfloat16)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="different dtypes"):
        measure_speed({"model": model, "half": half}, WORK)
    with pytest.raises(InputError, match="need 513 positions, but model has 512"):
        measure_speed({"model": model}, SpeedWorkload(prompt_tokens=512, new_tokens=1))


def test_the_size_of_the_weight_files(tmp_path: Path) -> None:
    folder = save_tiny(tiny_llama(), tmp_path / "model")
    assert file_bytes(str(folder)) == (folder / "model.safetensors").stat().st_size
    tiny_llama().save_pretrained(tmp_path / "shards", max_shard_size="100KB")
    shards = list((tmp_path / "shards").glob("*.safetensors"))
    assert len(shards) > 1
    assert file_bytes(str(tmp_path / "shards")) == sum(file.stat().st_size for file in shards)
    torch.save(tiny_llama().state_dict(), tmp_path / "pytorch_model.bin")
    assert file_bytes(str(tmp_path)) == (tmp_path / "pytorch_model.bin").stat().st_size
    (tmp_path / "model.gguf").write_bytes(b"12345")
    assert file_bytes(str(tmp_path / "model.gguf")) == 5
    assert file_bytes("demo") == demo_model_file().stat().st_size


# -- the command

SMALL = ["--prompt-tokens", "16", "--new-tokens", "3", "--batch", "2", "--repeats", "3", "--device", "cpu"]


@pytest.mark.e2e
@pytest.mark.parametrize("name", BUILDERS)
def test_the_command_tells_what_it_measured(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dense, record = save_tiny(tiny_llama(), tmp_path / "dense"), tmp_path / "record.json"
    folder = tmp_path / name
    save_model(BUILDERS[name](), folder)
    assert main(["benchmark-model", str(folder), "--against", str(dense), *SMALL, "--json", str(record)]) == 0
    out = capsys.readouterr().out
    result = json.loads(record.read_text())
    assert (result["dtype"], result["prompt_tokens"], result["new_tokens"]) == ("float32", 16, 3)
    assert (result["batch"], result["repeats"]) == (2, 3)
    assert result["device"].startswith("cpu (")
    for source, one in zip((folder, dense), result["models"], strict=True):
        assert one["name"] == str(source)
        assert one["file_bytes"] == (source / "model.safetensors").stat().st_size
        assert one["weight_bytes"] == weight_bytes(load_model(source, device="cpu").model)
        assert len(one["prefill"]["values"]) == len(one["decode"]["values"]) == 3
        first, third = one["decode"]["quartiles"]
        assert 0 < first <= one["decode"]["median"] <= third
        assert f"{source}: prefill {one['prefill']['median']:.1f} (" in out
    ratios = result["ratios"]
    speeds = [one["prefill"]["values"] for one in result["models"]]
    assert ratios["prefill"]["values"] == pytest.approx([a / b for a, b in zip(*speeds, strict=True)])
    assert ratios["file"] == result["models"][0]["file_bytes"] / result["models"][1]["file_bytes"]
    assert f"{folder} over {dense}: prefill {ratios['prefill']['median']:.3f} (" in out
    assert "peak memory: the weights, and the peak of " in out


def test_one_model_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, record = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "record.json"
    assert main(["benchmark-model", str(folder), *SMALL, "--dtype", "bfloat16", "--json", str(record)]) == 0
    out = capsys.readouterr().out
    result = json.loads(record.read_text())
    assert result["dtype"] == "bfloat16"
    assert len(result["models"]) == 1
    assert "ratios" not in result
    assert " over " not in out
