"""A model folder as ONNX: one graph for all batches and lengths, with or without a key/value cache, checked by running.

It stands on torch's own exporter, since optimum's is for transformers before 4.58.
"""

import contextlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from optprune.errors import InputError, OptpruneError, is_out_of_memory, no_room
from optprune.export.onnx_check import difference_of, without_telemetry
from optprune.export.origin import origin_of
from optprune.export.own_files import check_own_files
from optprune.export.place import Scratch, check_output, delete_left_behind, missing_parents, put_in_place
from optprune.export.portable import make_portable
from optprune.models import Decoder, LoadedModel, architecture_of, load_config, load_model
from optprune.models.architecture import rope_types
from optprune.recipe import RUNTIMES
from optprune.system.files import real_path
from optprune.system.interrupts import interrupts_held, record_done
from optprune.system.wording import one_line

PACKAGES = ("onnx", "onnxruntime", "onnxscript")
FILE = "model.onnx"
"""the name of the graph in its folder, where runtimes look for it"""
LARGEST = 1_500_000_000
"""the most bytes of weights that are written into the graph's own file: no such file can have over 2 GiB"""
TOLERANCE = 1e-3
"""the largest difference of logits with which a graph is believed"""
EXAMPLE = (2, 7, 5)
"""the batch, the tokens and the tokens before them that the graph is traced with: all different, and none is 1"""


@dataclass(frozen=True)
class OnnxFolder:
    """A folder that was written."""

    folder: Path
    bytes: int
    """the size of the graph with its weights"""
    cache: bool
    """whether the graph takes keys and values of the tokens before, and gives them"""
    logits_difference: float
    """the largest difference between logits of ONNX Runtime and of transformers"""


def export_onnx(source: str | Path, output: str | Path, *, cache: bool = False, overwrite: bool = False) -> OnnxFolder:
    """Write a model as model.onnx in float32 into a folder, with its tokenizer and configs, whole or not at all.

    The inputs are `input_ids`, `attention_mask` and `position_ids` [batch, tokens], the output is `logits` [batch,
    tokens, vocabulary]. With `cache` there are also `past_key_values.N.key` and `.value` [batch, heads, before, dim],
    whose `before` may be 0, and `present.N.key` and `.value`; N counts the blocks that have attention, and the mask
    is then [batch, before + tokens]. Blocks may differ in shape.

    The folder gets its name once ONNX Runtime on the CPU gives the logits that transformers gives, within 1e-3, in
    batches and lengths other than those of the export. The model is in memory in float32, and twice more while it is
    checked. The telemetry of ONNX Runtime is off in this process from then on. InputError where a package or a place is
    missing, or the model's rotary embeddings go by the length.
    """
    absent = [name for name in PACKAGES if find_spec(name) is None]
    if absent:
        raise InputError(
            f"to export ONNX takes the package {absent[0]}, which is not installed: run pip install 'optprune[onnx]'"
        )
    without_telemetry()
    source, output = str(source), Path(output)
    place = real_path(output)
    if place.suffix == ".onnx":
        raise InputError(f"ONNX is written as a folder with {FILE} in it: name one in place of {output}")
    if real_path(Path(source)).is_relative_to(place):
        raise InputError(f"the output folder {output} holds the model that is read: name another")
    check_output(output, overwrite)
    check_own_files(source)
    config = load_config(source)
    family = architecture_of(config).model_type
    if family not in RUNTIMES["onnx"].families:
        raise InputError(
            f"a {family} model runs other experts for other tokens, which a graph cannot: it is not exported to ONNX"
        )
    for kind in rope_types(config):
        if kind not in RUNTIMES["onnx"].rotary:
            raise InputError(
                f"rotary embeddings scaled by {kind} change with the length of a text, which a graph cannot: the "
                f"scalings {', '.join(RUNTIMES['onnx'].rotary)} are exported to ONNX"
            )
    loaded = load_model(source, dtype="float32", device="cpu")
    return _written(loaded, output, place, cache, overwrite)


def _written(loaded: LoadedModel, output: Path, place: Path, cache: bool, overwrite: bool) -> OnnxFolder:
    delete_left_behind(place)
    program, created = program_of(loaded.model, cache), missing_parents(place)
    with interrupts_held():
        place.parent.mkdir(parents=True, exist_ok=True)
        scratch = Scratch(place)
    try:
        draft = scratch.folder / "model"
        draft.mkdir()
        file = draft / FILE
        program.save(file, external_data=_bytes_of(loaded.model) > LARGEST)
        del program
        _put_beside(loaded, draft)
        difference = difference_of(file, loaded.model, cache)
        if not difference <= TOLERANCE:
            raise OptpruneError(
                f"nothing was written, since the logits of ONNX Runtime differ by {difference:.3g} from those of "
                f"transformers (at most {TOLERANCE:g} is rounding): please report this"
            )
        size = sum(part.stat().st_size for part in draft.glob(f"{FILE}*"))
        with interrupts_held():
            put_in_place(draft, place, overwrite)
            record_done(f"the exported model is in {output}")
    except Exception as error:
        full = no_room(error)
        if full is None:
            raise
        raise InputError(f"{full}, so {output} was not written: make room and run again") from error
    finally:
        with interrupts_held():
            scratch.discard()
            for parent in () if place.exists() else created:
                with contextlib.suppress(OSError):  # somebody else has put something into it
                    parent.rmdir()
    return OnnxFolder(output, size, cache, difference)


def _put_beside(loaded: LoadedModel, draft: Path) -> None:
    """What a runtime wants beside the graph: the configs, the tokenizer, and the licence that goes along."""
    loaded.model.config.save_pretrained(draft)
    if loaded.model.generation_config is not None:
        loaded.model.generation_config.save_pretrained(draft)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(draft)
    make_portable(draft, loaded.tokenizer)
    for name, text in origin_of(loaded.source).licence_files.items():
        (draft / name).write_text(text, encoding="utf-8")


def program_of(model: PreTrainedModel, cache: bool) -> torch.onnx.ONNXProgram:
    """The graph of a model in evaluation mode on the CPU, with its weights; OptpruneError where torch can make none."""
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
            (torch.zeros(batch, shape.kv_heads, before, dims), torch.zeros(batch, shape.kv_heads, before, each))
            for shape, each in ((shape, shape.value_dim) for shape in shapes)
        ]
        axes["attention_mask"] = {0: "batch", 1: "before_and_tokens"}
        axes["past"] = [({0: "batch", 2: "before"},) * 2 for _ in shapes]
        outputs += cache_names("present", len(shapes))
    names = [*list(inputs)[:3], *(cache_names("past_key_values", len(shapes)) if cache else ())]
    with _quietly(), torch.no_grad():
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
    """The names of the keys and values of the blocks that have attention."""
    return [f"{of}.{block}.{part}" for block in range(blocks) for part in ("key", "value")]


class _Graph(nn.Module):
    """A model as a function of tensors alone."""

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
def _quietly() -> Iterator[None]:
    """Without what the exporter says of packages that are not there and of torch's own future."""
    logger = logging.getLogger("torch.onnx")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(before)
