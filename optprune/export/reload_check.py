"""Run as a script in a fresh process: reload a model folder and compare its logits with recorded ones.

usage: python -P reload_check.py FOLDER PROBE THREADS PATHS

PATHS is the import path as JSON, that of the process which saved the folder. It stands for a user without optprune:
importing optprune is an error, and code in the folder, which optprune wrote a moment ago, is trusted.
"""

import json
import sys
from pathlib import Path

CANNOT_IMPORT = 3
"""the exit status where torch, safetensors or transformers cannot be imported"""


def main(folder: str, probe: str, threads: str, paths: str) -> None:
    """Print one line of JSON with the largest difference of logits."""
    sys.path[:] = json.loads(paths)
    sys.modules["optprune"] = None  # type: ignore[assignment]  # so that an import of it fails
    try:
        import torch
        from safetensors.torch import load_file
        from transformers import AutoModelForCausalLM
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_IMPORT)

    torch.set_num_threads(int(threads))
    recorded = load_file(probe)
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code="optprune_shapes" in config)
    with torch.no_grad():
        logits = model(input_ids=recorded["input_ids"], use_cache=False).logits
    print(json.dumps({"difference": float((logits.float() - recorded["logits"]).abs().max())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
