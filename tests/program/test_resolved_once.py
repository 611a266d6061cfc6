"""A run is resolved once: recipe, allocator and stages are made a single time, by the library and by the command."""

import inspect
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

import optprune
from optprune.cli import main
from optprune.pruning import PartialSums
from optprune.texts import demo_articles
from tests.helpers.tiny_models import save_tiny, tiny_llama

ROOT = Path(optprune.__file__).parent
ONCE = ("program/resolve.py:resolve", "recipe/recipe.py:Recipe.within", "recipe/recipe.py:allocator_of")
STAGES = "program/method.py:BlockProgram.of"
COMMAND_MODULES = 121
"""the most modules of which the command of a small run may call a function"""


def counted(run) -> Counter[str]:
    calls: Counter[str] = Counter()

    def count(frame, event, argument) -> None:
        code = frame.f_code
        # A class body has no optimised locals: it is not a function.
        if event == "call" and code.co_flags & inspect.CO_OPTIMIZED and code.co_filename.startswith(str(ROOT)):
            calls[f"{code.co_filename[len(str(ROOT)) + 1 :]}:{code.co_qualname}"] += 1

    sys.setprofile(count)
    try:
        run()
    finally:
        sys.setprofile(None)
    return calls


def test_the_library_resolves_a_run_once() -> None:
    model = tiny_llama()
    recipe = optprune.load_recipe("structured_best", {"sparsity": 0.2})
    batches = [torch.randint(0, 64, (4, 32)) for _ in range(4)]
    calls = counted(lambda: optprune.prune(model, batches, recipe))
    assert [calls[name] for name in ONCE] == [1, 1, 1]
    assert calls[STAGES] == model.config.num_hidden_layers


@pytest.mark.e2e
def test_the_command_resolves_a_run_once(tmp_path: Path) -> None:
    """The memory check, the time left, the run and the report read one program."""
    model, text = save_tiny(tiny_llama(), tmp_path / "model"), tmp_path / "text.txt"
    text.write_text("\n\n".join(demo_articles("calibration")[:20]), encoding="utf-8")
    words = ["prune", str(model), "--output", str(tmp_path / "out"), "--recipe", "structured_best", "--device", "cpu"]
    words += ["--calibration", str(text), "--samples", "16", "--seq-length", "32", "--sparsity", "0.2"]
    status = list[int]()
    calls = counted(lambda: status.append(main(words)))
    assert status == [0]
    assert [calls[name] for name in ONCE] == [1, 1, 1]
    # One more of a block whose widths are expected ones, for the plan of its memory and time.
    assert calls[STAGES] == tiny_llama().config.num_hidden_layers + 1
    modules = {name.partition(":")[0] for name in calls}
    assert len(modules) <= COMMAND_MODULES, sorted(modules)


def test_an_argument_and_a_class_keep_their_old_names_for_a_version() -> None:
    recipe, batches = optprune.load_recipe("magnitude"), [torch.randint(0, 64, (2, 16))]
    with pytest.warns(DeprecationWarning, match="the argument 'lanes' of prune is 'partial_sums' now"):
        optprune.prune(tiny_llama(), batches, recipe, lanes=PartialSums())  # type: ignore[call-arg]
    with pytest.warns(DeprecationWarning, match=r"optprune.pruning.Lanes is optprune.pruning.PartialSums now"):
        assert optprune.pruning.Lanes is PartialSums
