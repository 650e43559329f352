"""The set-up of a run: encoder, model, optimiser, and the record of what it depends on."""

import platform
import re
import shlex
import subprocess
from importlib.metadata import version
from pathlib import Path

import torch

from base_bert import load_encoder, load_encoder_of_run, load_mlm_head, load_strictly
from bert import BertModel
from config import REPOSITORY, TASKS, BertConfig, MultitaskConfig, UserError
from lora import apply_lora
from multitask_bert import VECTOR_CACHE_MIB, MultitaskBERT
from pals import apply_pals, train_layer_norms_only
from runtime import distributed
from runtime.device import device_name, memory_errors
from runtime.files import file_sha256
from runtime.hub import FELL_BACK
from runtime.script import say
from training.run_folder import RunFolder
from training.saved_models import encoder_of_best, start_from, undamaged_best

PACKAGES = ("torch", "numpy", "tokenizers", "safetensors", "scikit-learn")

# ---------------------------------------------------------------------------------- the description


def describe_run(command, encoder, files, compute):
    """Everything that a run depends on, for `run.json`."""
    start = command.flags.start_from
    return {
        "command": shlex.join(command.words()),
        "expanded_command": command.expanded(),
        "args": vars(command.flags),
        "encoder": encoder.describe(),
        "start_from": start and file_sha256(undamaged_best(RunFolder(start)) / "manifest.json"),
        "data": {
            name: {split: describe_file(file) for split, file in of_task.items()}
            for name, of_task in files.items()
        },
        "device": device_name(compute.device),
        "precision": compute.precision,
        "threads": torch.get_num_threads(),
        "processes": distributed.world_size(),
        "versions": {"python": platform.python_version()} | {p: version(p) for p in PACKAGES},
        "git_commit": git_commit(),
    }


def describe_file(file):
    """What a run records of a `TaskFile`."""
    path, digest = str(file.path.resolve()), file_sha256(file.path)
    return {"path": path, "sha256": digest, "rows": file.rows, "examples": len(file.examples)}


def git_commit():
    """The git commit of this code, with "-dirty" if tracked files differ; None without git."""
    settings = {"shell": True, "cwd": REPOSITORY, "capture_output": True, "text": True}
    command = "git describe --always --dirty --abbrev=40 --exclude='*'"
    return subprocess.run(command, **settings).stdout.strip() or None


def identity(description):
    """What must be the same when a run is resumed, and in all processes: name -> value."""
    encoder = description["encoder"]
    values = {
        "encoder": encoder["sha256"],
        "encoder's configuration or vocabulary": encoder["settings_sha256"],
        "precision": description["precision"],
    }
    if description.get("start_from"):  # the hash of its manifest, which has those of its files
        values["best model of --start_from"] = description["start_from"]
    for name, of_task in description["data"].items():
        values |= {f"{name} {split} file": f["sha256"] for split, f in of_task.items()}
    if description["args"].get("sampling", "equal") != "equal":  # shares are multiples of it
        values["number of processes"] = str(description["processes"])
    return values


def check_same_run(earlier, now):
    """Raise `UserError` if a run would be resumed with another `identity`.

    A test file added later is allowed: training does not depend on it. Another number of threads is
    only warned of.
    """
    values = identity(now)
    differences = [
        f"{name} is {str(values.get(name))[:12]}, was {value[:12]}"
        for name, value in identity(earlier).items()
        if values.get(name) != value
    ]
    if differences:
        more = "; here, begin a new run with --start_from and the old one's folder"
        more = more if any(text.startswith("precision") for text in differences) else ""
        found = "; ".join(differences) + more
        raise UserError(f"--resume: the run was begun with other settings: {found}")
    if earlier["threads"] != now["threads"]:
        say(
            f"warning: {now['threads']} threads, were {earlier['threads']}: the last bits will "
            "differ from those of a run that was never stopped"
        )


def open_run(run, is_resumed, description):
    """Lock the run's folder. Returns the tensors of the checkpoint to resume from, or None."""
    run.open()
    if not (is_resumed and run.holds_run()):
        if is_resumed:
            say(f"{run.path}: nothing to resume; starting at step 0")
        return None
    check_same_run(run.description(), description)
    tensors = run.load_checkpoint()
    if tensors is None and (run.path / "predictions").exists():
        raise UserError(
            f"{run.path}: a finished run whose checkpoints (state/) are gone; --overwrite removes "
            "it and starts at step 0"
        )
    if tensors is None:
        say(f"{run.path}: no checkpoint was ever completed; starting at step 0")
    else:
        say(f"{run.path}: resuming at step {run.progress.step}")
    return tensors


def check_same_everywhere(description, step):
    """Raise `UserError` if the processes, perhaps on several machines, would train differently."""
    distributed.require_same(str(identity(description)), "data, encoder and precision")
    distributed.require_same(f"{step}", "checkpoint to resume from: --runs_dir must be shared")


