"""Tasks of lm-eval, the field's harness, by name or from files of one's own."""

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
from optprune.system.wording import one_line, shown

Scores = dict[str, dict[str, Any]]
"""what lm-eval measures, by the task (or a group of them) and the metric"""


@dataclass(frozen=True, eq=False)
class Tasks:
    """Tasks that lm-eval knows and whose questions were read."""

    names: tuple[str, ...]
    manager: Any
    """lm-eval's own, which finds tasks by name"""

    @classmethod
    def found(cls, names: Sequence[str], include: Path | None = None) -> "Tasks":
        """Tasks by lm-eval's names, by names of tasks in the folder `include`, or as paths of .yaml files.

        A task may name code, which lies beside its file and is run: use files that you trust. InputError where lm-eval
        is not installed, a task is unknown, or its questions cannot be read.
        """
        if find_spec("lm_eval") is None:
            raise InputError(
                "tasks are run by the package lm-eval, which is not installed: run pip install 'optprune[eval]'"
            )
        if not names or not all(name.strip() for name in names):
            raise InputError(f"the tasks {shown(','.join(names))} name none: give names such as hellaswag,arc_easy")
        if include is not None and not include.is_dir():
            raise InputError(f"there is no folder of tasks {include}: give one that holds .yaml files")
        # An extra that the environment of the checks has not: it would lower a package there.
        from lm_eval.tasks import TaskManager  # pyright: ignore[reportMissingImports]

        logging.getLogger("lm_eval").setLevel(logging.ERROR)
        given = tuple(str(Path(name).absolute()) if name.endswith(".yaml") else name for name in names)
        # To look through the thousands of lm-eval's own files takes seconds.
        own = not all(name.endswith(".yaml") for name in given)
        manager = TaskManager(include_path=None if include is None else str(include), include_defaults=own)
        for name in given:
            if name.endswith(".yaml") and not Path(name).is_file():
                raise InputError(f"there is no task file {name}: check the path")
            if not name.endswith(".yaml") and name not in manager.all_tasks:
                raise InputError(
                    f"lm-eval has no task {shown(name)}: lm-eval ls tasks lists its own, and a .yaml file may be given"
                )
            try:
                manager.load([name])
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                raise InputError(
                    f"the task {name} cannot be read: {one_line(error)}; where there is no hub, give the .yaml file of "
                    "a task whose questions are local"
                ) from error
        return cls(given, manager)

    def run(self, model: PreTrainedModel, tokenizer: Tokenizer, *, limit: int | None = None, batch: int = 1) -> Scores:
        """What a model scores, with lm-eval's metrics, the number of `questions` and of `shots`.

        The model may be uneven: it is handed over as it is. `limit` takes the first questions of each task only, and
        `batch` is how many texts are read at once. Seeds of Python, numpy and torch are those of lm-eval afterwards.
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
    """The scores of a task as plain data: a metric that no filter was before has its own name."""
    scores: dict[str, Any] = {}
    for key, value in found["results"][name].items():
        if isinstance(value, int | float) and "," in key:
            scores[key.removesuffix(",none")] = float(value)
    counted = found["n-samples"].get(name)
    if counted is not None:
        scores |= {"questions": int(counted["effective"]), "shots": int(found["n-shot"][name])}
    return scores
