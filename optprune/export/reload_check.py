"""Script for a fresh process: load a model folder, and compare its logits with recorded ones.

usage: python -P reload_check.py TASK

TASK is JSON: the folder, the file with token ids and logits, the number of threads, the import path of the process that
saved the folder, the class of transformers and whether it may run code of the folder, the device map ("disk" for blocks
that are read when they run), and a scratch folder. The script takes the part of a user without optprune: importing
optprune is an error. Code in the folder, which optprune has just written, is trusted.
"""

import json
import os
import sys
import threading

CANNOT_IMPORT = 3
"""exit status where torch, safetensors or transformers cannot be imported"""


def main(words: str) -> None:
    """Print lines of JSON: the number of blocks done, first 0 for a loaded model, then the difference."""
    task = json.loads(words)
    threading.Thread(target=end_with_parent, daemon=True).start()
    sys.path[:] = task["paths"]
    sys.modules["optprune"] = None  # type: ignore[assignment]  # so that an import of it fails
    try:
        import torch
        import transformers
        from safetensors.torch import load_file
    except ImportError as error:
        print(error, file=sys.stderr)
        sys.exit(CANNOT_IMPORT)

    torch.set_num_threads(task["threads"])
    recorded = load_file(task["record"])
    model = getattr(transformers, task["class"]).from_pretrained(
        task["folder"],
        trust_remote_code=task["trust"],
        device_map=task["places"],
        offload_folder=task["scratch"],
    )
    done = 0

    def passed(*_: object) -> None:
        nonlocal done
        done += 1
        print(json.dumps({"blocks": done}), flush=True)

    for name, place in task["places"].items():
        if place == "disk":
            model.get_submodule(name).register_forward_hook(passed)
    print(json.dumps({"blocks": done}), flush=True)
    with torch.no_grad():
        logits = model(input_ids=recorded["input_ids"].to(model.device), use_cache=False).logits
    print(json.dumps({"difference": float((logits.float().cpu() - recorded["logits"]).abs().max())}))


def end_with_parent() -> None:
    """Exit when the standard input closes, which happens when the parent has ended for any reason."""
    while os.read(0, 1):
        pass
    os._exit(1)


if __name__ == "__main__":
    main(*sys.argv[1:])
