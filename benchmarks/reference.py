"""The reference worker: the same training step as a good engineer writes it with `transformers`.

One `BertModel` with SDPA attention, a forward pass for each column of each task (ten with SimCSE),
padding to the longest sentence of the batch, autocast, fused AdamW, `peft` for LoRA. Imports
nothing of the program. Runs as `python -P reference.py`, away from the program's folder, whose
datasets.py would pass for the hub's package of that name.
"""

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertModel
from worker import PAIRS, TASKS, clock, count, describe, memory, read_split, serve

LORA_TARGETS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


class ReferenceModel(nn.Module):
    """Encoder, heads and losses. The heads' parameters carry the names that the program gives."""

    def __init__(self, bert, mode, simcse, dropout):
        super().__init__()
        self.bert, self.frozen, self.simcse = bert, mode == "last-linear-layer", simcse
        hidden = bert.config.hidden_size
        dense, projection = nn.Linear(hidden, hidden), nn.Linear(hidden, 5)
        sst = nn.ModuleDict({"dense": dense, "projection": projection})
        para = nn.ModuleDict({"projection": nn.Linear(4 * hidden, 1)})
        self.heads = nn.ModuleDict({"sst": sst, "para": para})
        self.simcse_projection = nn.Linear(hidden, hidden) if simcse else None
        self.dropout = nn.Dropout(dropout)
        if self.frozen:
            bert.requires_grad_(False)

    def train(self, mode=True):
        super().train(mode)
        if self.frozen:
            self.bert.eval()
        return self

    def encode(self, ids, mask):
        """Mean over the real tokens: (batch, seq) twice -> (batch, hidden) fp32."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            hidden_states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state.float()
            weights = mask[:, :, None].float()
            return (hidden_states * weights).sum(1) / weights.sum(1)

    def outputs(self, task, vectors):
        """The task's head: 5 logits, one logit, or a similarity from -5 to 5."""
        if task == "sst":
            (u,) = vectors
            u = F.gelu(self.heads["sst"]["dense"](self.dropout(u)))
            return self.heads["sst"]["projection"](self.dropout(u))
        u, v = vectors
        if task == "para":
            features = torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
            return self.heads["para"]["projection"](self.dropout(features)).squeeze(-1)
        return 5 * F.cosine_similarity(u, v, dim=-1)

    def forward(self, batches):
        """Losses by name; `batches` maps a task to its padded columns and its labels."""
        losses = {}
        for task, (columns, labels) in batches.items():
            vectors = [self.encode(*column) for column in columns]
            losses[task] = task_loss(task, self.outputs(task, vectors), labels)
            if self.simcse:
                again = [self.encode(*column) for column in columns]
                of_column = [self.simcse_loss(*ab) for ab in zip(vectors, again, strict=True)]
                losses[f"simcse_{task}"] = sum(of_column) / len(of_column)
        return losses

    def simcse_loss(self, first, second):
        """In-batch cross entropy over cosines / 0.05 (Gao et al. 2021, eq. 4)."""
        first, second = (torch.tanh(self.simcse_projection(x)).float() for x in (first, second))
        logits = F.normalize(first, dim=-1) @ F.normalize(second, dim=-1).T / 0.05
        return F.cross_entropy(logits, torch.arange(len(logits), device=logits.device))


def task_loss(task, outputs, labels):
    """Mean loss of a batch."""
    if task == "sst":
        return F.cross_entropy(outputs, labels.long())
    if task == "para":
        return F.binary_cross_entropy_with_logits(outputs, labels)
    return F.mse_loss(outputs, labels)


def with_lora(bert, r, alpha):
    """The encoder with adapters on all six kinds of linear layer, by full name."""
    from peft import LoraConfig, get_peft_model

    names = [n for n, m in bert.named_modules() if isinstance(m, nn.Linear)]
    targets = [
        name
        for name in names
        if name.startswith("encoder.layer.") and name.split(".", 3)[-1] in LORA_TARGETS
    ]
    return get_peft_model(bert, LoraConfig(r=r, lora_alpha=alpha, target_modules=targets))


