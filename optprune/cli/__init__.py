"""The command line, one command in each file. `--json FILE` writes the results of a command as JSON.

Nothing here imports torch or transformers at the top, so that --help answers at once.
"""

from optprune.cli.app import main

__all__ = ["main"]
