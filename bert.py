"""BERT, by hand (Devlin et al. 2019): embeddings, self-attention, feed-forward layers, pooler.

Shape legend: B rows, T tokens of a row, N tokens of all rows together, D hidden size, H heads.

A sequence is a sentence, or a pair of sentences encoded as one. A row is one sequence with its
padding, as usual, or several short ones side by side (`pack`). With one sequence a row, half of the
computation would be padding. In attention a token sees only its own sequence. Everything else works
on single tokens, on all N at once.
"""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from base_bert import BertPreTrainedModel

ROW_TOKENS = 64  # tokens of a row; rows of longer sequences have a multiple of it
# Empty rows pad a step to a multiple of ROWS_MULTIPLE * ROW_TOKENS tokens. So there are few shapes:
# oneDNN keeps a kernel, and a GPU's allocator a block, for each of them.
ROWS_MULTIPLE = 2


class Rows(NamedTuple):
    """Rows of one width."""

    input_ids: torch.Tensor  # (B, T) int64
    position_ids: torch.Tensor  # (B, T) int64, within the sequence
    token_type_ids: torch.Tensor  # (B, T) int64
    # (B, 1, 1 or T, T) bool, True where a token may attend; `encode` makes it an `additive_mask`
    attention_mask: torch.Tensor
    group: str | None = None  # set by `join_packed`, for layers that treat groups differently


class Packed(NamedTuple):
    """Sequences in rows, and where they are: indices into the N tokens of all rows."""

    rows: list  # of `Rows`; after `pack`, each of another width
    owners: torch.Tensor  # (N,) int64, each token's sequence; at padding, the number of sequences
    starts: torch.Tensor  # (sequences,) int64, where each begins
    lengths: torch.Tensor  # (sequences,) int64
    tokens: int  # of all sequences, without the padding


def additive_mask(mask, dtype):
    """What is added to attention's scores: 0 where `mask` is True, else the lowest number."""
    return torch.zeros_like(mask, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)


class FastDropout(nn.Dropout):
    """Dropout; on a CPU with random numbers drawn 64 bits at a time, four elements from each.

    `F.dropout` draws one number per element, and that is most of its time.
    """

    def forward(self, x):
        """`x` of any shape, each element zeroed with probability p, the others scaled up."""
        if x.device.type != "cpu" or not self.training or self.p == 0:
            return super().forward(x)
        return x * dropout_mask(x.shape, self.p, x.dtype)


