"""Uploads to the hub: which files go, what is refused, and one sentence for each failure."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

from optprune.cli import main
from optprune.errors import InputError
from optprune.export import push_to_hub
from tests.helpers.tiny_models import save_tiny, tiny_llama

OF_THE_USER = ("notes.txt", ".env", "my_eval.py")


class Hub:
    """The calls of a hub that takes everything."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, files: list[str] | None = None) -> None:
        self.calls = list[tuple[str, Any]]()
        monkeypatch.setattr(HfApi, "repo_exists", lambda api, name: files is not None)
        monkeypatch.setattr(HfApi, "list_repo_files", lambda api, name: files)
        monkeypatch.setattr(HfApi, "create_repo", lambda api, name, **more: self.calls.append((name, more)))
        monkeypatch.setattr(HfApi, "upload_folder", lambda api, **more: self.calls.append(("upload", more)))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    made = save_tiny(tiny_llama(), tmp_path / "model[1]")
    for name in ("report.json", "report.html", "README.md", "recipe.yaml", "LICENSE", *OF_THE_USER):
        (made / name).write_text("text")
    (made / "inner").mkdir()
    (made / "linked.safetensors").symlink_to(made / "model.safetensors")
    return made


def sent(hub: Hub) -> dict[str, Any]:
    [(_, _), (word, more)] = hub.calls
    assert word == "upload"
    return more


def test_the_files_of_a_model_go_in_one_commit(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch)
    assert push_to_hub(folder, "me/small", private=True).endswith("/me/small")
    assert hub.calls[0] == ("me/small", {"private": True, "exist_ok": True})
    more = sent(hub)
    names = set(more["allow_patterns"])
    assert {"config.json", "model.safetensors", "README.md", "recipe.yaml", "LICENSE", "tokenizer.json"} <= names
    assert not names & {*OF_THE_USER, "inner", "report.json", "report.html", "linked.safetensors"}
    assert more["delete_patterns"] is None and Path(more["folder_path"]) == folder


def test_reports_go_only_where_asked_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = Hub(monkeypatch, [".gitattributes"])
    push_to_hub(folder, "me/small", reports=True)
    assert {"report.json", "report.html"} <= set(sent(hub)["allow_patterns"])


def test_a_repository_with_files_is_replaced_only_where_asked_for(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub = Hub(monkeypatch, ["config.json", "old.safetensors"])
    with pytest.raises(InputError, match="me/small holds 2 files already: name another, or pass --overwrite"):
        push_to_hub(folder, "me/small")
    assert not hub.calls
    push_to_hub(folder, "me/small", overwrite=True)
    assert sent(hub)["delete_patterns"] == "*"


def test_what_is_no_whole_model_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    hub = Hub(monkeypatch)
    with pytest.raises(InputError, match="is not a model: give a folder"):
        push_to_hub(tmp_path, "me/small")
    unchecked = folder.rename(tmp_path / "out.unchecked")
    with pytest.raises(InputError, match="failed its check, so it is not uploaded"):
        push_to_hub(unchecked, "me/small")
    whole = unchecked.rename(tmp_path / "out")
    (whole / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        push_to_hub(whole, "me/small")
    assert not hub.calls


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (LocalTokenNotFoundError("none"), "needs a token of the hub: run `hf auth login`, or set HF_TOKEN"),
        (HFValidationError("no"), "has no valid name: give OWNER/NAME"),
        (ConnectionError("no way\nthere"), r"uploading to me/small failed \(no way there\): check the name"),
        (
            HfHubHTTPError("403 Forbidden", response=cast(Any, SimpleNamespace(headers={}, request=None))),
            "403",
        ),
    ],
)
def test_a_failure_is_one_sentence(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: Exception, sentence: str
) -> None:
    Hub(monkeypatch)

    def fails(api: HfApi, **more: Any) -> None:
        raise error

    monkeypatch.setattr(HfApi, "upload_folder", fails)
    with pytest.raises(InputError, match=sentence):
        push_to_hub(folder, "me/small")
    assert main(["push", str(folder), "me/small"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and lines[1].startswith("error: ")


def test_the_command_prints_the_address(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hub = Hub(monkeypatch, ["config.json"])
    assert main(["push", str(folder), "me/small", "--private", "--reports", "--overwrite"]) == 0
    assert capsys.readouterr().out.endswith("/me/small\n")
    assert hub.calls[0][1]["private"] and "report.json" in sent(hub)["allow_patterns"]
