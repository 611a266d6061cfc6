"""Which runtimes load a model folder as it is, and why the others do not."""

from dataclasses import dataclass, replace
from pathlib import Path

from optprune.export.exporter import ModelSource
from optprune.export.gguf_file import GgufFile
from optprune.export.onnx_folder import OnnxFolder
from optprune.models import is_stock
from optprune.program import RUNTIMES

NAMES = ("transformers", "transformers-4.57", "vllm", "llama.cpp", "onnxruntime")
"""the runtimes that are asked"""
UNEVEN = "its blocks differ from those of the stock class"
"""reason where a runtime's rules name no other"""


@dataclass(frozen=True)
class Serving:
    """Answer of one runtime."""

    runtime: str
    loads: bool
    sentence: str
    """how it loads the folder, or why it does not and what to do"""


def serving(folder: str | Path) -> tuple[Serving, ...]:
    """Return for transformers 5 and 4.57, vLLM, llama.cpp and ONNX Runtime whether each loads a model folder.

    No weights are read, and no runtime is started: the answers are those of optprune's rules (`RUNTIMES`), which for
    vLLM were tried in it with small models of most families, and for llama.cpp and ONNX Runtime of the exporters.
    InputError where the folder is not a model folder.
    """
    source = ModelSource(folder)
    architecture, config = source.shapes.architecture, source.config
    stock, uneven = is_stock(config), _refusal("transformers", source) or UNEVEN
    by_class = f"{architecture.auto_class}.from_pretrained loads it"
    found = [
        Serving("transformers", True, by_class)
        if stock
        else Serving("transformers", True, f"{by_class} with trust_remote_code=True, because it has {uneven}")
    ]
    older = f"it has no class for {architecture.model_type} models, or that class fails there: use transformers 5"
    if architecture.in_transformers_4:
        older = f"it holds experts in other modules, so optprune's classes are for transformers 5, and it has {uneven}"
    reads = architecture.read_by_older(stock)
    found.append(replace(found[0], runtime=NAMES[1]) if reads else Serving(NAMES[1], False, older))
    refusal = _refusal("vllm", source) or (None if stock else uneven)
    rules, family = RUNTIMES["vllm"], architecture.model_type
    how = f"vllm serve loads it, as it did pruned models of the kind {family}, tried in {rules.tried}"
    if family not in rules.tried_families:
        how = f"vllm serve loads it by its source; models of the kind {family} were not tried in it"
    how = how if refusal is None else f"it does not take {refusal}"
    found.append(Serving("vllm", refusal is None, how))
    for name, exporter, file in (
        ("llama.cpp", GgufFile(), "FILE.gguf"),
        ("onnxruntime", OnnxFolder(), "DIR --format onnx"),
    ):
        refusal = exporter.unsupported(source)
        found.append(Serving(name, refusal is None, refusal or f"after optprune export {folder} --output {file}"))
    return tuple(found)


def _refusal(runtime: str, source: ModelSource) -> str | None:
    """Return what a runtime does not load of a model, or None."""
    return RUNTIMES[runtime].refuses_model(source.shapes)
