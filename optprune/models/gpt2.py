"""GPT-2: matrices stored transposed, one layer for queries, keys and values, learned positions, a plain MLP."""

from transformers import GPT2Config
from transformers.models.gpt2 import modeling_gpt2 as stock

from optprune.models.architecture import Architecture, Classes
from optprune.models.opt import heads
from optprune.models.pruned import modeling_pruned_gpt2 as pruned

GPT2 = Architecture(
    model_type="gpt2",
    blocks="transformer.h",
    after_blocks=("transformer.ln_f",),
    stages=(("attn.c_attn",), ("attn.c_proj",), ("mlp.c_fc",), ("mlp.c_proj",)),
    transposed=("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"),
    mlp_producers=("mlp.c_fc",),
    mlp_consumer="mlp.c_proj",
    mlp_width="n_inner",
    attention="attn",
    query="attn.c_attn",
    key="attn.c_attn",
    value="attn.c_attn",
    joined="parts",
    output="attn.c_proj",
    heads=heads,
    head_dim_is_free=False,
    attention_parts=("ln_1", "attn"),
    mlp_parts=("ln_2", "mlp"),
    recoverable=(),
    # Scores that go by the number of the block would be others where a block before it is gone.
    off=("add_cross_attention", "reorder_and_upcast_attn", "scale_attn_by_inverse_layer_idx"),
    stock=Classes(GPT2Config, stock.GPT2LMHeadModel, stock.GPT2Block, stock.GPT2Attention),
    pruned=Classes(
        pruned.PrunedGPT2Config, pruned.PrunedGPT2LMHeadModel, pruned.PrunedGPT2Block, pruned.PrunedGPT2Attention
    ),
)
