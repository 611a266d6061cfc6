"""A session: the cells of a comparison that are missing, measured one after the other."""

import gc
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

from torch import Tensor

from optprune.calibration import Statistics
from optprune.comparison.asked import Asked, Cell
from optprune.comparison.dense import DensePredictions
from optprune.comparison.folder import ComparisonFolder
from optprune.comparison.origins import Origin
from optprune.comparison.results import CellResult, Figures
from optprune.errors import OptpruneError, is_out_of_memory, no_room_behind
from optprune.export import save_pruned
from optprune.measure import Divergence, SpeedWorkload, measure_speed
from optprune.measure.memory import free_memory, release
from optprune.measure.speed import weight_bytes
from optprune.models import UNITS, Decoder, LoadedModel
from optprune.pruning import collect, prune
from optprune.pruning.preflight import check_run
from optprune.recipe import Recipe
from optprune.report import Event, Report
from optprune.report.progress import about, duration
from optprune.system.interrupts import record_done
from optprune.system.wording import one_line
from optprune.texts import DrawnWindows

SHARE = 0.25
"""the share of the free memory that statistics may have: else they are in the folder"""
PER_ENTRY = 8
"""the bytes of statistics for an entry of a Gram matrix: in float32, with what solvers keep beside it"""
DESTROYED = "the pruned model's perplexity is beyond what a number holds: remove less"
NO_MEMORY = "the memory is not enough: take fewer samples or shorter windows"


@dataclass
class Pace:
    """How long the cells of a comparison take, by those that are finished."""

    _cells: dict[str, list[float]] = field(default_factory=dict)
    """the seconds of finished cells, by recipe"""
    _seeds: dict[int, float] = field(default_factory=dict)
    """the seconds in which the dense model was measured, by seed"""

    def prepare(self, seed: int, seconds: float) -> None:
        """Note the seconds in which the dense model was measured for a seed."""
        self._seeds[seed] = seconds

    def finish(self, cell: Cell, seconds: float) -> None:
        """Note the seconds of a cell that is finished, or has failed."""
        self._cells.setdefault(cell.recipe, []).append(seconds)

    def left(self, cells: Sequence[Cell]) -> float:
        """Return the seconds that cells to come will take, as those of their recipe did, or else as all did."""
        every = [seconds for found in self._cells.values() for seconds in found]
        seeds = {cell.seed for cell in cells} - self._seeds.keys()
        own = (mean(self._cells.get(cell.recipe, every)) for cell in cells)
        return sum(own) + len(seeds) * mean(self._seeds.values())


