"""The same numbers as `transformers`, `peft`, `sentence-transformers` and the published losses.

All of their work is done by one process of reference.py (see there). What is reached is printed:
python -m pytest -s tests/test_parity.py. Every comparison has a twin that must fail: the same
function, applied to something that is wrong in a small way.
"""

import copy
import json
import math
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import reference
import torch
from conftest import REAL_DATA, REPOSITORY, SAMPLE
from safetensors.torch import load_file

import base_bert
from base_bert import load_encoder, write_tensors
from bert import ROW_TOKENS, BertModel, pack
from config import TASKS, BertConfig, LoRAConfig
from datasets import read_task_file
from lora import (
    adapter_layers,
    adapter_tensors,
    apply_lora,
    load_adapter,
    merge_lora,
    save_adapter,
)
from run_folder import RunFolder
from saved_models import load_run, save_model
from simcse import supervised_simcse_loss, unsupervised_simcse_loss
from tokenizer import BertTokenizer, join_pair

LIMIT = 1e-5  # largest difference, relative to the tensor's largest value
CLEARLY = 10 * LIMIT  # what a twin must exceed

# ------------------------------------------------------------------------------------- comparing


def difference(ours, theirs):
    """Largest difference of two tensors, relative to the largest value of `theirs`."""
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    assert ours.dtype == theirs.dtype, (ours.dtype, theirs.dtype)
    assert ours.isfinite().all() and theirs.isfinite().all()
    apart, scale = (ours - theirs).abs().max().item(), theirs.abs().max().item()
    return apart / scale if scale else float(apart > 0)


def largest_difference(what, ours, theirs):
    """The worst `difference` among tensors by name; prints it. Their names must be the same.

    The gradient of key.bias is left aside: it is zero in exact arithmetic, here and there.
    """
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:6]
    found = {
        name: difference(ours[name], theirs[name])
        for name in ours
        if not name.endswith("key.bias")
    }
    worst = max(found, key=found.get)
    print(f"  {what}: {len(found)} tensors, largest difference {found[worst]:.1e} ({worst})")
    return found[worst]


def named(tensors, *beginnings):
    """Those of a dict of tensors whose names begin so."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(beginnings)}


# ---------------------------------------------------------------------------------------- inputs

DATA = REAL_DATA if (REAL_DATA / "ids-sst-train.csv").is_file() else SAMPLE


def sentences_of(task, split, data=DATA):
    """Examples' sentences of one file, a list of tuples."""
    examples = read_task_file(data / TASKS[task].file_name(split), TASKS[task], split).examples
    return [example.sentences for example in examples]


ODD_TEXTS = [
    "", " ", "\t \n", "emoji 😀 in text 🇩🇪 and ❤\ufe0f", "family 👩\u200d👩\u200d👧\u200d👦",
    "你好，世界 mixed with English漢字", "かな カナ 한국어", "naïve café Ångström",
    "nai\u0308ve cafe\u0301 a\u030a\u0323", "soft\u00adhyphen", "zero\u200bwidth\u200djoin\ufeff",
    "nul\0nul", "bell\x07 escape\x1b[0m delete\x7f c1\x85\x9f", "line\u2028and\u2029paragraph",
    "a" * 99, "a" * 100, "a" * 101, "ab" * 2000, "é" * 99, "é" * 100, "é" * 101,
    "x" * 100 + "." + "y" * 101, "a\u0300\u0301\u0302" * 40, "a literal [SEP] and [CLS] and [MASK]",
    "[PAD] [UNK]", "[SEP]", "[sep] [ SEP ] x[SEP]y", "##ing ##", "İstanbul IŞIK ı",
    "Straße ẞ GROẞ", "ﬁ ligature ½ Ⅷ ²", "ΑΣ ας Ωμέγα", "Привет Ёж", "العربية עברית हिन्दी ไทย",
    "don't can't `` quotes '' — dash … $5.00 @user #tag a_b <br />",
    "nbsp\u00a0thin\u2009ideographic\u3000space", "rtl\u202eoverride\u202c",
    "\ufffd \ud7ff \U0010ffff \ue000", "ǅ Ǆ ǆ ſ \u212a \u212b", "tab\tcr\rlf\nvt\vff\f",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠀀𠮷", "、。「」！？～",
]  # fmt: skip


def texts_of(task):
    """Every text of every file of a task."""
    rows = [row for split in ("train", "dev", "test") for row in sentences_of(task, split)]
    return [text for row in rows for text in row]


@pytest.fixture(scope="module")
def bundled(bundled_folder):
    """The bundled encoder: `(Encoder, BertTokenizer)`."""
    return load_encoder("bundled")


