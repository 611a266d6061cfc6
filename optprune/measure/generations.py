"""Greedy continuations, to be read side by side."""

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.measure.evaluate import evaluating

NEW_TOKENS = 48


@torch.no_grad()
def generate(
    model: PreTrainedModel, tokenizer: Tokenizer, prompts: Sequence[Tensor], *, new_tokens: int = NEW_TOKENS
) -> list[str]:
    """The greedy continuation of each prompt of token ids [length], as text without special tokens."""
    greedy = GenerationConfig(
        max_new_tokens=new_tokens,
        do_sample=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id,
    )
    found = list[str]()
    with evaluating(model):
        for prompt in prompts:
            ids = prompt[None].to(model.device)
            # A method of transformers' generation mixin, which all causal models have.
            ids_out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=greedy)  # type: ignore[operator]
            found += tokenizer.batch_decode(ids_out[:, prompt.shape[0] :], skip_special_tokens=True)
    return found
