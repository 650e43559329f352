"""Masked language modelling (Devlin et al. 2019, §3.1), which adapts an encoder to texts.

A part of each sentence's tokens is masked, and a head predicts what was there.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

CHOSEN_SHARE = 0.15  # of a sentence's tokens that are masked (Devlin et al. 2019, §3.1)
MASK_SHARE, RANDOM_SHARE = 0.8, 0.1  # of these become [MASK], or a random token; the others stay


def mask_tokens(sentences, tokenizer, max_length, seed, first_row=0):
    """Mask 15 % of each sentence's tokens, special tokens excepted; at least one if there is any.

    80 % of the masked tokens become [MASK], 10 % a random token, 10 % stay as they are.
    `sentences` are int32 arrays of at most `max_length` ids: rows `first_row`, `first_row` + 1, …
    of the batch of all processes. What is masked depends only on `seed` (whole numbers) and the
    row. Returns the new sentences, and of the masked tokens, each (masked tokens,) int64: the
    sentence, the position in it, and the id that was there.
    """
    lengths = np.array([len(ids) for ids in sentences])
    inner = lengths[:, None] - 2  # without [CLS] and [SEP]
    draws = np.random.default_rng(seed).random((first_row + len(sentences), 3, max_length))
    draw, kind, other = draws[first_row:, :, : inner.max()].swapaxes(0, 1)
    counts = np.minimum(inner, np.maximum(1, np.rint(CHOSEN_SHARE * inner)))
    draw = np.where(np.arange(inner.max()) < inner, draw, 1)  # the padding ranks last
    owners, places = np.nonzero(draw.argsort(1).argsort(1) < counts)  # the tokens that rank first
    kind, other = kind[owners, places], other[owners, places] * len(tokenizer)
    flat, positions = np.concatenate(sentences), places + 1
    where = (np.cumsum(lengths) - lengths)[owners] + positions  # indices into `flat`
    ids = flat[where]
    replaced = np.where(kind < MASK_SHARE + RANDOM_SHARE, other.astype(ids.dtype), ids)
    flat[where] = np.where(kind < MASK_SHARE, tokenizer.mask_id, replaced)
    masked = np.split(flat, np.cumsum(lengths)[:-1])
    return masked, owners, positions, ids.astype(np.int64)


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

    def loss(self, hidden_states, word_embeddings, labels):
        """Cross entropy of masked tokens, summed; `labels` (tokens,) are the ids they had."""
        logits = self(hidden_states, word_embeddings)
        return F.cross_entropy(logits.float(), labels, reduction="sum")
