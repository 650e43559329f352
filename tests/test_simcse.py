"""The losses of SimCSE against values worked out by hand and a float64 reference."""

import math

import pytest
import torch
import torch.nn.functional as F

from simcse import TEMPERATURE, supervised_simcse_loss, unsupervised_simcse_loss


def reference(first, second, anchors, temperature):
    """The published loss in float64: mean over `anchors` of -log softmax of the own pair."""
    cosines = F.cosine_similarity(first.double()[:, None], second.double()[None], dim=-1)
    return -(cosines / temperature).log_softmax(-1)[anchors, anchors].mean()


def test_unsupervised_by_hand():
    """Cosines [[1, 0.6], [0, 0.8]]: over τ = 0.05, [[20, 12], [0, 16]], labels on the diagonal."""
    assert TEMPERATURE == 0.05  # the paper's
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


@pytest.mark.parametrize("temperature", [0.05, 0.5])
@pytest.mark.parametrize("duplicates", [None, [1, 1, 1, 1], [0, 1, 1, 0], [0, 0, 1, 0]])
def test_loss_and_gradients_are_the_references(duplicates, temperature):
    """The length of a vector does not matter, and the loss is fp32 even under autocast.

    In bf16 a cosine near 1 has steps of 1/256: over τ, errors of 0.08 in every logit.
    """
    first = (7 * torch.randn(4, 3)).requires_grad_()
    second = (first.detach() + torch.randn(4, 3)).requires_grad_()
    anchors = [i for i in range(4) if duplicates is None or duplicates[i]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if duplicates is None:
            loss = unsupervised_simcse_loss(first, second, temperature)
        else:
            loss = supervised_simcse_loss(first, second, torch.tensor(duplicates), temperature)
    expected = reference(first, second, anchors, temperature)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss, (first, second))
    for found, right in zip(gradients, torch.autograd.grad(expected, (first, second)), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


def test_a_batch_of_one_has_no_negatives():
    one = torch.randn(1, 4)
    with pytest.raises(ValueError, match="at least 2"):
        unsupervised_simcse_loss(one, one)
    with pytest.raises(ValueError, match="at least 2"):
        supervised_simcse_loss(one, one, torch.ones(1))


def test_a_batch_without_a_duplicate_counts_exactly_zero():
    """2 % of batches of 8 have none; a mean over nothing would be nan."""
    first, second = torch.randn(2, 4, 3, requires_grad=True)
    loss = supervised_simcse_loss(first, second, torch.zeros(4))
    assert loss.item() == 0.0
    gradients = torch.autograd.grad(loss, (first, second))  # it takes part in the sum of losses
    assert not any(gradient.any() for gradient in gradients)


def test_a_zero_vector_gives_a_finite_loss():
    first = torch.zeros(2, 3, requires_grad=True)
    loss = unsupervised_simcse_loss(first, torch.randn(2, 3))
    loss.backward()
    assert loss.isfinite()
    assert first.grad.isfinite().all()
