"""The same numbers as `transformers`, `peft` and `sentence-transformers`.

They work in a process of reference.py (see there). What is reached is printed:
python -m pytest -s tests/test_parity.py. Every comparison has a twin that must fail: the same
function, applied to something that is wrong in a small way.
"""

import copy
import functools
import itertools
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import reference
import torch
from conftest import REAL_DATA, SAMPLE, pipeline_of, train_in
from safetensors.torch import load_file, save_file

from base_bert import load_encoder, load_mlm_head, load_strictly
from bert import ROW_TOKENS, BertModel, pack
from config import LORA_TARGETS, TASKS, BertConfig, LoRAConfig, MultitaskConfig, PALConfig
from datasets import TaskBatch, read_task_file
from lora import (
    DoRALinear,
    adapter_layers,
    adapter_tensors,
    apply_lora,
    merge_lora,
    read_adapter_tensors,
    save_adapter,
)
from mlm import MaskedLMHead
from multitask_bert import MultitaskBERT
from pals import apply_pals
from runtime import hub
from tokenizer import BertTokenizer, join_pair
from training.run_folder import RunFolder
from training.saved_models import export_run, load_run, save_model
from training.setup import make_optimizer

LIMIT = 1e-5  # largest difference, relative to the tensor's largest value
CLEARLY = 10 * LIMIT  # what a twin must exceed

# ------------------------------------------------------------------------------------- comparing


def largest_difference(ours, theirs, *beginnings):
    """Largest difference among tensors by name, relative to their largest value; prints it.

    Their names must be the same. `beginnings`: only of tensors whose names begin so. The gradient
    of key.bias is zero but for rounding, and therefore relative to that of query.bias.
    """
    ours, theirs = (
        {name: tensor for name, tensor in tensors.items() if name.startswith(beginnings or "")}
        for tensors in (ours, theirs)
    )
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:6]
    found = {}
    for name, right in theirs.items():
        assert (ours[name].shape, ours[name].dtype) == (right.shape, right.dtype)
        assert ours[name].isfinite().all() and right.isfinite().all()
        apart = (ours[name] - right).abs().max().item()
        scale = theirs[name.replace("key.bias", "query.bias")].abs().max().item()
        found[name] = apart / scale if scale else float(apart > 0)
    worst = max(found, key=found.get)
    print(f"  {len(found)} tensors, largest difference {found[worst]:.1e} ({worst})")
    return found[worst]


# ---------------------------------------------------------------------------------------- inputs

DATA = REAL_DATA if (REAL_DATA / "ids-sst-train.csv").is_file() else SAMPLE
# fmt: off
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
]
# fmt: on
ODD_PAIRS = list(zip(ODD_TEXTS, reversed(ODD_TEXTS), strict=True))


def sentences_of(task, split):
    """Examples' sentences of one file, a list of tuples."""
    path = DATA / TASKS[task].file_name(split)
    return [example.sentences for example in read_task_file(path, TASKS[task], split).examples]


@pytest.fixture(scope="module")
def tokenizer(bundled_folder):
    """The bundled encoder's tokenizer."""
    return load_encoder("bundled")[1]


@pytest.fixture(scope="module")
def minilm(bundled_folder):
    """The bundled encoder, dropout off."""
    return BertModel.from_pretrained(bundled_folder)


def random_encoder(folder, **sizes):
    """An encoder with random weights, biases and LayerNorm away from 0 and 1 too."""
    torch.manual_seed(1)
    model = BertModel(BertConfig(**sizes))
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            torch.nn.init.normal_(parameter, float(name.endswith("LayerNorm.weight")), 0.1)
    model.save_pretrained(folder)
    return BertModel.from_pretrained(folder)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random encoder of the size of BERT-base."""
    yield random_encoder(folder := tmp_path_factory.mktemp("wide"))
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A random encoder of 6 layers, 48 wide."""
    sizes = {"num_hidden_layers": 6, "hidden_size": 48, "intermediate_size": 80}
    folder = tmp_path_factory.mktemp("small")
    return random_encoder(folder, num_attention_heads=4, initializer_range=0.1, **sizes)


@pytest.fixture(scope="module")
def sequences(tokenizer):
    """Real sentences and pairs of unlike length: a list of (ids, where segment 1 begins).

    One is longer than the rows that the others share, ROW_TOKENS.
    """
    single = [text for (text,) in sentences_of("sst", "dev")[:3]]
    (review,) = sentences_of("cfimdb", "dev")[0]
    pairs = sentences_of("sts", "dev")[:2] + sentences_of("para", "dev")[:1]
    texts = [*tokenizer(single, max_length=40), *tokenizer([review], max_length=ROW_TOKENS + 6)]
    return [(ids, len(ids)) for ids in texts] + [join_pair(*tokenizer(p), 40) for p in pairs]


