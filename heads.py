"""The task heads and their losses: from sentence vectors to predictions, and to scalars.

`make_head` builds the head that `--<task>_head` names. `task_loss` is a task's loss, `r_drop_loss`
that of R-Drop.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bert import FastDropout


class SentenceHead(nn.Module):
    """Logits of one vector: a linear layer, after a feed-forward layer if `feed_forward`."""

    def __init__(self, hidden, outputs, dropout, feed_forward=False):
        super().__init__()
        self.dense = nn.Linear(hidden, hidden) if feed_forward else None
        self.dropout = FastDropout(dropout)
        self.projection = nn.Linear(hidden, outputs)

    def forward(self, u):
        """(batch, hidden) -> (batch, outputs)."""
        if self.dense is not None:
            u = F.gelu(self.dense(self.dropout(u)))
        return self.projection(self.dropout(u))


class FeaturesHead(nn.Module):
    """A linear layer on u, v, |u - v| and u * v, elementwise (Conneau et al. 2017, §3.1).

    Reimers & Gurevych 2019 leave u * v out.
    """

    def __init__(self, hidden, outputs, dropout):
        super().__init__()
        self.dropout = FastDropout(dropout)
        self.projection = nn.Linear(4 * hidden, outputs)

    def forward(self, u, v):
        """(batch, hidden) twice -> (batch, outputs)."""
        features = torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
        return self.projection(self.dropout(features))


class DotHead(nn.Module):
    """The dot product of both vectors, each through one shared linear layer (the paper's baseline).

    Divided by the square root of the hidden size, so that its magnitude does not grow with that.
    """

    def __init__(self, hidden, dropout):
        super().__init__()
        self.dropout = FastDropout(dropout)
        self.projection = nn.Linear(hidden, hidden)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, u, v):
        """(batch, hidden) twice -> (batch, 1)."""
        u, v = (self.projection(self.dropout(x)) for x in (u, v))
        return (u * v).sum(-1, keepdim=True) / u.size(-1) ** 0.5 + self.bias


class CosineHead(nn.Module):
    """scale · cos(u, v) + bias; both are fixed for a score task, learned for a binary task."""

    def __init__(self, task):
        super().__init__()
        self.scale, self.bias = task.high, 0.0
        if task.kind == "binary":
            # Probability ½ at cosine 0.7 at first: pretrained vectors have high cosines.
            self.scale = nn.Parameter(torch.tensor([10.0]))
            self.bias = nn.Parameter(torch.tensor([-7.0]))

    def forward(self, u, v):
        """(batch, hidden) twice -> (batch, 1)."""
        return self.scale * F.cosine_similarity(u, v, dim=-1)[:, None] + self.bias


class SumHead(nn.Module):
    """The sum of several heads' outputs; head i takes the vectors with the numbers `places[i]`."""

    def __init__(self, heads, places):
        super().__init__()
        self.heads, self.places = nn.ModuleList(heads), places

    def forward(self, *vectors):
        """(batch, hidden) each -> (batch, num_classes)."""
        parts = zip(self.heads, self.places, strict=True)
        return sum(head(*(vectors[place] for place in places)) for head, places in parts)


def make_head(task, head, roles, hidden, dropout):
    """The module of the head that `--<task>_head` names, for `task`, a row of `TASKS`.

    `roles` name the sequences whose vectors it takes: "first", "second", or "pair" for both as one.
    """
    if head not in task.heads:
        raise ValueError(f"{task.name} has no head {head!r}; expected one of {task.heads}")
    if len(roles) == 1:  # a sentence, or a pair as one sequence, whose head is always linear
        return SentenceHead(hidden, task.num_classes, dropout, feed_forward=head == "ffn")
    if len(roles) == 3:
        together = SentenceHead(hidden, task.num_classes, dropout)
        apart = make_head(task, head, roles[1:], hidden, dropout)
        return SumHead([together, apart], [(0,), (1, 2)])
    if head == "dot":
        return DotHead(hidden, dropout)
    if head == "cosine":
        return CosineHead(task)
    features = FeaturesHead(hidden, task.num_classes, dropout)
    if head == "features+cosine":
        return SumHead([features, CosineHead(task)], [(0, 1)] * 2)
    if head in ("features", "linear"):
        return features
    raise ValueError(f"no branch for the head {head!r} of {task.name}")


def task_loss(task, outputs, labels):
    """Mean loss of a batch by the task's kind: cross entropy, binary cross entropy, squared error.

    `outputs` (batch, num_classes), `labels` (batch,) fp32. Returns a scalar. `evaluation.calibrate`
    lowers this loss, too, and it is the loss that a dev table shows.
    """
    if task.kind == "classes":
        return F.cross_entropy(outputs, labels.long())
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), labels)
    return F.mse_loss(outputs.squeeze(-1), labels)


def r_drop_loss(task, first, second):
    """Symmetric KL divergence between the predictions of two dropout passes (R-Drop).

    Mean of both Kullback-Leibler divergences (Liang et al. 2021, eq. 2). `first` and `second` are
    outputs (batch, num_classes) of a head. Returns a scalar. Liang et al. add up the task losses of
    the two passes, which are averaged here: our weight is their α / 2.
    """
    if task.kind == "binary":  # as logits of the two answers
        first, second = (torch.cat([torch.zeros_like(x), x], dim=-1) for x in (first, second))
    log_p, log_q = (F.log_softmax(x.float(), dim=-1) for x in (first, second))
    return ((log_p.exp() - log_q.exp()) * (log_p - log_q)).sum(-1).mean() / 2
