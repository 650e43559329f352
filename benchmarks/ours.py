"""Our side: the program's own model, batches and training loop.

It calls `multitask_classifier.train` itself, for a few steps at a time, with a run folder and its
log. Only the tokenising is done beforehand, on both sides.
"""

import dataclasses
import tempfile
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from worker import Worker, count, serve

from base_bert import load_encoder, write_tensors
from bert import BertModel
from config import TASKS, BertConfig
from datasets import TaskDataset, read_task_file
from evaluation import evaluate
from multitask_classifier import make_batches, train
from runtime.device import DTYPES, Compute
from runtime.hub import resolve_encoder
from training.data_files import data_paths
from training.flags import make_parser, parse_command
from training.plan import make_plan
from training.run_folder import Progress, RunFolder, run_path
from training.setup import build_model, make_optimizer

MAX_LENGTH = 512  # tokens


def write_workload(workload, encoder, data_dir):
    """Write the training and dev files with token ids for words, and where they came from."""
    tokenizer = load_encoder(encoder)[1]
    paths = data_paths(make_parser().parse_args(["--data_dir", data_dir] if data_dir else []))
    length = min(MAX_LENGTH, tokenizer.model_max_length)
    for name, split in ((name, split) for split in ("train", "dev") for name in paths):
        task, path = TASKS[name], paths[name][split]
        examples = read_task_file(path, task, split).examples
        data = TaskDataset(examples, task, tokenizer, length)
        columns = [[" ".join(map(str, ids)) for ids in column] for column in data.sentences]
        rows = [("id", *task.sentences, task.label)]
        rows += zip(range(len(data)), *columns, data.labels.tolist(), strict=True)
        text = "".join("\t".join(map(str, row)) + "\n" for row in rows)
        (workload / f"{split}-{name}.csv").write_text(text, encoding="utf-8")
    (workload / "origin.txt").write_text(f"{path.parent}\n", encoding="utf-8")


class Ours(Worker):
    """Answers the driver's requests."""

    def prepare(self, workload, encoder, data_dir):
        """Write the workload, and random weights for the encoder `base`; keep files that exist.

        Returns the encoder's folder.
        """
        workload = Path(workload)
        folder = workload / "encoder" if encoder == "base" else resolve_encoder(encoder).folder
        if encoder == "base" and not (folder / "model.safetensors").exists():
            torch.manual_seed(0)
            BertModel(BertConfig()).save_pretrained(folder)
        if not (workload / "origin.txt").exists():
            write_workload(workload, "bundled" if encoder == "base" else encoder, data_dir)
        return {"encoder": str(folder)}

    def open(self, **job):
        """Set up as `multitask_classifier.main` does, and write the initial heads.

        For `job` see `throughput.Sides`. Returns what the other side and the driver need.
        """
        self.job = job = SimpleNamespace(**job)
        opened = super().open(job.device, job.threads)
        self.runs = tempfile.TemporaryDirectory()  # kept by reference: goes with the worker
        mode = "full-model" if job.mode == "evaluation" else job.mode
        words = ["--fine-tune-mode", mode, "--batch_size", str(job.batch_size)]
        words += ["--warmup", "0", "--precision", job.precision, "--runs_dir", self.runs.name]
        words += ["--unsupervised_simcse"] if job.simcse else []
        words += [] if job.dropout is None else ["--hidden_dropout_prob", str(job.dropout)]
        flags = parse_command(words).flags
        self.plan = plan = make_plan(flags, {})
        self.run, self.compute = RunFolder(run_path(flags)), Compute(self.device, job.precision)
        self.run.open()
        tokenizer = SimpleNamespace(pad_id=0, model_max_length=MAX_LENGTH)
        self.model = build_model(plan, resolve_encoder(job.encoder), tokenizer)
        heads = {n: p for n, p in self.model.named_parameters() if not n.startswith("bert.")}
        write_tensors(f"{job.folder}/heads.safetensors", heads)
        limit = job.frozen_examples if plan.is_frozen else 0
        train_sets = self.datasets("train", limit)
        self.data = {name: {"train": dataset} for name, dataset in train_sets.items()}
        self.batches = make_batches(self.data, plan)
        self.model.to(self.device)
        if self.compute.precision != "fp32" and plan.lora:
            self.model.bert.cast_frozen_linears(DTYPES[self.compute.precision])
        self.optimizer = make_optimizer(self.model, plan)
        return opened | {
            "precision": self.compute.precision,
            "groups": self.groups(),
            "steps_per_pass": -(-max(map(len, train_sets.values())) // job.batch_size),
            "recipe": vars(flags) | {"encoder_lr": plan.encoder_lr, "head_lr": plan.head_lr},
        }

    def datasets(self, split, limit):
        """task -> `TaskDataset` of the first `limit` examples (0: all) of the workload's file."""

        def read_ids(texts, max_length):
            return [np.array(text.split(), dtype=np.int32) for text in texts]

        found = {}
        for name in self.plan.flags.tasks:
            path = Path(self.job.workload) / f"{split}-{name}.csv"
            examples = read_task_file(path, TASKS[name], split).examples[: limit or None]
            found[name] = TaskDataset(examples, TASKS[name], read_ids, MAX_LENGTH)
        return found

    def rows(self, first, steps):
        """Row numbers by task in the batches of `steps` steps from `first` on."""
        of_steps = range(first, first + steps)
        return [{n: self.batches.rows(n, step).tolist() for n in self.data} for step in of_steps]

    def train(self, first, steps):
        """Train `steps` steps from step `first` on; returns seconds and what was encoded."""
        plan = dataclasses.replace(self.plan, total_steps=first + steps)
        self.run.progress = Progress(step=first, evaluated=first + steps)  # so never evaluates
        began = self.clock()
        train(self.run, self.model, self.optimizer, self.data, plan, self.compute)
        seconds = self.clock() - began
        batches = [batch for i in range(first, first + steps) for batch in self.batches[i].values()]
        sentences = [ids for batch in batches for ids in batch.first + (batch.second or [])]
        encoded = count(sentences, passes=2 if plan.simcse_tasks else 1)
        return {"steps": steps, "seconds": seconds, **encoded}

    @torch.no_grad()
    def losses(self, step):
        """Losses of one batch of each task, dropout off."""
        self.model.eval()
        with self.compute.autocast():
            losses = self.model(self.batches[step])
        return {name: float(loss) for name, loss in losses.items()}

    def evaluate(self, limit=0):
        """As `train`: predict the first `limit` examples (0: all) of each dev set; also scores."""
        dev_sets, began = self.datasets("dev", limit), self.clock()
        results = evaluate(self.model, dev_sets, self.compute)
        seconds = self.clock() - began
        scores = {name: result.score(name) for name, result in results.items()}
        encoded = count(chain(*(column for data in dev_sets.values() for column in data.sentences)))
        return {"steps": 1, "seconds": seconds, "scores": scores, **encoded}


if __name__ == "__main__":
    serve(Ours())
