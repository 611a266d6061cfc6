"""The arguments and options that several commands take."""

from pathlib import Path
from typing import Annotated

import typer

from optprune.cli import choices
from optprune.cli.help import ADVANCED
from optprune.system.wording import either

Model = Annotated[str, typer.Argument(metavar="MODEL", help="A model folder, a .gguf file, a hub name, or 'demo'.")]
SeqLength = Annotated[int, typer.Option("--seq-length", help="Tokens in a window.")]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[str, typer.Option("--dtype", help="auto (as stored), float32, bfloat16 or float16.")]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write the results there as JSON.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace the output folder if optprune wrote all that it holds.")
]
Resume = Annotated[bool, typer.Option("--resume", help="Continue the unfinished run of this output, if there is one.")]
Restart = Annotated[
    bool,
    typer.Option(
        "--restart",
        help="Delete the unfinished run of this output, if there is one, and start again.",
        rich_help_panel=ADVANCED,
    ),
]

# The options of prune, most of which plan takes too.

Calibration = Annotated[
    str,
    typer.Option(
        "--calibration",
        metavar="TEXT",
        help="The calibration text: FILE.txt, FILE.jsonl[:COLUMN], also .csv and .parquet, a folder of .txt, "
        "hf:DATASET[:CONFIG]:SPLIT, demo:calibration, or several with shares: a.jsonl:text=0.7,b.txt=0.3; or "
        "images:FILE.jsonl, records with images.",
    ),
]
RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name (see optprune recipes), or a .yaml file.")]
Effort = Annotated[
    str,
    typer.Option(
        "--effort",
        help=f"How long the recipe may take: {either(choices.EFFORTS)}; quick and best are for structured_best and "
        "sparse_best.",
    ),
]
Sparsity = Annotated[
    float | None,
    typer.Option(
        "--sparsity", help="The share of the decoder's linear weights to remove. [default: the recipe's, 0.2 for fasp]"
    ),
]
Samples = Annotated[int, typer.Option("--samples", help="Number of calibration windows.")]
Windows = Annotated[int | None, typer.Option("--windows", help="Number of windows to evaluate on. [default: all]")]
Seed = Annotated[int | None, typer.Option("--seed", help="Seed of all random draws. [default: the recipe's, or 0]")]
Units = Annotated[
    str | None,
    typer.Option(
        "--units",
        help=f"Kind of units to remove: {either(choices.UNITS)}. mlp are hidden neurons of MLPs, "
        "vo value dimensions of attention heads, qk rotary pairs; optprune recipes --fields explains all. "
        "[default: the recipe's]",
    ),
]
Pattern = Annotated[
    str | None,
    typer.Option("--pattern", help="Pattern of single weights: unstructured, rows or N:M. [default: the recipe's]"),
]
Bits = Annotated[
    str | None,
    typer.Option(
        "--bits",
        help=f"Low-bit format of the weights that stay, where units are weights: {either(choices.BITS)}. "
        "[default: the recipe's]",
    ),
]
Allocation = Annotated[
    str | None,
    typer.Option(
        "--allocation",
        help="uniform, global (one budget for the model), or a FILE.json such as a report. [default: the recipe's]",
    ),
]
Vocabulary = Annotated[
    float | None,
    typer.Option(
        "--vocabulary",
        metavar="TOKENS",
        help="Keep this many tokens of the vocabulary, or this share of them. [default: the recipe's, else all]",
    ),
]
Runs = Annotated[
    str | None,
    typer.Option(
        "--target",
        metavar="RUNTIME",
        help=f"Write a model that this runtime loads: {either(choices.RUNTIMES)}; transformers means without "
        "trust_remote_code.",
    ),
]
Strict = Annotated[
    bool,
    typer.Option(
        "--strict",
        help="Treat fallbacks, dead inputs, calibration tokens that are too few or too alike, and a missed budget as "
        "errors.",
        rich_help_panel=ADVANCED,
    ),
]
Workers = Annotated[
    int | None,
    typer.Option(
        "--workers",
        help="Number of parallel workers. With --propagation dense or intra each prunes whole blocks, "
        "with another policy the layers of one block. [default: 1]",
    ),
]
Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Set any recipe field (see optprune recipes --fields); may be repeated."
    ),
]

# The advanced options.

Generated = Annotated[
    int,
    typer.Option(
        "--generated",
        help="Number of further calibration windows, which the dense model generates.",
        rich_help_panel=ADVANCED,
    ),
]
Sequences = Annotated[
    str,
    typer.Option(
        "--sequences",
        help="packed: windows from anywhere in the joined documents, each begun with BOS where the tokenizer does so; "
        "packed-no-bos: without it, as in papers; whole: each window is the start of one document.",
        rich_help_panel=ADVANCED,
    ),
]
PackedSequences = Annotated[
    str,
    typer.Option(
        "--sequences",
        help="packed: each window begins with BOS where the tokenizer begins a text so; packed-no-bos: without it, as "
        "in papers.",
        rich_help_panel=ADVANCED,
    ),
]
SaveDtype = Annotated[
    str,
    typer.Option(
        "--save-dtype",
        help="dtype of the saved weights: auto (the dtype of the computation), float32, bfloat16 or float16.",
        rich_help_panel=ADVANCED,
    ),
]
Propagation = Annotated[
    str | None,
    typer.Option(
        "--propagation",
        help=f"Path of the statistics: {either(choices.POLICIES)}. [default: the recipe's]",
        rich_help_panel=ADVANCED,
    ),
]
Architecture = Annotated[
    Path | None,
    typer.Option(
        "--architecture",
        metavar="FILE",
        help="Description of an unknown architecture: a draft made by optprune inspect.",
        rich_help_panel=ADVANCED,
    ),
]
WidthMultiple = Annotated[
    int | None,
    typer.Option(
        "--width-multiple",
        help=f"Round MLP widths and value dimensions to multiples of this. [default: {choices.MULTIPLES}]",
        rich_help_panel=ADVANCED,
    ),
]
ExpertsKept = Annotated[
    int | None,
    typer.Option(
        "--experts",
        help="Number of experts that a block keeps, in place of --sparsity; for recipes such as experts_best.",
        rich_help_panel=ADVANCED,
    ),
]
ExpertScores = Annotated[
    str | None,
    typer.Option(
        "--expert-scores",
        metavar="FILE",
        help="Keep the experts with the largest scores in a JSON file, which lists them by block.",
        rich_help_panel=ADVANCED,
    ),
]
States = Annotated[
    str,
    typer.Option(
        "--states",
        help="Where hidden states between blocks are kept: device, host, disk, or auto, where the plan fits.",
        rich_help_panel=ADVANCED,
    ),
]
PartialSums = Annotated[
    int | None,
    typer.Option(
        "--partial-sums",
        "--lanes",
        help="Number of partial sums in which statistics are added up. Runs with the same number give the same bytes, "
        "however many processes torchrun starts. [default: one for each process]",
        rich_help_panel=ADVANCED,
    ),
]
Ray = Annotated[
    str | None,
    typer.Option(
        "--ray",
        metavar="ADDRESS",
        help="Use workers of the Ray cluster at this address; 'local' starts a cluster for the run.",
        rich_help_panel=ADVANCED,
    ),
]
MaxShardSize = Annotated[
    str,
    typer.Option("--max-shard-size", help="Largest weights file, such as 5GB.", rich_help_panel=ADVANCED),
]
