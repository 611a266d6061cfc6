"""The kinds of malformed inputs: models, texts, recipes, options, places and runs, for all that read them."""

import json
import os
import shutil
import string
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.torture.drawing import Case, Drawn, damaged_json
from tests.helpers.torture.kinds_of_code import choice, in_memory, numbers, own_objective, own_solver, stated
from tests.helpers.torture.kinds_of_runs import (
    bits,
    budget,
    cluster,
    damaged_report,
    foreign,
    frontier,
    layers,
    measured,
    mixture,
    packed,
    positions,
    quantised,
    scales,
    vision,
)
from tests.helpers.torture.kinds_of_texts import constant, folder, lines, parquet, records, table
from tests.helpers.torture.sandbox import MARK, TAG
from tests.helpers.torture.stock import RUNS

CONFIG_FIELDS = [
    *("text_config", "sliding_window", "quantization_config", "transformers_weights", "auto_map", "rope_scaling"),
    *("optprune_shapes", "rope_parameters", "_name_or_path", "architectures", "torch_dtype", "layer_types"),
]
OF_A_MODEL = ["config.json", "tokenizer.json", "tokenizer_config.json"]
OPTIONS = [
    *("--samples", "--seq-length", "--seed", "--dtype", "--save-dtype", "--device", "--units", "--pattern"),
    *("--propagation", "--sparsity", "--width-multiple", "--allocation", "--recipe", "--calibration", "--json"),
    *("--workers", "--states", "--max-shard-size", "--target", "--sequences", "--lanes", "--architecture", "--log"),
]
OF_RECIPES = ["2:4", "rows", "all", "kv-groups", "blocks", "global", "cross"]


def config(drawn: Drawn) -> Case:
    file = drawn.model() / "config.json"
    if drawn.rng.random() < 0.5:
        drawn.spoil.json(file)
    else:
        data = json.loads(file.read_text())
        data[drawn.rng.choice([*data, *CONFIG_FIELDS])] = drawn.spoil.value()
        file.write_text(json.dumps(data))
    return drawn.reading()


def weights(drawn: Drawn) -> Case:
    drawn.spoil.safetensors(drawn.model() / "model.safetensors")
    return drawn.reading()


def index(drawn: Drawn) -> Case:
    drawn.spoil.json(drawn.model(drawn.stock.sharded) / "model.safetensors.index.json")
    return drawn.reading()


def tokenizer(drawn: Drawn) -> Case:
    file = drawn.model() / drawn.rng.choice(["tokenizer.json", "tokenizer_config.json"])
    if file.name == "tokenizer.json" and drawn.rng.random() < 0.2:
        data = json.loads(file.read_text())
        size = 10 ** drawn.rng.randrange(1, 7)
        data["normalizer"] = {"type": "Replace", "pattern": {"String": "e"}, "content": "x" * size}
        file.write_text(json.dumps(data))
    else:
        drawn.spoil.json(file)
    return drawn.reading()


def gguf(drawn: Drawn) -> Case:
    file = drawn.sandbox.copied(drawn.stock.gguf)
    drawn.spoil.gguf(file)
    drawn.words = replace(drawn.words, model=file, pruned=file)
    reading = [Drawn.prune, Drawn.plan, Drawn.evaluate, Drawn.audit, Drawn.compare]
    return drawn.rng.choice(reading)(drawn)


def against(drawn: Drawn) -> Case:
    """A dense model that is spoiled, or of other tokens or shapes, beside a good one."""
    dense = drawn.sandbox.copied(drawn.rng.choice([drawn.stock.model, drawn.stock.gguf, drawn.stock.sharded]), "dense")
    if dense.is_file():
        drawn.spoil.gguf(dense)
    else:
        names = [
            "config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            *(file.name for file in dense.glob("*.saf*")),
        ]
        file = dense / drawn.rng.choice(names)
        (drawn.spoil.safetensors if file.suffix == ".safetensors" else drawn.spoil.json)(file)
    chosen = drawn.rng.randrange(4)
    if chosen == 0:
        return drawn.evaluate(against=dense, generations=drawn.rng.choice([0, 2, 7]))
    if chosen == 1:
        return drawn.heal(teacher=dense)
    if chosen == 2:
        return drawn.audit(against=dense)
    return drawn.report(against=dense, text=drawn.stock.held, seq_length=32, windows=2, generations=1)


