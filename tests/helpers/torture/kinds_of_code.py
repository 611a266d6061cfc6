"""Programs that use the library: solvers and objectives of one's own, odd tensors, solution files, models in memory.

A program judges its result by sums of its own, and raises `AssertionError` where that is another.
"""

import json
from pathlib import Path
from typing import Any

from tests.helpers.torture.drawing import FAILED, Case, Drawn

SOLVER = """
import torch
from dataclasses import dataclass
from optprune.solvers import Solver
from optprune.solvers.base import Certificate, Status
from optprune.work import Work

{above}

class Mine(Solver):
    def work(self, outputs, inputs, *, coupled=False):
        {work}
        return Work()

    def init(self, problem, start):
        {init}
        return start.clone()

    def step(self, problem, state):
        {step}
        return state

    def done(self, problem, state):
        {done}
        return Status.CONVERGED

    def value(self, problem, state):
        # two of four in every row, by size
        parts = state.unflatten(1, (-1, 4))
        kept = torch.zeros_like(parts).scatter_(2, parts.abs().topk(2, dim=2).indices, 1.0)
        state = (parts * kept).flatten(1)
        {value}
        return state

    def certify(self, problem, state):
        {certify}
        return None

    def notes(self, state):
        {notes}
        return ()
"""
RAISED = [
    "raise ZeroDivisionError('boom')", "raise KeyError('boom')", "raise RuntimeError('CUDA boom')", "[][3]", "1 / 0",
    "raise ValueError('boom')", "raise MemoryError", "assert False", "raise AssertionError", "None.x", "missing_name",
    "torch.zeros(2) @ torch.zeros(3)", "raise StopIteration", "raise Exception", "raise OSError('boom')",
    "raise TypeError('a\\nb')", "raise LookupError('boom')", "(lambda f: f(f))(lambda f: f(f))",
    "raise NotImplementedError",
    "torch.zeros(3)[7]", "raise UnicodeDecodeError('utf-8', b'x', 0, 1, 'boom')", "import nothing_like_it",
]  # fmt: skip
"""what code may raise by an accident"""
OTHER = [
    "state.half()", "state.double()", "state.float()", "state.bfloat16()", "state.int()", "state.long()",
    "state.bool()",
    "state.to(torch.complex64)", "state * float('nan')", "state * float('inf')", "state[:1]", "state[None]",
    "state.t()",
    "None", "3.0", "'x'", "state.tolist()", "state.numpy()", "state.to_sparse()", "state.to('meta')", "(state,)",
    "state.requires_grad_()", "state[:, ::2]", "state.flip(0)", "torch.ones_like(state)", "state * 1e300", "state * 0",
    "state.index_fill(0, torch.tensor([0]), float('nan'))", "problem.loss.weight",
    "state.unsqueeze(0).expand(2, -1, -1)",
]  # fmt: skip
"""what code may return in place of a weight"""


def own_code(drawn: Drawn) -> tuple[str, str | None]:
    """A module with a solver that does one thing wrongly, and what the refusal must name if it raises."""
    rng = drawn.rng
    parts = dict.fromkeys(("work", "init", "step", "done", "value", "certify", "notes"), "pass") | {"above": ""}
    how = rng.choice(
        ["raises", "raises", "returns", "returns", "returns", "done", "certify", "notes", "writes", "import", "lacks"]
    )
    if how == "raises":
        parts[rng.choice(["init", "step", "done", "value", "certify", "notes"])] = rng.choice(RAISED)
        return SOLVER.format(**parts), "own.py"
    if how == "returns":
        parts[rng.choice(["value", "value", "value", "init"])] = f"return {rng.choice(OTHER)}"
    elif how == "done":
        parts["done"] = f"return {rng.choice(['None', 'True', '0', repr('x'), 'Status', 'torch.tensor(1)'])}"
    elif how == "certify":
        found = [
            "Certificate(float('nan'), 'x')",
            "3",
            "Certificate('x', 'y')",
            "Certificate(1e30, 'x')",
            "Certificate(-1, None)",
        ]
        parts["certify"] = f"return {rng.choice(found)}"
    elif how == "notes":
        parts["notes"] = f"return {rng.choice(['None', repr('abc'), '(1,)', '3', '[None]'])}"
    elif how == "lacks":
        return SOLVER.format(**parts).replace(
            rng.choice(["def init", "def value", "def work", "def done"]), "def other"
        ), None
    elif how == "writes":
        parts[rng.choice(["init", "step", "value"])] = "problem.loss.weight.zero_()"
    else:
        parts["above"] = rng.choice([*RAISED, "def f(:", "Mine = 3", "from optprune import nothing"])
    return SOLVER.format(**parts), None


