"""The multitask model: its losses, heads, sentence vectors and frozen encoder."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import NAMES
from test_bert import padded

import multitask_bert
from bert import FastDropout
from config import TASKS
from heads import r_drop_loss, task_loss
from tokenizer import join_pair

ALL_SIMCSE = {"simcse_tasks": ("sst", "para", "sts"), "supervised_simcse": True}
R_DROP = {"r_drop": ("sst", "para")}
EVERY_HEAD = {"both": ("para", "sts"), "heads": {"para": "features+cosine"}, "pooling": "cls"}


def single(sentences):
    """Sentences as sequences (ids, start of segment 1)."""
    return [(ids, len(ids)) for ids in sentences]


def encode(model, sequences):
    """Vectors of sequences."""
    return model.encode(model.pack(sequences))


# ------------------------------------------------------------------------------------------- losses


def gradients_of(model):
    """Gradients by name, where there is one."""
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def assert_same_task_by_task(model, batches):
    """One forward of all batches and one for each have the same losses and gradients."""
    found = []
    for parts in ([batches], [{name: batch} for name, batch in batches.items()]):
        model.zero_grad()
        losses = {}
        for part in parts:
            of_part = model(part)
            sum(of_part.values()).backward()
            losses |= of_part
        found.append((losses, gradients_of(model)))
    torch.testing.assert_close(found[1][0], found[0][0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1][1], found[0][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("joint", [(), ("para",), ("para", "sts")])
def test_one_forward_equals_task_by_task(build, batches, joint):
    """All sentences of a step are encoded together; no loss and no gradient may change by it."""
    assert_same_task_by_task(build(joint=joint, **ALL_SIMCSE).train(), batches)


def test_losses_are_those_of_the_predictions(build, batches):
    model = build().train()
    losses = model(batches)
    outputs = {name: model.predict(name, batch) for name, batch in batches.items()}
    sst, para, sts = (batch.labels for batch in batches.values())
    expected = {
        "sst": F.nll_loss(outputs["sst"].log_softmax(-1), sst.long()),
        "para": F.binary_cross_entropy(outputs["para"][:, 0].sigmoid(), para),
        "sts": (outputs["sts"][:, 0] - sts).square().mean(),
    }
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("settings", "more"),
    [
        (ALL_SIMCSE, {f"simcse_{name}" for name in (*NAMES[:3], "para_supervised")}),
        ({"simcse_tasks": ("para",), "joint": ("para", "sts")}, {"simcse_para"}),
        ({**EVERY_HEAD, **R_DROP}, {"r_drop_sst", "r_drop_para"}),
    ],
)
def test_each_loss_has_its_name_and_each_trained_parameter_a_gradient(
    build, batches, settings, more
):
    """A parameter without one is wasted memory, and several processes would wait for it forever."""
    model = build(**settings).train()
    losses = model(batches)
    assert set(losses) == {*NAMES[:3], *more}
    sum(losses.values()).backward()
    assert not [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]


@pytest.mark.parametrize(
    ("settings", "count"),
    [
        ({}, 4 + 8 + 8),
        ({"joint": ("para",)}, 4 + 4 + 8),
        ({"simcse_tasks": ("para",), "joint": ("para",)}, 4 + 4 + 8 + 8 + 8),
        ({"simcse_tasks": ("para",), "both": ("para",)}, 4 + 12 + 8 + 8),
        ({**R_DROP, "both": ("para",)}, 2 * 4 + 2 * 12 + 8),
        ({**R_DROP, "simcse_tasks": ("sst", "para")}, 2 * 4 + 2 * 8 + 8),  # one second pass
    ],
)
def test_a_step_encodes_each_sequence_once_per_pass(build, batches, settings, count):
    """Losses that need the same sequence in the same pass share its vector."""
    model = build(**settings).train()
    model(batches)
    assert model.encoded_sequences == count


# ------------------------------------------------------------------------------------------- SimCSE


@pytest.mark.parametrize("dropout", [0.3, 0.0])
def test_two_passes_differ_by_dropout_from_the_first_layer_on(build, batches, monkeypatch, dropout):
    """Two dropouts of one pooled vector would leave the first layer's states equal.

    Without dropout, the twin, nothing else tells the passes apart.
    """
    model = build(dropout=dropout, simcse_tasks=("sst",)).train()
    seen = []
    model.bert.encoder["layer"][0].register_forward_hook(lambda *call: seen.append(call[-1]))

    def keep_vectors(anchors, candidates, **_):
        seen.append(torch.cat([anchors, candidates]))
        return anchors.sum()

    monkeypatch.setattr(multitask_bert, "unsupervised_simcse_loss", keep_vectors)
    sentences = batches["sst"].first[:1]
    model({"sst": replace(batches["sst"], first=sentences, labels=torch.zeros(1))})
    for values, size in zip(seen, (len(sentences[0]), 1), strict=True):
        first, second = values[: 2 * size].chunk(2)  # the two passes, next to each other in a row
        assert torch.allclose(first, second, atol=1e-3 if dropout else 1e-5) == (not dropout)


def test_unsupervised_simcse_averages_the_two_groups_of_a_pair(build, batches):
    model, batch = build(simcse_tasks=("para",)).train(), batches["para"]
    found = model({"para": batch})["simcse_para"]
    groups = []
    for sentences in (batch.first, batch.second):
        u = model.project(encode(model, single(sentences)))
        logits = F.cosine_similarity(u[:, None], u[None], dim=-1) / 0.05
        groups.append(F.cross_entropy(logits, torch.arange(4)))
    torch.testing.assert_close(found, sum(groups) / 2, rtol=1e-3, atol=1e-4)


def test_contrastive_losses_take_single_sentences_under_joint_encoding(build, batches):
    joint, apart = (build(joint=names, **ALL_SIMCSE).train() for names in (("para", "sts"), ()))
    apart.simcse_projection.load_state_dict(joint.simcse_projection.state_dict())
    found, expected = joint(batches), apart(batches)
    for name in ("simcse_sst", "simcse_para", "simcse_sts", "simcse_para_supervised"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_supervised_simcse_of_a_batch_without_duplicates_is_exactly_zero(build, batches):
    model = build(supervised_simcse=True).train()
    batch = replace(batches["para"], labels=torch.zeros(4))
    assert model({"para": batch})["simcse_para_supervised"].item() == 0.0


# ------------------------------------------------------------------------------------------- R-Drop


def test_r_drop_is_zero_without_dropout_and_leaves_the_task_losses(build, batches):
    losses, plain = (build(**settings).train()(batches) for settings in (R_DROP, {}))
    for name in R_DROP["r_drop"]:
        assert losses.pop(f"r_drop_{name}").abs() < 1e-6
    torch.testing.assert_close(losses, plain)


def test_r_drop_compares_two_passes_through_the_whole_encoder(build, batches):
    """Dropout in the encoder alone, none in the heads, must make a difference."""
    model = build(dropout=0.3, r_drop=("sst",))
    for module in model.heads.modules():
        if isinstance(module, FastDropout):
            module.p = 0.0
    assert model.train()({"sst": batches["sst"]})["r_drop_sst"] > 1e-4


@pytest.mark.parametrize("way", [{}, {"joint": ("para",)}, {"both": ("para",)}])
def test_the_second_pass_may_swap_the_sentences_of_pairs(build, batches, way):
    """Without dropout that is the only difference: by hand from the pairs and the swapped pairs."""
    settings = {**R_DROP, "simcse_tasks": ("para",), **way}
    model, pairs = build(swap_pairs=True, **settings).train(), batches["para"]
    losses = model(batches)
    one, other = outputs = [
        model.predict("para", batch)
        for batch in (pairs, replace(pairs, first=pairs.second, second=pairs.first))
    ]
    assert not torch.allclose(one, other, atol=1e-3), "the head does not depend on the order"
    mean = sum(task_loss(TASKS["para"], x, pairs.labels) for x in outputs) / 2
    torch.testing.assert_close(losses["para"], mean)
    torch.testing.assert_close(losses["r_drop_para"], r_drop_loss(TASKS["para"], one, other))
    plain = build(**settings).train()(batches)
    for name in ("sst", "r_drop_sst", "sts", "simcse_para"):  # still each sentence with itself
        torch.testing.assert_close(losses[name], plain[name])


def test_both_encodings_are_the_sum_of_two_heads(build, batches):
    """A linear head on the joint vector, and the task's own head on the two single vectors."""
    model = build(**EVERY_HEAD)
    for name in ("para", "sts"):
        sides = batches[name].first, batches[name].second
        pair = encode(model, [join_pair(*ab, 40) for ab in zip(*sides, strict=True)])
        u, v = (encode(model, single(sentences)) for sentences in sides)
        together, apart = model.heads[name].heads
        assert not torch.allclose(together(pair), torch.zeros(1))
        torch.testing.assert_close(model.predict(name, batches[name]), together(pair) + apart(u, v))
    sum_head = model.heads["para"].heads[1]
    features, cosine = sum_head.heads
    torch.testing.assert_close(sum_head(u, v), features(u, v) + cosine(u, v))


