"""Check of a saved folder: the logits of a fresh process that loads it must agree with those in memory."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from optprune.errors import InputError, OptpruneError
from optprune.export import reload_check
from optprune.export.around import places_around
from optprune.models import Decoder, is_stock

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""largest difference of logits, relative to the largest logit, that different threads and kernels may cause; a float64
model computes norms and rotations in float32 too"""

OnBlock = Callable[[int, int], None]
"""a function that is called with the number of blocks done and the number of all blocks"""


def logits_of(decoder: Decoder, ids: Tensor, on_block: OnBlock = lambda done, blocks: None) -> Tensor:
    """Return the logits of a model for token ids [batch, tokens]. Raises InputError where they are not finite."""
    model, training, done = decoder.model, decoder.model.training, 0

    def passed(*_: Any) -> None:
        nonlocal done
        done += 1
        on_block(done, len(decoder.blocks))

    model.eval()
    on_block(0, len(decoder.blocks))
    handles = [block.register_forward_hook(passed) for block in decoder.blocks]
    try:
        with torch.no_grad(), decoder.running():
            logits = model(input_ids=ids.to(model.device), use_cache=False).logits
    finally:
        model.train(training)
        for handle in handles:
            handle.remove()
    if not bool(torch.isfinite(logits).all()):
        dtype = str(model.dtype).removeprefix("torch.")
        advice = "check that those of the original are finite, or lower the sparsity"
        if model.dtype == torch.float16:
            advice = "save in bfloat16 or float32, whose range is larger"
        raise InputError(f"the logits of the saved model hold NaN or infinity in {dtype}: {advice}")
    return logits.float().cpu().contiguous()


def places_of(decoder: Decoder) -> dict[str, Any]:
    """Return a device map for the process that loads the folder: blocks on the disk, the rest on the model's device."""
    device = decoder.model.device
    here = "cpu" if device.type == "cpu" else (device.index or 0)
    blocks = decoder.architecture.blocks
    placed: dict[str, Any] = {decoder.block_name(index): "disk" for index in range(len(decoder.blocks))}
    for name, module in decoder.model.named_modules():
        inside = f"{name}.".startswith(f"{blocks}.") or not name
        if not inside and (not any(module.children()) or dict(module.named_parameters(recurse=False))):
            placed[name] = here
    return placed


def compare(
    decoder: Decoder,
    folder: Path,
    ids: Tensor,
    logits: Tensor,
    scratch: Path,
    on_block: OnBlock = lambda done, blocks: None,
) -> float:
    """Return the largest difference between logits and those of a fresh process that loads the folder.

    `on_block` is called first with 0 when the process has loaded the folder. Raises OptpruneError when the difference
    is more than rounding, or the process fails.
    """
    record = scratch / "logits.safetensors"
    save_file({"input_ids": ids.cpu().contiguous(), "logits": logits}, record)
    places = places_of(decoder)
    if decoder.architecture.part_of:
        device = decoder.model.device
        places = places_around(folder, places, "cpu" if device.type == "cpu" else (device.index or 0))
    # The import path is that of this process, without the script's folder (-P).
    task = {
        "folder": str(folder),
        "record": str(record),
        "threads": torch.get_num_threads(),
        "paths": [path or str(Path.cwd()) for path in sys.path],
        "class": decoder.architecture.auto_class,
        "trust": not is_stock(decoder.model.config),
        "places": places,
        "scratch": str(scratch),
    }
    # transformers copies a folder's code into its modules cache, which is temporary here.
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")}

    def on_line(line: str) -> None:
        with suppress(ValueError, KeyError, TypeError):
            on_block(json.loads(line)["blocks"], len(decoder.blocks))

    words = [sys.executable or "", "-P", reload_check.__file__, json.dumps(task)]
    try:
        run = run_alongside(words, environment, on_line)
    except OSError as error:
        raise OptpruneError(
            f"the process that reloads it cannot be started ({error}): run optprune with an ordinary Python interpreter"
        ) from error
    if run.returncode < 0:
        raise OptpruneError(
            f"the process that reloads it was killed by signal {-run.returncode}, probably for lack of memory: free "
            "as much as a block and the embeddings take"
        )
    reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
    if run.returncode == reload_check.CANNOT_IMPORT:
        raise OptpruneError(
            f"the process that reloads it cannot import its packages ({reason}): check that {sys.executable} can "
            "import torch and transformers"
        )
    if run.returncode:
        raise OptpruneError(f"it cannot be reloaded in a fresh process: {reason}")
    difference = float(json.loads(run.stdout.strip().splitlines()[-1])["difference"])
    limit = TOLERANCE[decoder.model.dtype] * float(logits.abs().max())
    if not difference <= limit:
        raise OptpruneError(
            f"the reloaded model's logits differ by {difference:.3g} from those in memory (at most {limit:.3g} is "
            "rounding): please report this"
        )
    return difference


def run_alongside(
    words: list[str], environment: dict[str, str], on_line: Callable[[str], None] = lambda line: None
) -> "subprocess.CompletedProcess[str]":
    """Run a process whose standard input closes when this process ends, so that it can end too.

    `on_line` is called with each line of its output.
    """
    reader, writer = os.pipe()
    lines: list[str] = []
    try:
        with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as errors:
            process = subprocess.Popen(
                words, stdin=reader, stdout=subprocess.PIPE, stderr=errors, text=True, env=environment
            )
            with process:
                try:
                    assert process.stdout is not None
                    for line in process.stdout:
                        lines.append(line)
                        on_line(line)
                except BaseException:
                    process.kill()
                    raise
            errors.seek(0)
            return subprocess.CompletedProcess(words, process.returncode, "".join(lines), errors.read())
    finally:
        os.close(reader)
        os.close(writer)
