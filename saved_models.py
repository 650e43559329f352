"""How is a whole model, encoder and heads, saved and loaded?

In other tools' formats: the encoder as `transformers` and `sentence-transformers` read it, in mode
LoRA the adapter as `peft` reads it, and the heads beside it.
"""

import json
from dataclasses import asdict
from pathlib import Path

from base_bert import load_encoder, load_encoder_of_run, load_strictly, read_tensors, write_tensors
from bert import BertModel
from config import LoRAConfig, MultitaskConfig, UserError
from lora import apply_lora, load_adapter, save_adapter
from multitask_bert import MultitaskBERT
from run_folder import damage


def save_model(model, tokenizer, encoder, lora_config, folder):
    """Write a model in other tools' formats: see the README, "The run folder".

    The encoder for `transformers` and `sentence-transformers`, or with a `LoRAConfig` the adapter
    for `peft`; the heads beside it.
    """
    folder = Path(folder)
    if lora_config:
        save_adapter(model.bert, folder, lora_config, encoder.name, encoder.revision)
        tokenizer.save_pretrained(folder)
    else:
        model.bert.save_pretrained(folder, tokenizer)
        _write_sentence_transformers_files(folder, model)
    heads = {n: t for n, t in model.state_dict().items() if not n.startswith("bert.")}
    write_tensors(folder / "heads.safetensors", heads)
    text = json.dumps(asdict(model.config), indent=2) + "\n"
    (folder / "heads.json").write_text(text, encoding="utf-8")


def _write_sentence_transformers_files(folder, model):
    """Which modules `SentenceTransformer(folder)` puts together: this encoder and this pooling."""
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
    (folder / "1_Pooling").mkdir()
    for name, content in (
        ("modules.json", modules),
        ("1_Pooling/config.json", pooling),
        ("sentence_bert_config.json", {"max_seq_length": model.config.max_length}),
    ):
        (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def load_weights(model, lora_config, folder):
    """Read what `save_model` wrote into a model of the same shape; strict about every tensor."""
    folder = Path(folder)
    if problem := damage(folder):
        raise UserError(problem)
    if lora_config:
        load_adapter(model.bert, folder, lora_config)
    else:
        path = folder / "model.safetensors"
        load_strictly(model.bert.state_dict(), read_tensors(path), path)
    own = {n: t for n, t in model.state_dict().items() if not n.startswith("bert.")}
    load_strictly(own, read_tensors(folder / "heads.safetensors"), folder / "heads.safetensors")
    model.vectors.clear()


def lora_config_of(args):
    """The `LoRAConfig` of a run's arguments, None in the other modes."""
    if args["fine_tune_mode"] != "LoRA":
        return None
    return LoRAConfig(
        args["LoRA_r"], args["LoRA_alpha"], args["LoRA_dropout"], tuple(args["LoRA_targets"])
    )


def load_run(run, device):
    """The best model of a run and what belongs to it: `(model, tokenizer, description)`.

    Raises `UserError` where there is no best model, it is damaged, or the encoder is not the run's.
    """
    description = run.description()
    args = description["args"]
    best = run.best.resolve()  # once: a run that still trains may exchange the link meanwhile
    if not best.exists():
        raise UserError(f"{run.path}: no best model yet; continue the run with --resume")
    if problem := damage(best):
        raise UserError(problem)
    lora = lora_config_of(args)
    if (best / "adapter_config.json").exists() != bool(lora):
        kind = "the whole encoder, expected an adapter" if lora else "an adapter, expected a model"
        raise UserError(f"{best}: {kind} of mode {args['fine_tune_mode']}")
    if lora:
        encoder, tokenizer = load_encoder_of_run(run.path, description)
        kinds = {"sha256": "weights", "settings_sha256": "configuration or vocabulary"}
        for key, kind in kinds.items():
            found = getattr(encoder, key)
            if description["encoder"].get(key, found) != found:
                raise UserError(
                    f"{encoder.folder}: not the encoder of {run.path}: other {kind} than it had"
                )
        bert = apply_lora(BertModel.from_pretrained(encoder), lora)
    else:
        encoder, tokenizer = load_encoder(best)
        bert = BertModel.from_pretrained(encoder)
    path = best / "heads.json"
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
        settings = {k: tuple(v) if isinstance(v, list) else v for k, v in settings.items()}
        config = MultitaskConfig(**settings)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path}: not the settings of a model: {error}") from error
    if list(config.tasks) != args["tasks"]:
        raise UserError(
            f"{path}: tasks {' '.join(config.tasks)}; expected {' '.join(args['tasks'])}"
        )
    frozen = args["fine_tune_mode"] == "last-linear-layer"
    model = MultitaskBERT(bert, config, tokenizer.pad_id, frozen)
    load_weights(model, lora, best)
    return model.to(device).eval(), tokenizer, description
