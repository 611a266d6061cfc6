"""Steps of other kinds on the divergence of the whole model, and masks that move, beside plain training of its weights.

    .venv/bin/python -m benchmarks.train_small qwen2 small-qwen2
    .venv/bin/python -m benchmarks.outer_loop small-qwen2                    # about half an hour on one core
    .venv/bin/python -m benchmarks.outer_loop small-qwen2 --only adam
    .venv/bin/python -m benchmarks.outer_loop small-qwen2 --only adam factored --generated 192

A model is pruned on 16 windows of news, and all methods train it on these and on windows that the dense model writes.

- `adam` is healing: AdamW with fixed zeros (`optprune.heal`).
- `second-order` takes the gradient G of KL(dense || pruned) for every layer, the Gram matrix A of its inputs and the
  Fisher matrix S of its outputs, and minimises <G, D> + 1/2 tr(S D A D^T), damped as in K-FAC (Martens and Grosse,
  2015), over the D with the layer's support, by conjugate gradients. All layers move together; the damping and the
  length of the step are those with the least divergence on held-out windows.
- `moving masks` is healing whose mask is chosen anew every ten steps, until three quarters of them are done: in each
  group of four the kept weight whose removal costs least, A_jj S_ii w^2, gives way to the pruned one that gains most,
  g^2 / (A_jj S_ii), in the share of the groups that gain most by it, which falls to zero.
- `factored` is healing for one pass whose steps of matrices take account of both sides of a matrix: `eigenbasis` is
  Adam in the eigenbases of A and S (as SOAP, Vyas et al., 2024, with the bases of the pruned model), `orthogonal` makes
  all singular values of the mean gradient equal (Muon, Jordan et al., 2024), and `natural` multiplies it by the
  inverses of the damped A and S (K-FAC).

A window costs 1 for a forward pass: `adam` 4 with the dense model's, a second-order step 6, its trials not counted.
"""

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import nll_loss
from transformers import PreTrainedModel

from benchmarks.common import machine, with_earlier, write_table
from optprune import HealingSettings, heal, load_model, load_recipe, prune
from optprune.calibration.generated import generated_windows
from optprune.healing.training import BETAS
from optprune.models import Decoder
from optprune.texts import calibration_batches, evaluation_windows, read_documents, tokenise

LENGTH, SAMPLES, BATCH = 512, 16, 2
HELD_OUT, TESTED = 12, 20
DAMPINGS = (100.0, 10.0, 1.0)
LENGTHS = (1.0, 0.5, 0.25, 0.12, 0.06, 0.03)
"""the lengths of a step that are tried"""
ITERATIONS = 60
"""the most iterations of conjugate gradients"""
SHARE, EVERY, DECAY = 0.01, 10, 0.95
"""the share of groups that change at first, the steps between changes, and the decay rate of the mean gradient"""
RATES = (5e-4, 1e-3, 2e-3)
FACTORED = {"eigenbasis": RATES, "orthogonal": RATES, "natural": (1e-3, 3e-3, 1e-2)}
"""the learning rates of each kind of steps for matrices"""
FACTOR_DAMPING = 0.1
"""of A and S in natural steps, as a share of the mean diagonal"""