def recipe(drawn: Drawn) -> Case:
    from optprune.recipe import load_recipe, recipe_names
    from optprune.recipe.reference import spellings

    file = drawn.sandbox.inputs / "recipe.yaml"
    text = load_recipe(drawn.rng.choice(recipe_names())).to_yaml()
    how = drawn.rng.randrange(3)
    file.write_text(text, encoding="utf-8")
    if how == 0:
        drawn.spoil.bytes(file)
    elif how == 1:
        file.write_text(text + "".join(drawn.rng.choices(string.printable, k=30)), encoding="utf-8")
    else:
        name = drawn.rng.choice(spellings())
        value = solver(drawn) if name == "solver" else drawn.spoil.value()
        file.write_text(json.dumps({**load_recipe("fasp").to_dict(), name: value}))
    chosen = drawn.rng.randrange(3)
    if chosen == 0:
        return drawn.compare(recipes=file)
    return drawn.prune(recipe=file) if chosen == 1 else drawn.plan(recipe=file)


def solver(drawn: Drawn) -> Any:
    from optprune.recipe.names import SOLVERS

    name = drawn.rng.choice([*SOLVERS, "x"])
    option = drawn.rng.choice(["rho", "tolerance", "batch", "most", "inner_steps", "seed", "stages", "block", "x"])
    choices = [name, [name, name], {name: {option: drawn.spoil.value()}}, {name: option}, [[name]]]
    return drawn.rng.choice(choices)


def allocation(drawn: Drawn) -> Case:
    from optprune.allocation.uniform import uniform
    from optprune.models import Decoder, Mlp
    from tests.helpers.tiny_models import tiny_llama

    file = drawn.sandbox.inputs / "allocation.json"
    file.write_text(uniform(Decoder(tiny_llama()), 0.2, Mlp(), 8).to_json())
    drawn.spoil.json(file)
    return drawn.rng.choice([drawn.prune, drawn.plan])(allocation=file)


def text(drawn: Drawn) -> Case:
    """A text of any form, for every command that reads one."""
    sources = [drawn.stock.text, drawn.stock.csv, drawn.stock.parquet, drawn.stock.plain]
    file = drawn.sandbox.copied(drawn.rng.choice(sources), None)
    how = drawn.rng.randrange(5)
    if how == 0:
        strange_text(drawn, file)
    elif how == 1 and file.suffix == ".parquet":
        drawn.spoil.flip(file)
    elif how == 2:
        file = file.rename(file.with_suffix(drawn.rng.choice([".txt", ".jsonl", ".csv", ".parquet", ".bin", ""])))
        drawn.spoil.bytes(file)
    else:
        drawn.spoil.bytes(file)
    named = f"{file}{drawn.rng.choice(['', '', '', '', ':text', ':x', ':', ':more'])}"
    chosen = drawn.rng.randrange(6)
    calls: list[Callable[[], Case]] = [
        lambda: drawn.prune(calibration=named),
        lambda: drawn.prune(calibration=f"{named}=0.5,{drawn.stock.plain}=0.5"),
        lambda: drawn.evaluate(text=named),
        lambda: drawn.heal(text=named),
        lambda: drawn.compare(calibration=named),
        lambda: drawn.plan(calibration=named),
    ]
    return calls[chosen]()


