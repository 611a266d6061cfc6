"""Recovery of mixtures that lost experts: a literal least squares problem, errors that never rise, zeros that stay."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import optprune
from benchmarks.tiny_models import tiny
from optprune.allocation.uniform import removed_by_experts
from optprune.calibration.calls import Calls
from optprune.models import Decoder
from optprune.models.places import OnDevice, States
from optprune.pruning.expert_recovery import recover_experts
from optprune.recipe import load_recipe
from optprune.report import RecoveredPart

FAMILIES = ("glm4_moe", "mixtral", "qwen2_moe", "qwen3_moe")
BLOCK = 1
KEPT = torch.tensor([True, False, True, True])


def inputs(seed: int, batches: int = 3) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(2, 40, 64, generator=generator) for _ in range(batches)]


def first(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


class Case:
    """The mixture of one block, whole and without one expert, on random hidden states."""

    def __init__(self, family: str, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        model = tiny(family, seed)
        nn.Module.to(model, dtype)
        self.decoder = Decoder(model)
        mixture = self.decoder.architecture.mixture
        assert mixture is not None
        self.module: nn.Module = self.decoder.blocks[BLOCK].get_submodule(mixture.module)
        self.fit, self.apart = (self.calls(inputs(seed + number), dtype) for number in (1, 100))
        self.decoder.keep_experts(BLOCK, KEPT)

    @torch.no_grad()
    def calls(self, batches: list[Tensor], dtype: torch.dtype) -> Calls:
        place = OnDevice()
        found = Calls(States(place), States(place))
        for batch in batches:
            found.arguments.append(((batch.to(dtype),), {}))
            found.targets.append(first(self.module(batch.to(dtype))))
        return found

    @torch.no_grad()
    def error(self, calls: Calls) -> float:
        """By the stock module, in float64: E|f* - f|^2 / E|f*|^2."""
        whole = copy.deepcopy(self.module).double()
        pairs = [
            (target.double(), first(whole(*(each.double() for each in args)))) for _, args, _, target in calls.each()
        ]
        change = sum(float((one - other).square().sum()) for one, other in pairs)
        return change / sum(float(one.square().sum()) for one, _ in pairs)

    def weights(self) -> list[Tensor]:
        experts: Any = self.module.get_submodule("experts")
        return [experts[str(number)].down_proj.weight.detach().clone() for number in range(3)]

    def recover(self, **options: Any) -> RecoveredPart:
        return recover_experts(self.decoder, BLOCK, self.fit, self.apart, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_errors_are_those_of_the_module_and_fall(family: str) -> None:
    case = Case(family)
    before = case.error(case.fit), case.error(case.apart)
    part = case.recover(rounds=2, damping=0.01)
    after = case.error(case.fit), case.error(case.apart)
    assert (part.error_before, part.held_out_before) == pytest.approx(before, rel=1e-4)
    assert (part.error_after, part.held_out_after) == pytest.approx(after, rel=1e-4)
    assert after[0] < 0.98 * before[0] and after[1] < before[1] and part.steps > 0


@pytest.mark.parametrize("seed", range(4))
def test_neither_error_rises_even_without_a_ridge(seed: int) -> None:
    """The expert with fewer tokens than inputs would fit them exactly, and be useless for others."""
    case = Case("qwen3_moe", seed)
    case.fit = case.fit.first(40)
    part = case.recover(rounds=3, damping=1e-9)
    assert part.error_after <= part.error_before * (1 + 1e-5)
    assert part.held_out_after <= part.held_out_before * (1 + 1e-5)


def test_a_turn_is_the_ridge_regression_of_what_the_other_experts_leave() -> None:
    """Literally, by hooks on the linear layers; what is held out is what is fitted, so the step is a whole one."""
    case = Case("mixtral")
    case.apart = case.fit
    experts: Any = case.module.get_submodule("experts")
    down, rows, start = experts["0"].down_proj, list[Tensor](), case.weights()[0].double()
    seen = list[tuple[Tensor, Tensor, Tensor]]()
    handles = [
        down.register_forward_pre_hook(lambda _, args: rows.append(args[0].double())),
        experts.register_forward_pre_hook(lambda _, args: seen.append(args)),
    ]
    lefts, scaled = list[Tensor](), list[Tensor]()
    with torch.no_grad():
        for _, args, _, target in case.fit.each():
            left = (target - first(case.module(*args))).flatten(0, -2).double()
            _, chosen, weights = seen.pop()
            tokens, places = torch.where(chosen == 0)
            lefts.append(left[tokens])
            scaled.append(rows.pop() * weights[tokens, places, None].double())
    for handle in handles:
        handle.remove()
    a, r = torch.cat(scaled), torch.cat(lefts)
    ridge = 0.05 * a.square().sum(0).mean()
    # Ridge regression is least squares with rows sqrt(ridge) I and targets 0 added.
    width = a.shape[1]
    more = torch.cat([a, ridge.sqrt() * torch.eye(width, dtype=torch.float64)])
    expected = start + torch.linalg.lstsq(more, torch.cat([r, r.new_zeros(width, r.shape[1])])).solution.T
    case.recover(rounds=1, damping=0.05)
    found = case.weights()[0].double()
    assert float((found - expected).norm() / (expected - start).norm()) < 1e-3


def test_zeros_stay_and_errors_fall_with_them() -> None:
    case = Case("qwen3_moe")
    experts: Any = case.module.get_submodule("experts")
    with torch.no_grad():
        for number in range(3):
            weight = experts[str(number)].down_proj.weight
            weight[torch.rand(weight.shape, generator=torch.Generator().manual_seed(number)) < 0.5] = 0
    zeros = [weight == 0 for weight in case.weights()]
    part = case.recover(rounds=1, damping=0.01)
    assert all(torch.equal(weight == 0, mask) for weight, mask in zip(case.weights(), zeros, strict=True))
    assert part.error_after < part.error_before and part.held_out_after <= part.held_out_before * (1 + 1e-5)


def test_an_expert_without_tokens_stays_as_it_is() -> None:
    case = Case("qwen3_moe")
    router: Any = case.module.get_submodule("gate")
    with torch.no_grad():
        router.weight[2] = 0
        router.weight[:2] *= 100
    before = case.weights()
    reached = set[int]()
    experts: Any = case.module.get_submodule("experts")
    handle = experts.register_forward_pre_hook(lambda _, args: reached.update(args[1].flatten().tolist()))
    case.error(case.fit)
    handle.remove()
    case.recover(rounds=1)
    for number, (old, new) in enumerate(zip(before, case.weights(), strict=True)):
        assert (number in reached) or torch.equal(old, new)


def test_weights_of_half_precision_are_rounded_before_the_next_turn() -> None:
    case = Case("qwen3_moe", dtype=torch.bfloat16)
    part = case.recover(rounds=2, damping=0.05)
    assert case.weights()[0].dtype is torch.bfloat16
    assert part.error_after < part.error_before


@pytest.mark.parametrize("family", FAMILIES)
def test_a_run_recovers_every_block_that_lost_experts(family: str) -> None:
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randint(0, 500, (4, 48), generator=generator) for _ in range(4)]
    errors = list[float]()
    for recovery in ("none", 2):
        model = tiny(family)
        share = removed_by_experts(Decoder(model), 2)[3]
        refit = {"refit.held_out": 0.25, "refit.recovery": recovery}
        dense = copy.deepcopy(model)
        report = optprune.prune(model, batches, load_recipe("experts_best", {"sparsity": share, **refit}))
        with torch.no_grad():
            errors.append(float((model(batches[0]).logits - dense(batches[0]).logits).square().mean()))
    with_experts = [shape for shape in Decoder(tiny(family)).shapes() if shape.experts]
    assert len(report.recovered) == len(with_experts)
    assert all(part.held_out_after <= part.held_out_before for part in report.recovered)
    assert errors[1] < errors[0]
