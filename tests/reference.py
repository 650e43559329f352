"""What the published libraries compute: the other side of tests/test_parity.py.

    python -P tests/reference.py FOLDER

Reads jobs from standard input, each a line of JSON: its `name`, its `kind` (a function below) and
that function's arguments. The job's tensors are in FOLDER/<name>.in.safetensors, the answer goes to
FOLDER/<name>.out.safetensors. A line of JSON on standard output then says what the libraries warned
of, and the traceback if the job failed.

It is a process of its own, since the program's datasets.py and the hub's package of that name
cannot be imported side by side (-P keeps this folder from Python's path). The tests apply the first
functions, which need torch alone, to the program's own models.
"""

import copy
import json
import logging.handlers
import sys
import traceback
import warnings
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


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


def measure(model, tensors):
    """`outputs_of`, and the gradient of `loss_of` for each trained parameter."""
    model.zero_grad()
    loss_of(forward(model, tensors), tensors).backward()
    gradients = {
        f"gradient of {name}": parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is not None
    }
    return outputs_of(model, tensors) | gradients


def train(model, tensors, steps, make_optimizer):
    """Trained parameters by name after `steps` on `loss_of` of what `make_optimizer(model)` is."""
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    optimizer = make_optimizer(model)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(forward(model, tensors), tensors).backward()
        optimizer.step()
    return {f"trained {name}": parameter.detach().clone() for name, parameter in trained.items()}


def in_double(model, tensors):
    """A model and its inputs in double precision."""
    tensors = {n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}
    return model.double(), tensors


def loaded(kind, folder):
    """A model of `transformers`; warns of missing, unexpected and misshapen weights."""
    model, info = kind.from_pretrained(folder, output_loading_info=True)
    if amiss := {key: sorted(map(str, names)) for key, names in info.items() if names}:
        warnings.warn(str(amiss), stacklevel=1)
    return model.eval()


def encoder(tensors, model):
    """Outputs and gradients of what `AutoModel` makes of folder `model`."""
    import transformers

    return measure(loaded(transformers.AutoModel, model), tensors)


def masked_lm(tensors, model):
    """The loss of `BertForMaskedLM` of folder `model`, and the gradient of each parameter.

    Labels are -100 where no token is masked. The head's parameters have the names of mlm.py.
    """
    import transformers

    bert = loaded(transformers.BertForMaskedLM, model)
    loss = bert(**tensors).loss
    loss.backward()
    result = {"loss": loss.detach()}
    for name, parameter in bert.named_parameters():
        name = name.replace("cls.predictions.", "mlm.").replace("mlm.transform.", "mlm.")
        result[f"gradient of {name}"] = parameter.grad
    return result


def tokens(tensors, tokenizer, texts, pairs=(), max_length=512, options=()):
    """Ids of texts and of pairs of texts, one after the other, with lengths and segment ids."""
    import transformers

    chosen = transformers.AutoTokenizer.from_pretrained(tokenizer)
    options = {"truncation": True, "max_length": max_length, **dict(options)}
    result = {}
    for name, columns in (("texts", [texts]), ("pairs", list(zip(*pairs, strict=True)))):
        if columns:
            found = chosen(*(list(column) for column in columns), **options)
            for key in ("input_ids", "token_type_ids"):
                result[f"{name}.{key}"] = torch.tensor([x for row in found[key] for x in row])
            result[f"{name}.lengths"] = torch.tensor([len(row) for row in found["input_ids"]])
    return result