@pytest.fixture(scope="module")
def minilm(bundled):
    """The bundled encoder's model, dropout off."""
    return BertModel.from_pretrained(bundled[0])


@pytest.fixture(scope="module")
def wide():
    """A random model of 12 layers, 768 wide, biases and LayerNorm away from 0 and 1 too."""
    torch.manual_seed(1)
    model = BertModel(BertConfig())
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("LayerNorm.weight")), 0.1)
    return model.eval()


@pytest.fixture(scope="module")
def sequences(bundled):
    """Real sentences and pairs of unlike length: a list of (ids, where segment 1 begins).

    One is longer than the rows that the others share, ROW_TOKENS.
    """
    tokenizer = bundled[1]
    single = [text for (text,) in sentences_of("sst", "dev")[:3]]
    (review,) = sentences_of("cfimdb", "dev")[0]
    pairs = sentences_of("sts", "dev")[:2] + sentences_of("para", "dev")[:1]
    texts = [*tokenizer(single, max_length=40), *tokenizer([review], max_length=ROW_TOKENS + 6)]
    found = [(ids, len(ids)) for ids in texts]
    return found + [join_pair(*tokenizer(texts), 40) for texts in pairs]


def padded(sequences, hidden_size, seed=3):
    """A padded batch of `sequences`, and the random weights of each output in the loss."""
    longest = max(len(ids) for ids, _ in sequences)
    ids = torch.zeros(len(sequences), longest, dtype=torch.int64)
    mask, segments = torch.zeros_like(ids), torch.zeros_like(ids)
    for row, (sequence, start) in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence).long()
        mask[row, : len(sequence)] = 1
        segments[row, start : len(sequence)] = 1
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": segments,
        "hidden_weights": torch.randn(int(mask.sum()), hidden_size, generator=generator),
        "pooled_weights": torch.randn(len(sequences), hidden_size, generator=generator),
    }


class Wrapped(torch.nn.Module):
    """A model called in another way, under its own parameter names."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def named_parameters(self, *args, **kwargs):
        """The model's own names."""
        return self.model.named_parameters(*args, **kwargs)


class InRows(Wrapped):
    """The standard call, computed as training computes: several sentences in one row."""

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Hidden states put back in their padded places; zeros at padding."""
        mask = attention_mask.bool()
        ids = [row[keep].int().numpy() for row, keep in zip(input_ids, mask, strict=True)]
        starts = (mask & (token_type_ids == 0)).sum(1).tolist()
        packed = pack(ids, starts, 0, "cpu")
        assert len(packed.rows) > 1, "no sentence is so long that it needs wider rows"
        shared = sum(len(rows.input_ids) for rows in packed.rows)
        assert shared < len(ids), "one sentence a row would be the padded batch again"
        hidden_states = self.model.encode(packed.rows)
        width = input_ids.size(1)
        states = torch.stack([
            torch.nn.functional.pad(hidden_states[first : first + n], (0, 0, 0, width - n))
            for first, n in zip(packed.first.tolist(), packed.lengths.tolist(), strict=True)
        ])  # fmt: skip
        pooled = torch.tanh(self.model.pooler["dense"](states[:, 0]))
        return {"last_hidden_state": states, "pooler_output": pooled}


# ----------------------------------------------------------------------- runs, asked and answered

LORA = {
    "all": LoRAConfig(r=4, alpha=6.0),
    "some": LoRAConfig(r=5, alpha=16.0, targets=("query", "value")),
}
# Optimiser steps by precision. Adam divides a gradient by its own size, so that the rounding of
# an element close to 0 grows to a share of the learning rate, which therefore is small in fp32.
TRAINING = {"fp32": {"steps": 10, "lr": 2e-5}, "fp64": {"steps": 10, "lr": 1e-3, "double": True}}
PRECISIONS = ("fp32", "fp64")
RUNS = {"full-model": [], "LoRA": ["--LoRA_r", "4", "--LoRA_alpha", "6"]}
EXPORT_TEXTS = [*ODD_TEXTS[3:10], "a [SEP] b", "A film to fall in love with .", "word " * 90]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bundled_folder):
    """One run each of full fine-tuning and LoRA, two steps of the real script on the sample."""
    folder = tmp_path_factory.mktemp("runs")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            [sys.executable, REPOSITORY / "multitask_classifier.py", "--fine-tune-mode", mode,
             *flags, "--pretrained", "bundled", "--data_dir", SAMPLE, "--tasks", "sst",
             "--epochs", "1", "--steps_per_epoch", "2", "--lr", "1e-3", "--precision", "fp32",
             "--predictions_dir", folder / mode],
            cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
            text=True,
        )
        for mode, flags in RUNS.items()
    ]  # fmt: skip
    for process in started:
        said, _ = process.communicate(timeout=120)
        assert process.returncode == 0, said
    yield {mode: RunFolder(folder / "runs" / mode) for mode in RUNS}
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def trained(runs):
    """What each run's best model is: mode -> (MultitaskBERT, BertTokenizer)."""
    return {mode: load_run(run, torch.device("cpu"))[:2] for mode, run in runs.items()}


