"""The multitask model: an encoder, a head for each task, and every loss.

One forward call encodes all sentences of its batches together and returns one scalar per loss. The
script sums them with their weights: the task losses and, if asked for, those of unsupervised SimCSE
on each task's sentences, supervised SimCSE on the paraphrase pairs, R-Drop and masked language
modelling.
"""

from collections import defaultdict
from typing import NamedTuple

import numpy as np
import torch
from torch import nn

from bert import join_packed, pack, to_device
from config import TASKS
from datasets import TaskBatch
from heads import make_head, r_drop_loss, task_loss
from mlm import MaskedLMHead, mask_tokens
from runtime.distributed import gather_rows, mean_over_processes, rank
from simcse import copies_of, sentence_keys, supervised_simcse_loss, unsupervised_simcse_loss
from tokenizer import join_pair

VECTOR_CACHE_MIB = 1024  # sentence vectors of a frozen encoder that are kept, at most
MASKED = 2  # the pass of sentences with masked tokens; 0 and 1 are those of the other losses


class Prepared(NamedTuple):
    """What a forward pass takes from the batches of a step, on the device."""

    batches: dict  # task -> `TaskBatch`
    labels: dict  # task -> (batch,) fp32
    keys: dict  # of tasks with a SimCSE loss: task -> role -> (batch,) int64, equal for copies
    parts: list  # of the sequences: (task and pass, role, number of sequences)
    sequences: object  # all of them, as `MultitaskBERT.arrange` lays them out
    targets: dict  # task -> places and ids of the masked tokens, both (masked tokens,) int64


