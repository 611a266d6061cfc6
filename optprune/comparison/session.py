"""Session of a comparison: measures the missing cells one after the other."""

import gc
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import mean

from torch import Tensor

from optprune.calibration import Statistics
from optprune.calibration.generated import described, generated_windows, kept_or_new, with_generated
from optprune.comparison.dense import DensePredictions, DenseSource
from optprune.comparison.grid import Cell, Grid
from optprune.comparison.kept_folder import ComparisonFolder
from optprune.comparison.results import CellResult, Figures
from optprune.errors import OptpruneError, is_out_of_memory, no_room_behind
from optprune.export import save_model
from optprune.measure import Divergence, SpeedWorkload, measure_speed
from optprune.measure.memory import free_memory, release
from optprune.measure.speed import weight_bytes
from optprune.models import UNITS, Decoder, LoadedModel
from optprune.program import Request, resolve
from optprune.pruning import collect, prune
from optprune.recipe import Recipe
from optprune.report import Event, Report
from optprune.report.progress import about, duration
from optprune.system.folders import GO_ON
from optprune.system.interrupts import record_done
from optprune.system.wording import counted, one_line
from optprune.texts import DrawnWindows

SHARE = 0.25
"""share of the free memory that statistics may take; otherwise they are in the folder"""
PER_ENTRY = 8
"""bytes of statistics for an entry of a Gram matrix: in float32, with the working memory of solvers"""
DESTROYED = "the perplexity of the pruned model is not finite: lower the sparsity"
NO_MEMORY = "the memory is not enough: use fewer samples or shorter windows"


@dataclass
class TimeLeft:
    """Estimate of the remaining seconds, from those of finished cells."""

    _cells: dict[str, list[float]] = field(default_factory=dict)
    """seconds of finished cells, by recipe"""
    _seeds: dict[int, float] = field(default_factory=dict)
    """seconds in which the dense model was measured, by seed"""

    def prepare(self, seed: int, seconds: float) -> None:
        """Record the seconds in which the dense model was measured for a seed."""
        self._seeds[seed] = seconds

    def finish(self, cell: Cell, seconds: float) -> None:
        """Record the seconds of a cell that is finished, or has failed."""
        self._cells.setdefault(cell.recipe, []).append(seconds)

    def left(self, cells: Sequence[Cell]) -> float:
        """Return the seconds that remaining cells will take: the mean of their recipe's, or else of all."""
        every = [seconds for found in self._cells.values() for seconds in found]
        seeds = {cell.seed for cell in cells} - self._seeds.keys()
        own = (mean(self._cells.get(cell.recipe, every)) for cell in cells)
        return sum(own) + len(seeds) * mean(self._seeds.values())


