"""The arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a .gguf file, a hub name, or 'demo'.")]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens in a window.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output folder if it holds a model.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on with the unfinished run into this folder, if there is one.")
]
Restart = Annotated[
    bool, typer.Option("--restart", help="Delete the unfinished run into this folder, if there is one, and begin anew.")
]

# What a run of pruning is asked for: `prune` does it, and `plan` tells what it would take.

Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="FILE.txt, FILE.jsonl[:COLUMN], also .csv and .parquet, a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, "
        "demo:calibration, or several with shares: a.jsonl:text=0.7,b.txt=0.3.",
    ),
]
Sequences = Annotated[
    str,
    typer.Option(
        "--sequences",
        help="packed: windows lie anywhere in the documents one after the other; whole: each begins where a document "
        "does and ends within it.",
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name, or a .yaml file.")]
Sparsity = Annotated[
    float | None, typer.Option("--sparsity", help="The share of the decoder's linear weights to remove.")
]
Samples = Annotated[int, typer.Option("--samples", help="How many calibration windows to draw.")]
Seed = Annotated[int | None, typer.Option("--seed", help="Of the draws. [default: the recipe's, or 0]")]
SaveDtype = Annotated[
    str, typer.Option("--save-dtype", help="auto (the dtype computed in), float32, bfloat16 or float16.")
]
Propagation = Annotated[
    str | None,
    typer.Option(
        "--propagation",
        help="dense, pruned, intra, cross, local or auto (intra under N:M, else pruned). [default: the recipe's]",
    ),
]
Units = Annotated[
    str | None,
    typer.Option(
        "--units", help="mlp, vo, kv-groups, all, all-heads, weights, experts or blocks. [default: the recipe's]"
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option("--pattern", help="Of single weights: unstructured, rows or N:M. [default: the recipe's]"),
]
Architecture = Annotated[
    Path | None,
    typer.Option(
        "--architecture",
        metavar="FILE",
        help="A description of the model's architecture, where that is not known: a draft by optprune inspect.",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="uniform, global (one budget for the model), or a FILE.json such as a report. [default: the recipe's]",
    ),
]
WidthMultiple = Annotated[
    int | None,
    typer.Option("--width-multiple", help="What MLP widths and value dimensions are multiples of. [default: 8]"),
]
Runs = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="RUNTIME",
        help="Make only what transformers (without trust_remote_code), vllm, gguf (llama.cpp) or onnx takes.",
    ),
]
States = Annotated[
    str, typer.Option("--states", help="Where hidden states wait for a block: device, host, disk or auto, by size.")
]
Strict = Annotated[bool, typer.Option("--strict", help="Fallbacks, too few tokens and a missed budget are errors.")]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="How many work side by side: under dense or intra on blocks, else on the layers of one. [default: 1]",
    ),
]
PartialSums = Annotated[
    int | None,
    typer.Option(
        "--lanes", help="Of how many parts sums over batches are; processes share them. [default: torchrun's, or 1]"
    ),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Workers of the Ray cluster there; 'local' starts one for the run."),
]
MaxShardSize = Annotated[str, typer.Option("--max-shard-size", help="The most that a weights file holds, such as 5GB.")]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Any recipe field (see optprune recipes --fields); may be repeated."
    ),
]