def random_adapter(model, config):
    """A copy of `model` with LoRA layers whose B is not 0."""
    torch.manual_seed(5)
    model = apply_lora(copy.deepcopy(model), config)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
    return model.eval()


class Exchange:
    """A process of reference.py, and the folder in which it finds its jobs and puts the answers.

    It works while the tests do; whoever needs an answer waits for it.
    """

    def __init__(self, folder):
        self.folder, self.replies = folder, {}
        self.errors = open(folder / "errors.txt", "w+", encoding="utf-8")  # noqa: SIM115
        self.process = subprocess.Popen(
            [sys.executable, "-P", Path(reference.__file__), folder], cwd=folder,
            env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=self.errors, text=True,
        )  # fmt: skip

    def ask(self, name, kind, tensors=None, **arguments):
        """Send a job; see reference.py for its kinds and their arguments."""
        if tensors:
            write_tensors(self.folder / f"{name}.in.safetensors", tensors)
        job = json.dumps({"kind": kind, **arguments}, default=str)
        (self.folder / f"{name}.in.json").write_text(job, encoding="utf-8")
        print(name, file=self.process.stdin, flush=True)

    def reply(self, name):
        """Wait until a job is done. Raises `AssertionError` with the traceback where it failed."""
        while name not in self.replies:
            line = self.process.stdout.readline()
            assert line, (self.folder / "errors.txt").read_text(encoding="utf-8")
            reply = json.loads(line)
            self.replies[reply["name"]] = reply
            print(f"  reference.py: {reply['name']}, {reply['seconds']:.1f} s")
        assert self.replies[name]["failure"] is None, self.replies[name]["failure"]
        return self.replies[name]

    def said(self, name):
        """What the libraries warned of during a job."""
        return self.reply(name)["said"]

    def __getitem__(self, name):
        self.reply(name)
        return load_file(self.folder / f"{name}.out.safetensors")

    def close(self):
        """End the process and remove the folder, which holds some 2 GB."""
        self.process.stdin.close()
        self.process.wait()
        self.process.stdout.close()
        self.errors.close()
        shutil.rmtree(self.folder)


def ask_about_tokens(exchange, bundled):
    """Ids by the published tokenizer, and by the tokenizers that ours writes for other tools."""
    encoder, tokenizer = bundled
    as_text = {"split_special_tokens": True}
    published = {"tokenizer": encoder.folder, "options": as_text}
    for task in TASKS:
        exchange.ask(f"ids {task}", "tokens", texts=texts_of(task), **published)
    pairs = list(zip(ODD_TEXTS, reversed(ODD_TEXTS), strict=True))
    exchange.ask("ids odd", "tokens", texts=ODD_TEXTS, pairs=pairs, **published)
    exchange.ask("ids cut", "tokens", texts=ODD_TEXTS, pairs=pairs, max_length=21, **published)
    for lowercase in (True, False):
        folder = exchange.folder / f"tokenizer {lowercase}"
        folder.mkdir()
        BertTokenizer(tokenizer.vocab, lowercase).save_pretrained(folder)
        arguments = {"tokenizer": folder, "texts": ODD_TEXTS, "pairs": pairs}
        exchange.ask(f"ids of saved, {lowercase}", "tokens", **arguments)


def ask_about_lora(exchange, folder, minilm, tensors, more):
    """Adapters of ours, read by `peft`, and adapters that `peft` makes and saves itself.

    The latter's outputs are in double precision, and those of `more` sequences.
    """
    for name, config in LORA.items():
        ours, theirs = exchange.folder / f"our adapter {name}", exchange.folder / f"adapter {name}"
        ours.mkdir()
        save_adapter(random_adapter(minilm, config), ours, config, "bundled")
        for precision in PRECISIONS:
            exchange.ask(f"our adapter {name} {precision}", "lora", tensors, model=folder,
                         folder=ours, **TRAINING[precision])  # fmt: skip
        targets = list(config.targets)  # a subset by short names, as users of peft write it
        if name == "all":
            targets = list(adapter_layers(apply_lora(copy.deepcopy(minilm), config)))
        settings = {"r": config.r, "lora_alpha": config.alpha, "target_modules": targets}
        fresh = exchange.folder / f"fresh adapter {name}"
        exchange.ask(f"fresh adapter {name}", "lora", tensors, model=folder, folder=fresh,
                     settings=settings)  # fmt: skip
        settings = settings | {"init_lora_weights": False}  # B is not 0
        exchange.ask(f"adapter {name}", "lora", more, model=folder, folder=theirs,
                     settings=settings, double=True)  # fmt: skip


