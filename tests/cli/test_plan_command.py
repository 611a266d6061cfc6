"""optprune plan: what it prints and writes; and what prune makes of a plan that does not fit."""

import json
import re
from pathlib import Path

import pytest
import typer
from transformers import AutoTokenizer

from optprune.cli import main
from optprune.cli.app import app
from optprune.errors import InputError
from optprune.program import Program
from optprune.program.room import Room
from optprune.pruning import Measuring
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import tiny_llama

PHASES = ["loading", "tokenising", "metric", "budget", "pruning", "saving", "checking"]
SMALL = ("--samples", "8", "--seq-length", "64", "--device", "cpu")
ONLY_PLAN, ONLY_PRUNE = (
    {"--no-probe"},
    {"--overwrite", "--resume", "--restart", "--no-plan", "--log", "--lanes", "--partial-sums"}
    | {"--to", "--to-quality", "--text", "--windows"},
)


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """A folder with a config.json and nothing else."""
    folder = tmp_path / "config"
    tiny_llama().config.save_pretrained(folder)
    return folder


@pytest.mark.e2e
def test_a_plan_is_printed_and_written(attempt: Attempt, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "plan.json"
    words = ["--calibration", str(attempt.text), "--recipe", "structured_best", "--json", str(file), *SMALL]
    before = attempt.model.stat().st_mtime_ns
    assert main(["plan", str(attempt.model), *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    written = json.loads(file.read_text())
    names = {"device_bytes", "host_bytes", "disk_bytes", "seconds", "phases", "program", "states", "refusal", "guessed"}
    assert set(written) == {"generator", *names}
    assert [phase["name"] for phase in written["phases"]] == PHASES
    for field in ("host_bytes", "disk_bytes"):
        assert written[field] == max(phase[field] for phase in written["phases"]) > 0
    assert written["device_bytes"] == 0
    assert written["seconds"] == pytest.approx(sum(phase["seconds"] for phase in written["phases"]))
    assert all(phase["seconds"] > 0 for phase in written["phases"])
    assert [line.split()[0] for line in lines[1:8]] == PHASES
    assert lines[8].count("at most") == 1 and lines[9].startswith("the most is in ")
    assert "hidden states between blocks are kept on the device" in lines[-3] and written["states"] == "device"
    assert lines[-2] == (
        "recipe structured_best, 2 blocks: one budget for all blocks is divided by measured costs, and a block gets "
        "its calibration inputs from the pruned blocks before it (propagation partial)"
    )
    steps = "self_attn.q_proj; then self_attn.o_proj; then mlp.down_proj"
    assert lines[-1] == f"the largest block (1) is pruned in 3 steps: {steps}"
    blocks = written["program"]["blocks"]
    in_order = [[f"self_attn.{name}"] for name in ("q_proj", "o_proj")] + [["mlp.down_proj"]]
    assert [[stage["layers"] for stage in block["stages"] if stage["layers"]] for block in blocks] == [in_order] * 2
    assert attempt.model.stat().st_mtime_ns == before


def test_windows_as_long_as_a_batch_are_planned_too(tmp_path: Path) -> None:
    """Though of one window nothing can be held out."""
    tiny_llama(max_position_embeddings=2048).config.save_pretrained(tmp_path / "config")
    words = ["--recipe", "structured_best", "--sparsity", "0.2", "--samples", "8", "--seq-length", "1025"]
    assert main(["plan", str(tmp_path / "config"), *words, "--device", "cpu"]) == 0


def test_the_probe_has_as_many_tokens_of_the_text_as_it_takes_however_long_its_windows(
    attempt: Attempt, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = list[Measuring]()

    def recorded(program: Program, source: str, measuring: Measuring, on_step: object) -> None:
        given.append(measuring)
        raise InputError("stopped")

    monkeypatch.setattr("optprune.cli.plan.PIECE", 1)
    monkeypatch.setattr("optprune.pruning.measured_plan.timed", recorded)
    attempt.fails(["plan", str(attempt.model), "--calibration", str(attempt.text), "--recipe", "fasp", *SMALL])
    tokens = given[0].tokens
    words = AutoTokenizer.from_pretrained(attempt.model)(attempt.text.read_text(encoding="utf-8"))["input_ids"]
    # At most all eight windows of 64.
    assert tokens is not None and 8 * 64 <= len(tokens) < len(words)
    assert tokens[: 8 * 64].tolist() == words[: 8 * 64]


@pytest.mark.usefixtures("no_weights")
def test_without_a_probe_a_config_is_enough_and_a_gpu_need_not_be_there(
    config: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    more = ["--no-probe", "--json", str(file), "--samples", "8", "--seq-length", "64"]
    assert main(["plan", str(config), "--device", "cuda", *more]) == 0
    written = json.loads(file.read_text())
    assert written["seconds"] is None and written["device_bytes"] > 0
    told = capsys.readouterr().out
    assert "of the GPU" in told and "every block loses the same share" in told and "pruned in 1 step: " in told


@pytest.mark.usefixtures("no_weights")
def test_a_plan_says_what_this_machine_lacks_and_what_the_host_would_save(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "plan.json"
    assert (
        main(["plan", str(config), "--device", "cuda", "--no-probe", "--samples", "20000", "--seq-length", "64"]) == 0
    )
    assert re.search(r"kept on the device; with --states host the run needs \d+ MB of the GPU", capsys.readouterr().out)
    words = ["--no-probe", "--samples", "60000", "--seq-length", "64", "--states", "device", "--json", str(file)]
    assert main(["plan", str(config), "--device", "cpu", *words]) == 0
    needed = json.loads(file.read_text())["host_bytes"]  # with what this process has imported, of several sizes
    monkeypatch.setattr(Room, "here", lambda *_: Room(host=needed - 10**8))
    capsys.readouterr()
    assert main(["plan", str(config), "--device", "cpu", *words]) == 0
    told = capsys.readouterr().out
    assert "on this machine it does not fit: the run needs " in told and "with --states disk it needs " in told
    assert json.loads(file.read_text())["refusal"] in told


@pytest.mark.usefixtures("no_weights")
def test_a_plan_of_what_prune_refuses_is_refused(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(config), "--recipe", "alps", "--ray", "local", *SMALL]) == 2
    assert "under the policy pruned every block depends on those before it" in capsys.readouterr().err
    assert main(["plan", str(config), "--set", "dampening=1", *SMALL]) == 2
    assert "no field 'dampening'" in capsys.readouterr().err
    for option, value, least in (("--samples", 0, 1), ("--samples", -1, 1), ("--seq-length", 1, 2)):
        assert main(["plan", str(config), *SMALL, f"{option}={value}"]) == 2
        assert capsys.readouterr().err == f"error: {option} cannot be {value}: it is at least {least}\n"


@pytest.mark.usefixtures("no_weights")
def test_prune_refuses_what_cannot_fit_before_it_begins(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "measured", lambda *_: Room(host=10**8))
    sentence = attempt.fails(attempt.command())
    assert "B of memory in the phase checking" in sentence and "100 MB are there" in sentence
    assert "use a machine with more (--no-plan begins all the same;" in sentence


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run ends with an error where it would go on after its plan."""

    def stop(*_: object) -> None:
        raise InputError("this is behind the plan")

    monkeypatch.setattr("optprune.cli.prune_run.calibration_of", stop)


@pytest.mark.usefixtures("stopped")
def test_prune_begins_all_the_same_where_it_is_told_to(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Room, "measured", lambda *_: Room(host=10**8))
    assert "this is behind the plan" in attempt.fails(attempt.command("--no-plan"))


@pytest.mark.usefixtures("stopped")
def test_prune_says_its_plan_in_one_line(attempt: Attempt, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(attempt.command()) == 2
    planned = [line for line in capsys.readouterr().err.splitlines() if line.startswith("planned: ")]
    assert len(planned) == 1 and "of memory" in planned[0] and "of the disk" in planned[0]


def test_plan_has_the_options_of_prune() -> None:
    commands = typer.main.get_command(app).commands  # type: ignore[attr-defined]  # a group
    plan, prune = ({text for one in commands[name].params for text in one.opts} for name in ("plan", "prune"))
    assert plan - prune == ONLY_PLAN and prune - plan == ONLY_PRUNE
