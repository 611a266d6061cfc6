"""ALPS and OSSCAR as published in fmchisel, whose modules need one name of llm-compressor and nothing else of it."""

import sys
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn

from optprune.problems import LayerLoss

NAME = "llmcompressor.modifiers.obcq.sgpt_sparsify"


def published(path: str) -> Any:
    """Return a module of fmchisel by its path; ImportError without fmchisel (`pip install --no-deps fmchisel==0.1.2`).

    The package itself needs a llm-compressor of before transformers 5. Its solvers take only a dtype from it.
    """
    package = find_spec("fmchisel")
    if package is None or package.origin is None:
        raise ImportError("fmchisel is not installed: pip install --no-deps fmchisel==0.1.2")
    spec = spec_from_file_location(Path(path).stem, Path(package.origin).parent / path)
    assert spec is not None and spec.loader is not None
    module, names = module_from_spec(spec), NAME.split(".")
    stand_ins = {name: ModuleType(name) for name in (".".join(names[: depth + 1]) for depth in range(len(names)))}
    stand_ins[NAME].SGPT_PRECISION = torch.float32  # type: ignore[attr-defined]
    with patch.dict(sys.modules, stand_ins):
        spec.loader.exec_module(module)
    return module


def plain(loss: LayerLoss) -> bool:
    """Return whether a loss is of the form that they take: no metric, no drift and no fitted bias."""
    return loss.metric is None and loss.pull is None and not loss.fit_bias


def arguments(loss: LayerLoss) -> tuple[nn.Linear, dict[nn.Module, Tensor]]:
    """Return a linear layer and its Gram matrix; both are changed by the solvers. The damping is in the Gram matrix."""
    layer = nn.Linear(loss.weight.shape[1], loss.weight.shape[0], bias=False)
    layer.weight.data = loss.weight.float().clone()
    return layer, {layer: loss.gram.float().clone()}
