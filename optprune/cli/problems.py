"""optprune problems: write the problems of a model's layers to files."""

import contextlib
from pathlib import Path
from typing import Annotated

import typer

from optprune.cli.options import (
    Calibration,
    Device,
    Dtype,
    Effort,
    Model,
    Pattern,
    RecipeName,
    Samples,
    Seed,
    SeqLength,
    Settings,
    Sparsity,
    Units,
)
from optprune.cli.outputs import echo, start
from optprune.cli.request import Options
from optprune.errors import InputError
from optprune.system.files import real_path
from optprune.system.wording import counted


def problems_command(
    model: Model,
    calibration: Calibration,
    output: Annotated[Path, typer.Option("--output", metavar="DIR", help="The folder to write, which is new.")],
    layers: Annotated[
        str, typer.Option("--layers", metavar="GLOB", help="Full names of the layers, such as '*.3.*.down_proj'.")
    ] = "*",
    recipe: RecipeName = "fasp",
    effort: Effort = "standard",
    sparsity: Sparsity = None,
    samples: Samples = 128,
    seq_length: SeqLength = 2048,
    seed: Seed = None,
    units: Units = None,
    pattern: Pattern = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    settings: Settings = None,
) -> None:
    """Write the problems that a recipe states at some layers of a model, one file for each.

    Blocks before the last of these layers are pruned on the way, one at a time, and are not written.
    """
    options = Options.of({**NOT_TAKEN, **locals()})
    reporter = start()
    from optprune.cli.tokens import calibration_of
    from optprune.export.place import Scratch, delete_left_behind, missing_parents, put_in_place
    from optprune.models import open_model
    from optprune.models.store import NullSink
    from optprune.pruning.saved_problems import save_problems, wanted_layers
    from optprune.texts import read_texts

    resolved = options.resolve(options.chosen())
    place = real_path(output)
    if place.exists():
        raise InputError(f"{output} exists: name a new folder")
    chosen = resolved.program.request.recipe
    if chosen.vocabulary is not None:
        raise InputError("a recipe with a smaller vocabulary has no problems of its own: prune the vocabulary before")
    wanted_layers(resolved.program, layers)
    drawn = calibration_of(resolved, read_texts(calibration))
    delete_left_behind(place, reporter.say)
    created = missing_parents(place)
    place.parent.mkdir(parents=True, exist_ok=True)
    scratch = Scratch(place)
    draft = scratch.folder / "problems"
    draft.mkdir()
    try:
        reporter.say(f"loading {model}")
        loaded = open_model(model, sink=NullSink(), dtype=dtype, device=device)
        with reporter.events({}) as on_event:
            files = save_problems(
                loaded.model,
                drawn.batches,
                chosen,
                draft,
                layers=layers,
                store=loaded.store,
                origin={"model": model, "calibration": drawn.description},
                on_event=on_event,
            )
        put_in_place(draft, place, overwrite=False)
    finally:
        scratch.discard()
        for parent in () if place.exists() else created:
            with contextlib.suppress(OSError):  # somebody else has put something into it
                parent.rmdir()
    size = sum((place / file.name).stat().st_size for file in files)
    echo(f"{output}: {counted(len(files), 'problem')}, {size / 2**20:.1f} MiB; solve one with optprune solve")


NOT_TAKEN = {
    "sequences": "packed",
    "generated": 0,
    "experts": None,
    "save_dtype": "auto",
    "propagation": None,
    "bits": None,
    "allocation": None,
    "vocabulary": None,
    "width_multiple": None,
    "target": None,
    "strict": False,
    "workers": None,
    "ray": None,
    "max_shard_size": "5GB",
    "states": "auto",
    "architecture": None,
}
"""the options of `prune` that this command does not take; --set has most of them"""
