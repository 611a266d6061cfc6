"""A checkpoint that is larger than the memory the run may take: pruned, saved, and reloaded by the check.

    .venv/bin/python -m benchmarks.larger_than_memory --recipe fasp --gigabytes 12 --limit 4 --hidden 1024

Writes a synthetic Llama in bfloat16, block by block, and runs `optprune prune` on it in a process of its own whose
address space, and that of its children, is limited (RLIMIT_AS, as `ulimit -v` sets it): what would load the model whole
ends there with an error. Prints the size of the checkpoint, the limit, the largest resident size of any of the run's
processes, the seconds, and what the command said last.
"""

import argparse
import math
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.random_checkpoints import write_checkpoint
from benchmarks.train_small import new_tokenizer
from optprune.texts import demo_articles

VOCABULARY = 4096


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fasp")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of the checkpoint, 10^9 bytes")
    parser.add_argument("--limit", type=float, default=4.0, help="of the address space of each process, 10^9 bytes")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--seq-length", type=int, default=128)
    parser.add_argument("--scratch", type=Path, help="where the checkpoint and the output go for the time of the run")
    parser.add_argument("--set", action="append", default=[], help="a recipe field, as of optprune prune")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        source, output = Path(scratch) / "model", Path(scratch) / "output"
        config = shape(options.hidden, options.gigabytes)
        write_checkpoint(source, config, torch.bfloat16)
        trained = new_tokenizer(demo_articles("calibration")[:200], VOCABULARY).backend_tokenizer
        PreTrainedTokenizerFast(tokenizer_object=trained, bos_token="<s>", eos_token="</s>").save_pretrained(source)
        size = sum(file.stat().st_size for file in source.glob("*.safetensors"))
        print(
            f"{size / 1e9:.2f} GB in {config.num_hidden_layers} blocks of hidden {config.hidden_size}, "
            f"under {options.limit:g} GB",
            flush=True,
        )
        words = [sys.executable, "-m", "optprune", "prune", str(source), "--calibration", "demo:calibration"]
        words += ["--samples", str(options.samples), "--seq-length", str(options.seq_length)]
        words += ["--recipe", options.recipe, "--output", str(output)]
        words += [word for setting in options.set for word in ("--set", setting)]
        most = int(options.limit * 1e9)
        began = time.monotonic()
        done = subprocess.run(
            words,
            check=False,
            stdout=subprocess.PIPE,
            text=True,
            preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most)),
        )
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(done.stdout)
        print(f"exit {done.returncode} after {seconds:.0f} s, peak of a process {peak / 1e9:.2f} GB")
        sys.exit(done.returncode)


def shape(hidden: int, gigabytes: float) -> LlamaConfig:
    """A Llama of that width with as many blocks as make a checkpoint of that size in bfloat16."""
    heads = max(1, hidden // 64)
    fields = {
        "hidden_size": hidden,
        "intermediate_size": 3 * hidden,
        "vocab_size": VOCABULARY,
        "num_attention_heads": heads,
        "num_key_value_heads": max(1, heads // 4),
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }
    with torch.device("meta"):
        one = LlamaForCausalLM(LlamaConfig(**fields, num_hidden_layers=1))
    block = sum(parameter.numel() for parameter in one.model.layers.parameters())
    rest = sum(parameter.numel() for parameter in one.parameters()) - block
    return LlamaConfig(**fields, num_hidden_layers=max(1, math.ceil((gigabytes * 1e9 / 2 - rest) / block)))


if __name__ == "__main__":
    main()
