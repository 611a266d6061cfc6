"""A checkpoint that is larger than the memory the run may take: pruned, saved, and reloaded by the check.

    .venv/bin/python -m benchmarks.larger_than_memory --recipe fasp --gigabytes 12 --limit 4 --hidden 1024

Writes a synthetic Llama in bfloat16, block by block, and runs `optprune prune` on it in a control group of its own,
whose processes together, with the pages of files that they have read or written, may hold no more memory than that: the
kernel ends what would hold more. It takes a Linux whose /sys/fs/cgroup this user may write to (version 1 or 2). With
--by address it is the address space of each process that is limited (RLIMIT_AS, as `ulimit -v` sets it); there the
check fails where transformers, which maps all shards at once, finds no room for that. Prints the size of the
checkpoint, the limit, the largest resident size of any of the run's processes, the seconds, and what the command said.
"""

import argparse
import math
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.random_checkpoints import write_checkpoint
from benchmarks.train_small import new_tokenizer
from optprune.texts import demo_articles

VOCABULARY = 4096
GROUPS = Path("/sys/fs/cgroup")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="fasp")
    parser.add_argument("--gigabytes", type=float, default=12.0, help="of the checkpoint, 10^9 bytes")
    parser.add_argument("--limit", type=float, default=4.0, help="of the memory, 10^9 bytes")
    parser.add_argument("--by", choices=("group", "address"), default="group", help="what is limited")
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
        with limited(most, options.by) as enter:
            done = subprocess.run(words, check=False, stdout=subprocess.PIPE, text=True, preexec_fn=enter)
        seconds = time.monotonic() - began
        peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        print(done.stdout)
        print(f"exit {done.returncode} after {seconds:.0f} s, peak of a process {peak / 1e9:.2f} GB")
        sys.exit(done.returncode)


@contextmanager
def limited(most: int, by: str) -> Iterator[Callable[[], None]]:
    """What a process calls to be limited to so many bytes, with all that it starts."""
    if by == "address":
        yield lambda: resource.setrlimit(resource.RLIMIT_AS, (most, most))
        return
    first = (GROUPS / "memory").exists()  # version 1 has a tree for each resource
    group = (GROUPS / "memory" if first else GROUPS) / f"optprune-{os.getpid()}"
    group.mkdir()
    try:
        (group / ("memory.limit_in_bytes" if first else "memory.max")).write_text(str(most))
        swap = group / ("memory.swappiness" if first else "memory.swap.max")
        if swap.exists():
            swap.write_text("0")
        yield partial(join, group / "cgroup.procs")
    finally:
        group.rmdir()


def join(processes: Path) -> None:
    """Be one of the processes of a control group."""
    processes.write_text(str(os.getpid()))


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
