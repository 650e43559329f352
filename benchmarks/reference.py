"""The reference: the same training step, as a good engineer writes it with `transformers`.

One `BertModel` with SDPA attention, a forward pass for each column of each task (ten with SimCSE),
padding to the longest sentence of the batch, autocast, fused AdamW, `peft` for LoRA. It imports
nothing of the program. It runs as `python -P reference.py`, away from the program's folder, whose
datasets.py would hide the hub's package of that name.
"""

from functools import partial
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import BertModel
from worker import Worker, count, serve

TASKS = {  # task -> its loss, from outputs and labels
    "sst": lambda outputs, labels: F.cross_entropy(outputs, labels.long()),
    "para": F.binary_cross_entropy_with_logits,
    "sts": F.mse_loss,
}


class ReferenceModel(nn.Module):
    """Encoder, heads and losses. The heads' parameters have the names that the program gives."""

    def __init__(self, bert, simcse):
        super().__init__()
        self.bert, self.simcse = bert, simcse
        hidden = bert.config.hidden_size
        dense, projection = nn.Linear(hidden, hidden), nn.Linear(hidden, 5)
        sst = nn.ModuleDict({"dense": dense, "projection": projection})
        para = nn.ModuleDict({"projection": nn.Linear(4 * hidden, 1)})
        self.heads = nn.ModuleDict({"sst": sst, "para": para})
        self.simcse_projection = nn.Linear(hidden, hidden) if simcse else None
        self.dropout = nn.Dropout(bert.config.hidden_dropout_prob)

    def encode(self, ids, mask):
        """Mean over the real tokens: (batch, seq) twice -> (batch, hidden) fp32."""
        hidden_states = self.bert(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        weights = mask[:, :, None].float()
        return (hidden_states * weights).sum(1) / weights.sum(1)

    def outputs(self, task, u, v=None):
        """The task's head: 5 logits, one logit, or a similarity from -5 to 5."""
        if task == "sst":
            u = F.gelu(self.heads["sst"]["dense"](self.dropout(u)))
            return self.heads["sst"]["projection"](self.dropout(u))
        if task == "para":
            features = torch.cat([u, v, (u - v).abs(), u * v], dim=-1)
            return self.heads["para"]["projection"](self.dropout(features)).squeeze(-1)
        return 5 * F.cosine_similarity(u, v, dim=-1)

    def forward(self, batches):
        """Losses by name; `batches` maps a task to its padded columns and its labels."""
        losses = {}
        for task, (columns, labels) in batches.items():
            vectors = [self.encode(*column) for column in columns]
            losses[task] = TASKS[task](self.outputs(task, *vectors), labels)
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


def score(task, outputs, labels):
    """Accuracy, or Pearson correlation for similarity."""
    if task == "sts":
        return float(torch.corrcoef(torch.stack([outputs, labels]))[0, 1])
    predicted = outputs.argmax(-1) if task == "sst" else (outputs > 0).float()
    return float((predicted == labels).float().mean())


class Reference(Worker):
    """Answers the driver's requests."""

    def open(self, **job):
        """Build model and optimiser; for `job` see `throughput.Sides`."""
        self.job, self.sets = SimpleNamespace(**job), {}
        job, opened = self.job, super().open(self.job.device, self.job.threads)
        settings = {"attn_implementation": "sdpa", "dtype": torch.float32}
        if job.dropout is not None:
            names = ("hidden_dropout_prob", "attention_probs_dropout_prob")
            settings |= dict.fromkeys(names, job.dropout)
        bert = BertModel.from_pretrained(job.encoder, add_pooling_layer=False, **settings)
        if job.mode == "LoRA":
            from peft import LoraConfig, get_peft_model

            sizes = {"r": job.recipe["LoRA_r"], "lora_alpha": job.recipe["LoRA_alpha"]}
            bert = get_peft_model(bert, LoraConfig(**sizes, target_modules="all-linear"))
        self.is_frozen = job.mode == "last-linear-layer"
        if self.is_frozen:
            bert.requires_grad_(False)
        autocast = {"dtype": torch.bfloat16, "enabled": job.precision == "bf16"}
        self.autocast = partial(torch.autocast, self.device.type, **autocast)
        self.model = ReferenceModel(bert, job.simcse)
        heads = load_file(f"{job.folder}/heads.safetensors")
        missing = self.model.load_state_dict(heads, strict=False).missing_keys
        if missing := [name for name in missing if not name.startswith("bert.")]:
            raise ValueError(f"initial heads: no {', '.join(missing)}")
        self.model.to(self.device)
        groups = {}  # no decay on biases and LayerNorm, different rates for encoder and heads
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                rate = job.recipe["encoder_lr" if name.startswith("bert.") else "head_lr"]
                has_decay = parameter.ndim > 1 and "LayerNorm" not in name
                key = (rate, job.recipe["weight_decay"] if has_decay else 0.0)
                groups.setdefault(key, []).append(parameter)
        groups = [{"params": p, "lr": r, "weight_decay": d} for (r, d), p in groups.items()]
        self.optimizer = torch.optim.AdamW(groups, fused=True)
        return opened | {"precision": job.precision, "groups": self.groups()}

    def read(self, split, task):
        """Columns (lists of int64 tensors) and labels of one file of the workload, read once."""
        if (split, task) not in self.sets:
            path = Path(self.job.workload) / f"{split}-{task}.csv"
            _, *lines = path.read_text(encoding="utf-8").splitlines()
            _, *columns, labels = zip(*(line.split("\t") for line in lines), strict=True)
            ids = [[torch.tensor([*map(int, t.split())]) for t in column] for column in columns]
            self.sets[split, task] = ids, torch.tensor([*map(float, labels)])
        return self.sets[split, task]

    def fetch(self, split, task, rows):
        """A batch padded to its longest sentence: ([(ids, mask), …], labels)."""
        columns, labels = self.read(split, task)
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

    def train(self, rows):
        """Train one step for each element of `rows`, which maps a task to its row numbers."""
        self.model.train()
        self.model.bert.train(not self.is_frozen)
        columns = {task: self.read("train", task)[0] for task in TASKS}
        began = self.clock()
        for of_step in rows:
            sum(self.forward(of_step).values()).backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), self.job.recipe["clip"])
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        seconds = self.clock() - began
        chosen = [(task, of_step[task]) for of_step in rows for task in of_step]
        sentences = [c[row] for task, of_task in chosen for c in columns[task] for row in of_task]
        encoded = count(sentences, passes=2 if self.job.simcse else 1)
        return {"steps": len(rows), "seconds": seconds, **encoded}

    def forward(self, rows):
        """Losses of one batch of each task; `rows` maps a task to row numbers."""
        batches = {task: self.fetch("train", task, of_task) for task, of_task in rows.items()}
        with self.autocast():
            return self.model(batches)

    @torch.no_grad()
    def losses(self, rows):
        """As `forward`, with dropout off, and as numbers."""
        self.model.eval()
        return {name: float(loss) for name, loss in self.forward(rows).items()}

    @torch.inference_mode()
    def evaluate(self, limit=0):
        """Predict the three dev sets in the files' order; returns seconds and what was encoded."""
        self.model.eval()
        splits = {task: self.read("dev", task) for task in TASKS}
        began, scores, encoded = self.clock(), {}, []
        for task, (columns, labels) in splits.items():
            rows, outputs = range(len(labels))[: limit or None], []
            for start in rows[:: self.job.batch_size]:
                padded, _ = self.fetch("dev", task, rows[start : start + self.job.batch_size])
                with self.autocast():
                    vectors = [self.model.encode(*column) for column in padded]
                    outputs.append(self.model.outputs(task, *vectors).float())
            scores[task] = score(task, torch.cat(outputs).cpu(), labels[: len(rows)])
            encoded += [column[: len(rows)] for column in columns]
        seconds = self.clock() - began
        return {"steps": 1, "seconds": seconds, "scores": scores, **count(chain(*encoded))}


if __name__ == "__main__":
    serve(Reference())
