"""Encoder and heads together: which losses there are, and that batching changes none of them."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import multitask_bert
from bert import BertModel, FastDropout
from config import PAIR, TASKS, MultitaskConfig, Task
from datasets import TaskBatch
from multitask_bert import (
    CosineHead,
    DotHead,
    FeaturesHead,
    MultitaskBERT,
    SentenceHead,
    consistency_loss,
    make_head,
    task_loss,
)
from tokenizer import join_pair

NAMES = ("sst", "para", "sts", "cfimdb")
LABELS = {
    "sst": [0, 4, 2, 1], "para": [1, 0, 1, 0], "sts": [0.5, 5.0, 3.25, 2.0], "cfimdb": [1, 0, 0, 1],
}  # fmt: skip


def sentence(generator, vocab_size):
    """One `[CLS] … [SEP]` of 3 to 12 tokens."""
    inner = generator.integers(5, vocab_size, generator.integers(1, 11))
    return np.array([2, *inner, 3], dtype=np.int32)


def first_layer_states(model):
    """A list to which each pass adds the states of all its tokens behind the first layer."""
    seen = []
    model.bert.encoder["layer"][0].register_forward_hook(
        lambda module, inputs, output: seen.append(output.detach())
    )
    return seen


def make_batch(name, vocab_size, seed=0):
    """Four made-up examples of a task."""
    generator = np.random.default_rng([seed, NAMES.index(name)])
    first, second = ([sentence(generator, vocab_size) for _ in range(4)] for _ in range(2))
    labels = torch.tensor(LABELS[name], dtype=torch.float32)
    return TaskBatch([f"{name}{i}" for i in range(4)], first,
                     second if TASKS[name].is_pair else None, labels)  # fmt: skip


@pytest.fixture
def batches(tiny_config):
    """A batch of each of the three tasks."""
    return {name: make_batch(name, tiny_config.vocab_size) for name in NAMES[:3]}


@pytest.fixture
def build(tiny_config):
    """Makes a model over a tiny encoder; dropout off unless `dropout` says otherwise."""

    def make(frozen=False, dropout=0.0, positions=40, **settings):
        torch.manual_seed(6)
        sizes = replace(tiny_config, initializer_range=0.2, max_position_embeddings=positions)
        bert = BertModel(sizes)
        bert.set_dropout(dropout)
        config = MultitaskConfig(**{"dropout": dropout, "max_length": 40, **settings})
        return MultitaskBERT(bert, config, frozen=frozen)

    return make


PAIR_ROLES = ("first", "second")
ALL_SIMCSE = {"simcse_tasks": ("sst", "para", "sts"), "supervised_simcse": True}

# ---------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize(
    ("simcse_tasks", "supervised", "joint"),
    list(
        itertools.product(
            [(), ("sst",), ("para", "sts"), ("sst", "para", "sts")],
            [False, True],
            [(), ("para",), ("para", "sts")],
        )
    ),
)
def test_one_named_loss_each(build, batches, simcse_tasks, supervised, joint):
    model = build(simcse_tasks=simcse_tasks, supervised_simcse=supervised, joint=joint)
    losses = model.train()(batches)
    expected = {"sst", "para", "sts", *(f"simcse_{name}" for name in simcse_tasks)}
    assert set(losses) == expected | ({"simcse_para_supervised"} if supervised else set())
    assert all(loss.ndim == 0 and loss.isfinite() for loss in losses.values())


def test_the_fourth_task_is_one_row(build, tiny_config):
    batches = {name: make_batch(name, tiny_config.vocab_size) for name in NAMES}
    losses = build(tasks=NAMES, simcse_tasks=("cfimdb",)).train()(batches)
    assert set(losses) == {*NAMES, "simcse_cfimdb"}


@pytest.mark.parametrize("joint", [(), ("para",), ("para", "sts")])
def test_one_forward_equals_task_by_task(build, batches, joint):
    """Encoding all sentences of a step together may change no loss and no gradient."""
    model = build(joint=joint, **ALL_SIMCSE).train()
    together = model(batches)
    sum(together.values()).backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    apart = {}
    for name, batch in batches.items():
        losses = model({name: batch})
        sum(losses.values()).backward()
        apart |= losses
    assert set(apart) == set(together)
    for name, loss in together.items():
        torch.testing.assert_close(apart[name], loss, rtol=1e-4, atol=1e-5, msg=name)
    for name, parameter in model.named_parameters():
        if name in gradients:
            torch.testing.assert_close(
                parameter.grad, gradients[name], rtol=1e-3, atol=1e-4, msg=name
            )


def test_losses_are_those_of_the_predictions(build, batches):
    model = build().train()
    losses = model(batches)
    for name, batch in batches.items():
        outputs = model.predict(name, batch)
        expected = {
            "sst": lambda o, y: F.nll_loss(o.log_softmax(-1), y.long()),
            "para": lambda o, y: F.binary_cross_entropy(o[:, 0].sigmoid(), y),
            "sts": lambda o, y: (o[:, 0] - y).square().mean(),
        }[name](outputs, batch.labels)
        torch.testing.assert_close(losses[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_the_loss_is_a_mean_over_the_batch_there_is(name):
    """The starter divides by --batch_size, which a last, smaller batch does not have."""
    task = TASKS[name]
    outputs, labels = torch.randn(4, task.num_classes), torch.tensor(LABELS[name])
    each = [task_loss(task, outputs[i : i + 1], labels[i : i + 1].float()) for i in range(4)]
    whole = task_loss(task, outputs, labels.float())
    torch.testing.assert_close(whole, torch.stack(each).mean())


def test_every_trained_parameter_gets_a_gradient(build, batches):
    """One without is wasted memory, and several processes would wait for it for ever."""
    for settings in ({}, ALL_SIMCSE, {"joint": ("para", "sts")}, {"pooling": "cls", **ALL_SIMCSE}):
        model = build(**settings).train()
        sum(model(batches).values()).backward()
        idle = [n for n, p in model.named_parameters() if p.requires_grad and p.grad is None]
        assert not idle, settings


# -------------------------------------------------------------------------- contrastive passes


def test_the_two_passes_have_independent_dropout_and_both_reach_the_whole_encoder(build, batches):
    """Two dropouts of one pooled vector would leave the first layer's states equal."""
    model = build(dropout=0.3, **ALL_SIMCSE).train()
    seen = first_layer_states(model)
    ids = batches["sst"].first[0]
    groups = {("sst", role): [(ids, len(ids))] for role in ("first", "first again")}
    vectors = model.encode_groups(groups)
    assert not torch.allclose(vectors["sst", "first"], vectors["sst", "first again"], atol=1e-3)
    (states,), n = seen, len(ids)  # side by side in one row
    assert not torch.allclose(states[:n], states[n : 2 * n], atol=1e-3)


