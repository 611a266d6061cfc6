"""What a plain installation lacks is said with its extra, and the version stands in one place."""

import re
import sys
import tomllib
from pathlib import Path

import pytest

import optprune
from optprune.errors import InputError
from optprune.models import load_tokenizer
from optprune.texts import read_documents

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]


@pytest.mark.parametrize(
    ("package", "extra", "sentence"),
    [
        ("pyarrow", "parquet", r"the text .*a\.parquet, a Parquet file, needs the package pyarrow, which is not"),
        ("datasets", "datasets", r"the data set hf:owner/name:train needs the package datasets, which is not"),
        ("sentencepiece", "sentencepiece", r"the tokenizer of .*, a sentencepiece model, needs the package sentencep"),
        ("google.protobuf", "sentencepiece", r"the tokenizer of .*, a sentencepiece model, needs the package google"),
    ],
)
def test_a_missing_package_is_named_with_its_extra(
    package: str, extra: str, sentence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "tokenizer.model").write_bytes(b"\n\x0e\n\x05<unk>")
    calls = {
        "parquet": lambda: read_documents(str(tmp_path / "a.parquet")),
        "datasets": lambda: read_documents("hf:owner/name:train"),
        "sentencepiece": lambda: load_tokenizer(tmp_path),
    }
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(InputError, match=sentence) as caught:
        calls[extra]()
    assert str(caught.value).endswith(f"installed: run pip install -e '.[{extra}]' in optprune's checkout")


def test_extras_hold_what_a_plain_run_does_not_need() -> None:
    plain = {re.split(r"[<>=\[]", name)[0] for name in PROJECT["dependencies"]}
    extra = {"datasets", "pyarrow", "sentencepiece", "protobuf", "matplotlib", "peft", "ray", "onnx", "xllamacpp"}
    assert not plain & extra
    [dev] = [re.search(r"\[(.*)\]", name)[1] for name in EXTRAS["dev"] if name.startswith("optprune[")]  # type: ignore[index]
    assert {"datasets", "parquet", "sentencepiece", "heal", "llama", "onnx", "plot", "ray", "testing"} <= {
        *dev.split(",")
    }


def test_what_modelling_files_depend_on_has_a_cap() -> None:
    [transformers] = [name for name in PROJECT["dependencies"] if name.startswith("transformers")]
    assert transformers.endswith(",<6")


def test_there_is_one_version() -> None:
    assert "version" not in PROJECT and PROJECT["dynamic"] == ["version"]
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    coming, released = re.findall(r"^## (\S+), (\S+)$", changelog, re.MULTILINE)[:2]
    assert coming[1] == "unreleased" and optprune.__version__ == f"{coming[0]}.dev0"
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"\nversion: {released[0]}\ndate-released: {released[1]}\n" in citation


def test_classifiers_name_the_python_that_the_tests_of_ci_run_on() -> None:
    listed = [name.rpartition(" ")[2] for name in PROJECT["classifiers"] if re.search(r"Python :: 3\.\d+$", name)]
    assert listed == [PROJECT["requires-python"].removeprefix(">=")]
