"""llama.cpp through its binding from the package index: what it answers to a prompt of token ids."""

from collections.abc import Sequence
from pathlib import Path

import xllamacpp
from torch import Tensor

FLOAT32 = 0
"""ggml's number of the type"""


class LlamaCpp:
    """A GGUF file loaded by llama.cpp, on one thread, with keys and values in float32."""

    def __init__(self, file: Path) -> None:
        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx = params.n_batch = params.n_ubatch = 512
        params.n_parallel = 1
        params.n_gpu_layers = 0
        params.warmup = False
        params.verbosity = -1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = FLOAT32
        params.flash_attn_type = 0
        self.server = xllamacpp.Server(params)

    def tokens(self, text: str) -> int:
        """How many tokens it makes of a text."""
        answer = self.server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0.0})
        return int(answer["usage"]["prompt_tokens"])

    def greedy(self, prompt: "Tensor | Sequence[int]", count: int) -> str:
        """The most likely text behind a prompt of so many tokens."""
        return str(self._answer(prompt, count, 1)["text"])

    def log_probabilities(self, prompt: "Tensor | Sequence[int]", vocabulary: int) -> dict[int, float]:
        """The log-probabilities of the token behind a prompt."""
        (step,) = self._answer(prompt, 1, vocabulary)["logprobs"]["content"]
        return {int(one["id"]): float(one["logprob"]) for one in step["top_logprobs"]}

    def _answer(self, prompt: "Tensor | Sequence[int]", count: int, probabilities: int) -> dict:
        ids = [int(token) for token in prompt]
        request = {"prompt": ids, "max_tokens": count, "temperature": 0.0, "logprobs": probabilities}
        request |= {"n_probs": probabilities, "ignore_eos": True, "cache_prompt": True}
        return self.server.handle_completions(request)["choices"][0]