def test_without_dropout_the_two_passes_are_equal(build, batches):
    """The twin of the test above: it is dropout alone that tells the passes apart."""
    model = build(**ALL_SIMCSE).train()
    vectors = model.encode_groups(model.simcse_inputs("sst", batches["sst"]))
    torch.testing.assert_close(vectors["sst", "first"], vectors["sst", "first again"])
    seen = first_layer_states(model)
    ids = batches["sst"].first[0]
    model.encode([(ids, len(ids))] * 2)
    (states,), n = seen, len(ids)
    torch.testing.assert_close(states[:n], states[n : 2 * n])


def test_unsupervised_simcse_averages_a_pairs_two_groups(build, batches):
    model = build(simcse_tasks=("para",)).train()
    found = model({"para": batches["para"]})["simcse_para"]
    groups = []
    for sentences in (batches["para"].first, batches["para"].second):
        u = model.contrast(model.encode([(ids, len(ids)) for ids in sentences]))
        logits = F.cosine_similarity(u[:, None], u[None], dim=-1) / 0.05
        groups.append(F.cross_entropy(logits, torch.arange(4)))
    torch.testing.assert_close(found, sum(groups) / 2, rtol=1e-3, atol=1e-4)


def test_contrastive_losses_are_on_single_sentences_under_joint_encoding(build, batches):
    joint = build(joint=("para", "sts"), **ALL_SIMCSE).train()
    apart = build(**ALL_SIMCSE).train()
    apart.bert.load_state_dict(joint.bert.state_dict())
    apart.simcse_projection.load_state_dict(joint.simcse_projection.state_dict())
    found, expected = joint(batches), apart(batches)
    for name in ("simcse_sst", "simcse_para", "simcse_sts", "simcse_para_supervised"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-4, atol=1e-5)


