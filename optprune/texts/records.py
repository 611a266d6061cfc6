"""Records: texts or conversations with images, as calibration of the language part of a vision-language model."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from optprune.errors import InputError, check_at_least, check_count, is_out_of_memory
from optprune.system.files import read_json_lines
from optprune.system.wording import counted, one_line, shown
from optprune.texts.calibration import DrawnWindows
from optprune.texts.documents import DEFAULT_COLUMN, MESSAGES

if TYPE_CHECKING:  # torch and transformers take seconds to import
    import torch
    from transformers import ProcessorMixin

    from optprune.models.vision import VisionFolder

TEXT, FILES = DEFAULT_COLUMN, "images"
KEYS = (TEXT, MESSAGES, FILES)
"""the keys of a record"""
PARTS = (TEXT, "image")
"""the types of the parts of a message"""
EXAMPLE = '{"text": "<image> A cat.", "images": ["cat.png"]}'


@dataclass(frozen=True)
class Record:
    """Text, or the messages of a conversation, with images that stand in it."""

    text: str | None
    """the text, with the processor's token for each image; None where there are messages"""
    messages: tuple[Mapping[str, Any], ...]
    """the messages, for the processor's chat template; empty where there is a text"""
    images: tuple[Path, ...]
    """the files of the images, in their order"""
    where: str = "a record"
    """its place in the file, for errors"""

    def inputs(self, processor: "ProcessorMixin") -> Mapping[str, Any]:
        """Return the outputs of a processor; InputError, which names the record, where it cannot read it."""
        from PIL import Image

        call: Any = processor
        try:
            images = [Image.open(file).convert("RGB") for file in self.images] or None
            text = self.text or call.apply_chat_template([dict(each) for each in self.messages], tokenize=False)
            # A template writes the special tokens.
            special = {} if self.text else {"add_special_tokens": False}
            found = call(text=[text], images=images, return_tensors="pt", **special)
        except Exception as error:  # of a template, of the processor, or of a damaged image
            if is_out_of_memory(error):
                raise
            reason = one_line(error) or type(error).__name__
            raise InputError(f"the processor cannot read {self.where} ({reason}): repair or remove it there") from error
        return dict(found)


def read_records(path: str | Path) -> list[Record]:
    """Return the records of a .jsonl file, whose images are named by paths from its folder.

    A line is an object with `text` or `messages`, and `images`. The text holds the processor's token for each image;
    the content of a message is a text, or a list of {"type": "text", "text": ...} and {"type": "image"}. InputError
    for a line of another kind, a file that is missing, and no record.
    """
    path = Path(path)
    try:
        found = [_record(value, where, path.parent) for where, value in read_json_lines(path)]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"the records {path} cannot be read: {one_line(error)}") from error
    if not found:
        raise InputError(f"the file {path} has no records: write one a line, such as {EXAMPLE}")
    return found


def _record(value: Any, where: str, folder: Path) -> Record:
    if not isinstance(value, dict):
        raise InputError(f"{where} is not a JSON object: write a record such as {EXAMPLE}")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise InputError(f"{where} has the key {shown(unknown[0])}: a record has text or messages, and images")
    text, messages, names = value.get(TEXT), value.get(MESSAGES), value.get(FILES, [])
    if (text is None) == (messages is None):
        what = "neither text nor messages" if text is None else "both text and messages"
        raise InputError(f"{where} has {what}: a record has one of them, such as {EXAMPLE}")
    if text is not None and not (isinstance(text, str) and text.strip()):
        raise InputError(f"the text in {where} is {shown(text)}, which holds no words: write a text or remove the line")
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise InputError(f"the images in {where} are {shown(names)}: write a list of paths, such as {EXAMPLE}")
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"the image {shown(name)} in {where} is not there: paths begin in the folder {folder}")
    return Record(text, _messages(messages, where), tuple(folder / name for name in names), where)


def _messages(value: Any, where: str) -> tuple[Mapping[str, Any], ...]:
    if value is None:
        return ()
    if not isinstance(value, list) or not value:
        raise InputError(f"the messages in {where} are {shown(value)}: write a list of messages with role and content")
    for number, message in enumerate(value, start=1):
        whole = isinstance(message, Mapping) and isinstance(message.get("role"), str)
        content = message.get("content") if whole else None
        if not isinstance(content, str) and not (isinstance(content, list) and all(map(_is_part, content))):
            raise InputError(
                f"message {number} in {where} is {shown(message)}: write a role, and a content that is a text or a "
                'list of {"type": "text", "text": ...} and {"type": "image"}'
            )
    return tuple(value)


def _is_part(part: Any) -> bool:
    if not isinstance(part, Mapping) or part.get("type") not in PARTS:
        return False
    return part["type"] != TEXT or isinstance(part.get(TEXT), str)


@dataclass(frozen=True, eq=False)
class DrawnRecords:
    """Calibration records for a vision-language model, and the number of tokens of each."""

    whole: "VisionFolder"
    records: tuple[Record, ...]
    lengths: tuple[int, ...]
    """the tokens of each, those of images included"""
    description: str
    """the source in words, for the report"""

    def read(self, *, dtype: "torch.dtype", device: "torch.device") -> DrawnWindows:
        """Return the token ids of each record, and the features of images that some of them are numbers of.

        The vision part computes in this dtype on this device, one record at a time.
        """
        from optprune.models import image_features, load_processor

        processor = load_processor(self.whole)
        inputs = (record.inputs(processor) for record in self.records)
        batches, images = image_features(self.whole, inputs, dtype=dtype, device=device)
        first = batches[0][0]
        text = first.masked_fill(first >= images.vocabulary, 0)
        return DrawnWindows(batches, text, (len(batches),), self.description, images)  # type: ignore[arg-type]


def draw_records(source: str | Path, records: Sequence[Record], samples: int, seed: int) -> DrawnRecords:
    """Return `samples` records in a random order, counted by the processor of a vision-language folder.

    InputError where the model is one of text alone or its images are not read, there are fewer records, or one is
    longer than the positions of the model.
    """
    import torch

    from optprune.models import load_processor, vision_folder

    check_at_least("--samples", samples, 1)
    check_count("--seed", seed)
    whole = vision_folder(str(source))
    if whole is None:
        raise InputError(f"{source} is a model of text alone, which reads no images: give a text")
    processor = load_processor(whole)
    if len(records) < samples:
        have = counted(len(records), "record")
        raise InputError(f"there are {have}, fewer than the {samples} needed: lower --samples to {len(records)}")
    order = torch.randperm(len(records), generator=torch.Generator().manual_seed(seed))[:samples].tolist()
    drawn = tuple(records[number] for number in order)
    lengths = tuple(_lengths(drawn, processor, getattr(whole.config, "max_position_embeddings", None)))
    images = sum(len(record.images) for record in drawn)
    words = f"{counted(samples, 'record')} with {counted(images, 'image')}, {sum(lengths)} tokens, seed {seed}"
    return DrawnRecords(whole, drawn, lengths, words)


def _lengths(records: Sequence[Record], processor: "ProcessorMixin", positions: int | None) -> Iterator[int]:
    for record in records:
        length = int(record.inputs(processor)["input_ids"].shape[1])
        if positions is not None and length > positions:
            raise InputError(
                f"{record.where} has {length} tokens with its images, more than the {positions} positions of the "
                "model: shorten or remove it there"
            )
        yield length