def without_one_tensor(folder, file, copied):
    """A copy of a model's folder whose weights lack one tensor."""
    shutil.copytree(folder, copied)
    tensors = load_file(copied / file)
    del tensors[sorted(tensors)[-1]]
    write_tensors(copied / file, tensors)
    return copied


def ask_about_runs(exchange, folder, runs, trained, tensors):
    """What other tools make of the folders that training left."""
    full = runs["full-model"].best
    exchange.ask("full run", "exported", tensors, model=full)
    exchange.ask("LoRA run", "lora", tensors, model=folder, folder=runs["LoRA"].best)
    part = without_one_tensor(full, "model.safetensors", exchange.folder / "part of full run")
    exchange.ask("part of full run", "exported", tensors, model=part)
    part = without_one_tensor(runs["LoRA"].best, "adapter_model.safetensors",
                              exchange.folder / "part of LoRA run")  # fmt: skip
    exchange.ask("part of LoRA run", "lora", tensors, model=folder, folder=part)
    exchange.ask("vectors mean", "sentence_vectors", model=full, texts=EXPORT_TEXTS)
    model, tokenizer = trained["full-model"]
    other = exchange.folder / "run cls"
    other.mkdir()
    save_model(pooled_by(model, "cls"), tokenizer, None, None, other)
    exchange.ask("vectors cls", "sentence_vectors", model=other, texts=EXPORT_TEXTS)


@pytest.fixture(scope="module")
def answers(tmp_path_factory, bundled, minilm, wide, sequences):
    """What the reference libraries answer about encoders, tokens and LoRA, by name."""
    exchange = Exchange(tmp_path_factory.mktemp("exchange"))
    folder, batch = bundled[0].folder, padded(sequences, 384)
    exchange.ask("minilm", "encoder", batch, model=folder)
    wide.save_pretrained(exchange.folder / "wide model")
    exchange.ask("wide", "encoder", padded(sequences, 768), model=exchange.folder / "wide model")
    ask_about_tokens(exchange, bundled)
    ask_about_lora(exchange, folder, minilm, padded(sequences[-2:], 384), batch)
    yield exchange
    exchange.close()


@pytest.fixture(scope="module")
def of_runs(answers, bundled, runs, trained, sequences):
    """`answers`, and those about the folders that training left."""
    ask_about_runs(answers, bundled[0].folder, runs, trained, padded(sequences, 384))
    return answers


# --------------------------------------------------------------------------------------- encoder


def measured(model, tensors):
    """Outputs and gradients by name, as reference.py's `encoder` gives them."""
    return reference.outputs_of(model, tensors) | reference.gradients_of(model, tensors)


@pytest.mark.parametrize("name", ["minilm", "wide"])
@pytest.mark.parametrize("wrap", [lambda model: model, InRows], ids=["padded", "rows"])
def test_encoder_equals_transformers(name, wrap, answers, request, sequences):
    """Outputs and gradients, of a padded batch and of sentences that share rows."""
    model = request.getfixturevalue(name)
    tensors = padded(sequences, model.config.hidden_size)
    assert largest_difference(name, measured(wrap(model), tensors), answers[name]) <= LIMIT
    assert answers.said(name) == []


def test_attention_with_dropout_equals_transformers(answers, minilm, sequences):
    """Training on a CPU takes a path of its own; a rate that rounds to 0 leaves only the path."""
    model = copy.deepcopy(minilm).train()
    model.set_dropout(1e-9)
    ours = measured(InRows(model), padded(sequences, 384))
    assert largest_difference("written out", ours, answers["minilm"]) <= LIMIT


def test_gradient_of_key_bias_vanishes(answers, minilm, sequences):
    """It is left out of the comparison because it is zero but for rounding, in both libraries."""
    for gradients in (measured(minilm, padded(sequences, 384)), answers["minilm"]):
        query = max(t.abs().max() for n, t in gradients.items() if n.endswith("query.bias"))
        key = max(t.abs().max() for n, t in gradients.items() if n.endswith("key.bias"))
        assert key <= LIMIT * query


