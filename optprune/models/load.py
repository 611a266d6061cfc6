"""Loading: a local folder, a hub name, a .gguf file, or the packaged demo model. No pickle, no remote code."""

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
)
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.models.checkpoint import Checkpoint, check_finite
from optprune.models.config_check import check_config
from optprune.models.decoder import Decoder
from optprune.models.demo_file import demo_model_file
from optprune.models.draft import Draft
from optprune.models.gguf import GgufTensor, converted, gguf_config, gguf_tokenizer, tensors_in
from optprune.models.growth import check_file, check_growth
from optprune.models.loaded import LoadedModel
from optprune.models.reading import cause, reading
from optprune.models.registry import architecture_called, architecture_of
from optprune.models.skeleton import check_whole, fill, skeleton
from optprune.models.store import BlockSink, BlockStore
from optprune.models.tracing import check_laws
from optprune.models.weights_files import check_weights_files, check_weights_named

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEMO = "demo"
NO_CODE = {"trust_remote_code": False}
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+", re.ASCII)
FORMS = "a model folder, a .gguf file, a hub name (OWNER/NAME) or 'demo'"
"""what a model source may be, in words"""
CONVERT = (
    "that is pickle (pytorch_model.bin), which can run code when it is read: where you trust it, convert it with "
    "transformers' AutoModelForCausalLM.from_pretrained(OLD).save_pretrained(NEW), which writes safetensors"
)
Described = str | Path | Draft
"""a draft of an architecture, or the YAML file that holds one"""
DEVICE = re.compile(r"cpu|cuda(:\d+)?", re.ASCII)


def load_model(
    source: str | Path, *, dtype: str = "auto", device: str = "auto", architecture: Described | None = None
) -> LoadedModel:
    """Load a model with its tokenizer, to prune, evaluate and save it; `load` gives the transformers model alone.

    The source is a folder, a .gguf file, a hub name, or "demo" (SmolLM2-135M-Instruct).
    `dtype` is auto (as stored; float32 for GGUF), float32, bfloat16 or float16; `device` is auto, cpu, cuda or
    cuda:N. Of an `architecture` that is not known, the draft that `optprune inspect` wrote, or its file, can be given:
    what it says is tried on a small model, and goes into the config. Raises InputError for a path that is not there,
    an unknown architecture, a draft that is not of this model, damaged or missing weights.
    """
    source = str(source)
    check_dtype(dtype)
    target = device_of(device)
    where, options = _locate(source)
    config = _config(source, where, options, architecture)
    model = _weights(source, where, config, options, DTYPES.get(dtype, "auto"))
    for name, weight in model.named_parameters():
        check_finite(name, weight, source)
    Decoder(model).joined()
    model.to(target)  # type: ignore[arg-type]  # transformers overloads .to
    return LoadedModel(model.eval(), load_tokenizer(source), source)


def open_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    sink: BlockSink | None = None,
    scratch: Path | None = None,
    architecture: Described | None = None,
) -> LoadedModel:
    """A model whose blocks stay in its files until they are needed: its skeleton, and a store that reads them.

    With the sources, options and errors of `load_model`, but that NaN in a block is found when it is read. `prune`
    takes the store. What pruning makes of a block goes into the `sink`; without one, and with what else a pass puts
    aside, into a folder in `scratch` (the system's for temporary files, which may be in memory itself). A GGUF file is
    turned into safetensors there first, which stay in `scratch` for another call.
    """
    source = str(source)
    check_dtype(dtype)
    target = device_of(device)
    where, options = _locate(source)
    config, gguf = _config(source, where, options, architecture), options.get("gguf_file")
    listed = architecture_of(config).blocks
    with reading("weights", source, where, options):
        checkpoint = None if gguf else Checkpoint.open(where, source)
    with reading("config", source, where, options):
        stored = torch.float32 if checkpoint is None else getattr(config, "dtype", None) or checkpoint.dtype
        floats = DTYPES.get(dtype, stored)
        model = skeleton(config, floats)
        with suppress(OSError):  # there need not be one
            model.generation_config = model.generation_config if gguf else GenerationConfig.from_pretrained(where)
    with reading("weights", source, where, options):
        if checkpoint is None:
            checkpoint = converted(Path(where, str(gguf)), model, floats, scratch, source)
        decoder = Decoder(model)
        checkpoint = fill(model, checkpoint, listed, target)
    blocks = {decoder.block_name(index): block for index, block in enumerate(decoder.blocks)}
    store = BlockStore(blocks, checkpoint, target, floats, sink, scratch)
    return LoadedModel(model.eval(), load_tokenizer(source), source, store)


