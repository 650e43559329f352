"""Encoder weights in and out: published names, strict loading, saving. Safetensors, no pickle."""

import hashlib
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from config import BertConfig, UserError
from runtime.hub import Encoder, checked_encoder, resolve_encoder
from runtime.script import say
from tokenizer import BertTokenizer

# Names in published files -> names here.
RENAMED = {"LayerNorm.gamma": "LayerNorm.weight", "LayerNorm.beta": "LayerNorm.bias"}
PARTS = ("embeddings", "encoder", "pooler")  # of an encoder; whatever else a file has is left out


def parameter_name(published):
    """The parameter's name here for a tensor's name in a published file."""
    name = published.removeprefix("module.").removeprefix("bert.")
    for old, new in RENAMED.items():
        name = name.replace(old, new)
    return name


def encoder_tensors(tensors, path, expected):
    """The encoder's tensors of a published file, by the names here; says what is left out.

    `expected` are the encoder's parameters by name. A file without a pooler, which this program
    does not use, gets one of zeros.
    """
    tensors = {parameter_name(name): tensor for name, tensor in tensors.items()}
    tensors.pop("embeddings.position_ids", None)  # a constant in old files
    parts = Counter(name.split(".")[0] for name in sorted(tensors))
    others = {part: n for part, n in parts.items() if part not in PARTS}
    notes = [f"{part} ({n} tensors) outside the encoder" for part, n in others.items()]
    tensors = {n: tensor for n, tensor in tensors.items() if n.split(".")[0] in PARTS}
    if tensors and "pooler" not in parts:
        notes.append("no pooler (its output will be 0)")
        poolers = {n: p for n, p in expected.items() if n.startswith("pooler.")}
        tensors |= {name: torch.zeros(p.shape) for name, p in poolers.items()}
    if notes:
        say(f"{path}: {', '.join(notes)}")
    return tensors


def read_tensors(path):
    """All tensors of a safetensors file by name. Raises `UserError` where it cannot be read."""
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path}: not a complete safetensors file: {error}") from error


def write_tensors(path, tensors, metadata=None):
    """Write tensors by name as safetensors, readable by everyone who may read the folder."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    path = Path(path)
    path.touch()
    mode = path.stat().st_mode  # safetensors would leave 0600
    save_file(tensors, path, metadata=metadata or {"format": "pt"})
    path.chmod(mode)


def load_strictly(parameters, tensors, origin):
    """Copy `tensors` into `parameters`, both by name, once every name and shape matched.

    Raises `UserError`, with `origin` named and nothing copied, where a tensor does not fit.
    """
    problems = [f"missing {name}" for name in parameters if name not in tensors]
    problems += [f"unexpected {name}" for name in tensors if name not in parameters]
    problems += [
        f"{name} is {tuple(tensors[name].shape)}, expected {tuple(parameter.shape)}"
        for name, parameter in parameters.items()
        if name in tensors and tensors[name].shape != parameter.shape
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise UserError(f"{origin}: does not fit: {'; '.join(problems[:4])}{more}")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[name])


def load_mlm_head(head, path):
    """Load a published file's head, if it has one, into a `MaskedLMHead`, which has no decoder."""
    part, tensors = "cls.predictions.", {}
    for published, tensor in read_tensors(path).items():
        name = parameter_name(published).replace("transform.", "")
        if name.startswith(part) and not name.startswith(f"{part}decoder."):
            tensors[name.removeprefix(part)] = tensor
    if tensors:
        load_strictly(head.state_dict(), tensors, path)
    found = "read" if tensors else "not in this file; it starts anew"
    say(f"{path}: head of masked language modelling: {found}")


class BertPreTrainedModel(nn.Module):
    """Initialisation, loading and saving of an encoder; `bert.BertModel` adds the layers."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.origin = None  # the `Encoder` whose weights were loaded

    def init_weights(self):
        """Fresh weights as in `transformers`: normal(0, initializer_range), biases 0."""
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=self.config.initializer_range)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    @classmethod
    def from_pretrained(cls, encoder):
        """The model of a resolved `Encoder` or of a local folder, in fp32, dropout off.

        `model.origin` is the `Encoder`. A name on the hub goes through `resolve_encoder` first.
        Raises `UserError` where a file is damaged, or a tensor of the encoder is missing,
        unexpected or misshapen.
        """
        if not isinstance(encoder, Encoder):
            encoder = checked_encoder(Path(encoder))
        with torch.device("meta"):  # no weights are drawn
            model = cls(BertConfig.from_file(encoder.folder / "config.json"))
        model.to_empty(device="cpu")
        path = encoder.folder / "model.safetensors"
        parameters = model.state_dict()
        load_strictly(parameters, encoder_tensors(read_tensors(path), path, parameters), path)
        model.origin = encoder
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write `config.json`, `model.safetensors` and the tokenizer's files, if given.

        Under BERT's published names: `transformers.BertModel.from_pretrained(folder)` loads them.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = {**self.config.to_dict(), "dtype": "float32"}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        tensors = {name: tensor.float() for name, tensor in self.state_dict().items()}
        write_tensors(folder / "model.safetensors", tensors)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)


def load_encoder(name=None):
    """`(Encoder, BertTokenizer)` of a name; raises `UserError` where they do not fit each other."""
    encoder = resolve_encoder(name)
    config = BertConfig.from_file(encoder.folder / "config.json")
    tokenizer = BertTokenizer.from_pretrained(encoder.folder)
    if len(tokenizer) > config.vocab_size:
        raise UserError(
            f"{encoder.folder}: vocabulary of {len(tokenizer)} word pieces does not fit "
            f"vocab_size {config.vocab_size} of config.json"
        )
    tokenizer.model_max_length = min(tokenizer.model_max_length, config.max_position_embeddings)
    settings = json.dumps([config.to_dict(), tokenizer.describe()])
    digest = hashlib.sha256(settings.encode()).hexdigest()
    return replace(encoder, settings_sha256=digest), tokenizer


def load_encoder_of_run(path, description):
    """As `load_encoder`, for the encoder of the run at `path`, never another one.

    `description` holds the values of its `run.json`. Raises `UserError` where it cannot be had.
    """
    recorded = description["encoder"]
    if recorded.get("best") and not Path(recorded["best"]).exists():  # moved together with this run
        moved = Path(path).resolve().parent.joinpath(*Path(recorded["best"]).parts[-2:])
        recorded = recorded | {"best": str(moved)}
    try:
        encoder, tokenizer = load_encoder(recorded.get("best") or recorded["name"])
    except UserError as error:
        raise UserError(
            f"{path}: the encoder it was trained on cannot be loaded, and no other will do (if it "
            f"was a folder, put it back, or a link to it): {error}"
        ) from error
    names = {key: recorded.get(key) for key in ("name", "substituted", "best")}
    return replace(encoder, **names), tokenizer
