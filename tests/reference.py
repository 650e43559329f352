"""What the published libraries compute: the other side of tests/test_parity.py.

    python -P tests/reference.py FOLDER

Reads names of jobs from standard input, a line each. FOLDER/<name>.in.json holds the job's `kind`
(a function below) and that function's arguments, FOLDER/<name>.in.safetensors its tensors. The
answer goes to FOLDER/<name>.out.safetensors, and a line of JSON to standard output: the job's name,
what the libraries said meanwhile, the seconds it took, and the traceback where it failed.

A process of its own, since the program's datasets.py and the hub's package of that name cannot be
imported side by side (-P keeps this folder from Python's path). The first functions, which need
torch alone, the tests apply to the program's own models.
"""

import copy
import json
import logging
import sys
import time
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

THREADS = 1  # the matrices are small, and on a busy machine two would wait for each other


def loss_of(outputs, tensors):
    """A fixed weighted sum of all outputs at real tokens, so that every output has a gradient."""
    hidden = outputs["last_hidden_state"][tensors["attention_mask"].bool()]
    total = (hidden * tensors["hidden_weights"]).mean()
    return total + (outputs["pooler_output"] * tensors["pooled_weights"]).mean()


def forward(model, tensors):
    """The standard call."""
    names = ("input_ids", "attention_mask", "token_type_ids")
    return model(**{name: tensors[name] for name in names})


def outputs_of(model, tensors):
    """Hidden states of real tokens (tokens, hidden) and the pooler's output, by name."""
    with torch.no_grad():
        outputs = forward(model, tensors)
    hidden = outputs["last_hidden_state"][tensors["attention_mask"].bool()]
    return {"last_hidden_state": hidden, "pooler_output": outputs["pooler_output"]}


def gradients_of(model, tensors):
    """Gradient of `loss_of` for each trained parameter, by name."""
    model.zero_grad()
    loss_of(forward(model, tensors), tensors).backward()
    return {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }


def encoder(tensors, model):
    """Outputs and gradients of `transformers.BertModel` with the weights of folder `model`."""
    import transformers

    bert, info = transformers.BertModel.from_pretrained(model, output_loading_info=True)
    warn_of_amiss(info)
    return outputs_of(bert.eval(), tensors) | gradients_of(bert, tensors)


def exported(tensors, model):
    """Outputs of whatever `AutoModel` makes of folder `model`."""
    import transformers

    bert, info = transformers.AutoModel.from_pretrained(model, output_loading_info=True)
    warn_of_amiss(info)
    return outputs_of(bert.eval(), tensors)


def warn_of_amiss(info):
    """Warn of missing, unexpected or misshapen weights in a folder that was loaded."""
    amiss = {key: sorted(map(str, names)) for key, names in info.items() if names}
    if amiss:
        warnings.warn(str(amiss), stacklevel=2)


def tokens(tensors, tokenizer, texts, pairs=(), max_length=512, options=()):
    """Ids of texts and of pairs of texts, one after the other, with lengths and segment ids."""
    import transformers

    chosen = transformers.AutoTokenizer.from_pretrained(tokenizer)
    options = {"truncation": True, "max_length": max_length, **dict(options)}
    result = {}
    for name, columns in (("texts", [texts]), ("pairs", list(zip(*pairs, strict=True)))):
        if not columns:
            continue
        found = chosen(*(list(column) for column in columns), **options)
        for key in ("input_ids", "token_type_ids"):
            rows = found[key]
            result[f"{name}.{key}"] = torch.tensor([x for row in rows for x in row])
        result[f"{name}.lengths"] = torch.tensor([len(row) for row in rows])
    return result


def after_training(model, tensors, steps, lr):
    """Trained parameters by name after `steps` of AdamW on `loss_of`."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(forward(model, tensors), tensors).backward()
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in trained.items()}


def in_double(model, tensors):
    """A model and its inputs in double precision."""
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    return model.double(), tensors


def without_wrapping(tensors):
    """`peft`'s names of an adapter's parameters -> the plain ones."""
    wrapping = (("base_model.model.", ""), (".default.weight", ""))
    for old, new in wrapping:
        tensors = {name.replace(old, new): tensor for name, tensor in tensors.items()}
    return tensors


def lora(tensors, model, folder, settings=None, steps=0, lr=0.0, double=False):
    """A LoRA model of `peft`: outputs, gradients, outputs when merged, weights after training.

    The adapter is read from `folder`, or with `settings` made anew and written there. `double`: all
    of it in double precision.
    """
    import peft
    import transformers

    bert = transformers.BertModel.from_pretrained(model)
    if settings is None:
        wrapped = peft.PeftModel.from_pretrained(bert, folder, is_trainable=True)
    else:
        wrapped = peft.get_peft_model(bert, peft.LoraConfig(**settings))
        wrapped.save_pretrained(folder)
    wrapped.eval()  # without dropout; the adapters stay trainable
    if double:
        wrapped, tensors = in_double(wrapped, tensors)
    result = outputs_of(wrapped, tensors) | gradients_of(wrapped, tensors)
    merged = copy.deepcopy(wrapped).merge_and_unload()
    result |= {f"merged {name}": tensor for name, tensor in outputs_of(merged, tensors).items()}
    weights = after_training(wrapped, tensors, steps, lr)
    return without_wrapping(result | {f"trained {name}": t for name, t in weights.items()})


def sentence_vectors(tensors, model, texts):
    """Vectors of texts by `SentenceTransformer`, (texts, hidden)."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    return {"vectors": torch.from_numpy(encoder.encode(texts, show_progress_bar=False))}


class Listener(logging.Handler):
    """Keeps every warning that a library logs."""

    def __init__(self, said):
        super().__init__(logging.WARNING)
        self.said = said

    def emit(self, record):
        """Keep one message."""
        self.said.append(f"{record.name}: {record.getMessage()}")


def answer(folder, name):
    """Do one job; returns what the libraries said meanwhile."""
    job = json.loads((folder / f"{name}.in.json").read_text(encoding="utf-8"))
    path = folder / f"{name}.in.safetensors"
    tensors = load_file(path) if path.exists() else {}
    said = []
    listener = Listener(said)
    libraries = ("transformers", "sentence_transformers", "peft")
    loggers = [logging.getLogger(library) for library in libraries]
    for logger in loggers:
        logger.addHandler(listener)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            result = globals()[job.pop("kind")](tensors, **job)
    finally:
        for logger in loggers:
            logger.removeHandler(listener)
    result = {key: tensor.detach().contiguous() for key, tensor in result.items()}
    save_file(result, folder / f"{name}.out.safetensors")
    return said + [str(w.message) for w in caught if not issubclass(w.category, FutureWarning)]


def main(folder):
    """Do every job that is named on standard input."""
    torch.set_num_threads(THREADS)
    torch.manual_seed(7)
    replies, sys.stdout = sys.stdout, sys.stderr  # the libraries may print
    for line in sys.stdin:
        name, began = line.strip(), time.perf_counter()
        reply = {"name": name, "said": [], "failure": None}
        try:
            reply["said"] = answer(folder, name)
        except Exception:
            reply["failure"] = traceback.format_exc()
        reply["seconds"] = time.perf_counter() - began
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
