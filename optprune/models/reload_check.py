"""Run as a script in a fresh process: reload a model folder and compare its logits with recorded ones.

usage: python reload_check.py FOLDER PROBE THREADS

It imports optprune only when the folder's shapes are not those of the stock class.
"""

import json
import sys
from pathlib import Path


def main(folder: str, probe: str, threads: str) -> None:
    """Print one line of JSON with the largest difference of logits."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(int(threads))
    recorded = load_file(probe)
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    if "optprune_value_dim" in config:
        from optprune.models.load import load

        model = load(folder)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        logits = model(input_ids=recorded["input_ids"], use_cache=False).logits
    print(json.dumps({"difference": float((logits.float() - recorded["logits"]).abs().max())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
