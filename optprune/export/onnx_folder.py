"""Exporter to ONNX: one graph for all batch sizes and lengths, with or without a key/value cache, which is run once.

It uses torch's own exporter, since optimum's requires transformers before 4.58.
"""

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from optprune.errors import InputError, OptpruneError, is_out_of_memory
from optprune.export.exporter import Draft, Exporter, ModelSource, OnEvent
from optprune.export.portable import make_portable
from optprune.export.source_files import origin_of
from optprune.models import Decoder, LoadedModel, architecture_of
from optprune.models.architecture import rope_types
from optprune.program import RUNTIMES
from optprune.system.wording import install, one_line
from optprune.work import Work

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FILE = "model.onnx"
"""name of the graph in its folder, where runtimes look for it"""
LARGEST = 1_500_000_000
"""maximum number of bytes of weights in the graph's own file, which cannot have over 2 GiB"""
TOLERANCE = 1e-3
"""largest difference of logits that passes the check"""
EXAMPLE = (2, 7, 5)
"""batch size, number of tokens and of cached tokens that the graph is traced with: all different, and none is 1"""
TELEMETRY = "ORT_DISABLE_TELEMETRY"
"""variable that ONNX Runtime reads when it is imported: unless it is 1, it sends events, and writes an id of the
machine into the home directory"""
SIZES = ((1, 32, 0), (3, 17, 4))
"""batch size, length, and length of the padding before the first text, of the inputs that are compared"""
CACHED = "past_key_values"


@dataclass(frozen=True, kw_only=True)
class OnnxFolder(Exporter):
    """Folder with model.onnx in float32, the tokenizer and the configs.

    The inputs are `input_ids`, `attention_mask` and `position_ids` [batch, tokens], the output is `logits` [batch,
    tokens, vocabulary]. With `cache` there are also `past_key_values.N.key` and `.value` [batch, heads, before, dim],
    whose `before` may be 0, and `present.N.key` and `.value`; N counts the blocks that have attention, and the mask is
    then [batch, before + tokens]. Blocks may differ in shape.

    The check compares the logits of ONNX Runtime on the CPU with those of transformers, in batches and lengths other
    than those of the export. The model is in memory in float32, and twice more during the check. The telemetry of ONNX
    Runtime is off in this process from then on.
    """

    name: ClassVar[str] = "onnx"
    description: ClassVar[str] = "a folder for ONNX Runtime"

    cache: bool = False
    """whether the graph takes keys and values of earlier tokens as inputs, and returns them"""

    def check_output(self, output: Path, overwrite: bool) -> None:
        if output.suffix == ".onnx":
            raise InputError(f"ONNX is written as a folder with {FILE} in it: name a folder instead of {output}")
        super().check_output(output, overwrite)

    def unsupported(self, source: ModelSource) -> str | None:
        absent = [name for name in PACKAGES if find_spec(name) is None]
        if absent:
            return f"the export to ONNX needs the package {absent[0]}, which is not installed: {install('onnx')}"
        architecture, runtime = architecture_of(source.config), RUNTIMES["onnx"]
        if architecture.model_type not in runtime.families:
            reason = "its architecture is known from a draft only, of which no export was tried"
            if architecture.mixture is not None:
                reason = "each token runs its own experts, which a graph cannot do"
            if architecture.recurrent is not None:
                reason = "the states of its recurrent mixers are not among the inputs and outputs of a graph"
            if architecture.shared is not None:
                reason = "its blocks hand keys and values on to others, which is not tried there"
            return f"a {architecture.model_type} model cannot be exported to ONNX, because {reason}"
        for kind in rope_types(source.config):
            if kind not in runtime.rotary:
                return (
                    f"rotary embeddings scaled by {kind} cannot be exported to ONNX, because they depend on the length "
                    f"of the text; only the scalings {', '.join(runtime.rotary)} can"
                )
        if source.loaded is not None:
            model, store = source.loaded.model, source.loaded.store
            if store is not None or model.device.type != "cpu" or model.dtype != torch.float32:
                return "a loaded model is exported to ONNX in float32 on the CPU only: save it, and export the folder"
        return None

    def write(self, source: ModelSource, draft: Path, on_event: OnEvent) -> Draft:
        without_telemetry()
        loaded = source.load("float32")
        program = program_of(loaded.model, self.cache)
        draft.mkdir()
        program.save(draft / FILE, external_data=_bytes_of(loaded.model) > LARGEST)
        del program
        _write_beside(loaded, draft)
        size = sum(part.stat().st_size for part in draft.glob(f"{FILE}*"))
        return Draft(draft, size, f"{'with' if self.cache else 'without'} a key/value cache", expected=loaded.model)

    def check(self, source: ModelSource, draft: Draft, on_event: OnEvent) -> float | None:
        difference = difference_of(draft.path / FILE, draft.expected, self.cache)
        if not difference <= TOLERANCE:
            raise OptpruneError(
                f"nothing was written, because the logits of ONNX Runtime differ by {difference:.3g} from those of "
                f"transformers (at most {TOLERANCE:g} is rounding): please report this"
            )
        return difference

    def work(self, source: ModelSource) -> Work:
        weights = sum(parameter.numel() for parameter in source.shapes.model.parameters())
        tokens = sum(batch * length for batch, length, _ in SIZES)
        return Work(flops=2 * 2 * tokens * weights, bytes=3 * 4 * weights)


