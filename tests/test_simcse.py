"""The losses of SimCSE against values worked out by hand and a float64 reference."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from simcse import (
    TEMPERATURE,
    copies_of,
    sentence_keys,
    supervised_simcse_loss,
    unsupervised_simcse_loss,
)


def reference(first, second, anchors):
    """The published loss in float64: mean over `anchors` of -log softmax of the own pair."""
    cosines = F.cosine_similarity(first.double()[:, None], second.double()[None], dim=-1)
    return -(cosines / TEMPERATURE).log_softmax(-1)[anchors, anchors].mean()


def test_unsupervised_by_hand():
    """Cosines [[1, 0.6], [0, 0.8]]: over τ = 0.05, [[20, 12], [0, 16]], labels on the diagonal."""
    assert TEMPERATURE == 0.05  # the paper's
    first = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    second = torch.tensor([[0.5, 0.0], [3.0, 4.0]])
    expected = (math.log1p(math.exp(12 - 20)) + math.log1p(math.exp(0 - 16))) / 2
    assert unsupervised_simcse_loss(first, second).item() == pytest.approx(expected, rel=1e-3)
    warm = (math.log1p(math.exp(0.6 - 1)) + math.log1p(math.exp(0 - 0.8))) / 2  # τ = 1
    assert unsupervised_simcse_loss(first, second, 1.0).item() == pytest.approx(warm, rel=1e-6)


@pytest.mark.parametrize("duplicates", [None, [0, 1, 1, 0]])
def test_loss_and_gradients_are_the_references(duplicates):
    """The length of a vector does not matter, and the loss is fp32 even under autocast.

    In bf16 a cosine near 1 has steps of 1/256: over τ, errors of 0.08 in every logit.
    """
    first = (7 * torch.randn(4, 3)).requires_grad_()
    second = (first.detach() + torch.randn(4, 3)).requires_grad_()
    anchors = [i for i in range(4) if duplicates is None or duplicates[i]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        if duplicates is None:
            loss = unsupervised_simcse_loss(first, second)
        else:
            weights = torch.tensor(duplicates) / sum(duplicates)
            loss = supervised_simcse_loss(first, second, weights)
    expected = reference(first, second, anchors)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    gradients = torch.autograd.grad(loss, (first, second))
    for found, right in zip(gradients, torch.autograd.grad(expected, (first, second)), strict=True):
        torch.testing.assert_close(found, right, rtol=0, atol=1e-5)


def test_row_49_copies_are_not_negatives_by_hand():
    """Sentence 0 stands in row 2 again. Cosines [[1, 0.6, 0.8], [0, 0.8, 0.6], [1, 0.6, 0.8]]."""
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    second = torch.tensor([[1.0, 0.0], [3.0, 4.0], [4.0, 3.0]])
    keys = sentence_keys([np.array([2, 7, 3]), np.array([2, 8, 3]), np.array([2, 7, 3])])
    copies = copies_of(keys, 0, keys)
    assert copies.tolist() == [[False, False, True], [False] * 3, [True, False, False]]
    of_1 = math.log(math.exp(0) + math.exp(0.8) + math.exp(0.6)) - 0.8
    of_0 = math.log(math.exp(1) + math.exp(0.6)) - 1
    of_2 = math.log(math.exp(0.6) + math.exp(0.8)) - 0.8
    loss = unsupervised_simcse_loss(first, second, 1.0, copies=copies)
    assert loss.item() == pytest.approx((of_0 + of_1 + of_2) / 3, rel=1e-6)
    third = torch.tensor([0.0, 0.0, 1.0])
    loss = supervised_simcse_loss(first, second, third, 1.0, copies=copies)
    assert loss.item() == pytest.approx(of_2, rel=1e-6)


def test_row_49_of_a_pair_both_sentences_copies_count():
    """Candidates 5 6 5: anchor 0 finds its positive again, anchor 1 its own text."""
    second, first = torch.tensor([5, 6, 5]), torch.tensor([1, 5, 2])
    expected = [[False, False, True], [True, False, True], [True, False, False]]
    assert copies_of(second, 0, first, second).tolist() == expected
    of_second_process = copies_of(second, 1, first[1:], second[1:])
    assert of_second_process.tolist() == expected[1:]


def test_row_49_a_batch_of_copies_alone_has_no_negatives_and_no_loss():
    first, second = torch.randn(2, 64, 5)
    keys = torch.full((64,), 3)
    assert unsupervised_simcse_loss(first, second, copies=copies_of(keys, 0, keys)).item() == 0.0
    assert unsupervised_simcse_loss(first, second).item() > 4  # ln 64, whatever is learnt


def test_a_batch_of_one_has_no_negatives():
    with pytest.raises(ValueError, match="at least 2"):
        unsupervised_simcse_loss(*torch.randn(2, 1, 4))


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