def padded(sequences, hidden_size):
    """A padded batch of `sequences`, and the random weights of each output in the loss."""
    longest = max(len(ids) for ids, _ in sequences)
    ids, mask, segments = torch.zeros(3, len(sequences), longest, dtype=torch.int64)
    for row, (sequence, start) in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
        mask[row, : len(sequence)] = 1
        segments[row, start : len(sequence)] = 1
    generator = torch.Generator().manual_seed(3)
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "token_type_ids": segments,
        "hidden_weights": torch.randn(int(mask.sum()), hidden_size, generator=generator),
        "pooled_weights": torch.randn(len(sequences), hidden_size, generator=generator),
    }


@pytest.fixture(scope="module")
def batch(sequences):
    """All of them in one batch, for the bundled encoder."""
    return padded(sequences, 384)


@pytest.fixture(scope="module")
def pairs(sequences):
    """Two pairs in one batch, for the encoder `small`."""
    return padded(sequences[-2:], 48)


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """A function: give reference.py a job, of a kind and with arguments that it explains.

    The answer is a future, so that the job is done while the test computes ours. Its result has the
    `tensors`, and what the libraries `said`.
    """
    folder = tmp_path_factory.mktemp("exchange")
    process = subprocess.Popen(
        [sys.executable, "-P", Path(reference.__file__), folder],
        cwd=folder,
        env=os.environ | {"HF_HUB_OFFLINE": "1"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )

    def work(name, tensors, job):
        save_file(tensors, folder / f"{name}.in.safetensors")
        print(json.dumps({"name": name, **job}, default=str), file=process.stdin, flush=True)
        reply = json.loads(process.stdout.readline())
        assert reply["failure"] is None, reply["failure"]
        tensors = load_file(folder / f"{name}.out.safetensors")
        return SimpleNamespace(tensors=tensors, said=reply["said"])

    names = map(str, itertools.count())
    with ThreadPoolExecutor(max_workers=1) as jobs:
        yield lambda kind, tensors=None, **arguments: jobs.submit(
            work, next(names), tensors or {}, {"kind": kind, **arguments}
        )
    process.communicate()
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def answer_for(ask, sequences):
    """A function: outputs and gradients of an encoder in `transformers`, asked for once."""

    def ask_for(model):
        tensors = padded(sequences, model.config.hidden_size)
        return ask("encoder", tensors, model=model.origin.folder)

    return functools.cache(ask_for)


# --------------------------------------------------------------------------------------- encoder


class InRows(torch.nn.Module):
    """The standard call, computed as training computes: several sentences in one row."""

    def __init__(self, model):
        super().__init__()
        self.model, self.named_parameters = model, model.named_parameters

    def forward(self, input_ids, attention_mask, token_type_ids):
        """Hidden states put back in their padded places; zeros at padding."""
        mask = attention_mask.bool()
        ids = [row[keep].int().numpy() for row, keep in zip(input_ids, mask, strict=True)]
        packed = pack(ids, (mask & (token_type_ids == 0)).sum(1).tolist(), 0, "cpu")
        assert len(packed.rows) > 1, "no sentence is so long that it needs wider rows"
        shared = sum(len(rows.input_ids) for rows in packed.rows)
        assert shared < len(ids), "one sentence a row would be the padded batch again"
        found = self.model.encode(packed.rows)
        states = found.new_zeros(*mask.shape, found.size(1))
        places = zip(packed.starts.tolist(), packed.lengths.tolist(), strict=True)
        states[mask] = torch.cat([found[first : first + n] for first, n in places])
        return {
            "last_hidden_state": states,
            "pooler_output": torch.tanh(self.model.pooler["dense"](states[:, 0])),
        }


@pytest.mark.parametrize("way", ["padded", "rows", "rows, dropout"])
@pytest.mark.parametrize("name", ["minilm", "small", pytest.param("wide", marks=pytest.mark.slow)])
def test_encoder_equals_transformers(name, way, answer_for, request, sequences):
    """Outputs and gradients, of a padded batch and of sentences that share rows.

    With dropout, attention on a CPU takes a path of its own; a rate that rounds to 0 leaves that.
    """
    encoder = request.getfixturevalue(name)
    answer, model = answer_for(encoder), copy.deepcopy(encoder).train("dropout" in way)
    model.set_dropout(1e-9)
    tensors = padded(sequences, model.config.hidden_size)
    ours = reference.measure(model if way == "padded" else InRows(model), tensors)
    assert largest_difference(ours, answer.result().tensors) <= LIMIT
    assert answer.result().said == []


@pytest.mark.parametrize("fault", ["a weight", "segments", "mask"])
def test_faulty_encoder_does_not_equal_transformers(fault, answer_for, minilm, batch):
    """One bias is changed, or segments or padding are ignored."""
    model, tensors = copy.deepcopy(minilm), dict(batch)
    if fault == "a weight":
        model.encoder["layer"][-1].output.dense.bias.data[7] += 1e-3
    elif fault == "segments":
        tensors["token_type_ids"] = torch.zeros_like(tensors["token_type_ids"])
    else:
        call = model.forward
        model.forward = lambda attention_mask, **inputs: call(
            attention_mask=torch.ones_like(attention_mask), **inputs
        )
    ours = reference.measure(model, tensors)
    for part in ("last", "gradient"):
        assert largest_difference(ours, answer_for(minilm).result().tensors, part) > CLEARLY


# --------------------------------------------------------------------- masked language modelling


def masked_lm(small, tokenizer, folder):
    """A model for masked language modelling alone, of a new folder's file with a random head.

    The file has the names of bert-base-uncased's, old ones for LayerNorm.
    """
    torch.manual_seed(4)
    head = MaskedLMHead(small.config)
    small.save_pretrained(folder, tokenizer)
    tensors = load_file(folder / "model.safetensors")
    tensors = {f"bert.{n}": t for n, t in tensors.items() if not n.startswith("pooler")}
    for name, tensor in head.state_dict().items():
        part = "" if name == "bias" else "transform."
        name = name.replace("LayerNorm.weight", "LayerNorm.gamma")
        name = name.replace("LayerNorm.bias", "LayerNorm.beta")
        tensors[f"cls.predictions.{part}{name}"] = tensor + 0.1 * torch.randn(tensor.shape)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = MultitaskConfig(tasks=(), mlm=("sst", "sts"))
    model = MultitaskBERT(BertModel.from_pretrained(folder), config, tokenizer)
    load_mlm_head(model.mlm, folder / "model.safetensors")
    return model.eval()


def batches_to_mask(tokenizer):
    """Batches of real sentences, one longer than the rows that the others share, as `Prepared`."""
    (review,) = sentences_of("cfimdb", "dev")[0]
    single = [text for (text,) in sentences_of("sst", "dev")[:5]]
    ids = [*tokenizer(single, max_length=40), *tokenizer([review], max_length=ROW_TOKENS + 6)]
    pairs = [tokenizer(pair, 40) for pair in sentences_of("sts", "dev")[:4]]
    first, second = zip(*pairs, strict=True)
    sst = TaskBatch(["a"] * 6, ids, None, torch.zeros(6))
    return {"sst": sst, "sts": TaskBatch(["b"] * 4, list(first), list(second), torch.zeros(4))}


def padded_and_masked(model, batches):
    """The masked sentences of a step as `transformers` takes them: padded, with labels."""
    rows, labels = [], []
    for name, batch in batches.items():
        masked, (owners, positions, ids) = model.mask(name, batch, (0,))
        for number, (sentence, _) in enumerate(masked["first"]):
            rows.append((sentence, len(sentence)))
            labels.append(torch.full((len(sentence),), -100))
            labels[-1][positions[owners == number]] = torch.from_numpy(ids[owners == number])
    inputs = {n: t for n, t in padded(rows, 48).items() if not n.endswith("weights")}
    pad = torch.nn.utils.rnn.pad_sequence
    return inputs | {"labels": pad(labels, batch_first=True, padding_value=-100)}


def loss_and_gradients(model, batches):
    """The mean over the masked tokens of all tasks, and its gradient for each parameter."""
    model.zero_grad()
    prepared = model.prepare(batches)
    counts = {f"mlm_{name}": len(ids) for name, (_, ids) in prepared.targets.items()}
    losses = model(prepared)
    assert losses.keys() == counts.keys()
    loss = sum(counts[name] * of_task for name, of_task in losses.items()) / sum(counts.values())
    loss.backward()
    found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach()} | {f"gradient of {name}": t for name, t in found.items()}


