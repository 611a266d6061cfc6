"""The largest scores by sorting lists, for every kind of pattern."""

import torch

from optprune.patterns import RowWise, Unstructured


def literal_choice(scores, pattern):
    """The mask of the largest scores, by sorting lists."""
    rows, width = scores.shape
    if isinstance(pattern, Unstructured):
        groups = [[(i, j) for i in range(rows) for j in range(width)]]
        keep = pattern.keep
    elif isinstance(pattern, RowWise):
        groups, keep = [[(i, j) for j in range(width)] for i in range(rows)], pattern.keep
    else:
        first = range(0, width, pattern.m)
        groups = [[(i, f + k) for k in range(pattern.m)] for i in range(rows) for f in first]
        keep = pattern.n
    mask = torch.zeros(rows, width, dtype=torch.bool)
    for group in groups:
        for i, j in sorted(group, key=lambda entry: -float(scores[entry]))[:keep]:
            mask[i, j] = True
    return mask
