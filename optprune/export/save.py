"""Saving: a folder appears whole or not at all, and only after a fresh process has reloaded it and agreed."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import weakref
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError, OptpruneError, no_room
from optprune.export import reload_check
from optprune.export.portable import make_portable
from optprune.models import is_stock
from optprune.system.files import real_path
from optprune.system.interrupts import interrupts_held, record_done

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}
"""the largest difference of logits, relative to the largest logit, that threads and kernels may explain; norms and
rotations are in float32 in a float64 model too"""


@dataclass(frozen=True)
class SavedModel:
    """What was written, and how the reloaded model compared."""

    folder: Path
    bytes: int
    """of the weights"""
    stock: bool
    """whether plain transformers loads the folder; otherwise it needs trust_remote_code=True, or optprune.load"""
    logits_difference: float | None
    """largest difference between the logits in memory and those of the reloaded model; None when not checked"""


def check_output(folder: str | Path, overwrite: bool) -> None:
    """Raise InputError unless the output folder can be written: call it before the long work."""
    folder = Path(folder)
    place = real_path(folder)
    if place.exists():
        if Path.cwd().is_relative_to(place):
            raise InputError(
                f"the output folder {folder} is the current folder or holds it, so it cannot be replaced: name another"
            )
        if not place.is_dir():
            raise InputError(f"the output folder {folder} is a file: choose another name")
        if place.is_mount():
            raise InputError(
                f"the output folder {folder} is a mount point, so it cannot be replaced: name a folder in it"
            )
        if not overwrite:
            raise InputError(f"the output folder {folder} exists already: choose another, or pass --overwrite")
        if not (place / "config.json").is_file() and any(place.iterdir()):
            raise InputError(f"the folder {folder} holds something other than a model, so it is not overwritten")
        if not os.access(place, os.W_OK):
            raise InputError(f"the output folder {folder} cannot be replaced: it is not writable")
    parent = place.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir():
        raise InputError(f"the output folder {folder} cannot be created: {parent} is not a folder")
    if not os.access(parent, os.W_OK):
        raise InputError(f"the output folder {folder} cannot be created: {parent} is not writable")


def save_model(
    model: PreTrainedModel,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    files: Mapping[str, str] | None = None,
    probe: Tensor | None = None,
    overwrite: bool = False,
) -> SavedModel:
    """Write a model folder with safetensors weights, the tokenizer and extra text files, whole or not at all.

    `probe` [batch, tokens] are token ids: a fresh Python process reloads the folder without optprune, with the
    modelling file in the folder where the shapes are not stock, and its logits must agree with those in memory.
    """
    folder = Path(folder)
    check_output(folder, overwrite)
    place = real_path(folder)  # a link stays a link to the new folder
    created = _missing_parents(place)
    scratch: _Scratch | None = None
    try:
        with interrupts_held():
            place.parent.mkdir(parents=True, exist_ok=True)
            scratch = _Scratch(place)
        draft = scratch.folder / "model"
        _write(model, draft, tokenizer, files or {})
        difference = None if probe is None else _compare(model, draft, probe, scratch.folder)
        size = sum(file.stat().st_size for file in draft.glob("*.safetensors"))
        with interrupts_held():
            _put_in_place(draft, place, overwrite)
            record_done(f"the pruned model is in {folder}")
            scratch.discard()
            return SavedModel(folder, size, is_stock(model.config), difference)
    except BaseException as error:
        with interrupts_held():
            if scratch is not None:
                scratch.discard()
            for parent in () if place.exists() else created:
                with contextlib.suppress(OSError):  # not there yet, or somebody else has put something into it
                    parent.rmdir()
        full = no_room(error)
        if full is not None:
            raise InputError(f"{full}, so {folder} was not written: make room and run again") from error
        if isinstance(error, OptpruneError) and scratch is not None and scratch.folder.exists():
            raise OptpruneError(f"{error}; of it {scratch.folder} could not be deleted: do that by hand") from error
        raise


class _Scratch:
    """A folder beside an output, which goes when it is discarded, or at the latest when nothing refers to it."""

    def __init__(self, place: Path) -> None:
        # For `_discard`, should there be none left by then. First, so that no folder is made when there is none now.
        spare = os.open(os.devnull, os.O_RDONLY)
        # A sibling, so that the rename at the end stays within one file system.
        self.folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.", dir=place.parent))
        self.discard = weakref.finalize(self, _discard, self.folder, spare)


def _discard(folder: Path, spare: int | None = None) -> None:
    """Delete as much of a folder as can be, with one file descriptor at a time: shutil.rmtree needs more."""
    if spare is not None:
        os.close(spare)
    with contextlib.suppress(OSError):
        for path in list(folder.iterdir()):
            if path.is_dir() and not path.is_symlink():
                _discard(path)
            else:
                path.unlink()
        folder.rmdir()


def cast(model: PreTrainedModel, dtype: torch.dtype) -> None:
    """Round a model's weights to another dtype, in place; InputError when it has not the range for them.

    What is not stored (the angles of rotary embeddings) stays as it is, as when a folder in that dtype is loaded.
    """
    rounded = {parameter: parameter.detach().to(dtype) for parameter in model.parameters()}
    for name, parameter in model.named_parameters():
        if not bool(torch.isfinite(rounded[parameter]).all()):
            raise InputError(f"{name} holds values beyond {dtype}: save in bfloat16 or float32")
    for parameter, value in rounded.items():
        parameter.data = value


def _put_in_place(draft: Path, folder: Path, overwrite: bool) -> None:
    """Rename the draft to the folder; a folder that was there is deleted after that, and put back if it fails."""
    old = folder.with_name(f"{draft.parent.name}.old")
    replaced = folder.exists()
    if replaced:
        check_output(folder, overwrite)  # somebody else may have made it meanwhile
        folder.rename(old)
    try:
        draft.rename(folder)
    except BaseException as error:
        if replaced:
            try:
                old.rename(folder)
            except OSError:
                raise OptpruneError(
                    f"{folder} could not be replaced ({error}): the model that was there is now in {old}"
                ) from error
        raise
    if replaced:
        # Whatever cannot be deleted of the old folder, the new one is there.
        shutil.rmtree(old, ignore_errors=True)


def _missing_parents(folder: Path) -> list[Path]:
    """The parents that do not exist yet, innermost first."""
    return [parent for parent in folder.parents if not parent.exists()]


def _write(model: PreTrainedModel, draft: Path, tokenizer: Tokenizer | None, files: Mapping[str, str]) -> None:
    model.save_pretrained(draft)
    if tokenizer is not None:
        tokenizer.save_pretrained(draft)
    make_portable(draft, tokenizer)
    for name, text in files.items():
        (draft / name).write_text(text, encoding="utf-8")
    usual = draft.stat().st_mode & 0o666
    for file in draft.rglob("*"):
        # safetensors makes its files private, which a folder that is shared should not have by surprise.
        if file.is_file():
            file.chmod(usual)


def _compare(model: PreTrainedModel, draft: Path, probe: Tensor, scratch: Path) -> float:
    """The largest difference of logits between memory and a fresh process; OptpruneError when it is too large."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            logits = model(input_ids=probe.to(model.device), use_cache=False).logits
    finally:
        model.train(training)
    if not bool(torch.isfinite(logits).all()):
        advice = {
            torch.float16: "save in bfloat16 or float32, whose range is larger",
        }.get(model.dtype, "see that those of the original are finite, or remove less")
        raise InputError(
            f"the logits of the saved model hold NaN or infinity in {str(model.dtype).removeprefix('torch.')}, so the "
            f"folder was discarded: {advice}"
        )
    record = scratch / "probe.safetensors"
    save_file({"input_ids": probe.cpu(), "logits": logits.float().cpu().contiguous()}, record)
    # Without the script's folder (-P), but with everything that this process imports from, wherever it is.
    paths = [path or str(Path.cwd()) for path in sys.path]
    words = [str(draft), str(record), str(torch.get_num_threads()), json.dumps(paths)]
    try:
        run = subprocess.run(
            [sys.executable or "", "-P", reload_check.__file__, *words],
            capture_output=True,
            text=True,
            check=False,
            # transformers copies a folder's code into its modules cache, where ours has no business to stay.
            env={**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules")},
        )
    except OSError as error:
        raise OptpruneError(
            f"the process that reloads the saved model cannot be started ({error}), so the folder was discarded: run "
            "optprune with an ordinary Python interpreter"
        ) from error
    if run.returncode < 0:
        size = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        raise OptpruneError(
            f"the process that reloads the saved model was killed by signal {-run.returncode}, probably for want of "
            f"memory, so the folder was discarded: free the {size / 2**20:.0f} MiB that a second copy of the model "
            "needs"
        )
    reason = (run.stderr.strip().splitlines() or ["no message"])[-1]
    if run.returncode == reload_check.CANNOT_IMPORT:
        raise OptpruneError(
            f"the process that reloads the saved model cannot import what it needs ({reason}), so the folder was "
            f"discarded: see that {sys.executable} can import torch and transformers"
        )
    if run.returncode:
        raise OptpruneError(f"the saved model cannot be reloaded in a fresh process, so it was discarded: {reason}")
    difference = float(json.loads(run.stdout.strip().splitlines()[-1])["difference"])
    limit = TOLERANCE[model.dtype] * float(logits.abs().max())
    if not difference <= limit:
        raise OptpruneError(
            f"the reloaded model's logits differ by {difference:.3g} from those in memory (at most {limit:.3g} is "
            "rounding), so the folder was discarded: please report this"
        )
    return difference
