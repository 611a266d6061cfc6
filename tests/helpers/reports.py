"""Reports of runs that were never made, whose figures a test knows."""

from dataclasses import replace
from typing import Any

from optprune.models import BlockShape
from optprune.report import BlockChange, LayerReport, PhaseReport, Report

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
MLP = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def layer(block: int, path: str, **fields: Any) -> LayerReport:
    number = 10 * block + len(path)
    made = LayerReport(
        name=f"model.layers.{block}.{path}",
        kind="structured least squares",
        solver="Wanda > Restore",
        relative_error=0.001 * number,
        held_out_error=None,
        status="converged",
        objective=1.5 * number,
        lower_bound=None,
        gap=None,
        damping=0.0001 * number,
        tokens=4096,
        seconds=0.25 * number,
        kept=100 + number,
        units=1536,
        dead_inputs=0,
    )
    return replace(made, **fields)


def narrowed(count: int = 3, **fields: Any) -> Report:
    """A model whose MLPs are narrowed, each block to another width."""
    before = BlockShape(1536, 3, 64)
    changes = tuple(BlockChange(before, replace(before, mlp_width=1000 + 8 * block)) for block in range(count))
    made = Report(
        model="models/Small-1B",
        recipe={
            "name": "fasp",
            "summary": "MLP units by a score",
            "units": "mlp",
            "solver": ["fasp_metric", "restore"],
            "allocation": {"kind": "uniform", "multiple": None},
            "strict": False,
            "sparsity": 0.25,
        },
        sparsity_requested=0.25,
        sparsity_reached=0.2468,
        seconds=77.0,
        floor_seconds=31.0,
        tokens=4096,
        seed=3,
        versions={"optprune": "9.8.7", "torch": "2.99"},
        layers=tuple(layer(block, "mlp.down_proj") for block in range(count)),
        calibration="news.txt, 8 windows of 512 tokens, seed 3",
        blocks=changes,
        phases=(PhaseReport("loading", 4.0, 3 * 2**20, None), PhaseReport("pruning", 12.0, 5 * 2**20, None)),
    )
    return replace(made, **fields)


def zeroed(count: int = 3, **fields: Any) -> Report:
    """A model whose single weights are zero: in each layer another share."""
    shape = BlockShape(1536, 3, 64)
    layers = tuple(
        layer(block, path, kept=400 + 10 * block + place, units=1000, gap=0.01 * (block + 1), lower_bound=1.0)
        for block in range(count)
        for place, path in enumerate((*ATTENTION, *MLP))
    )
    recipe = {"name": "sparse", "units": {"weights": "2:4"}, "sparsity": 0.5}
    made = narrowed(count, layers=layers, recipe=recipe, blocks=(BlockChange(shape, shape),) * count)
    return replace(made, **fields)


def evaluated(**fields: Any) -> dict[str, Any]:
    """What optprune evaluate --json writes."""
    stretches = [
        {"first": 1 + 64 * part, "last": 64 * (part + 1), "perplexity": 31.0 - part, "divergence": 0.4 + 0.1 * part}
        for part in range(8)
    ]
    return {
        "model": "pruned",
        "text": "heldout.txt",
        "seq_length": 512,
        "perplexity": 35.0123,
        "tokens": 5110,
        "windows": 10,
        "seconds": 9.5,
        "bits_per_byte": 1.2345,
        "against": "models/Small-1B",
        "divergence": 0.5432,
        "agreement": 0.7123,
        "dense_perplexity": 29.4321,
        "along": [{**stretch, "agreement": 0.8} for stretch in stretches],
        "generations": [
            {"prompt": f"The minister said {number}", "text": f"after {number}", "dense_text": f"before {number}"}
            for number in range(10)
        ],
        **fields,
    }


def speed(weights: str = "") -> dict[str, Any]:
    """What optprune benchmark-model --json writes, with the digest of the weights of the first model."""

    def model(name: str, factor: float) -> dict[str, Any]:
        spread = {"median": 100.0 * factor, "quartiles": [90.0, 110.0], "values": [100.0 * factor]}
        sizes = {"parameters": 1000, "weight_bytes": 4000, "peak_bytes": 7 * 2**20, "file_bytes": 6 * 2**20}
        return {"name": name, "prefill": spread, "decode": {**spread, "median": 20.0 * factor}, **sizes}

    work = {"prompt_tokens": 512, "new_tokens": 32, "batch": 1, "repeats": 5}
    models = [model("pruned", 1.5), model("dense", 1.0)]
    models[0]["weights"] = weights
    return {"device": "cpu (1 thread)", "dtype": "float32", **work, "models": models}