def test_masked_language_modelling_equals_transformers(ask, small, tokenizer, tmp_path):
    """Loss and gradients, those of the word embeddings from both of their uses."""
    model, batches = masked_lm(small, tokenizer, tmp_path), batches_to_mask(tokenizer)
    tensors = padded_and_masked(model, batches)
    assert (tensors["labels"] != -100).sum() > 30
    answer = ask("masked_lm", tensors, model=tmp_path)
    ours, theirs = loss_and_gradients(model, batches), answer.result().tensors
    assert largest_difference(ours, theirs) <= LIMIT
    assert answer.result().said == []
    masked = tensors["labels"].max()  # of the vocabulary's biases one that counts
    for name, place, by in (("LayerNorm.weight", 7, 1e-2), ("bias", masked, 1.0)):
        wrong = copy.deepcopy(model)  # a twin: a head that is a little different
        wrong.mlm.get_parameter(name).data[place] += by
        assert largest_difference(loss_and_gradients(wrong, batches), theirs) > CLEARLY


# ------------------------------------------------------------------------------------- tokenizer


def differing_rows(ours, answer, kind="texts.input_ids"):
    """Numbers of the rows in which our ids (or segments) differ from an answer's."""
    lengths = answer.result().tensors[f"{kind.split('.')[0]}.lengths"].tolist()
    theirs = np.split(answer.result().tensors[kind].numpy(), np.cumsum(lengths)[:-1])
    rows = zip(ours, theirs, strict=True)
    return [number for number, (a, b) in enumerate(rows) if not np.array_equal(a, b)]


