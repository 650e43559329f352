"""PCGrad, MTRec's projection and GradVac against cases worked out by hand."""

import random
from types import SimpleNamespace

import pytest
import torch

from gradient_surgery import gradvac, pcgrad, project_auxiliary


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
        # they agree: the plain sum
        ([[1.0, 0.0, 2.0], [0.0, 3.0, 0.0], [0.5, 0.5, 0.5]], [1.5, 3.5, 2.5], 0.0),
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


# ---------------------------------------------------------------------- main and auxiliary (MTRec)


@pytest.mark.parametrize(
    ("main", "auxiliary", "combined"),
    [
        # the product is -1: (-1, 1) becomes (-1, 1) + 1/4 (2, 0) · 2 = (0, 1)
        ([2.0, 0.0], [-1.0, 1.0], [2.0, 1.0]),
        ([1.0, 1.0], [-3.0, 1.0], [-1.0, 3.0]),  # product -2: (-3, 1) + (1, 1) = (-2, 2)
        ([2.0, 1.0], [-4.0, -2.0], [2.0, 1.0]),  # nothing is left of the opposite
        ([1.0, 2.0], [0.75, -0.25], [1.75, 1.75]),  # they agree: the plain sum
        ([0.0, 0.0], [-1.0, 1.0], [-1.0, 1.0]),  # nothing is divided by a norm of 0
    ],
)
def test_the_main_gradient_stays_as_it_is(main, auxiliary, combined):
    given = {"main": torch.tensor(main), "auxiliary": torch.tensor(auxiliary)}
    found = project_auxiliary(given)
    assert found.gradient.tolist() == combined
    product = given["main"] @ given["auxiliary"]
    assert found.conflicts == float(product < 0)
    assert [gradient.tolist() for gradient in given.values()] == [main, auxiliary]
    assert list(found.cosines) == [("main", "auxiliary")] and found.targets is None


# ----------------------------------------------------------------------- moving averages (GradVac)


@pytest.mark.parametrize(
    ("targets", "combined", "updated"),
    [
        # |(2, 0)| (0.6 · 1 - 0 · 0.8) / (4 · 0.8) = 0.375 times (0, 4) is added to (2, 0), and
        # 4 · 0.6 / (2 · 0.8) = 1.5 times (2, 0) to (0, 4)
        ([[0.0, 0.6], [0.6, 0.0]], [2.0 + 3.0, 1.5 + 4.0], [[0.0, 0.594], [0.594, 0.0]]),
        ([[0.0, 0.6], [0.0, 0.0]], [2.0, 1.5 + 4.0], [[0.0, 0.594], [0.0, 0.0]]),  # a alone
        ([[0.0, -0.6], [-0.6, 0.0]], [2.0, 4.0], [[0.0, -0.594], [-0.594, 0.0]]),  # both above
    ],
)
def test_a_cosine_below_its_target_is_raised_to_it(targets, combined, updated):
    """Gradients (2, 0) and (0, 4): their cosine is 0, and 0.01 of it enters each average."""
    given, targets = gradients([2.0, 0.0], [0.0, 4.0]), torch.tensor(targets)
    before = targets.clone()
    found = gradvac(given, random.Random(0), targets)
    assert found.gradient.tolist() == pytest.approx(combined)
    torch.testing.assert_close(found.targets, torch.tensor(updated))
    assert torch.equal(targets, before) and given["a"].tolist() == [2.0, 0.0]


@pytest.mark.parametrize(
    ("first", "turned"), [([1, 2], [1.0, 0.48, 0.36]), ([2, 1], [1.0, 0.75, 0.0])]
)
def test_a_turned_gradient_meets_the_others_in_the_generators_order(first, turned):
    """a = (1, 0, 0) has the target 0.6 toward b = (0, 1, 0), and 0 toward c = (0, -0.6, 0.8).

    Toward b it becomes (1, 0.75, 0), whose product with c is -0.45: 0.45 times c is added. Before
    that, its product with c is 0. b and c stay as they are.
    """
    values = gradients([1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, -0.6, 0.8])
    targets = torch.tensor([[0.0, 0.6, 0.0], [-1.0] * 3, [-1.0] * 3])
    found = gradvac(values, in_order(first, [0, 2], [0, 1]), targets)
    torch.testing.assert_close(found.gradient - values["b"] - values["c"], torch.tensor(turned))


def test_the_first_step_is_that_of_pcgrad():
    """Whose target is 0. The averages then hold 0.01 of each cosine, of a turned gradient too."""
    values = {name: torch.randn(6) for name in "abc"}
    found = gradvac(values, random.Random(3))
    expected = pcgrad(values, random.Random(3))
    torch.testing.assert_close(found.gradient, expected.gradient)
    assert found.conflicts == expected.conflicts and found.cosines == expected.cosines
    one, other = gradients([3.0, 0.0], [-3.0, 4.0]).values()
    targets = gradvac({"a": one, "b": other}, random.Random(0)).targets
    torch.testing.assert_close(targets, torch.tensor([[0.0, -0.006], [-0.006, 0.0]]))


def test_on_random_gradients_no_cosine_stays_below_its_target():
    for target in (-0.5, 0.0, 0.3, 0.99):
        for trial in range(20):
            a, b = torch.randn(2, 5)
            targets = torch.tensor([[0.0, target], [-1.0, 0.0]])  # b stays as it is
            turned = gradvac({"a": a, "b": b}, random.Random(trial), targets).gradient - b
            before, after = (torch.cosine_similarity(x, b, dim=0).item() for x in (a, turned))
            assert after == pytest.approx(max(target, before), abs=1e-4)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_gradient_that_is_not_finite_leaves_the_averages(bad):
    """fp16 skips such a step, and a run that stops there saves the state before it."""
    values = gradients([1.0, bad], [0.0, 1.0], [-1.0, 1.0])
    targets = torch.full((3, 3), 0.25)
    found = gradvac(values, random.Random(0), targets)
    assert torch.equal(found.targets, targets)
    assert not found.gradient.isfinite().all()  # which the loop finds