# ----------------------------------------------------------------------------- model and optimiser


def find_encoder(run, flags, earlier):
    """The encoder and its tokenizer: of the resumed run, of `--start_from` or of `--pretrained`."""
    if earlier:
        encoder, tokenizer = load_encoder_of_run(run.path, earlier)
    elif flags.start_from:
        encoder, tokenizer = encoder_of_best(RunFolder(flags.start_from))
        kept, until = flags.start_from, " until this run is finished"
        if flags.fine_tune_mode == "LoRA" and encoder.best:
            kept, until = Path(encoder.best).parent, ""
        say(
            f"warning: keep {kept} as it is{until}: do not resume, overwrite or remove it; this "
            "run needs its best model"
        )
    else:
        encoder, tokenizer = load_encoder(flags.pretrained)
    if encoder.substituted:
        say(f"warning: {FELL_BACK}")
    return encoder, tokenizer


def check_fit(plan, encoder, tokenizer):
    """Check the plan against the encoder's sizes and the processes, before weights load.

    Raises `UserError`.
    """
    for name, size in plan.batch_sizes.items():
        distributed.share(size, name)
    config = BertConfig.from_file(encoder.folder / "config.json")
    length, limit = plan.flags.max_length, tokenizer.model_max_length
    if length and length > limit:  # `load_encoder` lowers it to the encoder's positions
        raise UserError(f"--max_length {length}: this encoder takes at most {limit} tokens")
    if plan.joint + plan.both and config.type_vocab_size < 2:
        raise UserError("--pair_encoding: this encoder has one segment; expected separate")
    if plan.lora:
        try:
            with torch.device("meta"):
                apply_lora(BertModel(config), plan.lora)
        except ValueError as error:
            raise UserError(f"--LoRA_{error}") from error


def build_model(plan, encoder, tokenizer):
    """Encoder with its pretrained weights, LoRA layers or PALs if asked for, fresh task heads.

    With `--start_from`, all that fits comes from that run.
    """
    flags = plan.flags
    bert = BertModel.from_pretrained(encoder)
    if flags.hidden_dropout_prob is not None:
        bert.set_dropout(flags.hidden_dropout_prob)
    if flags.freeze_word_embeddings:
        bert.embeddings.word_embeddings.requires_grad_(False)
    config = MultitaskConfig(
        tasks=tuple(plan.tasks),
        heads={name: getattr(flags, f"{name}_head") for name in flags.tasks},
        joint=plan.joint,
        both=plan.both,
        pooling=flags.pooling,
        dropout=bert.embeddings.dropout.p,
        max_length=flags.max_length or tokenizer.model_max_length,
        simcse_tasks=plan.simcse_tasks,
        supervised_simcse=flags.supervised_simcse,
        r_drop=tuple(flags.r_drop),
        swap_pairs=flags.swap_pairs,
        mlm=tuple(flags.mlm),
    )
    if plan.lora:
        apply_lora(bert, plan.lora)
    model = MultitaskBERT(bert, config, tokenizer, plan.is_frozen)
    if plan.pals:
        model.pals = apply_pals(bert, plan.pals, flags.tasks)
    if flags.fine_tune_mode == "PAL":
        train_layer_norms_only(bert)
    source = flags.start_from
    taken = start_from(model, plan.lora, RunFolder(source)) if source else []
    if flags.mlm and "mlm" not in taken:
        load_mlm_head(model.mlm, encoder.folder / "model.safetensors")
    return model


def make_optimizer(model, plan):
    """AdamW over what is trained: no decay on biases and LayerNorm, another rate for the heads.

    `--layer_decay` lowers the rate layer by layer from the top (Howard & Ruder 2018, §3.2).
    `--LoRA_lr_ratio` multiplies that of LoRA's B (Hayou et al. 2024) and, as in `peft`, of DoRA's
    magnitudes.
    """
    groups, layers = {}, model.bert.config.num_hidden_layers
    for name, parameter in trained_parameters(model).items():
        rate = plan.head_lr
        if name.startswith("bert."):
            layer = re.search(r"\.layer\.(\d+)\.", name)
            depth = layers - 1 - int(layer[1]) if layer else layers
            rate = plan.encoder_lr * plan.flags.layer_decay**depth
            if name.endswith(("lora_B", "lora_magnitude_vector")):
                rate *= plan.flags.LoRA_lr_ratio
        decay = 0.0 if parameter.ndim < 2 or "LayerNorm" in name else plan.flags.weight_decay
        group = {"params": [], "peak_lr": rate, "lr": rate, "weight_decay": decay}
        groups.setdefault((rate, decay), group)["params"].append(parameter)
    return torch.optim.AdamW(list(groups.values()), fused=model.device.type in ("cpu", "cuda"))


