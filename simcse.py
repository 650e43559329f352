"""The contrastive losses of SimCSE (Gao et al. 2021), as pure functions of embeddings."""

import torch
import torch.nn.functional as F

TEMPERATURE = 0.05  # Gao et al. 2021, §3 and table D.1


def similarity_logits(anchors, candidates, temperature=TEMPERATURE):
    """Cosine similarity of every anchor with every candidate, divided by the temperature.

    (A, hidden), (C, hidden) -> (A, C), fp32. Raises `ValueError` for a single candidate.
    """
    if len(candidates) < 2:
        raise ValueError("SimCSE needs a batch of at least 2: 1 has no negatives")
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = F.normalize(anchors.float(), dim=-1)
        candidates = F.normalize(candidates.float(), dim=-1)
        return anchors @ candidates.T / temperature


def unsupervised_simcse_loss(first, second, temperature=TEMPERATURE, offset=0):
    """In-batch cross entropy between two passes over the same sentences (Gao et al. 2021, eq. 4).

    `first` and `second` are (batch, hidden). Row i of both is sentence i under two dropout masks;
    all other rows of `second` are its negatives. Returns a scalar. Where several processes share a
    batch, `second` holds the rows of all, and this process's rows begin there at `offset`.
    """
    labels = torch.arange(offset, offset + len(first), device=first.device)
    return F.cross_entropy(similarity_logits(first, second, temperature), labels)


def supervised_simcse_loss(
    first, second, is_duplicate, temperature=TEMPERATURE, offset=0, anchors_per_process=None
):
    """Cross entropy of duplicate pairs against all second sentences (Gao et al. 2021, eq. 5).

    `first` and `second` are (batch, hidden), the sentences of each pair; `is_duplicate` (batch,) is
    1 for paraphrases. Anchors are the first sentences of duplicates; the second sentences of other
    pairs are hard negatives. Returns a scalar, exactly 0 for a batch without a duplicate. `offset`
    is as above; several processes divide their sums by `anchors_per_process`, the mean number.
    """
    logits = similarity_logits(first, second, temperature)
    labels = torch.arange(offset, offset + len(first), device=first.device)
    # -100 leaves a row out. To select the anchors, the CPU would have to wait for a GPU's count.
    labels = labels.where(is_duplicate.bool(), -100)
    total = F.cross_entropy(logits, labels, reduction="sum")
    count = is_duplicate.sum() if anchors_per_process is None else anchors_per_process
    return total / (count + (count == 0))
