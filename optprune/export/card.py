"""The model card of a pruned folder: README.md, with what a hub reads and what a reader wants to know first."""

import html
import re
from dataclasses import dataclass

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from optprune.export.origin import Origin
from optprune.models import BlockShape, Decoder, is_stock
from optprune.report import Report
from optprune.system.display import printable
from optprune.system.wording import counted, one_line

PUBLIC_TEXT = ("hf:", "demo:")
"""how a calibration text begins that has no path of the user's machine in it"""
ABSENT = "not known: it is that of the base model"
MARKUP = re.compile(r"[\\`*\[\]|]")
"""what Markdown takes for more than text, wherever it stands in a line"""


@dataclass(frozen=True)
class ModelCard:
    """What a card is made of."""

    origin: Origin
    report: Report
    model: PreTrainedModel
    """the pruned model, of which shapes and class count"""

    def text(self) -> str:
        """The card, in Markdown below the metadata of a hub; without a path of this machine or its folder's name."""
        return f"---\n{self._metadata().to_yaml()}\n---\n\n{self._body()}"

    def _metadata(self) -> ModelCardData:
        origin, recipe = self.origin, str(self.report.recipe.get("name", "custom"))
        return ModelCardData(
            base_model=origin.name if origin.is_repository_name else None,
            language=list(origin.languages) or None,
            license=origin.licence,
            license_name=origin.licence_name,
            license_link=origin.licence_link,
            library_name="transformers",
            pipeline_tag="text-generation",
            tags=["optprune", "pruning", one_line(recipe)],
        )

    def _body(self) -> str:
        report, origin = self.report, self.origin
        recipe = plain(str(report.recipe.get("name", "custom")))
        version = report.versions.get("optprune", "")
        return "\n".join(
            [
                f"# {plain(origin.name.rpartition('/')[2])}, pruned by {recipe}",
                "",
                f"{plain(origin.name)} pruned by optprune {version} with the recipe {recipe}: "
                f"{report.sparsity_reached:.2%} of the linear weights of its decoder blocks are removed.",
                "",
                "| | before | after |",
                "|---|---|---|",
                *(f"| {what} | {before} | {after} |" for what, before, after in self._shapes()),
                "",
                *self._figures(),
                "",
                "No perplexity is measured while a model is pruned: `optprune evaluate` does that, on a text of yours.",
                "",
                "## Use",
                "",
                *self._use(),
                "",
                "## Licence",
                "",
                f"The licence of {plain(origin.name)} holds here too: {self._licence()}.",
                "",
            ]
        )

    def _shapes(self) -> list[tuple[str, str, str]]:
        before = [change.before for change in self.report.blocks]
        after = [change.after for change in self.report.blocks]
        decoder = Decoder(self.model)
        weights = [sum(map(decoder.weights_of, shapes)) for shapes in (before, after)]
        lines = [
            ("decoder blocks", *(str(sum(1 for shape in shapes if shape.parts)) for shapes in (before, after))),
            ("linear weights in them", *(f"{count:,}" for count in weights)),
            *((what, _range(before, field), _range(after, field)) for field, what in FIELDS.items()),
        ]
        return [line for line in lines if self.report.blocks]

    def _figures(self) -> list[str]:
        report = self.report
        text = f" ({plain(report.calibration)})" if is_public(report.calibration) else ""
        lines = [f"- calibration: {report.tokens:,} tokens{text}, seed {report.seed}"]
        errors = [layer.relative_error for layer in report.layers]
        apart = [layer.held_out_error for layer in report.layers if layer.held_out_error is not None]
        if errors:
            when = " before recovery" if report.recovered else ""
            lines += [
                f"- mean relative error of the outputs of {counted(len(errors), 'layer')}{when}: {_mean(errors):.3g}"
            ]
        if apart:
            lines += [f"- the same on held-out tokens, {counted(len(apart), 'layer')}: {_mean(apart):.3g}"]
        units = report.recipe.get("units")
        if isinstance(units, dict) and "weights" in units:
            lines += [f"- pattern of the zeros: {plain(str(units['weights']))}"]
        return lines

    def _use(self) -> list[str]:
        stock = is_stock(self.model.config)
        trust = "" if stock else ", trust_remote_code=True"
        why = (
            "It has the stock classes of transformers."
            if stock
            else "Its blocks are not those of the stock class, so transformers runs the modelling file in the folder "
            "(about a hundred lines), which it does with `trust_remote_code=True` only; `optprune.load_model` needs no "
            "such trust, nor does the tokenizer, though `AutoTokenizer` of transformers 5 would ask."
        )
        tokenizer = "AutoTokenizer" if stock else "PreTrainedTokenizerFast"
        return [
            f"{why} transformers 5 and 4.57 give the same logits and tokens.",
            "",
            "```python",
            f"from transformers import AutoModelForCausalLM, {tokenizer}",
            "",
            'folder = "."  # the one that this file is in',
            f"tokenizer = {tokenizer}.from_pretrained(folder)",
            f"model = AutoModelForCausalLM.from_pretrained(folder{trust})",
            "```",
            "",
            "`recipe.yaml` makes it again, `report.json` tells of every layer, and `optprune audit` holds the weights "
            "against both.",
        ]

    def _licence(self) -> str:
        origin = self.origin
        named = " ".join(filter(None, (origin.licence, origin.licence_name))) or ABSENT
        files = ", ".join(f"`{name}`" for name in origin.licence_files)
        return f"{plain(named)} ({files})" if files else plain(named)


FIELDS = {"mlp_width": "MLP width", "kv_heads": "KV heads", "value_dim": "value dimensions of a head"}
"""what the fields of a block's shape are called"""


def _range(shapes: list[BlockShape], field: str) -> str:
    """The least and the most of a number in any block that is there, as words."""
    counts = sorted({getattr(shape, field) for shape in shapes if shape.parts})
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plain(text: str) -> str:
    """Return a text as Markdown that shows it letter by letter: nothing is HTML or a link, and no sign is invisible."""
    return MARKUP.sub(r"\\\g<0>", html.escape(printable(one_line(text)), quote=False))


def is_public(calibration: str) -> bool:
    """Whether there is no path of the user's machine in what a report says of the calibration."""
    # Of several texts each is a part, and the last part says how many windows there are.
    texts = calibration.split("; ")[:-1] or [calibration]
    return all(text.startswith(PUBLIC_TEXT) for text in texts)
