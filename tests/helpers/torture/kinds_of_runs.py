"""Runs with inputs that are well formed and wrong all the same: measures of another model, budgets, others' folders."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from tests.helpers.torture.drawing import FAILED, Case, Drawn
from tests.helpers.torture.sandbox import MARK

LARGE = [6e4, 65504.0, 65519.0, 65520.0, 7e4, 8.4e6, 1e9, 1e30, 3e38]
"""the largest weight of a model: half precision ends at 65504, and the scale of q8_0 at 127 times that"""
TYPES = ["f32", "f16", "f16", "q8_0", "q8_0", "q6_K", "q5_K", "q5_0", "q4_K", "q4_0"]


def scales(drawn: Drawn) -> Case:
    """A model with large weights as GGUF: every number is there, within the rounding of the type, or it is refused."""
    import torch
    from safetensors.torch import load_file, save_file

    rng = drawn.rng
    folder = drawn.model(drawn.stock.model)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    weight = tensors[rng.choice(sorted(tensors))]
    largest = rng.choice(LARGE) * rng.choice([1, -1])
    how = rng.choice(["one", "row", "all"])
    if how == "all":
        weight *= largest / weight.abs().max()
    else:
        weight.view(-1)[: 1 if how == "one" else weight.shape[-1]] = largest
    dtype = rng.choice([torch.float32, torch.float32, torch.bfloat16])
    save_file({name: tensor.to(dtype) for name, tensor in tensors.items()}, file, {"format": "pt"})
    if dtype == torch.bfloat16:
        data = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(data | {"dtype": "bfloat16"}))
    kind = rng.choice(TYPES)
    drawn.output.parent.mkdir(exist_ok=True)
    case = drawn.export_gguf(type=kind)
    assert case.output is not None
    given = {"file": str(case.output), "folder": str(folder), "type": kind}
    # What is wrong with the logits of such a model is no fault of the file.
    return replace(
        case, kind=None, checks=(("values_of_gguf", given),), statuses=(0,) if kind == "f32" else (0, FAILED)
    )


def measured(drawn: Drawn) -> Case:
    """A page with what was measured of this model, of a copy of it, or of another model."""
    rng = drawn.rng
    name = rng.choice(["evaluation", "speed"])
    whose = rng.choice(["own", "own", "other", "other", "changed"])
    folder, place = drawn.pruned(), f"other_{name}" if whose == "other" else name
    if whose == "changed":
        data = bytearray((folder / "model.safetensors").read_bytes())
        data[-7] ^= 64
        (folder / "model.safetensors").write_bytes(data)
    drawn.output.parent.mkdir(exist_ok=True)
    case = drawn.report(**{name: getattr(drawn.stock, place)})
    return replace(case, statuses=(0,) if whose == "own" else (FAILED,))


def budget(drawn: Drawn) -> Case:
    """A small budget under --strict, for every recipe: it is reached, or the run is refused."""
    from optprune.recipe import recipe_names

    rng = drawn.rng
    recipe = rng.choice([name for name in recipe_names() if not set(name.split("_")) & {"experts", "expert", "reap"}])
    share = rng.choice([1e-9, 1e-5, 0.001, 0.003, 0.01, 0.02, 0.05, 0.1, 0.2, 0.37, 0.5, 0.9, 0.97, 0.999])
    more = ["--set", "allocation.multiple=1"] if rng.random() < 0.2 else []
    case = drawn.prune("--strict", *more, recipe=recipe, sparsity=share)
    given = {"dense": str(drawn.stock.model), "pruned": str(case.output), "asked": share}
    return replace(case, checks=(("sparsity", given),) if recipe not in ("vocabulary", "gptq") else ())


def foreign(drawn: Drawn) -> Case:
    """A folder of somebody else, or one of ours that somebody has changed: --overwrite leaves what is theirs."""
    rng = drawn.rng
    drawn.sandbox.output = place = drawn.sandbox.place / "mine"
    whose = rng.choice(["theirs", "theirs, with our report", "an edited file", "a file more", "no record", "ours"])
    shutil.copytree(drawn.stock.model if "theirs" in whose else drawn.stock.pruned, place)
    strays: list[Path] = []
    if "theirs" in whose:
        (place / "README.md").write_text("years of work")
        strays = sorted(place.iterdir())
        if "report" in whose:
            shutil.copy2(drawn.stock.pruned / "report.json", place)
    elif whose == "an edited file":
        file = place / rng.choice(["README.md", "config.json", "recipe.yaml", "model.safetensors", "tokenizer.json"])
        file.write_bytes(file.read_bytes() + rng.choice([b" ", b"\n# mine\n"]))
        strays = [file]
    elif whose == "a file more":
        file = place / rng.choice(["thesis.tex", "model-2.safetensors", "deep/data.bin", ".hidden", "notes.md"])
        file.parent.mkdir(exist_ok=True)
        file.write_text("years of work")
        strays = [file]
    elif whose == "no record":
        for name in ("report.json", "optprune.json"):  # the report, and the record of what was written
            (place / name).unlink()
        strays = sorted(place.iterdir())
    commands: list[Callable[..., Case]] = [drawn.prune, drawn.prune, drawn.heal]
    if "theirs" in whose:
        commands += [drawn.export_onnx, lambda *more: drawn.export_onnx(*more, format="transformers")]
    case = rng.choice(commands)("--overwrite")
    return replace(case, strays=tuple(strays), statuses=(FAILED,) if "theirs" in whose else (0, FAILED))


def frontier(drawn: Drawn) -> Case:
    """A frontier that is asked for wrongly first, and then rightly."""
    rng = drawn.rng
    wrong: dict[str, list[Any]] = {
        "types": ["x", "f16,x", "f16,f16", ""], "pruned_types": ["zz", ","], "seq_length": [0, -1, 1, 10**9],
        "windows": [0, -1, 10**9], "against": ["missing", drawn.stock.plain, drawn.sandbox.theirs],
        "recipes": ["x", "wanda,no/such.yaml"], "sparsities": ["0", "1", "nan", "x"], "units": ["x", MARK],
        "set": ["x=1", "sparsity", "seed=x"], "calibration": ["missing", drawn.stock.held], "repeats": [0, -1],
        "runtime": ["x"], "generations": [-1], "text": ["missing", drawn.stock.model], "samples": [0, 10**9],
        "prompt_tokens": [0, -1], "new_tokens": [0, -1],
    }  # fmt: skip
    name = rng.choice([*wrong, "against", "types", "recipes"])
    runtime = {"runtime": "transformers", "types": None, "pruned_types": None} if rng.random() < 0.5 else {}
    right = {"text": drawn.stock.held, "seq_length": 32, "windows": 2, "generations": 1, "types": "f16"} | runtime
    right |= {"pruned_types": "f16"} if not runtime else {}
    right |= {"against": drawn.stock.pruned}
    if rng.random() < 0.5:
        right |= {"recipes": "magnitude", "sparsities": "0.4", "calibration": drawn.stock.text, "samples": 4}
    else:
        wrong["samples"] = [0]  # without a calibration text no number is too large
    drawn.output.parent.mkdir(exist_ok=True)
    speed = ["--no-speed"] if name not in ("repeats", "prompt_tokens", "new_tokens") else []
    bad = drawn.frontier(*speed, **right | {name: rng.choice(wrong[name])})
    good = drawn.frontier("--no-speed", **right)
    return replace(good, first=(replace(bad, output=None, kind=None, statuses=(FAILED,)),), statuses=(0,))


def positions(drawn: Drawn) -> Case:
    """A model with few learned positions, for commands that send windows of their own through it."""
    from safetensors.torch import load_file, save_file

    rng = drawn.rng
    folder = drawn.model(drawn.stock.positions)
    count, file = rng.choice([2, 8, 31, 32, 33, 40, 64]), folder / "model.safetensors"
    tensors = load_file(file)
    for name in [name for name in tensors if "embed_positions" in name]:
        tensors[name] = tensors[name][: count + 2].clone()
    save_file(tensors, file, {"format": "pt"})
    data = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(data | {"max_position_embeddings": count}))
    chosen = rng.randrange(6)
    if chosen < 3:
        return drawn.prune(recipe=rng.choice(["fasp", "wanda", "vocabulary"]), vocabulary=rng.choice([300, 400, 0.5]))
    if chosen == 3:
        return drawn.prune(generated=2)
    return rng.choice([drawn.evaluate_against, drawn.plan, drawn.heal])()


def bits(drawn: Drawn) -> Case:
    """Fewer bits beside every recipe and pattern, and the folder that vLLM reads."""
    rng = drawn.rng
    kind = rng.choice(["none", "q4_0", "q5_0", "q8_0", "w4a16", "w4a16_shifted", "x", ""])
    options: dict[str, Any] = {"recipe": rng.choice(["gptq", "sparsegpt", "wanda", "alps", "fasp", "sparse_best"])}
    options |= rng.choice([{}, {}, {"sparsity": 0.3}, {"pattern": "2:4"}, {"sparsity": 0}, {"units": "mlp"}])
    fields = ["bits.group=16", "bits.group=16", "bits.group=0", "bits.group=7", f"bits.group={drawn.spoil.word()}"]
    more = ["--set", rng.choice(fields)] if kind.startswith("w4") and rng.random() < 0.7 else []
    return drawn.prune(*more, bits=kind, **options)


def packed(drawn: Drawn) -> Case:
    """A model that was pruned to four bits, or was not, as a folder for vLLM."""
    if drawn.rng.random() < 0.3:
        return drawn.export_packed()
    before = Drawn.prune(
        drawn, "--set", "bits.group=16", recipe="gptq", bits=drawn.rng.choice(["w4a16", "w4a16_shifted"])
    )
    made = drawn.output
    drawn.words = replace(drawn.words, pruned=made)
    drawn.sandbox.output = drawn.sandbox.place / "packed"
    case = drawn.export_packed()
    return replace(case, first=(before,), statuses=(0, FAILED))


def quantised(drawn: Drawn) -> Case:
    """A folder whose weights are quantised as published ones are, and spoiled."""
    from safetensors.torch import load_file, save_file

    rng = drawn.rng
    folder = drawn.model(drawn.stock.quantised / rng.choice(["fp8", "gptq", "awq"]))
    how = rng.randrange(5)
    if how == 0:
        drawn.spoil.safetensors(folder / "model.safetensors")
    elif how in (1, 2):
        data = json.loads((folder / "config.json").read_text())
        fields = data["quantization_config"]
        fields[rng.choice([*fields, "modules_to_not_convert", "desc_act", "bits"])] = drawn.spoil.value()
        (folder / "config.json").write_text(json.dumps(data))
    elif how == 3:
        tensors = load_file(folder / "model.safetensors")
        name = rng.choice([name for name in sorted(tensors) if "_proj." in name])
        changes: list[Callable[[Any], Any]] = [
            lambda one: one[:-1].clone(), lambda one: one.flatten(), lambda one: one[..., :0].clone(),
            lambda one: one.double(),
            lambda one: (one.float() * float("nan")).to(one.dtype),
            lambda one: one.t().contiguous() if one.ndim == 2 else one[:1].clone(),
        ]  # fmt: skip
        tensors[name] = rng.choice(changes)(tensors[name])
        if rng.random() < 0.2:
            del tensors[name]
        save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return drawn.reading()


def vision(drawn: Drawn) -> Case:
    """A model of text and images, whose processor, config or records are spoiled."""
    rng = drawn.rng
    folder = drawn.model(drawn.stock.vision)
    names = [
        "config.json",
        "processor_config.json",
        "preprocessor_config.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ]
    file = folder / rng.choice([name for name in names if (folder / name).exists()])
    if rng.random() < 0.7:
        drawn.spoil.json(file) if file.suffix == ".json" else drawn.spoil.bytes(file)
    calibration = rng.choice([f"images:{drawn.stock.records}", drawn.stock.text])
    chosen = rng.randrange(5)
    if chosen == 0:
        return drawn.reading()
    if chosen == 1:
        return drawn.plan(calibration=calibration)
    case = drawn.prune(calibration=calibration, recipe=rng.choice(["fasp", "wanda"]), samples=rng.choice([2, 4]))
    return replace(case, kind="vision")


def mixture(drawn: Drawn) -> Case:
    """The use of a mixture's experts by texts, and runs by scores that are spoiled."""
    rng = drawn.rng
    if rng.random() < 0.3:
        drawn.words = replace(drawn.words, model=drawn.stock.mixture)
        file = drawn.sandbox.inputs / "scores.json"
        file.write_text(json.dumps({"scores": {"0": [0.1, 0.2, 0.3, 0.4] * 2, "1": [1, 2, 3, 4] * 2}}))
        if rng.random() < 0.7:
            drawn.spoil.json(file)
        return drawn.prune(
            recipe=rng.choice(["reap", "expert_frequency", "experts_best"]),
            experts=rng.choice([2, 3, 7, 8, 0, 99]),
            expert_scores=file,
        )
    model = rng.choice([drawn.stock.mixture, drawn.stock.mixture, drawn.stock.mixture, drawn.stock.model])
    texts = [
        f"a={drawn.stock.text}",
        f"b={drawn.stock.plain}",
        "x",
        "=x",
        f"{MARK}={drawn.stock.text}",
        "a=missing",
        f"a={drawn.stock.plain}",
        f"={drawn.stock.text}",
    ]
    chosen = [texts[0], *rng.sample(texts, rng.choice([0, 1, 1, 2]))]
    options: dict[str, Any] = {"samples": 4, "seq_length": 32}
    changed = rng.choice(["samples", "seq_length", "seed", "by", "of", "sequences", "dtype", None, None])
    if changed is not None:
        options[changed] = rng.choice(["share", "weight", "a", "b", "0", drawn.spoil.word()])
    file = drawn.output.with_name("scores.json")
    return drawn.experts(model, chosen, file if rng.random() < 0.5 else None, options)


