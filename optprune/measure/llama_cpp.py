"""llama.cpp through its binding xllamacpp: speed and memory of GGUF files, each measured in a fresh process.

Run as a program, this file reads a request as JSON and prints the reply: it imports nothing of optprune, so that the
process holds llama.cpp alone.
"""

import json
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

FLOAT32 = 0
"""ggml's number of the type"""
STATUS = Path("/proc/self/status")
KILO = 1024


class LlamaCpp:
    """A GGUF file loaded by llama.cpp on the CPU."""

    def __init__(
        self, file: Path, slots: int = 1, *, positions: int = 512, threads: int = 1, exact: bool = False
    ) -> None:
        """Load a file for texts of at most so many `positions`, so many `slots` at a time.

        With `exact`, keys and values are in float32. Needs xllamacpp, which `llama_cpp_binding.binding` checks.
        """
        import xllamacpp as binding

        xllamacpp: Any = binding  # its names are made in C++
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = positions * slots
        params.n_batch = params.n_ubatch = min(positions, 512)
        params.n_parallel = self.slots = slots
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        if exact:
            params.cache_type_k = params.cache_type_v = FLOAT32
            params.flash_attn_type = 0
        self.server = xllamacpp.Server(params)

    def answer(self, prompt: Sequence[int], count: int, more: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """Return the server's answer to a prompt of token ids: the most likely `count` tokens, past an end too."""
        request = {"prompt": [int(token) for token in prompt], "max_tokens": count, "temperature": 0.0}
        return self.server.handle_completions({**request, "ignore_eos": True, **(more or {})})


@dataclass(frozen=True)
class LlamaRun:
    """One run of a file in a process of its own."""

    prefill: float
    """tokens of the prompt a second"""
    decode: float
    """new tokens a second"""
    peak_bytes: int | None
    """growth of the process's resident size from before the file was loaded to its peak; None if unknown"""


@dataclass(frozen=True)
class LlamaRequest:
    """Work of one run: a prompt, then new tokens one at a time."""

    file: str
    timed: tuple[int, ...]
    """token ids of the timed prompt"""
    new_tokens: int
    threads: int = 1

    @property
    def positions(self) -> int:
        """The positions that a text of the run may have."""
        return len(self.timed) + self.new_tokens + 8


def run(request: LlamaRequest) -> LlamaRun:
    """Run llama.cpp on a file in a fresh process. Raises RuntimeError with its last line where it fails."""
    command = [sys.executable, "-P", __file__]
    done = subprocess.run(command, input=json.dumps(asdict(request)), capture_output=True, text=True, check=False)
    lines = done.stdout.splitlines()
    if done.returncode or not lines:
        said = (done.stderr.splitlines() or [f"it ended with {done.returncode}"])[-1]
        raise RuntimeError(f"llama.cpp cannot run {request.file}: {said}")
    found = json.loads(lines[-1])
    return LlamaRun(found["prefill"], found["decode"], found["peak_bytes"])


def measure_in_turn(
    requests: Mapping[str, LlamaRequest], repeats: int, *, on_run: Callable[[int, int], None] | None = None
) -> dict[str, list[LlamaRun]]:
    """Return the runs of every file by name: each once, then each once more, and so on.

    A temporary load of the machine slows neighbours alike. `on_run(done, n)` is called after each run.
    """
    found: dict[str, list[LlamaRun]] = {name: [] for name in requests}
    for _ in range(repeats):
        for name, request in requests.items():
            found[name].append(run(request))
            if on_run is not None:
                on_run(sum(map(len, found.values())), repeats * len(requests))
    return found


def _resident(name: str) -> int | None:
    """Return a size of this process in bytes by its name in /proc/self/status, or None where there is none."""
    if not STATUS.exists():
        return None
    sizes = [line.split() for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:")]
    return int(sizes[0][1]) * KILO if sizes else None


def _reply(request: LlamaRequest) -> dict[str, Any]:
    """Return what a run measures."""
    import xllamacpp  # noqa: F401  # its own size is no part of the growth

    before = _resident("VmRSS")
    model = LlamaCpp(Path(request.file), positions=request.positions, threads=request.threads)
    model.answer(request.timed[:8], 2, {"cache_prompt": False})
    timings = model.answer(request.timed, request.new_tokens, {"cache_prompt": False})["timings"]
    peak = _resident("VmHWM")
    return {
        "prefill": timings["prompt_per_second"],
        "decode": timings["predicted_per_second"],
        "peak_bytes": None if before is None or peak is None else peak - before,
    }


if __name__ == "__main__":
    print(json.dumps(_reply(LlamaRequest(**json.load(sys.stdin)))))