def strange_text(drawn: Drawn, file: Path) -> None:
    """Have a file whose form is right and whose content is odd."""
    import pyarrow
    from pyarrow import parquet

    if file.suffix == ".parquet":
        columns: list[Any] = [
            pyarrow.array([[1, 2], [3]]), pyarrow.array([b"\xff\xfe", b"x"]), pyarrow.array([None, None], "string"),
            pyarrow.array([{"role": "user"}, None]), pyarrow.array(["a", "a"]).dictionary_encode(),
            pyarrow.array([1.5, float("nan")]), pyarrow.array([[{"role": "user", "content": "x" * 99}]] * 2),
            pyarrow.array([f"{MARK} word " * 99] * 2), pyarrow.array(["", " "]),
        ]  # fmt: skip
        name = drawn.rng.choice(["text", "text", "messages", "", MARK, "text:x"])
        parquet.write_table(pyarrow.table({name: drawn.rng.choice(columns)}), file)
        return
    deep = "[" * 100_000
    lines = [
        f'{{"text": {deep}', '{"text": "a", "text": "b"}', '{"text": "\\ud800"}', '{"text": "a\\u0000b"}',
        json.dumps({"messages": [{"role": "user", "content": "x"}] * 3}), json.dumps({"text": "one " * 300_000}),
        json.dumps({MARK: "x"}), json.dumps({"text": MARK * 9}), "null", "[]", "1e999", '{"text": 1e999}',
        json.dumps({"messages": [{"role": MARK, "content": TAG}]}), json.dumps({"text": "é\u2028" * 99}), " " * 10**6,
    ]  # fmt: skip
    if drawn.rng.random() < 0.15:
        file.write_bytes(drawn.rng.choice(["utf-16", "utf-32", "latin-1"]) and "one two é ".encode("utf-16") * 99)
    else:
        file.write_text("\n".join(drawn.rng.choices(lines, k=drawn.rng.choice([1, 3]))), encoding="utf-8")


def option(drawn: Drawn) -> Case:
    from optprune.recipe.reference import spellings

    word = drawn.rng.choice([drawn.spoil.word(), drawn.rng.choice(OF_RECIPES)])
    command = drawn.rng.choice([drawn.prune, drawn.prune, drawn.plan])
    if drawn.rng.random() < 0.3:
        return command("--set", f"{drawn.rng.choice(spellings())}={word}")
    name = drawn.rng.choice(OPTIONS)
    if name in ("--json", "--log"):
        # Wherever the word leads to: among the inputs, never into the working folder of the tests.
        file = drawn.sandbox.inputs / word.lstrip("/~")[:300]
        return replace(command(f"{name}={file}"), files={file: "json"} if name == "--json" else {file: "log"})
    if name == "--workers":
        word = drawn.rng.choice(["0", "-1", "1000000", "x", "1.5", "9" * 30, "1"])
    return command(f"{name}={word}")


def output(drawn: Drawn) -> Case:
    """A place where an output cannot be, or where something of somebody else is."""
    folder = drawn.sandbox.place
    (folder / "file").write_text("a file")
    (folder / "loop").symlink_to("loop")
    (folder / "full").mkdir()
    (folder / "full" / "thesis.tex").write_text("years of work")
    (folder / "linked").symlink_to(drawn.sandbox.theirs)
    shutil.copytree(drawn.stock.model, folder / "other")
    os.mkfifo(folder / "pipe")
    names = ["file", "file/x", "loop", "loop/x", "full", "pipe", "pipe/x", "x" * 300, "", ".", "..", "é" * 130, "a\nb"]
    names += ["linked", "linked/x", "other", "other/config.json", MARK, TAG, "full/.part", "../place/new"]
    name = drawn.rng.choice([*names, os.fsdecode(b"o\xff"), "new/" * 9 + "out", " ", "-", "~", "$HOME", "\u2028"])
    drawn.sandbox.output = folder / name
    more = ["--overwrite"] if drawn.rng.random() < 0.5 else []
    commands = [drawn.prune, drawn.prune, drawn.heal, drawn.export_gguf, drawn.export_onnx, drawn.compare]
    command = drawn.rng.choice(commands)
    return command() if command == drawn.compare else command(*more)


def drafts(drawn: Drawn) -> Case:
    """Nothing is wrong but what lies beside the output, at names that a command may use."""
    drawn.sandbox.output = drawn.sandbox.place / drawn.rng.choice(["out", "out.gguf"])
    for name in (f".{drawn.output.name}.part", f"{drawn.output.name}.run"):
        if drawn.rng.random() < 0.7:
            drawn.sandbox.thing(drawn.sandbox.place / name)
    more = drawn.rng.choice([[], ["--resume"], ["--overwrite"], ["--restart"], ["--restart", "--overwrite"]])
    chosen = drawn.rng.randrange(5)
    if chosen == 0:
        return drawn.export_gguf()
    if chosen == 1:
        folder = drawn.output
        folder.mkdir()
        for name in drawn.rng.sample(["work", "models", "cells", "run.json", "in-use"], 2):
            drawn.sandbox.thing(folder / name)
        return drawn.compare()
    if chosen == 2 and drawn.rng.random() < 0.3:
        return drawn.export_onnx()
    return drawn.heal(*more) if chosen == 3 else drawn.prune(*more)