@dataclass(frozen=True)
class Task:
    """A pruned model, the dense one, the text of the training, and windows to choose by and to test on."""

    dense: PreTrainedModel
    pruned: PreTrainedModel
    windows: Tensor
    held_out: Tensor
    tested: Tensor

    def divergence(self, model: PreTrainedModel, windows: Tensor) -> float:
        """KL(dense || model), in nats a prediction."""
        with torch.no_grad():
            total = sum(float(divergence(self.dense, model, ids[None])[0]) for ids in windows)
        return total / (len(windows) * (LENGTH - 1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="of the kind of Llama or Qwen2, small enough for three copies in float32")
    parser.add_argument("--generated", type=int, default=64, help="windows that the dense model writes")
    parser.add_argument("--steps", type=int, default=6, help="second-order steps")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="+", choices=("adam", "second-order", "moving masks", "factored"))
    options = parser.parse_args()
    torch.set_num_threads(1)
    task = made(options.model, options.generated, options.seed)
    rows = list[dict[str, Any]]()
    kinds: dict[str, Callable[[], Iterable[dict[str, Any]]]] = {
        "adam": lambda: trained(task),
        "second-order": lambda: second_order(task, options.steps),
        "moving masks": lambda: [moved(task)],
        "factored": lambda: factored(task),
    }
    for kind, run in kinds.items():
        if options.only and kind not in options.only:
            continue
        for found in run():
            before = task.divergence(task.pruned, task.tested)
            of = {"method": kind, "generated": options.generated, "seed": options.seed, "pruned": before}
            rows.append(of | found | {"machine": machine()})
            print(rows[-1], flush=True)
            every = with_earlier("outer_loop", rows, ("method", "rate", "passes", "generated", "seed"))
            write_table("outer_loop", "The whole model at once: steps of other kinds, and moving masks", every)


def made(source: str, generated: int, seed: int) -> Task:
    """The task: a model at 2:4, pruned by `sparse_best`."""
    loaded = load_model(source, dtype="float32")
    assert loaded.tokenizer is not None
    tokens = tokenise(loaded.tokenizer, read_documents("demo:calibration"), 400_000)
    batches = calibration_batches(tokens, SAMPLES, LENGTH, seed)
    others = tokenise(loaded.tokenizer, read_documents("demo:evaluation"), 60 * LENGTH)
    windows = evaluation_windows(others, LENGTH, HELD_OUT + TESTED)
    pruned = copy.deepcopy(loaded.model)
    prune(pruned, batches, load_recipe("sparse_best", {"units.weights": "2:4", "sparsity": 0.5, "seed": seed}))
    text = torch.cat([*batches, generated_windows(loaded.model, batches, generated, seed=seed)])
    return Task(loaded.model, pruned, text, windows[:HELD_OUT], windows[HELD_OUT:])


