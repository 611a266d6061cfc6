"""Malformed input of every kind, by a fixed seed: a sentence and exit status 2, or a right result; never a hang."""

import contextlib
import json
import os
import random
import shutil
import signal
import string
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from optprune.allocation.uniform import uniform
from optprune.cli import main
from optprune.models import Decoder, Mlp
from optprune.recipe import load_recipe, recipe_names
from optprune.recipe.fields import spellings
from optprune.recipe.names import SOLVERS
from tests.helpers.attempts import Attempt
from tests.helpers.tiny_models import save_tiny, tiny_llama

SEED = 20261126
LONGEST = 60
"""seconds that one input may take"""
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**9, 10**30, -(10**30), 0.5, -0.5, 1e-300, 1e300, float("nan"),
    float("inf"), "", "x", "auto", "float32", "float16", "bfloat16", "é\u2028", "\ud800", "x" * 5000, "../x",
    [], [[]], [1, 2], {}, {"a": 1}, {"": []}, [None] * 50,
]  # fmt: skip


class TooLong(BaseException):
    """One input took longer than any may."""


@contextlib.contextmanager
def in_time() -> Iterator[None]:
    def stop(*_: Any) -> None:
        raise TooLong

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(LONGEST)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


class Spoiler:
    """Draws one malformed input and the command that reads it."""

    def __init__(self, rng: random.Random, attempt: Attempt, sharded: Path) -> None:
        self.rng, self.attempt, self.sharded = rng, attempt, sharded
        self.inputs = attempt.folder / "inputs"
        self.inputs.mkdir()

    def spoiled_json(self, file: Path) -> None:
        """Replace, remove or wrap something in a JSON file, or some bytes of it."""
        if self.rng.random() < 0.3:
            file.write_bytes(self.spoiled_bytes(file.read_bytes()))
            return
        data = json.loads(file.read_text())
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            for key, item in node.items() if isinstance(node, dict) else enumerate(node):
                places.append((node, key))
                if isinstance(item, dict | list):
                    walk(item)

        walk(data)
        # What is near the top decides more than one of a thousand tokens.
        node, key = self.rng.choice(places[: max(20, len(places) // 20)] if self.rng.random() < 0.7 else places)
        how = self.rng.randrange(4)
        if how == 0:
            del node[key]
        elif how == 1:
            node[key] = [node[key]]
        else:
            node[key] = self.rng.choice(VALUES)
        file.write_text(json.dumps(data))

    def spoiled_bytes(self, data: bytes) -> bytes:
        cut = self.rng.randrange(len(data) + 1)
        noise = self.rng.randbytes(self.rng.randrange(1, 20))
        if self.rng.random() < 0.5:
            noise = "".join(self.rng.choices(string.printable + "é\u2028", k=5)).encode()
        return self.rng.choice(
            [data[:cut], data[:cut] + noise + data[cut:], data[:cut] + noise + data[cut + 8 :], noise]
        )

    def model(self, source: Path) -> Path:
        return Path(shutil.copytree(source, self.inputs / "model"))

    def reading(self) -> list[str]:
        """A command that reads the model."""
        name = self.rng.choice(["evaluate", "prune", "audit"])
        return {"evaluate": self.attempt.evaluate(), "audit": ["audit", str(self.attempt.model)]}.get(
            name, self.attempt.command()
        )

    def config(self) -> list[str]:
        self.attempt.model = self.model(self.attempt.model)
        file = self.attempt.model / "config.json"
        if self.rng.random() < 0.5:
            self.spoiled_json(file)
        else:
            data = json.loads(file.read_text())
            more = [
                "text_config",
                "sliding_window",
                "quantization_config",
                "transformers_weights",
                "auto_map",
                "rope_scaling",
            ]
            data[self.rng.choice([*data, *more])] = self.rng.choice(VALUES)
            file.write_text(json.dumps(data))
        return self.reading()

    def header(self) -> list[str]:
        self.attempt.model = self.model(self.attempt.model)
        file = self.attempt.model / "model.safetensors"
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        spare = self.inputs / "header.json"
        spare.write_bytes(data[8 : 8 + size])
        self.spoiled_json(spare)
        header = spare.read_bytes()
        told = len(header) if self.rng.random() < 0.7 else self.rng.choice([0, 1, size + 1, 2**40, 2**63])
        file.write_bytes(told.to_bytes(8, "little") + header + data[8 + size :])
        return self.reading()

    def index(self) -> list[str]:
        self.attempt.model = self.model(self.sharded)
        self.spoiled_json(self.attempt.model / "model.safetensors.index.json")
        return self.reading()

    def tokenizer(self) -> list[str]:
        self.attempt.model = self.model(self.attempt.model)
        self.spoiled_json(self.attempt.model / self.rng.choice(["tokenizer.json", "tokenizer_config.json"]))
        return self.rng.choice([self.attempt.evaluate(), self.attempt.command()])

    def recipe(self) -> list[str]:
        file = self.inputs / "recipe.yaml"
        text = load_recipe(self.rng.choice(recipe_names())).to_yaml()
        how = self.rng.randrange(3)
        if how == 0:
            file.write_bytes(self.spoiled_bytes(text.encode()))
        elif how == 1:
            file.write_text(text + "".join(self.rng.choices(string.printable, k=30)), encoding="utf-8")
        else:
            field = self.rng.choice(spellings())
            value = self.solver() if field == "solver" else self.rng.choice(VALUES)
            data = {**load_recipe("fasp").to_dict(), field: value}
            file.write_text(json.dumps(data))
        return self.attempt.command(recipe=file)

    def solver(self) -> Any:
        name = self.rng.choice([*SOLVERS, "x"])
        option = self.rng.choice(["rho", "tolerance", "batch", "most", "inner_steps", "seed", "stages", "block", "x"])
        return self.rng.choice(
            [name, [name, name], {name: {option: self.rng.choice(VALUES)}}, {name: option}, [[name]]]
        )

    def allocation(self) -> list[str]:
        file = self.inputs / "allocation.json"
        file.write_text(uniform(Decoder(tiny_llama()), 0.2, Mlp(), 8).to_json())
        self.spoiled_json(file)
        return self.attempt.command(allocation=file)

    def text(self) -> list[str]:
        ending = self.rng.choice([".txt", ".jsonl", ".csv"] * 3 + [".bin", ""])
        file = self.inputs / f"text{ending}"
        good = {".jsonl": b'{"text": "one two"}\n' * 9, ".csv": b"text,more\none two,3\n"}.get(ending, b"one two " * 99)
        file.write_bytes(self.spoiled_bytes(good * self.rng.choice([1, 50])))
        self.attempt.text = Path(f"{file}{self.rng.choice(['', '', '', '', ':text', ':x', ':'])}")
        return self.rng.choice([self.attempt.evaluate(), self.attempt.command()])

    def option(self) -> list[str]:
        value = self.rng.choice([*VALUES, "2:4", "rows", "all", "kv-groups", "blocks", "global", "cross"])
        text = value if isinstance(value, str) else json.dumps(value)
        if self.rng.random() < 0.3:
            return self.attempt.command("--set", f"{self.rng.choice(spellings())}={text}")
        names = ["--samples", "--seq-length", "--seed", "--dtype", "--save-dtype", "--device", "--units", "--pattern"]
        names += [
            "--propagation",
            "--sparsity",
            "--width-multiple",
            "--allocation",
            "--recipe",
            "--calibration",
            "--json",
        ]
        return self.attempt.command(f"{self.rng.choice(names)}={text}")

    def output(self) -> list[str]:
        folder = self.inputs
        (folder / "file").write_text("a file")
        (folder / "loop").symlink_to("loop")
        (folder / "full").mkdir()
        (folder / "full" / "thesis.tex").write_text("years of work")
        os.mkfifo(folder / "pipe")
        names = [
            "file",
            "file/x",
            "loop",
            "loop/x",
            "full",
            "pipe",
            "pipe/x",
            "x" * 300,
            "",
            ".",
            "..",
            "é" * 130,
            "a\nb",
        ]
        name = self.rng.choice([*names, os.fsdecode(b"o\xff"), "new/" * 9 + "out", " ", "-", "~", "$HOME", "\u2028"])
        more = ["--overwrite"] if self.rng.random() < 0.5 else []
        return self.attempt.command(*more, output=folder / name)


KINDS: list[Callable[[Spoiler], list[str]]] = [
    Spoiler.config,
    Spoiler.header,
    Spoiler.index,
    Spoiler.tokenizer,
    Spoiler.recipe,
    Spoiler.allocation,
    Spoiler.text,
    Spoiler.option,
    Spoiler.output,
]


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = save_tiny(tiny_llama(), tmp_path_factory.mktemp("models") / "sharded")
    (folder / "model.safetensors").unlink()
    tiny_llama().save_pretrained(folder, max_shard_size="200KB")
    return folder


def fuzz(attempt: Attempt, sharded: Path, inputs: range) -> None:
    for number in inputs:
        one = replace(attempt, folder=attempt.folder / str(number))
        one.folder.mkdir()
        spoiler = Spoiler(random.Random(SEED + number), one, sharded)
        os.chdir(spoiler.inputs)
        kind = KINDS[number % len(KINDS)]
        command = kind(spoiler)
        before = names(one.folder)
        one.capsys.readouterr()
        with in_time():
            code = main(command)
        told = one.capsys.readouterr()
        what = f"input {number} ({kind.__name__}): {command}\n{told.err}"
        # An audit that finds faults tells of them, and ends with 1.
        assert code in ((0, 1, 2) if command[0] == "inspect" else (0, 2)), what
        assert "Traceback" not in told.err, what
        if code == 2:
            sentences = [line for line in told.err.splitlines() if line.startswith("error: ")]
            assert len(sentences) == 1, what
            assert "(unexpected: " not in sentences[0], what
            assert "please report" not in sentences[0], what
            assert len(sentences[0]) <= 4100, what
            assert told.out == "", what
            assert names(one.folder) == before, what
        else:
            assert told.out, what
            assert not any(Path(name).name.startswith(".") for name in names(one.folder)), what
        shutil.rmtree(one.folder)


@pytest.fixture
def small_checks(attempt: Attempt, monkeypatch: pytest.MonkeyPatch) -> Attempt:
    """The reload in a fresh process, which has tests of its own, takes as long as fifty inputs."""
    monkeypatch.setattr("optprune.export.save.compare", lambda *_: 0.0)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(attempt.folder)
    return attempt


def test_sixty_malformed_inputs(small_checks: Attempt, sharded: Path) -> None:
    fuzz(small_checks, sharded, range(60))


@pytest.mark.slow
def test_more_malformed_inputs(small_checks: Attempt, sharded: Path) -> None:
    fuzz(small_checks, sharded, range(60, 300))