def differing_pairs(tokenizer, answer, max_length=512):
    """Numbers of the odd pairs in which ids or segments by `join_pair` differ from an answer's."""
    joined = [join_pair(*tokenizer(pair, 10**6), max_length) for pair in ODD_PAIRS]
    segments = [(np.arange(len(ids)) >= start) * 1 for ids, start in joined]
    return {
        *differing_rows([ids for ids, _ in joined], answer, "pairs.input_ids"),
        *differing_rows(segments, answer, "pairs.token_type_ids"),
    }


@pytest.fixture(scope="module")
def published(ask, bundled_folder):
    """A function: ids by the published tokenizer, with literal markers as text."""
    options = {"split_special_tokens": True}
    return lambda **texts: ask("tokens", tokenizer=bundled_folder, options=options, **texts)


@pytest.mark.parametrize("task", TASKS)
def test_ids_of_every_text_equal_transformers(task, published, tokenizer):
    """All texts of all files of a task (the course's files, where they are at hand)."""
    rows = [row for split in ("train", "dev", "test") for row in sentences_of(task, split)]
    texts = [text for row in rows for text in row]
    answer = published(texts=texts)
    ours = tokenizer(texts)
    print(f"  {task}: {len(ours):,} texts, {sum(map(len, ours)):,} tokens from {DATA.name}/")
    assert differing_rows(ours, answer) == []


@pytest.mark.parametrize("max_length", [512, 21])
def test_ids_of_odd_texts_and_pairs_equal_transformers(max_length, published, tokenizer):
    """Unicode corner cases, literal markers, long words, cut short and not; pairs too."""
    answer = published(texts=ODD_TEXTS, pairs=ODD_PAIRS, max_length=max_length)
    wrong = differing_rows(tokenizer(ODD_TEXTS, max_length), answer)
    assert [ODD_TEXTS[row] for row in wrong] == []
    assert not differing_pairs(tokenizer, answer, max_length)


@pytest.mark.parametrize("lowercase", [True, False])
def test_saved_tokenizer_gives_the_same_ids(lowercase, ask, tokenizer, tmp_path):
    """The files that `save_pretrained` writes, in `AutoTokenizer` without any option."""
    saved = BertTokenizer(pipeline_of(tokenizer.vocab, lowercase))
    saved.save_pretrained(tmp_path)
    answer = ask("tokens", tokenizer=tmp_path, texts=ODD_TEXTS, pairs=ODD_PAIRS)
    assert differing_rows(saved(ODD_TEXTS), answer) == []
    assert not differing_pairs(saved, answer)
    assert answer.result().said == []


ENTRY = {"content": "covid19", "lstrip": False, "rstrip": False, "normalized": True}
ENTRY |= {"single_word": False}
COVID = {"id": 30522, "special": False, **ENTRY}
ENTITY = COVID | {"id": 30523, "content": "<ENT>", "special": True, "normalized": False}
AMPERSAND = {"type": "Replace", "pattern": {"String": "&"}, "content": "and"}
LOWERCASE = {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True}
LOWERCASE |= {"strip_accents": None, "lowercase": True}
CHANGED = {"type": "Sequence", "normalizers": [AMPERSAND, LOWERCASE]}
# tokenizer_config.json, what is changed in tokenizer.json (None: there is only vocab.txt), and
# added_tokens.json.
FOLDERS = {
    "vocabulary alone": (None, None, {}),
    "cased by tokenizer.json": (None, {"normalizer": LOWERCASE | {"lowercase": False}}, {}),
    "added": ({}, {"added_tokens": [COVID, ENTITY]}, {}),
    "added, old files": (
        {"additional_special_tokens": ["<ENT>", "<X>"]},
        None,
        {"covid19": 30523, "<ENT>": 30522},
    ),
    "added, in the settings": ({"added_tokens_decoder": {"30522": ENTRY}}, None, {}),
    "added, in the vocabulary": ({}, {}, {"good": 2204}),
    "normaliser": ({"tokenizer_class": "TokenizersBackend"}, {"normalizer": CHANGED}, {}),
    "no normaliser": ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"normalizer": None}, {}),
    "normaliser, ignored": ({"tokenizer_class": "BertTokenizer"}, {"normalizer": CHANGED}, {}),
}
WITH_SEGMENTS = {"return_token_type_ids": True}
MARKED_TEXTS = ["covid19 is bad", "Covid19 & <ENT> <ent> <X>", "xcovid19y good", "Ün 中国"]
MARKED_TEXTS += ["covid19 " * 600]


