"""Loading of models, whole (`load_model`) or block by block (`open_model`). No pickle and no remote code is read."""

import copy
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PretrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError
from optprune.models.checkpoint import Checkpoint, check_finite, check_weights_files, check_weights_named, stated
from optprune.models.decoder import Decoder
from optprune.models.draft import Draft
from optprune.models.gguf import GgufTensor, converted, gguf_config, tensors_in
from optprune.models.images import ImageFeatures
from optprune.models.quantised import Quantisation
from optprune.models.registry import architecture_named, architecture_of, check_config
from optprune.models.skeleton import check_whole, fill, skeleton, with_model_names
from optprune.models.sources import CONVERT, NO_CODE, cause, is_gguf, locate, reading
from optprune.models.store import BlockSink, BlockStore
from optprune.models.tokenizer import load_tokenizer
from optprune.models.tracing import check_laws
from optprune.models.vision import QUANTISED, VisionFolder, stand_alone
from optprune.numerics.tensors import all_finite
from optprune.system.display import Displayed, SummaryTable
from optprune.system.wording import one_line

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
DEVICE = re.compile(r"cpu|cuda(:\d+)?", re.ASCII)
Described = str | Path | Draft
"""a draft of an architecture, or the YAML file that holds one"""


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel(Displayed):
    """A model to prune, evaluate and save, with its tokenizer where the source has one.

    `model` is the transformers model itself.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer | None
    source: str
    store: BlockStore | None = None
    """the store that the blocks come from, where `open_model` gave the model"""
    whole: VisionFolder | None = None
    """the vision-language model that the model is the language part of, where the source is one"""
    images: ImageFeatures | None = None
    """the features of images, where token ids may be numbers of them"""

    def decoder(self) -> Decoder:
        """Return access to the model's blocks, in memory or in files."""
        return Decoder(self.model, self.store, images=self.images)

    def __repr__(self) -> str:
        return f"LoadedModel({', '.join([repr(self.source), *(value for _, value in self._model_facts())])})"

    def summary_table(self) -> SummaryTable:
        """Return a summary for a terminal or a notebook."""
        name = type(self.tokenizer).__name__
        template = "a" if getattr(self.tokenizer, "chat_template", None) else "no"
        tokenizer = (
            "none" if self.tokenizer is None else f"{name}, {len(self.tokenizer):,} tokens, {template} chat template"
        )
        decoder = self.decoder()
        widths = sorted({shape.mlp_width for shape in decoder.shapes()})
        shape = f"{len(decoder.blocks)}, of MLP width {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))}"
        return SummaryTable(
            f"model {one_line(self.source)}", [*self._model_facts(), ("blocks", shape), ("tokenizer", tokenizer)]
        )

    def _model_facts(self) -> list[tuple[str, str]]:
        model = self.model
        place = (
            str(model.device) if self.store is None else f"{self.store.device}, blocks in files until they are needed"
        )
        part = "" if self.whole is None else f", the language part of a {self.whole.family.model_type} model"
        return [
            ("architecture", model.config.model_type + part),
            ("parameters", f"{model.num_parameters():,} parameters"),
            ("computes in", f"{str(model.dtype).removeprefix('torch.')} on {place}"),
        ]


def load_model(
    source: str | Path, *, dtype: str = "auto", device: str = "auto", architecture: Described | None = None
) -> LoadedModel:
    """Load a model into memory with its tokenizer; the transformers model itself is the result's `model`.

    The source is a folder (also one that optprune wrote, whatever the shapes of its blocks), a .gguf file, a hub name,
    or "demo" (SmolLM2-135M-Instruct). `dtype` is auto (as stored; float32 for GGUF), float32, bfloat16 or float16;
    `device` is auto, cpu, cuda or cuda:N. For an `architecture` that is not known, the draft that `optprune inspect`
    wrote, or its file, can be given: its claims are tried on a small model, and it is recorded in the config. Of a
    vision-language model the language part is loaded, as a text model. Raises InputError for a missing path, an unknown
    architecture, a draft of another model, damaged or missing weights.
    """
    source = str(source)
    check_dtype(dtype)
    target = device_of(device)
    where, options = locate(source)
    config, quantised = _config(source, where, options, architecture)
    whole = _whole(source, config)
    model = _weights(source, where, config, quantised, options, DTYPES.get(dtype, "auto"), whole)
    for name, weight in model.named_parameters():
        if not all_finite(weight):
            with reading("weights", source, where, options):
                checkpoint = None if options else stored_checkpoint(source, quantised, whole)
                there = None if checkpoint is None else with_model_names(model, checkpoint)
            if there is not None and name in there.tensors:
                there.read("", [name], weight.dtype)  # says which number is beyond the dtype
            check_finite(name, weight, source)
    Decoder(model).joined()
    model.to(target)  # type: ignore[arg-type]  # transformers overloads .to
    return LoadedModel(model.eval(), load_tokenizer(source), source, whole=whole)


