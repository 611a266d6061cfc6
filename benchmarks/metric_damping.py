"""The damping of the output metric, for all layers or for one kind of layer, in the first blocks of a real model.

    .venv/bin/python -m benchmarks.metric_damping
    .venv/bin/python -m benchmarks.metric_damping --cases 2:4 --dampings 0.1 1 inf --kinds

The metric of a layer is (S + d m I) / (1 + d) with m the mean of the diagonal of S, so that its trace is that of S for
every damping d, and for infinity it is m I: outputs count the same. The first blocks of SmolLM2 are pruned by the
recipe with one damping for all layers, then with another damping for one kind of layer alone; metrics are those of the
whole model. The divergence is that of the whole model on held-out windows, in nats per predicted token: `choice` are
windows of the calibration half of the news, `news` of the other half, `speeches` of other text.
"""

import argparse
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from itertools import product
from typing import Any

import torch

import optprune
from benchmarks.common import evaluation_texts, setting, tokenizer_of, with_earlier, write_table
from benchmarks.first_blocks import OfTheWhole, prune_first_blocks
from benchmarks.studies import HALF, PAIRS
from optprune.measure import divergence_from
from optprune.metric import Metrics, OutputMetric
from optprune.models import Decoder

CASES = {
    "2:4": PAIRS,
    "50%": HALF,
}
KINDS = {
    "queries, keys, values": ("q_proj", "k_proj", "v_proj"),
    "attention output": ("o_proj",),
    "gate, up": ("gate_proj", "up_proj"),
    "down": ("down_proj",),
}


class DampedByKind(Metrics):
    """Metrics of layers whose damping depends on the last part of the layer's name."""

    dampings: Mapping[str, float]

    def __getitem__(self, name: str) -> OutputMetric:
        metric, damping = self.sums(name).metric().damped(1.0), self.dampings[name.rsplit(".", 1)[-1]]
        share = 1.0 if math.isinf(damping) else damping / (1 + damping)
        average = (1 - share) * metric.average
        return replace(metric, average=average, damping=share * metric.damping, proved=average)

    def damped(self, fraction: float) -> "DampedByKind":
        return self

    def pop_layers(self, names: Iterable[str]) -> "DampedByKind":
        return self.like(super().pop_layers(names), self.dampings)

    @classmethod
    def like(cls, metrics: Metrics, dampings: Mapping[str, float]) -> "DampedByKind":
        """Return the metrics with other dampings."""
        made = cls({name: metrics.sums(name) for name in metrics})
        made.dampings = dampings
        return made


class WithDampings(OfTheWhole):
    """Output metrics of the whole model with dampings by kind of layer."""

    dampings: Mapping[str, float]

    def metrics(self, decoder: Decoder, *asked: Any) -> Metrics:
        return DampedByKind.like(super().metrics(decoder, *asked), self.dampings)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--dampings", nargs="+", type=float, default=[0.01, 0.1, 1.0, math.inf])
    parser.add_argument("--kinds", action="store_true", help="also change the damping of one kind of layer alone")
    parser.add_argument("--blocks", type=int, default=6)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--seq-length", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    here = setting(2 * options.samples, options.seq_length, options.windows, options.seed)
    model, rows = here.loaded.model, list[dict[str, Any]]()
    statistics = WithDampings(model)
    fitted, choice = torch.cat(list(here.batches)).split(options.samples)
    batches = fitted.split(len(here.batches[0]))
    texts = {"choice": choice} | evaluation_texts(tokenizer_of(here.loaded), options.seq_length, options.windows)
    for case in options.cases:
        recipe = optprune.load_recipe("sparse_best", CASES[case])
        assert recipe.metric is not None
        own = {layer: recipe.metric.damping for layers in KINDS.values() for layer in layers}
        others = [damping for damping in options.dampings if damping != recipe.metric.damping]
        trials: list[tuple[str, float]] = [("all", damping) for damping in options.dampings]
        trials += product(KINDS, others) if options.kinds else ()
        for kind, damping in trials:
            statistics.dampings = own | dict.fromkeys(KINDS.get(kind, own), damping)
            pruned, _, seconds = prune_first_blocks(model, options.blocks, batches, recipe, statistics)
            row: dict[str, Any] = {"case": case, "seed": options.seed, "layers": kind, "damping": str(damping)}
            for text, windows in texts.items():
                row[text] = round(divergence_from(pruned, model, windows).divergence, 4)
            rows.append(row | {"CPU s": round(seconds)})
            print(rows[-1], flush=True)
    title = (
        f"Damping of the output metric in the first {options.blocks} blocks of SmolLM2-135M-Instruct, "
        f"{options.samples * options.seq_length} calibration tokens of news: divergence of the whole model"
    )
    rows = with_earlier("metric_damping", rows, ("case", "seed", "layers", "damping"))
    print(write_table("metric_damping", title, rows))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