class Reference:
    """Answers the driver's requests."""

    def open(self, encoder, mode, simcse, precision, device, workload, heads, recipe, dropout=None,
             threads=None):  # fmt: skip
        """Build the model from the encoder's folder and the program's initial `heads` file.

        `recipe` holds what the program trains with: rates, weight decay, clip, LoRA's r and alpha.
        """
        device_name = describe(device, threads)
        self.device, self.precision, self.workload = torch.device(device), precision, workload
        rates = {}
        if dropout is not None:
            rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        bert = BertModel.from_pretrained(
            encoder, attn_implementation="sdpa", dtype=torch.float32, add_pooling_layer=False,
            **rates,
        )  # fmt: skip
        rate = bert.config.hidden_dropout_prob
        if mode == "LoRA":
            bert = with_lora(bert, recipe["r"], recipe["alpha"])
        self.model = ReferenceModel(bert, mode, simcse, rate)
        self.load_heads(heads)
        self.model.to(self.device)
        self.clip, self.optimizer = recipe["clip"], self.make_optimizer(recipe)
        self.sets = {"train": {}, "dev": {}}
        return {"device": device_name, "precision": precision, "groups": self.groups()}

    def load_heads(self, path):
        """Take over the program's initial heads; every tensor has to be there, and no other."""
        own = {n: p for n, p in self.model.named_parameters() if not n.startswith("bert.")}
        tensors = load_file(path)
        if not self.model.simcse:
            tensors = {n: t for n, t in tensors.items() if not n.startswith("simcse_")}
        if set(own) != set(tensors):
            raise ValueError(f"heads {sorted(tensors)}; expected {sorted(own)}")
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(tensors[name])

    def make_optimizer(self, recipe):
        """Fused AdamW; no decay on biases and LayerNorm, own rates for encoder and heads."""
        groups = {}
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate = recipe["encoder_rate" if name.startswith("bert.") else "head_rate"]
                plain = parameter.ndim < 2 or "LayerNorm" in name
                key = (rate, 0.0 if plain else recipe["weight_decay"])
                groups.setdefault(key, []).append(parameter)
        return torch.optim.AdamW(
            [{"params": p, "lr": key[0], "weight_decay": key[1]} for key, p in groups.items()],
            fused=True,
        )

    def groups(self):
        """(rate, weight decay, number of trained values) of each parameter group, in order."""
        return sorted(
            [g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])]
            for g in self.optimizer.param_groups
        )

    # ------------------------------------------------------------------------------------- data

    def split(self, name, task):
        """Columns (lists of int64 tensors) and labels of one file, read once."""
        if task not in self.sets[name]:
            columns, labels = read_split(self.workload, name, task)
            tensors = [[torch.from_numpy(ids).long() for ids in column] for column in columns]
            self.sets[name][task] = tensors, torch.from_numpy(labels)
        return self.sets[name][task]

    def fetch(self, name, task, rows):
        """A batch padded to its longest sentence: ([(ids, mask), …], labels)."""
        columns, labels = self.split(name, task)
        padded = []
        for column in columns:
            sentences = [column[row] for row in rows]
            lengths = torch.tensor([len(ids) for ids in sentences])
            ids = pad_sequence(sentences, batch_first=True)
            padded.append((ids, torch.arange(ids.size(1)) < lengths[:, None]))
        return [tuple(map(self.put, column)) for column in padded], self.put(labels[rows])

    def put(self, tensor):
        """To the device; from pinned memory, without waiting, on a GPU."""
        if self.device.type == "cuda":
            return tensor.pin_memory().to(self.device, non_blocking=True)
        return tensor

    def autocast(self):
        """bf16 autocast, or nothing in fp32."""
        enabled = self.precision == "bf16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled)

    # ------------------------------------------------------------------------------- the requests

    def train(self, rows):
        """Train one step for each element of `rows`, which maps a task to its row numbers."""
        self.model.train()
        trained = [p for p in self.model.parameters() if p.requires_grad]
        for task in TASKS:
            self.split("train", task)
        began = clock(self.device)
        for of_step in rows:
            batches = {task: self.fetch("train", task, of_step[task]) for task in of_step}
            with self.autocast():
                losses = self.model(batches)
            sum(losses.values()).backward()
            nn.utils.clip_grad_norm_(trained, self.clip)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        seconds = clock(self.device) - began
        passes = 2 if self.model.simcse else 1
        sentences = [
            column[row]
            for of_step in rows
            for task, chosen in of_step.items()
            for column in self.split("train", task)[0]
            for row in chosen
        ]
        return {"seconds": seconds, **count(sentences, passes)}

    @torch.no_grad()
    def losses(self, rows):
        """Losses of one batch of each task, dropout off."""
        self.model.eval()
        batches = {task: self.fetch("train", task, rows[task]) for task in rows}
        with self.autocast():
            return {name: float(loss) for name, loss in self.model(batches).items()}

    @torch.inference_mode()
    def evaluate(self, batch_size, limit=0):
        """Predict the three dev sets in the files' order; returns seconds and what was encoded."""
        self.model.eval()
        sizes = {task: len(self.split("dev", task)[1]) for task in TASKS}
        sizes = {task: min(size, limit or size) for task, size in sizes.items()}
        began, scores = clock(self.device), {}
        for task, size in sizes.items():
            outputs = []
            for start in range(0, size, batch_size):
                rows = list(range(start, min(size, start + batch_size)))
                columns, _ = self.fetch("dev", task, rows)
                with self.autocast():
                    vectors = [self.model.encode(*column) for column in columns]
                    outputs.append(self.model.outputs(task, vectors).float())
            scores[task] = score(task, torch.cat(outputs).cpu(), self.split("dev", task)[1][:size])
        seconds = clock(self.device) - began
        sentences = [
            ids for task in sizes for column in self.split("dev", task)[0]
            for ids in column[: sizes[task]]
        ]  # fmt: skip
        return {"seconds": seconds, "scores": scores, **count(sentences)}

    def memory(self):
        """Peak memory and that of the training state, MiB."""
        return memory(self.device, self.model, self.optimizer)


def score(task, outputs, labels):
    """Accuracy, or for similarity Pearson's correlation."""
    if task in PAIRS[1:]:
        return float(torch.corrcoef(torch.stack([outputs, labels]))[0, 1])
    predicted = outputs.argmax(-1) if task == "sst" else (outputs > 0).float()
    return float((predicted == labels).float().mean())


if __name__ == "__main__":
    serve(Reference())
