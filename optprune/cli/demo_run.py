"""The demo on packaged data: evaluate, prune, evaluate, save, reload with plain transformers, evaluate again."""

import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.cli.outputs import started
from optprune.errors import InputError, OptpruneError
from optprune.export import SavedModel, check_output, save_model
from optprune.measure import Evaluation, bits_per_byte, perplexity
from optprune.models import Decoder, load_model, need_tokenizer
from optprune.models.sources import DEMO
from optprune.program import Program, Request, check_batches, resolve
from optprune.program.time import evaluation, expected_seconds, operations_per_second
from optprune.pruning import run_program
from optprune.recipe import load_recipe
from optprune.report import EvaluationReport, PhaseAdvanced, PhaseRecorder, page, summarise_model
from optprune.report.phases import EVALUATIONS, LOADING, TOKENISING
from optprune.report.progress import Reporter, duration
from optprune.report.reading import PAGE
from optprune.system.files import write_whole
from optprune.texts import (
    begin_in_words,
    begin_tokens,
    draw_windows,
    evaluation_windows,
    read_documents,
    read_texts,
    tokenise,
)

FOLDER = Path(".demo/smollm2-fasp")
DEMO_NAME = "SmolLM2-135M-Instruct"
RELOAD_TOLERANCE = 1e-4
"""the largest relative difference of perplexity between the model in memory and the folder"""


@dataclass(frozen=True)
class Measured:
    """The measurements of one model in the demo's table."""

    perplexity: float
    parameters: int
    linear_weights: int
    """the number of linear weights in the decoder blocks, which sparsity is counted over"""
    weights_mib: float


