"""Spoiling: values, bytes, JSON, headers of files and texts that are not as they should be."""

import json
import random
import string
from contextlib import suppress
from pathlib import Path
from typing import Any

from tests.helpers.torture.sandbox import MARK, TAG

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 10**6, 10**9, 2**62, 10**30, -(10**30), 0.5, -0.5, 1e-300, 1e300,
    float("nan"), float("inf"), "", "x", "auto", "float32", "float16", "bfloat16", "é\u2028", "\ud800", "x" * 5000,
    "../x", MARK, f"{MARK}x", TAG, f"|{TAG}|\n# x", "\x9b2J", [], [[]], [1, 2], {}, {"a": 1}, {"": []}, [None] * 50,
]  # fmt: skip
WORDS = [value for value in VALUES if isinstance(value, str)] + [
    "-1",
    "0",
    "1",
    "1e9",
    "nan",
    "inf",
    "1e-400",
    "--",
    "é",
]
NUMBERS = [0, 1, 2, 7, 255, 2**16, 2**31, 2**32 - 1, 2**40, 2**62, 2**63, 2**64 - 1]


class Spoiler:
    """Spoils by a source of random numbers."""

    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def value(self) -> Any:
        """A value that fits few places."""
        return self.rng.choice(VALUES)

    def word(self) -> str:
        """A value as a word of a command line."""
        value = self.rng.choice([*VALUES, *WORDS])
        # No word of a command line has a null in it, and none that is not one of the system's.
        return (value if isinstance(value, str) else json.dumps(value)).replace("\0", "").replace("\ud800", "\udcff")

    def json(self, file: Path, top: float = 0.7) -> None:
        """Replace, remove or wrap something in a JSON file, or some bytes of it."""
        if self.rng.random() < 0.2:
            self.bytes(file)
            return
        if self.rng.random() < 0.08:
            file.write_text(json.dumps(self.value()))
            return
        data = json.loads(file.read_text())
        places: list[tuple[Any, Any]] = []

        def walk(node: Any) -> None:
            for key, item in node.items() if isinstance(node, dict) else enumerate(node):
                places.append((node, key))
                if isinstance(item, dict | list):
                    walk(item)

        walk(data)
        if not places:
            file.write_text(json.dumps(self.value()))
            return
        # What is near the top decides more than one of a thousand tokens.
        node, key = self.rng.choice(places[: max(20, len(places) // 20)] if self.rng.random() < top else places)
        how = self.rng.randrange(5)
        if how == 0:
            del node[key]
        elif how == 1:
            node[key] = [node[key]]
        elif how == 2 and isinstance(node[key], int | float):
            node[key] = self.rng.choice([node[key] + 1, -node[key], node[key] * 1000, node[key] / 3])
        else:
            node[key] = self.value()
        file.write_text(json.dumps(data))

    def bytes(self, file: Path) -> None:
        """Cut a file, put something into it, or replace it."""
        data = file.read_bytes()
        cut = self.rng.randrange(len(data) + 1)
        noise = self.rng.randbytes(self.rng.randrange(1, 20))
        if self.rng.random() < 0.5:
            noise = "".join(self.rng.choices(string.printable + "é\u2028", k=5)).encode()
        choices = [data[:cut], data[:cut] + noise + data[cut:], data[:cut] + noise + data[cut + 8 :], noise]
        file.write_bytes(self.rng.choice([*choices, data + noise]))

    def flip(self, file: Path, within: int | None = None) -> None:
        """Flip some bits of a file, in the first bytes where that is said."""
        data = bytearray(file.read_bytes())
        for _ in range(self.rng.randrange(1, 6)):
            place = self.rng.randrange(min(len(data), within or len(data)))
            data[place] ^= 1 << self.rng.randrange(8)
        file.write_bytes(data)

    def safetensors(self, file: Path) -> None:
        """Spoil the header of a safetensors file, or what follows it."""
        data = file.read_bytes()
        size = int.from_bytes(data[:8], "little")
        spare = file.with_name("header.json")
        spare.write_bytes(data[8 : 8 + size])
        self.json(spare)
        header = spare.read_bytes()
        spare.unlink()
        told = len(header) if self.rng.random() < 0.7 else self.rng.choice([0, 1, size + 1, 2**40, 2**63])
        more = self.rng.randbytes(64) if self.rng.random() < 0.2 else b""
        file.write_bytes(told.to_bytes(8, "little") + header + data[8 + size :] + more)

    def problem(self, file: Path) -> None:
        """Change a number of a problem in a file, which is signed again as if it had been saved so."""
        from safetensors import safe_open
        from safetensors.torch import save_file

        from optprune.numerics.fingerprint import fingerprint
        from optprune.problems.files import HEADER
        from optprune.system.files import digest_of

        opened: Any = safe_open(file, "pt")
        with opened as stream:
            metadata, tensors = dict(stream.metadata()), {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
        header = json.loads(metadata[HEADER])
        del header["digest"]
        if self.rng.random() < 0.5:
            spare = file.with_name("fields.json")
            spare.write_text(json.dumps(header["fields"]))
            self.json(spare, top=0.0)
            with suppress(ValueError):  # spoiled so that it is no JSON
                header["fields"] = json.loads(spare.read_text())
            spare.unlink()
        else:
            name = self.rng.choice(sorted(tensors))
            tensors[name] = self.tensor(tensors[name])
        header["tensors"] = fingerprint(sorted(tensors.items()))
        metadata[HEADER] = json.dumps(header | {"digest": digest_of(header)})
        save_file(tensors, file, metadata)

    def tensor(self, tensor: Any) -> Any:
        """Change an entry of a tensor, its shape or its dtype."""
        import torch

        changed = tensor.clone()
        how = self.rng.randrange(4)
        if how < 2 and changed.numel():
            numbers = [*(number for number in NUMBERS if number < 2**62), -1]
            odd = [float("nan"), float("inf"), 0.0, 1e30, -1e30, 1e-40]
            place = self.rng.randrange(changed.numel())
            number = self.rng.choice(odd if changed.is_floating_point() else numbers)
            # What is too large for the dtype wraps around.
            changed.view(-1)[place] = number if changed.is_floating_point() else torch.tensor(number).to(changed.dtype)
            return changed
        if how == 2:
            return self.rng.choice([changed[:-1], changed.flatten(), changed[None], changed[:0]]).contiguous()
        return changed.to(self.rng.choice([torch.float16, torch.float64, torch.int8, torch.int64, torch.bool]))

    def gguf(self, file: Path) -> None:
        """Spoil the header of a GGUF file: its counts, lengths, types and offsets."""
        data = bytearray(file.read_bytes())
        how = self.rng.randrange(4)
        if how == 0:  # the magic number, the version, the counts of tensors and of keys
            at, size = self.rng.choice([(0, 4), (4, 4), (8, 8), (16, 8)])
            data[at : at + size] = (self.rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
            file.write_bytes(data)
        elif how == 1:  # a length, a type or a value of a key
            keys = [b"general.", b"llama.", b"tokenizer.", b"blk.", b"output", b"token_embd"]
            found = [at for key in keys for at in places(bytes(data), key)]
            at = self.rng.choice(found) + self.rng.randrange(-8, 40)
            size = self.rng.choice([1, 4, 8])
            data[at : at + size] = (self.rng.choice(NUMBERS) % 2 ** (8 * size)).to_bytes(size, "little")
            file.write_bytes(data)
        elif how == 2:
            self.flip(file, within=self.rng.choice([64, 2000, 40_000]))
        else:
            self.bytes(file)


def places(data: bytes, key: bytes) -> list[int]:
    """Where a key stands in a file."""
    found, at = [], data.find(key)
    while at >= 0:
        found.append(at)
        at = data.find(key, at + 1)
    return found