def own_solver(drawn: Drawn) -> Case:
    """A solver of one's own for a problem in a file."""
    code, named = own_code(drawn)
    (drawn.sandbox.inputs / "own.py").write_text(code)
    found = drawn.output.with_name("answer.safetensors")
    name = drawn.rng.choice(["Mine"] * 9 + ["Other"])
    words = ["solve", str(drawn.stock.problem), f"--solver=own:{name}"]
    drawn.output.parent.mkdir(exist_ok=True)
    words += ["--max-steps=5", "--max-seconds=5", f"--output={found}"]
    checks = (("answer", {"file": str(found), "problem": str(drawn.stock.problem)}),)
    # An answer that is not feasible is told of, written, and ends with 1.
    return Case(
        words,
        files={found: "solution"},
        statuses=(0, 1, FAILED),
        checks=checks,
        named=(named,) if named and name == "Mine" else (),
    )


PRUNED = """
import torch, optprune, own, math
from dataclasses import replace
from optprune import Recipe, prune
from tests.helpers.tiny_models import tiny_llama
from tests.helpers.token_batches import batches

model = tiny_llama().to(torch.{dtype})
before = {{name: weight.dtype for name, weight in model.named_parameters()}}
try:
    report = prune(model, batches(2, 32), Recipe({recipe}))
except Warning as warning:
    raise AssertionError(f"a warning: {{warning}}")
for name, weight in model.named_parameters():
    assert weight.dtype == before[name], f"{{name}} is in {{weight.dtype}}"
    assert bool(weight.isfinite().all()), f"{{name}} is not finite"
for layer in report.layers:
    assert math.isfinite(layer.objective), f"the objective of {{layer.name}} is {{layer.objective}}"
print("sparsity", report.sparsity_reached)
"""
OBJECTIVE = """
import torch
from optprune.problems import MaskedLeastSquares, PenalisedLeastSquares, SparseLeastSquares
from optprune.patterns import NM, Unstructured
from optprune.penalties import L1

def objective(context):
    loss, weight = context.loss, context.loss.weight
    mask = weight.abs() > weight.abs().median()
    {line}
"""
STATED = [
    "return MaskedLeastSquares(loss, mask)", "return MaskedLeastSquares(loss, mask.int())", "return None",
    "return loss",
    "return MaskedLeastSquares(loss, mask.float())", "return MaskedLeastSquares(loss, mask[:1])", "return (loss, mask)",
    "return MaskedLeastSquares(loss, mask[:, :-1])", "return MaskedLeastSquares(loss, mask & False)",
    "return SparseLeastSquares(loss, Unstructured(10**9))", "return SparseLeastSquares(loss, NM(3, 2))",
    "return SparseLeastSquares(loss, Unstructured(-1))", "return SparseLeastSquares(loss, Unstructured(1.5))",
    "return PenalisedLeastSquares(loss, L1(float('nan')))", "return PenalisedLeastSquares(loss, L1(-1.0))",
    "return PenalisedLeastSquares(loss, L1(1e300))", "return PenalisedLeastSquares(loss, L1(0.01))",
    "import dataclasses; return MaskedLeastSquares(dataclasses.replace(loss, weight=weight * float('nan')), mask)",
    "import dataclasses; return MaskedLeastSquares(dataclasses.replace(loss, weight=weight.double()), mask)",
    "import dataclasses; return MaskedLeastSquares(dataclasses.replace(loss, weight=weight.t()), mask.t())",
    "import dataclasses; return MaskedLeastSquares(dataclasses.replace(loss, weight=weight[:3]), mask[:3])",
    "weight.zero_(); return MaskedLeastSquares(loss, mask)", "return MaskedLeastSquares", "return objective",
    "return SparseLeastSquares(loss, context.pattern)",
]  # fmt: skip