def test_a_batch_without_duplicates_adds_exactly_nothing(build, batches):
    model = build(supervised_simcse=True).train()
    none = replace(batches["para"], labels=torch.zeros(4))
    assert model({"para": none})["simcse_para_supervised"].item() == 0.0


# -------------------------------------------------------------------------------------- heads


@pytest.mark.parametrize(
    ("name", "kind", "roles", "expected"),
    [
        ("sst", "ffn", ("first",), SentenceHead),
        ("sst", "linear", ("first",), SentenceHead),
        ("para", "features", PAIR_ROLES, FeaturesHead),
        ("para", "dot", PAIR_ROLES, DotHead),
        ("para", "cosine", PAIR_ROLES, CosineHead),
        ("para", "linear", ("pair",), SentenceHead),
        ("sts", "cosine", PAIR_ROLES, CosineHead),
        ("sts", "linear", PAIR_ROLES, FeaturesHead),
        ("sts", "linear", ("pair",), SentenceHead),
    ],
)
def test_head_kinds(name, kind, roles, expected):
    head = make_head(TASKS[name], kind, roles, 16, 0.0)
    assert type(head) is expected
    assert (getattr(head, "dense", None) is not None) == (kind == "ffn")
    vectors = torch.randn(len(roles), 3, 16)
    assert head(*vectors).shape == (3, TASKS[name].num_classes)


def test_the_cosine_head_of_similarity_is_five_times_the_cosine():
    head = make_head(TASKS["sts"], "cosine", PAIR_ROLES, 2, 0.0)
    u, v = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[3.0, 4.0], [-2.0, 0.0]])
    assert head(u, v).flatten().tolist() == pytest.approx([3.0, -5.0])
    assert not list(head.parameters())


def test_the_cosine_head_of_paraphrase_learns_its_threshold():
    head = make_head(TASKS["para"], "cosine", PAIR_ROLES, 2, 0.0)
    assert len(list(head.parameters())) == 2
    same, other = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 1.0]])
    assert head(same, same) > 0 > head(same, other)


def test_features_by_hand():
    """u, v, |u - v| and the elementwise product, in this order."""
    head = FeaturesHead(2, 1, 0.0)
    with torch.no_grad():
        head.projection.weight.copy_(torch.tensor([[1.0, 10, 2, 20, 3, 30, 4, 40]]))
        head.projection.bias.zero_()
        found = head(torch.tensor([[1.0, 2.0]]), torch.tensor([[3.0, 5.0]])).item()
    assert found == 1 + 20 + 6 + 100 + 6 + 90 + 12 + 400


def test_a_pair_task_of_three_classes_is_a_row():
    """Such as entailment: the pair heads have as many outputs as the task has classes."""
    task = Task("nli", "entailment", "nli-{split}.csv", PAIR, "label", "classes", 3, "Predicted",
                ("features",), high=2)  # fmt: skip
    vectors = torch.randn(3, 4, 8)
    for roles in (("pair",), ("first", "second"), ("pair", "first", "second")):
        head = make_head(task, "features", roles, 8, 0.0)
        assert head(*vectors[: len(roles)]).shape == (4, 3)


def test_the_dot_head_is_symmetric():
    head = DotHead(8, 0.0)
    u, v = torch.randn(2, 3, 8)
    torch.testing.assert_close(head(u, v), head(v, u))
    p, q = head.projection(u), head.projection(v)
    torch.testing.assert_close(head(u, v)[:, 0], (p * q).sum(-1) / 8**0.5 + head.bias)


def test_joint_encoding_sees_the_pair_as_one_sequence(build, batches):
    model = build(joint=("para",))
    sequences = model.task_inputs("para", batches["para"])["para", "pair"]
    ids, start = sequences[0]
    first, second = batches["para"].first[0], batches["para"].second[0]
    assert ids.tolist() == [*first, *second[1:]]
    assert start == len(first)
    assert isinstance(model.heads["para"], SentenceHead)