def lora(tensors, model, folder, settings=None, steps=0, lr=0.0, ratio=1.0, double=False):
    """A LoRA model of `peft`: outputs, gradients, outputs when merged, weights after training.

    The adapter is read from `folder`, or with `settings` made anew and written there. `ratio`: of
    LoRA+. `double`: all of it in double precision.
    """
    import peft
    import transformers
    from peft.optimizers import create_loraplus_optimizer

    def make_optimizer(wrapped):
        rates = {"lr": lr, "loraplus_lr_ratio": ratio}
        return create_loraplus_optimizer(wrapped, torch.optim.AdamW, **rates)

    bert = transformers.BertModel.from_pretrained(model)
    if settings is None:
        wrapped = peft.PeftModel.from_pretrained(bert, folder, is_trainable=True)
    else:
        wrapped = peft.get_peft_model(bert, peft.LoraConfig(**settings))
        wrapped.save_pretrained(folder)
    wrapped.eval()  # without dropout; the adapters stay trainable
    if double:
        wrapped, tensors = in_double(wrapped, tensors)
    merged = outputs_of(copy.deepcopy(wrapped).merge_and_unload(), tensors)
    result = measure(wrapped, tensors) | {f"merged {name}": t for name, t in merged.items()}
    result |= train(wrapped, tensors, steps, make_optimizer)
    plain = {name.replace("base_model.model.", ""): tensor for name, tensor in result.items()}
    return {name.replace(".default.weight", ""): tensor for name, tensor in plain.items()}


def pals(tensors, model, heads):
    """An encoder with a task's projected attention layers, as their authors compute them.

    g is a `BertSelfAttention`; each weight of the PALs is in `tensors` by its name.
    """
    import transformers
    from transformers.models.bert.modeling_bert import BertSelfAttention

    bert = transformers.BertModel.from_pretrained(model).eval()
    hidden, size = bert.config.hidden_size, tensors["pals.V_E.bias"].numel()
    narrow = copy.deepcopy(bert.config)
    narrow.hidden_size, narrow.num_attention_heads = size, heads
    parts = {"V_E": torch.nn.Linear(hidden, size), "V_D": torch.nn.Linear(size, hidden)}
    parts["attention"] = torch.nn.ModuleList(BertSelfAttention(narrow) for _ in bert.encoder.layer)
    bert.pals = torch.nn.ModuleDict(parts).eval()
    own = {n.removeprefix("pals."): t for n, t in tensors.items() if n.startswith("pals.")}
    bert.pals.load_state_dict(own)
    layers, added = list(bert.encoder.layer), {}

    def compute(layer, inputs):
        hidden_states, mask = inputs[:2]
        attended, _ = parts["attention"][layers.index(layer)](parts["V_E"](hidden_states), mask)
        added["TS"] = torch.nn.functional.gelu(parts["V_D"](attended))

    for layer in layers:
        layer.register_forward_pre_hook(compute)
        layer.output.register_forward_pre_hook(
            lambda _, inputs: (inputs[0], inputs[1] + added["TS"])
        )
    return measure(*in_double(bert, tensors))


def sentence_vectors(tensors, model, texts):
    """Vectors of texts by `SentenceTransformer`, (texts, hidden)."""
    from sentence_transformers import SentenceTransformer

    encoder = SentenceTransformer(model, device="cpu")
    return {"vectors": torch.from_numpy(encoder.encode(texts, show_progress_bar=False))}


def main(folder):
    """Do every job on standard input."""
    torch.set_num_threads(1)
    torch.manual_seed(7)
    warnings.simplefilter("always")
    warnings.simplefilter("ignore", FutureWarning)
    logging.captureWarnings(True)
    listener = logging.handlers.BufferingHandler(capacity=10**6)
    listener.setLevel(logging.WARNING)
    for library in ("transformers", "sentence_transformers", "peft", "py.warnings"):
        logging.getLogger(library).addHandler(listener)
    replies, sys.stdout = sys.stdout, sys.stderr  # the libraries may print
    for line in sys.stdin:
        listener.flush()
        job, failure = json.loads(line), None
        name, kind = job.pop("name"), job.pop("kind")
        try:
            result = globals()[kind](load_file(folder / f"{name}.in.safetensors"), **job)
            result = {key: tensor.detach().contiguous() for key, tensor in result.items()}
            save_file(result, folder / f"{name}.out.safetensors")
        except Exception:
            failure = traceback.format_exc()
        said = [f"{record.name}: {record.getMessage()}" for record in listener.buffer]
        print(json.dumps({"said": said, "failure": failure}), file=replies, flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