def open_model(
    source: str | Path,
    *,
    dtype: str = "auto",
    device: str = "auto",
    sink: BlockSink | None = None,
    scratch: Path | None = None,
    architecture: Described | None = None,
) -> LoadedModel:
    """Open a model whose blocks stay in its files until they are needed: a skeleton, and a store that reads blocks.

    Sources, options and errors are those of `load_model`, but NaN in a block is found only when the block is read.
    `prune` uses the store. Pruned blocks go into the `sink`. Without one they go, like all temporary data of a pass,
    into a folder in `scratch` (by default the system's temporary folder, which may itself be in memory). A GGUF file is
    first converted to safetensors there, which stay in `scratch` for another call.
    """
    source = str(source)
    check_dtype(dtype)
    target = device_of(device)
    where, options = locate(source)
    config, quantised = _config(source, where, options, architecture)
    gguf = options.get("gguf_file")
    listed, whole = architecture_of(config).blocks, _whole(source, config)
    with reading("weights", source, where, options):
        checkpoint = None if gguf else stored_checkpoint(source, quantised, whole)
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
    store = BlockStore(blocks, checkpoint, target, floats, sink, scratch, decoder.architecture.float32)
    return LoadedModel(model.eval(), load_tokenizer(source), source, store, whole)


def vision_folder(source: str) -> VisionFolder | None:
    """Return the vision-language model of a source; None where the source is of text alone."""
    where, options = locate(source)
    with reading("config", source, where, options):
        return None if options else VisionFolder.of(source, where)


def _whole(source: str, config: PretrainedConfig) -> VisionFolder | None:
    """Return the vision-language model of a source whose config was read, if it is one."""
    return vision_folder(source) if architecture_of(config).part_of else None


def stored_checkpoint(source: str, quantised: Quantisation | None, whole: VisionFolder | None) -> Checkpoint:
    """Return the stored tensors of a model folder or hub name, of a vision-language model those of the language part.

    Names are those of checkpoints of a text model.
    """
    if whole is not None:
        return whole.language_checkpoint()
    where = locate(source)[0]
    return Checkpoint.open(where, source) if quantised is None else quantised.open(where, source)


def gguf_tensors(source: str, model: PreTrainedModel) -> dict[str, GgufTensor]:
    """Return the tensors of a GGUF source that have a place in a model, by their names there; none is read yet."""
    where, options = locate(source)
    with reading("weights", source, where, options):
        return tensors_in(Path(where, str(options["gguf_file"])), model)


def load_config(source: str | Path, architecture: Described | None = None) -> PretrainedConfig:
    """Return the config of a model source, without its weights; with the draft of its architecture if one is given."""
    return read_config(source, architecture)[0]


def read_config(
    source: str | Path, architecture: Described | None = None
) -> tuple[PretrainedConfig, Quantisation | None]:
    """Return the config of a model source, and the method by which its weights are quantised, if they are."""
    source = str(source)
    return _config(source, *locate(source), architecture)


def traceable_config(source: str | Path) -> PretrainedConfig:
    """Return the config of a model source of any architecture that transformers knows, to be traced."""
    source = str(source)
    where, options = locate(source)
    if options:
        raise InputError(f"{source} is a GGUF file, which cannot be traced: give a model folder")
    with reading("config", source, where, options):
        whole = VisionFolder.of(source, where)
        return AutoConfig.from_pretrained(where, **NO_CODE) if whole is None else copy.deepcopy(whole.config)


def load_shapes(source: str | Path, config: PretrainedConfig) -> Decoder:
    """Return a decoder of a config's model that holds shapes only; InputError where there is no such model."""
    with reading("config", str(source), str(source), {}), torch.device("meta"):
        architecture_of(config)  # from here on transformers finds the class of pruned models
        return Decoder(AutoModelForCausalLM.from_config(config, trust_remote_code=False))