def changed_weight(model, tensors):
    model = copy.deepcopy(model)
    model.encoder["layer"][-1].output.dense.bias.data[7] += 1e-3
    return model, tensors


def segments_zeroed(model, tensors):
    return model, tensors | {"token_type_ids": torch.zeros_like(tensors["token_type_ids"])}


class MaskIgnored(Wrapped):
    """A model that attends to padding."""

    def forward(self, input_ids, attention_mask, token_type_ids):
        """The standard call with every token declared real."""
        return self.model(input_ids, torch.ones_like(attention_mask), token_type_ids)


def mask_ignored(model, tensors):
    return MaskIgnored(model), tensors


@pytest.mark.parametrize("fault", [changed_weight, segments_zeroed, mask_ignored])
def test_faulty_encoder_does_not_equal_transformers(fault, answers, minilm, sequences):
    ours = measured(*fault(minilm, padded(sequences, 384)))
    theirs = answers["minilm"]
    assert largest_difference(fault.__name__, named(ours, "last"), named(theirs, "last")) > CLEARLY
    gradients = named(ours, "gradient"), named(theirs, "gradient")
    assert largest_difference(fault.__name__, *gradients) > CLEARLY


# ------------------------------------------------------------------------------------- tokenizer


def differing_rows(ours, answer, kind="texts.input_ids"):
    """Numbers of the rows in which our ids (or segments) differ from an answer's."""
    lengths = answer[f"{kind.split('.')[0]}.lengths"].tolist()
    theirs = np.split(answer[kind].numpy(), np.cumsum(lengths)[:-1])
    assert len(ours) == len(theirs)
    rows = zip(ours, theirs, strict=True)
    return [number for number, (a, b) in enumerate(rows) if not np.array_equal(a, b)]


def pairs_in_ours(tokenizer, max_length=512):
    """Ids and segments of the odd texts' pairs, by `join_pair`."""
    texts = tokenizer(ODD_TEXTS, 10**6)
    joined = [join_pair(a, b, max_length) for a, b in zip(texts, reversed(texts), strict=True)]
    return {
        "pairs.input_ids": [ids for ids, _ in joined],
        "pairs.token_type_ids": [(np.arange(len(ids)) >= start) * 1 for ids, start in joined],
    }


@pytest.mark.parametrize("task", TASKS)
def test_ids_of_every_text_equal_transformers(task, answers, bundled):
    """All texts of all files of a task (the course's files, where they are at hand)."""
    ours = bundled[1](texts_of(task))
    print(f"  {task}: {len(ours):,} texts, {sum(map(len, ours)):,} tokens from {DATA.name}/")
    assert differing_rows(ours, answers[f"ids {task}"]) == []


def test_ids_of_odd_texts_equal_transformers(answers, bundled):
    """Unicode corner cases, literal markers, long words, cut short and not."""
    tokenizer = bundled[1]
    for name, length in (("ids odd", 512), ("ids cut", 21)):
        wrong = differing_rows(tokenizer(ODD_TEXTS, length), answers[name])
        assert [ODD_TEXTS[row] for row in wrong] == []


@pytest.mark.parametrize("name, length", [("ids odd", 512), ("ids cut", 21)])
def test_pairs_equal_transformers(name, length, answers, bundled):
    """Ids and segment ids of `[CLS] a [SEP] b [SEP]`, whole and with the longer text cut."""
    for kind, ours in pairs_in_ours(bundled[1], length).items():
        assert differing_rows(ours, answers[name], kind) == []


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_tokenizer_gives_the_same_ids(lowercase, answers, bundled):
    """The files that `save_pretrained` writes, in `AutoTokenizer` without any option."""
    answer = answers[f"ids of saved, {lowercase}"]
    tokenizer = BertTokenizer(bundled[1].vocab, lowercase)
    assert differing_rows(tokenizer(ODD_TEXTS), answer) == []
    for kind, ours in pairs_in_ours(tokenizer).items():
        assert differing_rows(ours, answer, kind) == []
    assert answers.said(f"ids of saved, {lowercase}") == []


def test_faulty_tokenizer_does_not_equal_transformers(answers, bundled):
    """Without lower-casing, with [SEP] as a marker, and with all of a pair in one segment."""
    tokenizer = bundled[1]
    cased = BertTokenizer(tokenizer.vocab, lowercase=False)
    assert differing_rows(cased(texts_of("sst")), answers["ids sst"])
    marked = copy.copy(tokenizer)
    marked._tokenizer = copy.deepcopy(tokenizer._tokenizer)
    marked._tokenizer.add_special_tokens(["[SEP]", "[CLS]", "[MASK]"])
    wrong = differing_rows(marked(ODD_TEXTS), answers["ids odd"])
    assert all("[" in ODD_TEXTS[row] for row in wrong) and len(wrong) >= 2
    ours = [np.zeros_like(row) for row in pairs_in_ours(tokenizer)["pairs.token_type_ids"]]
    assert differing_rows(ours, answers["ids odd"], "pairs.token_type_ids")