def dropout_mask(shape, p, dtype):
    """0 with probability p, rounded to 2^-16, else 1 / (1 - p); seeded by torch's generator."""
    count = math.prod(shape)
    generator = np.random.Generator(np.random.SFC64(int(torch.randint(2**63 - 1, ()))))
    words = generator.integers(0, 2**64, size=(count + 3) // 4, dtype=np.uint64)
    bits = torch.from_numpy(words.view(np.int16))[:count].view(shape)
    dropped = min(round(p * 2**16), 2**16 - 1)
    mask = torch.ge(bits, dropped - 2**15, out=torch.empty(shape, dtype=dtype))
    return mask.mul_(2**16 / (2**16 - dropped))


class BertEmbeddings(nn.Module):
    """Word, position and segment embeddings, summed, normalised, dropped out."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = FastDropout(config.hidden_dropout_prob)

    def forward(self, rows):
        """The tokens of a list of `Rows`, in order -> (N, D)."""
        ids, positions, segments = (
            torch.cat([getattr(r, name).flatten() for r in rows])
            for name in ("input_ids", "position_ids", "token_type_ids")
        )
        summed = self.word_embeddings(ids) + self.token_type_embeddings(segments)
        summed = summed + self.position_embeddings(positions)
        return self.dropout(self.LayerNorm(summed))


class BertSelfAttention(nn.Module):
    """Multi-head scaled dot-product attention (Vaswani et al. 2017, §3.2) within each sequence."""

    def __init__(self, config):
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query = nn.Linear(config.hidden_size, config.hidden_size)
        self.key = nn.Linear(config.hidden_size, config.hidden_size)
        self.value = nn.Linear(config.hidden_size, config.hidden_size)
        self.dropout = FastDropout(config.attention_probs_dropout_prob)

    def forward(self, hidden_states, rows):
        """(N, D) -> (N, D), the tokens of a list of `Rows` in order."""
        projections = [linear(hidden_states) for linear in (self.query, self.key, self.value)]
        if len(rows) == 1:
            return self.attend(rows[0], *projections)
        sizes = [r.input_ids.numel() for r in rows]
        by_width = zip(rows, *(x.split(sizes) for x in projections), strict=True)
        return torch.cat([self.attend(*parts) for parts in by_width])

    def attend(self, rows, query, key, value):
        """Attention inside rows of one width: three (B·T, D) -> (B·T, D)."""
        B, T = rows.input_ids.shape
        q, k, v = (x.view(B, T, self.num_heads, -1).transpose(1, 2) for x in (query, key, value))
        mask = rows.attention_mask
        dropout = self.dropout.p if self.training else 0.0
        if dropout and query.device.type != "cuda":
            context = self.attend_with_dropout(q, k, v, mask)
        else:
            size = q.size(-1)
            if size % 8:  # CUDA's fused kernels need a multiple of 8
                q, k, v = (F.pad(x, (0, -size % 8)) for x in (q, k, v))
            settings = {"attn_mask": mask, "dropout_p": dropout, "scale": 1 / math.sqrt(size)}
            context = F.scaled_dot_product_attention(q, k, v, **settings)[..., :size]
        return context.transpose(1, 2).reshape(B * T, -1)

    def attend_with_dropout(self, q, k, v, mask):
        """The same written out, (B, H, T, D/H) each: only CUDA's fused kernels have dropout."""
        scores = (q / math.sqrt(q.size(-1))) @ k.transpose(-2, -1) + mask
        return self.dropout(scores.softmax(dim=-1)) @ v


class BertOutput(nn.Module):
    """Linear layer, dropout, residual connection, LayerNorm: how each half of a layer ends."""

    def __init__(self, in_features, config):
        super().__init__()
        self.dense = nn.Linear(in_features, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = FastDropout(config.hidden_dropout_prob)

    def forward(self, hidden_states, residual):
        """(N, in_features), (N, D) -> (N, D), in the residual's dtype."""
        summed = self.dropout(self.dense(hidden_states)) + residual
        return self.LayerNorm(summed).to(residual.dtype)


class BertLayer(nn.Module):
    """One transformer layer: attention, then a feed-forward network, under the published names."""

    def __init__(self, config):
        super().__init__()
        hidden, intermediate = config.hidden_size, config.intermediate_size
        attention = {"self": BertSelfAttention(config), "output": BertOutput(hidden, config)}
        self.attention = nn.ModuleDict(attention)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(hidden, intermediate)})
        self.output = BertOutput(intermediate, config)

    def forward(self, hidden_states, rows):
        """(N, D) -> (N, D)."""
        context = self.attention["self"](hidden_states, rows)
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

    def cast_frozen_linears(self, dtype):
        """Cast frozen linear layers to `dtype` once instead of in every forward pass."""
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
        self.check_length(input_ids.size(1))
        positions = torch.arange(input_ids.size(1), device=input_ids.device).expand_as(input_ids)
        if token_type_ids is None:
            token_type_ids = torch.zeros_like(input_ids)
        rows = Rows(input_ids, positions, token_type_ids, attention_mask.bool()[:, None, None, :])
        last_hidden_state = self.encode([rows]).view(*input_ids.shape, -1)
        pooled = torch.tanh(self.pooler["dense"](last_hidden_state[:, 0]))
        return {"last_hidden_state": last_hidden_state, "pooler_output": pooled}

    def check_length(self, longest):
        """Raise `ValueError` where the encoder has fewer positions than `longest` tokens need."""
        limit = self.config.max_position_embeddings
        if longest > limit:
            raise ValueError(f"sequence of {longest} tokens; this encoder has {limit} positions")

    def encode(self, rows):
        """The last hidden states (N, D) of the tokens of a list of `Rows`, in order."""
        hidden_states = self.embeddings(rows)
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device):
            # Autocast would keep fp32 between the linear layers: twice the memory traffic, and on
            # CUDA, where it makes LayerNorm's output fp32, one copy each for query, key and value.
            hidden_states = hidden_states.to(torch.get_autocast_dtype(device))
        dtype = hidden_states.dtype  # the masks are converted once, not in each layer
        rows = [r._replace(attention_mask=additive_mask(r.attention_mask, dtype)) for r in rows]
        for layer in self.encoder["layer"]:
            hidden_states = layer(hidden_states, rows)
        return hidden_states