@pytest.mark.parametrize("folder", FOLDERS)
def test_row_50_ids_of_a_changed_tokenizer_equal_transformers(folder, ask, tokenizer, tmp_path):
    """As it is read, and as it is saved again."""
    settings, changes, added = FOLDERS[folder]
    tokenizer.save_pretrained(tmp_path)
    complete = json.loads((tmp_path / "tokenizer.json").read_text())
    for name in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"):
        (tmp_path / name).unlink()
    contents = {"config.json": BertConfig().to_dict(), "tokenizer_config.json": settings}
    contents["tokenizer.json"] = None if changes is None else complete | changes
    contents["added_tokens.json"] = added or None
    for name, content in contents.items():
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content))
    ours = BertTokenizer.from_pretrained(tmp_path)
    (tmp_path / "saved").mkdir()
    ours.save_pretrained(tmp_path / "saved")
    for read in (tmp_path, tmp_path / "saved"):
        answer = ask("tokens", tokenizer=read, texts=MARKED_TEXTS, options=WITH_SEGMENTS)
        assert differing_rows(ours(MARKED_TEXTS), answer) == []
    assert BertTokenizer.from_pretrained(tmp_path / "saved").describe() == ours.describe()


def test_faulty_tokenizer_does_not_equal_transformers(published, tokenizer):
    """Without lower-casing, with [SEP] as a marker, and with all of a pair in one segment."""
    answer = published(texts=ODD_TEXTS, pairs=ODD_PAIRS, max_length=512)
    cased = BertTokenizer(pipeline_of(tokenizer.vocab, lowercase=False))
    assert differing_rows(cased(ODD_TEXTS), answer)
    marked = BertTokenizer(pipeline_of(tokenizer.vocab))
    marked._pipeline.add_special_tokens(["[SEP]", "[CLS]", "[MASK]"])
    wrong = differing_rows(marked(ODD_TEXTS), answer)
    assert all("[" in ODD_TEXTS[row] for row in wrong) and len(wrong) >= 2
    lengths = answer.result().tensors["pairs.lengths"].tolist()
    one_segment = [np.zeros(length, dtype=np.int64) for length in lengths]
    assert differing_rows(one_segment, answer, "pairs.token_type_ids")


# ------------------------------------------------------------------------------------------ LoRA

LORA = {
    "all": LoRAConfig(r=4, alpha=6.0),
    "some": LoRAConfig(r=5, alpha=16.0, targets=("query", "value")),
    "rslora": LoRAConfig(r=5, alpha=2.0, variant="rslora", layers=(1, 2, 3, 4, 5)),
    "dora": LoRAConfig(r=4, alpha=6.0, variant="dora"),
    "some dora": LoRAConfig(3, 8.0, 0.0, ("query", "intermediate"), "dora", layers=(0, 4)),
}
TRAINING = {"steps": 10, "lr": 1e-3, "double": True}
RATIOS = {"some": 4.0, "dora": 4.0}  # of LoRA+; 1 in the other cases


def random_adapter(model, config):
    """A copy of `model` with LoRA layers whose B is not 0, and magnitudes as after training."""
    torch.manual_seed(5)
    model = apply_lora(copy.deepcopy(model), config)
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B, std=0.02)
        if config.variant == "dora":
            layer.lora_magnitude_vector.data *= 1 + 0.1 * torch.randn(layer.out_features)
    return model.eval()


def optimizer_of(lr, ratio):
    """A function: the training script's optimiser of an encoder, without weight decay."""
    flags = SimpleNamespace(layer_decay=1.0, weight_decay=0.0, LoRA_lr_ratio=ratio)
    plan = SimpleNamespace(flags=flags, encoder_lr=lr, head_lr=lr)
    return lambda bert: make_optimizer(MultitaskBERT(bert, MultitaskConfig()), plan)


def measure_lora(model, tensors, steps=0, lr=0.0, ratio=1.0, double=False):
    """Everything that reference.py's `lora` gives, of a model with our LoRA layers."""
    model = copy.deepcopy(model)
    if double:
        model, tensors = reference.in_double(model, tensors)
    merged = reference.outputs_of(merge_lora(copy.deepcopy(model)), tensors)
    result = reference.measure(model, tensors) | {f"merged {n}": t for n, t in merged.items()}
    return result | reference.train(model, tensors, steps, optimizer_of(lr, ratio))