@dataclass(eq=False)
class Session:
    """Cells of a comparison, with the data that they share."""

    grid: Grid
    source: DenseSource
    folder: ComparisonFolder
    drawn: Mapping[int, DrawnWindows]
    """calibration windows, by seed"""
    generated: int
    """number of further windows that the dense model generates for each seed"""
    windows: Tensor
    """evaluation windows [n, length]"""
    keep_models: bool
    speed: SpeedWorkload | None
    say: Callable[[str], None]
    on_event: Callable[[Event], None]
    loaded: LoadedModel
    """the dense model"""
    failed: dict[Cell, CellResult] = field(default_factory=dict)
    _predictions: DensePredictions | None = None
    _times: TimeLeft = field(default_factory=TimeLeft)

    def dense(self) -> Figures:
        """Return the figures of the dense model."""
        figures = self.folder.dense()
        if figures is None:
            found = self.predictions.itself()
            figures = self._figures(self.loaded, found, 0.0, self.loaded.decoder().linear_weights(), 0.0, ())
            self.folder.keep_dense(figures)
            self.say(f"dense: perplexity {figures.perplexity:.2f}")
        return figures

    def measure(self) -> tuple[CellResult, ...]:
        """Return the results of all cells; finished ones are not measured again."""
        for seed in self.grid.seeds:
            missing = [cell for cell in self.grid.cells() if cell.seed == seed and not self.folder.has(cell)]
            if missing:
                self._measure_of(seed, missing)
        found = [self.folder.cell(cell) or self.failed[cell] for cell in self.grid.cells()]
        for name in self.folder.damaged_files:
            self.say(f"{name} of {self.folder.folder} was damaged, so it was measured again")
        return tuple(found)

    @property
    def predictions(self) -> DensePredictions:
        """The predictions of the dense model, computed once."""
        if self._predictions is None:
            self.say("evaluating the dense model")
            self._predictions = DensePredictions(self.loaded.decoder(), self.windows, self.scratch())
        return self._predictions

    def scratch(self) -> Path:
        """Return a folder for temporary files."""
        return self.folder.work

    def _measure_of(self, seed: int, missing: list[Cell]) -> None:
        """Measure cells of one seed, which share the statistics of the dense model."""
        recipes = [self.grid.recipe(cell) for cell in missing]
        place = self.scratch() / f"statistics-{seed}" if self._is_much(self.loaded.decoder()) else None
        self.say(f"measuring the dense model for seed {seed}")
        began = time.perf_counter()
        drawn = self._with_generated(seed)
        statistics = self._collected(drawn.batches, recipes, place)
        self.say(f"measured the dense model for seed {seed}, in {duration(time.perf_counter() - began)}")
        self._times.prepare(seed, time.perf_counter() - began)
        for cell, recipe in zip(missing, recipes, strict=True):
            begun = time.perf_counter()
            result = self._result(cell, recipe, statistics, drawn)
            if result.figures is None:
                self.failed[cell] = result
                self.say(f"{cell} failed: {result.failure}")
            else:
                self.folder.finish(result)
                pruned = f"pruned in {duration(result.spent)}"
                self.say(f"{cell}: perplexity {result.figures.perplexity:.2f}, {pruned}")
            cells = list(self.grid.cells())
            done = sum(map(self.folder.has, cells))
            self._times.finish(cell, time.perf_counter() - begun)
            remaining = [each for each in cells if not self.folder.has(each) and each not in self.failed]
            if remaining:
                left = about(self._times.left(remaining))
                self.say(f"{len(cells) - len(remaining)} of {len(cells)} cells, {left} left in all")
            record_done(f"{done} of {len(cells)} cells are done, and kept in {self.folder.folder}: {GO_ON}")
            gc.collect()  # hooks make a model refer to itself
            release()
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def _with_generated(self, seed: int) -> DrawnWindows:
        """Return the windows of a seed with those that the dense model generates, which the folder keeps."""
        drawn, count = self.drawn[seed], self.generated
        if not count:
            return drawn

        def generate() -> Tensor:
            self.say(f"generating {counted(count, 'window')} for seed {seed}")
            dense = self.loaded
            if dense.store is not None:
                dense = self.source.to_measure(self.scratch(), whole=True)
            return generated_windows(dense.model, drawn.batches, count, seed=seed)

        windows = kept_or_new(self.folder, generate, name=f"generated-seed{seed}.json")
        kept = f"windows for seed {seed} are generated, and kept in {self.folder.folder}"
        record_done(f"{kept}: {GO_ON}")
        every = with_generated(drawn.batches, windows, held_out=self.grid.held_out, seed=seed)
        return replace(drawn, batches=every, description=described(drawn.description, count))

    def _collected(self, batches: Sequence[Tensor], recipes: list[Recipe], place: Path | None) -> Statistics:
        model, store = self.loaded.model, self.loaded.store
        # Recipes that do not fit the model fail in their own cells.
        fitting = [recipe for recipe in recipes if self._fits(recipe)]
        try:
            return collect(model, batches, recipes=fitting, store=store, folder=place, on_event=self.on_event)
        except OptpruneError as error:
            if no_room_behind(error) is not None:
                raise
        # Each cell measures its statistics itself, so that a lack of room fails that cell alone.
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        return collect(model, batches, recipes=[], store=store, folder=place)

    def _fits(self, recipe: Recipe) -> bool:
        try:
            resolve(self.loaded.decoder(), Request(recipe=recipe))
        except OptpruneError:
            return False
        return True

    def _result(self, cell: Cell, recipe: Recipe, statistics: Statistics, drawn: DrawnWindows) -> CellResult:
        before = statistics.seconds_saved
        try:
            loaded = self.source.to_prune(self.scratch(), whole=self.speed is not None)
            report = prune(
                loaded.model,
                drawn.batches,
                recipe,
                statistics=statistics,
                store=loaded.store,
                source=self.source.source,
                calibration=drawn.description,
                on_event=self.on_event,
            )
            found = self.predictions.divergence_to(loaded.decoder())
            weights = round((1 - report.sparsity_reached) * self.loaded.decoder().linear_weights())
            alone = report.seconds + statistics.seconds_saved - before
            figures = self._figures(loaded, found, report.sparsity_reached, weights, alone, report.notes)
            if not math.isfinite(figures.perplexity):
                return CellResult(cell, None, DESTROYED)
            if self.keep_models:
                self._save(cell, loaded, report, recipe)
            return CellResult(cell, figures, spent=report.seconds)
        except OptpruneError as error:
            if no_room_behind(error) is not None:
                raise
            return CellResult(cell, None, one_line(str(error)))
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            return CellResult(cell, None, NO_MEMORY)

    def _figures(
        self,
        loaded: LoadedModel,
        found: Divergence,
        sparsity: float,
        weights: int,
        seconds: float,
        notes: tuple[str, ...],
    ) -> Figures:
        prefill = decode = None
        if self.speed is not None:
            [speed] = measure_speed({"model": loaded.model}, self.speed)
            prefill, decode = speed.prefill.median, speed.decode.median
        size = weight_bytes(loaded.model)
        return Figures(
            perplexity=found.perplexity,
            divergence=found.divergence,
            agreement=found.agreement,
            sparsity=sparsity,
            weights=weights,
            bytes=size,
            seconds=seconds,
            prefill=prefill,
            decode=decode,
            notes=notes,
        )

    def _save(self, cell: Cell, loaded: LoadedModel, report: Report, recipe: Recipe) -> None:
        place = self.folder.models / cell.name
        save_model(loaded, place, report=report, recipe=recipe, check_tokens=self.windows[:1], overwrite=True)

    def _is_much(self, decoder: Decoder) -> bool:
        """Return whether the statistics of the dense model may be too large for the memory."""
        taps = {
            (index, target.tap)
            for index in range(len(decoder.blocks))
            for target in UNITS["weights"].candidates(decoder, index)
        }
        size = sum(decoder.layer(index, tap).in_features ** 2 for index, tap in taps) * PER_ENTRY
        free = free_memory(decoder.model.device)
        return free is not None and size > SHARE * free
