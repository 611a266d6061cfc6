"""What pruning adds to the logarithm of perplexity, here and as others have published it for larger models.

The ratio of perplexities is what models of other sizes and texts can be compared by at all. The figures of
Llama-3.2-1B (WikiText-2, perplexity 9.75) are those of DenoiseRotator (arXiv 2505.23049), which has the baselines too.
"""

import math
from statistics import mean

from benchmarks.common import markdown
from benchmarks.models import read
from benchmarks.studies import DENSE, HALF, PAIRS, PRUNED, Case, rows_of

MODEL, TOKENS = "SmolLM2-135M-Instruct", 8192
ROWS: tuple[tuple[str, Case | None, Case | None, float | None, float | None], ...] = (
    ("SparseGPT", ("sparsegpt", HALF | PRUNED), ("sparsegpt", PAIRS | PRUNED), 0.717, 1.313),
    ("Wanda", ("wanda", HALF | {"units.weights": "rows"}), ("wanda", PAIRS), 0.896, 2.230),
    ("SparseGPT behind DenoiseRotator's rotations", None, None, math.log(12.86 / 9.75), math.log(18.1 / 9.75)),
    ("`sparse_best` (ours)", ("sparse_best", HALF), ("sparse_best", PAIRS), None, None),
)
"""what is pruned by, the cases of 50 percent and of 2:4 here, and the logarithms that are published for them"""


class Published:
    """The table of both."""

    def markdown(self) -> str:
        columns = (
            "ln(pruned / dense)",
            "50%, SmolLM2-135M here",
            "2:4, here",
            "50%, Llama-3.2-1B",
            "2:4",
        )
        lines = [(label, added(half), added(pairs), *map(shown, others)) for label, half, pairs, *others in ROWS]
        return markdown([dict(zip(columns, line, strict=True)) for line in lines]).rstrip("\n")


def added(case: Case | None) -> str:
    """What a case adds to the dense model's, on news, by the mean of its seeds; empty where it was not run."""
    if case is None:
        return ""
    dense, found = ([row["news"] for row in rows_of(read(), MODEL, one, TOKENS)] for one in (DENSE, case))
    return shown(math.log(mean(found) / mean(dense)) if found else None)


def shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