def in_single(tensors):
    """Tensors of double precision, rounded: what fp32 should give."""
    return {name: tensor.float() for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def peft(ask, small):
    """A function: `ask` for an adapter on the encoder `small`."""
    return partial(ask, "lora", model=small.origin.folder)


@pytest.fixture(scope="module")
def adapters(peft, small, pairs, tmp_path_factory):
    """What `peft` gives for our `random_adapter`, by name."""
    found = {}
    for name, config in LORA.items():
        folder, ratio = tmp_path_factory.mktemp(name), RATIOS.get(name, 1.0)
        save_adapter(random_adapter(small, config), folder, config, "bundled")
        found[name] = peft(pairs, folder=folder, ratio=ratio, **TRAINING)
    return found


@pytest.mark.parametrize("name", LORA)
def test_our_adapter_in_peft(name, adapters, small, pairs):
    """The adapter we save: outputs, gradients, merged outputs, weights after ten steps.

    peft computes in double precision, and so do we; ours in fp32 comes as near, without training:
    AdamW divides a gradient by its own size, and with it the rounding of one that is almost 0.
    """
    model = random_adapter(small, LORA[name])
    theirs = adapters[name].result().tensors
    ours = measure_lora(model, pairs, ratio=RATIOS.get(name, 1.0), **TRAINING)
    in_fp32 = measure_lora(model, pairs)
    for part in ("last", "pooler", "gradient", "merged", "trained"):
        assert largest_difference(ours, theirs, part) <= LIMIT
        if part != "trained":
            assert largest_difference(in_fp32, in_single(theirs), part) <= LIMIT
    assert adapters[name].result().said == []


def settings_of(name, model):
    """The settings with which peft makes an adapter as `LORA[name]`."""
    config = LORA[name]
    targets = [LORA_TARGETS[t] for t in config.targets]  # short names, as users of peft write them
    if name == "all":
        targets = list(adapter_layers(apply_lora(copy.deepcopy(model), config)))
    settings = {"r": config.r, "lora_alpha": config.alpha, "target_modules": targets}
    kinds = {"use_rslora": config.variant == "rslora", "use_dora": config.variant == "dora"}
    return settings | kinds | {"layers_to_transform": config.layers}


@pytest.mark.parametrize("name", LORA)
def test_adapter_of_peft_in_ours(name, peft, small, pairs, tmp_path):
    """The matrices that peft saves, in both precisions."""
    settings = settings_of(name, small) | {"init_lora_weights": False}  # B is not 0
    theirs = peft(pairs, folder=tmp_path, settings=settings, double=True).result().tensors
    model, path = apply_lora(copy.deepcopy(small), LORA[name]).eval(), "adapter_model.safetensors"
    load_strictly(adapter_tensors(model), read_adapter_tensors(tmp_path / path), path)
    assert largest_difference(measure_lora(model, pairs, double=True), theirs) <= LIMIT
    assert largest_difference(measure_lora(model, pairs), in_single(theirs)) <= LIMIT


def test_fresh_adapter_is_drawn_as_peft_draws_it(peft, small, pairs, tmp_path):
    """The same names and shapes; B zero, magnitudes equal; A of the same limits and deviation."""
    fresh = adapter_tensors(apply_lora(copy.deepcopy(small), LORA["dora"]))
    answer = peft(pairs, folder=tmp_path, settings=settings_of("dora", small)).result().tensors
    theirs = {n.removeprefix("trained "): t for n, t in answer.items() if n.startswith("trained")}
    assert {n: t.shape for n, t in fresh.items()} == {n: t.shape for n, t in theirs.items()}
    drawn = []
    for tensors in (fresh, theirs):
        of_A = (t for name, t in tensors.items() if name.endswith("lora_A"))
        drawn.append(torch.cat([t.flatten() * t.size(1) ** 0.5 for t in of_A]))
        assert drawn[-1].abs().max() <= 1
        assert not any(t.any() for name, t in tensors.items() if name.endswith("lora_B"))
    assert drawn[0].std().item() == pytest.approx(drawn[1].std().item(), rel=0.03)
    for name in fresh:
        if name.endswith("lora_magnitude_vector"):
            torch.testing.assert_close(fresh[name], theirs[name], rtol=1e-6, atol=0)


def corrupt_alpha(model, factor=1.01, of=""):
    for name, layer in adapter_layers(model).items():
        layer.scaling *= factor if of in name else 1


def change_adapter(model):
    adapter_layers(model)["encoder.layer.5.output.dense"].lora_B.data[7] += 1e-3


def keep_norms_of_the_start(model):
    for layer in adapter_layers(model).values():
        norms = torch.linalg.vector_norm(layer.weight, dim=1)
        layer.row_norms = lambda _, norms=norms: norms


@pytest.mark.parametrize(
    ("name", "fault"),
    [
        ("all", corrupt_alpha),
        ("all", change_adapter),
        ("all", partial(corrupt_alpha, factor=0, of="layer.0.attention.self.value")),  # left out
        ("dora", corrupt_alpha),
        ("dora", keep_norms_of_the_start),
        ("rslora", partial(corrupt_alpha, factor=5**-0.5)),  # as plain LoRA: r is 5
    ],
)
def test_faulty_lora_does_not_equal_peft(name, fault, adapters, small, pairs):
    model = random_adapter(small, LORA[name])
    fault(model)
    ratio, theirs = RATIOS.get(name, 1.0), adapters[name].result().tensors
    ours = measure_lora(model, pairs, ratio=ratio, **TRAINING)
    for part in ("last", "gradient", "merged", "trained"):
        assert largest_difference(ours, theirs, part) > CLEARLY


def differentiable_norms(layer, weight):
    """DoRA's as they would be if they were not constants in the backward pass."""
    updated = weight + layer.scaling * layer.lora_B @ layer.lora_A
    return torch.linalg.vector_norm(updated, dim=1)


@pytest.mark.parametrize(("name", "ratio"), [("some", 1.0), ("dora", 4.0)])
def test_faulty_training_does_not_equal_peft(name, ratio, adapters, small, pairs, monkeypatch):
    """One rate for A and B; or gradients through the norms, with the same outputs."""
    model, theirs = random_adapter(small, LORA[name]), adapters[name].result().tensors
    monkeypatch.setattr(DoRALinear, "row_norms", differentiable_norms)
    ours = measure_lora(model, pairs, ratio=ratio, **TRAINING)
    assert largest_difference(ours, theirs, "last", "pooler") <= LIMIT
    assert largest_difference(ours, theirs, "trained") > CLEARLY


# ----------------------------------------------------------------------- projected attention layers


def random_pals(model):
    """A copy of `model` with PALs of two tasks, none of whose weights is 0, and the PALs."""
    torch.manual_seed(8)
    model = copy.deepcopy(model)
    pals = apply_pals(model, PALConfig(), ("a", "b"))
    for parameter in pals.parameters():
        torch.nn.init.normal_(parameter, std=0.4)
    return model, pals.eval()


def measure_pals(model, pals, task, tensors):
    """Outputs and gradients of sentences that are a task's, in rows as in training."""
    model, pals, encode = model.double(), pals.double(), model.encode
    model.encode = lambda rows: encode([r._replace(group=task) for r in rows])
    in_rows, own = InRows(model), pals[task].named_parameters(prefix="pals")
    named = [*model.named_parameters(), *own]
    in_rows.named_parameters = lambda **_: iter(named)
    return in_single(reference.measure(*reference.in_double(in_rows, tensors)))


@pytest.fixture(scope="module")
def authors(ask, small, sequences):
    """The answer for task b."""
    _, pals = random_pals(small)
    weights = {f"pals.{name}": tensor for name, tensor in pals["b"].state_dict().items()}
    return ask("pals", padded(sequences, 48) | weights, model=small.origin.folder, heads=12)


@pytest.mark.parametrize("fault", [None, "GELU", "another task's", "layers in another order"])
def test_pals_equal_the_authors_over_transformers(fault, authors, small, sequences, monkeypatch):
    """Outputs and gradients; the reference knows nothing of rows. Each fault shows."""
    model, pals = random_pals(small)
    if fault == "layers in another order":
        pals["b"].attention = pals["b"].attention[::-1]
    if fault == "GELU":
        monkeypatch.setattr("pals.F.gelu", partial(torch.nn.functional.gelu, approximate="tanh"))
    task = "a" if fault == "another task's" else "b"
    found, theirs = measure_pals(model, pals, task, padded(sequences, 48)), authors.result().tensors
    for part in ("last", "gradient"):
        apart = largest_difference(found, in_single(theirs), part)
        assert apart > CLEARLY if fault else apart <= LIMIT
    assert authors.result().said == []


# ---------------------------------------------------------------------------------- exported runs

RUNS = {
    "full-model": "--fine-tune-mode full-model",
    "LoRA": "--fine-tune-mode LoRA --LoRA_r 4 --LoRA_alpha 6",
    "LoRA-dora": "--fine-tune-mode LoRA --LoRA_r 4 --LoRA_variant dora --LoRA_lr_ratio 8 "
    "--LoRA_layers 1-5 --model_file_suffix dora",
}
FLAGS = "--pretrained bundled --tasks sst --epochs 1 --steps_per_epoch 2 --lr 5e-3 "
FLAGS += "--calibration_examples 0 --precision fp32"
WEIGHTS = dict.fromkeys(RUNS, "adapter_model.safetensors") | {"full-model": "model.safetensors"}
EXPORT_TEXTS = [*ODD_TEXTS[3:10], "a [SEP] b", "A film to fall in love with .", "word " * 90]


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bundled_folder, cut_sample):
    """Best models after two steps of the training script: name -> folder, model."""
    folder = tmp_path_factory.mktemp("runs")
    train_in(folder, *(f"{FLAGS} --data_dir {cut_sample} {flags}" for flags in RUNS.values()))
    found = [RunFolder(folder / "runs" / name) for name in RUNS]
    yield {run.path.name: (run.best, load_run(run, torch.device("cpu"))[0]) for run in found}
    shutil.rmtree(folder)


