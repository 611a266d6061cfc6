"""One call that prunes a model on a text and writes it to a folder, as the command `prune` does."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console

from optprune.cli.outputs import started
from optprune.cli.prune_run import WholeRun, run_on_text
from optprune.cli.request import FIELDS, Options
from optprune.cli.run_folder import Output
from optprune.pruning import workers_of
from optprune.recipe import Recipe
from optprune.report import Event, Report
from optprune.report.progress import Reporter

NOT_GIVEN = dict.fromkeys((*FIELDS, "strict", "allocation", "target", "architecture", "ray", "settings"))
"""the options of the command that are fields of the recipe here, or are left out"""


def prune_model(
    model: str | Path,
    recipe: str | Recipe = "fasp",
    *,
    calibration: str,
    output: str | Path,
    effort: str = "standard",
    sparsity: float | None = None,
    fields: Mapping[str, Any] | None = None,
    samples: int = 128,
    seq_length: int = 2048,
    sequences: str = "packed",
    generated: int = 0,
    device: str = "auto",
    dtype: str = "auto",
    save_dtype: str = "auto",
    target: str | None = None,
    workers: int | None = None,
    overwrite: bool = False,
    resume: bool = False,
    max_shard_size: str = "5GB",
    progress: bool = False,
    on_event: Callable[[Event], None] = lambda event: None,
) -> Report | None:
    """Prune a model on a text, write it to a folder that is checked by reloading it, and return the report.

    The model is a folder, a GGUF file or a name on the hub; the recipe is a name, a YAML file or a Recipe, whose
    `fields` are replaced by their dotted names, as in `load_recipe`. `calibration` takes the texts of the command's
    option. Blocks are in memory one at a time. Finished blocks are kept beside the output until it is whole, so that
    `resume=True` continues a run that was stopped. `progress` prints what the command prints on stderr, and `on_event`
    receives the events of the run. A run that does not fit the memory or the disk is refused before it starts. Raises
    an OptpruneError, and the output folder then does not exist. Processes of torchrun share the run as those of the
    command do; all but the first return None.
    """
    given = {
        "recipe": recipe,
        "effort": effort,
        "model": str(model),
        "samples": samples,
        "seq_length": seq_length,
        "sparsity": sparsity,
    }
    given |= {"sequences": sequences, "generated": generated, "device": device, "dtype": dtype, "target": target}
    given |= {"save_dtype": save_dtype, "workers": workers, "max_shard_size": max_shard_size, "states": "auto"}
    options = Options.of(NOT_GIVEN | given).with_fields(fields or {})
    chosen = options.chosen()
    whole = WholeRun(
        model=options.model,
        dtype=dtype,
        device=device,
        output=Output(Path(output), overwrite, resume, reads=(options.model,)),
        save_dtype=save_dtype,
        max_shard_size=max_shard_size,
        workers=workers_of(chosen.propagation, workers, None),
        states=options.states,
        generated=generated,
    )
    whole.check()
    options = options.with_calibration(calibration, chosen)
    resolved, reporter = options.resolve(chosen), Reporter(Console(stderr=True, quiet=not progress))
    done = run_on_text(whole, resolved, (calibration, sequences), reporter=reporter, started=started(), also=on_event)
    if done is None:
        return None
    report, saved = done
    if saved is not None:
        resolved.check(Path(output))
    return report
