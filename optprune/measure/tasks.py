"""Tasks of lm-eval, by name or from files."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from optprune.errors import InputError, is_out_of_memory
from optprune.measure.evaluate import evaluating
from optprune.system.wording import install, one_line, shown

Scores = dict[str, dict[str, Any]]
"""the scores of lm-eval by task or group of tasks, and metric"""


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks of lm-eval whose questions can be read."""

    names: tuple[str, ...]
    manager: Any
    """the task manager of lm-eval"""

    @classmethod
    def found(cls, names: Sequence[str], include: Path | None = None) -> "Tasks":
        """Return tasks by names of lm-eval, by names of tasks in the folder `include`, or by paths of .yaml files.

        A task may name code beside its file, which is run: use files that you trust. InputError where lm-eval is not
        installed, a task is unknown, or its questions cannot be read.
        """
        if find_spec("lm_eval") is None:
            raise InputError(f"tasks need the package lm-eval, which is not installed: {install('eval')}")
        if not names or not all(name.strip() for name in names):
            raise InputError(
                f"the tasks {shown(','.join(names))} hold an empty name: give names such as hellaswag,arc_easy"
            )
        if include is not None and not include.is_dir():
            raise InputError(f"there is no folder of tasks {include}: give one that holds .yaml files")
        # The environment of the checks is without this extra, which would downgrade a package.
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        given = tuple(str(Path(name).absolute()) if name.endswith(".yaml") else name for name in names)
        # The search of lm-eval's thousands of files takes seconds.
        own = not all(name.endswith(".yaml") for name in given)
        manager = TaskManager(include_path=None if include is None else str(include), include_defaults=own)
        for name in given:
            if name.endswith(".yaml") and not Path(name).is_file():
                raise InputError(f"there is no task file {name}: check the path")
            if not name.endswith(".yaml") and name not in manager.all_tasks:
                raise InputError(
                    f"lm-eval has no task {shown(name)}: run lm-eval ls tasks for its names, or give a .yaml file"
                )
            try:
                manager.load([name])
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise InputError(
                    f"the task {name} cannot be read: {one_line(error)}; without access to the hub, give the .yaml "
                    "file of a task with local questions"
                ) from error
        return cls(given, manager)

    def run(self, model: PreTrainedModel, tokenizer: Tokenizer, *, limit: int | None = None, batch: int = 1) -> Scores:
        """Return the scores of a model by lm-eval's metrics, with the number of `questions` and of `shots`.

        Blocks of different widths are allowed. Only the first `limit` questions of each task are used, and `batch`
        texts are read at a time. lm-eval sets the seeds of Python, numpy and torch.
        """
        import lm_eval  # pyright: ignore[reportMissingImports]
        from lm_eval.models.huggingface import HFLM  # pyright: ignore[reportMissingImports]

        with evaluating(model):
            wrapped = HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch)
            found = lm_eval.simple_evaluate(
                model=wrapped, tasks=list(self.names), task_manager=self.manager, limit=limit, log_samples=False
            )
        assert found is not None, "there is one process"
        return {name: _plain(name, found) for name in found["results"]}


def _plain(name: str, found: Mapping[str, Any]) -> dict[str, Any]:
    """Return the scores of a task as plain data; metrics without a filter keep their name."""
    scores: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        if isinstance(value, int | float) and "," in key:
            scores[key.removesuffix(",none")] = float(value)
    counted = found["n-samples"].get(name)
    if counted is not None:
        scores |= {"questions": int(counted["effective"]), "shots": int(found["n-shot"][name])}
    return scores