def _write_beside(loaded: LoadedModel, draft: Path) -> None:
    """Write the configs, the tokenizer and the licence files beside the graph."""
    loaded.model.config.save_pretrained(draft)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(draft)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(draft)
    make_portable(draft, loaded.tokenizer)
    for name, text in origin_of(loaded.source).licence_files.items():
        (draft / name).write_text(text, encoding="utf-8")


def program_of(model: PreTrainedModel, cache: bool) -> torch.onnx.ONNXProgram:
    """Return the graph of a model in evaluation mode on the CPU. Raises OptpruneError where torch fails."""
    batch, tokens, before = EXAMPLE if cache else (*EXAMPLE[:2], 0)
    shapes = [shape for shape in Decoder(model).shapes() if shape.kv_heads]
    ids = torch.zeros(batch, tokens, dtype=torch.long)
    mask, positions = torch.ones(batch, before + tokens, dtype=torch.long), torch.arange(before, before + tokens)
    inputs: dict[str, Any] = {
        "input_ids": ids,
        "attention_mask": mask,
        "position_ids": positions.expand(batch, tokens).clone(),
    }
    axes: dict[str, Any] = {name: {0: "batch", 1: "tokens"} for name in inputs}
    outputs = ["logits"]
    if cache:
        dims = Decoder(model).heads.dim
        inputs["past"] = [
            tuple(
                torch.zeros(batch, shape.kv_heads, before, each) for each in (2 * shape.pairs or dims, shape.value_dim)
            )
            for shape in shapes
        ]
        axes["attention_mask"] = {0: "batch", 1: "before_and_tokens"}
        axes["past"] = [({0: "batch", 2: "before"},) * 2 for _ in shapes]
        outputs += cache_names("present", len(shapes))
    names = [*list(inputs)[:3], *(cache_names(CACHED, len(shapes)) if cache else ())]
    with _silenced(), torch.no_grad():
        try:
            program = torch.onnx.export(
                _Graph(model).eval(),
                kwargs=inputs,
                input_names=names,
                output_names=outputs,
                dynamic_shapes=axes,
                dynamo=True,
                verbose=False,
            )
        except Exception as error:
            if is_out_of_memory(error):
                raise
            reason = one_line(str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__)
            raise OptpruneError(f"torch cannot export this model to ONNX: {reason}") from error
    assert program is not None, "dynamo gives a program"
    return program


def cache_names(of: str, blocks: int) -> list[str]:
    """Return the names of the keys and values of the blocks that have attention."""
    return [f"{of}.{block}.{part}" for block in range(blocks) for part in ("key", "value")]