def layers(drawn: Drawn) -> Case:
    """The problems of a model's layers as files, with an option that may be any."""
    rng = drawn.rng
    options: dict[str, Any] = {"recipe": rng.choice(["fasp", "wanda", "sparsegpt", "osscar", "alps", "magnitude"])}
    words: dict[str, list[Any]] = {
        "layers": ["*.0.*", "*.9.*", "", "[", "*down_proj", MARK], "samples": [0, 1, 4], "seq_length": [1, 32, 10**9],
        "sparsity": [0, 1, 0.5, "nan", 0.001], "units": ["all", "weights", "experts", "x"],
        "pattern": ["2:4", "rows", "x"],
        "set": ["damping=0", "damping=nan", "x=1", "seed=-1"], "dtype": ["float16", "x"],
        "calibration": [drawn.stock.csv, "missing"],
    }  # fmt: skip
    name = rng.choice(list(words))
    return drawn.problems(**options | {name: rng.choice([*words[name], drawn.spoil.word()])})


def cluster(drawn: Drawn) -> Case:
    """A cluster at an address where nobody listens."""
    addresses = [
        "127.0.0.1:1",
        "127.0.0.1:9",
        "ray://127.0.0.1:1",
        "localhost:65535",
        "127.0.0.1:99999",
        "x",
        "",
        ":",
        MARK,
        "http://127.0.0.1:1",
    ]
    case = drawn.prune(f"--ray={drawn.rng.choice(addresses)}", recipe="alps", propagation="intra")
    return replace(case, statuses=(FAILED,))


def damaged_report(drawn: Drawn) -> Case:
    """A pruned folder whose report has one wrong field, which healing may find when it has healed."""
    folder = drawn.pruned()
    file = folder / "report.json"
    data = json.loads(file.read_text())
    node: Any = data
    while True:
        key = drawn.rng.choice(list(node)) if isinstance(node, dict) else drawn.rng.randrange(len(node))
        inner = node[key]
        if isinstance(inner, dict | list) and inner and drawn.rng.random() < 0.7:
            node = inner
            continue
        node[key] = drawn.spoil.value()
        break
    file.write_text(json.dumps(data))
    case = drawn.heal()
    return replace(case, checks=(("healed", {"folder": str(case.output)}),))
