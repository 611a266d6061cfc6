"""Modelling code of a family is imported when the family is used, not with optprune."""

import subprocess
import sys
from pathlib import Path

import pytest
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from benchmarks.tiny_models import tiny_llama
from optprune.models import ARCHITECTURES
from optprune.models.vision import VISION_FAMILIES
from tests.helpers.tiny_models import save_tiny

LISTED = r"""
import re, sys
of_family = re.compile(r"(transformers\.models\.(?!auto\.)\w+|optprune\.models\.pruned)\.(modeling_\w+)")
print(*sorted(found[2] for found in map(of_family.fullmatch, sys.modules) if found))
"""


def modelling_modules(code: str) -> set[str]:
    """Return the names of the modelling modules of families that a new process has imported after some code."""
    command = [sys.executable, "-c", f"{code}\n{LISTED}"]
    run = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert run.returncode == 0, run.stderr
    return set(run.stdout.split())


def test_the_import_of_optprune_imports_no_family() -> None:
    assert modelling_modules("import optprune, optprune.models; optprune.load_recipe('fasp')") == set()


def test_a_model_imports_its_own_family_only(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), tmp_path)
    code = f"from optprune.models import open_model; open_model({str(tmp_path)!r})"
    assert modelling_modules(code) == {"modeling_llama", "modeling_pruned_llama"}


@pytest.mark.parametrize("family", sorted(ARCHITECTURES))
def test_the_classes_of_a_family_are_found_by_their_names(family: str) -> None:
    architecture = ARCHITECTURES[family]
    for classes in (architecture.stock, architecture.pruned):
        assert classes is not None
        assert issubclass(classes.config, PretrainedConfig)
        assert issubclass(classes.model, PreTrainedModel)
        assert issubclass(classes.block, nn.Module)
        assert issubclass(classes.attention, nn.Module)
        assert classes.config.model_type in architecture.model_types


@pytest.mark.parametrize("family", sorted(VISION_FAMILIES))
def test_the_classes_of_a_vision_family_are_found_by_their_names(family: str) -> None:
    classes = VISION_FAMILIES[family].classes
    assert classes.config.model_type == f"pruned_{family}"
    assert issubclass(classes.model, PreTrainedModel)
