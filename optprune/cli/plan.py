"""optprune plan: estimate the memory, the disk and the time of a run of `prune`."""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from optprune.cli.options import (
    Allocation,
    Architecture,
    Bits,
    Device,
    Dtype,
    Effort,
    ExpertScores,
    ExpertsKept,
    Generated,
    JsonFile,
    MaxShardSize,
    Model,
    Pattern,
    Propagation,
    Ray,
    RecipeName,
    Runs,
    Samples,
    SaveDtype,
    Seed,
    SeqLength,
    Sequences,
    Settings,
    Sparsity,
    States,
    Strict,
    Units,
    Vocabulary,
    WidthMultiple,
    Workers,
)
from optprune.cli.outputs import check_json, echo, start, write_json
from optprune.cli.request import Options, Resolved
from optprune.cli.tokens import tokens_for
from optprune.errors import InputError
from optprune.system.files import json_text
from optprune.system.wording import amount, counted

if TYPE_CHECKING:
    from torch import Tensor

    from optprune.program import Program
    from optprune.program.plan import Plan
    from optprune.pruning.measured_plan import Measuring
    from optprune.texts import Document

CHARACTERS = 8
"""an upper bound of the average number of characters in a token"""
PIECE = 200_000
"""the least number of characters on which the speed of a tokenizer is measured"""


def plan_command(
    model: Model,
    calibration: Annotated[
        str | None,
        typer.Option("--calibration", metavar="TEXT", help="As for prune; without it, random tokens are used."),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", metavar="DIR", help="The folder that the run will write.")
    ] = None,
    recipe: RecipeName = "fasp",
    effort: Effort = "standard",
    sparsity: Sparsity = None,
    experts: ExpertsKept = None,
    expert_scores: ExpertScores = None,
    samples: Samples = 128,
    generated: Generated = 0,
    seq_length: SeqLength = 2048,
    sequences: Sequences = "packed",
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    save_dtype: SaveDtype = "auto",
    propagation: Propagation = None,
    units: Units = None,
    pattern: Pattern = None,
    bits: Bits = None,
    allocation: Allocation = None,
    vocabulary: Vocabulary = None,
    width_multiple: WidthMultiple = None,
    target: Runs = None,
    architecture: Architecture = None,
    strict: Strict = False,
    workers: Workers = None,
    ray: Ray = None,
    states: States = "auto",
    max_shard_size: MaxShardSize = "5GB",
    settings: Settings = None,
    no_probe: Annotated[
        bool,
        typer.Option(
            "--no-probe", help="Print no times; nothing is run, and the device need not exist on this machine."
        ),
    ] = False,
    json_file: JsonFile = None,
) -> None:
    """Print the memory, the disk and the time of a run of prune, by phase, without pruning.

    A folder with a config.json alone is enough: the block that is timed then has random weights.
    """
    options = Options.of(locals())
    reporter = start()
    from optprune.models import check_dtype, device_of
    from optprune.program.plan import planned_memory
    from optprune.program.room import Room, placed, refusal
    from optprune.pruning import workers_of
    from optprune.pruning.measured_plan import timed
    from optprune.texts import check_sequences

    # Whole documents take as much, except that tokenising may end earlier.
    check_sequences(sequences)
    chosen = options.chosen()
    if not chosen.sparsity and chosen.given is None and chosen.bits is None and chosen.vocabulary is None:
        raise InputError("a sparsity of 0 needs no plan, because the model is copied unchanged: give a larger one")
    workers_of(chosen.propagation, workers, ray)
    check_json(json_file, models=[model], inputs=[calibration, *options.input_files])
    for name in (dtype, save_dtype):
        check_dtype(name)
    if not no_probe:
        device_of(device)
    began = time.perf_counter()
    resolved = options.with_calibration(calibration, chosen).resolve(chosen)
    counting = time.perf_counter() - began
    resolved.report_notes(reporter.say)
    room = Room.here(resolved.program.request.device, output or Path())
    program, lacking = placed(resolved.program, room), refusal(resolved.program, room)
    if no_probe:
        planned = planned_memory(program)
    else:
        measuring = _measuring(resolved, model, calibration, output, counting)
        with reporter.count("measuring one block", "step") as update:
            planned = timed(program, model, measuring, update)
    told = {**planned.to_dict(), "states": program.request.states, "refusal": lacking, "program": program.to_dict()}
    write_json(json_file, json_text(told), "nothing else is written")
    for line in [*lines(planned), *room_lines(program, lacking), *program_lines(program)]:
        echo(line)


