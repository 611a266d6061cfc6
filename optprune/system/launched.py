"""How this process was started: alone, or as one of several by torchrun, which says so in the environment."""

import os


def started_by_torchrun() -> bool:
    """Whether this process is one of several that torchrun has started."""
    return "TORCHELASTIC_RUN_ID" in os.environ and int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_first() -> bool:
    """Whether this process is the one that writes and speaks: the first, or the only one."""
    return not started_by_torchrun() or os.environ.get("RANK") == "0"
