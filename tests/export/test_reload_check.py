"""The reload check: every logit of every position counts, and the tolerances are those of rounding."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from optprune.errors import OptpruneError
from optprune.export import check, reload_check, save_model
from optprune.export.check import places_of, run_alongside
from optprune.models import Decoder
from tests.helpers.tiny_models import tiny_llama

CHECK_TOKENS = torch.arange(10, 42)[None]
TOLERANCES = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


@pytest.mark.e2e
def test_the_difference_is_the_largest_of_any_logit_of_any_position(tmp_path: Path) -> None:
    """Recorded logits off in one place: not the first position, not the largest logit."""
    model = tiny_llama(num_hidden_layers=1)
    folder = save_model(model, tmp_path / "model").folder
    with torch.no_grad():
        logits = model(input_ids=CHECK_TOKENS, use_cache=False).logits
    off, place = logits.clone(), (0, 17, int(logits[0, 17].argmin()))
    off[place] -= 0.25
    assert torch.equal(off.argmax(-1), logits.argmax(-1))
    save_file({"input_ids": CHECK_TOKENS, "logits": off}, tmp_path / "logits.safetensors")
    task = {
        "folder": str(folder),
        "record": str(tmp_path / "logits.safetensors"),
        "threads": 1,
        "paths": sys.path,
        "class": "AutoModelForCausalLM",
        "trust": False,
        "places": places_of(Decoder(model)),
        "scratch": str(tmp_path),
    }
    words = [sys.executable, "-P", reload_check.__file__, json.dumps(task)]
    lines: list[str] = []
    run = run_alongside(words, dict(os.environ), lines.append)
    # One thread here and there, and the same kernels: the logits are the same, the difference is rounded.
    *blocks, last = map(json.loads, lines)
    assert last["difference"] == pytest.approx(0.25, abs=1e-6)
    assert blocks == [{"blocks": done} for done in range(len(model.model.layers) + 1)]
    assert "".join(lines) == run.stdout


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
def test_what_is_more_than_rounding_is_refused(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama(num_hidden_layers=1).to(dtype)
    with torch.no_grad():
        largest = float(model(input_ids=CHECK_TOKENS, use_cache=False).logits.abs().max())

    def saved(difference: float, name: str) -> float | None:
        told = subprocess.CompletedProcess([], 0, json.dumps({"difference": difference}), "")
        monkeypatch.setattr(check, "run_alongside", lambda *_: told)
        return save_model(model, tmp_path / name, check_tokens=CHECK_TOKENS).logits_difference

    limit = TOLERANCES[dtype] * largest
    assert saved(0.99 * limit, "rounding") == 0.99 * limit
    for difference in (1.01 * limit, float("nan")):
        with pytest.raises(OptpruneError, match="logits differ by"):
            saved(difference, "more")
    assert {path.name for path in tmp_path.iterdir()} == {"rounding", "more.unchecked", "more.unchecked-2"}
