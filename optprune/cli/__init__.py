"""The command line, one command a file. What a command measures, --json FILE writes down.

Nothing here imports torch or transformers at the top, so that --help answers at once.
"""

from optprune.cli.app import main

__all__ = ["main"]
