"""optprune heal: train a pruned folder towards the dense model and write a new folder."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.options import Device, JsonFile, Overwrite, Restart, Resume
from optprune.cli.outputs import check_json, echo, start, write_json
from optprune.cli.run_folder import FINISHED, Output
from optprune.system.files import json_text

if TYPE_CHECKING:
    from optprune.export import SavedModel
    from optprune.healing import HealReport

TOKENS = 200_000
"""the default largest number of training tokens"""


def heal_command(
    model: Annotated[
        str, typer.Argument(metavar="DIR", help="The pruned model: a folder, or any other form of MODEL.")
    ],
    teacher: Annotated[
        str,
        typer.Option("--teacher", metavar="MODEL", help="The dense model: a folder, a .gguf file, a hub name, 'demo'."),
    ],
    text: Annotated[
        str,
        typer.Option(
            "--text",
            metavar="TEXT",
            help="FILE.txt, FILE.jsonl[:COLUMN], FILE.csv[:COLUMN], a folder of .txt, hf:DATASET[:CONFIG]:SPLIT, "
            "or demo:calibration.",
        ),
    ],
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write.")],
    tokens: Annotated[
        int | None, typer.Option("--tokens", help="Number of training tokens. [default: 200000, or the whole text]")
    ] = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Number of passes over these tokens.")] = 1,
    generated: Annotated[
        int,
        typer.Option(
            "--generated", help="Number of training windows that the dense model generates, beside those of the text."
        ),
    ] = 0,
    seq_length: Annotated[int, typer.Option("--seq-length", help="Tokens in a window.")] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Windows in a step.")] = 4,
    learning_rate: Annotated[
        float | None, typer.Option("--learning-rate", help="Largest learning rate of the schedule. [default: 2e-4]")
    ] = None,
    held_out: Annotated[
        int, typer.Option("--held-out", help="Number of windows, of other documents, that choose the step to keep.")
    ] = 16,
    device: Device = "auto",
    dtype: Annotated[
        str,
        typer.Option("--dtype", help="dtype of the computation: float32, bfloat16 or auto (bfloat16 on a GPU)."),
    ] = "auto",
    keep_embeddings: Annotated[
        bool,
        typer.Option("--keep-embeddings", help="Leave embeddings and the head as they are, as for fewer tokens."),
    ] = False,
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Recompute activations instead of storing them.")
    ] = False,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the draws.")] = 0,
    resume: Resume = False,
    restart: Restart = False,
    overwrite: Overwrite = False,
    json_file: JsonFile = None,
) -> None:
    """Train a pruned model towards the predictions of the dense one; zeros and widths stay as they are."""
    reporter = start()
    from optprune.cli.healing_run import HEALING, HealingRun
    from optprune.healing import HealingSettings
    from optprune.healing.settings import LEARNING_RATE
    from optprune.models import device_of

    computes = dtype if dtype != "auto" else "bfloat16" if device_of(device).type == "cuda" else "float32"
    settings = HealingSettings(
        learning_rate=LEARNING_RATE if learning_rate is None else learning_rate,
        dtype=computes,
        embeddings=not keep_embeddings,
        gradient_checkpointing=gradient_checkpointing,
        seed=seed,
        epochs=epochs,
        generated=generated,
    )
    run = HealingRun(
        model=model,
        teacher=teacher,
        text=text,
        output=Output(output, overwrite, resume, restart, (HEALING,), reads=(model, teacher)),
        settings=settings,
        device=device,
    )
    check_json(json_file, output=output, models=[model, teacher], inputs=[text])
    done = run.run(reporter, tokens, TOKENS, seq_length, batch_size, held_out)
    if done is None:  # another process has it
        return
    write_json(json_file, json_text(done.section), f"the healed model is in {output}")
    if done.report is None or done.saved is None:
        echo(FINISHED.format(output))
    else:
        _summarise(done.report, done.saved)


def _summarise(report: "HealReport", saved: "SavedModel") -> None:
    from optprune.report.progress import duration

    before, after = report.before, report.after
    early = " (held-out windows got no better)" if report.stopped_early else ""
    echo(
        f"{report.steps} of {report.steps_planned} steps{early} on {report.tokens} tokens in "
        f"{duration(report.seconds)}; the weights of step {after.step} are kept"
    )
    echo(
        f"on held-out windows: divergence {before.divergence:.4f} nats before, {after.divergence:.4f} after; "
        f"perplexity {before.perplexity:.2f} before, {after.perplexity:.2f} after, {report.dense_perplexity:.2f} dense"
    )
    echo(f"all {report.zeros} zeros of the pruned model are still zero")
    echo(f"{saved.folder}: {saved.bytes / 2**20:.1f} MiB of weights")
    echo(f"reload check passed: logits differ by at most {saved.logits_difference:.2g}")
