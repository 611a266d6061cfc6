"""docs/guide/start.md: every command of a newcomer's path works, one after the other in one folder."""

import re
import shlex
import subprocess
import sys
import tomllib
from functools import partial
from itertools import pairwise
from pathlib import Path

import pytest

from optprune.cli import main
from optprune.cli.demo_run import run_demo
from tests.helpers.pages import ROOT, TEXTS

PAGE = re.sub(r"<!--.*?-->", "", TEXTS["docs/guide/start.md"], flags=re.DOTALL)
COMMANDS = [
    line.split("  #")[0].strip()
    for line in re.findall(r"^    (\S.*)$", re.sub(r"```.*?```", "", PAGE, flags=re.DOTALL), re.MULTILINE)
]
FILES = dict(re.findall(r'^```\{\.python title="([\w.]+)"\}\n(.*?)^```$', PAGE, re.DOTALL | re.MULTILINE))
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def test_the_path_goes_from_installing_to_a_chat() -> None:
    programs = [" ".join(shlex.split(command)[:2]) for command in COMMANDS]
    steps = ["make demo", "pip install", "optprune demo", "optprune prune", "optprune evaluate", "optprune export"]
    places = [programs.index(step) for step in steps]
    assert places == sorted(places)
    assert COMMANDS[-1].endswith("| python chat.py")


@pytest.mark.parametrize("command", [command for command in COMMANDS if command.startswith(("make ", "pip "))])
def test_what_is_installed_is_what_the_project_names(command: str) -> None:
    program, *words = shlex.split(command)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = [
        re.split(r"[><=\[]", package)[0] for extra in project["optional-dependencies"].values() for package in extra
    ]
    for word in words:
        if program == "make":
            assert re.search(rf"^{word}:", MAKEFILE, re.MULTILINE)
        elif not word.startswith("-") and word not in ("install", "."):
            assert word in MAKEFILE or word in named


@pytest.mark.slow
def test_every_command_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    # The demo alone has no options for how many tokens it takes.
    small = partial(run_demo, samples=4, windows=2, seq_length=64)
    monkeypatch.setattr("optprune.cli.demo_run.run_demo", small)
    for name, text in FILES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for command in COMMANDS:
        if command.startswith("optprune "):
            words = shlex.split(command)[1:]
            assert main(words) == 0, (command, capsys.readouterr().err)
            outputs = [value for option, value in pairwise(words) if option == "--output"]
            assert all((tmp_path / output).exists() for output in outputs), command
            assert capsys.readouterr().out.strip(), command
        elif not command.startswith(("make ", "pip ")):
            shell = command.replace("python", shlex.quote(sys.executable))
            run = subprocess.run(["bash", "-c", shell], capture_output=True, text=True, timeout=300, check=False)
            assert run.returncode == 0, (command, run.stderr)
            assert run.stdout.strip(), command
    assert (tmp_path / ".demo" / "smollm2-fasp" / "config.json").is_file()