def own_objective(drawn: Drawn) -> Case:
    """An objective or a solver of one's own for a whole model."""
    rng = drawn.rng
    kind, named = rng.choice(["float32", "float32", "bfloat16", "float16"]), None
    if rng.random() < 0.5:
        code, named = own_code(drawn)
        # A solver whose step does not answer goes on for a second.
        recipe = "solver=own.Mine(), objective='sparse', units={'weights': '2:4'}, sparsity=0.5"
        code = code.replace(
            "return None\n        return Status",
            "return None if __import__('time').process_time() < 20 else Status.STALLED\n        return Status",
        )
    else:
        line = rng.choice([*STATED, *RAISED])
        named = "own.py" if line in RAISED else None
        code = OBJECTIVE.format(line=line)
        recipe = "objective=own.objective, units='weights', sparsity=0.5"
        recipe += rng.choice(["", "", ", propagation='intra'", ", solver='wanda'", ", strict=True"])
    # Out of the library a lack of memory comes as it is: only a command makes a sentence of it.
    code = code.replace("raise MemoryError", "raise BufferError")
    (drawn.sandbox.inputs / "own.py").write_text(code)
    program = PRUNED.format(dtype=kind, recipe=recipe).replace("import torch, optprune, own, math", OWN)
    return drawn.program(program, named=(named,) if named else ())


OWN = """import torch, optprune, math
try:
    import own
    getattr(own, 'Mine', object)()
except Exception as error:
    raise optprune.errors.InputError(f'own.py: {error}')"""
"""an error at the import of one's own module, or where a solver of it is made, is one's own"""


CHOICE = """
import math, torch, numpy as np
from optprune.problems import ExpertChoice
from optprune.problems import save_problem, load_problem

generator = torch.Generator().manual_seed({seed})
tokens, experts, out = 12, 6, 5
logits = torch.randn(tokens, experts, generator=generator)
answers = torch.randn(tokens, experts, out, generator=generator)
{changes}
correction = {correction}
problem = ExpertChoice.of(logits, answers, {chosen}, {normalised}, {keep}, correction)
kept = torch.zeros(experts, dtype=torch.bool)
kept[torch.randperm(experts, generator=generator)[:{keep}]] = True
kept = {kept}
found = problem.objective(kept)

def gates(mask):
    one = logits.double().numpy()
    order = one if correction is None else 1 / (1 + np.exp(-one)) + correction.double().numpy()
    rows = []
    for token in range(tokens):
        places = [e for e in sorted(range(experts), key=lambda e: -order[token, e]) if mask[e]][:{chosen}]
        if correction is None:
            top = max((one[token, e] for e in range(experts) if mask[e]), default=0.0)
            total = sum(math.exp(one[token, e] - top) for e in range(experts) if mask[e])
            weights = {{e: math.exp(one[token, e] - top) / total for e in places}}
        else:
            weights = {{e: 1 / (1 + math.exp(-one[token, e])) for e in places}}
        if {normalised}:
            total = sum(weights.values())
            weights = {{e: w / total for e, w in weights.items()}}
        rows.append([weights.get(e, 0.0) for e in range(experts)])
    return np.array(rows)

mask = [bool(k) for k in kept]
change = gates(mask) - gates([True] * experts)
expected = 0.5 * np.mean(np.sum(np.einsum("te,teo->to", change, answers.double().numpy()) ** 2, axis=1))
assert math.isfinite(found), f"the objective is {{found}}"
rounding = 1e-4 * abs(expected) + 1e-9 * float(answers.double().square().max())
assert abs(found - expected) <= rounding, f"{{found}} and not {{expected}}"
assert problem.violation(kept) == abs(sum(mask) - {keep})
save_problem(problem, "choice.safetensors")
assert load_problem("choice.safetensors").objective(kept) == found
print("objective", found)
"""


