"""Model card of a pruned folder, README.md: metadata for a hub, and a summary of the pruning for readers."""

import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from huggingface_hub import ModelCardData
from transformers import PreTrainedModel

from optprune.export.source_files import Origin
from optprune.models import BlockShape, Decoder, is_stock
from optprune.models.architecture import PART_FIELD
from optprune.models.registry import architecture_named
from optprune.report import Report
from optprune.report.block_values import FURTHER
from optprune.system.display import printable
from optprune.system.wording import counted, one_line
from optprune.texts import NAMED_SETS

PUBLIC_TEXT = re.compile(rf"hf:|demo:|(?:{'|'.join(NAMED_SETS)})(?=[ ,:])")
"""the beginnings of calibration texts that hold no path of the user's machine"""
UNKNOWN = "unknown: see the base model"
MARKUP = re.compile(r"[\\`*\[\]|]")
"""characters that Markdown interprets anywhere in a line"""

NOT_MEASURED = "Pruning does not measure the perplexity: `optprune evaluate` does, on any text."
MADE_AGAIN = (
    "`recipe.yaml` reproduces the model, `report.json` describes every layer, and `optprune audit` compares the "
    "weights with both."
)
HEALED = {
    NOT_MEASURED: "These figures are from before healing. The section Healing has the perplexity on held-out "
    "windows, and `optprune evaluate` measures it on any text.",
    MADE_AGAIN: "`recipe.yaml` reproduces the model before healing; healing is a run of its own. `report.json` "
    "describes every layer and the healing, and `optprune audit` compares shapes and zeros with it.",
}
"""sentences of a card, each with the one that is true of a healed folder"""


@dataclass(frozen=True)
class ModelCard:
    """Model card of a pruned model."""

    origin: Origin
    report: Report
    model: PreTrainedModel
    """the pruned model; the card says its shapes and its class"""

    def text(self) -> str:
        """Return the card: metadata for a hub, then Markdown, without paths of this machine."""
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
                f"{report.sparsity_reached:.2%} of the linear weights of its decoder blocks are {report.lost}.",
                "",
                "| | before | after |",
                "|---|---|---|",
                *(f"| {name} | {before} | {after} |" for name, before, after in self._shapes()),
                "",
                *self._figures(),
                "",
                NOT_MEASURED,
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
        further = FURTHER if any(shape.recurrent for shape in before) else {}
        further |= PAIRS if any(shape.pairs for shape in after) else {}
        lines = [
            ("decoder blocks", *(str(sum(1 for shape in shapes if shape.parts)) for shapes in (before, after))),
            ("linear weights in them", *(f"{count:,}" for count in weights)),
            *((name, _range(before, field), _range(after, field)) for field, name in (FIELDS | further).items()),
        ]
        return [line for line in lines if self.report.blocks]

    def _figures(self) -> list[str]:
        report = self.report
        text = f" ({plain(report.calibration)})" if is_public(report.calibration) else ""
        lines = [f"- calibration: {report.tokens:,} tokens{text}, seed {report.seed}"]
        if report.vocabulary is not None:
            lines.append(f"- {report.vocabulary.in_words()}")
        if report.goal is not None:
            lines.append(f"- {report.goal.in_words()}")
        errors = [layer.relative_error for layer in report.layers]
        held_out = [layer.held_out_error for layer in report.layers if layer.held_out_error is not None]
        if errors:
            when = " before recovery" if report.recovered else ""
            lines += [
                f"- mean relative error of the outputs of {counted(len(errors), 'layer')}{when}: {_mean(errors):.3g}"
            ]
        if held_out:
            lines += [f"- the same on held-out tokens, {counted(len(held_out), 'layer')}: {_mean(held_out):.3g}"]
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
            else "Its blocks differ from those of the stock class, so transformers needs `trust_remote_code=True` to "
            "run the modelling file in the folder (about a hundred lines). `optprune.load_model` does not run it. The "
            "tokenizer needs no code, although `AutoTokenizer` of transformers 5 would ask for it."
        )
        architecture = architecture_named(self.model.config.model_type, self.model.config)
        older = architecture.read_by_older(stock)
        versions = "transformers 5 and 4.57 give the same logits and tokens." if older else "It needs transformers 5."
        cls, part_of = "AutoModelForCausalLM", getattr(self.model.config, PART_FIELD, "")
        if part_of:
            cls = "AutoModelForImageTextToText"
            versions = "Only its language part is pruned: the vision part is that of the original, byte for byte."
        tokenizer = "AutoTokenizer" if stock else "PreTrainedTokenizerFast"
        return [
            f"{why} {versions}",
            "",
            "```python",
            f"from transformers import {cls}, {tokenizer}",
            "",
            'folder = "."  # the one that this file is in',
            f"tokenizer = {tokenizer}.from_pretrained(folder)",
            f"model = {cls}.from_pretrained(folder{trust})",
            "```",
            "",
            MADE_AGAIN,
            *self._own_code(),
        ]

    def _own_code(self) -> list[str]:
        """Return what reproducing the model needs beside the recipe."""
        names = ", ".join(f"`{plain(name)}`" for name in self.report.own_code)
        if not names:
            return []
        return [f"The recipe uses {names}, which no file holds: pass your own code to `load_recipe` in Python."]

    def _licence(self) -> str:
        origin = self.origin
        named = " ".join(filter(None, (origin.licence, origin.licence_name))) or UNKNOWN
        files = ", ".join(f"`{name}`" for name in origin.licence_files)
        return f"{plain(named)} ({files})" if files else plain(named)


