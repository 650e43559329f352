"""PCGrad against cases worked out by hand (Yu et al. 2020, algorithm 1)."""

import random

import pytest
import torch

from gradient_surgery import pcgrad


class Order:
    """A generator that lets a task meet the others in the given orders."""

    def __init__(self, *orders):
        self.orders = list(orders)

    def shuffle(self, others):
        """Put the next given order in place."""
        order = self.orders.pop(0)
        assert sorted(others) == sorted(order)
        others[:] = order


def gradients(**values):
    """Task -> gradient as a tensor."""
    return {name: torch.tensor(value, dtype=torch.float32) for name, value in values.items()}


def test_two_conflicting_gradients_by_hand():
    """(1, 0) off (-1, 1) is (½, ½); (-1, 1) off (1, 0) is (0, 1)."""
    result = pcgrad(gradients(sst=[1.0, 0.0], para=[-1.0, 1.0]), random.Random(0))
    assert result.gradient.tolist() == pytest.approx([0.5, 1.5])
    assert result.conflicts == 1.0
    assert result.cosines == {("sst", "para"): pytest.approx(-(0.5**0.5))}


def test_without_conflict_it_is_the_plain_sum():
    values = gradients(sst=[1.0, 0.0, 2.0], para=[0.0, 3.0, 0.0], sts=[0.5, 0.5, 0.5])
    result = pcgrad(values, random.Random(0))
    torch.testing.assert_close(result.gradient, sum(values.values()), rtol=0, atol=0)
    assert result.conflicts == 0.0


def test_mean_is_the_sum_over_the_number_of_tasks():
    values = gradients(sst=[1.0, 0.0], para=[-1.0, 1.0], sts=[0.0, -2.0])
    total = pcgrad(values, random.Random(3)).gradient
    mean = pcgrad(values, random.Random(3), reduction="mean").gradient
    torch.testing.assert_close(mean, total / 3)


def test_opposite_gradients_cancel_to_zero():
    result = pcgrad(gradients(sst=[2.0, 1.0], para=[-4.0, -2.0]), random.Random(0))
    assert result.gradient.tolist() == pytest.approx([0.0, 0.0])


def test_a_task_meets_the_others_in_the_generators_order():
    """a = (1, 0) meets b = (-1, 1) and c = (-1, -1) in either order: another outcome each.

    Off b first: (½, ½), which meets c at -1: off c, (0, 0). Off c first: (½, -½), then off b
    (0, 0) too; so a third direction tells the two apart.
    """
    values = gradients(a=[1.0, 0.0, 0.0], b=[-1.0, 1.0, 0.0], c=[-1.0, 0.0, 1.0])
    others = ([0, 2], [0, 1])  # b and c conflict with a only: (0, 1, 0) and (0, 0, 1)
    # off b: (½, ½, 0); its product with c is -½: off c, (¼, ½, ¼)
    b_first = pcgrad(values, Order([1, 2], *others)).gradient
    assert b_first.tolist() == pytest.approx([0.25, 1.5, 1.25])
    c_first = pcgrad(values, Order([2, 1], *others)).gradient
    assert c_first.tolist() == pytest.approx([0.25, 1.25, 1.5])


def test_opposing_gradients_are_the_original_ones():
    """Projected against the others' projected gradients, b would find no conflict with a."""
    values = gradients(a=[1.0, 0.0], b=[-1.0, 1.0])
    # a off b is (½, ½), which no longer opposes b; b must still be projected off the original a
    assert pcgrad(values, Order([1], [0])).gradient.tolist() == pytest.approx([0.5, 1.5])
    assert values["a"].tolist() == [1.0, 0.0]  # and the arguments are left alone
    assert values["b"].tolist() == [-1.0, 1.0]


def test_the_same_generator_gives_the_same_gradient_and_another_a_different_one():
    torch.manual_seed(5)
    values = {name: torch.randn(6) for name in "abcdef"}
    first = pcgrad(values, random.Random("11711 4")).gradient
    again = pcgrad(values, random.Random("11711 4")).gradient
    assert torch.equal(first, again)
    others = [pcgrad(values, random.Random(seed)).gradient for seed in range(8)]
    assert any(not torch.equal(first, other) for other in others)


def test_a_zero_gradient_divides_nothing_by_zero():
    result = pcgrad(gradients(sst=[0.0, 0.0], para=[-1.0, 1.0]), random.Random(0))
    assert result.gradient.tolist() == [-1.0, 1.0]
    assert result.cosines["sst", "para"] == 0.0


def test_one_task_alone_keeps_its_gradient():
    result = pcgrad(gradients(sst=[1.0, -2.0]), random.Random(0))
    assert result.gradient.tolist() == [1.0, -2.0]
    assert (result.cosines, result.conflicts) == ({}, 0.0)


def test_no_projected_task_opposes_the_gradient_it_met_last():
    """The property that the method is for, on random gradients."""
    torch.manual_seed(7)
    for trial in range(20):
        values = {name: torch.randn(5) for name in ("a", "b")}
        result = pcgrad(values, random.Random(trial))
        for gradient in values.values():
            assert result.gradient @ gradient > -1e-5
