"""What a model folder holds beside its report, as far as a page about it says."""

from dataclasses import dataclass
from pathlib import Path

import torch

from optprune.models import Decoder, is_stock, load_config, load_shapes
from optprune.report.original import original_of
from optprune.report.records import Report


@dataclass(frozen=True)
class Held:
    """The model in a folder."""

    stock: bool
    """whether plain transformers loads it without the modelling file"""
    tokenizer: bool
    dtype: str
    parameters: int
    bytes: int
    """the size of the weights files"""
    linear_weights: int
    """the linear weights of the decoder blocks"""
    linear_before: int
    """how many there were before"""

    @property
    def itemsize(self) -> int | None:
        """The bytes of a number of its dtype; None of a dtype that is not known."""
        dtype = getattr(torch, self.dtype, None)
        return dtype.itemsize if isinstance(dtype, torch.dtype) else None

    @classmethod
    def by(cls, decoder: Decoder, report: Report, size: int, *, tokenizer: bool) -> "Held":
        """What a folder holds whose model this is, with weights files of so many bytes."""
        config = decoder.model.config
        return cls(
            stock=is_stock(config),
            tokenizer=tokenizer,
            dtype=str(config.dtype or decoder.model.dtype).removeprefix("torch."),
            parameters=sum(parameter.numel() for parameter in decoder.model.parameters()),
            bytes=size,
            linear_weights=decoder.linear_weights(),
            linear_before=sum(decoder.weights_of(change.before) for change in report.blocks),
        )


def held_in(folder: Path, report: Report) -> Held | None:
    """What a folder holds, of which no weight is read; None where it has no model, or one of other shapes.

    InputError where there is a config that cannot be read.
    """
    files = list(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").is_file():
        return None
    decoder = load_shapes(str(folder), load_config(str(folder)))
    if report.blocks and original_of(decoder, str(folder)) is None:
        return None
    size = sum(file.stat().st_size for file in files)
    return Held.by(decoder, report, size, tokenizer=any(folder.glob("tokenizer*")))


def loading_code(held: Held) -> str:
    """The Python that loads the folder that it is written in."""
    trust = "" if held.stock else ", trust_remote_code=True"
    # AutoTokenizer asks whether to run the code beside the config, which no tokenizer needs.
    tokenizer = "AutoTokenizer" if held.stock else "PreTrainedTokenizerFast"
    names = f"AutoModelForCausalLM, {tokenizer}" if held.tokenizer else "AutoModelForCausalLM"
    lines = [f"from transformers import {names}", "", 'folder = "."  # the one that this file is in']
    if held.tokenizer:
        lines += [f"tokenizer = {tokenizer}.from_pretrained(folder)"]
    return "\n".join([*lines, f"model = AutoModelForCausalLM.from_pretrained(folder{trust})"])
