"""Gradient surgery: projection of conflicting task gradients (Yu et al. 2020, "PCGrad")."""

from itertools import combinations
from typing import NamedTuple

import torch


class Surgery(NamedTuple):
    """Outcome of one projection."""

    gradient: torch.Tensor  # (parameters,) combined
    cosines: dict  # (task, other task) -> cosine of their original gradients
    conflicts: float  # share of pairs whose gradients oppose each other


def pcgrad(gradients, generator, reduction="sum"):
    """Project each task's gradient off those it conflicts with, and combine the results.

    Yu et al. 2020, algorithm 1; all projections are off the original gradients. `gradients` maps a
    task to its flat gradient (parameters,); `generator` (`random.Random`) orders the other tasks
    for each task. `reduction` is "sum" as published, or "mean" as in the widely used
    implementation. Returns a `Surgery`.
    """
    tasks, original = list(gradients), torch.stack(list(gradients.values()))
    dots = (original @ original.T).cpu().double()  # for the log only
    norms = dots.diagonal().clamp_min(1e-30).sqrt()
    cosines = {
        (tasks[i], tasks[j]): float(dots[i, j] / (norms[i] * norms[j]))
        for i, j in combinations(range(len(tasks)), 2)
    }
    conflicts = sum(cosine < 0 for cosine in cosines.values()) / max(1, len(cosines))
    total = torch.zeros_like(original[0])
    for i, gradient in enumerate(original):
        projected, others = gradient.clone(), [j for j in range(len(tasks)) if j != i]
        generator.shuffle(others)
        for j in others:
            dot = projected @ original[j]
            if dot < 0:
                projected -= dot / original[j].square().sum() * original[j]
        total += projected
    return Surgery(total / len(tasks) if reduction == "mean" else total, cosines, conflicts)
