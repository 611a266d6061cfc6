"""A model as it is handed from loading to pruning, measuring and saving."""

from dataclasses import dataclass

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.models.decoder import Decoder
from optprune.models.store import BlockStore
from optprune.system.display import Displayed, SummaryTable
from optprune.system.wording import one_line


@dataclass(frozen=True, eq=False, repr=False)
class LoadedModel(Displayed):
    """A model ready to be pruned or evaluated, with its tokenizer where the source has one.

    The transformers model itself is its `model`, and all that `load` gives.
    """

    model: PreTrainedModel
    tokenizer: Tokenizer | None
    source: str
    store: BlockStore | None = None
    """the store that the blocks come from, where `open_model` gave the model"""

    def decoder(self) -> Decoder:
        """Access to the model's blocks, wherever they are."""
        return Decoder(self.model, self.store)

    def __repr__(self) -> str:
        return f"LoadedModel({', '.join([repr(self.source), *(value for _, value in self._of_the_model())])})"

    def summary_table(self) -> SummaryTable:
        """What was loaded, for a terminal or a notebook."""
        name = type(self.tokenizer).__name__
        template = "a" if getattr(self.tokenizer, "chat_template", None) else "no"
        told = "none" if self.tokenizer is None else f"{name}, {len(self.tokenizer):,} tokens, {template} chat template"
        decoder = self.decoder()
        widths = sorted({shape.mlp_width for shape in decoder.shapes()})
        shape = f"{len(decoder.blocks)}, of MLP width {' to '.join(map(str, dict.fromkeys((widths[0], widths[-1]))))}"
        return SummaryTable(
            f"model {one_line(self.source)}", [*self._of_the_model(), ("blocks", shape), ("tokenizer", told)]
        )

    def _of_the_model(self) -> list[tuple[str, str]]:
        model = self.model
        place = (
            str(model.device) if self.store is None else f"{self.store.device}, blocks in files until they are needed"
        )
        return [
            ("architecture", model.config.model_type),
            ("parameters", f"{model.num_parameters():,} parameters"),
            ("computes in", f"{str(model.dtype).removeprefix('torch.')} on {place}"),
        ]
