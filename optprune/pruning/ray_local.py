"""A Ray cluster of this machine alone: it listens on the loopback, and obeys only who has the token of this process."""

import importlib
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from ipaddress import ip_address
from typing import Any

from optprune.errors import OptpruneError

REACHABLE = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"
"""the variable by which Ray takes an address for this machine that others reach, or the loopback where it is 0"""
MODE, TOKEN, TOKEN_FILE = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
"""the variables that say whether Ray asks for a token, which one, and which file it is in"""


@contextmanager
def for_this_machine() -> Iterator[None]:
    """Have `ray.init` start a cluster that is closed to others, for as long as the context lasts.

    Ray's own token would be in a file that all users of the machine can read. This one is in the environment of its
    processes, which only their owner sees.
    """
    before = {name: os.environ.get(name) for name in (REACHABLE, MODE, TOKEN, TOKEN_FILE)}
    constants = importlib.import_module("ray._private.ray_constants")
    reachable = getattr(constants, "ENABLE_RAY_CLUSTER", None)  # what Ray read when it was imported
    os.environ |= {REACHABLE: "0", MODE: "token", TOKEN: secrets.token_hex(32)}
    os.environ.pop(TOKEN_FILE, None)
    constants.ENABLE_RAY_CLUSTER = False
    _read_again()
    try:
        yield
    finally:
        constants.ENABLE_RAY_CLUSTER = reachable
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        _read_again()


def check_closed(ray: Any) -> None:
    """Raise OptpruneError where the cluster is on an address that others could reach."""
    for node in ray.nodes():
        address = str(node["NodeManagerAddress"])
        if not ip_address(address).is_loopback:
            raise OptpruneError(
                f"this version of Ray ({ray.__version__}) would listen on {address}, which other machines may reach: "
                "install the version that optprune[ray] asks for"
            )


def _read_again() -> None:
    """Have Ray read the variables once more, which it keeps from its import or its first cluster."""
    with suppress(ImportError, AttributeError):
        raylet = importlib.import_module("ray._raylet")
        raylet.Config.initialize("")
        raylet.AuthenticationTokenLoader.instance().reset_cache()