# --------------------------------------------------------------------------- sequences into rows


def narrower(width):
    """The next width of rows: half, rounded up to a multiple of `ROW_TOKENS`; 0 below it."""
    return math.ceil(width / (2 * ROW_TOKENS)) * ROW_TOKENS if width > ROW_TOKENS else 0


def fill_rows(lengths, numbers, width):
    """Put the sequences `numbers` (indices into `lengths`) into few rows of `width` tokens.

    Best fit, longest first: each goes to the row in which it leaves the least room. One that fits
    in no row begins a new one, unless the next narrower rows can hold it. Returns the rows as lists
    of numbers, and the numbers that are left for narrower rows.
    """
    rows, left, with_room = [], [], [[] for _ in range(width)]  # [n]: rows with n tokens free
    for number in numbers[np.argsort(-lengths[numbers], kind="stable")].tolist():
        length = int(lengths[number])
        room = next((n for n in range(length, width) if with_room[n]), width)
        if room < width:
            row = with_room[room].pop()
        elif length > narrower(width):
            rows.append(row := [])
        else:
            left.append(number)
            continue
        row.append(number)
        with_room[room - length].append(row)
    return rows, np.array(left, dtype=np.int64)


def pack(sequences, segment_starts, pad_id, device):
    """Lay out token sequences in rows, the long ones in wider rows; returns a `Packed`.

    `sequences` are int32 arrays. `segment_starts[i]` is where segment 1 of sequence i begins, its
    length if it has none. A padding token has id `pad_id`.
    """
    count, lengths = len(sequences), np.array([len(sequence) for sequence in sequences])
    width = math.ceil(lengths.max() / ROW_TOKENS) * ROW_TOKENS  # of the widest rows
    rows, owners, left, offset = [], [], np.arange(count), 0
    starts = np.zeros(count, dtype=np.int64)
    while width:
        filled, left = fill_rows(lengths, left, width)
        if width == ROW_TOKENS:
            filled += [[]] * (-(offset // width + len(filled)) % ROWS_MULTIPLE)
        shape = (len(filled), width)
        ids, owner = np.full(shape, pad_id, dtype=np.int64), np.full(shape, count, dtype=np.int64)
        positions, segments = np.zeros((2, *shape), dtype=np.int64)
        for row, numbers in enumerate(filled):
            start = 0
            for number in numbers:
                end = start + lengths[number]
                ids[row, start:end], owner[row, start:end] = sequences[number], number
                positions[row, start:end] = np.arange(end - start)
                segments[row, start + segment_starts[number] : end] = 1
                starts[number] = offset + row * width + start
                start = end
        if filled:
            *parts, owner = (to_device(x, device) for x in (ids, positions, segments, owner))
            rows.append(Rows(*parts, (owner[:, :, None] == owner[:, None, :])[:, None]))
            owners.append(owner.flatten())
        offset, width = offset + len(filled) * width, narrower(width)
    starts, tokens = to_device(starts, device), int(lengths.sum())
    return Packed(rows, torch.cat(owners), starts, to_device(lengths, device), tokens)


def join_packed(groups):
    """Several `Packed` by group as one, the sequences in order; the rows know their group."""
    rows, owners, starts, offset, count = [], [], [], 0, 0
    total = sum(len(packed.lengths) for packed in groups.values())
    for group, packed in groups.items():
        rows += [r._replace(group=group) for r in packed.rows]
        is_padding = packed.owners == len(packed.lengths)
        owners.append((packed.owners + count).masked_fill(is_padding, total))
        starts.append(packed.starts + offset)
        offset, count = offset + len(packed.owners), count + len(packed.lengths)
    lengths = torch.cat([packed.lengths for packed in groups.values()])
    tokens = sum(packed.tokens for packed in groups.values())
    return Packed(rows, torch.cat(owners), torch.cat(starts), lengths, tokens)


def to_device(array, device):
    """An array, or a tensor of the CPU, on `device`; on a GPU nothing waits for the copy."""
    tensor = torch.as_tensor(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
