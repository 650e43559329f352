"""What to do when the gradients of tasks conflict: projection (Yu et al. 2020, "PCGrad")."""

from typing import NamedTuple

import torch


class Surgery(NamedTuple):
    """Outcome of one projection."""

    gradient: torch.Tensor  # (parameters,) combined
    cosines: dict  # (task, other task) -> cosine of their original gradients
    conflicts: float  # share of pairs whose gradients oppose each other


def pcgrad(gradients, generator, reduction="sum"):
    """Project each task's gradient off those it conflicts with, then add up.

    Yu et al. 2020, algorithm 1. `gradients` maps a task to its flat gradient (parameters,);
    `generator` (`random.Random`) gives the order in which a task meets the others. The opposing
    gradients are the original ones. `reduction` is "sum" as published, or "mean" as in the widely
    used implementation. Returns a `Surgery`.
    """
    tasks = list(gradients)
    original = torch.stack([gradients[task] for task in tasks])
    dots = (original @ original.T).cpu().double()  # of the original gradients, for the log
    norms = dots.diagonal().clamp_min(1e-30).sqrt()
    cosines = {
        (tasks[i], tasks[j]): float(dots[i, j] / (norms[i] * norms[j]))
        for i in range(len(tasks))
        for j in range(i + 1, len(tasks))
    }
    total = torch.zeros_like(original[0])
    for i in range(len(tasks)):
        projected = original[i].clone()
        others = [j for j in range(len(tasks)) if j != i]
        generator.shuffle(others)
        for j in others:
            dot = projected @ original[j]
            if dot < 0:
                projected -= dot / original[j].square().sum() * original[j]
        total += projected
    if reduction == "mean":
        total /= len(tasks)
    conflicts = sum(cosine < 0 for cosine in cosines.values()) / max(1, len(cosines))
    return Surgery(total, cosines, conflicts)
