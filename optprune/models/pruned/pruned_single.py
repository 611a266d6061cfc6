"""Decoder blocks of one sub-block each, pruned by optprune; needs torch and transformers only."""

from .pruned_decoder import PrunedBlock, resized
from .pruned_mixture import PrunedMixtureBlock


class PrunedSingleBlock(PrunedMixtureBlock):
    """A decoder block of one norm and one sub-block: attention, a recurrent mixer, an MLP without gate, or experts."""

    single = "mixer"
    """the sub-block"""

    def _single(self):
        return self._modules[self.single]

    mixer = mlp = self_attn = property(_single)

    def forward(self, hidden_states, **kwargs):
        if self.mixer is None:
            return hidden_states
        return super(PrunedBlock, self).forward(hidden_states, **kwargs)  # that of the stock class

    def shrink_mixer(self, shape, group):
        if shape["kv_heads"]:
            super().shrink_mixer(shape, group)

    def shrink_mlp(self, width):
        if not hasattr(self.mlp, "experts"):
            self.mlp.up_proj = resized(self.mlp.up_proj, outputs=width)
            self.mlp.down_proj = resized(self.mlp.down_proj, inputs=width)

    def expert_sizes(self, width, hidden):
        return {"up_proj": (width, hidden), "down_proj": (hidden, width)}

    def remove(self, *names):
        """Remove nothing: a block that has lost its sub-block is no block of the model."""
