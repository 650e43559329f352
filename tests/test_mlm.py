"""Masked language modelling: which tokens are masked, the loss, the head's weights from a file.

That loss and gradients are those of `transformers` is in test_parity.py, whole runs are in
test_training.py.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from base_bert import load_mlm_head
from config import UserError
from datasets import TaskBatch
from mlm import MaskedLMHead, mask_tokens

WIDTH, SEED = 40, (7, 3)


def sentences_of(tokenizer, lengths):
    """Random sentences `[CLS] … [SEP]` with so many tokens in between, no marker among them."""
    random = np.random.default_rng(1)
    markers = (tokenizer.cls_id, tokenizer.sep_id)
    parts = [random.integers(5, len(tokenizer), length) for length in lengths]
    return [np.array([markers[0], *part, markers[1]], dtype=np.int32) for part in parts]


# ------------------------------------------------------------------------------- what is masked


def test_15_percent_are_masked_and_at_least_one_of_a_sentence(tokenizer):
    """Worked out by hand; round(2.5) is 2. What was there is returned, the rest stays."""
    expected = {0: 0, 1: 1, 2: 1, 7: 1, 10: 2, 17: 3, 20: 3, 38: 6}
    sentences = sentences_of(tokenizer, expected)
    before = [ids.copy() for ids in sentences]
    masked, owners, positions, ids = mask_tokens(sentences, tokenizer, WIDTH, SEED)
    assert np.bincount(owners, minlength=len(expected)).tolist() == list(expected.values())
    assert ids.dtype == np.int64 and {part.dtype.str[1:] for part in masked} == {"i4"}
    for number, (old, new) in enumerate(zip(before, masked, strict=True)):
        places = positions[owners == number]
        assert len(set(places)) == len(places)
        assert all(0 < place < len(old) - 1 for place in places), "a marker is masked"
        assert np.array_equal(old, sentences[number])
        assert np.array_equal(old[places], ids[owners == number])
        rest = np.delete(np.arange(len(old)), places)
        assert np.array_equal(old[rest], new[rest])


def test_80_percent_become_mask_10_another_and_10_stay(tokenizer):
    """Over 60,000 masked tokens at every place alike; a binomial's deviation is 0.0016."""
    sentences = sentences_of(tokenizer, [20] * 20_000)
    masked, owners, positions, ids = mask_tokens(sentences, tokenizer, WIDTH, SEED)
    new = np.array([masked[owner][place] for owner, place in zip(owners, positions, strict=True)])
    is_mask, stays = new == tokenizer.mask_id, new == ids
    by_chance = 1 / len(tokenizer)  # a random token may be the same, or [MASK]
    assert is_mask.mean() == pytest.approx(0.8 + 0.1 * by_chance, abs=0.007)
    assert stays.mean() == pytest.approx(0.1 + 0.1 * by_chance, abs=0.005)
    others = new[~is_mask & ~stays]
    assert set(others) == set(range(len(tokenizer))) - {tokenizer.mask_id}
    counts = np.bincount(positions, minlength=22)[1:21]
    assert counts == pytest.approx(3000, abs=250)


def test_what_is_masked_depends_on_seed_and_row_alone(tokenizer):
    """A process's share is that of one process; another step hides other tokens."""
    sentences = sentences_of(tokenizer, [9, 30, 4, 12])
    whole = mask_tokens(sentences, tokenizer, WIDTH, SEED)
    share = mask_tokens(sentences[2:], tokenizer, WIDTH, SEED, first_row=2)
    other = mask_tokens(sentences, tokenizer, WIDTH, (7, 4))
    second = whole[1] >= 2
    for one, part in zip(whole[0][2:], share[0], strict=True):
        assert np.array_equal(one, part)
    for one, part, shift in zip(whole[1:], share[1:], (2, 0, 0), strict=True):
        assert np.array_equal(one[second] - shift, part)
    assert not np.array_equal(whole[2], other[2])


# -------------------------------------------------------------------------------------- the loss


