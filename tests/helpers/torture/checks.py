"""Checks of results by means that are not optprune's: other readers, plain sums, and what the input was made of."""

import json
import math
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

OF_GGUF = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
"""the names of a block's tensors in a GGUF file of llama.cpp, and in a folder"""
OUTSIDE = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
ROUNDING = {
    "f32": 1e-6,
    "f16": 1e-3,
    "q8_0": 0.01,
    "q6_K": 0.04,
    "q5_K": 0.08,
    "q5_0": 0.08,
    "q4_K": 0.15,
    "q4_0": 0.15,
}
"""the largest relative change of a tensor by each type"""
BUDGET = 0.011
"""the share of a budget by which a strict run may miss it, where one unit is less"""
UNIT = 0.5
"""the largest such share where whole units are removed"""


def values_of_gguf(file: str, folder: str, type: str, told: str) -> str | None:
    """What is wrong with the numbers of a GGUF file beside those of the folder that it was made of."""
    from gguf import GGUFReader, dequantize

    theirs, rounding = weights_of(Path(folder)), ROUNDING[type]
    for tensor in GGUFReader(file).tensors:
        found = np.sort(np.abs(dequantize(tensor.data, tensor.tensor_type).astype(np.float64)).ravel())
        if not np.isfinite(found).all():
            return f"{tensor.name} holds infinity or NaN"
        if (name := name_in_folder(tensor.name)) not in theirs:
            continue
        # Rows of keys and queries are in another order, which sorting undoes.
        expected = np.sort(np.abs(theirs[name]).ravel())
        missed = np.linalg.norm(found - expected)
        if found.shape != expected.shape or missed > rounding * np.linalg.norm(expected):
            return f"{tensor.name} is {missed / np.linalg.norm(expected):.3g} of itself away from the folder's"
    return None


def name_in_folder(name: str) -> str:
    """The name of a tensor of a GGUF file in a folder of Llama."""
    if not name.startswith("blk."):
        return OUTSIDE.get(name, name)
    _, block, part, _ = name.split(".")
    return f"model.layers.{block}.{OF_GGUF.get(part, part)}.weight"


def weights_of(folder: Path) -> dict[str, Any]:
    """The tensors of a folder's files, in float64."""
    from safetensors.torch import load_file

    return {
        name: tensor.double().numpy()
        for file in sorted(folder.glob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def documents(file: str, expected: list[str], told: str) -> str | None:
    """What of the documents in a JSON file is another than the input was made of, in whatever order."""
    found = json.loads(Path(file).read_text())
    one, other = (
        Counter(text.replace("\r\n", "\n").replace("\r", "\n") for text in texts) for texts in (found, expected)
    )
    if one == other:
        return None
    return f"it read {list((one - other).elements())!r:.200} and not {list((other - one).elements())!r:.200}"


def sparsity(dense: str, pruned: str, asked: float, told: str) -> str | None:
    """Whether a strict run has removed another share of the blocks' linear weights than was asked for."""
    before, after = linear(Path(dense)), linear(Path(pruned))
    total, left = (sum(int((weight != 0).sum()) for weight in weights) for weights in (before, after))
    removed, due = total - left, asked * total
    by_units = [weight.shape for weight in before] != [weight.shape for weight in after]
    if abs(removed - due) <= (UNIT * due if by_units else max(BUDGET * due, len(before))):
        return None
    return f"{removed / total:.4%} of the weights are removed, and {asked:.4%} were asked for"


def linear(folder: Path) -> list[Any]:
    """The weights of linear layers in the blocks of a folder."""
    return [weight for name, weight in weights_of(folder).items() if ".layers." in name and weight.ndim == 2]


def answer(file: str, problem: str, told: str) -> str | None:
    """What is wrong with the answer to a problem of a 2:4 pattern, by its file."""
    from safetensors.torch import load_file

    value = load_file(file)["value"]
    weight = load_file(problem)
    known = [tensor for tensor in weight.values() if tensor.is_floating_point()]
    if value.dtype != known[0].dtype:
        return f"the answer is in {value.dtype}, and the problem in {known[0].dtype}"
    if not bool(value.isfinite().all()):
        return "the answer is not finite"
    if value.ndim != 2 or int((value.unflatten(1, (-1, 4)) != 0).sum(2).max()) > 2:
        return "the answer has more than two of four weights"
    return None


def problems(folder: str, told: str) -> str | None:
    """What is wrong with a folder of problems."""
    from safetensors.torch import load_file

    files = list(Path(folder).glob("*.safetensors"))
    if not files:
        return "there are no problems"
    for file in files:
        for name, tensor in load_file(file).items():
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                return f"{name} in {file.name} is not finite"
    return None


def healed(folder: str, told: str) -> str | None:
    """Whether a healed folder has its page, or a word was said about it."""
    page = Path(folder) / "report.html"
    whole = page.is_file() and page.read_text(encoding="utf-8").rstrip().endswith("</html>")
    return None if whole or "report" in told else "it has no page, and nothing was said"


def scores(file: str, told: str) -> str | None:
    """Whether the scores of experts are numbers."""
    for block, values in json.loads(Path(file).read_text())["scores"].items():
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in values):
            return f"the scores of block {block} are {values}"
    return None


CHECKS: dict[str, Callable[..., str | None]] = {
    each.__name__: each for each in (values_of_gguf, documents, sparsity, answer, problems, healed, scores)
}