# ------------------------------------------------------------------------------------------ vectors


def test_bf16_does_not_round_predictions(build, batches):
    """The heads compute in fp32: a rounded score or logit would tie with others."""
    model = build(heads={"sts": "linear"}).eval()
    for name, batch in batches.items():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            outputs = model.outputs(name, model.head_vectors(name, batch))
        assert outputs.dtype == torch.float32
        assert (outputs != outputs.bfloat16()).any(), name


@pytest.mark.parametrize("limit", [40, 9])
def test_joint_encoding_makes_a_pair_one_sequence_within_the_limit(build, batches, limit):
    model, batch = build(joint=("para",), max_length=limit), batches["para"]
    sides = zip(batch.first, batch.second, strict=True)
    vectors = encode(model, [join_pair(*pair, limit) for pair in sides])
    expected = model.heads["para"](vectors)  # it takes one vector
    torch.testing.assert_close(model.predict("para", batch), expected)


@pytest.mark.parametrize("joint", [(), ("para", "sts")])
def test_the_starters_methods_predict_the_same(build, batches, joint):
    model = build(joint=joint).eval()
    methods = {"sst": model.predict_sentiment, "para": model.predict_paraphrase}
    methods["sts"] = model.predict_similarity
    for name, batch in batches.items():
        sides = [batch.first, batch.second] if TASKS[name].is_pair else [batch.first]
        with torch.no_grad():
            found = methods[name](*(tensor for side in sides for tensor in padded(side, 14)))
            expected = model.predict(name, batch)
        assert found.shape == ((4, 5) if name == "sst" else (4,))
        torch.testing.assert_close(found, expected.view_as(found), rtol=1e-4, atol=1e-5)


