"""Run as a script: a process with all imports, which is forked for each call of `Children`.

usage: python -m tests.helpers.torture.server

It reads a line of JSON for each call from its standard input, and answers each by a line.
"""

import ctypes
import gc
import importlib
import io
import json
import os
import pkgutil
import resource
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from pathlib import Path
from typing import Any

import optprune
from tests.helpers.torture import calls
from tests.helpers.warm_reloads import WarmReloads

LATER = ("onnx.reference", "onnxscript", "pandas", "pyarrow.parquet", "scipy.optimize", "networkx.algorithms")
PR_SET_CHILD_SUBREAPER = 36
MOST_ADDRESSES = 6 << 30
"""the address space that a child may have beyond its parent's: it ends before the machine does"""
LINGER = 20.0
"""how many seconds the processes that a call has started may outlive it"""


def serve() -> None:
    """Import everything, then fork for each line."""
    for module in pkgutil.walk_packages(optprune.__path__, "optprune."):
        if not module.name.endswith("__main__") and ".pruned" not in module.name:
            importlib.import_module(module.name)
    # What is imported when it is needed, or takes long when it is used for the first time.
    for name in LATER:
        importlib.import_module(name)
    from matplotlib import pyplot
    from transformers import LlamaForCausalLM, OPTForCausalLM, PreTrainedTokenizerFast  # noqa: F401

    pyplot.figure().savefig(io.BytesIO(), format="svg")
    pyplot.close()
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    gc.freeze()  # no child goes through the modules
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        if asked["arguments"].get("checked") and calls.reloads is None:
            calls.reloads = WarmReloads()
            calls.reloads.start()
        print(json.dumps(answer(asked)), file=answers, flush=True)
    if calls.reloads is not None:
        calls.reloads.close()


def answer(asked: dict[str, Any]) -> dict[str, Any]:
    """Make a call in a process of its own, and tell how that ended."""
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    child = os.fork()
    if child == 0:
        begin(asked)
    status, hung = None, False
    while status is None:
        done, found, usage = os.wait4(child, os.WNOHANG)
        if done:
            status = os.waitstatus_to_exitcode(found)
        elif time.monotonic() - began > asked["longest"]:
            hung = True
            with suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        else:
            time.sleep(0.005)
    return {
        "status": status,
        "hung": hung,
        "left": left_behind(child),
        "seconds": usage.ru_utime + usage.ru_stime,
        "bytes": max(0, usage.ru_maxrss - before) << 10,
    }


def left_behind(group: int) -> bool:
    """Whether processes of a call go on after it; they are killed."""
    until = time.monotonic() + LINGER
    while True:
        with suppress(ChildProcessError):
            while os.waitpid(-group, os.WNOHANG)[0]:
                pass
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return False
        if time.monotonic() > until:
            os.killpg(group, signal.SIGKILL)
            return True
        time.sleep(0.02)


def begin(asked: dict[str, Any]) -> None:
    """Be the process of a call, and end as it does."""
    status: Any = 70
    try:
        os.setpgid(0, 0)
        for place, number in (("out", 1), ("err", 2)):
            stream = os.open(asked[place], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(stream, number)
            os.close(stream)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + MOST_ADDRESSES,) * 2)
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        os.environ.update(asked["environment"])
        os.chdir(asked["folder"])
        warnings.simplefilter("error")
        status = getattr(calls, asked["call"])(**asked["arguments"])
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status if isinstance(status, int) else 70)


if __name__ == "__main__":
    serve()