class MultitaskBERT(nn.Module):
    """An encoder shared by the heads of several tasks.

    `bert` is a `BertModel`, `config` a `MultitaskConfig`, `tokenizer` the encoder's. With
    `frozen=True` (mode `last-linear-layer`) the encoder stays in eval mode and each sentence is
    encoded once: its vector is kept, up to `VECTOR_CACHE_MIB`. `predict` adds `offset_<task>`
    (num_classes,) to a head's outputs: 0 until `evaluation.calibrate` fits it.
    """

    def __init__(self, bert, config, tokenizer=None, frozen=False):
        super().__init__()
        self.bert, self.config, self.tokenizer, self.frozen = bert, config, tokenizer, frozen
        self.pals = None  # of `apply_pals`: each task's own part of the encoder's layers
        self.pad_id = tokenizer.pad_id if tokenizer else bert.config.pad_token_id
        hidden = bert.config.hidden_size
        self.heads = nn.ModuleDict()
        for name in config.tasks:
            task, head, roles = TASKS[name], config.head(name), config.roles(name)
            self.heads[name] = make_head(task, head, roles, hidden, config.dropout)
            self.register_buffer(f"offset_{name}", torch.zeros(task.num_classes))
        if config.uses_simcse:
            self.simcse_projection = nn.Linear(hidden, hidden)
        if config.mlm:
            self.mlm = MaskedLMHead(bert.config)
        bert.pooler.requires_grad_(False)  # nothing here uses it
        if frozen:
            bert.requires_grad_(False)
        self.vector_cache = {}  # of a frozen encoder: sequence -> vector
        self.cosine_targets = None  # of GradVac, (tasks, tasks); saved with a checkpoint
        self.encoded_sequences = self.encoded_tokens = 0  # counts for the log

    @property
    def device(self):
        """Where the model's weights lie."""
        return self.bert.embeddings.word_embeddings.weight.device

    def train(self, mode=True):
        """As `nn.Module.train`; a frozen encoder stays in eval mode."""
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    def prepare(self, batches, seed=(0,)):
        """The input of `forward`. It can be made while a GPU still computes the step before.

        `batches` maps a task to its `datasets.TaskBatch`; `seed`, whole numbers, says which tokens
        are masked. Returns a `Prepared`.
        """
        labels = {name: to_device(batch.labels, self.device) for name, batch in batches.items()}
        keys = {
            name: {
                role: to_device(sentence_keys(sentences), self.device)
                for role, sentences in batch.columns().items()
            }
            for name, batch in batches.items()
            if self.has_simcse(name)
        }
        groups, masked = {}, {}  # (task, pass) -> sequences by role; all are encoded together
        for name, batch in batches.items():
            groups[name, 0] = self.task_inputs(name, batch) if name in self.heads else {}
            groups[name, 1] = {}
            if self.has_simcse(name):
                groups[name, 0] |= single_sentences(batch)
            if name in self.config.simcse_tasks:
                groups[name, 1] |= single_sentences(batch)
            if name in self.config.r_drop:
                groups[name, 1] |= self.task_inputs(name, batch, self.config.swap_pairs)
            if name in self.config.mlm:
                groups[name, MASKED], masked[name] = self.mask(name, batch, seed)
        parts, sequences = self.arrange(groups)
        targets = self.locate(masked, parts, sequences)
        return Prepared(batches, labels, keys, parts, sequences, targets)

    def forward(self, batches):
        """Every loss of the batches.

        `batches` are `Prepared`, or what `prepare` takes. Returns a dict of scalars: `<task>` for
        each that has a head, and if configured `simcse_<task>`, `simcse_para_supervised`,
        `r_drop_<task>` and `mlm_<task>`.
        """
        prepared = batches if isinstance(batches, Prepared) else self.prepare(batches)
        labels, keys, losses = prepared.labels, prepared.keys, {}
        if self.frozen:
            encoded = self.encode_once(prepared.sequences)
        else:
            states = self.token_states(prepared.sequences)
            encoded = self.pool(states, prepared.sequences)
        vectors = by_role(prepared.parts, encoded)
        for name in labels:
            if name in self.heads:
                losses |= self.task_losses(name, labels[name], vectors[name, 0], vectors[name, 1])
        for name in labels:
            if name in self.config.simcse_tasks:
                passes = vectors[name, 0], vectors[name, 1]
                losses[f"simcse_{name}"] = self.unsupervised_simcse(keys[name], *passes)
        if self.config.supervised_simcse and "para" in labels:
            loss = self.supervised_simcse(labels["para"], keys["para"], vectors["para", 0])
            losses["simcse_para_supervised"] = loss
        for name, (places, ids) in prepared.targets.items():
            loss, count = self.masked_loss(states, places, ids)
            losses[f"mlm_{name}"] = loss / mean_over_processes(count).clamp(min=1e-9)
        return losses

    def task_losses(self, name, labels, pass_0, pass_1):
        """The task's loss; with R-Drop its mean over two passes, and the R-Drop loss.

        `pass_0` and `pass_1` are the vectors of the two passes by role.
        """
        task, outputs = TASKS[name], self.outputs(name, pass_0)
        loss = task_loss(task, outputs, labels)
        if name not in self.config.r_drop:
            return {name: loss}
        again = self.outputs(name, pass_1, self.config.swap_pairs)
        loss = (loss + task_loss(task, again, labels)) / 2
        return {name: loss, f"r_drop_{name}": r_drop_loss(task, outputs, again)}

    def unsupervised_simcse(self, keys, pass_0, pass_1):
        """A task's contrastive loss; a pair's first and second sentences are contrasted apart.

        By role: `keys` of the sentences, and `pass_0` and `pass_1`, the vectors of the two passes.
        """
        losses = []
        for role, role_keys in keys.items():
            anchors = self.project(pass_0[role])
            candidates, offset = gather_rows(self.project(pass_1[role]))
            copies = copies_of(gather_rows(role_keys)[0], offset, role_keys)
            loss = unsupervised_simcse_loss(anchors, candidates, offset=offset, copies=copies)
            losses.append(loss)
        return sum(losses) / len(losses)

    def supervised_simcse(self, is_duplicate, keys, vectors):
        """The contrastive loss of the paraphrase pairs; `keys` and `vectors` by role."""
        anchors = self.project(vectors["first"])
        candidates, offset = gather_rows(self.project(vectors["second"]))
        weights = is_duplicate / mean_over_processes(is_duplicate.sum()).clamp(min=1e-9)
        copies = copies_of(gather_rows(keys["second"])[0], offset, keys["first"], keys["second"])
        return supervised_simcse_loss(anchors, candidates, weights, offset=offset, copies=copies)

    def project(self, vectors):
        """The projection before the contrastive losses, (batch, hidden) -> the same."""
        return torch.tanh(self.simcse_projection(vectors))

    def predict(self, name, batch):
        """Calibrated outputs of a task's head, (batch, num_classes) fp32: logits or scores."""
        outputs = self.outputs(name, self.head_vectors(name, batch))
        return outputs.float() + self.get_buffer(f"offset_{name}")

    def outputs(self, name, vectors, is_swapped=False):
        """The task's head on its vectors by role; `is_swapped`: the two sentences are swapped."""
        roles = self.config.roles(name)
        if is_swapped:  # "first" and "second" are the last two; "pair" alone stays
            roles = (*roles[:-2], *reversed(roles[-2:]))
        with torch.autocast(self.device.type, enabled=False):  # bf16 would round predictions
            return self.heads[name](*(vectors[role] for role in roles))

    # ------------------------------------------------------------------ sentences into vectors

    def task_inputs(self, name, batch, is_swapped=False):
        """The sequences of the task's head by role; each is (ids, start of segment 1).

        `is_swapped`: pairs encoded as one sequence begin with their second sentence.
        """
        roles, groups = self.config.roles(name), {}
        if "pair" in roles:
            sides = (batch.second, batch.first) if is_swapped else (batch.first, batch.second)
            pairs = zip(*sides, strict=True)
            groups["pair"] = [join_pair(*ab, self.config.max_length) for ab in pairs]
        return groups | (single_sentences(batch) if "first" in roles else {})

    def has_simcse(self, name):
        """Whether a task has a contrastive loss."""
        is_supervised = name == "para" and self.config.supervised_simcse
        return is_supervised or name in self.config.simcse_tasks

    def head_vectors(self, name, batch):
        """The vectors that a task's head takes, by role: (batch, hidden) fp32 each."""
        parts, sequences = self.arrange({(name, 0): self.task_inputs(name, batch)})
        encoded = self.encode_once(sequences) if self.frozen else self.encode(sequences)
        return by_role(parts, encoded)[name, 0]

    def arrange(self, groups):
        """Lay out `{(task, pass): {role: sequences}}` for the encoder.

        Returns the parts in order, each (task and pass, role, number of sequences), and their
        sequences: a `bert.Packed`, or a list if the encoder is frozen. The groups of one task must
        stand together in `groups`: with PALs, no row has sequences of two tasks.
        """
        parts, sequences = [], defaultdict(list)
        for group, roles in groups.items():
            for role, part in roles.items():
                parts.append((group, role, len(part)))
                sequences[group[0] if self.pals else None] += part
        if self.frozen:
            return parts, sequences[None]
        packed = {task: self.pack(theirs) for task, theirs in sequences.items()}
        return parts, join_packed(packed) if self.pals else packed[None]

    def pack(self, sequences):
        """Sequences, each (ids, start of segment 1), in rows on the device: a `bert.Packed`."""
        ids, segment_starts = zip(*sequences, strict=True)
        self.bert.check_length(max(map(len, ids)))
        return pack(ids, segment_starts, self.pad_id, self.device)

    def encode(self, packed):
        """Vectors (sequences, hidden) fp32 of packed sequences."""
        return self.pool(self.token_states(packed), packed)

    def token_states(self, packed):
        """The last hidden states (tokens, hidden) of packed sequences."""
        self.encoded_sequences += len(packed.lengths)
        self.encoded_tokens += packed.tokens
        return self.bert.encode(packed.rows)

    def pool(self, hidden_states, packed):
        """One vector for each sequence: (tokens, hidden) -> (sequences, hidden) fp32."""
        if self.config.pooling == "cls":
            return hidden_states[packed.starts].float()
        hidden_states = hidden_states.float()
        sums = hidden_states.new_zeros(len(packed.lengths) + 1, hidden_states.size(1))
        sums = sums.index_add(0, packed.owners, hidden_states)
        return sums[:-1] / packed.lengths[:, None]  # the last row is the padding's

    @torch.no_grad()
    def encode_once(self, sequences):
        """Vectors of sequences, for a frozen encoder: encodes only what was not encoded before.

        The kept vectors lie in the CPU's memory; those of a step reach the device in one copy.
        """
        keys = [(ids.tobytes(), start) for ids, start in sequences]
        distinct = dict(zip(keys, sequences, strict=True))
        kept = [key for key in distinct if key in self.vector_cache]
        new = [key for key in distinct if key not in self.vector_cache]
        parts = []
        if kept:
            vectors = torch.stack([self.vector_cache[key] for key in kept])
            parts.append(to_device(vectors, self.device))
        if new:
            parts.append(self.encode(self.pack([distinct[key] for key in new])))
            if room := self.vectors_to_keep():
                self.vector_cache |= zip(new[:room], parts[-1][:room].cpu(), strict=True)
        places = {key: place for place, key in enumerate(kept + new)}
        order = np.array([places[key] for key in keys])
        return torch.cat(parts)[to_device(order, self.device)]

    def vectors_to_keep(self):
        """How many more vectors of a frozen encoder there is room for."""
        room = VECTOR_CACHE_MIB * 2**20 // (4 * self.bert.config.hidden_size)
        return max(0, room - len(self.vector_cache))

    # ------------------------------------------------------------------- masked language modelling

    def mask(self, name, batch, seed, first_row=None):
        """The task's sentences with masked tokens, and what these were: see `mask_tokens`.

        All sentences have the role "first", second sentences too. Masks depend on a sentence's
        place, counted from `first_row`; None: `batch` is this process's share of a batch.
        """
        sentences = [ids for row in zip(*batch.columns().values(), strict=True) for ids in row]
        first_row = rank() * len(sentences) if first_row is None else first_row
        settings = self.config.max_length, (*seed, list(TASKS).index(name)), first_row
        sentences, *masked = mask_tokens(sentences, self.tokenizer, *settings)
        return {"first": [(ids, len(ids)) for ids in sentences]}, masked

    def locate(self, masked, parts, packed):
        """The places of masked tokens in what `arrange` returned, and their ids, by task."""
        starts, found = by_role(parts, packed.starts) if masked else {}, {}
        for name, of_task in masked.items():
            owners, positions, ids = (to_device(x, self.device) for x in of_task)
            found[name] = starts[name, MASKED]["first"][owners] + positions, ids
        return found

    def masked_loss(self, hidden_states, places, ids):
        """Cross entropy of a task's masked tokens (see `locate`), summed, and their number."""
        words = self.bert.embeddings.word_embeddings.weight
        loss = self.mlm.loss(hidden_states[places], words, ids)
        return loss, loss.new_full((), len(ids))

    # --------------------------------------------------------------- the course starter's methods

    def predict_sentiment(self, input_ids, attention_mask):
        """Sentiment logits (batch, 5) of padded sentences (batch, seq)."""
        return self.predict_padded("sst", (input_ids, attention_mask))

    def predict_paraphrase(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """Paraphrase logits (batch,) of padded sentence pairs, each (batch, seq)."""
        pair = (input_ids_1, attention_mask_1), (input_ids_2, attention_mask_2)
        return self.predict_padded("para", *pair).squeeze(-1)

    def predict_similarity(self, input_ids_1, attention_mask_1, input_ids_2, attention_mask_2):
        """Similarity (batch,) on the scale 0 to 5 of padded sentence pairs, each (batch, seq)."""
        pair = (input_ids_1, attention_mask_1), (input_ids_2, attention_mask_2)
        return self.predict_padded("sts", *pair).squeeze(-1)

    def predict_padded(self, name, *sentences):
        """As `predict`, for padded (ids, mask) of one or two sentences, each (batch, seq).

        Raises `ValueError` for a sentence without a real token, which has no vector.
        """
        columns = []
        for input_ids, attention_mask in sentences:
            if not attention_mask.any(-1).all():
                raise ValueError("attention_mask: a row without a 1; expected a real token in each")
            rows = zip(input_ids.cpu().int(), attention_mask.cpu().bool(), strict=True)
            columns.append([ids[mask].numpy() for ids, mask in rows])
        first, second = (*columns, None)[:2]
        return self.predict(name, TaskBatch([], first, second, None))


def single_sentences(batch):
    """Each sentence of a batch by itself, by role."""
    columns = batch.columns().items()
    return {role: [(ids, len(ids)) for ids in sentences] for role, sentences in columns}


def by_role(parts, vectors):
    """The vectors (sequences, hidden) of all parts: `{(task, pass): {role: vectors}}`."""
    found = defaultdict(dict)
    sizes = [count for *_, count in parts]
    for (group, role, _), part in zip(parts, vectors.split(sizes), strict=True):
        found[group][role] = part
    return found
