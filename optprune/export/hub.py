"""Upload of a model folder to the Hugging Face hub."""

import glob
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError, LocalTokenNotFoundError

from optprune.errors import InputError
from optprune.export.place import REPORTS, UNCHECKED, WRITTEN, model_files
from optprune.system.wording import one_line, shown

WEIGHTS = (".safetensors", ".onnx")
OF_THE_HUB = {".gitattributes"}
"""the files that a new repository has"""


def push_to_hub(
    folder: str | Path, name: str, *, private: bool = False, reports: bool = False, overwrite: bool = False
) -> str:
    """Upload a model folder to a repository OWNER/NAME of the hub in one commit, and return its address.

    The repository is created if there is none. The files of a model are uploaded, with the card, the recipe and the
    licences; `reports` adds report.json and report.html, which may hold paths of this machine. A repository that holds
    files is refused unless `overwrite`, which deletes in the same commit what is not in the folder. The token is that
    of `hf auth login` or HF_TOKEN. Raises InputError where the folder is not a whole model, or the hub refuses.
    """
    files = _files(Path(folder), reports)
    hub = HfApi(library_name="optprune")
    try:
        if hub.repo_exists(name):
            there = set(hub.list_repo_files(name)) - OF_THE_HUB
            if there and not overwrite:
                raise InputError(
                    f"the repository {name} holds {len(there)} files already: name another, or pass --overwrite to "
                    "replace all of them"
                )
        hub.create_repo(name, private=private, exist_ok=True)
        hub.upload_folder(
            repo_id=name,
            folder_path=folder,
            commit_message="Upload a model pruned by optprune",
            allow_patterns=[glob.escape(file) for file in files],
            delete_patterns="*" if overwrite else None,
        )
    except InputError:
        raise
    except LocalTokenNotFoundError as error:
        raise InputError(
            f"uploading to {name} needs a token of the hub: run `hf auth login`, or set HF_TOKEN"
        ) from error
    except HFValidationError as error:
        raise InputError(f"the repository {shown(name)} has no valid name: give OWNER/NAME") from error
    except Exception as error:  # of the hub and of the connection, in many classes
        raise InputError(
            f"uploading to {name} failed ({one_line(error)}): check the name, the connection and the rights of the "
            "token, and run it again"
        ) from error
    return f"{hub.endpoint}/{name}"


def _files(folder: Path, reports: bool) -> list[str]:
    """Return the names of the files to upload; InputError unless the folder is a whole model."""
    if not (folder / "config.json").is_file():
        raise InputError(f"the folder {folder} is not a model: give a folder that prune, heal or export wrote")
    if folder.resolve().name.endswith(UNCHECKED):
        raise InputError(f"the folder {folder} failed its check, so it is not uploaded: prune the model again")
    known = sorted(model_files(folder))
    if not any(name.endswith(WEIGHTS) for name in known):
        raise InputError(f"the folder {folder} holds no weights: give a folder that prune, heal or export wrote")
    return [name for name in known if name != WRITTEN and (reports or name not in REPORTS)]