@dataclass(frozen=True)
class DemoResult:
    """The measurements of the model before, after, and as reloaded from the folder."""

    model: str
    recipe: str
    sparsity_requested: float
    sparsity_reached: float
    before: Measured
    after: Measured
    reloaded: Measured
    logits_difference: float | None
    pruning_seconds: float
    floor_seconds: float
    seconds: float
    output: str

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain data."""
        return asdict(self)

    def table(self) -> Table:
        """Return the comparison as a table for a console."""
        name = DEMO_NAME if self.model == DEMO else self.model
        table = Table(
            title=f"{name}, {self.recipe} of MLP units at {self.sparsity_requested:.0%}", title_justify="left"
        )
        table.add_column("")
        for name in ("before", "after", "reloaded"):
            table.add_column(name, justify="right")
        for label, field, form in (
            ("perplexity", "perplexity", ".3f"),
            ("parameters", "parameters", ",d"),
            ("decoder linear weights", "linear_weights", ",d"),
            ("weights, MiB", "weights_mib", ".1f"),
        ):
            table.add_row(label, *(format(getattr(part, field), form) for part in self.parts))
        return table

    @property
    def parts(self) -> tuple[Measured, Measured, Measured]:
        """The three columns of the table."""
        return self.before, self.after, self.reloaded


def run_demo(
    output: Path = FOLDER,
    *,
    model: str = DEMO,
    recipe: str = "fasp",
    sparsity: float = 0.2,
    calibration: str = "demo:calibration",
    evaluation: str = "demo:evaluation",
    samples: int = 32,
    windows: int = 16,
    seq_length: int = 512,
    seed: int = 0,
    overwrite: bool = True,
    console: Console | None = None,
    reporter: Reporter | None = None,
) -> DemoResult:
    """Prune the MLP units of a model by a recipe that keeps the same in every block, and print quality, size and time.

    The folder is reloaded with plain transformers and must give the perplexity of the model in memory; a difference
    is an OptpruneError. The table goes to `console` (stdout), progress to `reporter` (stderr).
    """
    began = time.perf_counter()
    console, reporter = console or Console(), reporter or Reporter()
    chosen = load_recipe(recipe, {"sparsity": sparsity, "seed": seed, "units": "mlp"})
    if chosen.allocation.kind != "uniform":
        raise InputError(f"the demo needs a recipe with a uniform allocation, and {recipe} has another: choose another")
    check_output(output, overwrite)
    reporter.say("reading the texts and loading the model")
    fitted, held_out = read_texts(calibration), read_documents(evaluation)
    loaded = load_model(model)
    tokenizer = need_tokenizer(loaded.tokenizer, model)
    drawn = draw_windows(tokenizer, fitted, samples, seq_length, seed)
    measured_on = evaluation_windows(tokenise(tokenizer, held_out), seq_length, windows, begin_tokens(tokenizer))

    program = resolve(loaded.decoder(), Request(recipe=chosen, samples=samples, seq_length=seq_length, whole=True))
    with reporter.events(_expected(program, measured_on.numel(), loaded.model.device)) as on_event:
        phases = PhaseRecorder(loaded.model.device, on_event)
        before = _measure(loaded.model, measured_on, EVALUATIONS[0], phases)
        every, told = check_batches(loaded.model.config, drawn.batches), drawn.description
        report = run_program(program, loaded.decoder(), every, on_event=on_event, source=model, calibration=told)
        after = _measure(loaded.model, measured_on, EVALUATIONS[1], phases)
        reporter.say(f"saving to {output}, and reloading it in a fresh process to compare logits")
        saved = save_model(
            loaded,
            output,
            report=report,
            recipe=chosen,
            check_tokens=measured_on[:1],
            overwrite=overwrite,
            on_event=on_event,
        )
        again = AutoModelForCausalLM.from_pretrained(output, dtype=loaded.model.dtype, device_map=loaded.model.device)
        reloaded = _measure(again, measured_on, EVALUATIONS[2], phases)
    if not abs(reloaded.perplexity - after.perplexity) <= RELOAD_TOLERANCE * after.perplexity:
        raise OptpruneError(
            f"the reloaded folder {output} has a perplexity of {reloaded.perplexity:.4f}, the model in memory "
            f"{after.perplexity:.4f}: please report this"
        )
    HeldOut(evaluation, measured_on, tokenizer).write_page(saved, against=model, before=before, after=reloaded)
    result = DemoResult(
        model=model,
        recipe=recipe,
        sparsity_requested=sparsity,
        sparsity_reached=report.sparsity_reached,
        before=before,
        after=after,
        reloaded=reloaded,
        logits_difference=saved.logits_difference,
        pruning_seconds=report.seconds,
        floor_seconds=report.floor_seconds,
        seconds=time.perf_counter() - began,
        output=str(output),
    )
    _show(console, result, report.tokens, measured_on.numel())
    return result


@dataclass(frozen=True)
class HeldOut:
    """The held-out text of the demo."""

    text: str
    """its name"""
    windows: Tensor
    tokenizer: Tokenizer

    def write_page(self, saved: SavedModel, *, against: str, before: Measured, after: Measured) -> None:
        """Write the page of the saved folder again, with the perplexities and sizes that the table shows."""
        assert saved.report is not None
        count, length = self.windows.shape
        predictions = count * (length - 1)

        def bits(part: Measured) -> float:
            return bits_per_byte(Evaluation(part.perplexity, predictions, count, 0.0), self.windows, self.tokenizer)

        evaluation = EvaluationReport(
            text=self.text,
            seq_length=length,
            tokens=predictions,
            windows=count,
            perplexity=after.perplexity,
            bits_per_byte=bits(after),
            against=against,
            dense_perplexity=before.perplexity,
            dense_bits_per_byte=bits(before),
            dense_parameters=before.parameters,
            begin=begin_in_words(self.tokenizer, begin_tokens(self.tokenizer)),
        )
        folder = saved.folder
        model = summarise_model(folder, saved.report)
        data = page(saved.report, model=model, evaluation=evaluation, folder=str(folder)).encode()
        write_whole(folder / PAGE, lambda stream: stream.write(data))


def _show(console: Console, result: DemoResult, tokens: int, evaluated: int) -> None:
    """Print the table, and sentences on pruning, the reload check and the time."""
    console.print(result.table())
    for line in (
        f"{result.sparsity_reached:.1%} of the decoder's linear weights removed in {duration(result.pruning_seconds)}, "
        f"on {tokens} calibration tokens; perplexity on {evaluated} held-out tokens",
        f"reload check passed: plain transformers loads {result.output}, its logits differ by at most "
        f"{result.logits_difference:.2g} and its perplexity agrees",
        f"the whole demo took {duration(result.seconds)}",
    ):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _expected(program: Program, held_out: int, device: torch.device) -> dict[str, float]:
    """Return the expected seconds of all phases after loading, by name."""
    each = evaluation(program.decoder, held_out).flops / operations_per_second(device)
    found = dict.fromkeys(EVALUATIONS, each) | expected_seconds(program, 0, device, started=started())
    return {name: seconds for name, seconds in found.items() if name not in (TOKENISING, LOADING)}


def _measure(model: PreTrainedModel, windows: Tensor, phase: str, phases: PhaseRecorder) -> Measured:
    def on_window(done: int, total: int) -> None:
        phases.on_event(PhaseAdvanced(phase, phase, "window", done, total))

    with phases.phase(phase):
        on_window(0, len(windows))
        evaluation = perplexity(model, windows, on_window=on_window)
    parameters = list(model.parameters())
    return Measured(
        perplexity=evaluation.perplexity,
        parameters=sum(parameter.numel() for parameter in parameters),
        linear_weights=Decoder(model).linear_weights(),
        weights_mib=sum(parameter.numel() * parameter.element_size() for parameter in parameters) / 2**20,
    )
