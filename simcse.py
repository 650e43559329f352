"""The contrastive losses of SimCSE (Gao et al. 2021), and which sentences are copies."""

from hashlib import blake2b

import numpy as np
import torch
import torch.nn.functional as F

TEMPERATURE = 0.05  # Gao et al. 2021, §3 and table D.1


def similarity_logits(anchors, candidates, temperature=TEMPERATURE, copies=None):
    """Cosine similarity of every anchor with every candidate, divided by the temperature.

    (A, hidden), (C, hidden) -> (A, C), fp32; -inf where `copies` (A, C) is True. Raises
    `ValueError` for a single candidate.
    """
    if len(candidates) < 2:
        raise ValueError("SimCSE needs a batch of at least 2: 1 has no negatives")
    with torch.autocast(anchors.device.type, enabled=False):
        anchors = F.normalize(anchors.float(), dim=-1)
        candidates = F.normalize(candidates.float(), dim=-1)
        logits = anchors @ candidates.T / temperature
    return logits if copies is None else logits.masked_fill(copies, -torch.inf)


def unsupervised_simcse_loss(anchors, candidates, temperature=TEMPERATURE, offset=0, copies=None):
    """In-batch cross entropy between two passes over the same sentences (Gao et al. 2021, eq. 4).

    `anchors` and `candidates` are (batch, hidden). Row i of both is sentence i under two dropout
    masks; the other candidates are its negatives, except its `copies` (see `copies_of`). Returns a
    scalar. Where several processes share a batch, `candidates` holds the rows of all, and this
    process's rows begin there at `offset`.
    """
    labels = torch.arange(offset, offset + len(anchors), device=anchors.device)
    return F.cross_entropy(similarity_logits(anchors, candidates, temperature, copies), labels)


def supervised_simcse_loss(
    anchors, candidates, weights, temperature=TEMPERATURE, offset=0, copies=None
):
    """Cross entropy of duplicate pairs against all second sentences (Gao et al. 2021, eq. 5).

    `anchors` and `candidates` are (batch, hidden), the first and second sentences of the pairs. The
    second sentences of all other pairs are its negatives, duplicates or not; the hard negative that
    Gao et al. add to each pair is not there. `weights` (batch,) are 1 /
    the number of duplicates for a duplicate, else 0. Returns a scalar, exactly 0 for a batch
    without a duplicate. `offset` and `copies` are as in `unsupervised_simcse_loss`.
    """
    labels = torch.arange(offset, offset + len(anchors), device=anchors.device)
    logits = similarity_logits(anchors, candidates, temperature, copies)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def sentence_keys(sentences):
    """A number for each sentence, equal for copies: arrays of ids -> (batch,) int64."""
    digests = [blake2b(ids.tobytes(), digest_size=8).digest() for ids in sentences]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())


def copies_of(candidate_keys, offset, *anchor_keys):
    """Which candidates are copies of an anchor's sentence, and so not its negatives.

    `candidate_keys` (C,) and each of `anchor_keys` (A,) come from `sentence_keys`. A candidate is a
    copy if its key equals any key of the anchor. Returns (A, C) bool, False at the anchor's own
    candidate: `offset` + i for anchor i.
    """
    copies = torch.stack([keys[:, None] == candidate_keys for keys in anchor_keys]).any(0)
    copies.diagonal(offset).fill_(False)
    return copies
