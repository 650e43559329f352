"""The heads and their losses, by hand."""

from dataclasses import replace

import pytest
import torch

from config import PAIR, TASKS, Task
from heads import make_head, r_drop_loss

PAIR_ROLES = ("first", "second")


def divergence(p, q):
    """Half of KL(p, q) + KL(q, p), mean over the rows (batch, classes)."""
    return sum((a * (a / b).log()).sum(-1).mean() for a, b in ((p, q), (q, p))) / 2


def test_r_drop_loss_by_hand():
    """A shift of all logits changes nothing; a binary logit stands for two answers."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), torch.tensor([[0.2, 0.2, 0.6]] * 2)
    found = r_drop_loss(TASKS["sst"], p.log(), q.log() + 3)
    torch.testing.assert_close(found, divergence(p, q))
    logits = torch.tensor([[2.0], [-1.0]])
    sure = torch.cat([1 - logits.sigmoid(), logits.sigmoid()], dim=-1)
    found = r_drop_loss(TASKS["para"], logits, torch.zeros(2, 1))
    torch.testing.assert_close(found, divergence(sure, torch.full((2, 2), 0.5)))


@pytest.mark.parametrize(
    ("name", "kind", "roles", "expected"),
    [
        ("sst", "ffn", ("first",), "SentenceHead"),
        ("sst", "linear", ("first",), "SentenceHead"),
        ("para", "features", PAIR_ROLES, "FeaturesHead"),
        ("para", "dot", PAIR_ROLES, "DotHead"),
        ("para", "cosine", PAIR_ROLES, "CosineHead"),
        ("para", "features", ("pair",), "SentenceHead"),
        ("sts", "cosine", PAIR_ROLES, "CosineHead"),
        ("sts", "linear", PAIR_ROLES, "FeaturesHead"),
        ("sts", "linear", ("pair",), "SentenceHead"),
    ],
)
def test_head_kinds(name, kind, roles, expected):
    head = make_head(TASKS[name], kind, roles, 16, 0.0)
    assert type(head).__name__ == expected
    assert (getattr(head, "dense", None) is not None) == (kind == "ffn")
    assert head(*torch.randn(len(roles), 3, 16)).shape == (3, TASKS[name].num_classes)


def test_a_head_without_a_branch_is_an_error():
    """Of a new name in `TASKS`: else another head would be trained without a word."""
    with pytest.raises(ValueError, match="no branch for the head 'new' of para"):
        make_head(replace(TASKS["para"], heads=("new",)), "new", PAIR_ROLES, 16, 0.0)


@pytest.mark.parametrize("roles", [("pair",), PAIR_ROLES, ("pair", *PAIR_ROLES)])
def test_a_pair_task_of_three_classes_is_a_row(roles):
    """Such as entailment: the pair heads have as many outputs as the task has classes."""
    files = ("nli", "entailment", "nli-{split}.csv", PAIR, "label")
    task = Task(*files, "classes", 3, "Predicted", ("features",), high=2)
    head = make_head(task, "features", roles, 8, 0.0)
    assert head(*torch.randn(len(roles), 4, 8)).shape == (4, 3)


def test_the_cosine_head_is_fixed_for_similarity_and_learned_for_paraphrase():
    similarity, paraphrase = (
        make_head(TASKS[name], "cosine", PAIR_ROLES, 2, 0.0) for name in ("sts", "para")
    )
    u, v = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    assert similarity(u, v).flatten().tolist() == pytest.approx([3.0, -5.0])
    assert not list(similarity.parameters())
    assert len(list(paraphrase.parameters())) == 2
    same, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert paraphrase(same, same) > 0 > paraphrase(same, other)


def test_features_by_hand():
    """u, v, |u - v| and the elementwise product, in this order."""
    head = make_head(TASKS["para"], "features", PAIR_ROLES, 2, 0.0)
    with torch.no_grad():
        head.projection.weight.copy_(torch.tensor([[1.0, 10, 2, 20, 3, 30, 4, 40]]))
        head.projection.bias.zero_()
        found = head(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])).item()
    assert found == 1 + 20 + 6 + 100 + 6 + 90 + 12 + 400


def test_the_dot_head_is_symmetric():
    head = make_head(TASKS["para"], "dot", PAIR_ROLES, 8, 0.0)
    u, v = torch.randn(2, 3, 8)
    torch.testing.assert_close(head(u, v), head(v, u))
    p, q = head.projection(u), head.projection(v)
    torch.testing.assert_close(head(u, v)[:, 0], (p * q).sum(-1) / 8**0.5 + head.bias)