def heal(drawn: Drawn) -> Case:
    """Options of healing, and a pruned folder whose report or description is spoiled."""
    if drawn.rng.random() < 0.5:
        names = ["tokens", "epochs", "generated", "seq_length", "batch_size", "learning_rate", "held_out", "seed"]
        names += ["dtype", "device", "teacher"]
        large = drawn.rng.choice(["4611686018427387904", str(2**63), str(2**64), "-5", "1e-300", "0"])
        return drawn.heal(**{drawn.rng.choice(names): drawn.rng.choice([drawn.spoil.word(), large])})
    folder = drawn.pruned()
    file = folder / drawn.rng.choice(
        ["report.json", "config.json", "generation_config.json", "README.md", "recipe.yaml"]
    )
    spoiled(drawn, file)
    return drawn.heal()


def spoiled(drawn: Drawn, file: Path) -> None:
    """Spoil a file of a pruned folder, which may be a link to one of somebody else."""
    if drawn.rng.random() < 0.15:
        file.unlink(missing_ok=True)
        file.symlink_to(drawn.rng.choice([drawn.sandbox.theirs / "thesis.tex", drawn.sandbox.theirs, Path("missing")]))
    elif file.suffix == ".json":
        drawn.spoil.json(file)
    else:
        drawn.spoil.bytes(file)


def compare(drawn: Drawn) -> Case:
    options: dict[str, list[Any]] = {
        "recipes": ["fasp,fasp", ",", "fasp,", "x", MARK, "fasp,no/such.yaml", "depth,fasp", "uniform"],
        "sparsities": ["0", "1", "0.4,0.4", "nan", "inf", "-0.1", "1e-9", "0.4,", MARK, "0.999"],
        "seeds": [0, -1, 2, 10**6, 2**64], "samples": [0, -1, 10**9, 1], "seq_length": [0, 1, -1, 10**9, 512],
        "windows": [0, -1, 10**9, 1], "units": ["x", "mlp", "experts", MARK], "pattern": ["3:2", "0:0", "rows", "x"],
        "text": [drawn.stock.text, drawn.stock.plain, "missing", MARK], "dtype": ["float16", "bfloat16", "x"],
        "json": [drawn.sandbox.theirs, drawn.sandbox.place / "no" / "x.json", drawn.output / "comparison.json"],
        "propagation": ["cross", "x", "local"], "sequences": ["whole", "x"],
    }  # fmt: skip
    name = drawn.rng.choice(list(options))
    value = drawn.rng.choice([*options[name], drawn.spoil.word()])
    case = drawn.compare(**{name: value})
    if name == "json" and isinstance(value, str):
        return replace(case, files={drawn.sandbox.inputs / value: "json"})
    return case


def report(drawn: Drawn) -> Case:
    """A report that is spoiled, or what was measured since."""
    chosen = drawn.rng.randrange(4)
    folder = drawn.pruned()
    if chosen < 2:
        spoiled(drawn, folder / "report.json")
        return drawn.rng.choice([drawn.report, drawn.audit])()
    if chosen == 2:
        file = drawn.sandbox.copied(drawn.stock.evaluation)
        drawn.spoil.json(file)
        return drawn.report(**{drawn.rng.choice(["evaluation", "evaluation", "speed"]): file})
    name = drawn.rng.choice(["config.json", "recipe.yaml", "README.md", "model.safetensors"])
    file = folder / name
    (drawn.spoil.safetensors if file.suffix == ".safetensors" else lambda one: spoiled(drawn, one))(file)
    return drawn.report()


