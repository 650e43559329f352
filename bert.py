"""BERT, by hand (Devlin et al. 2019): embeddings, self-attention, feed-forward layers, pooler.

Shape legend: B sentences, T tokens of a sentence, N tokens of all sentences together, D hidden
size, H heads.

Sentences of unlike length would cost half of the computation in padding. So everything but the
attention works on the N tokens of a step in one (N, D) tensor, and attention works on `Rectangle`s:
groups of sentences of (nearly) the same length, which lie in that tensor one after the other. The
usual padded batch is the case of a single rectangle.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from base_bert import BertPreTrainedModel

# What one more rectangle costs, in padding tokens that take as long: its kernel launches.
RECTANGLE_COST = {"cpu": 8, "cuda": 400, "mps": 200}


class Rectangle(NamedTuple):
    """Sentences of like length. `attention_mask` is None where there is no padding at all."""

    input_ids: torch.Tensor  # (B, T) int64
    attention_mask: torch.Tensor | None  # (B, T) bool, True = real token
    token_type_ids: torch.Tensor | None  # (B, T) int64; None: all of segment 0


class FastDropout(nn.Module):
    """Dropout; on a CPU with random numbers drawn 64 bits at a time, four elements from each.

    `F.dropout` draws one number per element there, three to four times slower than the rest of it.
    The rate is a multiple of 2^-16: 0.1 becomes 0.10001.
    """

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        """`x` of any shape, each element zeroed with probability p, the others scaled up."""
        if not self.training or self.p == 0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.p)
        return x * dropout_mask(x.shape, self.p, x.dtype)

    def extra_repr(self):
        return f"p={self.p}"


def dropout_mask(shape, p, dtype):
    """0 with probability p (to 2^-16), else 1 / (1 - p); a function of torch's global generator."""
    count = math.prod(shape)
    seed = int(torch.randint(2**63 - 1, ()))
    words = np.random.Generator(np.random.SFC64(seed)).integers(
        0, 2**64 - 1, size=(count + 3) // 4, dtype=np.uint64, endpoint=True
    )
    bits = torch.from_numpy(words.view(np.int16))[:count].view(shape)
    dropped = round(p * 2**16)
    return (bits >= dropped - 2**15).to(dtype).mul_(2**16 / max(1, 2**16 - dropped))


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed, normalised, dropped out."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = FastDropout(config.hidden_dropout_prob)

    def forward(self, rectangles):
        """The tokens of all rectangles, one after the other -> (N, D)."""
        ids = torch.cat([r.input_ids.flatten() for r in rectangles])
        positions = torch.cat([
            torch.arange(r.input_ids.size(1), device=ids.device).repeat(r.input_ids.size(0))
            for r in rectangles
        ])  # fmt: skip
        segments = torch.cat([
            torch.zeros_like(r.input_ids).flatten()
            if r.token_type_ids is None
            else r.token_type_ids.flatten()
            for r in rectangles
        ])  # fmt: skip
        summed = (
            self.word_embeddings(ids)
            + self.token_type_embeddings(segments)
            + self.position_embeddings(positions)
        )
        return self.dropout(self.LayerNorm(summed))


class BertSelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, §3.2) within each sentence."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = FastDropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states, rectangles):
        """(N, D) -> (N, D); rows of `hidden_states` are the tokens of `rectangles` in order."""
        sizes = [r.input_ids.numel() for r in rectangles]
        projections = (
            linear(hidden_states).split(sizes) for linear in (self.query, self.key, self.value)
        )
        return torch.cat([
            self.attend(rectangle, *qkv)
            for rectangle, *qkv in zip(rectangles, *projections, strict=True)
        ])  # fmt: skip

    def attend(self, rectangle, query, key, value):
        """Attention inside one rectangle: three (B·T, D) -> (B·T, D)."""
        B, T = rectangle.input_ids.shape
        q, k, v = (x.view(B, T, self.num_heads, -1).transpose(1, 2) for x in (query, key, value))
        mask = rectangle.attention_mask
        mask = None if mask is None else mask[:, None, None, :]  # (B, 1, 1, T)
        dropout = self.dropout.p if self.training else 0.0
        if dropout and query.device.type == "cpu":
            context = self.attend_with_dropout(q, k, v, mask)
        else:
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return context.transpose(1, 2).reshape(B * T, -1)

    def attend_with_dropout(self, q, k, v, mask):
        """The same written out, (B, H, T, D/H) each: on a CPU the fused kernel knows no dropout."""
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1)
        if mask is not None:
            scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
        return self.dropout(scores.softmax(dim=-1)) @ v


class BertOutput(nn.Module):
    """Linear layer, dropout, residual connection, LayerNorm: how each half of a layer ends."""

    def __init__(self, in_features, config):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = FastDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, residual):
        """(N, in_features), (N, D) -> (N, D)."""
        return self.LayerNorm(self.dropout(self.dense(hidden_states)) + residual)


class BertLayer(nn.Module):
    """One transformer layer: attention, then a feed-forward network, under the published names."""

    def __init__(self, config):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        self.attention = nn.ModuleDict(
            {"self": BertSelfAttention(config), "output": BertOutput(hidden, config)}
        )
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, intermediate)})
        self.output = BertOutput(intermediate, config)

    def forward(self, hidden_states, rectangles):
        """(N, D) -> (N, D)."""
        context = self.attention["self"](hidden_states, rectangles)
        hidden_states = self.attention["output"](context, hidden_states)
        return self.output(F.gelu(self.intermediate["dense"](hidden_states)), hidden_states)