@dataclass(eq=False)
class Session:
    """What the cells of a comparison share."""

    asked: Asked
    origin: Origin
    folder: ComparisonFolder
    drawn: Mapping[int, DrawnWindows]
    """what each seed draws of the calibration texts"""
    windows: Tensor
    """the windows to evaluate on: [n, length]"""
    keep_models: bool
    speed: SpeedWorkload | None
    say: Callable[[str], None]
    on_event: Callable[[Event], None]
    loaded: LoadedModel
    """the dense model"""
    failed: dict[Cell, CellResult] = field(default_factory=dict)
    _predictions: DensePredictions | None = None
    _pace: Pace = field(default_factory=Pace)

    def dense(self) -> Figures:
        """The figures of the dense model."""
        figures = self.folder.dense()
        if figures is None:
            found = self.predictions.itself()
            figures = self._figures(self.loaded, found, 0.0, self.loaded.decoder().linear_weights(), 0.0, ())
            self.folder.keep_dense(figures)
            self.say(f"dense: perplexity {figures.perplexity:.2f}")
        return figures

    def measure(self) -> tuple[CellResult, ...]:
        """All cells, of which those that are finished are not measured again."""
        for seed in self.asked.seeds:
            missing = [cell for cell in self.asked.cells() if cell.seed == seed and not self.folder.has(cell)]
            if missing:
                self._measure_of(seed, missing)
        found = [self.folder.cell(cell) or self.failed[cell] for cell in self.asked.cells()]
        for name in self.folder.damaged_files:
            self.say(f"{name} of {self.folder.folder} was damaged, so it was measured again")
        return tuple(found)

    @property
    def predictions(self) -> DensePredictions:
        """What the dense model predicts, computed once."""
        if self._predictions is None:
            self.say("evaluating the dense model")
            self._predictions = DensePredictions(self.loaded.decoder(), self.windows, self.scratch())
        return self._predictions

    def scratch(self) -> Path:
        """A folder for what does not stay."""
        return self.folder.work

    def _measure_of(self, seed: int, missing: list[Cell]) -> None:
        """The cells of a seed, with what they share of the dense model on its tokens."""
        batches = self.drawn[seed].batches
        recipes = [self.asked.recipe(cell) for cell in missing]
        place = self.scratch() / f"statistics-{seed}" if self._is_much(self.loaded.decoder()) else None
        self.say(f"measuring the dense model for seed {seed}")
        began = time.perf_counter()
        statistics = self._collected(batches, recipes, place)
        self.say(f"measured the dense model for seed {seed}, in {duration(time.perf_counter() - began)}")
        self._pace.prepare(seed, time.perf_counter() - began)
        for cell, recipe in zip(missing, recipes, strict=True):
            begun = time.perf_counter()
            result = self._result(cell, recipe, statistics)
            if result.figures is None:
                self.failed[cell] = result
                self.say(f"{cell} failed: {result.failure}")
            else:
                self.folder.finish(result)
                said = f"perplexity {result.figures.perplexity:.2f}, pruned in {duration(result.spent)}"
                self.say(f"{cell}: {said}")
            cells = list(self.asked.cells())
            done = sum(map(self.folder.has, cells))
            self._pace.finish(cell, time.perf_counter() - begun)
            to_come = [each for each in cells if not self.folder.has(each) and each not in self.failed]
            if to_come:
                self.say(
                    f"{len(cells) - len(to_come)} of {len(cells)} cells, {about(self._pace.left(to_come))} left in all"
                )
            record_done(f"{done} of {len(cells)} cells are done, and kept in {self.folder.folder}: run again to go on")
            gc.collect()  # a model holds itself by its hooks
            release()
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)

    def _collected(self, batches: Sequence[Tensor], recipes: list[Recipe], place: Path | None) -> Statistics:
        model, store = self.loaded.model, self.loaded.store
        # A cell whose recipe does not fit fails by itself.
        fitting = [recipe for recipe in recipes if self._fits(recipe)]
        try:
            return collect(model, batches, recipes=fitting, store=store, folder=place, on_event=self.on_event)
        except OptpruneError as error:
            if no_room_behind(error) is not None:
                raise
        # What a cell needs is measured when it needs it, and fails it alone.
        if place is not None:
            shutil.rmtree(place, ignore_errors=True)
        return collect(model, batches, recipes=[], store=store, folder=place)

    def _fits(self, recipe: Recipe) -> bool:
        try:
            check_run(self.loaded.decoder(), recipe.settled(), None)
        except OptpruneError:
            return False
        return True

    def _result(self, cell: Cell, recipe: Recipe, statistics: Statistics) -> CellResult:
        before, drawn = statistics.seconds_saved, self.drawn[cell.seed]
        try:
            loaded = self.origin.fresh(self.scratch(), whole=self.speed is not None)
            report = prune(
                loaded.model,
                drawn.batches,
                recipe,
                statistics=statistics,
                store=loaded.store,
                source=self.origin.source,
                calibration=drawn.description,
                on_event=self.on_event,
            )
            found = self.predictions.beside(loaded.decoder())
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
        told = found.perplexity, found.divergence, found.agreement
        return Figures(*told, sparsity, weights, size, seconds, prefill, decode, notes)

    def _save(self, cell: Cell, loaded: LoadedModel, report: Report, recipe: Recipe) -> None:
        place = self.folder.models / cell.name
        save_pruned(loaded, place, report, recipe, window=self.windows[0], overwrite=True)

    def _is_much(self, decoder: Decoder) -> bool:
        """Whether what is kept of the dense model may be too much for the memory."""
        taps = {
            (index, target.tap)
            for index in range(len(decoder.blocks))
            for target in UNITS["weights"].candidates(decoder, index)
        }
        size = sum(decoder.layer(index, tap).in_features ** 2 for index, tap in taps) * PER_ENTRY
        free = free_memory(decoder.model.device)
        return free is not None and size > SHARE * free