def _measuring(
    resolved: Resolved, model: str, calibration: str | None, output: Path | None, counting: float
) -> "Measuring":
    """Return the first tokens of each text, for the probe, and the seconds that tokenising all of them takes.

    Records are read twice, the first time of which took the seconds of `counting`; the probe takes random tokens.
    """
    from optprune.program.room import existing_folder
    from optprune.pruning.measured_plan import Measuring, probe_batches
    from optprune.texts import read_texts

    place = None if output is None else existing_folder(output)
    if calibration is None:
        return Measuring(place=place)
    if resolved.records is not None:
        return Measuring(tokenising=2 * counting, place=place)
    began = time.perf_counter()
    texts = read_texts(calibration)
    reading = time.perf_counter() - began
    needed = max(PIECE, CHARACTERS * probe_batches(resolved.program) * resolved.program.batch_tokens)

    def tokenised(documents: "Sequence[Document]") -> "tuple[Tensor, float]":
        began = time.perf_counter()
        return tokens_for(model, resolved.config, documents), time.perf_counter() - began

    # The first call takes longer; the second measures the overhead of each call.
    (_, first), (_, again) = tokenised([""]), tokenised([""])
    parts, seconds = list["Tensor"](), reading + first
    for text in texts:
        taken = _beginning(text.documents, needed)
        tokens, some = tokenised(taken)
        parts.append(tokens)
        seconds += max(0.0, some - again) * text.characters / max(1, sum(map(len, taken)))
    import torch

    return Measuring(torch.cat(parts), seconds, place=place)


def _beginning(documents: "Sequence[Document]", characters: int) -> "list[Document]":
    """Return the first documents, about `characters` of them; the last text is cut, a conversation is not."""
    taken, some = list["Document"](), 0
    for document in documents:
        if some < characters:
            taken.append(document[: characters - some] if isinstance(document, str) else document)
            some += len(taken[-1])
    return taken


def lines(planned: "Plan") -> Sequence[str]:
    """Return the plan as lines: one for each phase, then the peaks."""
    from optprune.report.progress import duration

    gpu = planned.device_bytes > 0
    rows: list[tuple[str, ...]] = [("", "time", "memory", *(["GPU"] if gpu else []), "disk")]
    for phase in planned.phases:
        if phase.host_bytes or phase.device_bytes:
            time_taken = "" if phase.seconds is None else duration(phase.seconds)
            sizes = (phase.host_bytes, *([phase.device_bytes] if gpu else []), phase.disk_bytes)
            rows.append((phase.name, time_taken, *(amount(size) if size else "" for size in sizes)))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    table = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
    peak = max(planned.phases, key=lambda phase: phase.device_bytes if gpu else phase.host_bytes)
    largest = sorted(peak.parts, key=lambda name: -peak.parts[name])[:4]
    made_of = ", ".join(f"{name} {amount(peak.parts[name])}" for name in largest)
    whole = "" if planned.seconds is None else f"{duration(planned.seconds)}; "
    sizes = f"{amount(planned.host_bytes)} of memory" + (f", {amount(planned.device_bytes)} of the GPU" if gpu else "")
    disk = amount(planned.disk_bytes)
    unmeasured = f"the time of {', '.join(planned.guessed)} is guessed: measuring it takes over a tenth of the run"
    return [
        *table,
        f"{whole}at most {sizes} and {disk} of the disk",
        f"the most is in {peak.name}: {made_of}",
        *([unmeasured] if planned.guessed else []),
    ]


def room_lines(program: "Program", lacking: str | None) -> Sequence[str]:
    """Return a line on where hidden states are kept, and one on what this machine lacks."""
    from optprune.program.room import saved_by_host

    states, saved = program.request.states, saved_by_host(program)
    other = "" if saved is None else f"; with --states host the run needs {amount(saved)} of the GPU"
    kept = f"hidden states between blocks are kept on the {states}{other}"
    return [kept, *([] if lacking is None else [f"on this machine it does not fit: {lacking}"])]


def program_lines(program: "Program") -> Sequence[str]:
    """Return the program as lines: how the recipe divides its budget, and the steps of the largest block."""
    example, recipe, policy = program.example, program.request.recipe, program.policy
    listed = program.allocation is not None or recipe.given is not None
    share = "every block keeps what the allocation lists" if listed else "every block loses the same share"
    if program.divides:
        share = "one budget for all blocks is divided by measured costs"
    source = "the dense model" if policy.independent else "the pruned blocks before it"
    steps = [", ".join(target.path for target in stage.targets) for stage in example.stages if stage.targets]
    told = f"is pruned in {counted(len(steps), 'step')}: {'; then '.join(steps)}" if steps else "has no layer to solve"
    return [
        f"recipe {recipe.name}, {counted(program.block_count, 'block')}: {share}, and a block gets its calibration "
        f"inputs from {source} (propagation {policy.name})",
        f"the largest block ({example.index}) {told}",
    ]