@pytest.fixture(scope="module")
def export(ask, minilm, batch):
    """A function: what `transformers` or `peft` makes of the folder of a best model."""
    adapter = partial(ask, "lora", batch, model=minilm.origin.folder)
    jobs = dict.fromkeys(RUNS, lambda folder: adapter(folder=folder))
    jobs["full-model"] = lambda folder: ask("encoder", batch, model=folder)
    return lambda name, folder: jobs[name](folder)


@pytest.mark.parametrize("mode", RUNS)
def test_run_in_transformers_and_peft(mode, export, runs, minilm, batch):
    """They get the outputs of our best model, which training has changed, without a warning."""
    folder, model = runs[mode]
    answer, outputs = export(mode, folder), ("last", "pooler")
    ours, untrained = (reference.outputs_of(bert, batch) for bert in (model.bert, minilm))
    theirs = answer.result().tensors
    assert largest_difference(ours, theirs, *outputs) <= LIMIT
    assert largest_difference(untrained, theirs, *outputs) > CLEARLY
    assert answer.result().said == []
    if mode != "full-model":
        merged = {f"merged {name}": tensor for name, tensor in ours.items()}
        assert largest_difference(merged, theirs, "merged") <= LIMIT
        corrupt_alpha(wrong := copy.deepcopy(model.bert))
        assert largest_difference(reference.outputs_of(wrong, batch), theirs, *outputs) > CLEARLY


