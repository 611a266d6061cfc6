"""Log-probabilities that vLLM gives, as an answer for each folder: started by `benchmarks.vllm_loads`.

    PYTHON vllm_answers.py < requests > answers

PYTHON has vLLM and need not have optprune. Each line of the input is a request in JSON, with `folder`, `prompt` (token
ids), `new` (the number of tokens to generate), `remote_code` and `dtype`. Each line of the output is an answer:
`tokens`, the
prompt and the generated ones, and `scores`, the log-probabilities of the whole vocabulary for each token but the first;
or `error`. vLLM is imported once; each folder is loaded in a process forked from there, so that none can harm the next.
"""

import contextlib
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

os.environ |= {
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
}
SECONDS = 300
"""the time after which the process of a folder is ended"""


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer to a request."""
    from vllm import LLM, SamplingParams  # pyright: ignore[reportMissingImports]

    prompt, new = request["prompt"], request["new"]
    llm = LLM(
        request["folder"],
        dtype=request["dtype"],
        enforce_eager=True,
        max_model_len=256,
        max_num_seqs=4,
        max_logprobs=-1,
        skip_tokenizer_init=True,
        trust_remote_code=request["remote_code"],
        enable_prefix_caching=False,
        disable_log_stats=True,
    )
    sampling = SamplingParams(
        temperature=0.0, max_tokens=new, ignore_eos=True, prompt_logprobs=-1, logprobs=-1, detokenize=False
    )
    [result] = llm.generate([{"prompt_token_ids": prompt}], sampling, use_tqdm=False)
    [output] = result.outputs
    found = [*result.prompt_logprobs[1:], *output.logprobs]
    scores = [[position[token].logprob for token in range(len(position))] for position in found]
    return {"tokens": [*prompt, *output.token_ids], "scores": scores}


def apart(request: dict[str, Any]) -> dict[str, Any]:
    """Return the answer of a process of its own, whose last words are the error if it dies."""
    with tempfile.TemporaryDirectory() as scratch:
        file, log = Path(scratch) / "answer.json", Path(scratch) / "log.txt"
        modules = Path(scratch) / "modules.txt"
        child = os.fork()
        if not child:
            _tell(request, file, log, modules)
        _, status = os.waitpid(child, 0)
        if file.exists():
            _import(modules.read_text().splitlines())
            return json.loads(file.read_text())
        said = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        return {"error": f"the process ended with status {status}: {' '.join(said[-1:])}"}


def _tell(request: dict[str, Any], file: Path, log: Path, modules: Path) -> None:
    """Write the answer of this process, and end it."""
    signal.alarm(SECONDS)
    with log.open("w") as words:
        os.dup2(words.fileno(), 1)
        os.dup2(words.fileno(), 2)
    try:
        found = answer(request)
    except BaseException as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        found = {"error": f"{type(error).__name__}: {lines[0] if lines else ''}"}
    part = file.with_suffix(".part")
    part.write_text(json.dumps(found))
    modules.write_text("\n".join(sys.modules))
    part.rename(file)
    os._exit(0)


def _import(names: Iterable[str]) -> None:
    """Import what a process needed, so that the next ones have it."""
    for name in names:
        if name.startswith(("vllm.", "transformers.models.")) and name not in sys.modules:
            with contextlib.suppress(Exception):
                importlib.import_module(name)
    gc.freeze()  # each process looks for garbage many times


def main(lines: Iterable[str]) -> None:
    with contextlib.redirect_stdout(sys.stderr):
        import vllm.entrypoints.llm  # noqa: F401  # pyright: ignore[reportMissingImports]
        from vllm.model_executor.models import registry  # pyright: ignore[reportMissingImports]

    # It looks at each class in a process of its own, which would import vLLM once more.
    registry._run_in_subprocess = lambda task: task()
    gc.freeze()
    for line in lines:
        print(json.dumps(apart(json.loads(line))), flush=True)


if __name__ == "__main__":
    main(sys.stdin)
