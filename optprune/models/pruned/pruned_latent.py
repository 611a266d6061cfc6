"""Latent attention with any number of heads and value dimensions; needs torch and transformers only."""

from .pruned_decoder import resized


class PrunedLatentAttention:
    """Latent attention whose numbers of heads and value dimensions are those of its weights."""

    @property
    def head_dim(self):
        """The dimension of a query head."""
        return self.qk_head_dim

    @property
    def v_head_dim(self):
        """The value dimensions of a head."""
        heads = (self.kv_b_proj.out_features - self.o_proj.in_features) // self.qk_nope_head_dim
        return self.o_proj.in_features // heads

    def shrink(self, queries, keys, values, mixed):
        """Replace the layers by layers of so many heads and value dimensions; vectors of low rank stay as they are."""
        heads = keys // self.head_dim
        name = "q_proj" if self.q_b_proj is None else "q_b_proj"
        setattr(self, name, resized(getattr(self, name), outputs=queries))
        self.kv_b_proj = resized(self.kv_b_proj, outputs=heads * self.qk_nope_head_dim + values)
        self.o_proj = resized(self.o_proj, inputs=mixed)