def choice(drawn: Drawn) -> Case:
    """A choice of experts from tensors of any dtype, with any number in them."""
    rng = drawn.rng
    changes = [
        "logits[3, 2] = float('nan')", "logits[3, 2] = float('inf')", "logits[:, 2] = -float('inf')",
        "logits = logits.half()",
        "logits = logits.double()", "logits = (3 * logits).int()", "logits = logits * 1e-40", "logits = logits * 1e6",
        "answers[1, 2, 3] = float('nan')", "answers = answers.half()", "answers = (9 * answers).int()",
        "answers = answers * 1e-40",
        "answers = answers * 1e25", "answers[0, 0] = float('inf')", "logits = logits[:5]", "answers = answers[:, :4]",
        "logits = logits * 0", "logits = logits > 0", "answers = answers.double()", "logits = logits[0]",
        "answers = answers[:0]; logits = logits[:0]",
        "answers = answers * 0", "", "", "",
    ]  # fmt: skip
    corrections = [
        "None",
        "None",
        "torch.zeros(experts)",
        "torch.full((experts,), float('nan'))",
        "torch.arange(experts)",
        "torch.zeros(2)",
        "torch.randn(experts) * 9",
        "[0.0] * 6",
    ]
    masks = ["kept"] * 6 + ["kept.int()", "kept.float()", "kept[:3]", "kept.tolist()", "~kept & False"]
    given = {"seed": rng.randrange(100), "changes": rng.choice(changes), "correction": rng.choice(corrections)}
    given |= {"chosen": rng.choice([1, 2, 2, 2, 3, 0, -1, 1.5]), "normalised": rng.choice([True, False])}
    given |= {"keep": rng.choice([2, 3, 3, 4, 4, 5, 6, 0, 7]), "kept": rng.choice(masks)}
    return drawn.program(CHOICE.format(**given))


ODD = """
import math, torch
from optprune import solve, save_problem, load_problem, choose
from optprune.moments import InputMoments
from optprune.patterns import *
from optprune.penalties import *
from optprune.problems import *

torch.manual_seed({seed})
weight = torch.randn(8, 12)
inputs = torch.randn(60, 12)
{changes}
loss = LayerLoss.of(weight, InputMoments.from_samples(inputs), {damping})
index, flags = torch.{index}, torch.{flags}
none, every = torch.ones(8, 12, dtype=flags) > 2, torch.zeros(12, dtype=index)
units = torch.arange(12, dtype=index)
problem = {problem}
found = solve(problem, max_steps=50, max_seconds=5)
value = found.value
assert value.is_floating_point() and bool(value.isfinite().all()), f"the answer is {{value.dtype}}"
assert math.isfinite(found.objective), f"the objective is {{found.objective}}"
V, W, X = value.detach().double(), weight.detach().double(), inputs.double()
damped = {damping} * X.square().mean(0).mean()
expected = 0.5 * float(((V - W) @ X.t()).square().sum() / len(X) + damped * (V - W).square().sum())
scale = 0.5 * float((W @ X.t()).square().sum() / len(X) + damped * W.square().sum())
if not {penalised}:
    rounding = 1e-3 * expected + 1e-5 * scale + 1e-37  # what is smaller is zero in float32
    assert abs(found.objective - expected) <= rounding, f"{{found.objective}} and not {{expected}}"
zeros = int((value == 0).sum())
assert zeros >= {zeros}, f"only {{zeros}} weights are zero"
assert found.violation == 0, f"it is not feasible by {{found.violation}}"
if found.certificate is not None and not {penalised}:
    assert found.certificate.lower_bound <= found.objective * (1 + 1e-5) + 1e-6 * scale
{after}
print("objective", found.objective)
"""
PROBLEMS = [
    ("SparseLeastSquares(loss, Unstructured(48))", 48), ("SparseLeastSquares(loss, NM(2, 4))", 48),
    ("SparseLeastSquares(loss, RowWise(3))", 72), ("MaskedLeastSquares(loss, weight.abs() > 0.5)", 0),
    ("MaskedLeastSquares(loss, torch.arange(12)[None] % 2 == 0)", 48),
    ("SparseLeastSquares(loss, Unstructured(96))", 0),
    ("SparseLeastSquares(loss, Unstructured(0))", 96), ("SparseLeastSquares(loss, RowLimits(40, 2, 9))", 56),
    ("SparseLeastSquares(loss, PartlyFixed(Unstructured(40), none, none))", 56),
    ("StructuredLeastSquares(loss, Channels(units[:, None], every), 6)", 48),
    ("StructuredLeastSquares(loss, Channels(units[:, None], every), 6)", 48),
    ("StructuredLeastSquares(loss, Channels(units[:, None], units % 2), 4)", 32),
    ("StructuredLeastSquares(loss, Channels(units[:, None], torch.tensor([0, 2**24] * 6)), 4)", 0),
    ("SparseLeastSquares(loss, SlotWise(units % 2, 3))", 0),
]  # fmt: skip


