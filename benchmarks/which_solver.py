"""Which solver: one row for each, over all instances of the gallery that it takes, from benchopt's result files.

    benchopt run benchmarks/layerwise -d "Files[folder=gallery,file=[...]]" --output gallery.parquet
    .venv/bin/python -m benchmarks.which_solver benchmarks/layerwise/outputs/gallery.parquet

It writes benchmarks/results/which_solver.md and .json, docs/pictures/which_solver.svg, and the best values into
benchmarks/results/gallery.json. Needs pandas, which benchopt brings. A solver's value and its time are those of its
last answer. The profile is that of Dolan and More (2002): the share of all instances of a kind of problem on which a
solver's loss is within a factor of the best known.
"""

import argparse
import math
import time
from pathlib import Path
from statistics import fmean, median
from typing import Any

import pandas
import torch

from benchmarks.common import write_table
from benchmarks.gallery import LENGTH, SAMPLES, known, note

WITHIN = 1e-4
"""the relative distance from the best value that counts as being best"""
PICTURE = Path(__file__).parents[1] / "docs" / "pictures" / "which_solver.svg"


def last_answers(files: list[Path]) -> pandas.DataFrame:
    """Return one line for each solver and instance, its last answer."""
    every = pandas.concat([pandas.read_parquet(file) for file in files], ignore_index=True)
    every = every.rename(columns={"p_dataset_file": "instance", "solver_name": "solver", "objective_value": "value"})
    rows = every.sort_values("stop_val").groupby(["solver", "instance"], as_index=False).last()
    return rows.loc[:, ["solver", "instance", "value", "time", "objective_gap"]]


def note_best(rows: pandas.DataFrame) -> dict[str, Any]:
    """Write better values than the known ones into the gallery's table, and return what is known of its instances."""
    for instance, group in rows.groupby("instance"):
        best = group.loc[group["value"].idxmin()]
        before = known()["instances"].get(instance, {}).get("best", math.inf)
        if best["value"] < before:
            note(str(instance), {"best": float(best["value"]), "solver": str(best["solver"])})
    return known()["instances"]


def gram_seconds(width: int) -> float:
    """Return the time of a Gram product of the gallery's tokens."""
    inputs = torch.randn(SAMPLES * LENGTH, width)
    seconds = list[float]()
    for _ in range(3):
        began = time.perf_counter()
        _ = inputs.T @ inputs
        seconds.append(time.perf_counter() - began)
    return min(seconds)


def table(rows: pandas.DataFrame, instances: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one row for each kind of problem and solver, those with the least mean loss first."""
    units = {width: gram_seconds(width) for width in {entry["shape"][1] for entry in instances.values()}}
    found = list[dict[str, Any]]()
    kinds = sorted({entry["kind"] for entry in instances.values()})
    for kind in kinds:
        of_kind = {name: entry for name, entry in instances.items() if entry["kind"] == kind}
        lines = list[dict[str, Any]]()
        for solver, group in rows[rows["instance"].isin(list(of_kind))].groupby("solver"):
            ratios = [
                over(value, of_kind[name]["best"])
                for name, value in zip(group["instance"], group["value"], strict=True)
            ]
            finite = [ratio for ratio in ratios if math.isfinite(ratio)]
            gaps = [gap for gap in group["objective_gap"] if math.isfinite(gap)]
            times = [
                seconds / units[of_kind[name]["shape"][1]]
                for name, seconds in zip(group["instance"], group["time"], strict=True)
            ]
            lines.append(
                {
                    "problem": kind.removesuffix(" least squares"),
                    "solver": solver,
                    "instances": f"{len(group)} of {len(of_kind)}",
                    "best on": sum(ratio <= 1 + WITHIN for ratio in ratios),
                    "mean loss over the best": round(fmean(finite), 4) if finite else "-",
                    "worst": round(max(finite), 4) if finite else "-",
                    "median gap to the bound": round(median(gaps), 4) if gaps else "-",
                    "Gram products": round(median(times), 1),
                    "failures": len(ratios) - len(finite),
                }
            )
        found += sorted(lines, key=order)
    return found


def order(line: dict[str, Any]) -> tuple[bool, float, float]:
    """Return the place of a line: the least mean loss first, and of equal ones the fastest."""
    loss = line["mean loss over the best"]
    return loss == "-", 0.0 if loss == "-" else loss, line["Gram products"]


def over(value: float, best: float) -> float:
    """Return a value over the best one; 1 where both are zero."""
    return value / best if best > 0 else (1.0 if value <= 0 else math.inf)


def draw(rows: pandas.DataFrame, instances: dict[str, Any]) -> None:
    """Draw a performance profile for each kind of problem."""
    import matplotlib.pyplot as plt

    kinds = sorted({entry["kind"] for entry in instances.values()})
    figure, axes = plt.subplots(1, len(kinds), figsize=(5 * len(kinds), 4), squeeze=False)
    for axis, kind in zip(axes[0], kinds, strict=True):
        of_kind = [name for name, entry in instances.items() if entry["kind"] == kind]
        for solver, group in rows[rows["instance"].isin(of_kind)].groupby("solver"):
            ratios = sorted(
                over(v, instances[i]["best"]) for i, v in zip(group["instance"], group["value"], strict=True)
            )
            finite = [ratio for ratio in ratios if math.isfinite(ratio)]
            shares = [(number + 1) / len(of_kind) for number in range(len(finite))]
            axis.step([1.0, *finite], [0.0, *shares], where="post", label=str(solver))
        axis.set(xscale="log", xlim=(0.99, 4), ylim=(0, 1.02), title=kind, xlabel="loss over the best known")
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("share of the instances")
    figure.tight_layout()
    PICTURE.parent.mkdir(exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Write the table and the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", type=Path, nargs="+", help="benchopt's result files")
    rows = last_answers(parser.parse_args().files)
    instances = {name: entry for name, entry in note_best(rows).items() if "best" in entry}
    title = f"Which solver: {len(instances)} layer problems, losses over the best known and times in Gram products"
    print(write_table("which_solver", title, table(rows, instances)))
    draw(rows, instances)


if __name__ == "__main__":
    main()
