"""Counts of the source: lines of code by package, fields of the largest classes, and how far knowledge is spread.

`python -m benchmarks.house` prints the table. A line of code is a line that is neither blank nor a comment, and no part
of the docstring of a module, class or function.
"""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "optprune"
DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
PARTS = ("mixture", "recurrent", "latent", "shared")
"""the attributes of an architecture that say which parts its blocks have"""
UNIT_KINDS = ("Blocks", "Experts", "KvGroups", "LinkedUnits", "Mlp", "Pairs", "RecurrentHeads", "Values", "Weights")
"""the classes of unit kinds"""
FALCON = re.compile(r"falcon[-_ ]?h1", re.IGNORECASE)
FAMILY = re.compile(
    r"(?<![a-z])(?:deepseek|exaone|falcon|gemma|glm|gpt[-_ ]?2|gpt[-_ ]?neox|gpt[-_ ]?oss|granite|lfm2|"
    r"llama(?!\.cpp|[-_]?cpp)|llava|ministral|mistral|mixtral|nemotron|olmo|phi[-_]?3|qwen|seed[-_ ]oss|smollm3)",
    re.IGNORECASE,
)
"""the name of a model family; llama.cpp is a runtime"""


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def documentation(tree: ast.Module) -> set[int]:
    """Return the numbers of the lines of docstrings."""
    lines = set[int]()
    for node in ast.walk(tree):
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            first: ast.stmt = next(iter(node.body))
            lines |= set(range(first.lineno, (first.end_lineno or 0) + 1))
    return lines


def code_lines(file: Path) -> int:
    """Return the number of lines of code in a file."""
    lines = file.read_text(encoding="utf-8").splitlines()
    left = documentation(tree_of(file))
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and number not in left
        for number, line in enumerate(lines, start=1)
    )


def files_in(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.py"))


def lines_by_room() -> dict[str, int]:
    """Return the lines of code of each folder of the package, of its root, and of the folders beside it."""
    found = Counter[str]()
    for file in files_in(PACKAGE):
        found["/".join(file.relative_to(ROOT).parts[:-1][:2])] += code_lines(file)
    for folder in ("optprune", "tests", "benchmarks"):
        found[f"{folder} in all"] = sum(map(code_lines, files_in(ROOT / folder)))
    return dict(sorted(found.items()))


def fields_of_classes(folder: Path) -> list[tuple[int, str]]:
    """Return the number of annotated fields of each class of a folder, the largest first."""
    found = list[tuple[int, str]]()
    for file in files_in(folder):
        for node in ast.walk(tree_of(file)):
            if isinstance(node, ast.ClassDef):
                count = sum(isinstance(each, ast.AnnAssign) for each in node.body)
                found.append((count, f"{file.relative_to(PACKAGE)}:{node.name}"))
    return sorted(found, reverse=True)


def words_of(file: Path) -> str:
    """Return the code of a file without its docstrings and comments."""
    left = documentation(tree_of(file))
    lines = file.read_text(encoding="utf-8").splitlines()
    return "\n".join(
        line for number, line in enumerate(lines, 1) if number not in left and not line.strip().startswith("#")
    )


def conditions(tree: ast.Module) -> Iterator[ast.expr]:
    """Yield the expressions that decide between branches."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If | ast.IfExp | ast.While | ast.Assert):
            yield node.test
        elif isinstance(node, ast.comprehension):
            yield from node.ifs
        elif isinstance(node, ast.BoolOp):
            yield node


def branches_on_parts(file: Path) -> int:
    """Return how many conditions of a file ask which parts an architecture has."""
    asked = set[tuple[int, int]]()
    for condition in conditions(tree_of(file)):
        for node in ast.walk(condition):
            if isinstance(node, ast.Attribute) and node.attr in PARTS:
                asked.add((node.lineno, node.col_offset))
    return len(asked)


def kinds_asked(file: Path) -> int:
    """Return how many calls of isinstance in a file ask for a unit kind."""
    return sum(
        isinstance(node, ast.Call)
        and isinstance(node.func, ast.Name)
        and node.func.id == "isinstance"
        and any(isinstance(name, ast.Name) and name.id in UNIT_KINDS for name in ast.walk(node.args[1]))
        for node in ast.walk(tree_of(file))
    )


def inner_imports(file: Path) -> int:
    """Return the number of imports inside functions of a file."""
    return sum(
        isinstance(node, ast.Import | ast.ImportFrom)
        for function in ast.walk(tree_of(file))
        if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        for node in function.body + [inner for each in function.body for inner in ast.walk(each) if inner is not each]
    )


def counts() -> dict[str, int]:
    """Return what is counted, beside the lines of each room."""
    models, every = PACKAGE / "models", files_in(PACKAGE)
    outside = [file for file in every if not file.is_relative_to(models)]
    python = [file for folder in ("optprune", "tests", "benchmarks") for file in files_in(ROOT / folder)]
    return {
        "fields of the largest class of models/": fields_of_classes(models)[0][0],
        "files outside models/ that name a family": sum(bool(FAMILY.search(words_of(file))) for file in outside),
        "files that branch on the presence of a part": sum(branches_on_parts(file) > 0 for file in every),
        "isinstance on unit kinds outside their module": sum(
            kinds_asked(file) for file in every if file != models / "units.py"
        ),
        "Python files with Falcon-H1": sum(
            bool(FALCON.search(file.read_text(encoding="utf-8"))) for file in python if file != Path(__file__)
        ),
        "lines of code in models/pruned": sum(map(code_lines, files_in(models / "pruned"))),
        "imports inside functions": sum(map(inner_imports, every)),
    }


def main() -> None:
    rows = lines_by_room() | counts()
    wide = max(map(len, rows))
    for name, count in rows.items():
        print(f"{name:<{wide}}  {count:>6,}")
    for number, name in fields_of_classes(PACKAGE)[:5]:
        print(f"{number} fields: {name}")


if __name__ == "__main__":
    main()