@pytest.mark.parametrize("mode", RUNS)
def test_incomplete_run_does_not_load_without_a_warning(mode, export, runs, tmp_path):
    """The twin of the silence above: with one tensor left out, the reference says so."""
    shutil.copytree(runs[mode][0], tmp_path / "part")
    tensors = load_file(tmp_path / "part" / WEIGHTS[mode])
    del tensors[max(tensors)]
    save_file(tensors, tmp_path / "part" / WEIGHTS[mode], {"format": "pt"})
    said = export(mode, tmp_path / "part").result().said
    assert any("missing" in text.lower() for text in said), said


def vectors(model):
    """Sentence vectors of `EXPORT_TEXTS` by our model."""
    with torch.no_grad():
        ids = model.tokenizer(EXPORT_TEXTS, model.config.max_length)
        return {"vectors": model.encode(model.pack([(row, len(row)) for row in ids]))}


@pytest.mark.parametrize(("pooling", "other"), [("mean", "cls"), ("cls", "mean")])
def test_run_in_sentence_transformers(pooling, other, ask, runs, tmp_path):
    """SentenceTransformer(best/) gives the vectors that our heads see; the other pooling not."""
    model = copy.copy(runs["full-model"][1])
    model.config = replace(model.config, pooling=pooling)
    save_model(model, None, tmp_path)
    theirs = ask("sentence_vectors", model=tmp_path, texts=EXPORT_TEXTS)
    assert largest_difference(vectors(model), theirs.result().tensors) <= LIMIT
    assert theirs.result().said == []
    model.config = replace(model.config, pooling=other)
    assert largest_difference(vectors(model), theirs.result().tensors) > CLEARLY


@pytest.mark.parametrize("name", ["LoRA", "LoRA-dora"])
def test_exported_lora_run_in_sentence_transformers(name, ask, runs, tmp_path):
    """One plain encoder, its adapter merged, pooled as the run's heads pool."""
    best, model = runs[name]
    export_run(RunFolder(best.parent), tmp_path / "merged")
    theirs = ask("sentence_vectors", model=tmp_path / "merged", texts=EXPORT_TEXTS)
    assert largest_difference(vectors(model), theirs.result().tensors) <= LIMIT
    assert theirs.result().said == []
    corrupt_alpha(wrong := copy.deepcopy(model))
    assert largest_difference(vectors(wrong), theirs.result().tensors) > CLEARLY


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
    if hub._cached_folder(hub.DEFAULT_ENCODER) is None and not hub._hub_reachable():
        pytest.skip("bert-base-uncased is not in the cache and the hub cannot be reached")
    model = BertModel.from_pretrained(hub.resolve_encoder("bert-base-uncased"))
    ids = torch.tensor(GOLDEN_IDS)
    with torch.no_grad():
        outputs = model(ids, (ids != 0).long())
    outputs["last_hidden_state"] = outputs["last_hidden_state"][:, 0]
    for name, expected in GOLDEN.items():
        for row, (values, norm) in zip(outputs[name], expected, strict=True):
            assert row[:6].tolist() == pytest.approx(values, abs=1e-5, rel=1e-3)
            assert row.norm().item() == pytest.approx(norm, rel=1e-3)