def test_joint_pairs_stay_within_the_limit(build, batches):
    model = build(joint=("sts",), max_length=9)
    for ids, start in model.task_inputs("sts", batches["sts"])["sts", "pair"]:
        assert len(ids) <= 9
        assert ids[start - 1] == 3 == ids[-1]


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_pooling_is_over_the_real_tokens(build, batches, pooling):
    model = build(pooling=pooling).eval()
    sequences = [(ids, len(ids)) for ids in batches["sst"].first]
    with torch.no_grad():
        together = model.encode(sequences)
        for row, (ids, _) in enumerate(sequences):
            state = model.bert(torch.tensor(ids[None].astype(np.int64)), torch.ones(1, len(ids)))
            state = state["last_hidden_state"][0]
            expected = state.mean(0) if pooling == "mean" else state[0]
            torch.testing.assert_close(together[row], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_encoding_equals_pooling_the_standard_calls_padded_batch(build, pooling):
    """Vectors and gradients, with segments, and sentences of which some need wider rows."""
    model = build(pooling=pooling, positions=300).train()
    generator = np.random.default_rng(4)
    vocab_size = model.bert.config.vocab_size
    sequences = [
        (generator.integers(5, vocab_size, n).astype(np.int32), int(generator.integers(1, n + 1)))
        for n in (12, 70, 3, 130, 31, 64, 8, 65, 20)
    ]
    weights = torch.randn(len(sequences), 32)

    def by_the_standard_call():
        width = max(len(ids) for ids, _ in sequences)
        ids, mask, segments = torch.zeros(3, len(sequences), width, dtype=torch.int64)
        for row, (sequence, start) in enumerate(sequences):
            ids[row, : len(sequence)] = torch.from_numpy(sequence)
            mask[row, : len(sequence)] = 1
            segments[row, start : len(sequence)] = 1
        states = model.bert(ids, mask, segments)["last_hidden_state"]
        if pooling == "cls":
            return states[:, 0]
        return (states * mask[:, :, None]).sum(1) / mask.sum(1, keepdim=True)

    found = []
    for vectors in (model.encode(sequences), by_the_standard_call()):
        model.zero_grad()
        (vectors * weights).mean().backward()
        gradients = {n: p.grad for n, p in model.bert.named_parameters() if p.grad is not None}
        found.append((vectors, gradients))
    (vectors, gradients), (right, right_gradients) = found
    assert vectors.dtype == torch.float32
    torch.testing.assert_close(vectors, right, rtol=0, atol=1e-5)
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in right_gradients.items():
        assert name.endswith("key.bias") or gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


# ------------------------------------------------------------------------ the starter's methods


def padded(sentences):
    """Padded ids and mask of int32 arrays."""
    width = max(map(len, sentences)) + 2
    ids = torch.tensor([[*s, *[0] * (width - len(s))] for s in sentences])
    lengths = torch.tensor([len(s) for s in sentences])
    return ids, (torch.arange(width) < lengths[:, None]).long()


@pytest.mark.parametrize("joint", [(), ("para", "sts")])
def test_the_starters_methods_predict_the_same(build, batches, joint):
    model = build(joint=joint).eval()
    with torch.no_grad():
        expected = {name: model.predict(name, batch) for name, batch in batches.items()}
        found = {
            "sst": model.predict_sentiment(*padded(batches["sst"].first)),
            "para": model.predict_paraphrase(
                *padded(batches["para"].first), *padded(batches["para"].second)
            ),
            "sts": model.predict_similarity(
                *padded(batches["sts"].first), *padded(batches["sts"].second)
            ),
        }
    assert {name: tuple(x.shape) for name, x in found.items()} == {
        "sst": (4, 5), "para": (4,), "sts": (4,),
    }  # fmt: skip
    for name, outputs in found.items():
        right = expected[name] if name == "sst" else expected[name].squeeze(-1)
        torch.testing.assert_close(outputs, right, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------------------- a frozen encoder


def test_a_frozen_encoder_stays_in_eval_mode_and_untrained(build, batches):
    model = build(frozen=True, dropout=0.3).train()
    assert not any(module.training for module in model.bert.modules())
    assert model.heads.training
    sum(model(batches).values()).backward()
    assert all(p.grad is None for p in model.bert.parameters())
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained
    assert all(name.startswith("heads.") for name in trained)


def test_a_frozen_encoder_encodes_each_sentence_once(build, batches):
    model = build(frozen=True).eval()
    plain = build().eval()
    with torch.no_grad():
        expected = {name: plain.predict(name, batch) for name, batch in batches.items()}
        first = {name: model.predict(name, batch) for name, batch in batches.items()}
        encoded = model.encoded_sequences
        again = {name: model.predict(name, batch) for name, batch in batches.items()}
    assert encoded == 4 + 8 + 8
    assert model.encoded_sequences == encoded  # nothing the second time
    for name in batches:
        torch.testing.assert_close(first[name], expected[name], rtol=1e-4, atol=1e-5)
        assert torch.equal(again[name], first[name])


def test_kept_vectors_are_told_apart_by_segments_and_repeats_within_a_batch_count_once(build):
    model = build(frozen=True).eval()
    ids = np.array([2, 9, 3, 9, 3], dtype=np.int32)
    vectors = model.encode_once([(ids, 5), (ids, 3), (ids, 5)])
    assert model.encoded_sequences == 2
    assert torch.equal(vectors[0], vectors[2])
    assert not torch.allclose(vectors[0], vectors[1], atol=1e-3)


def test_kept_vectors_are_bounded(build, batches, monkeypatch):
    """Without a bound, hours of training on new sentences would fill the memory."""
    model = build(frozen=True).eval()
    sequences = [(ids, len(ids)) for ids in batches["sst"].first]
    monkeypatch.setattr(multitask_bert, "VECTOR_CACHE_MIB", 1)
    limit = 2**20 // (4 * 32)  # fp32 vectors of 32 numbers
    model.vectors = dict.fromkeys(range(limit - 1), torch.zeros(0))
    right = model.encode(sequences)
    for _ in range(2):
        torch.testing.assert_close(model.encode_once(sequences), right, rtol=1e-4, atol=1e-5)
        assert len(model.vectors) == limit
    monkeypatch.setattr(multitask_bert, "VECTOR_CACHE_MIB", 0)
    model.vectors.clear()
    torch.testing.assert_close(model.encode_once(sequences), right, rtol=1e-4, atol=1e-5)
    assert not model.vectors


# -------------------------------------------------------------------- pairs encoded both ways


def test_both_encodings_are_the_sum_of_the_two_heads(build, batches):
    """The joint vector's linear head and the sentences' own head, each on its own vectors."""
    model = build(both=("para", "sts"), heads={"para": "features+cosine"})
    for name in ("para", "sts"):
        batch = batches[name]
        joined = [join_pair(*ab, 40) for ab in zip(batch.first, batch.second, strict=True)]
        pair = model.encode(joined)
        u, v = (model.encode([(ids, len(ids)) for ids in s]) for s in (batch.first, batch.second))
        together, apart = model.heads[name].heads
        expected = together(pair) + apart(u, v)
        assert expected.shape == (len(batch.first), 1)
        torch.testing.assert_close(model.predict(name, batch), expected)
        assert not torch.allclose(together(pair), torch.zeros(1))
    features, cosine = model.heads["para"].heads[1].heads
    u, v = torch.randn(2, 3, model.bert.config.hidden_size)
    torch.testing.assert_close(model.heads["para"].heads[1](u, v), features(u, v) + cosine(u, v))


def test_both_encodings_train_every_part_of_their_heads(build, batches):
    model = build(both=("para",), heads={"para": "features+cosine"}).train()
    model(batches)["para"].backward()
    gradients = {n: p.grad for n, p in model.heads["para"].named_parameters()}
    assert len(gradients) == 6
    assert all(g is not None and g.abs().sum() > 0 for g in gradients.values())


def test_sentences_of_both_encodings_serve_the_contrastive_loss_too(build, batches):
    """They are encoded once for both: no more sequences than with separate encoding and pairs."""
    counts = {}
    for how in ({}, {"both": ("para",)}):
        model = build(simcse_tasks=("para",), **how).train()
        model({"para": batches["para"]})
        counts[bool(how)] = model.encoded_sequences
    assert counts[True] == counts[False] + len(batches["para"].first)


def test_more_tokens_than_positions_are_an_error_in_the_starters_methods_too(build):
    """Past the table of positions a GPU would only say that an assertion failed."""
    ids = torch.full((1, 41), 7)
    with pytest.raises(ValueError, match="sequence of 41 tokens; this encoder has 40 positions"):
        build().eval().predict_sentiment(ids, torch.ones_like(ids))


# ------------------------------------------------------------------------------------- R-Drop


def test_consistency_loss_by_hand():
    """Half of KL(p, q) + KL(q, p), mean over the batch; a binary logit is one of two answers."""
    p, q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8]]), torch.tensor([[0.2, 0.2, 0.6]] * 2)
    kl = [(a * (a / b).log()).sum(-1).mean() for a, b in ((p, q), (q, p))]
    found = consistency_loss(TASKS["sst"], p.log(), q.log() + 3)  # a shift of logits is nothing
    torch.testing.assert_close(found, sum(kl) / 2)
    logits = torch.tensor([[2.0], [-1.0]])
    sure = torch.cat([1 - logits.sigmoid(), logits.sigmoid()], dim=-1)
    even = torch.full((2, 2), 0.5)
    expected = sum((a * (a / b).log()).sum(-1).mean() for a, b in ((sure, even), (even, sure))) / 2
    torch.testing.assert_close(consistency_loss(TASKS["para"], logits, torch.zeros(2, 1)), expected)


