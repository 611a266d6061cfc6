"""A small OPT, Qwen2 or mixture of experts trained on the real text in minutes: real models where there is no hub.

    .venv/bin/python -m benchmarks.train_small qwen2 small-qwen2
    .venv/bin/python -m benchmarks.models structured --model small-qwen2

Those with eight experts, of which two answer a token, take a quarter of an hour; qwen2_moe has a shared expert too:

    .venv/bin/python -m benchmarks.train_small qwen3_moe small-moe
    .venv/bin/python -m benchmarks.train_small qwen2_moe small-shared

Four blocks of width 128, a byte-level BPE tokenizer of 2048 tokens trained on the same half of the news articles; the
other half stays for evaluation. Small, so that a quarter of an hour on one core fills it: a wide model that has hardly
been trained loses nothing by pruning. The number of steps is fixed, so a seed gives the same model on the same machine.
"""

import argparse
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
    get_cosine_schedule_with_warmup,
)

from optprune.measure import perplexity
from optprune.texts import demo_articles, evaluation_windows, read_documents, tokenise

VOCABULARY, LENGTH, BATCH = 2048, 256, 8
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
}
MIXTURES = ("qwen2_moe", "qwen3_moe")


def new_model(architecture: str, untied: bool = False) -> PreTrainedModel:
    """A model with random weights; an untied one has a head of its own beside the embedding (Qwen2 only)."""
    if architecture == "opt":
        return OPTForCausalLM(OPTConfig(**SHAPE, ffn_dim=512, word_embed_proj_dim=128, dropout=0.0))
    if architecture in MIXTURES:
        experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 128, "norm_topk_prob": True}
        shape = {**SHAPE, "num_key_value_heads": 2, "router_aux_loss_coef": 0.01, **experts}
        if architecture == "qwen3_moe":
            return Qwen3MoeForCausalLM(Qwen3MoeConfig(**{**shape, "head_dim": 32}))
        return Qwen2MoeForCausalLM(Qwen2MoeConfig(**shape, shared_expert_intermediate_size=128))
    shape = {**SHAPE, "tie_word_embeddings": not untied}
    return Qwen2ForCausalLM(Qwen2Config(**shape, num_key_value_heads=2, intermediate_size=384))


def new_tokenizer(documents: list[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of so many tokens, trained on the documents."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    alphabet, special = ByteLevel.alphabet(), ["<s>", "</s>", "<pad>"]
    trainer = BpeTrainer(vocab_size=vocabulary, special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("architecture", choices=["opt", "qwen2", *MIXTURES])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--untied", action="store_true", help="give the Qwen2 a head of its own")
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    documents = demo_articles("calibration")
    tokenizer = new_tokenizer(documents)
    windows = evaluation_windows(tokenise(tokenizer, documents), LENGTH)
    model = new_model(options.architecture, options.untied).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=options.rate, betas=(0.9, 0.95), weight_decay=0.1)
    schedule = get_cosine_schedule_with_warmup(optimiser, options.steps // 20, options.steps)
    # The loss that sends experts equally many tokens, without which some would learn nothing.
    balanced = {"output_router_logits": True} if options.architecture in MIXTURES else {}
    began, order = time.perf_counter(), torch.randperm(len(windows))
    for step in range(options.steps):
        ids = windows[order[torch.arange(step * BATCH, (step + 1) * BATCH) % len(order)]]
        loss = model(input_ids=ids, labels=ids, use_cache=False, **balanced).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        optimiser.zero_grad()
        if step % 200 == 0:
            print(f"step {step}: loss {float(loss):.3f}, {time.perf_counter() - began:.0f} s", flush=True)
    model.eval().save_pretrained(options.folder)
    tokenizer.save_pretrained(options.folder)
    apart = evaluation_windows(tokenise(tokenizer, read_documents("demo:evaluation")), LENGTH, 32)
    print(f"perplexity on held-out news {perplexity(model, apart).perplexity:.2f}")


if __name__ == "__main__":
    main()
