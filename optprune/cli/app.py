"""The program: its commands, and the entry point."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from optprune.cli.audit import audit_command
from optprune.cli.benchmark_model import benchmark_model_command
from optprune.cli.compare import compare_command
from optprune.cli.demo import demo_command
from optprune.cli.errors import reported, tell
from optprune.cli.evaluate import evaluate_command
from optprune.cli.export import export_command
from optprune.cli.heal import heal_command
from optprune.cli.inspect import inspect_command
from optprune.cli.plan import plan_command
from optprune.cli.prune import prune_command
from optprune.cli.recipes import recipes_command
from optprune.cli.report import report_command
from optprune.system.interrupts import raise_on_signals

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _say_version(asked: bool) -> None:
    if asked:
        import optprune

        typer.echo(f"optprune {optprune.__version__}")
        raise typer.Exit


@app.callback()
def program(
    version: Annotated[
        bool, typer.Option("--version", help="Say the version and stop.", callback=_say_version, is_eager=True)
    ] = False,
) -> None:
    """Prune language models: each layer an optimisation problem."""


app.command("prune", short_help="Prune a model and write it to a folder.")(reported(prune_command))
app.command("plan", short_help="Tell the memory and the time that prune would take.")(reported(plan_command))
app.command("audit", short_help="Measure what a model's weights are, and whether that is as expected.")(
    reported(audit_command)
)
app.command("inspect", short_help="Audit a model, or draft a description of an architecture that is not known.")(
    reported(inspect_command)
)
app.command("evaluate", short_help="Measure a model's perplexity on a text.")(reported(evaluate_command))
app.command("heal", short_help="Train a pruned model towards the dense one; zeros stay.")(reported(heal_command))
app.command("compare", short_help="Prune by several recipes, and tell quality against size and time.")(
    reported(compare_command)
)
app.command("report", short_help="Make the page about a pruned folder, with what was measured since.")(
    reported(report_command)
)
app.command("export", short_help="Write a model folder for llama.cpp (GGUF) or as ONNX.")(reported(export_command))
app.command("benchmark-model", short_help="Measure a model's speed and memory, alone or against another.")(
    reported(benchmark_model_command)
)
app.command("recipes", short_help="List the recipes, or print one as YAML.")(reported(recipes_command))
app.command("demo", short_help="The whole story on packaged data, in minutes.")(reported(demo_command))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command and return its exit status; errors are one sentence on stderr.

    With OPTPRUNE_DEBUG=1 in the environment, a traceback comes before the sentence.
    """
    restore = raise_on_signals()
    try:
        # Without a command, the help is what one wants to see.
        result = app(
            args=list(sys.argv[1:] if arguments is None else arguments) or ["--help"],
            prog_name="optprune",
            standalone_mode=False,
        )
        return result if isinstance(result, int) else 0
    except (Exception, KeyboardInterrupt) as error:
        return tell(error)
    finally:
        restore()
