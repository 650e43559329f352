"""Whole models, encoder and heads, saved and loaded in other tools' formats.

`transformers` and `sentence-transformers` read the encoder, in mode LoRA `peft` reads the adapter.
The heads lie beside it, and with them the PALs, without which the encoder is not the model.
"""

import argparse
import json
import shutil
from dataclasses import asdict
from pathlib import Path

from base_bert import load_encoder, load_encoder_of_run, load_strictly, read_tensors, write_tensors
from bert import BertModel
from config import MultitaskConfig, UserError
from lora import apply_lora, load_adapter, merge_lora, save_adapter
from multitask_bert import MultitaskBERT
from pals import apply_pals
from runtime.files import output_errors, temporary_path
from runtime.script import say
from training.flags import default_flags
from training.model_card import model_card
from training.plan import make_plan
from training.run_folder import find_damage


def save_model(model, lora, folder, card=None):
    """Write a `MultitaskBERT` into an empty folder; the README's "The run folder" lists the files.

    With `lora`, a `LoRAConfig`, the adapter is written instead of the whole encoder. `card` is the
    text of the model card, if there should be one.
    """
    folder = Path(folder)
    if lora:
        origin = model.bert.origin
        save_adapter(model.bert, folder, lora, origin.best or origin.name, origin.revision)
        model.tokenizer.save_pretrained(folder)
    else:
        model.bert.save_pretrained(folder, model.tokenizer)
        if not model.pals:  # they are no part of a model of sentence-transformers
            _write_sentence_transformers_files(folder, model)
    write_tensors(folder / "heads.safetensors", _heads(model))
    text = json.dumps(asdict(model.config), indent=2) + "\n"
    (folder / "heads.json").write_text(text, encoding="utf-8")
    if card:
        (folder / "README.md").write_text(card, encoding="utf-8")


def save_best(run, model, lora, dev):
    """Keep a model as its run's best, with its model card; `dev` has its dev metrics by task."""

    def write(folder):
        kind = {"is_adapter": bool(lora), "has_pals": bool(model.pals)}
        card = model_card(run.description(), dev, model.config.max_length, **kind)
        save_model(model, lora, folder, card)

    run.save_best(write)


def _heads(model):
    """All tensors outside the encoder, by name."""
    return {n: t for n, t in model.state_dict().items() if not n.startswith("bert.")}


def _write_sentence_transformers_files(folder, model):
    """Describe encoder and pooling, so that `SentenceTransformer(folder)` loads both."""
    kind = "sentence_transformers.models"
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": f"{kind}.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": f"{kind}.Pooling"},
    ]
    pooling = {
        "word_embedding_dimension": model.bert.config.hidden_size,
        "pooling_mode_cls_token": model.config.pooling == "cls",
        "pooling_mode_mean_tokens": model.config.pooling == "mean",
    }
    contents = {
        "modules.json": modules,
        "1_Pooling/config.json": pooling,
        "sentence_bert_config.json": {"max_seq_length": model.config.max_length},
    }
    (folder / "1_Pooling").mkdir()
    for name, content in contents.items():
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_weights(model, lora, folder):
    """Read what `save_model` wrote into a model of its shape; `undamaged_best` checks it first.

    Raises `UserError` for a missing, unexpected or differently shaped tensor.
    """
    if lora:
        load_adapter(model.bert, folder, lora)
    else:
        path = folder / "model.safetensors"
        load_strictly(model.bert.state_dict(), read_tensors(path), path)
    path = folder / "heads.safetensors"
    load_strictly(_heads(model), read_tensors(path), path)
    model.vector_cache.clear()


def export_run(run, folder):
    """Write a run's best model as one plain encoder, LoRA merged, with its heads, into a folder.

    The folder appears once it is complete. Raises `UserError` if it exists, or the run has PALs.
    """
    folder = Path(folder)
    if folder.exists() or folder.is_symlink():
        raise UserError(f"--export {folder}: exists; expected the name of a new folder")
    model, description = load_run(run, "cpu")
    if model.pals:
        raise UserError(f"--export: {run.path} has PALs, which no other tool reads; use --predict")
    merge_lora(model.bert)
    lines = [line for line in run.metrics() if line["kind"] == "eval"]
    dev = max(lines, key=lambda line: line["overall"])["dev"] if lines else {}
    card = model_card(description, dev, model.config.max_length, is_adapter=False)
    temporary = temporary_path(folder)
    try:
        with output_errors(folder):
            save_model(model, None, temporary, card)
            temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def plan_of(run, predicts=False):
    """The `Plan` of a `RunFolder`; flags that an older version did not have are the defaults.

    With `predicts`, raises `UserError` if the run has no task to predict.
    """
    plan = make_plan(argparse.Namespace(**default_flags() | run.description()["args"]), {})
    if predicts and not plan.tasks:
        reason = "masked language modelling alone, no task to predict"
        raise UserError(f"{run.path}: {reason}; train tasks with --start_from {run.path}")
    return plan