def audit(drawn: Drawn) -> Case:
    folder = drawn.pruned()
    expect = ["2:4", "rows", "sparsity=0.5", "sparsity=0.9..0.1", "multiple=0", "dead=-1", "0:0", "sparsity=nan", "x=y"]
    chosen = drawn.rng.randrange(3)
    if chosen == 0:
        return drawn.audit(expect=drawn.rng.choice([*expect, drawn.spoil.word()]))
    if chosen == 1:
        places = ["x.png", "x.svg", "x.exe", "no/x.pdf", "config.json", ".", ""]
        file = drawn.sandbox.inputs / drawn.rng.choice(places)
        case = drawn.audit(plot=file)
        return replace(case, files={**(case.files or {}), file: "plot"})
    spoiled(drawn, folder / drawn.rng.choice(["report.json", "config.json"]))
    return drawn.audit(against=drawn.rng.choice([drawn.stock.model, drawn.stock.gguf, folder, None]))


def evaluate(drawn: Drawn) -> Case:
    if drawn.rng.random() < 0.5:
        file = drawn.sandbox.copied(drawn.stock.questions)
        lines = [
            '{"question": "x", "choices": [], "answer": 0}', '{"question": "", "choices": ["", ""], "answer": 1}',
            '{"question": "x", "choices": ["a", "b"], "answer": 7}', '{"question": 1, "choices": "ab", "answer": -1}',
            json.dumps({"question": MARK, "choices": [MARK, "b"], "answer": 0}), "null", "{}", "[1]",
            json.dumps({"question": "x " * 9999, "choices": ["a", "b"], "answer": True}),
        ]  # fmt: skip
        if drawn.rng.random() < 0.5:
            file.write_text("\n".join(drawn.rng.choices(lines, k=2)))
        else:
            drawn.spoil.bytes(file)
        return drawn.evaluate(questions=file)
    names = ["seq_length", "windows", "generations", "limit", "task_batch", "tasks", "device", "dtype", "include_path"]
    return drawn.evaluate_against(**{drawn.rng.choice(names): drawn.spoil.word()})


def export(drawn: Drawn) -> Case:
    """A folder that is spoiled, or an option that is wrong."""
    command = drawn.rng.choice([drawn.export_gguf, drawn.export_gguf, drawn.export_onnx])
    if drawn.rng.random() < 0.25:
        name = drawn.rng.choice(["type", "format"])
        return command(**{name: drawn.spoil.word()})
    folder = drawn.model()
    choices = [*OF_A_MODEL, "generation_config.json", "model.safetensors"]
    name = drawn.rng.choice([*choices, "LICENSE", "special_tokens_map.json", "chat_template.jinja"])
    file = folder / name
    if name == "model.safetensors":
        drawn.spoil.safetensors(file)
    elif file.is_file():
        spoiled(drawn, file)
    else:
        contents = ["\xff", MARK, "{{ x", "{% for %}", "[]", "x" * 10**6]
        file.write_text(drawn.rng.choice(contents))
        if drawn.rng.random() < 0.3:
            file.unlink()
            file.symlink_to(drawn.rng.choice([drawn.sandbox.theirs / "thesis.tex", drawn.sandbox.theirs]))
    return command()


def plan(drawn: Drawn) -> Case:
    """A folder with a config alone, whose numbers may be any."""
    folder = drawn.model(drawn.stock.model)
    if drawn.rng.random() < 0.6:
        for file in folder.iterdir():
            if file.name != "config.json":
                file.unlink()
    file = folder / "config.json"
    data = json.loads(file.read_text())
    numbers = [key for key, value in data.items() if isinstance(value, int | float)]
    data[drawn.rng.choice(numbers)] = drawn.rng.choice(
        [0, -1, 1, 3, 10**3, 10**6, 10**9, 10**18, 2**64, 0.5, MARK, None]
    )
    file.write_text(json.dumps(data))
    return drawn.plan()


def goal(drawn: Drawn) -> Case:
    """A goal that may be any text or number, beside options that it may not go with."""
    sizes = [
        "900KiB",
        "1KiB",
        "0MiB",
        "-1MB",
        "1e9GB",
        "9" * 30 + "GB",
        "1.0x",
        "1e-9x",
        "nanx",
        "infMiB",
        "1.2 x",
        "x",
    ]
    more = drawn.rng.choice(
        [[], ["--resume"], ["--recipe=wanda"], ["--recipe=depth"], ["--vocabulary=400"], ["--sparsity=0.2"]]
    )
    if drawn.rng.random() < 0.5:
        return drawn.prune(f"--to={drawn.rng.choice([*sizes, drawn.spoil.word()])}", *more)
    ratio = drawn.rng.choice(["1.5", "1", "nan", "inf", "-1", "1e30", "1.0000000001", drawn.spoil.word()])
    text = drawn.rng.choice([drawn.stock.held, drawn.stock.text, drawn.stock.model, ""])
    return drawn.prune(
        f"--to-quality={ratio}", f"--text={text}", f"--windows={drawn.rng.choice(['2', '0', '-1'])}", *more
    )