def test_r_drop_is_zero_without_dropout_and_leaves_the_task_losses(build, batches):
    losses = build(r_drop=("sst", "para")).train()(batches)
    plain = build().train()(batches)
    assert set(losses) == set(plain) | {"r_drop_sst", "r_drop_para"}
    for name in plain:
        torch.testing.assert_close(losses[name], plain[name])
    assert losses["r_drop_sst"].abs() < 1e-6 and losses["r_drop_para"].abs() < 1e-6


def test_r_drop_compares_two_passes_through_the_whole_encoder(build, batches):
    """Dropout in the encoder alone, none in the heads, has to be enough to make a difference."""
    model = build(dropout=0.3, r_drop=("sst",))
    for module in model.heads.modules():
        if isinstance(module, FastDropout):
            module.p = 0.0
    losses = model.train()({"sst": batches["sst"]})
    assert losses["r_drop_sst"] > 1e-4
    losses["r_drop_sst"].backward()
    assert model.bert.encoder["layer"][0].output.dense.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("how", [{}, {"joint": ("para",)}, {"both": ("para",)}])
def test_r_drop_encodes_twice_what_its_tasks_heads_need(build, batches, how):
    counts = []
    for r_drop in ((), ("sst", "para")):
        model = build(r_drop=r_drop, **how).train()
        model(batches)
        counts.append(model.encoded_sequences)
    of_task = {n: len(b.first) * len(model.config.roles(n)) for n, b in batches.items()}
    assert counts == [
        sum(of_task.values()),
        sum(of_task.values()) + of_task["sst"] + of_task["para"],
    ]


