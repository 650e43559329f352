"""Gradient surgery on conflicting gradients: PCGrad, MTRec's projection, and GradVac.

Every gradient is flat, (parameters,), and of the encoder alone; all other parameters get the plain
sum. Nothing here waits for a GPU.
"""

from itertools import combinations
from typing import NamedTuple

import torch

BETA = 0.01  # weight of a step's cosine in its moving average (Wang et al. 2021)


class Surgery(NamedTuple):
    """Outcome of one projection."""

    gradient: torch.Tensor  # (parameters,) combined
    cosines: dict  # (task, other task) -> cosine of their original gradients, a scalar
    conflicts: torch.Tensor  # scalar: share of pairs whose gradients oppose each other
    targets: torch.Tensor | None = None  # of `gradvac`, for the next step


def combine(kind, gradients, rng, targets):
    """The `Surgery` that `--gradient_surgery` names; `targets` are those of the step before."""
    if kind == "main":
        return project_auxiliary(gradients)
    if kind == "vaccine":
        return gradvac(gradients, rng, targets)
    return pcgrad(gradients, rng, kind)


def measure(gradients):
    """Squared norms, never 0; the cosine of each pair; and the share of cosines below 0."""
    squares = [gradient.square().sum().clamp_min(1e-30) for gradient in gradients.values()]
    norms = {task: square.sqrt() for task, square in zip(gradients, squares, strict=True)}
    cosines = {
        (a, b): gradients[a] @ gradients[b] / (norms[a] * norms[b])
        for a, b in combinations(gradients, 2)
    }
    shares = [(cosine < 0) / len(cosines) for cosine in cosines.values()]
    return squares, cosines, sum(shares, squares[0].new_zeros(()))


def pcgrad(gradients, rng, reduction="sum"):
    """Project each task's gradient onto the normal plane of each one that it conflicts with.

    Yu et al. 2020, algorithm 1; the other gradients are the original ones. `gradients` maps a task
    to its gradient; `rng` (`random.Random`) orders the other tasks for each task. `reduction` is
    "sum" as published, or "mean" as in the widely used implementation. Returns a `Surgery`.
    """
    original = list(gradients.values())
    squares, *measured = measure(gradients)
    total = torch.zeros_like(original[0])
    for i, gradient in enumerate(original):
        projected, others = gradient.clone(), [j for j in range(len(original)) if j != i]
        rng.shuffle(others)
        for j in others:
            dot = projected @ original[j]
            projected -= dot.clamp(max=0) / squares[j] * original[j]  # nothing if they agree
        total += projected
    return Surgery(total.div_(len(original)) if reduction == "mean" else total, *measured)


def project_auxiliary(gradients):
    """The main gradient, plus the auxiliary one, projected onto its normal plane if they conflict.

    MTRec (Bi et al. 2022). `gradients` are the main one, then the weighted sum of all auxiliary
    ones. Returns a `Surgery`.
    """
    main, auxiliary = gradients.values()
    squares, *measured = measure(gradients)
    dot = (main @ auxiliary).clamp(max=0)
    return Surgery(main + (auxiliary - dot / squares[0] * main), *measured)


def gradvac(gradients, rng, targets=None):
    """Turn each task's gradient toward the others, up to the cosines of earlier steps; sum them.

    GradVac (Wang et al. 2021, algorithm 1, one cosine for all parameters). As `pcgrad`, but a
    cosine is raised to its moving average if it is below that, not to 0 if it is below 0. `targets`
    (tasks, tasks) are these averages, None at first: 0. Returns a `Surgery`; its targets are the
    old ones where a gradient is not finite.
    """
    original = list(gradients.values())
    squares, *measured = measure(gradients)
    targets = squares[0].new_zeros(len(original), len(original)) if targets is None else targets
    total, updated = torch.zeros_like(original[0]), targets.clone()
    for i, gradient in enumerate(original):
        turned, others = gradient.clone(), [j for j in range(len(original)) if j != i]
        rng.shuffle(others)
        for j in others:
            ratio = (turned.square().sum().clamp_min(1e-30) / squares[j]).sqrt()
            cosine = (turned @ original[j] / (ratio * squares[j])).clamp(-1, 1)
            target = targets[i, j]
            sine, target_sine = ((1 - c.square()).clamp_min(1e-12).sqrt() for c in (cosine, target))
            factor = ratio * (target * sine - cosine * target_sine) / target_sine
            turned += factor.clamp(min=0) * original[j]  # nothing if the cosine is high enough
            updated[i, j] += BETA * (cosine - target)
        total += turned
    return Surgery(total, *measured, torch.where(updated.isfinite().all(), updated, targets))