def problem(drawn: Drawn) -> Case:
    """A file of a problem that is spoiled, or solved by any solver."""
    file = drawn.sandbox.copied(drawn.stock.problem)
    if drawn.rng.random() < 0.5:
        from optprune.problems import save_problem
        from tests.helpers.bound_cases import SOLVERS as BY_KIND
        from tests.helpers.bound_cases import case
        from tests.helpers.structured_cases import grouped_query

        kind, seed = drawn.rng.choice([*BY_KIND, "slots", "slots"]), drawn.rng.randrange(9)
        file.unlink()
        save_problem(grouped_query(seed, "mixed") if kind == "slots" else case(kind, seed), file)
        drawn.spoil.problem(file)
    elif drawn.rng.random() < 0.6:
        drawn.spoil.safetensors(file)
    name = drawn.rng.choice(
        ["auto", "wanda", "[wanda, swaps]", "reap", "os:getcwd", "x:y", json.dumps(solver(drawn)), ""]
    )
    words = ["solve", str(file), f"--solver={name}", f"--max-steps={drawn.rng.choice(['5', '0', '-1', '9' * 20])}"]
    answer = drawn.output.with_name("answer.safetensors")
    return Case([*words, f"--output={answer}"], files={answer: "solution"}, statuses=(0, 1, 2))


def damaged_run(drawn: Drawn) -> Case:
    """A run that was stopped, whose folder is not as it was left."""
    name = drawn.rng.choice(list(RUNS))
    drawn.sandbox.output = drawn.sandbox.place / "out"
    place = drawn.output if name == "compare" else drawn.run
    shutil.copytree(drawn.stock.runs / name, place)
    strays: list[Path] = []
    for _ in range(drawn.rng.choice([1, 1, 1, 2])):
        damage(drawn, place, strays)
    option = drawn.rng.choice(["--resume", "--resume", "--resume", "--restart"])
    case = getattr(drawn, name)(*([] if name == "compare" else [option]))
    return replace(case, run=place, whole=drawn.stock.whole / name, strays=tuple(strays))


def damage(drawn: Drawn, place: Path, strays: list[Path]) -> None:
    """Do something to a run folder."""
    files = sorted(file for file in place.rglob("*") if file.is_file() and file.name != "in-use")
    (file, other), how = drawn.rng.sample(files, 2), drawn.rng.randrange(8)
    if how == 0:
        drawn.spoil.flip(file)
    elif how == 1:
        drawn.spoil.bytes(file)
    elif how == 2:
        file.unlink()
    elif how == 3:
        shutil.copy2(other, file)
    elif how == 4:
        data, others = file.read_bytes(), other.read_bytes()
        file.write_bytes(others)
        other.write_bytes(data)
    elif how == 5:
        names = ["block-x.json", "block-99999.json", "notes.txt", "state-x.safetensors", "metric-x.sums", "x.part"]
        stray = place / drawn.rng.choice([*names, "cells/x.json" if (place / "cells").is_dir() else "y"])
        stray.write_text(drawn.rng.choice(["{}", "mine", "null"]))
        strays.append(stray)
    elif how == 6:
        file.unlink()
        file.symlink_to(drawn.sandbox.theirs / "thesis.tex")
    elif file.suffix == ".json":
        damaged_json(drawn, file)


KINDS: dict[str, Callable[[Drawn], Case]] = {
    kind.__name__: kind
    for kind in (
        config, weights, index, tokenizer, gguf, against, recipe, allocation, text, option, output, drafts, heal,
        compare, report, audit, evaluate, export, plan, damaged_run, goal, problem,
        table, lines, parquet, folder, records, constant, scales, measured, budget, foreign, frontier, positions, bits,
        packed, quantised, vision, mixture, layers, cluster, damaged_report, own_solver, own_objective, choice, numbers,
        stated, in_memory,
    )
}  # fmt: skip