# ------------------------------------------------------------------------------------------ LoRA


def measured_lora(model, tensors, steps=0, lr=0.0, double=False):
    """Everything that reference.py's `lora` gives, of a model with our LoRA layers."""
    model = copy.deepcopy(model)
    if double:
        model, tensors = reference.in_double(model, tensors)
    merged = reference.outputs_of(merge_lora(copy.deepcopy(model)), tensors)
    result = measured(model, tensors) | {f"merged {name}": t for name, t in merged.items()}
    weights = reference.after_training(model, tensors, steps, lr)
    return result | {f"trained {name}": tensor for name, tensor in weights.items()}


def in_single(tensors):
    """What fp32 should give: a dict of tensors of double precision, rounded."""
    assert all(tensor.dtype == torch.float64 for tensor in tensors.values())
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", LORA)
def test_our_adapter_in_peft(name, precision, answers, minilm, sequences):
    """The adapter we save: outputs, gradients, merged outputs, weights after ten steps.

    A gradient in fp32 may be off by half of LIMIT by rounding alone, in peft too, and peft rounds
    elsewhere: so ours in fp32 is held against theirs in double precision.
    """
    model = random_adapter(minilm, LORA[name])
    ours = measured_lora(model, padded(sequences[-2:], 384), **TRAINING[precision])
    answer = answers[f"our adapter {name} {precision}"]
    gradients = named(answers[f"our adapter {name} fp64"], "gradient")
    if precision == "fp32":
        answer |= in_single(gradients)
    for part in ("last", "pooler", "gradient", "merged", "trained"):
        what = f"our adapter, {name}, {precision}, {part}"
        assert largest_difference(what, named(ours, part), named(answer, part)) <= LIMIT
    assert answers.said(f"our adapter {name} {precision}") == []


@pytest.mark.parametrize("name", LORA)
def test_adapter_of_peft_in_ours(name, answers, minilm, sequences):
    """The adapter that peft saves, with its own way to write the targets, in both precisions."""
    theirs, tensors = answers[f"adapter {name}"], padded(sequences, 384)
    model = apply_lora(copy.deepcopy(minilm), LORA[name]).eval()
    load_adapter(model, answers.folder / f"adapter {name}", LORA[name])
    ours = measured_lora(model, tensors, double=True)
    assert largest_difference(f"peft's adapter, {name}, fp64", ours, theirs) <= LIMIT
    ours = measured_lora(model, tensors)
    assert largest_difference(f"peft's adapter, {name}, fp32", ours, in_single(theirs)) <= LIMIT


@pytest.mark.parametrize("name", LORA)
def test_fresh_adapter_is_drawn_as_peft_draws_it(name, answers, minilm):
    """The same names and shapes; B all zero; A uniform with the same limits and deviation."""
    fresh = adapter_tensors(apply_lora(copy.deepcopy(minilm), LORA[name]))
    theirs = named(answers[f"fresh adapter {name}"], "trained ")
    assert {f"trained {n}": t.shape for n, t in fresh.items()} == {
        n: t.shape for n, t in theirs.items()
    }
    for matrix, ours in fresh.items():
        other = theirs[f"trained {matrix}"]
        if matrix.endswith("lora_B"):
            assert not ours.any() and not other.any()
        else:
            assert max(ours.abs().max(), other.abs().max()) <= ours.size(1) ** -0.5
            assert ours.std().item() == pytest.approx(other.std().item(), rel=0.06)


def test_merged_equals_unmerged(minilm, sequences):
    """Here, with no reference in between; a merged model holds no LoRA layer any more."""
    model, tensors = random_adapter(minilm, LORA["all"]), padded(sequences, 384)
    unmerged = reference.outputs_of(model, tensors)
    merged = merge_lora(model)
    assert not adapter_layers(merged)
    assert largest_difference("merged", reference.outputs_of(merged, tensors), unmerged) <= LIMIT


def alpha_corrupted(model):
    for layer in adapter_layers(model).values():
        layer.scaling *= 1.01


def adapter_changed(model):
    adapter_layers(model)["encoder.layer.5.output.dense"].lora_B.data[7] += 1e-3


def adapter_left_out(model):
    layer = adapter_layers(model)["encoder.layer.0.attention.self.value"]
    layer.scaling = 0.0


