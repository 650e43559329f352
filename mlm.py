"""Masked language modelling (Devlin et al. 2019, §3.1), which adapts an encoder to texts.

A part of each sentence's tokens is hidden, and a head predicts what was there.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

SHARE = 0.15  # of a sentence's tokens that are hidden (Devlin et al. 2019, §3.1)
MASKED, REPLACED = 0.8, 0.1  # of these become [MASK], or a random token; the others stay


def hide_tokens(sentences, tokenizer, width, seed, first=0):
    """Hide 15 % of each sentence's tokens, but no marker; at least one, as the authors' code does.

    `sentences` are int32 arrays of at most `width` ids, the rows `first` and following of the batch
    of all processes: what is hidden depends on `seed` (whole numbers) and the row alone. Returns
    the new sentences, and of the hidden tokens, each (hidden tokens,) int64: the sentence, the
    place in it, and the id that was there.
    """
    lengths = np.array([len(ids) for ids in sentences])
    inner = lengths[:, None] - 2  # without [CLS] and [SEP]
    draws = np.random.default_rng(seed).random((first + len(sentences), 3, width))
    order, kind, other = draws[first:, :, : inner.max()].swapaxes(0, 1)
    counts = np.minimum(inner, np.maximum(1, np.rint(SHARE * inner)))
    order = np.where(np.arange(inner.max()) < inner, order, 1)  # of the tokens, then padding
    owners, places = np.nonzero(order.argsort(1).argsort(1) < counts)
    kind, other = kind[owners, places], other[owners, places] * len(tokenizer)
    flat, positions = np.concatenate(sentences), places + 1
    where = (np.cumsum(lengths) - lengths)[owners] + positions
    ids = flat[where]
    replaced = np.where(kind < MASKED + REPLACED, other.astype(ids.dtype), ids)
    flat[where] = np.where(kind < MASKED, tokenizer.mask_id, replaced)
    hidden = np.split(flat, np.cumsum(lengths)[:-1])
    return hidden, owners, positions, ids.astype(np.int64)


class MaskedLMHead(nn.Module):
    """Logits over the vocabulary: dense, GELU, LayerNorm, the word embeddings, a bias.

    As in BERT (`config` is its `BertConfig`), the output matrix is the word embeddings'.
    """

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.bias = nn.Parameter(torch.zeros(config.vocab_size))
        nn.init.normal_(self.dense.weight, std=config.initializer_range)
        nn.init.zeros_(self.dense.bias)

    def forward(self, hidden_states, word_embeddings):
        """(tokens, hidden), (vocab_size, hidden) -> (tokens, vocab_size)."""
        hidden_states = self.LayerNorm(F.gelu(self.dense(hidden_states)))
        return F.linear(hidden_states, word_embeddings, self.bias)
