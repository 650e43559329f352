"""Our worker: the program's own model, batches and training loop, at the driver's command.

It runs `multitask_classifier.train` itself, for a few steps at a time, with a run folder and its
log. Only the tokenising is done beforehand, on both sides.
"""

import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from worker import TASKS, clock, count, describe, memory, read_split, serve, write_split

from arguments import data_paths, get_args
from base_bert import load_encoder, resolve_encoder, write_tensors
from bert import BertModel
from config import TASKS as TASK_ROWS
from config import BertConfig
from datasets import Example, MultitaskBatches, TaskDataset, TaskFile, read_task_file
from device import autocast, keep_freed_memory, select_precision
from evaluation import evaluate
from multitask_classifier import FRESH_STATE, train
from preparation import build_model, make_optimizer

ENDLESS = 10**12  # steps of an epoch, so that `train` never evaluates
NEVER_STOPPED = SimpleNamespace(number=None, check=lambda: None)


def dataset(workload, split, task, limit=0):
    """A `TaskDataset` of token ids that are there already: its tokenizer looks them up."""
    columns, labels = read_split(workload, split, task, limit)
    examples = [
        Example(str(row), tuple((number, row) for number in range(len(columns))), float(label))
        for row, label in enumerate(labels)
    ]
    path = Path(workload) / f"{split}-{task}.npz"

    def look_up(places, max_length):
        return [columns[number][row] for number, row in places]

    return TaskDataset(TaskFile(path, examples, [], len(examples)), TASK_ROWS[task], look_up, None)


class Ours:
    """Answers the driver's requests."""

    def prepare(self, workload, encoder, data_dir=None):
        """Write the encoder's folder (`base`: random weights) and every file's token ids.

        Files that are there stay. Returns the folder, the encoder's sizes and the rows by file.
        """
        workload = Path(workload)
        folder = workload / "encoder" if encoder == "base" else resolve_encoder(encoder).folder
        if encoder == "base" and not (folder / "model.safetensors").exists():
            torch.manual_seed(0)
            BertModel(BertConfig()).save_pretrained(folder)
        origin = workload / "origin.txt"
        if not origin.exists():
            tokenizer = load_encoder("bundled" if encoder == "base" else encoder)[1]
            flags = ["--runs_dir", str(workload / "runs")]  # in which there is none
            args, _ = get_args(flags + (["--data_dir", data_dir] if data_dir else []))
            paths, _ = data_paths(args)
            for task in TASKS:
                for split in ("train", "dev"):
                    file = read_task_file(paths[task][split], TASK_ROWS[task], split)
                    length = min(512, tokenizer.model_max_length)
                    data = TaskDataset(file, TASK_ROWS[task], tokenizer, length)
                    write_split(workload, split, task, data.sentences, data.labels.numpy())
            origin.write_text(f"{paths[TASKS[0]]['train'].parent}\n", encoding="utf-8")
        rows = {
            f"{split}-{task}": len(read_split(workload, split, task)[1])
            for task in TASKS
            for split in ("train", "dev")
        }
        config = BertConfig.from_file(folder / "config.json").to_dict()
        return {"encoder": str(folder), "config": config, "rows": rows,
                "data": origin.read_text(encoding="utf-8").strip()}  # fmt: skip

    def open(self, encoder, mode, simcse, batch_size, precision, device, workload, heads,
             examples=0, dropout=None, threads=None):  # fmt: skip
        """Set up as `multitask_classifier.main` does; write the initial heads to the file `heads`.

        `examples` limits each training set. Returns the recipe for the reference to train with.
        """
        device_name = describe(device, threads)
        keep_freed_memory()
        self.folder = tempfile.TemporaryDirectory()  # kept by reference: goes with the worker
        flags = ["--fine-tune-mode", mode, "--batch_size", str(batch_size), "--warmup", "0",
                 "--precision", precision, "--runs_dir", self.folder.name]  # fmt: skip
        flags += ["--unsupervised_simcse"] if simcse else []
        flags += [] if dropout is None else ["--hidden_dropout_prob", str(dropout)]
        self.args, self.run = get_args(flags)
        self.args.steps_per_epoch = ENDLESS
        self.run.open()
        self.device, self.workload = torch.device(device), workload
        self.precision, _ = select_precision(precision, self.device)
        tokenizer = SimpleNamespace(pad_id=0, model_max_length=512)
        self.model = build_model(self.args, resolve_encoder(encoder), tokenizer)
        own = {n: p for n, p in self.model.named_parameters() if not n.startswith("bert.")}
        write_tensors(heads, own)
        sets = {task: dataset(workload, "train", task, examples) for task in TASKS}
        self.batches = MultitaskBatches(sets, batch_size, self.args.seed)
        self.dev = {}
        self.model.to(self.device)
        if self.precision == "bf16" and mode == "LoRA":
            self.model.bert.keep_frozen_in(torch.bfloat16)
        self.optimizer = make_optimizer(self.model, self.args)
        names = ("encoder_rate", "head_rate", "weight_decay", "clip")
        recipe = {name: getattr(self.args, name) for name in names}
        recipe |= {"r": self.args.LoRA_r, "alpha": self.args.LoRA_alpha}
        return {"device": device_name, "precision": self.precision, "recipe": recipe,
                "groups": self.groups(), "steps_per_pass": self.batches.largest()}  # fmt: skip

    def groups(self):
        """(rate, weight decay, number of trained values) of each parameter group, in order."""
        return sorted(
            [g["lr"], g["weight_decay"], sum(p.numel() for p in g["params"])]
            for g in self.optimizer.param_groups
        )

    def rows(self, first, steps):
        """Row numbers of the batches of steps `first` to `first + steps`, for the reference."""
        numbers = range(first, first + steps)
        return {
            "rows": [
                {task: self.batches.rows(task, step).tolist() for task in TASKS} for step in numbers
            ]
        }

    def train(self, first, steps):
        """Train `steps` steps from step `first` on; returns seconds and what they take."""
        self.args.total_steps = first + steps
        state = dict(FRESH_STATE) | {"step": first}
        began = clock(self.device)
        train(self.args, self.run, self.model, self.batches, {}, self.optimizer, self.precision,
              state, None, NEVER_STOPPED)  # fmt: skip
        seconds = clock(self.device) - began
        sentences = [
            ids
            for step in range(first, first + steps)
            for batch in self.batches[step].values()
            for column in (batch.first, batch.second or [])
            for ids in column
        ]
        passes = 2 if self.args.unsupervised_simcse else 1
        return {"seconds": seconds, **count(sentences, passes)}

    @torch.no_grad()
    def losses(self, step):
        """Losses of one batch of each task, dropout off."""
        self.model.eval()
        with autocast(self.device, self.precision):
            losses = self.model(self.batches[step])
        return {name: float(loss) for name, loss in losses.items()}

    def evaluate(self, limit=0):
        """Predict the three dev sets; returns seconds, scores and what was encoded."""
        if limit not in self.dev:
            self.dev[limit] = {task: dataset(self.workload, "dev", task, limit) for task in TASKS}
        began = clock(self.device)
        results = evaluate(self.model, self.dev[limit], self.precision)
        seconds = clock(self.device) - began
        sentences = [
            ids for data in self.dev[limit].values() for column in data.sentences for ids in column
        ]
        scores = {task: result.score(task) for task, result in results.items()}
        return {"seconds": seconds, "scores": scores, **count(sentences)}

    def memory(self):
        """Peak memory and that of the training state, MiB."""
        return memory(self.device, self.model, self.optimizer)


if __name__ == "__main__":
    serve(Ours())
