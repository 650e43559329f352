"""The contrastive losses of SimCSE (Gao et al. 2021), as pure functions of embeddings."""

import torch
import torch.nn.functional as F

TEMPERATURE = 0.05  # Gao et al. 2021, §3 and table D.1


def similarity_logits(anchors, candidates, temperature=TEMPERATURE):
    """Cosine similarity of every anchor with every candidate, over the temperature.

    (A, hidden), (C, hidden) -> (A, C), fp32.
    """
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = F.normalize(anchors.float(), dim=-1)
        candidates = F.normalize(candidates.float(), dim=-1)
        return anchors @ candidates.T / temperature


def unsupervised_simcse_loss(first, second, temperature=TEMPERATURE, offset=0):
    """In-batch cross entropy between two passes over the same sentences (Gao et al. 2021, eq. 4).

    `first` and `second` are (batch, hidden): row i of both is sentence i under two dropout masks,
    all other rows of `second` are its negatives. Returns a scalar. Raises `ValueError` for a batch
    of one sentence, which has no negatives. Where several processes share a batch, `second` holds
    the rows of all of them and `offset` is the place of this one's first row.
    """
    if len(second) < 2:
        raise ValueError("SimCSE needs at least 2 sentences in a batch: 1 has no negatives")
    labels = torch.arange(offset, offset + len(first), device=first.device)
    return F.cross_entropy(similarity_logits(first, second, temperature), labels)


def supervised_simcse_loss(
    first, second, is_duplicate, temperature=TEMPERATURE, offset=0, anchors_per_process=None
):
    """Cross entropy of duplicate pairs against all second sentences (Gao et al. 2021, eq. 5).

    `first` and `second` are (batch, hidden), the two sentences of each pair; `is_duplicate`
    (batch,) is 1 for paraphrases. Anchors are the first sentences of duplicates; the second
    sentences of the pairs that are not duplicates serve as hard negatives. Returns a scalar,
    exactly 0 where the batch has no duplicate. Where several processes share a batch, `second` and
    `offset` are as above and the sum of losses is divided by `anchors_per_process`, their mean
    number of anchors.
    """
    if len(second) < 2:
        raise ValueError("SimCSE needs at least 2 pairs in a batch: 1 has no negatives")
    anchors = is_duplicate.bool().nonzero().squeeze(-1)
    logits = similarity_logits(first[anchors], second, temperature)
    total = F.cross_entropy(logits, anchors + offset, reduction="sum")
    count = len(anchors) if anchors_per_process is None else anchors_per_process
    return total / (count + (count == 0))