def divergence(dense: PreTrainedModel, model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The sum of KL(dense || model) over all predictions, and the model's log-probabilities."""
    with torch.no_grad():
        target = dense(input_ids=ids).logits[:, :-1].log_softmax(-1)
    own = model(input_ids=ids).logits[:, :-1].log_softmax(-1)
    return (target.exp() * (target - own)).sum(), own


def set_gradients(task: Task, model: PreTrainedModel, ids: Tensor) -> None:
    """Set the gradients of a model to those of its mean divergence on some windows."""
    model.zero_grad()
    (divergence(task.dense, model, ids)[0] / (len(ids) * (LENGTH - 1))).backward()


def layers(model: PreTrainedModel) -> dict[str, nn.Linear]:
    """The linear layers of all blocks, by their names."""
    decoder = Decoder(model)
    return {
        decoder.name(block, path): decoder.layer(block, path)  # type: ignore[misc]  # nn.Linear in these families
        for block in range(len(decoder.blocks))
        for path in decoder.paths(block)
    }


# -- healing


def trained(task: Task) -> Iterator[dict[str, Any]]:
    """Healing at several learning rates, for one pass and for three."""
    for epochs in (1, 3):
        for rate in (2e-4, 5e-4, 1e-3, 2e-3):
            model, began = copy.deepcopy(task.pruned), time.perf_counter()
            settings = HealingSettings(learning_rate=rate, epochs=epochs, patience=100)
            heal(model, task.dense, batches_of(task), held_out=task.held_out, settings=settings)
            yield {
                "rate": rate,
                "passes": 4 * epochs * len(task.windows),
                "held out": task.divergence(model, task.held_out),
                "tested": task.divergence(model, task.tested),
                "seconds": time.perf_counter() - began,
            }


def batches_of(task: Task) -> list[Tensor]:
    """The windows of the training in a seeded order."""
    order = torch.randperm(len(task.windows), generator=torch.Generator().manual_seed(0))
    return list(task.windows[order].split(BATCH))


# -- second-order steps


@dataclass(frozen=True)
class Quadratic:
    """The quadratic model of a layer: gradient G [out, in], Gram matrix A [in, in], and metric S [out, out]."""

    gradient: Tensor
    gram: Tensor
    metric: Tensor

    def step(self, support: Tensor, damping: float) -> Tensor:
        """The D on the support that minimises <G, D> + 1/2 tr(S D A D^T), with both factors damped."""
        gram, metric = (damped(matrix, math.sqrt(damping)) for matrix in (self.gram, self.metric))
        scale = torch.outer(metric.diagonal(), gram.diagonal())
        found, residual = torch.zeros_like(self.gradient), -self.gradient * support
        along = residual / scale
        size = first = (residual * along).sum()
        for _ in range(ITERATIONS):
            image = (metric @ along @ gram) * support
            length = size / (along * image).sum()
            found, residual = found + length * along, residual - length * image
            before, size = size, (residual * residual / scale).sum()
            if size < 1e-6 * first:
                break
            along = residual / scale + size / before * along
        return found


def damped(matrix: Tensor, share: float) -> Tensor:
    """A matrix with this share of its mean diagonal added to the diagonal."""
    return matrix + share * matrix.diagonal().mean() * torch.eye(len(matrix))


def second_order(task: Task, steps: int) -> Iterator[dict[str, Any]]:
    """Steps of all layers together, each with the damping and the length that held-out windows like best."""
    model, least, began = task.pruned, task.divergence(task.pruned, task.held_out), time.perf_counter()
    for number in range(1, steps + 1):
        found = quadratics(task, model)
        tried = []
        for damping in DAMPINGS:
            changes = {name: found[name].step(layer.weight != 0, damping) for name, layer in layers(model).items()}
            for length in LENGTHS:
                other = copy.deepcopy(model)
                for name, layer in layers(other).items():
                    layer.weight.data += length * changes[name]
                tried.append((task.divergence(other, task.held_out), damping, length, other))
        held_out, damping, length, other = min(tried, key=lambda each: each[0])
        if held_out >= least:
            return
        model, least = other, held_out
        yield {
            "rate": f"damping {damping:g}, length {length:g}",
            "passes": 6 * number * len(task.windows),
            "held out": held_out,
            "tested": task.divergence(model, task.tested),
            "seconds": time.perf_counter() - began,
        }


def quadratics(task: Task, model: PreTrainedModel) -> dict[str, Quadratic]:
    """The quadratic model of every layer at the present weights, from all windows of the training."""
    own, count, generator = layers(model), 0, torch.Generator().manual_seed(1)
    gradients, grams, metrics = ({name: torch.zeros(()) for name in own} for _ in range(3))
    with calls_of(own) as (inputs, errors):
        for ids in task.windows:
            total, predicted = divergence(task.dense, model, ids[None])
            label = torch.multinomial(predicted.detach()[0].exp(), 1, generator=generator)[:, 0]
            model.zero_grad()
            total.backward(retain_graph=True)
            for name, layer in own.items():
                assert layer.weight.grad is not None
                gradients[name] = gradients[name] + layer.weight.grad
                grams[name] = grams[name] + inputs[name].mT @ inputs[name]
            nll_loss(predicted[0], label, reduction="sum").backward()
            for name in own:
                metrics[name] = metrics[name] + errors[name].mT @ errors[name]
            count += len(label)
    model.zero_grad()
    return {name: Quadratic(gradients[name] / count, grams[name] / count, metrics[name] / count) for name in own}


@contextmanager
def calls_of(own: dict[str, nn.Linear]) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """The inputs of the last forward pass, and the gradients of the outputs of the last backward pass, by layer."""
    inputs, errors = dict[str, Tensor](), dict[str, Tensor]()

    def forward(name: str) -> Any:
        return lambda layer, given, output: inputs.update({name: given[0].detach().flatten(0, -2)})

    def backward(name: str) -> Any:
        return lambda layer, before, after: errors.update({name: after[0].detach().flatten(0, -2)})

    handles = [layer.register_forward_hook(forward(name)) for name, layer in own.items()]
    handles += [layer.register_full_backward_hook(backward(name)) for name, layer in own.items()]
    try:
        yield inputs, errors
    finally:
        for handle in handles:
            handle.remove()


# -- healing with other steps


class Direction:
    """The steps of one matrix, from its gradients one after another."""

    def __init__(self, kind: str, factors: tuple[Tensor, Tensor]) -> None:
        self.kind, (self.left, self.right) = kind, factors
        self.mean = self.square = torch.zeros(())
        self.count = 0

    def of(self, gradient: Tensor) -> Tensor:
        """The step against a gradient, before the learning rate."""
        self.count += 1
        self.mean = BETAS[0] * self.mean + (1 - BETAS[0]) * gradient
        mean = self.mean / (1 - BETAS[0] ** self.count)
        if self.kind == "natural":
            return self.left @ mean @ self.right
        if self.kind == "orthogonal":
            return 0.2 * math.sqrt(max(mean.shape)) * orthogonal(mean)  # of about the size of a step of Adam
        turned = self.left.mT @ gradient @ self.right
        self.square = BETAS[1] * self.square + (1 - BETAS[1]) * turned * turned
        size = (self.square / (1 - BETAS[1] ** self.count)).sqrt() + 1e-10
        return self.left @ (self.left.mT @ mean @ self.right / size) @ self.right.mT


def factor(kind: str, matrix: Tensor) -> Tensor:
    """What a kind of steps needs of A or S: its eigenvectors, its damped inverse, or, as it is, nothing."""
    if kind == "eigenbasis":
        return torch.linalg.eigh(matrix).eigenvectors
    return torch.linalg.inv(damped(matrix, FACTOR_DAMPING)) if kind == "natural" else matrix


def orthogonal(matrix: Tensor) -> Tensor:
    """A matrix with the singular vectors of another and singular values of about 1, by Muon's five iterations."""
    a, b, c = 3.4445, -4.7750, 2.0315
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.mT
    found = wide / (wide.norm() + 1e-12)
    for _ in range(5):
        square = found @ found.mT
        found = a * found + (b * square + c * square @ square) @ found
    return found if wide is matrix else found.mT


def factored(task: Task) -> Iterator[dict[str, Any]]:
    """Healing for one pass with each kind of steps for matrices, and AdamW for all other parameters."""
    found = quadratics(task, task.pruned)
    for kind, rates in FACTORED.items():
        factors = {name: (factor(kind, each.metric), factor(kind, each.gram)) for name, each in found.items()}
        for rate in rates:
            began = time.perf_counter()
            model = stepped(task, {name: Direction(kind, own) for name, own in factors.items()}, rate)
            yield {
                "method": kind,
                "rate": rate,
                "passes": 4 * len(task.windows),
                "held out": task.divergence(model, task.held_out),
                "tested": task.divergence(model, task.tested),
                "seconds": time.perf_counter() - began,
            }


def stepped(task: Task, directions: dict[str, Direction], rate: float) -> PreTrainedModel:
    """The pruned model after one pass with these steps of its matrices, its zeros as they were."""
    model = copy.deepcopy(task.pruned)
    own = layers(model)
    kept = {name: layer.weight != 0 for name, layer in own.items()}
    matrices = {id(layer.weight) for layer in own.values()}
    others = [each for each in model.parameters() if id(each) not in matrices]
    optimizer = torch.optim.AdamW(others, betas=BETAS, weight_decay=0.0)
    settings, batches = HealingSettings(learning_rate=1.0), batches_of(task)
    for number, ids in enumerate(batches):
        share = settings.rate(number, len(batches))
        for group in optimizer.param_groups:
            group["lr"] = 5e-4 * share
        set_gradients(task, model, ids)
        for name, layer in own.items():
            assert layer.weight.grad is not None
            layer.weight.grad *= kept[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        for name, layer in own.items():
            assert layer.weight.grad is not None
            layer.weight.data -= rate * share * directions[name].of(layer.weight.grad) * kept[name]
    return model


# -- masks that move


def moved(task: Task, rate: float = 5e-4, epochs: int = 3) -> dict[str, Any]:
    """Healing of a 2:4 model whose mask is chosen anew on the way."""
    model, began = copy.deepcopy(task.pruned), time.perf_counter()
    own, found = layers(model), quadratics(task, model)
    curvature = {name: torch.outer(each.metric.diagonal(), each.gram.diagonal()) for name, each in found.items()}
    curvature = {name: each + 0.01 * each.mean() for name, each in curvature.items()}
    kept = {name: layer.weight != 0 for name, layer in own.items()}
    mean = {name: torch.zeros_like(layer.weight) for name, layer in own.items()}
    matrices, others = ([each for each in model.parameters() if (each.ndim > 1) == wanted] for wanted in (True, False))
    groups = [{"params": matrices, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=BETAS)
    settings, steps, changed = HealingSettings(learning_rate=rate), epochs * len(batches_of(task)), 0
    for number, ids in enumerate(batches_of(task) * epochs):
        for group in optimizer.param_groups:
            group["lr"] = settings.rate(number, steps)
        set_gradients(task, model, ids)
        for name, layer in own.items():
            assert layer.weight.grad is not None
            mean[name] = DECAY * mean[name] + (1 - DECAY) * layer.weight.grad
            layer.weight.grad *= kept[name]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        share = SHARE * (1 - (number + 1) / (0.75 * steps))
        for name, layer in own.items():
            if share > 0 and (number + 1) % EVERY == 0:
                gain = (mean[name] / (1 - DECAY ** (number + 1))) ** 2 / curvature[name]
                cost = curvature[name] * layer.weight.data**2
                new = chosen(kept[name], cost, gain, share)
                changed += int((new & ~kept[name]).sum())
                state, same = optimizer.state[layer.weight], new & kept[name]
                state["exp_avg"][~same] = 0.0
                state["exp_avg_sq"][new & ~kept[name]] = state["exp_avg_sq"][same].mean()
                kept[name] = new
            layer.weight.data *= kept[name]
    return {
        "rate": rate,
        "passes": 4 * epochs * len(task.windows),
        "held out": task.divergence(model, task.held_out),
        "tested": task.divergence(model, task.tested),
        "moved": changed,
        "seconds": time.perf_counter() - began,
    }


def chosen(kept: Tensor, cost: Tensor, gain: Tensor, share: float) -> Tensor:
    """The 2:4 mask in which the kept weight of the least cost gives way to the pruned one of the largest gain."""
    groups, infinite = kept.view(len(kept), -1, 4).clone(), torch.tensor(math.inf)
    least = torch.where(groups, cost.view_as(groups), infinite).min(-1)
    most = torch.where(groups, -infinite, gain.view_as(groups)).max(-1)
    better = most.values - least.values
    bound = better.flatten().topk(max(1, int(share * better.numel()))).values[-1].clamp(min=0)
    swapped = ((better >= bound) & (better > 0))[..., None]
    leaving = torch.zeros_like(groups).scatter(-1, least.indices[..., None], True) & swapped
    coming = torch.zeros_like(groups).scatter(-1, most.indices[..., None], True) & swapped
    return (groups & ~leaving | coming).view_as(kept)


if __name__ == "__main__":
    main()
