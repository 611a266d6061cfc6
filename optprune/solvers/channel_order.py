"""The order of inputs for an N:M pattern: channels are grouped so that the best mask loses less.

The groups of M run along the inputs, whose order is free where MLP units or value dimensions compute them. Scores are
the rise of the loss when a weight alone is dropped, s_ij = S_ii W_ij^2 E[x*_j^2]. The best mask keeps

    r(p) = sum over rows i and groups g of the N largest of s_ip(j), j in g,

and the order p shall make it large. Take one channel out of each of G groups, and let t_ig be the N-th largest
score of the rest of g in row i. The channel c put into the group g adds sum_i max(s_ic - t_ig, 0) to the sum of the
rest, which is (sum_i |s_ic - t_ig| + s_ic - t_ig) / 2. The last two terms are the same for every assignment of the G
channels to the G groups. So the best assignment is the one with the largest sum of distances in the
1-norm, found exactly by `scipy.optimize.linear_sum_assignment`, and r never falls.

Reference: channel permutations for N:M sparsity (Pool and Yu, 2021); heuristic allocation and linear-sum assignment by
turns (Zhang et al., "Plug-and-play", ICLR 2024). The cost as a distance is ours, and so is the start from the given
order, from which the result is as good as from channels dealt by their sums.
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from optprune.errors import InputError
from optprune.numerics import linalg
from optprune.patterns import NM
from optprune.problems import Channels, LayerLoss, Permutation

SWEEPS = 6
"""the most sweeps over all places of all groups: on real layers the first brings four fifths of the gain of a dozen,
and six nearly all"""
TOGETHER = 512
"""the groups that exchange channels at a time, drawn at random: memory and time are linear in the width"""
NEGLIGIBLE = 1e-12
"""the least relative gain; less may be rounding"""


def channel_order(scores: Float[Tensor, "rows channels"], pattern: NM) -> Int[Tensor, " channels"]:
    """Return the channel at each place, in an order in which an N:M mask keeps at least as much of the scores.

    Channels within a group, and groups, are in ascending order, so without a gain the order is unchanged. The same
    scores give the same order on any number of threads: each distance is one sum in float64. Costs `channels` x 512
    rows / M operations an assignment and M of those a sweep, and memory for 512 groups of scores.
    """
    groups = scores.shape[1] // pattern.m
    if scores.shape[1] % pattern.m:
        raise InputError(
            f"a {pattern.n}:{pattern.m} pattern orders a multiple of {pattern.m} channels, not {scores.shape[1]}"
        )
    # On the CPU for every device, so that all draw the same.
    generator = torch.Generator("cpu").manual_seed(0)
    members = torch.arange(scores.shape[1]).reshape(groups, pattern.m)
    idle = 0
    for sweep in range(SWEEPS):
        # Other places of two groups are combined in every sweep; all combinations of a pair occur in M sweeps.
        shift = sweep * torch.randperm(groups, generator=generator)[:, None]
        members = members.gather(1, (torch.arange(pattern.m) + shift) % pattern.m)
        gained = 0.0
        for place in range(pattern.m):
            mixed = torch.randperm(groups, generator=generator)
            for first in range(0, groups, TOGETHER):
                gained += _assign(scores, members, mixed[first : first + TOGETHER], place, pattern.n)
        idle = 0 if gained else idle + 1
        if idle == pattern.m:
            break
    members = members.sort(1).values
    return members[members[:, 0].argsort()].reshape(-1).to(scores.device)


def best_permutation(loss: LayerLoss, channels: Channels, pattern: NM) -> Permutation:
    """Return the order of the units of every slot in which an N:M mask loses less, over all tied columns.

    Raise InputError where the units of a slot, in their order, are not whole groups of the pattern in every column.
    """
    columns = channels.columns[channels.by_slot]
    slots, size, tied = columns.shape
    whole = size % pattern.m == 0
    if whole:
        grouped = columns.reshape(slots, -1, pattern.m, tied)
        places = torch.arange(pattern.m, device=columns.device)[:, None]
        whole = bool(((grouped[:, :, :1] + places == grouped) & (grouped[:, :, :1] % pattern.m == 0)).all())
    if not whole:
        raise InputError(
            f"{size} units of a slot do not form whole groups of a {pattern.n}:{pattern.m} pattern: they keep their "
            "order"
        )
    scaled = loss.row_scaled()
    energy = scaled.moments.mean_square.double()
    units = torch.arange(channels.units, device=columns.device)
    for slot, own in zip(columns, channels.by_slot, strict=True):
        scores = scaled.weight[:, slot].double().square() * energy[slot]
        units[own] = own[channel_order(scores.transpose(1, 2).reshape(-1, size), pattern)]
    return Permutation.of(units, channels, loss.weight.shape[1])


def _assign(scores: Tensor, members: Tensor, some: Tensor, place: int, keep: int) -> float:
    """Assign the channels at a place of some groups to these groups anew, in place, and return the gain."""
    here = members[some]
    rest = torch.cat([here[:, :place], here[:, place + 1 :]], 1).to(scores.device)
    single = here[:, place]
    level = scores[:, rest].topk(keep, dim=2).values[..., -1]
    distances = torch.cdist(scores[:, single.to(scores.device)].double().T, level.double().T, p=1).cpu()
    group = linalg.assignment(distances)
    before, after = distances.diagonal().sum(), distances.gather(1, group[:, None]).sum()
    gained = float(after - before) / 2
    if gained <= NEGLIGIBLE * float(before):
        return 0.0
    members[some[group], place] = single
    return gained
