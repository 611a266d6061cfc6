"""Attention with fewer value dimensions than query and key dimensions in each head.

The stock classes read the number of value heads off head_dim, so they cannot hold a narrower V. These subclasses
keep everything else; the key/value cache becomes smaller because it stores the values as they are.
"""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama import modeling_llama
from transformers.models.opt import modeling_opt
from transformers.models.qwen2 import modeling_qwen2


def split_heads(states: Tensor, dim: int) -> Tensor:
    """[batch, tokens, heads * dim] -> [batch, heads, tokens, dim]."""
    return states.view(*states.shape[:-1], -1, dim).transpose(1, 2)


def kernel(config: PretrainedConfig, eager: Callable[..., Any]) -> Callable[..., Any]:
    """The attention function that the config asks for; all of them take values of another width than keys."""
    return ALL_ATTENTION_FUNCTIONS.get_interface(config._attn_implementation or "eager", eager)


class NarrowLlamaAttention(modeling_llama.LlamaAttention):
    """Llama attention whose V has `value_dim` dimensions a head."""

    value_dim: int

    def forward(  # type: ignore[override]  # the stock signature differs between versions of transformers
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        cache: Any = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = split_heads(self.q_proj(hidden_states), self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.value_dim)
        query, key = modeling_llama.apply_rotary_pos_emb(query, key, *position_embeddings)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = kernel(self.config, modeling_llama.eager_attention_forward)
        dropout = self.attention_dropout if self.training else 0.0
        mixed, weights = attend(
            self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **self.window(), **kwargs
        )
        return self.o_proj(mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights

    def window(self) -> dict[str, int | None]:
        """What to tell the attention kernel of a sliding window."""
        return {}


class NarrowQwen2Attention(NarrowLlamaAttention, modeling_qwen2.Qwen2Attention):
    """Qwen2 attention whose V has `value_dim` dimensions a head."""

    def window(self) -> dict[str, int | None]:
        return {"sliding_window": self.sliding_window}


class NarrowOPTAttention(modeling_opt.OPTAttention):
    """OPT attention whose V has `value_dim` dimensions a head."""

    value_dim: int

    def forward(  # type: ignore[override]  # the stock signature differs between versions of transformers
        self,
        hidden_states: Tensor,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        query = split_heads(self.q_proj(hidden_states) * self.scaling, self.head_dim)
        key = split_heads(self.k_proj(hidden_states), self.head_dim)
        value = split_heads(self.v_proj(hidden_states), self.value_dim)
        cache = past_key_values if cache is None else cache
        if cache is not None:
            key, value = cache.update(key, value, self.layer_idx)
        attend = kernel(self.config, modeling_opt.eager_attention_forward)
        dropout = self.dropout if self.training else 0.0
        mixed, weights = attend(self, query, key, value, attention_mask, dropout=dropout, scaling=1.0, **kwargs)
        return self.out_proj(mixed.reshape(*hidden_states.shape[:-1], -1).contiguous()), weights


def narrow_to(cls: type[nn.Module], attention: nn.Module, value_dim: int) -> None:
    """Turn a stock attention module into its narrow subclass, in place."""
    attention.__class__ = cls
    attention.value_dim = value_dim  # type: ignore[assignment]  # nn.Module types attributes as modules