def undamaged_best(run):
    """The folder of a run's best model. Raises `UserError` if there is none or it is damaged."""
    best = run.best.resolve()  # once: a run that still trains may exchange the link meanwhile
    if not best.exists():
        raise UserError(f"{run.path}: no best model yet; resume the run with --resume")
    if problem := find_damage(best):
        raise UserError(problem)
    return best


def load_run(run, device):
    """The best model of a run, a `RunFolder`, in eval mode, and the run's description.

    Raises `UserError` if there is no best model, it is damaged, or the encoder is not the run's.
    """
    description, plan, best = run.description(), plan_of(run), undamaged_best(run)
    if (best / "adapter_config.json").exists() != bool(plan.lora):
        kind = "the whole encoder, expected an adapter"
        kind = kind if plan.lora else "an adapter, expected a model"
        raise UserError(f"{best}: {kind} of mode {plan.flags.fine_tune_mode}")
    if plan.lora:
        encoder, tokenizer = load_encoder_of_run(run.path, description)
        check_encoder_of_run(run.path, encoder, description["encoder"])
        bert = apply_lora(BertModel.from_pretrained(encoder), plan.lora)
    else:
        encoder, tokenizer = load_encoder(str(best))
        bert = BertModel.from_pretrained(encoder)
    config = read_config(best / "heads.json", plan.tasks)
    model = MultitaskBERT(bert, config, tokenizer, plan.is_frozen)
    if plan.pals:
        model.pals = apply_pals(bert, plan.pals, plan.flags.tasks)
    load_weights(model, plan.lora, best)
    return model.to(device).eval(), description


def encoder_of_best(run):
    """`(Encoder, BertTokenizer)` of a run's best model; of a LoRA run, without its adapters."""
    recorded, best = run.description()["encoder"], undamaged_best(run)
    if not (best / "adapter_config.json").exists():
        recorded = recorded | {"best": str(best)}
    return load_encoder_of_run(run.path, {"encoder": recorded})


def start_from(model, lora, run):
    """Copy the adapters and heads of a run's best model into one built on `encoder_of_best`.

    If `lora` is None, the adapters are merged into the encoder. Heads, projections and PALs are
    copied if they have the same shapes; returns their names. Raises `UserError` for other adapters.
    """
    source, _ = load_run(run, "cpu")
    if not lora:
        tensors = merge_lora(source.bert).state_dict()
        load_strictly(model.bert.state_dict(), tensors, run.path)
    elif plan_of(run).lora:
        load_adapter(model.bert, run.best, lora)
    ours, theirs, taken = _parts(model), _parts(source), []
    for name, part in ours.items():
        found = theirs.get(name, {})
        if {n: t.shape for n, t in part.items()} == {n: t.shape for n, t in found.items()}:
            load_strictly(part, found, run.path)
            taken.append(name)
    text = f"{run.path}, {run.describe_best()}: copied: {', '.join(['encoder', *taken])}"
    if new := [name for name in ours if name not in taken]:
        text += f"; new: {', '.join(new)}"
    say(f"{text}; dropped: pals" if source.pals and not model.pals else text)
    return taken


def _parts(model):
    """The tensors of each module outside the encoder by name: heads by task, projections."""
    modules = {**dict(model.named_children()), **model.heads}
    states = {n: part.state_dict() for n, part in modules.items() if n not in ("bert", "heads")}
    return {name: state for name, state in states.items() if state}  # a cosine head has none


def check_encoder_of_run(path, encoder, recorded):
    """Raise `UserError` if `encoder` is not the one that the run at `path` recorded."""
    for key, kind in (("sha256", "weights"), ("settings_sha256", "configuration or vocabulary")):
        if getattr(encoder, key) != recorded[key]:
            raise UserError(
                f"{encoder.folder}: not the encoder of {path}: other {kind} than it had"
            )


def read_config(path, tasks):
    """The `MultitaskConfig` in a `heads.json`. Raises `UserError` if it is not of these tasks."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        config = MultitaskConfig(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the settings of a model: {error}") from error
    if list(config.tasks) != tasks:
        raise UserError(f"{path}: tasks {' '.join(config.tasks)}; expected {' '.join(tasks)}")
    return config