class _Graph(nn.Module):
    """Model as a function of tensors alone."""

    def __init__(self, model: PreTrainedModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor,
        position_ids: Tensor,
        past: Sequence[tuple[Tensor, Tensor]] | None = None,
    ) -> Any:
        inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids}
        if past is None:
            return self.model(**inputs, use_cache=False).logits
        # Without a config every layer keeps all tokens, also where a window hides some: the masks do that.
        cache = DynamicCache()
        for layer, (keys, values) in enumerate(past):
            cache.update(keys, values, layer)
        logits = self.model(**inputs, cache=cache, use_cache=True).logits
        return logits, [(layer.keys, layer.values) for layer in cache.layers]  # type: ignore[attr-defined]


def _bytes_of(model: PreTrainedModel) -> int:
    return sum(weight.nbytes for weight in model.state_dict().values())


@contextlib.contextmanager
def _silenced() -> Iterator[None]:
    """Silence the exporter's messages about missing packages and its own deprecations for the context."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)


def difference_of(file: Path, model: PreTrainedModel, cache: bool) -> float:
    """Return the largest difference of logits between a graph and its model in float32 and evaluation mode, or NaN.

    The second batch begins with padding. With a `cache` the graph reads a text in three parts, the first with an empty
    cache and the last of one token, and transformers reads it at once.
    """
    session = _session(file)
    found = [_largest(session, model, cache, ids, mask) for ids, mask in _texts(model)]
    return float(torch.tensor(found).max())


def without_telemetry() -> None:
    """Disable the telemetry of ONNX Runtime; this has an effect only before onnxruntime is imported."""
    os.environ[TELEMETRY] = "1"


def _session(file: Path) -> Any:
    without_telemetry()
    import onnxruntime

    onnxruntime.disable_telemetry_events()  # in case other code has imported it before
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])


def _texts(model: PreTrainedModel) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield token ids [batch, length] drawn from the vocabulary, and masks that are 0 for padding."""
    generator = torch.Generator().manual_seed(0)
    vocabulary, limit = model.config.vocab_size, getattr(model.config, "max_position_embeddings", None)
    for batch, most, padding in SIZES:
        length = min(most, limit or most)
        mask = torch.ones(batch, length, dtype=torch.long)
        mask[0, : min(padding, length - 1)] = 0
        yield torch.randint(vocabulary, (batch, length), generator=generator), mask


def _largest(session: Any, model: PreTrainedModel, cache: bool, ids: Tensor, mask: Tensor) -> float:
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        # Without padding, transformers numbers the positions itself.
        own = {"attention_mask": mask, "position_ids": positions} if not bool(mask.all()) else {}
        expected = model(input_ids=ids, use_cache=False, **own).logits
    length = ids.shape[1]
    ends = sorted({length // 2, length - 1, length} - {0}) if cache else [length]
    parts, past, begin = list[Tensor](), _empty_cache(session, len(ids)), 0
    names = [output.name for output in session.get_outputs()]
    for end in ends:
        feed = {
            "input_ids": ids[:, begin:end].numpy(),
            "attention_mask": mask[:, :end].numpy(),
            "position_ids": positions[:, begin:end].numpy(),
        }
        outputs = dict(zip(names, session.run(names, feed | past), strict=True))
        parts.append(torch.from_numpy(outputs.pop("logits")))
        past = {name.replace("present", CACHED, 1): value for name, value in outputs.items()}
        begin = end
    return float((torch.cat(parts, dim=1) - expected)[mask.bool()].abs().max())


def _empty_cache(session: Any, batch: int) -> dict[str, Any]:
    """Return keys and values of no tokens, by input name."""
    past = [one for one in session.get_inputs() if one.name.startswith(f"{CACHED}.")]
    return {one.name: torch.zeros(batch, one.shape[1], 0, one.shape[3]).numpy() for one in past}