@pytest.mark.parametrize("fault", [alpha_corrupted, adapter_changed, adapter_left_out])
def test_faulty_lora_does_not_equal_peft(fault, answers, minilm, sequences):
    model = random_adapter(minilm, LORA["all"])
    fault(model)
    ours = measured_lora(model, padded(sequences[-2:], 384), **TRAINING["fp64"])
    for part in ("last", "gradient", "merged", "trained"):
        theirs = named(answers["our adapter all fp64"], part)
        what = f"{fault.__name__}, {part}"
        assert largest_difference(what, named(ours, part), theirs) > CLEARLY


# ---------------------------------------------------------------------------------------- SimCSE


def published_loss(anchors, positives, negatives=(), temperature=0.05):
    """Gao et al. 2021, eq. 5 (eq. 4 without `negatives`), in NumPy and double precision.

    -log( exp(sim(h_i, h_i+)/τ) / Σ_j ( exp(sim(h_i, h_j+)/τ) + exp(sim(h_i, h_j-)/τ) ) ), averaged.
    """

    def similarity(a, b):
        return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))

    losses = []
    for i, anchor in enumerate(anchors):
        terms = [math.exp(similarity(anchor, h) / temperature) for h in [*positives, *negatives]]
        losses.append(-math.log(terms[i] / sum(terms)))
    return float(np.mean(losses))


@pytest.fixture
def embeddings():
    """Vectors of both sentences of 7 pairs, and which of the pairs are duplicates."""
    generator = np.random.default_rng(2)
    first = generator.normal(size=(7, 11))
    second = 0.7 * first + generator.normal(size=(7, 11))
    return first, second, np.array([0.0, 1, 1, 0, 1, 0, 1])


def test_unsupervised_loss_is_the_published_one(embeddings):
    first, second, _ = embeddings
    ours = unsupervised_simcse_loss(torch.tensor(first), torch.tensor(second)).item()
    assert ours == pytest.approx(published_loss(first, second), rel=LIMIT)
    assert ours != pytest.approx(published_loss(second, first), rel=CLEARLY)  # not symmetric
    assert ours != pytest.approx(published_loss(first, second, temperature=0.0501), rel=CLEARLY)


def test_supervised_loss_is_the_published_one(embeddings):
    """Anchors: first sentences of duplicates; hard negatives: second sentences of the others."""
    first, second, labels = embeddings
    same = labels == 1
    ours = supervised_simcse_loss(*map(torch.tensor, (first, second, labels))).item()
    expected = published_loss(first[same], second[same], second[~same])
    assert ours == pytest.approx(expected, rel=LIMIT)
    without_negatives = published_loss(first[same], second[same])
    assert ours != pytest.approx(without_negatives, rel=CLEARLY)


def test_losses_by_hand():
    """Two orthogonal sentences, each the same in both passes: logits 20 and 0 on every row.

    The loss is log(1 + e^-20); with the second pass exchanged it is 20 more; with one duplicate
    whose pair is at 45 degrees, and the other second sentence at a right angle, log(1 + e^-14.142).
    """
    axes = torch.eye(2)
    small = math.log1p(math.exp(-20))
    assert unsupervised_simcse_loss(3 * axes, axes).item() == pytest.approx(small, abs=1e-8)
    exchanged = unsupervised_simcse_loss(axes, axes.flip(0)).item()
    assert exchanged == pytest.approx(20 + small, rel=LIMIT)
    warm = unsupervised_simcse_loss(axes, axes, temperature=1.0).item()
    assert warm == pytest.approx(math.log(1 + math.exp(-1)), rel=LIMIT)
    second = torch.tensor([[1.0, 1.0], [0.0, 1.0]])
    one = supervised_simcse_loss(axes, second, torch.tensor([1.0, 0.0]), temperature=1.0).item()
    assert one == pytest.approx(math.log(1 + math.exp(-(0.5**0.5))), rel=LIMIT)


# ---------------------------------------------------------------------------------- exported runs


def vectors(model, tokenizer, texts):
    """Sentence vectors of texts by our model, (texts, hidden)."""
    with torch.no_grad():
        ids = tokenizer(texts, model.config.max_length)
        return {"vectors": model.encode([(row, len(row)) for row in ids])}


def pooled_by(model, pooling):
    """The same model with another way of pooling."""
    model = copy.copy(model)
    model.config = replace(model.config, pooling=pooling)
    return model