def test_what_has_no_vector_is_an_error_in_the_starters_methods_too(build):
    """Past the table of positions a GPU would only say that an assertion failed."""
    ids, model = torch.full((1, 41), 7), build().eval()
    with pytest.raises(ValueError, match="sequence of 41 tokens; this encoder has 40 positions"):
        model.predict_sentiment(ids, torch.ones_like(ids))
    with pytest.raises(ValueError, match="expected a real token in each"):
        model.predict_sentiment(ids, torch.zeros_like(ids))


# ----------------------------------------------------------------------------------- frozen encoder


def test_a_frozen_encoder_stays_in_eval_mode_and_untrained(build, batches):
    model = build(frozen=True, dropout=0.3).train()
    assert not any(module.training for module in model.bert.modules())
    assert model.heads.training
    sum(model(batches).values()).backward()
    assert all(p.grad is None for p in model.bert.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained and all(name.startswith("heads.") for name in trained)


def test_a_frozen_encoder_encodes_each_sentence_once(build, batches):
    model, plain = build(frozen=True).eval(), build().eval()
    with torch.no_grad():
        expected, first, again = (
            {name: m.predict(name, batch) for name, batch in batches.items()}
            for m in (plain, model, model)
        )
    assert model.encoded_sequences == 4 + 8 + 8  # nothing the second time
    torch.testing.assert_close(first, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, first, rtol=0, atol=0)


def test_kept_vectors_depend_on_segments_and_repeated_sequences_count_once(build):
    model = build(frozen=True).eval()
    ids = np.array([2, 9, 3, 9, 3], dtype=np.int32)
    vectors = model.encode_once([(ids, 5), (ids, 3), (ids, 5)])
    assert model.encoded_sequences == 2
    assert torch.equal(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)


def test_kept_vectors_are_bounded(build, batches, monkeypatch):
    """Without a bound, hours of training on new sentences would fill the memory."""
    model, sequences = build(frozen=True).eval(), single(batches["sst"].first)
    monkeypatch.setattr(multitask_bert, "VECTOR_CACHE_MIB", 1)
    limit = 2**20 // (4 * 32)  # fp32 vectors of 32 numbers
    model.vector_cache = dict.fromkeys(range(limit - 1), torch.zeros(0))
    right = encode(model, sequences)
    for _ in range(2):
        torch.testing.assert_close(model.encode_once(sequences), right, rtol=1e-4, atol=1e-5)
        assert len(model.vector_cache) == limit