def test_the_loss_is_the_mean_over_the_masked_tokens_of_both_sentences(build, batches):
    """Each sentence encoded by itself, with the standard call."""
    model, batch = build(mlm=("para",)), batches["para"]
    found = model(model.prepare({"para": batch}, SEED))["mlm_para"]
    rows = [ids for pair in zip(batch.first, batch.second, strict=True) for ids in pair]
    masked, owners, positions, ids = mask_tokens(rows, model.tokenizer, 40, (*SEED, 1))
    losses = []
    for number, sentence in enumerate(masked):
        inputs = torch.from_numpy(sentence).long()[None]
        states = model.bert(inputs, torch.ones_like(inputs))["last_hidden_state"][0]
        logits = model.mlm(states, model.bert.embeddings.word_embeddings.weight)
        for place, wanted in zip(positions[owners == number], ids[owners == number], strict=True):
            losses.append(-logits[place].log_softmax(-1)[wanted])
    assert len(losses) >= 8
    torch.testing.assert_close(found, torch.stack(losses).mean(), rtol=1e-4, atol=1e-5)


def test_the_other_losses_stay_as_they_are(build, batches):
    """The masked sentences are encoded beside the others, not in place of them."""
    settings = {"simcse_tasks": ("sst",), "r_drop": ("para",)}
    plain, more = build(**settings), build(**settings, mlm=("sst", "sts"))
    more.load_state_dict(plain.state_dict(), strict=False)
    expected, found = plain(batches), more(batches)
    assert set(found) - set(expected) == {"mlm_sst", "mlm_sts"}
    for name, loss in expected.items():
        torch.testing.assert_close(found[name], loss, rtol=1e-4, atol=1e-5)
    assert more.encoded_sequences == plain.encoded_sequences + 4 + 8


@pytest.mark.parametrize("tasks", [("sst", "para", "sts"), ("para",), ()])
def test_every_trained_parameter_gets_a_gradient_and_a_task_without_head_no_loss(
    build, batches, tasks
):
    model = build(tasks=tasks, mlm=("sst", "para", "sts"), simcse_tasks=("sts",))
    losses = model(batches)
    assert set(losses) == {*tasks, "simcse_sts", "mlm_sst", "mlm_para", "mlm_sts"}
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


def test_a_batch_of_empty_texts_has_a_loss_of_zero(build, tokenizer):
    model = build(tasks=(), mlm=("sst",))
    empty = [np.array([tokenizer.cls_id, tokenizer.sep_id], dtype=np.int32)] * 3
    loss = model({"sst": TaskBatch(["a", "b", "c"], empty, None, torch.zeros(3))})["mlm_sst"]
    loss.backward()
    assert loss.item() == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


# -------------------------------------------------------------------------- a published file's head


PUBLISHED = {  # names of bert-base-uncased's file, old and new, -> names here
    "cls.predictions.transform.dense.weight": "dense.weight",
    "cls.predictions.transform.dense.bias": "dense.bias",
    "cls.predictions.transform.LayerNorm.gamma": "LayerNorm.weight",
    "module.cls.predictions.transform.LayerNorm.beta": "LayerNorm.bias",
    "cls.predictions.bias": "bias",
}
OTHERS = ("cls.predictions.decoder.weight", "cls.seq_relationship.bias", "bert.pooler.dense.bias")


def test_a_published_files_head_is_read_whole_or_starts_anew(tiny_config, tmp_path, capsys):
    head, path = MaskedLMHead(tiny_config), tmp_path / "model.safetensors"
    expected = {name: torch.randn(tensor.shape) for name, tensor in head.state_dict().items()}
    published = {name: expected[here] for name, here in PUBLISHED.items()}
    others = {name: torch.ones(2) for name in OTHERS}
    before = copy.deepcopy(head.state_dict())
    save_file(others, path)
    load_mlm_head(head, path)
    assert f"{path}: head of masked language modelling: not in this" in capsys.readouterr().out
    torch.testing.assert_close(head.state_dict(), before, rtol=0, atol=0)
    save_file(others | published, path)
    load_mlm_head(head, path)
    assert f"{path}: head of masked language modelling: read" in capsys.readouterr().out
    torch.testing.assert_close(dict(head.state_dict()), expected, rtol=0, atol=0)
    del published["cls.predictions.transform.dense.bias"]
    save_file(others | published, path)
    with pytest.raises(UserError, match=r"missing dense\.bias"):
        load_mlm_head(head, path)


def test_a_new_head_is_drawn_as_bert_draws_it(tiny_config):
    head = MaskedLMHead(replace(tiny_config, hidden_size=128))
    assert head.dense.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not head.dense.bias.any() and not head.bias.any()