def _config(
    source: str, where: str, options: dict[str, Any], described: Described | None = None
) -> tuple[PretrainedConfig, Quantisation | None]:
    """Return the config of a source without its quantization_config, and the quantisation that this describes."""
    draft, whole = Draft.read(described) if isinstance(described, str | Path) else described, None
    with reading("config", source, where, options):
        if not options:
            fields: Any = PretrainedConfig.get_config_dict(where)[0]
            whole = VisionFolder.of(source, where, fields)
            if whole is not None and draft is not None:
                raise InputError(
                    f"{source} is a {whole.family.model_type} model, whose folder is known: leave out --architecture"
                )
            if draft is None and whole is None:
                # Checked before AutoConfig, which would run the code of an architecture that it does not know.
                architecture_named(*(fields.get("model_type"), fields) if isinstance(fields, dict) else (None,))
            if whole is None and isinstance(fields, dict) and "text_config" in fields:
                raise InputError(
                    f"the config of {source} has a text_config, so the model is not of text alone: give a text model"
                )
        if options:
            config = gguf_config(where, **options)
        elif whole is not None:
            config = copy.deepcopy(whole.config)
        else:
            config = AutoConfig.from_pretrained(where, **NO_CODE)
            stand_alone(config)  # a language part that was saved alone
        if draft is not None:
            draft.put_into(config)
        architecture = architecture_of(config)
        check_config(config, architecture, source)
        if options and architecture.mixture is not None:
            raise InputError(f"{source} holds experts, which are not read from GGUF: load the original model folder")
    if draft is not None:
        check_laws(draft, config)
    check_weights_named(config, source)
    # What is read, and saved, are floats.
    stored = vars(config).pop(QUANTISED, None) if whole is None else whole.fields.get(QUANTISED)
    if options:
        return config, None
    with reading("config", source, where, options):
        stored = stated(stored, where)
    if stored is None:
        return config, None
    quantised = Quantisation.of(stored)
    quantised.check(source, () if architecture.mixture is None else architecture.mixture.quantised)
    return config, quantised


def _weights(
    source: str,
    where: str,
    config: PretrainedConfig,
    quantised: Quantisation | None,
    options: dict[str, Any],
    dtype: torch.dtype | str,
    whole: VisionFolder | None,
) -> PreTrainedModel:
    cls: Any = AutoModelForCausalLM
    with reading("weights", source, where, options):
        packed = None if quantised is None or whole is not None else quantised.open(where, source)
        if options or whole is not None:
            # from_pretrained would parse the file again and list the names of every module, which takes seconds.
            shapes = skeleton(config, torch.float32)
            found = gguf_tensors(source, shapes) if whole is None else whole.language_checkpoint().tensors
            state = {name: part.read() for name, part in found.items()}
            cls, folder, given = type(shapes), None, {"config": copy.deepcopy(config), "state_dict": state}
            stored = torch.float32 if whole is None else config.dtype or whole.language_checkpoint().dtype
            dtype = stored if dtype == "auto" else dtype
        elif packed is not None:
            dtype = (getattr(config, "dtype", None) or packed.dtype) if dtype == "auto" else dtype
            state = {name: part.read() for name, part in packed.tensors.items()}
            given = {"config": copy.deepcopy(config), "state_dict": state}
            cls, folder = type(skeleton(config, torch.float32)), None
        else:
            check_weights_files(source, where)
            # The config is passed on, since the files do not hold a draft.
            folder, given = where, {"config": copy.deepcopy(config), "use_safetensors": True, **NO_CODE}
        try:
            # Our classes, registered with transformers, hold pruned shapes: the folder's own copy of them is not run.
            model, report = cls.from_pretrained(folder, dtype=dtype, output_loading_info=True, **given)
        except OSError as error:
            if "use_safetensors" in str(error):
                raise InputError(f"{source} has no weights as safetensors; {CONVERT}") from error
            raise
        if packed is not None:
            with suppress(OSError):  # there need not be one
                model.generation_config = GenerationConfig.from_pretrained(where)
    absent = [*sorted(report["missing_keys"]), *sorted(map(str, report["mismatched_keys"]))]
    check_whole(source, config.model_type, absent, report["unexpected_keys"])
    model.name_or_path = model.config.name_or_path = where
    return model


def check_dtype(name: str) -> None:
    """Raise InputError where the name of a dtype is not known."""
    if name != "auto" and name not in DTYPES:
        raise InputError(f"the dtype {name!r} is not known: use auto, {', '.join(DTYPES)}")


def stored_dtype(source: str, config: PretrainedConfig, dtype: str = "auto") -> torch.dtype | None:
    """Return the dtype that `load_model` and `open_model` give a model; None where only the weights can tell."""
    if dtype != "auto":
        return DTYPES[dtype]
    return torch.float32 if is_gguf(source) else getattr(config, "dtype", None)


def device_of(name: str) -> torch.device:
    """Return the device of a name; InputError where it cannot be used."""
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
