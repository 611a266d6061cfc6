"""How much faster and smaller a model is with 10, 20 and 30 percent of its decoder's linear weights removed.

    .venv/bin/python -m benchmarks.inference smollm2
    .venv/bin/python -m benchmarks.inference llama3-8b

Only shapes matter for speed, so the MLP units that stay are the first ones: the shapes are those that FASP with MLP
units gives. `llama3-8b` has the blocks of Llama 3 8B (hidden 4096, MLP 14336, 32 heads, 8 KV heads) with random
weights; it has few of them to fit the memory, and a vocabulary cut down so that the head does not count for more than
in the whole model. All models take turns in every repeat, and ratios are taken within a repeat. Peak memory is the
weights and the most that a run takes on top; a safetensors file is as large as the weights.
"""

import argparse
import copy

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from benchmarks.common import write_table
from optprune.allocation.uniform import uniform
from optprune.measure import Repeats, SpeedWorkload, measure_speed
from optprune.measure.speed import device_name
from optprune.models import Decoder, Mlp, load_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
WIDTH_MULTIPLE = {"smollm2": 8, "llama3-8b": 128}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=list(WIDTH_MULTIPLE))
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--width-multiple", type=int, help="of the MLP [default: 8 and 128]")
    parser.add_argument("--blocks", type=int, default=2, help="of the llama3-8b stack")
    parser.add_argument("--vocabulary", type=int, default=1024, help="of the llama3-8b stack")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    work = SpeedWorkload(options.prompt_tokens, options.new_tokens, options.batch, options.repeats)
    if options.model == "smollm2":
        dense, what = load_model("demo", dtype=options.dtype, device=options.device).model, "SmolLM2-135M-Instruct"
    else:
        dense = llama3_8b(options.blocks, options.vocabulary, DTYPES[options.dtype]).to(options.device)
        what = f"{options.blocks} blocks of the shape of Llama 3 8B, random weights, vocabulary {options.vocabulary}"
    multiple = options.width_multiple or WIDTH_MULTIPLE[options.model]
    models = {"dense": dense} | {f"{asked:.0%}": narrowed(dense, asked, multiple) for asked in options.sparsities}
    measured = measure_speed(models, work, on_run=lambda done, total: print(f"run {done} of {total}", flush=True))
    before = Decoder(dense).linear_weights()
    rows = []
    for speed in measured:
        decoder, ratios = Decoder(models[speed.name]), speed.over(measured[0])
        rows.append(
            {
                "removed, asked": speed.name,
                "reached": 1 - decoder.linear_weights() / before,
                "MLP units": decoder.shape(0).mlp_width,
                "prefill, tokens/s": told(speed.prefill),
                "over dense": told(ratios.prefill),
                "decoding, tokens/s": told(speed.decode),
                "decoding over dense": told(ratios.decode),
                "peak memory, MiB": "unknown" if speed.peak_bytes is None else speed.peak_bytes / 2**20,
                "peak over dense": "unknown" if ratios.peak_memory is None else ratios.peak_memory,
                "weights, MiB": speed.weight_bytes / 2**20,
                "weights over dense": ratios.weights,
            }
        )
    title = (
        f"Inference of {what}: {options.dtype} on {device_name(dense.device)}, batch {work.batch}, prompts of "
        f"{work.prompt_tokens} tokens, {work.new_tokens} new tokens, medians (quartiles) of {work.repeats} repeats"
    )
    name = f"inference_{options.model.replace('-', '_')}"
    print(write_table(name, title, rows))


def llama3_8b(blocks: int, vocabulary: int, dtype: torch.dtype) -> PreTrainedModel:
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=blocks,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=8192,
        dtype=dtype,
    )
    return LlamaForCausalLM(config).to(dtype).eval()  # type: ignore[arg-type]


def narrowed(dense: PreTrainedModel, sparsity: float, multiple: int) -> PreTrainedModel:
    """A copy with as many MLP units fewer as the sparsity says."""
    width = uniform(Decoder(dense), sparsity, Mlp(), multiple).blocks[0].shape.mlp_width
    model = copy.deepcopy(dense)
    decoder = Decoder(model)
    for block in range(len(decoder.blocks)):
        for units in Mlp().layers(decoder, block):
            decoder.keep_units(block, units, units.channels.first(width))
    return model


def told(measured: Repeats) -> str:
    first, third = measured.quartiles
    return f"{measured.median:.4g} ({first:.4g} to {third:.4g})"


if __name__ == "__main__":
    main()