def is_gguf(source: str | Path) -> bool:
    """Whether a model source is a GGUF file, as "demo" is; InputError where there is none."""
    return "gguf_file" in _locate(str(source))[1]


def gguf_tensors(source: str, model: PreTrainedModel) -> dict[str, GgufTensor]:
    """The tensors of a GGUF source that have a place in a model, by their names there; none is read yet."""
    where, options = _locate(source)
    with reading("weights", source, where, options):
        return tensors_in(Path(where, str(options["gguf_file"])), model)


def load(folder: str | Path, *, dtype: str = "auto", device: str = "cpu") -> PreTrainedModel:
    """The transformers model alone that is in a folder that optprune wrote, whatever its shapes.

    It is for use, in place of `AutoModelForCausalLM.from_pretrained`. It takes every source of `load_model`, raises its
    errors, and is that one's `model`: on the CPU where no device is named, and without a tokenizer.
    """
    return load_model(folder, dtype=dtype, device=device).model


def load_tokenizer(source: str | Path) -> Tokenizer | None:
    """The tokenizer of a model source, or None when it has none."""
    source = str(source)
    where, options = _locate(source)
    if not options and Path(where).is_dir() and not any(Path(where).glob("*token*")):
        return None
    with reading("tokenizer", source, where, options):
        try:
            if options:
                return gguf_tokenizer(where, **options)
            check_file(where, source)
            tokenizer = AutoTokenizer.from_pretrained(where, **NO_CODE)
            check_growth(tokenizer, source)
            return tokenizer
        except ValueError as error:
            if "trust_remote_code" in str(error):
                raise InputError(
                    f"the tokenizer of {source} is code that comes with it, which is not run: save it as tokenizer.json"
                ) from error
            raise


@contextmanager
def using_tokenizer(source: str) -> Iterator[None]:
    """What a tokenizer raises only when it is used, as the sentences of `load_tokenizer`."""
    with reading("tokenizer", source, source, {}):
        yield


def need_tokenizer(tokenizer: Tokenizer | None, source: str) -> Tokenizer:
    """The tokenizer of a model source; InputError where it has none."""
    if tokenizer is None:
        raise InputError(f"the model {source} has no tokenizer, which is needed to read text: save one in its folder")
    return tokenizer


def load_config(source: str | Path, architecture: Described | None = None) -> PretrainedConfig:
    """The config of a model source, without its weights; with the draft of its architecture where one is given."""
    source = str(source)
    return _config(source, *_locate(source), architecture)


def traceable_config(source: str | Path) -> PretrainedConfig:
    """The config of a model source of any architecture that transformers knows, to be traced."""
    source = str(source)
    where, options = _locate(source)
    if options:
        raise InputError(f"{source} is a GGUF file, whose architecture is known or not: give a model folder to trace")
    with reading("config", source, where, options):
        return AutoConfig.from_pretrained(where, **NO_CODE)


def load_shapes(source: str | Path, config: PretrainedConfig) -> Decoder:
    """A model of a source's config that holds shapes only; InputError when there is none."""
    with reading("config", str(source), str(source), {}), torch.device("meta"):
        return Decoder(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def _locate(source: str) -> tuple[str, dict[str, Any]]:
    """What to hand to from_pretrained, and the options a GGUF file needs."""
    path = Path(demo_model_file() if source == DEMO else source)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"there is no GGUF file {source}: check the path")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and source.strip():
        if not (path / "config.json").is_file():
            raise InputError(f"the folder {source} has no config.json: give a folder written by save_pretrained")
        if any(path.glob("pytorch_model*.bin")) and not any(path.glob("*.safetensors")):
            raise InputError(f"the folder {source} holds weights in a format that is not loaded; {CONVERT}")
        return str(path), {}
    # A name is not looked up in the hub where there is a folder it could have been in.
    here = path.exists() or (len(path.parts) > 1 and path.parent.is_dir())
    if here or not HUB_NAME.fullmatch(source) or source.startswith("."):
        raise InputError(f"there is no model folder {source!r}: give {FORMS}")
    return source, {}


