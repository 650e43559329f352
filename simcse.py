"""The contrastive losses of SimCSE (Gao et al. 2021), as pure functions of embeddings."""

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


def unsupervised_simcse_loss(first, second, temperature=TEMPERATURE, offset=0, copies=None):
    """In-batch cross entropy between two passes over the same sentences (Gao et al. 2021, eq. 4).

    `first` and `second` are (batch, hidden). Row i of both is sentence i under two dropout masks;
    the other rows of `second` are its negatives, but for its `copies` (of `copies_of`). Returns a
    scalar. Where several processes share a batch, `second` holds the rows of all, and this
    process's rows begin there at `offset`.
    """
    labels = torch.arange(offset, offset + len(first), device=first.device)
    return F.cross_entropy(similarity_logits(first, second, temperature, copies), labels)


def supervised_simcse_loss(first, second, weights, temperature=TEMPERATURE, offset=0, copies=None):
    """Cross entropy of duplicate pairs against all second sentences (Gao et al. 2021, eq. 5).

    `first` and `second` are (batch, hidden), the sentences of each pair. Anchors are the first
    sentences of duplicates; the second sentences of other pairs are hard negatives. `weights`
    (batch,) are 1 / the number of duplicates for a duplicate, else 0. Returns a scalar, exactly 0
    for a batch without a duplicate. `offset` and `copies` are as above.
    """
    labels = torch.arange(offset, offset + len(first), device=first.device)
    logits = similarity_logits(first, second, temperature, copies)
    return (F.cross_entropy(logits, labels, reduction="none") * weights).sum()


def sentence_keys(sentences):
    """A number for each sentence, equal for copies: arrays of ids -> (batch,) int64."""
    digests = [blake2b(ids.tobytes(), digest_size=8).digest() for ids in sentences]
    return torch.from_numpy(np.frombuffer(b"".join(digests), dtype=np.int64).copy())


def copies_of(candidates, offset, *anchors):
    """Which candidates are copies of an anchor's sentence, and so not its negatives.

    `candidates` (C,) are the candidates' keys, each of `anchors` (A,) those of one of the anchors'
    sentences. Returns (A, C) bool, False at each anchor's own candidate, at `offset` + i.
    """
    copies = torch.stack([keys[:, None] == candidates for keys in anchors]).any(0)
    copies.diagonal(offset).fill_(False)
    return copies
