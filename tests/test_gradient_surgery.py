"""PCGrad against cases worked out by hand (Yu et al. 2020, algorithm 1)."""

import random
from types import SimpleNamespace

import pytest
import torch

from gradient_surgery import pcgrad


def in_order(*orders):
    """A generator that puts the other tasks in the given orders, one after the other."""
    remaining = iter(orders)

    def shuffle(others):
        others[:] = next(remaining)

    return SimpleNamespace(shuffle=shuffle)


def gradients(*values):
    """Gradients of the tasks a, b, … as tensors."""
    return {name: torch.tensor(value) for name, value in zip("abc", values, strict=False)}


@pytest.mark.parametrize(
    ("values", "combined", "conflicts"),
    [
        # (1, 0) off (-1, 1) is (½, ½); (-1, 1) off the original (1, 0) is (0, 1)
        ([[1.0, 0.0], [-1.0, 1.0]], [0.5, 1.5], 1.0),
        (
            [[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.5, 0.5, 0.5]],
            [1.5, 3.5, 2.5],
            0.0,
        ),  # the plain sum
        ([[2.0, 1.0], [-4.0, -2.0]], [0.0, 0.0], 1.0),  # opposite ones cancel
        ([[0.0, 0.0], [-1.0, 1.0]], [-1.0, 1.0], 0.0),  # nothing is divided by a norm of 0
        ([[1.0, -2.0]], [1.0, -2.0], 0.0),  # one task alone
    ],
)
def test_cases_by_hand(values, combined, conflicts):
    tasks = gradients(*values)
    result = pcgrad(tasks, random.Random(0))
    assert result.gradient.tolist() == pytest.approx(combined, abs=1e-7)
    assert result.conflicts == conflicts
    assert [gradient.tolist() for gradient in tasks.values()] == values  # left alone
    mean = pcgrad(tasks, random.Random(0), reduction="mean").gradient
    torch.testing.assert_close(mean, result.gradient / len(values))


def test_cosines_are_those_of_the_original_gradients_by_pair():
    result = pcgrad(gradients([1.0, 0.0], [-1.0, 1.0], [0.0, 0.0]), random.Random(0))
    assert list(result.cosines) == [("a", "b"), ("a", "c"), ("b", "c")]
    cosines = [cosine.item() for cosine in result.cosines.values()]
    assert cosines == pytest.approx([-(0.5**0.5), 0.0, 0.0])
    assert result.conflicts.item() == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("first", "expected"), [([1, 2], [0.25, 1.5, 1.25]), ([2, 1], [0.25, 1.25, 1.5])]
)
def test_a_task_meets_the_others_in_the_generators_order(first, expected):
    """b and c conflict with a only, and become (0, 1, 0) and (0, 0, 1).

    a off b is (½, ½, 0); its product with c is -½; off c it is (¼, ½, ¼). The other order swaps b
    and c.
    """
    values = gradients([1.0, 0.0, 0.0], [-1.0, 1.0, 0.0], [-1.0, 0.0, 1.0])
    found = pcgrad(values, in_order(first, [0, 2], [0, 1])).gradient
    assert found.tolist() == pytest.approx(expected)


def test_the_generator_alone_decides_the_gradient():
    values = {name: torch.randn(6) for name in "abcdef"}
    first, again = (pcgrad(values, random.Random("11711 4")).gradient for _ in range(2))
    assert torch.equal(first, again)
    others = [pcgrad(values, random.Random(seed)).gradient for seed in range(8)]
    assert any(not torch.equal(first, other) for other in others)


def test_the_result_opposes_neither_of_two_tasks():
    """The property that the method is for, on random gradients."""
    for trial in range(20):
        values = gradients(torch.randn(5).tolist(), torch.randn(5).tolist())
        combined = pcgrad(values, random.Random(trial)).gradient
        assert all(combined @ gradient > -1e-5 for gradient in values.values())