def numbers(drawn: Drawn) -> Case:
    """Problems from tensors of any dtype, with any number in them."""
    rng = drawn.rng
    changes = [
        "weight = (9 * weight).int()", "weight = (9 * weight).to(torch.int8)", "weight = (9 * weight).long()",
        "weight = weight > 0",
        "weight = weight.half()", "weight = weight.bfloat16()", "weight = weight.double()", "weight = weight * 1e-40",
        "weight = weight * 1e-20", "weight = weight * 1e18", "weight = weight * 1e30", "weight[2, 3] = float('nan')",
        "weight = weight * 0",
        "inputs = (9 * inputs).int()", "inputs = (9 * inputs).to(torch.int8)", "inputs = inputs.half()",
        "inputs = inputs.double()",
        "inputs = inputs * 1e-40", "inputs = inputs * 1e-20", "inputs = inputs * 1e15", "inputs[:, 4] = 0",
        "inputs = inputs * 0",
        "inputs[1, 1] = float('inf')", "inputs = inputs[:0]", "inputs = inputs[:1]", "inputs = inputs > 0",
        "inputs = inputs.double(); weight = weight.double()",
        "weight.requires_grad_()", "inputs[:, 5] = inputs[:, 4]", "", "", "",
    ]  # fmt: skip
    problem, zeros = rng.choice(PROBLEMS)
    after = rng.choice(
        [
            "",
            "",
            "save_problem(problem, 'odd.safetensors'); load_problem('odd.safetensors')",
        ]
    )
    given = {"seed": rng.randrange(100), "changes": rng.choice(changes), "damping": rng.choice([0.01, 0.01, 0.0, 1.0])}
    given |= {"index": rng.choice(["int64", "int64", "int32", "int16", "int8", "uint8", "float32"])}
    given |= {
        "flags": rng.choice(["bool", "int8", "float32"]),
        "problem": problem,
        "zeros": zeros,
        "penalised": False,
        "after": after,
    }
    return drawn.program(ODD.format(**given))


OTHER_VALUES = ["half()", "float()", "long()", "flatten()", "to(torch.float8_e4m3fn)"]


def stated(drawn: Drawn) -> Case:
    """A file of a solution whose header says anything: what it says of a bound is not shown as proved."""
    rng = drawn.rng
    how = rng.choice(["bound", "bound", "bound", "field", "field", "value", "other", "dtype"])
    value = json.dumps(drawn.spoil.value())
    field = rng.choice(
        ["objective", "violation", "status", "steps", "seconds", "certificate", "notes", "problem", "format"]
    )
    bound = rng.choice(["0.0", "-1e30", "found.objective", "found.objective * 0.999", "found.objective - 1e-9", "-0.0"])
    proof = rng.choice(["exhaustion", "Fenchel duality", "proved", "x" * 999])
    changes = {
        "bound": f"header['certificate'] = [{bound}, {proof!r}]",
        "field": f"header[{field!r}] = json.loads({value!r})",
        "value": "value = value.flip(0)",
        "other": "problem = load_problem(OTHER)",
        "dtype": f"value = value.{rng.choice(OTHER_VALUES)}",
    }
    code = f"""
import json, torch, math
from safetensors import safe_open
from safetensors.torch import save_file
from optprune import choose, load_problem, load_solution, save_solution, save_problem, solve
from tests.helpers.sparse_cases import correlated

OTHER = "other.safetensors"
save_problem(correlated(2, 8, 12, "2:4"), OTHER)
problem = load_problem({str(drawn.stock.problem)!r})
found = solve(problem)
save_solution(found, problem, "s.safetensors")
with safe_open("s.safetensors", "pt") as file:
    metadata, value = dict(file.metadata()), file.get_tensor("value")
header = json.loads(metadata["optprune solution"])
{changes[how]}
metadata["optprune solution"] = json.dumps(header)
save_file({{"value": value}}, "s.safetensors", metadata)
loaded = load_solution("s.safetensors", problem)
assert bool(loaded.value.isfinite().all()) and math.isfinite(loaded.objective)
assert {how!r} in ("bound", "field"), "it was taken as it is"
if loaded.certificate is not None:
    assert loaded.gap is None, f"shown as proved: {{loaded.certificate}}"
print("objective", loaded.objective)
"""
    return drawn.program(code)