def test_run_in_transformers(of_runs, trained, minilm, sequences):
    """AutoModel gives the outputs of our best model, which training has changed, without a word."""
    tensors = padded(sequences, 384)
    ours = reference.outputs_of(trained["full-model"][0].bert, tensors)
    assert largest_difference("best/", ours, of_runs["full run"]) <= LIMIT
    assert of_runs.said("full run") == []
    before = reference.outputs_of(minilm, tensors)
    assert largest_difference("before training", before, of_runs["full run"]) > CLEARLY


def test_lora_run_in_peft(of_runs, trained, minilm, sequences):
    """peft puts best/ onto the base encoder and gets our outputs, merged or not, without a word."""
    tensors, theirs = padded(sequences, 384), of_runs["LoRA run"]
    model = trained["LoRA"][0].bert
    ours = reference.outputs_of(model, tensors)
    assert largest_difference("best/", ours, named(theirs, "last", "pooler")) <= LIMIT
    merged = {f"merged {name}": t for name, t in ours.items()}
    assert largest_difference("best/ merged", merged, named(theirs, "merged")) <= LIMIT
    assert of_runs.said("LoRA run") == []
    before = reference.outputs_of(minilm, tensors)
    assert largest_difference("before training", before, named(theirs, "last", "pooler")) > CLEARLY


def test_lora_run_with_wrong_alpha_does_not_equal_peft(of_runs, trained, sequences):
    model = copy.deepcopy(trained["LoRA"][0].bert)
    alpha_corrupted(model)
    ours = reference.outputs_of(model, padded(sequences, 384))
    theirs = named(of_runs["LoRA run"], "last", "pooler")
    assert largest_difference("wrong alpha", ours, theirs) > CLEARLY


@pytest.mark.parametrize("mode", RUNS)
def test_incomplete_run_does_not_load_without_a_word(mode, of_runs):
    """The twin of the silence above: with one tensor left out, the reference says so."""
    name = {"full-model": "part of full run", "LoRA": "part of LoRA run"}[mode]
    assert any("missing" in text.lower() for text in of_runs.said(name)), of_runs.said(name)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_run_in_sentence_transformers(pooling, of_runs, trained):
    """SentenceTransformer(best/) gives the vectors that our heads see; the other pooling not."""
    model, tokenizer = trained["full-model"]
    theirs = of_runs[f"vectors {pooling}"]
    ours = vectors(pooled_by(model, pooling), tokenizer, EXPORT_TEXTS)
    assert largest_difference(f"pooling {pooling}", ours, theirs) <= LIMIT
    assert of_runs.said(f"vectors {pooling}") == []
    swapped = vectors(pooled_by(model, "cls" if pooling == "mean" else "mean"), tokenizer,
                      EXPORT_TEXTS)  # fmt: skip
    assert largest_difference("pooling swapped", swapped, theirs) > CLEARLY


# ------------------------------------------------------------------------------ bert-base-uncased

GOLDEN_IDS = [[101, 7592, 2088, 102, 0, 0, 0, 0], [101, 7592, 15756, 2897, 2005, 17953, 2361, 102]]
GOLDEN = {  # first values of each row's first token, and the row's norm
    "last_hidden_state": [
        ([-0.16888, 0.13606, -0.13940, -0.05436, -0.29527, -0.24611], 14.87603),
        ([-0.44185, -0.51507, -0.15365, 0.20939, -0.02733, -0.15256], 14.38921),
    ],
    "pooler_output": [
        ([-0.90615, -0.31115, -0.62165, 0.77409, 0.28987, -0.19024], 16.80862),
        ([-0.80426, -0.28601, -0.28289, 0.49109, 0.17010, -0.14788], 14.54416),
    ],
}


@pytest.mark.pretrained
def test_golden_numbers_of_bert_base_uncased():
    """The course's published check of its starter's BERT."""
    repo = base_bert.ALIASES[base_bert.DEFAULT_ENCODER]
    if base_bert._cached_folder(repo) is None and not base_bert._hub_reachable():
        pytest.skip("bert-base-uncased is not in the cache and the hub cannot be reached")
    model = BertModel.from_pretrained("bert-base-uncased")
    ids = torch.tensor(GOLDEN_IDS)
    with torch.no_grad():
        outputs = model(ids, (ids != 0).long())
    rows = {
        "last_hidden_state": outputs["last_hidden_state"][:, 0],
        "pooler_output": outputs["pooler_output"],
    }
    for name, expected in GOLDEN.items():
        for row, (values, norm) in zip(rows[name], expected, strict=True):
            close = torch.allclose(row[:6], torch.tensor(values), atol=1e-5, rtol=1e-3)
            assert close, (name, row[:6].tolist(), values)
            assert row.norm().item() == pytest.approx(norm, rel=1e-3)
