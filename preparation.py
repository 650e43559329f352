"""What does a run begin with? Data, model, optimiser, and the record of all that it depends on."""

import os
import platform
import re
import shlex
import shutil
import subprocess
from importlib.metadata import version

import torch

import distributed
from arguments import (
    HERE,
    MOVED,
    SCRIPT,
    SPLITS,
    data_paths,
    paths_of_run,
    uses_sample,
    without_resume_flags,
)
from base_bert import file_sha256, load_strictly
from bert import BertModel
from config import TASKS, BertConfig, MultitaskConfig, UserError
from datasets import read_task_file
from device import autocast, device_name
from evaluation import BATCH_TOKENS
from lora import apply_lora
from multitask_bert import VECTOR_CACHE_MIB, MultitaskBERT
from saved_models import lora_config_of
from script import say

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "scikit-learn")

# ------------------------------------------------------------------------------------------ data


def read_data(paths, require_test):
    """Read every file: `{task: {split: TaskFile}}`; says what was skipped or is missing."""
    files = {}
    for name, of_task in paths.items():
        files[name] = {}
        for split, path in of_task.items():
            if split == "test" and not (path.exists() or path.is_symlink()):
                if require_test:
                    raise UserError(f"{path}: no such file, and --require_test was given")
                say(f"warning: {path}: no such file; no test predictions for {name}")
                continue
            files[name][split] = read_task_file(path, TASKS[name], split)
            for warning in files[name][split].warnings:
                say(f"warning: {warning}")
    return files


def describe_data(files):
    """What `run.json` keeps of the data files."""
    return {
        name: {
            split: {
                "path": str(file.path.resolve()),
                "sha256": file_sha256(file.path),
                "rows": file.rows,
                "examples": len(file.examples),
            }
            for split, file in of_task.items()
        }
        for name, of_task in files.items()
    }


def recorded_paths(args, description):
    """As `arguments.data_paths`, for a run that is continued: its own files, unless named anew."""
    if args.given & {"data_dir", *(f"{name}_{split}" for name in args.tasks for split in SPLITS)}:
        return data_paths(args)
    paths = paths_of_run(description)
    for name, of_task in description["data"].items():
        for path in (paths[name][split] for split in of_task):
            if not os.path.lexists(path):
                raise UserError(f"{path}: {MOVED}")
    if uses_sample(description):
        return paths, "continuing on the small generated sample, as the run began"
    return paths, None


def describe_run(args, encoder, files, device, precision):
    """Everything that a run depends on, for `run.json`."""
    derived = ("argv", "given", "contrasted", "weights", "expanded_command")
    values = {name: value for name, value in vars(args).items() if name not in derived}
    words = [*distributed.launch_command(SCRIPT), *without_resume_flags(args.argv)]
    return {
        "command": shlex.join(words),
        "expanded_command": args.expanded_command,
        "args": values,
        "encoder": encoder.describe(),
        "data": describe_data(files),
        "device": device_name(device),
        "precision": precision,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "git_commit": git_commit(),
    }


def git_commit():
    """The git commit of this code, None outside a repository."""
    if not shutil.which("git"):
        return None
    command = ["git", "rev-parse", "HEAD"]
    git = subprocess.run(command, cwd=HERE, capture_output=True, text=True, check=False)
    return git.stdout.strip() or None


def identity(description):
    """What must be the same where a run is continued or shared: name -> value."""
    encoder = description["encoder"]
    values = {"encoder": encoder["sha256"], "precision": description["precision"]}
    if "settings_sha256" in encoder:
        values["encoder's configuration or vocabulary"] = encoder["settings_sha256"]
    for name, of_task in description["data"].items():
        values |= {f"{name} {split} file": f["sha256"] for split, f in of_task.items()}
    return values


def check_same_run(old, new):
    """Raise `UserError` where a run would go on with something else than it began with.

    A test file that has come since is no difference: training does not depend on it.
    """
    new = identity(new)
    differences = [
        f"{name} is {str(new.get(name))[:12]}, was {value[:12]}"
        for name, value in identity(old).items()
        if new.get(name) != value
    ]
    if differences:
        raise UserError(f"--resume: not the run that was begun: {'; '.join(differences)}")


def check_same_everywhere(description, state):
    """Raise `UserError` where the processes, perhaps on several machines, would train unlike."""
    distributed.require_same(str(identity(description)), "data, encoder and precision")
    step = state.values["step"] if state else 0
    distributed.require_same(f"{step}", "state to go on from: --runs_dir has to be a shared folder")


# ----------------------------------------------------------------------------- model and optimiser


def check_fit(args, encoder, tokenizer):
    """Check the flags against the encoder's sizes, before its weights load: `UserError`."""
    config = BertConfig.from_file(encoder.folder / "config.json")
    limit = tokenizer.model_max_length  # `load_encoder` holds it to the encoder's positions
    if args.max_length and args.max_length > limit:
        raise UserError(f"--max_length {args.max_length}: this encoder has {limit} positions")
    if (args.joint or args.both) and config.type_vocab_size < 2:
        raise UserError("--pair_encoding: this encoder knows one segment; expected separate")
    if lora := lora_config_of(vars(args)):
        try:
            with torch.device("meta"):
                apply_lora(BertModel(config), lora)
        except ValueError as error:
            raise UserError(f"--LoRA_r {lora.r}: {error}") from error