def trained_parameters(model):
    """The parameters that are trained, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def count_parameters(model):
    """Numbers of trained and of all parameters."""
    trained = sum(p.numel() for p in trained_parameters(model).values())
    return {"trained": trained, "all": sum(p.numel() for p in model.parameters())}


def save_checkpoint(run, model, optimizer, compute):
    """Save all that resuming needs: progress, trained weights and AdamW's moments."""
    run.progress.scaler = compute.scaler.state_dict()
    tensors = {}
    if model.cosine_targets is not None:
        tensors["cosine_targets:model"] = model.cosine_targets
    for name, parameter in trained_parameters(model).items():
        tensors[f"trained:{name}"] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}:{name}"] = value
    run.save_checkpoint(tensors)


def restore(model, optimizer, compute, progress, tensors):
    """Put back what `save_checkpoint` saved. Raises `UserError` if it does not fit."""
    compute.scaler.load_state_dict(progress.scaler)
    parts = {}  # "trained", or a name of AdamW's -> parameter -> tensor
    for key, tensor in tensors.items():
        part, name = key.split(":")
        parts.setdefault(part, {})[name] = tensor
    parameters = trained_parameters(model)
    load_strictly(parameters, parts.pop("trained"), "checkpoint")
    for targets in parts.pop("cosine_targets", {}).values():
        model.cosine_targets = targets.to(compute.device)
    for part, moments in parts.items():
        # Only fused AdamW keeps its `step` on the device.
        device = "cpu" if part == "step" and not optimizer.defaults["fused"] else compute.device
        for name, value in moments.items():
            optimizer.state[parameters[name]][part] = value.to(device)


def encode_in_advance(model, batches, plan, compute):
    """Encode a frozen encoder's training sentences once, in a fixed order, until the cache is full.

    The last bits of a vector depend on the batch in which it was encoded, so the batches must not
    depend on the step at which a run was stopped.
    """
    for name, dataset in batches.datasets.items():
        rows = batches.rows_until(name, plan.total_steps * plan.flags.accumulate)
        parts, load = [], f"batches of up to {compute.batch_tokens:,} tokens"
        if len(rows) and model.vectors_to_keep():
            say(f"{name}: encoding {len(rows):,} training examples, once for all epochs")
            parts = [batch for _, batch in dataset.batches_of(compute.batch_tokens, rows)]
        for number in range(distributed.largest(len(parts))):
            distributed.check_stop()  # as often in every process
            if number < len(parts) and model.vectors_to_keep():
                with memory_errors(compute.device, load), compute.autocast(), torch.no_grad():
                    model.head_vectors(name, parts[number])
    if not model.vectors_to_keep():
        say(
            f"warning: {VECTOR_CACHE_MIB:,} MiB of sentence vectors are kept; the other sentences "
            "are encoded again in each step"
        )


def announce(run, model, data, plan, compute):
    """Say what is about to be trained, on what."""
    flags, count = plan.flags, count_parameters(model)
    say(f"run {run.path}: {flags.fine_tune_mode}, {model.bert.origin.name}, {compute}")
    say(f"trained parameters: {count['trained']:,} of {count['all']:,}")
    for name, of_task in data.items():
        counts = ", ".join(f"{split} {len(dataset):,}" for split, dataset in of_task.items())
        say(f"{name}: {counts} examples")
        size = max(sizes[name] for sizes in plan.epoch_sizes)
        if size > len(of_task["train"]):
            say(f"warning: {name}: a batch of {size} holds training examples several times")
    batches = dict.fromkeys(map(describe_sizes, (plan.epoch_sizes[0], plan.epoch_sizes[-1])))
    batch = " in the first epoch and in the last ".join(batches)
    say(
        f"epochs: {flags.epochs} of {plan.steps_per_epoch} steps; batch {batch}; "
        f"learning rate {plan.encoder_lr:g} (heads {plan.head_lr:g})"
    )
    has_dropout = any(getattr(module, "p", 0) > 0 for module in model.modules())
    same = [name for name in flags.r_drop if not (flags.swap_pairs and TASKS[name].is_pair)]
    if not has_dropout and (flags.unsupervised_simcse or same):
        say("warning: without dropout the two passes of SimCSE and R-Drop are the same")


def describe_sizes(sizes):
    """The examples in a batch, by task, in words."""
    if len(set(sizes.values())) == 1:
        return f"{max(sizes.values())} of each task"
    return ", ".join(f"{size} of {name}" for name, size in sizes.items())


def describe_load(data, plan):
    """A step's load on the memory, and how to make it smaller, in words."""
    as_large = "" if plan.flags.gradient_surgery else " (with --accumulate the step stays as large)"
    longest = max(of_task["train"].longest() for of_task in data.values())
    largest = max(max(sizes.values()) for sizes in plan.epoch_sizes)
    load = f"batches of {largest} × sentences of up to {longest} tokens"
    return load, f"lower --batch_size{as_large} or --max_length"
