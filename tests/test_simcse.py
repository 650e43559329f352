"""SimCSE's losses against values worked out by hand and a float64 reference."""

import math

import numpy as np
import pytest
import torch

from simcse import TEMPERATURE, supervised_simcse_loss, unsupervised_simcse_loss


def reference(first, second, anchors, temperature):
    """The published loss in float64, written out: mean over `anchors` of -log softmax at i."""
    total = 0.0
    for i in anchors:
        cosines = np.array([
            first[i] @ other / np.linalg.norm(first[i]) / np.linalg.norm(other) for other in second
        ])  # fmt: skip
        logits = cosines / temperature
        total += np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[i]
    return total / len(anchors)


def numerical_gradient(function, values, step=1e-6):
    """Central differences of a scalar function of an array."""
    gradient = np.zeros_like(values)
    for place in np.ndindex(values.shape):
        above, below = values.copy(), values.copy()
        above[place] += step
        below[place] -= step
        gradient[place] = (function(above) - function(below)) / (2 * step)
    return gradient


def test_temperature_is_the_papers():
    assert TEMPERATURE == 0.05


def test_two_sentences_by_hand():
    """Cosines [[1, 0.6], [0, 0.8]]: over τ = 0.05, [[20, 12], [0, 16]], labels on the diagonal."""
    first = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.5, 0.0], [3.0, 4.0]])
    expected = (math.log1p(math.exp(12 - 20)) + math.log1p(math.exp(0 - 16))) / 2
    assert unsupervised_simcse_loss(first, second).item() == pytest.approx(expected, rel=1e-3)
    warm = (math.log1p(math.exp(0.6 - 1)) + math.log1p(math.exp(0 - 0.8))) / 2  # τ = 1
    assert unsupervised_simcse_loss(first, second, 1.0).item() == pytest.approx(warm, rel=1e-6)


def test_supervised_by_hand_anchors_are_duplicates_and_candidates_all():
    """Pairs 0 and 2 are duplicates; the second sentence of pair 1 is a hard negative of both."""
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 5.0]])
    second = torch.tensor([[1.0, 0.0], [3.0, 4.0], [4.0, 3.0]])
    of_0 = math.log(math.exp(1) + math.exp(0.6) + math.exp(0.8)) - 1
    of_2 = math.log(math.exp(0) + math.exp(0.8) + math.exp(0.6)) - 0.6
    loss = supervised_simcse_loss(first, second, torch.tensor([1.0, 0.0, 1.0]), temperature=1.0)
    assert loss.item() == pytest.approx((of_0 + of_2) / 2, rel=1e-6)


def test_both_equal_the_reference_and_each_other_where_all_are_duplicates():
    first, second = torch.randn(7, 5), torch.randn(7, 5)
    arrays = first.double().numpy(), second.double().numpy()
    expected = reference(*arrays, range(7), 0.05)
    assert unsupervised_simcse_loss(first, second).item() == pytest.approx(expected, rel=1e-5)
    loss = supervised_simcse_loss(first, second, torch.ones(7))
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("duplicates", [None, [0, 1, 1, 0]])
def test_gradients_are_the_reference_functions_slope(duplicates):
    first = torch.randn(4, 3, requires_grad=True)
    second = torch.randn(4, 3, requires_grad=True)
    anchors = range(4) if duplicates is None else np.nonzero(duplicates)[0]
    if duplicates is None:
        unsupervised_simcse_loss(first, second, 0.5).backward()
    else:
        supervised_simcse_loss(first, second, torch.tensor(duplicates), 0.5).backward()
    a, b = first.detach().double().numpy(), second.detach().double().numpy()
    of_first = numerical_gradient(lambda x: reference(x, b, anchors, 0.5), a)
    of_second = numerical_gradient(lambda x: reference(a, x, anchors, 0.5), b)
    np.testing.assert_allclose(first.grad, of_first, atol=1e-5)
    np.testing.assert_allclose(second.grad, of_second, atol=1e-5)


def test_a_batch_of_one_has_no_negatives():
    one = torch.randn(1, 4)
    with pytest.raises(ValueError, match="at least 2"):
        unsupervised_simcse_loss(one, one)
    with pytest.raises(ValueError, match="at least 2"):
        supervised_simcse_loss(one, one, torch.ones(1))


def test_a_batch_without_a_duplicate_counts_exactly_zero():
    """2 % of batches of 8 have none; a mean over nothing would be nan."""
    first = torch.randn(4, 3, requires_grad=True)
    second = torch.randn(4, 3, requires_grad=True)
    loss = supervised_simcse_loss(first, second, torch.zeros(4))
    assert loss.item() == 0.0
    loss.backward()  # it still takes part in the sum of losses
    assert not first.grad.any()
    assert not second.grad.any()


def test_one_duplicate_among_hard_negatives_is_a_loss():
    first, second = torch.randn(4, 3), torch.randn(4, 3)
    labels = torch.tensor([0.0, 0.0, 1.0, 0.0])
    expected = reference(first.double().numpy(), second.double().numpy(), [2], 0.05)
    assert supervised_simcse_loss(first, second, labels).item() == pytest.approx(expected, rel=1e-4)


def test_the_length_of_a_vector_does_not_matter():
    first, second = torch.randn(5, 4), torch.randn(5, 4)
    loss = unsupervised_simcse_loss(first, second)
    torch.testing.assert_close(unsupervised_simcse_loss(7 * first, second / 3), loss)


def test_a_zero_vector_gives_a_finite_loss():
    first = torch.zeros(2, 3, requires_grad=True)
    loss = unsupervised_simcse_loss(first, torch.randn(2, 3))
    loss.backward()
    assert loss.isfinite()
    assert first.grad.isfinite().all()


def test_under_autocast_the_loss_is_still_computed_in_fp32():
    """In bf16 a cosine near 1 has steps of 1/256: over τ, errors of 0.08 in every logit."""
    first = torch.randn(8, 16)
    second = first + 0.1 * torch.randn(8, 16)
    labels = torch.tensor([1.0, 0.0] * 4)
    expected = (
        unsupervised_simcse_loss(first, second), supervised_simcse_loss(first, second, labels)
    )  # fmt: skip
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = (
            unsupervised_simcse_loss(first, second), supervised_simcse_loss(first, second, labels)
        )  # fmt: skip
    for value, other in zip(found, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value, other, rtol=1e-5, atol=0)
