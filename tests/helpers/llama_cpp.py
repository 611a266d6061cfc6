"""llama.cpp through its binding from the package index: what it answers to a prompt of token ids."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from optprune.measure import llama_cpp as measure

POSITIONS = 512
FORCED = 1e4
"""what is added to the logit of a token that must be the most likely; probabilities are told without it"""
EVERY = 1 << 20
"""more than any vocabulary has"""
LETTERS = range(40, 100)
"""tokens among which some are whole characters, in the vocabularies of the tests"""


class LlamaCpp(measure.LlamaCpp):
    """A GGUF file loaded by llama.cpp, on one thread, with keys and values in float32."""

    def __init__(self, file: Path, slots: int = 1) -> None:
        """So many `slots` are texts that it reads side by side."""
        super().__init__(file, slots, positions=POSITIONS, exact=True)

    def tokens(self, text: str) -> int:
        """How many tokens it makes of a text."""
        answer = self.server.handle_completions({"prompt": text, "max_tokens": 1, "temperature": 0.0})
        return int(answer["usage"]["prompt_tokens"])

    def greedy(self, prompt: "Tensor | Sequence[int]", count: int) -> tuple[str, list[int]]:
        """The most likely text behind a prompt of so many tokens, and its tokens, of which each is whole characters."""
        answer = self._answer(prompt, count, 1)
        return str(answer["text"]), [int(step["id"]) for step in answer["logprobs"]["content"]]

    def log_probabilities(self, prompt: "Tensor | Sequence[int]", slot: int = 0) -> dict[int, float]:
        """The log-probabilities of the token behind a prompt, of the whole vocabulary."""
        # A part of a character is told of with the rest only, so that a choice of another token is asked for.
        return next(told for token in LETTERS if (told := self._told(prompt, token, EVERY, slot)))

    def log_likelihoods(self, windows: Tensor) -> Tensor:
        """The log-probability of each token of windows [n, length] behind those before it: [n, length - 1], float64.

        Each token is made the one that is chosen, of which the probability by the model is told; so the vocabulary is
        not asked for, and the text behind it is read on from there. There are no more windows than slots.
        """
        assert len(windows) <= self.slots and windows.shape[1] <= POSITIONS
        with ThreadPoolExecutor(len(windows)) as threads:
            rows = threads.map(self._of_window, windows.tolist(), range(len(windows)))
            return torch.tensor(list(rows), dtype=torch.float64)

    def _of_window(self, ids: list[int], slot: int) -> list[float]:
        found = list[float]()
        for seen, token in enumerate(ids[1:], start=1):
            told = self._told(ids[:seen], token, 1, slot)
            found.append((told or self.log_probabilities(ids[:seen], slot))[token])
        return found

    def _told(self, prompt: "Tensor | Sequence[int]", token: int, count: int, slot: int) -> dict[int, float]:
        """The log-probability of a token that is made the choice, and of so many of the most likely."""
        forced = {"logit_bias": [[token, FORCED]], "id_slot": slot}
        steps = (self._answer(prompt, 1, count, forced)["logprobs"] or {}).get("content", [])
        every = [one for step in steps for one in (*step["top_logprobs"], step)]
        return {int(one["id"]): float(one["logprob"]) for one in every}

    def _answer(
        self, prompt: "Tensor | Sequence[int]", count: int, probabilities: int, more: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        told = {"logprobs": probabilities, "n_probs": probabilities, "cache_prompt": True, **(more or {})}
        return self.answer([int(token) for token in prompt], count, told)["choices"][0]