FIELDS = {"mlp_width": "MLP width", "kv_heads": "KV heads", "value_dim": "value dimensions of a head"}
"""names of the fields of a block's shape"""
PAIRS = {"pairs": "rotary pairs of a head of queries and keys"}
"""one more, of models in which a block lacks some"""


def _range(shapes: list[BlockShape], field: str) -> str:
    """Return the minimum and the maximum of a field over all blocks that are not removed, as text."""
    counts = sorted(
        {getattr(shape, field) for shape in shapes if shape.parts and (shape.kv_heads or field not in PAIRS)}
    )
    if field in PAIRS and counts:
        every = [str(count) for count in counts if count] + (["all"] if 0 in counts else [])
        return " to ".join(dict.fromkeys((every[0], every[-1])))
    return " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1]))) if counts else "0"


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def plain(text: str) -> str:
    """Return a text escaped for Markdown: no HTML, no links, no invisible characters."""
    return MARKUP.sub(r"\\\g<0>", html.escape(printable(one_line(text)), quote=False))


def is_public(calibration: str) -> bool:
    """Return whether a report's description of the calibration holds no path of the user's machine."""
    # Several texts are parts separated by "; ", and the last part is the number of windows.
    texts = calibration.split("; ")[:-1] or [calibration]
    return all(PUBLIC_TEXT.match(text) for text in texts)


def healed_card(card: str, healing: Mapping[str, Any], teacher: str) -> str:
    """Return the card of a pruned folder as that of the healed one, with a section about healing."""
    for of_pruned, of_healed in HEALED.items():
        card = card.replace(of_pruned, of_healed)
    return f"{card.rstrip()}\n\n{healing_section(healing, teacher)}"


def healing_section(healing: Mapping[str, Any], teacher: str) -> str:
    """Return the section of a card about healing, from a report of `heal` as plain data."""
    before, after, written = healing["before"], healing["after"], healing.get("generated_windows", 0)
    partly = f", of which that model generated {written:,} windows;" if written else ""
    return (
        "## Healing\n\n"
        f"Trained after pruning by optprune to predict what {plain(teacher)} does, for {healing['steps']} steps on "
        f"{healing['tokens']:,} tokens{partly or ';'} all zeros and widths are as pruning left them. On "
        f"{healing['held_out_tokens']:,} held-out tokens:\n\n"
        "| | before healing | after | dense |\n|---|---|---|---|\n"
        f"| divergence from the dense model, nats | {before['divergence']:.4f} | {after['divergence']:.4f} | 0 |\n"
        f"| perplexity | {before['perplexity']:.2f} | {after['perplexity']:.2f} | {healing['dense_perplexity']:.2f} |\n"
    )
