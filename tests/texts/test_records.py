"""Records with images: what a line may hold, and how the processor of a folder reads it."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor

from optprune.errors import InputError
from optprune.texts import draw_records, read_documents, read_records
from tests.helpers.image_records import save_with_processor, write_records
from tests.helpers.tiny_models import save_tiny, tiny_llama
from tests.helpers.tiny_vision import save_vision, tiny_vision


def test_a_record_is_what_the_processor_makes_of_it(tmp_path: Path) -> None:
    folder, file = save_with_processor("llava", tmp_path / "model"), write_records(tmp_path / "data")
    records, processor = read_records(file), AutoProcessor.from_pretrained(folder)
    assert [record.images[0].name for record in records] == [f"{number}.png" for number in range(8)]
    plain, talk = records[0].inputs(processor), records[-1].inputs(processor)
    assert processor.decode(plain["input_ids"][0]).count("<image>") == 16 == int((plain["input_ids"] == 512).sum())
    assert processor.decode(talk["input_ids"][0]).startswith("user: ") and int((talk["input_ids"] == 512).sum()) == 16
    assert plain["pixel_values"].shape == (1, 3, 16, 16)


def test_records_are_drawn_by_the_seed_and_counted_with_their_images(tmp_path: Path) -> None:
    folder, file = save_with_processor("llava", tmp_path / "model"), write_records(tmp_path / "data")
    records, processor = read_records(file), AutoProcessor.from_pretrained(folder)
    drawn, again, other = (draw_records(folder, records, 5, seed) for seed in (0, 0, 1))
    assert drawn.records == again.records != other.records and len({record.where for record in drawn.records}) == 5
    lengths = [record.inputs(processor)["input_ids"].shape[1] for record in drawn.records]
    assert list(drawn.lengths) == lengths and len(set(lengths)) > 1
    assert drawn.description == f"5 records with 5 images, {sum(lengths)} tokens, seed 0"


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"image": "1.png"}, r"^line 2 of .* has the key 'image': a record has text or messages, and images$"),
        ({"text": None}, "line 2 of .* has neither text nor messages"),
        ({"messages": []}, "line 2 of .* has both text and messages"),
        ({"text": " "}, "the text in line 2 of .* holds no words"),
        ({"text": 3}, "the text in line 2 of .* is 3"),
        ({"text": None, "messages": []}, r"the messages in line 2 of .* are \[\]: write a list of messages"),
        ({"text": None, "messages": [{"content": "a"}]}, "message 1 in line 2 of .*: write a role"),
        (
            {"text": None, "messages": [{"role": "user", "content": [{"type": "sound"}]}]},
            "message 1 in line 2 of .* a content that is a text or a list of",
        ),
        (
            {"text": None, "messages": [{"role": "user", "content": [{"type": "image"}, {"type": "text"}]}]},
            "message 1 in line 2 of .* a content that is a text or a list of",
        ),
        (
            {"text": None, "messages": [{"role": "user", "content": [{"type": "text", "text": 3}]}]},
            "message 1 in line 2 of .* a content that is a text or a list of",
        ),
        ({"images": "1.png"}, "the images in line 2 of .* are '1.png': write a list of paths"),
        ({"images": ["absent.png"]}, r"^the image 'absent.png' in line 2 of .* is not there: paths begin in the fold"),
        ({"images": [""]}, "write a list of paths"),
    ],
)
def test_a_line_of_another_kind_is_refused(changed: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=sentence):
        read_records(write_records(tmp_path / "data", **changed))


def test_a_text_with_other_line_separators_is_one_record(tmp_path: Path) -> None:
    text, file = "a\u2028b\x85c\x1cd", tmp_path / "records.jsonl"
    file.write_text('{"text": "a\u2028b\x85c\\u001cd"}\n', encoding="utf-8")
    assert [record.text for record in read_records(file)] == [text]


def test_files_that_are_no_records_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    with pytest.raises(InputError, match=r"the records .* cannot be read: .*No such file"):
        read_records(file)
    for text, sentence in (("\n", "has no records: write one a line"), ("[]", "line 1 of .* is not a JSON object")):
        file.write_text(text, encoding="utf-8")
        with pytest.raises(InputError, match=sentence):
            read_records(file)
    with pytest.raises(InputError, match="is records with images, which --calibration of prune and plan takes, alone"):
        read_documents(f"images:{file}")


def test_what_the_processor_cannot_read_is_refused_by_its_line(tmp_path: Path) -> None:
    folder = save_with_processor("llava", tmp_path / "model")
    for changed in ({"text": "No image."}, {"images": []}):
        records = read_records(write_records(tmp_path / "data", **changed))
        with pytest.raises(InputError, match=r"^the processor cannot read line 2 of .*: repair or remove it there$"):
            draw_records(folder, records, 8, 0)
    file = write_records(tmp_path / "data")
    (tmp_path / "data" / "1.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"cannot read line 2 of .*cannot identify image file"):
        draw_records(folder, read_records(file), 8, 0)


def test_records_that_do_not_fit_the_model_are_refused(tmp_path: Path) -> None:
    records = read_records(write_records(tmp_path / "data"))
    folder = save_with_processor("llava", tmp_path / "model", max_position_embeddings=64)
    with pytest.raises(InputError, match="tokens with its images, more than the 64 positions of the model: shorten"):
        draw_records(folder, records, 8, 0)
    with pytest.raises(InputError, match="there are 8 records, fewer than the 9 needed: lower --samples to 8"):
        draw_records(folder, records, 9, 0)
    with pytest.raises(InputError, match="--samples"):
        draw_records(folder, records, 0, 0)
    text = save_tiny(tiny_llama(), tmp_path / "text")
    with pytest.raises(InputError, match="is a model of text alone, which reads no images: give a text"):
        draw_records(text, records, 4, 0)


def test_a_folder_without_a_processor_is_refused(tmp_path: Path) -> None:
    records = read_records(write_records(tmp_path / "data"))
    folder = save_vision(tiny_vision("llava"), tmp_path / "model")
    (folder / "preprocessor_config.json").unlink()
    with pytest.raises(InputError, match="processor"):
        draw_records(folder, records, 4, 0)
