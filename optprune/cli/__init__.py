"""The command line, one command in each file. `--json FILE` writes the results of a command as JSON.

Nothing here imports torch or transformers at the top, so that --help answers at once.
"""

from typing import TYPE_CHECKING

from optprune.cli.app import main
from optprune.system.names import lazy_names

if TYPE_CHECKING:
    from optprune.cli.one_call import prune_model

__all__ = ["main", "prune_model"]

__getattr__, __dir__ = lazy_names("optprune.cli", {"cli.one_call": ("prune_model",)})
