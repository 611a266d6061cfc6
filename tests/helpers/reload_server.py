"""Run as a script: a process with the imports of the reload check, which is forked for each task (see warm_reloads).

usage: python -P reload_server.py SCRIPT SOCKET READY
"""

import gc
import json
import os
import select
import socket
import sys
import traceback
from contextlib import suppress
from pathlib import Path
from types import CodeType
from typing import Any

LONGEST = 1 << 16
"""the most bytes of a task"""


def serve(script: str, place: str, ready: int) -> None:
    """Import what the script imports, then fork for each task, until the standard input ends."""
    import safetensors.torch  # noqa: F401
    import torch  # noqa: F401
    from transformers import LlamaForCausalLM, OPTForCausalLM, Qwen2ForCausalLM  # noqa: F401
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    get_checkpoint_conversion_mapping("llama")  # compiles thousands of patterns, which it keeps
    code = compile(Path(script).read_text(encoding="utf-8"), script, "exec")
    server = socket.socket(socket.AF_UNIX)
    server.bind(place)
    server.listen()
    gc.freeze()  # no child goes through the modules
    os.write(ready, b"1")
    while server in select.select([server, sys.stdin], [], [])[0]:
        line, _ = server.accept()
        if os.fork() == 0:
            os._exit(handle(line, code))
        line.close()
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
    server.close()


def handle(line: socket.socket, code: CodeType) -> int:
    """Run the script for one task in a process of its own, and tell its exit status."""
    asked, (output, errors), _, _ = socket.recv_fds(line, LONGEST, 2)
    child = os.fork()
    if child == 0:
        os.dup2(output, 1)
        os.dup2(errors, 2)
        os._exit(run(code, **json.loads(asked)))
    os.close(output)
    line.sendall(str(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])).encode())
    return 0


def run(code: CodeType, task: str, modules: str) -> int:
    """The exit status of the script, with a folder for the code that comes with a model."""
    from transformers import dynamic_module_utils

    dynamic_module_utils.HF_MODULES_CACHE = modules
    status: Any = 0
    sys.argv = ["reload_check.py", task]
    try:
        exec(code, {"__name__": "__main__"})
    except SystemExit as end:
        status = end.code or 0
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return int(status)


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]))
