"""Encoder and task heads: what is predicted, and what is each loss?

One forward pass encodes all sentences of a step together and returns one scalar per loss. The
script sums them: L = sum of the task losses + unsupervised SimCSE on each task's sentences +
supervised SimCSE on the paraphrase pairs + R-Drop's consistency of single tasks, the last three
when asked for.
"""

import torch
import torch.nn.functional as F
from torch import nn

from bert import FastDropout, pack
from config import TASKS
from distributed import gather_rows, mean_over_processes
from simcse import supervised_simcse_loss, unsupervised_simcse_loss
from tokenizer import join_pair

VECTOR_CACHE_MIB = 1024  # sentence vectors of a frozen encoder that are kept, at most

# ------------------------------------------------------------------------------------------ heads


class SentenceHead(nn.Module):
    """Logits of one vector: a linear layer, behind a feed-forward layer if `feed_forward`."""

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
    """A linear layer on u, v, |u - v| and u · v, elementwise (Conneau et al. 2017, §3.1).

    Reimers & Gurevych 2019 leave u · v out.
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
    """The product of the two vectors, each through one shared linear layer (the paper's baseline).

    Divided by the square root of the hidden size, so that its size does not depend on the encoder.
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
    """scale · cos(u, v) + bias: fixed at the label's range for a score, learned for a yes or no."""

    def __init__(self, task):
        super().__init__()
        learned = task.kind == "binary"
        # It starts with probability ½ at cosine .7: an encoder's sentence vectors are all alike.
        scale, bias = (10.0, -7.0) if learned else (task.high, 0.0)
        self.scale = nn.Parameter(torch.tensor([scale])) if learned else scale
        self.bias = nn.Parameter(torch.tensor([bias])) if learned else bias

    def forward(self, u, v):
        """(batch, hidden) twice -> (batch, 1)."""
        return self.scale * F.cosine_similarity(u, v, dim=-1)[:, None] + self.bias


class SumHead(nn.Module):
    """The sum of several heads' outputs; `places[i]` are the vectors that the i-th is given."""

    def __init__(self, heads, places):
        super().__init__()
        self.heads, self.places = nn.ModuleList(heads), places

    def forward(self, *vectors):
        """(batch, hidden) each -> (batch, num_classes)."""
        parts = zip(self.heads, self.places, strict=True)
        return sum(head(*(vectors[place] for place in places)) for head, places in parts)


def make_head(task, kind, roles, hidden, dropout):
    """The head module of `task` (a row of `TASKS`), of the kind that `--<task>_head` names.

    `roles` are the sequences whose vectors it is given (`MultitaskConfig.roles`).
    """
    if len(roles) == 1:
        return SentenceHead(hidden, task.num_classes, dropout, feed_forward=kind == "ffn")
    if len(roles) == 3:
        together = SentenceHead(hidden, task.num_classes, dropout)
        apart = make_head(task, kind, roles[1:], hidden, dropout)
        return SumHead([together, apart], [(0,), (1, 2)])
    if kind == "dot":
        return DotHead(hidden, dropout)
    if kind == "cosine":
        return CosineHead(task)
    features = FeaturesHead(hidden, task.num_classes, dropout)
    if kind == "features+cosine":
        return SumHead([features, CosineHead(task)], [(0, 1)] * 2)
    return features


def task_loss(task, outputs, labels):
    """Mean loss of a batch: cross entropy, logistic loss or squared error by the task's kind.

    `outputs` (batch, num_classes), `labels` (batch,) fp32. Returns a scalar.
    """
    if task.kind == "classes":
        return F.cross_entropy(outputs, labels.long())
    if task.kind == "binary":
        return F.binary_cross_entropy_with_logits(outputs.squeeze(-1), labels)
    return F.mse_loss(outputs.squeeze(-1), labels)


def consistency_loss(task, first, second):
    """How far two passes under different dropout masks predict different things (R-Drop).

    Mean of both Kullback-Leibler divergences (Liang et al. 2021, eq. 2). `first` and `second` are
    outputs (batch, num_classes) of a head. Returns a scalar. The paper adds up the task losses of
    the two passes, which are averaged here: its α is twice the factor of this loss.
    """
    if task.kind == "binary":  # as logits of the two answers
        first, second = (torch.cat([torch.zeros_like(x), x], dim=-1) for x in (first, second))
    p, q = (F.log_softmax(x.float(), dim=-1) for x in (first, second))
    return ((p.exp() - q.exp()) * (p - q)).sum(-1).mean() / 2


# ------------------------------------------------------------------------------------------ model


class MultitaskBERT(nn.Module):
    """An encoder shared by the heads of several tasks.

    `bert` is a `BertModel`, `config` a `MultitaskConfig`. With `frozen=True` (mode
    `last-linear-layer`) the encoder stays in eval mode and each sentence is encoded once: its
    vector is kept, up to `VECTOR_CACHE_MIB`. `offset_<task>` (num_classes,) is what `predict` adds
    to a head's outputs: 0 until `evaluation.calibrate` fits it.
    """

    def __init__(self, bert, config, pad_id=0, frozen=False):
        super().__init__()
        self.bert, self.config, self.pad_id, self.frozen = bert, config, pad_id, frozen
        hidden = bert.config.hidden_size
        self.heads = nn.ModuleDict({
            name: make_head(TASKS[name], config.head(name), config.roles(name), hidden,
                            config.dropout)
            for name in config.tasks
        })  # fmt: skip
        for name in config.tasks:
            self.register_buffer(f"offset_{name}", torch.zeros(TASKS[name].num_classes))
        if config.uses_simcse:
            self.simcse_projection = nn.Linear(hidden, hidden)
        bert.pooler.requires_grad_(False)  # nothing here uses it
        if frozen:
            bert.requires_grad_(False)
        self.vectors = {}  # of a frozen encoder: sequence -> vector
        self.encoded_sequences = self.encoded_tokens = 0  # running counts, for the log

    def train(self, mode=True):
        """As `nn.Module.train`; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    def forward(self, batches):
        """Losses of one training step.

        `batches` maps a task to its `datasets.TaskBatch`. Returns a dict of scalars: one per task
        under its name, `simcse_<task>`, `simcse_para_supervised` and `r_drop_<task>` where
        configured.
        """
        groups = {}  # (task, role) -> sequences; all of them are encoded together
        for name, batch in batches.items():
            groups |= self.task_inputs(name, batch) | self.simcse_inputs(name, batch)
            if name in self.config.r_drop:
                again = self.task_inputs(name, batch, self.config.swap_pairs)
                groups |= {(name, f"{role} again"): group for (_, role), group in again.items()}
        vectors = self.encode_groups(groups)
        losses = {}
        for name, batch in batches.items():
            task, outputs = TASKS[name], self.outputs(name, vectors)
            labels = batch.labels.to(outputs.device)
            losses[name] = task_loss(task, outputs, labels)
            if name in self.config.r_drop:
                again = self.outputs(name, vectors, " again", self.config.swap_pairs)
                losses[name] = (losses[name] + task_loss(task, again, labels)) / 2
                losses[f"r_drop_{name}"] = consistency_loss(task, outputs, again)
        for name in batches:
            if name in self.config.simcse_tasks:
                losses[f"simcse_{name}"] = self.unsupervised_simcse(name, vectors)
        if self.config.supervised_simcse and "para" in batches:
            losses["simcse_para_supervised"] = self.supervised_simcse(batches["para"], vectors)
        return losses

    def unsupervised_simcse(self, name, vectors):
        """The task's contrastive loss; a pair's first and second sentences are two groups."""
        roles = ("first", "second") if TASKS[name].is_pair else ("first",)
        losses = []
        for role in roles:
            first = self.contrast(vectors[name, role])
            second, offset = gather_rows(self.contrast(vectors[name, f"{role} again"]))
            losses.append(unsupervised_simcse_loss(first, second, offset=offset))
        return sum(losses) / len(losses)

    def supervised_simcse(self, batch, vectors):
        """The contrastive loss of the paraphrase pairs."""
        first = self.contrast(vectors["para", "first"])
        second, offset = gather_rows(self.contrast(vectors["para", "second"]))
        is_duplicate = batch.labels.to(first.device)
        anchors = mean_over_processes(is_duplicate.sum())
        return supervised_simcse_loss(
            first, second, is_duplicate, offset=offset, anchors_per_process=anchors
        )

    def contrast(self, vectors):
        """The projection in front of the contrastive losses, (batch, hidden) -> the same."""
        return torch.tanh(self.simcse_projection(vectors))

    def predict(self, name, batch):
        """Calibrated outputs of a task's head, (batch, num_classes) fp32: logits or scores."""
        outputs = self.outputs(name, self.encode_groups(self.task_inputs(name, batch)))
        return outputs.float() + self.get_buffer(f"offset_{name}")

    def outputs(self, name, vectors, suffix="", swapped=False):
        """The head of `name` on its vectors; `suffix` " again": on those of the second pass.

        `swapped`: the second sentence's vector in place of the first's, and the first's in place of
        the second's.
        """
        roles = self.config.roles(name)
        if swapped:
            roles = (*roles[:-2], *reversed(roles[-2:]))
        return self.heads[name](*(vectors[name, role + suffix] for role in roles))

    # ------------------------------------------------------------------ sentences into vectors

    def task_inputs(self, name, batch, swapped=False):
        """The sequences that the task's head needs, by (task, role); each (ids, segment start).

        `swapped`: pairs that are one sequence begin with their second sentence.
        """
        roles, groups = self.config.roles(name), {}
        if "pair" in roles:
            sides = (batch.second, batch.first) if swapped else (batch.first, batch.second)
            joined = zip(*sides, strict=True)
            groups[name, "pair"] = [join_pair(*ab, self.config.max_length) for ab in joined]
        return groups | (single_sentences(name, batch) if "first" in roles else {})

    def simcse_inputs(self, name, batch):
        """The sequences that the contrastive losses need: every sentence, by itself, twice over.

        A pass that the task's head needs anyway serves as the first of the two.
        """
        groups = {}
        if name in self.config.simcse_tasks:
            groups = single_sentences(name, batch)
            groups |= {(name, f"{role} again"): g for (_, role), g in groups.items()}
        if name == "para" and self.config.supervised_simcse:
            groups |= single_sentences(name, batch)
        return groups

    def encode_groups(self, groups):
        """Encode all sequences of `groups` in one pass; the vectors come back under their keys."""
        sequences = [sequence for group in groups.values() for sequence in group]
        vectors = self.encode_once(sequences) if self.frozen else self.encode(sequences)
        parts = vectors.split([len(group) for group in groups.values()])
        return dict(zip(groups, parts, strict=True))

    def encode(self, sequences):
        """Vectors of sequences (ids, segment start) in their order, (sequences, hidden) fp32."""
        ids, starts = zip(*sequences, strict=True)
        self.bert.check_length(max(map(len, ids)))
        self.encoded_sequences += len(ids)
        self.encoded_tokens += sum(map(len, ids))
        device = self.bert.embeddings.word_embeddings.weight.device
        packed = pack(ids, starts, self.pad_id, device)
        return self.pool(self.bert.encode(packed.rows), packed)

    def pool(self, hidden_states, packed):
        """One vector a sentence: (tokens, hidden) -> (sentences, hidden) fp32."""
        if self.config.pooling == "cls":
            return hidden_states[packed.first].float()
        hidden_states = hidden_states.float()
        sums = hidden_states.new_zeros(len(packed.lengths) + 1, hidden_states.size(1))
        sums = sums.index_add(0, packed.sentence, hidden_states)  # the last row is the padding's
        return sums[:-1] / packed.lengths[:, None]

    @torch.no_grad()
    def encode_once(self, sequences):
        """As `encode`, for a frozen encoder: only what was not encoded before."""
        keys = [(ids.tobytes(), start) for ids, start in sequences]
        new = {
            key: sequence
            for key, sequence in zip(keys, sequences, strict=True)
            if key not in self.vectors
        }
        fresh = dict(zip(new, self.encode(list(new.values())), strict=True)) if new else {}
        found = torch.stack([self.vectors[k] if k in self.vectors else fresh[k] for k in keys])
        self.vectors |= dict(list(fresh.items())[: self.vectors_to_keep()])
        return found

    def vectors_to_keep(self):
        """How many more vectors of a frozen encoder there is room for."""
        room = VECTOR_CACHE_MIB * 2**20 // (4 * self.bert.config.hidden_size)
        return max(0, room - len(self.vectors))

    # --------------------------------------------------------------- the course starter's methods

    def predict_sentiment(self, input_ids, attention_mask):
        """Sentiment logits (batch, 5) of padded sentences (batch, seq)."""
        return self.predict("sst", PaddedBatch(input_ids, attention_mask))

    def predict_paraphrase(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """Paraphrase logits (batch,) of padded sentence pairs, each (batch, seq)."""
        pairs = PaddedBatch(input_ids_1, attention_mask_1, input_ids_2, attention_mask_2)
        return self.predict("para", pairs).squeeze(-1)

    def predict_similarity(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """Similarity (batch,) on the scale 0 to 5 of padded sentence pairs, each (batch, seq)."""
        pairs = PaddedBatch(input_ids_1, attention_mask_1, input_ids_2, attention_mask_2)
        return self.predict("sts", pairs).squeeze(-1)


class PaddedBatch:
    """Sentences given as padded tensors, in the shape of a `datasets.TaskBatch`."""

    def __init__(self, input_ids, attention_mask, input_ids_2=None, attention_mask_2=None):
        self.first = self.unpad(input_ids, attention_mask)
        self.second = None if input_ids_2 is None else self.unpad(input_ids_2, attention_mask_2)

    @staticmethod
    def unpad(input_ids, attention_mask):
        """(batch, seq) twice -> a list of int32 arrays without padding.

        Raises `ValueError` for a sentence without a real token, which has no vector.
        """
        if not attention_mask.any(-1).all():
            raise ValueError("attention_mask: a row without a 1; expected a real token in each")
        rows = zip(input_ids.cpu().int(), attention_mask.cpu().bool(), strict=True)
        return [ids[mask].numpy() for ids, mask in rows]


def single_sentences(name, batch):
    """Each sentence of a batch by itself, by (task, role)."""
    roles = {"first": batch.first, "second": batch.second}
    return {
        (name, role): [(ids, len(ids)) for ids in sentences]
        for role, sentences in roles.items()
        if sentences is not None
    }
