"""A docstring stands alone, and that of a function or a method begins with an imperative: "Return ...", "Write ...".

Docstrings of classes, modules, properties and attributes are noun phrases.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import optprune

ROOT = Path(optprune.__file__).parent
FRAGMENTS = ("of", "by", "on", "in", "as", "from", "to", "with", "without", "per", "that", "at")
VERBS = """
Accumulate Acquire Add Allocate Allow Append Apply Approximate Ask Assert Assign Audit Begin Build Cache
Calibrate Call Cancel Centre Change Check Choose Clear Close Collect Combine Compare Compute Concatenate
Continue Convert Copy Correct Count Create Cut Damp Decide Delay Delete Describe Disable Distribute Divide Do
Download Draw Eliminate Enable Ensure Enter Enumerate Estimate Evaluate Exit Export Extend Feed Fill Filter Find
Finish Fit Flatten Flush Fold Format Free Fuse Gather Generate Give Group Handle Hash Heal Hide Hold Ignore
Import Improve Initialise Insert Install Interrupt Iterate Join Keep Label Leave Let Limit List Load Lock Log
Make Mark Match Measure Merge Minimise Move Multiply Name Normalise Note Notify Number Open Order Parse Pass
Perform Permute Pick Place Plan Plot Prepare Preserve Print Project Propagate Prune Pull Put Raise Read Rebuild
Record Redirect Reduce Refit Refuse Register Release Reload Remember Remove Rename Reorder Repeat Replace Report
Require Rescale Reserve Reset Reshape Resize Resolve Restore Restrict Resume Return Reuse Rewrite Rotate Round
Route Run Sample Save Scale Scan Search Select Send Serialise Serve Set Share Show Shrink Silence Simulate Skip
Solve Sort Split Start Stop Store Stream Submit Subtract Sum Swap Switch Sync Take Test Tighten Tokenise Trace
Train Transform Translate Transpose Try Turn Unlock Update Upload Use Validate Verify Wait Walk Warn Weigh Whiten Wrap
Write Yield
"""
"""the imperatives that a docstring may begin with, in order: add the one that you need"""
NOT_YET: set[str] = set()
"""the folders and modules whose docstrings still have to be rewritten: take the one that you finish off the list"""


def fragments(name: str, source: str) -> Iterator[str]:
    """Yield the docstrings of a file, those of attributes too, that begin in the middle."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            first = node.value.value.split()[0]
            if first in FRAGMENTS:
                yield f"{name}:{node.lineno} {node.value.value.splitlines()[0]}"


def is_property(node: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return any(ast.unparse(each).split(".")[-1] in {"property", "cached_property"} for each in node.decorator_list)


def not_imperative(name: str, source: str) -> Iterator[str]:
    """Yield the docstrings of the functions and methods of a file that do not begin with an imperative."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not is_property(node):
            docstring = ast.get_docstring(node)
            if docstring and docstring.split()[0].rstrip(",") not in VERBS.split():
                yield f"{name}:{node.lineno} {node.name}: {docstring.splitlines()[0]}"


def test_no_docstring_begins_in_the_middle() -> None:
    files = list(ROOT.rglob("*.py"))
    assert len(files) > 100, "the package was not found"
    assert [found for file in files for found in fragments(str(file.relative_to(ROOT)), file.read_text("utf-8"))] == []


def test_a_fragment_is_noticed() -> None:
    assert list(fragments("x.py", 'class A:\n    kind: str\n    """of problem"""\n')) == ["x.py:3 of problem"]
    assert not list(fragments("x.py", 'class A:\n    """Of a problem."""\n    kind: str\n    """the kind"""\n'))


def test_docstrings_of_functions_are_imperative() -> None:
    found: dict[str, list[str]] = {}
    for file in ROOT.rglob("*.py"):
        path = file.relative_to(ROOT)
        found.setdefault(path.parts[0], []).extend(not_imperative(str(path), file.read_text("utf-8")))
    assert [each for folder, several in found.items() if folder not in NOT_YET for each in several] == []
    assert {folder for folder in NOT_YET if not found.get(folder)} == set(), "take these off the list NOT_YET"


def test_a_docstring_without_an_imperative_is_noticed() -> None:
    source = 'def f():\n    """{}"""\n@property\ndef g():\n    """The size."""\ndef h():\n    pass\n'
    assert not list(not_imperative("x.py", source.format("Return the size.")))
    for first in ("The size.", "Returns the size.", "Whether it fits.", "|V|^2.", "return it"):
        assert list(not_imperative("x.py", source.format(first))) == [f"x.py:1 f: {first}"]
