"""The program: its commands, and the entry point."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from optprune.cli.audit import audit_command
from optprune.cli.benchmark_model import benchmark_model_command
from optprune.cli.compare import compare_command
from optprune.cli.demo import demo_command
from optprune.cli.errors import open_standard_streams, report_error, report_errors
from optprune.cli.evaluate import evaluate_command
from optprune.cli.experts import experts_command
from optprune.cli.export import export_command
from optprune.cli.frontier import frontier_command
from optprune.cli.heal import heal_command
from optprune.cli.help import Command
from optprune.cli.inspect import inspect_command
from optprune.cli.plan import plan_command
from optprune.cli.problems import problems_command
from optprune.cli.prune import prune_command
from optprune.cli.push import push_command
from optprune.cli.recipes import recipes_command
from optprune.cli.report import report_command
from optprune.cli.serve_check import serve_check_command
from optprune.cli.solve import solve_command
from optprune.system.environment import check_docstrings
from optprune.system.interrupts import raise_on_signals
from optprune.system.version import VERSION

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _print_version(requested: bool) -> None:
    if requested:
        typer.echo(f"optprune {VERSION}")
        raise typer.Exit


@app.callback()
def program(
    _: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    """Prune language models: each layer an optimisation problem."""


COMMANDS = {
    "prune": (prune_command, "Prune a model and write it to a folder."),
    "plan": (plan_command, "Plan the memory and the time of a run of prune."),
    "audit": (audit_command, "Measure a model's weights, and check expectations of them."),
    "inspect": (inspect_command, "Audit a model, or draft the description of an unknown architecture."),
    "experts": (experts_command, "Measure which experts of a mixture serve which text."),
    "evaluate": (evaluate_command, "Measure a model's perplexity on a text."),
    "heal": (heal_command, "Train a pruned model towards the dense one; zeros stay."),
    "compare": (compare_command, "Prune by several recipes and compare quality, size and time."),
    "frontier": (frontier_command, "Compare pruning with fewer bits: size, speed and quality."),
    "report": (report_command, "Make the report page of a pruned folder, with later measurements."),
    "export": (export_command, "Write a model folder for llama.cpp (GGUF) or as ONNX."),
    "serve-check": (serve_check_command, "List the runtimes that load a model folder, and why the others do not."),
    "push": (push_command, "Upload a model folder with its card to the Hugging Face hub."),
    "benchmark-model": (benchmark_model_command, "Measure a model's speed and memory, alone or against another."),
    "problems": (problems_command, "Write the problems of a model's layers to files."),
    "solve": (solve_command, "Solve a layer's problem that was saved to a file."),
    "recipes": (recipes_command, "List the recipes, or print one as YAML."),
    "demo": (demo_command, "Prune, save and reload a small model on packaged data, in minutes."),
}
"""the commands by name, with their line in the list of commands"""
for name, (command, line) in COMMANDS.items():
    app.command(name, cls=Command, short_help=line)(report_errors(command))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; print an error as one sentence on stderr.

    With OPTPRUNE_DEBUG=1 in the environment, a traceback comes before the sentence.
    """
    open_standard_streams()
    restore = raise_on_signals()
    try:
        check_docstrings()
        # Without a command, print the help.
        result = app(
            args=list(sys.argv[1:] if arguments is None else arguments) or ["--help"],
            prog_name="optprune",
            standalone_mode=False,
        )
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return report_error(error)
    finally:
        restore()