@pytest.mark.parametrize("how", [{}, {"joint": ("para",)}, {"both": ("para",)}])
def test_swapped_pairs_are_those_of_the_second_pass(build, batches, how):
    """Without dropout it is all that differs: by hand from the pairs and the pairs turned round."""
    model = build(r_drop=("sst", "para"), swap_pairs=True, simcse_tasks=("para",), **how).train()
    losses = model(batches)
    pairs = batches["para"]
    turned = replace(pairs, first=pairs.second, second=pairs.first)
    one, other = (
        model.outputs("para", model.encode_groups(model.task_inputs("para", batch)))
        for batch in (pairs, turned)
    )
    assert not torch.allclose(one, other, atol=1e-3), "a head to which the order is all one"
    mean = sum(task_loss(TASKS["para"], outputs, pairs.labels) for outputs in (one, other)) / 2
    torch.testing.assert_close(losses["para"], mean)
    expected = consistency_loss(TASKS["para"], one, other)
    torch.testing.assert_close(losses["r_drop_para"], expected)
    plain = build(r_drop=("sst", "para"), simcse_tasks=("para",), **how).train()(batches)
    for name in ("sst", "r_drop_sst", "sts", "simcse_para"):  # a sentence is its own positive still
        torch.testing.assert_close(losses[name], plain[name])


def test_r_drop_and_simcse_share_their_second_pass(build, batches):
    counts = []
    for r_drop in ((), ("sst",)):
        model = build(simcse_tasks=("sst",), r_drop=r_drop).train()
        model({"sst": batches["sst"]})
        counts.append(model.encoded_sequences)
    assert counts[0] == counts[1] == 2 * len(batches["sst"].first)