def _config(source: str, where: str, options: dict[str, Any], described: Described | None = None) -> PretrainedConfig:
    draft = Draft.read(described) if isinstance(described, str | Path) else described
    with reading("config", source, where, options):
        if not options:
            fields: Any = PretrainedConfig.get_config_dict(where)[0]
            if draft is None:
                # Asked before AutoConfig is, for which an architecture it does not know is code to run.
                architecture_called(*(fields.get("model_type"), fields) if isinstance(fields, dict) else (None,))
            if isinstance(fields, dict) and "text_config" in fields:
                raise InputError(
                    f"the config of {source} has a text_config, as models that read images have: give one of text alone"
                )
        config = gguf_config(where, **options) if options else AutoConfig.from_pretrained(where, **NO_CODE)
        if draft is not None:
            draft.carried_by(config)
        architecture = architecture_of(config)
        check_config(config, architecture, source)
        if options and architecture.mixture is not None:
            raise InputError(f"{source} holds experts, which are not read from GGUF: load the folder it was made of")
    if draft is not None:
        check_laws(draft, config)
    check_weights_named(config, source)
    quantised = getattr(config, "quantization_config", None)
    if quantised is not None and not options:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else type(quantised).__name__
        raise InputError(
            f"the checkpoint {source} is quantised ({method or 'by an unnamed method'}), and pruning needs plain "
            "weights: load the unquantised original"
        )
    return config


def _weights(
    source: str, where: str, config: PretrainedConfig, options: dict[str, Any], dtype: torch.dtype | str
) -> PreTrainedModel:
    cls: Any = AutoModelForCausalLM
    with reading("weights", source, where, options):
        if options:
            # from_pretrained would parse the file once more, and ask every module for its names: that takes seconds.
            shapes = skeleton(config, torch.float32)
            state = {name: part.read() for name, part in gguf_tensors(source, shapes).items()}
            cls, folder, given = type(shapes), None, {"config": copy.deepcopy(config), "state_dict": state}
            dtype = torch.float32 if dtype == "auto" else dtype
        else:
            check_weights_files(source, where)
            # Of a draft the files say nothing, so the config is handed on.
            folder, given = where, {"config": copy.deepcopy(config), "use_safetensors": True, **NO_CODE}
        try:
            # Pruned shapes are held by classes of ours that transformers knows: the folder's own copy is not run.
            model, report = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **given)
        except OSError as error:
            if "use_safetensors" in str(error):
                raise InputError(f"the weights of {source} are not there as safetensors; {CONVERT}") from error
            raise
    absent = [*sorted(report["missing_keys"]), *sorted(map(str, report["mismatched_keys"]))]
    check_whole(source, config.model_type, absent, report["unexpected_keys"])
    model.name_or_path = model.config.name_or_path = where
    return model


def check_dtype(name: str) -> None:
    """Raise InputError when a dtype's name is not known."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"the dtype {name!r} is not known: use auto, {', '.join(DTYPES)}")


def stored_dtype(source: str, config: PretrainedConfig, dtype: str = "auto") -> torch.dtype | None:
    """The dtype that `load_model` and `open_model` give a model of a config; None where only the weights say it."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.float32 if is_gguf(source) else getattr(config, "dtype", None)


def device_of(name: str) -> torch.device:
    """The device that a name stands for; InputError when it cannot be used."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not DEVICE.fullmatch(name):
        raise InputError(f"the device {name!r} is not known: use auto, cpu, cuda or cuda:N")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"the device {name!r} cannot be used: {cause(error)}") from error
    return device