class BertModel(BertPreTrainedModel):
    """The encoder: embeddings, `num_hidden_layers` layers and the tanh pooler."""

    def __init__(self, config):
        super().__init__(config)
        self.embeddings = BertEmbeddings(config)
        layers = [BertLayer(config) for _ in range(config.num_hidden_layers)]
        self.encoder = nn.ModuleDict({"layer": nn.ModuleList(layers)})
        self.pooler = nn.ModuleDict({"dense": nn.Linear(config.hidden_size, config.hidden_size)})
        self.init_weights()

    def set_dropout(self, p):
        """Set the rate of every dropout, of hidden states and of attention."""
        for module in self.modules():
            if isinstance(module, FastDropout):
                module.p = p

    def keep_frozen_in(self, dtype):
        """Convert frozen linear layers to `dtype` once, which autocast would do on every use."""
        for module in self.modules():
            if isinstance(module, nn.Linear) and not module.weight.requires_grad:
                module.weight.data = module.weight.data.to(dtype)
                module.bias.data = module.bias.data.to(dtype)

    def forward(self, input_ids, attention_mask, token_type_ids=None):
        """The standard call on a padded batch.

        `input_ids` (batch, seq) int64; `attention_mask` (batch, seq), 1 = real token;
        `token_type_ids` (batch, seq), segment 0 or 1, all 0 by default. Returns a dict with
        `last_hidden_state` (batch, seq, hidden) and `pooler_output` (batch, hidden).
        """
        rectangle = Rectangle(input_ids, attention_mask.bool(), token_type_ids)
        (last_hidden_state,) = self.encode([rectangle])
        pooled = torch.tanh(self.pooler["dense"](last_hidden_state[:, 0]))
        return {"last_hidden_state": last_hidden_state, "pooler_output": pooled}

    def encode(self, rectangles):
        """The last hidden states of each rectangle, a list of (B, T, D)."""
        longest = max(r.input_ids.size(1) for r in rectangles)
        if longest > self.config.max_position_embeddings:
            raise ValueError(
                f"sequence of {longest} tokens; this encoder has "
                f"{self.config.max_position_embeddings} positions"
            )
        hidden_states = self.embeddings(rectangles)
        if hidden_states.device.type == "cpu" and torch.is_autocast_enabled("cpu"):
            # Autocast would go on in fp32 between the linear layers: twice the memory traffic.
            hidden_states = hidden_states.to(torch.get_autocast_dtype("cpu"))
        for layer in self.encoder["layer"]:
            hidden_states = layer(hidden_states, rectangles)
        parts = hidden_states.split([r.input_ids.numel() for r in rectangles])
        return [
            part.view(*rectangle.input_ids.shape, -1)
            for part, rectangle in zip(parts, rectangles, strict=True)
        ]


# ------------------------------------------------------------------- sentences into rectangles


def group_by_length(lengths, rectangle_cost):
    """Cut ascending `lengths` into runs so that padding tokens + rectangles × cost is smallest.

    Exact, by dynamic programming over the distinct lengths. Returns the runs as (start, end).
    """
    values, starts = np.unique(lengths, return_index=True)
    bounds = [*starts.tolist(), len(lengths)]
    best, cut = [0.0], [0]  # best[j]: least tokens, padding and cost for the first j values
    for j in range(1, len(values) + 1):
        options = [
            best[i] + (bounds[j] - bounds[i]) * int(values[j - 1]) + rectangle_cost
            for i in range(j)
        ]
        best.append(min(options))
        cut.append(options.index(best[-1]))
    runs, j = [], len(values)
    while j > 0:
        runs.append((bounds[cut[j]], bounds[j]))
        j = cut[j]
    return runs[::-1]


def make_rectangles(sequences, segment_starts, pad_id, device):
    """Lay out token sequences in rectangles.

    `sequences` are int32 arrays; `segment_starts[i]` is where sequence i's segment 1 begins (its
    length where it has none). Returns the rectangles and `place`, (sentences,) int64: sequence i is
    row `place[i]` of the rectangles' rows, one after the other.
    """
    lengths = np.array([len(sequence) for sequence in sequences])
    order = np.argsort(lengths, kind="stable")
    device = torch.device(device)
    rectangles = []
    for start, end in group_by_length(lengths[order], RECTANGLE_COST[device.type]):
        rows = order[start:end]
        shape = (len(rows), int(lengths[rows[-1]]))
        ids = np.full(shape, pad_id, dtype=np.int64)
        for row, index in enumerate(rows):
            ids[row, : lengths[index]] = sequences[index]
        columns = np.arange(shape[1])
        mask = columns < lengths[rows, None]
        segments = (columns >= np.array([segment_starts[i] for i in rows])[:, None]) & mask
        rectangles.append(
            Rectangle(
                to_device(ids, device),
                None if mask.all() else to_device(mask, device),
                to_device(segments.astype(np.int64), device) if segments.any() else None,
            )
        )
    place = np.empty(len(sequences), dtype=np.int64)
    place[order] = np.arange(len(sequences))
    return rectangles, to_device(place, device)


def to_device(array, device):
    """A NumPy array as a tensor on `device`, without waiting for the copy on a GPU."""
    tensor = torch.from_numpy(array)
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