IN_MEMORY = """
import torch, optprune
from torch.utils.data import DataLoader
from tests.helpers.tiny_models import tiny_llama, tiny_tokenizer
from tests.helpers.token_batches import batches

model, tokenizer, texts = tiny_llama(), tiny_tokenizer(), [f"text {{n}} of some words, " * 30 for n in range(9)]
before = {{name: weight.clone() for name, weight in model.named_parameters()}}
rows = torch.cat(batches(4, 32))
masks = torch.ones_like(rows)
def padded(masks):
    return DataLoader([{{"input_ids": r, "attention_mask": m}} for r, m in zip(rows, masks)], batch_size=2)
{given}
report = {call}
total = sum(w.numel() for n, w in before.items() if ".layers." in n and w.ndim == 2)
left = sum(int((w != 0).sum()) for n, w in model.named_parameters() if ".layers." in n and w.ndim == 2)
where = {where!r}
if where is None:
    assert left < total, "nothing is pruned"
assert all(bool(w.isfinite().all()) for w in model.parameters())
assert 0.1 < report.sparsity_reached < 0.6, report.sparsity_reached
print("sparsity", report.sparsity_reached)
"""


def in_memory(drawn: Drawn) -> Case:
    """A model object, token batches of any kind, and a recipe by its name."""
    rng = drawn.rng
    batches = [
        "data = batches(2, 32)", "data = batches(2, 32)[0]", "data = []", "data = iter(batches(2, 32))", "data = texts",
        "data = padded(masks)",
        "masks[:, :5] = 0; data = padded(masks)",
        "masks[:, 20:] = 0; data = padded(masks)",
        "masks[1, 7] = 0; data = padded(masks)",
        "masks[0] = 0; data = padded(masks)",
        "data = padded(2 * masks)",
        "data = padded(masks[:, :9])",
        "data = DataLoader([{'input_ids': r, 'labels': r} for r in rows], batch_size=2)",
        "data = DataLoader([{'labels': r} for r in rows], batch_size=2)", "data = DataLoader(rows, batch_size=3)",
        "data = DataLoader([{'input_ids': r.float()} for r in rows], batch_size=2)",
        "data = [{'input_ids': rows.tolist()}]",
        "data = [(r, r) for r in rows]", "data = rows.float()", "data = rows + 10**6", "data = -rows", "data = None",
        "data = 3",
        "data = rows[:, :1]", "data = rows[0]", "data = [rows, rows[:, :16]]", "data = rows[:0]", "data = rows.int()",
        "data = {'input_ids': rows}",
        "data = [{}]", "data = [None]", "data = ['']", "data = [{'input_ids': rows, 'attention_mask': masks.bool()}]",
    ]  # fmt: skip
    models = ["model"] * 6 + [
        "model.model",
        "torch.nn.Linear(3, 3)",
        "None",
        "model.half()",
        "model.to('meta')",
        "'x'",
        "type(model)",
    ]
    recipes = ["'fasp'"] * 4 + ["'wanda'", "optprune.load_recipe('fasp')", "'x'", "None", "3", "'sparsegpt'", "''"]
    more = ["sparsity=0.2"] * 4 + [
        "sparsity=0.2, units='mlp'",
        "sparsity=2",
        "sparsity='x'",
        "sparsity=0.2, x=1",
        "sparsity=0.2, damping=-1",
        "sparsity=0.3, strict=True",
    ]
    given, model = rng.choice([batches[0], *batches]), rng.choice(models)
    if rng.random() < 0.5:
        call = f"optprune.prune({model}, data, {rng.choice(recipes)}, {rng.choice(more)})"
        return drawn.program(IN_MEMORY.format(given=given, call=call, where=None))
    where: Path | None = drawn.sandbox.place / "out" if rng.random() < 0.5 else None
    tokens: list[str] = ["tokenizer=tokenizer"] * 5 + ["tokenizer=None", "tokenizer=3", "tokenizer='x'"]
    given = rng.choice(
        [given, "data = texts", f"data = {str(drawn.stock.text)!r}", f"data = {str(drawn.stock.held)!r} + ':x'"]
    )
    named = f"calibration=data, {rng.choice(tokens)}, samples=4, seq_length=32, {rng.choice(more)}"
    call = f"optprune.prune_model({model}, {rng.choice(recipes)}, {named}"
    call += ")" if where is None else f", output={str(where)!r})"
    code = IN_MEMORY.format(given=given, call=call, where=None)
    extra: dict[str, Any] = {} if where is None else {"output": where, "kind": "model"}
    return drawn.program(code, **extra)
