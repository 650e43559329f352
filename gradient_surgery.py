"""Gradient surgery: projection of conflicting task gradients (Yu et al. 2020, "PCGrad")."""

from itertools import combinations
from typing import NamedTuple

import torch


class Surgery(NamedTuple):
    """Outcome of one projection."""

    gradient: torch.Tensor  # (parameters,) combined
    cosines: dict  # (task, other task) -> cosine of their original gradients, a scalar
    conflicts: torch.Tensor  # scalar: share of pairs whose gradients oppose each other


def pcgrad(gradients, generator, reduction="sum"):
    """Project each task's gradient off those it conflicts with, and combine the results.

    Yu et al. 2020, algorithm 1; all projections are off the original gradients. `gradients` maps a
    task to its flat gradient (parameters,); `generator` (`random.Random`) orders the other tasks
    for each task. `reduction` is "sum" as published, or "mean" as in the widely used
    implementation. Returns a `Surgery`; nothing here waits for a GPU.
    """
    original = list(gradients.values())
    squares = [gradient.square().sum().clamp_min(1e-30) for gradient in original]
    norms = {task: square.sqrt() for task, square in zip(gradients, squares, strict=True)}
    cosines = {  # for the log only
        (a, b): gradients[a] @ gradients[b] / (norms[a] * norms[b])
        for a, b in combinations(gradients, 2)
    }
    total, conflicts = torch.zeros_like(original[0]), squares[0].new_zeros(())
    for cosine in cosines.values():
        conflicts += (cosine < 0) / len(cosines)
    for i, gradient in enumerate(original):
        projected, others = gradient.clone(), [j for j in range(len(original)) if j != i]
        generator.shuffle(others)
        for j in others:
            dot = projected @ original[j]
            projected -= dot.clamp(max=0) / squares[j] * original[j]  # nothing if they agree
        total += projected
    return Surgery(total.div_(len(original)) if reduction == "mean" else total, cosines, conflicts)