def build_model(args, encoder, tokenizer):
    """Encoder with its pretrained weights, LoRA layers in mode LoRA, and fresh task heads."""
    bert = BertModel.from_pretrained(encoder)
    if args.hidden_dropout_prob is not None:
        bert.set_dropout(args.hidden_dropout_prob)
    if args.freeze_word_embeddings:
        bert.embeddings.word_embeddings.requires_grad_(False)
    config = MultitaskConfig(
        tasks=tuple(args.tasks),
        heads={name: getattr(args, f"{name}_head") for name in args.tasks},
        joint=args.joint,
        both=args.both,
        pooling=args.pooling,
        dropout=bert.embeddings.dropout.p,
        max_length=args.max_length or tokenizer.model_max_length,
        simcse_tasks=tuple(args.contrasted),
        supervised_simcse=args.supervised_simcse,
        r_drop=tuple(args.r_drop),
        swap_pairs=args.swap_pairs,
    )
    if lora := lora_config_of(vars(args)):
        apply_lora(bert, lora)
    frozen = args.fine_tune_mode == "last-linear-layer"
    return MultitaskBERT(bert, config, tokenizer.pad_id, frozen)


def make_optimizer(model, args):
    """AdamW over what is trained; no decay on biases and LayerNorm, own rates for the heads.

    `--layer_decay` lowers the rate layer by layer from the top (Howard & Ruder 2018, §3.2).
    """
    groups, layers = {}, model.bert.config.num_hidden_layers
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = args.head_rate
            if name.startswith("bert."):
                layer = re.search(r"\.layer\.(\d+)\.", name)
                depth = layers - 1 - int(layer[1]) if layer else layers
                rate = args.encoder_rate * args.layer_decay**depth
            decay = 0.0 if parameter.ndim < 2 or "LayerNorm" in name else args.weight_decay
            group = {"params": [], "peak_lr": rate, "lr": rate, "weight_decay": decay}
            groups.setdefault((rate, decay), group)["params"].append(parameter)
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.AdamW(list(groups.values()), fused=fused)


def count_parameters(model):
    """Numbers of trained and of all parameters."""
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return {"trained": trained, "all": sum(p.numel() for p in model.parameters())}


def training_state(model, optimizer):
    """What continuing needs, by file and name: trained weights and AdamW's moments."""
    trained = {n: p for n, p in model.named_parameters() if p.requires_grad}
    moments = {
        f"{name}:{key}": value
        for name, parameter in trained.items()
        for key, value in optimizer.state.get(parameter, {}).items()
    }
    return {"trained": trained, "optimizer": moments}


def load_training_state(model, optimizer, tensors):
    """Put back what `training_state` gave; strict about the weights' names and shapes."""
    trained = {n: p.data for n, p in model.named_parameters() if p.requires_grad}
    load_strictly(trained, tensors["trained"], "state")
    parameters = dict(model.named_parameters())
    for key, value in tensors["optimizer"].items():
        name, _, moment = key.rpartition(":")
        if name not in trained:
            raise UserError(f"state: does not fit: unexpected {key}")
        parameter = parameters[name]
        on_device = moment != "step" or optimizer.defaults["fused"]  # where AdamW keeps it itself
        optimizer.state[parameter][moment] = value.to(parameter.device) if on_device else value


def encode_in_advance(model, batches, args, precision, check_stop):
    """Encode the training sentences of a frozen encoder once, in a fixed order, as far as they fit.

    A vector's last bits depend on the batch in which it was encoded. So which sentences are encoded
    together must not depend on where a run was broken off.
    """
    device = next(model.parameters()).device
    for name, dataset in batches.datasets.items():
        rows = batches.rows_until(name, args.total_steps * args.accumulate)
        own = []
        if len(rows) and model.vectors_to_keep():
            say(f"{name}: encoding {len(rows):,} training examples, once for all epochs")
            own = [batch for _, batch in dataset.batches_of(BATCH_TOKENS[device.type], rows)]
        for number in range(distributed.largest(len(own))):  # every process checks as often
            check_stop()
            if number < len(own) and model.vectors_to_keep():
                with autocast(device, precision), torch.no_grad():
                    model.encode_groups(model.task_inputs(name, own[number]))
    if not model.vectors_to_keep():
        say(f"warning: {VECTOR_CACHE_MIB:,} MiB of sentence vectors are kept; the other sentences "
            "are encoded again in each step")  # fmt: skip


# --------------------------------------------------------------------------------------- for people


def describe_sizes(args):
    """The batch sizes in words: one for all tasks, or each task's own."""
    sizes = args.batch_sizes
    if len(set(sizes.values())) == 1:
        return f"{sizes[args.tasks[0]]} of each task"
    return ", ".join(f"{size} of {name}" for name, size in sizes.items())


def announce(args, run, model, encoder, datasets, device, precision):
    """Say what is about to be trained, on what."""
    count = count_parameters(model)
    hardware = f"{device_name(device)}, {precision}"
    say(f"run {run.path}: {args.fine_tune_mode}, {encoder.name}, {hardware}")
    say(f"trained parameters: {count['trained']:,} of {count['all']:,}")
    for name, of_task in datasets.items():
        counts = ", ".join(f"{split} {len(dataset):,}" for split, dataset in of_task.items())
        say(f"{name}: {counts} examples")
    say(
        f"{args.epochs} epochs of {args.steps_per_epoch} steps, batch {describe_sizes(args)}, "
        f"learning rate {args.encoder_rate:g} (heads {args.head_rate:g})"
    )
    dropout = any(getattr(module, "p", 0) > 0 for module in model.modules())
    same = [name for name in args.r_drop if not (args.swap_pairs and TASKS[name].is_pair)]
    if not dropout and (args.unsupervised_simcse or same):
        say("warning: without dropout the two passes of SimCSE and R-Drop are the same")
