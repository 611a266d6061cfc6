"""Greedy continuations: the most likely token, one after the other."""

import torch

from optprune.measure import generate
from tests.helpers.tiny_models import tiny_llama, tiny_tokenizer


def test_each_token_is_the_most_likely_one() -> None:
    model, tokenizer = tiny_llama(), tiny_tokenizer()
    prompts = [torch.tensor(tokenizer(text)["input_ids"]) for text in ("The minister", "They won the game of")]
    expected = []
    for prompt in prompts:
        ids = prompt
        for _ in range(6):
            with torch.no_grad():
                ids = torch.cat([ids, model(input_ids=ids[None]).logits[0, -1].argmax()[None]])
            if int(ids[-1]) == tokenizer.eos_token_id:
                break
        expected.append(tokenizer.decode(ids[len(prompt) :], skip_special_tokens=True))
    assert generate(model, tokenizer, prompts, new_tokens=6) == expected
