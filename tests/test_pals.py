"""Projected attention layers: whose rows they see, what they train, and that they start as nothing.

Their numbers, beside those of `transformers`, are in tests/test_parity.py.
"""

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from conftest import NAMES
from test_multitask_bert import ALL_SIMCSE, assert_same_task_by_task, gradients_of

from bert import BertModel, Rows, join_packed, pack
from config import BertConfig, MultitaskConfig, PALConfig
from multitask_bert import MultitaskBERT
from pals import PAL, apply_pals, train_layer_norms_only

CONFIG = PALConfig(heads=3)  # of 6 dimensions, for a hidden size of 32
R_DROP = {"r_drop": ("sst", "para"), "both": ("para",)}


@pytest.fixture
def plain(tiny_config):
    """A model of three tasks without PALs or dropout, in eval mode."""
    bert = BertModel(replace(tiny_config, initializer_range=0.2))
    bert.set_dropout(0.0)
    return MultitaskBERT(bert, MultitaskConfig(dropout=0.0, max_length=40)).eval()


def with_pals(plain, are_trained=True, **settings):
    """A copy of `plain` with PALs, as after training or at the start, and another configuration."""
    config = replace(plain.config, **settings)
    model = MultitaskBERT(copy.deepcopy(plain.bert), config)
    model.load_state_dict(plain.state_dict(), strict=False)
    model.pals = apply_pals(model.bert, CONFIG, config.tasks)
    if are_trained:
        for parameter in model.pals.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


# ------------------------------------------------------------------------------------- the numbers


def test_a_pal_by_hand():
    """Queries of zero attend evenly: g is the mean of the values of the token's own sentence."""
    sizes = {"hidden_size": 2, "num_attention_heads": 1, "num_hidden_layers": 2}
    bert = BertModel(BertConfig(vocab_size=5, intermediate_size=3, **sizes)).eval()
    pal = PAL(bert, PALConfig(size=2, heads=1)).eval()
    with torch.no_grad():
        pal.V_E.weight.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0]]))
        pal.V_E.bias.copy_(torch.tensor([0.5, 0.0]))
        pal.attention[1].query.weight.zero_()
        pal.attention[1].value.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 3.0]]))
        pal.V_D.weight.copy_(torch.tensor([[2.0, 0.0], [0.0, -1.0]]))
        pal.V_D.bias.copy_(torch.tensor([-2.0, 0.5]))
        h = torch.tensor([[1.0, 0.0], [0.0, 2.0], [5.0, 7.0]])  # the last is another sentence
        mask = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]]).bool()
        rows = Rows(torch.zeros(1, 3), None, None, torch.where(mask, 0.0, -1e9)[None, None])
        found = pal(h, [rows], 1)
    # V^E h = (0.5, 1) and (2.5, 0); values (0.5, 3) and (2.5, 0); their mean (1.5, 1.5)
    # V^D of it = (1, -1); GELU(1) = 0.841345, GELU(-1) = -0.158655
    expected = torch.tensor([0.841345, -0.158655])
    torch.testing.assert_close(found[:2], expected.expand(2, 2), rtol=0, atol=1e-6)
    # the other: V^E h = (7.5, 5), value (7.5, 15), V^D of it = (13, -14.5)
    torch.testing.assert_close(found[2], torch.tensor([13.0, 0.0]), rtol=0, atol=1e-6)


def test_the_default_size_is_the_papers_in_proportion_and_a_multiple_of_the_heads():
    with torch.device("meta"):
        pal = PAL(BertModel(BertConfig()), PALConfig())
    # 2 s d + s + d, and in each layer 3 (s² + s); the paper counts 1.81 million at s = 204
    assert sum(p.numel() for p in pal.parameters()) == 1_819_836
    sizes = {(12, 768): 204, (12, 384): 96, (6, 768): 204, (5, 384): 100, (12, 32): 12}
    assert all(PALConfig(heads=heads).size_for(d) == size for (heads, d), size in sizes.items())


# ------------------------------------------------------------------------------ a whole model


def test_at_the_start_the_model_is_the_plain_one_bitwise(plain, batches):
    model = with_pals(plain, are_trained=False)
    for name, batch in batches.items():
        assert torch.equal(model.predict(name, batch), plain.predict(name, batch))
    for name, parameter in model.pals.named_parameters():
        if name.endswith("bias") or "V_D" in name:
            assert not parameter.any()
        else:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.4), name
    assert model.bert.state_dict().keys() == plain.bert.state_dict().keys()
    trained = with_pals(plain)  # the twin
    for name, batch in batches.items():
        apart = trained.predict(name, batch) - plain.predict(name, batch)
        assert apart.abs().max() > 1e-2


def test_joined_groups_keep_every_sentence_where_it_was():
    """Long ones in wider rows too. Every token of sentence i has the id i + 1; padding has 0."""
    lengths = {"a": [3, 70, 5], "b": [130], "c": [64, 2]}
    numbers = iter(range(1, 7))
    sentences = {g: [np.full(n, next(numbers)) for n in of] for g, of in lengths.items()}
    joined = join_packed({g: pack(s, lengths[g], 0, "cpu") for g, s in sentences.items()})
    ids = torch.cat([rows.input_ids.flatten() for rows in joined.rows])
    groups = [rows.group for rows in joined.rows for _ in range(rows.input_ids.numel())]
    every = [(group, length) for group, of_group in lengths.items() for length in of_group]
    assert (joined.lengths.tolist(), joined.tokens) == ([length for _, length in every], 274)
    for number, (group, length) in enumerate(every):
        places = range(joined.starts[number], joined.starts[number] + length)
        assert (ids == number + 1).nonzero().flatten().tolist() == list(places)
        assert {groups[place] for place in places} == {group}
    assert torch.equal(joined.owners, (ids - 1) % 7)  # of padding the number of sentences, 6


@pytest.mark.parametrize("settings", [{}, ALL_SIMCSE, R_DROP])
def test_one_forward_equals_task_by_task(plain, batches, settings):
    """All tasks' sentences go through the shared layers together: nothing may change by it."""
    assert_same_task_by_task(with_pals(plain, **settings).train(), batches)


@pytest.mark.parametrize("name", NAMES[:3])
def test_a_tasks_pal_has_to_do_with_its_own_losses_alone(plain, batches, name):
    """Its contrastive losses and second passes count as its own."""
    model = with_pals(plain, **ALL_SIMCSE).train()
    before = model(batches)
    model({name: batches[name]})[f"simcse_{name}"].backward()
    found = {n.split(".")[1] for n in gradients_of(model) if n.startswith("pals.")}
    assert found == {name}
    with torch.no_grad():
        model.pals[name].V_D.bias += torch.randn(32)
    for loss, value in model(batches).items():
        assert (value - before[loss]).abs().item() > 1e-4 or name not in loss, loss
        assert torch.equal(value, before[loss]) or name in loss, loss


@pytest.mark.parametrize("is_frozen", [False, True])
def test_what_is_trained_gets_a_gradient(plain, batches, is_frozen):
    model = with_pals(plain, **ALL_SIMCSE).train()
    if is_frozen:
        train_layer_norms_only(model.bert)
    sum(model(batches).values()).backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == set(gradients_of(model))
    of_encoder = {name for name in trained if name.startswith("bert.")}
    norms = {n for n, _ in model.named_parameters() if "LayerNorm" in n}
    assert (of_encoder == norms) == is_frozen and len(norms) == 2 * (1 + 2 * 2)
    own = {name.split(".")[1] for name in trained if name.startswith("pals.")}
    assert own == set(NAMES[:3])


def test_attention_dropout_is_the_encoders(tiny_config):
    bert = BertModel(tiny_config)
    bert.set_dropout(0.3)
    modules = PAL(bert, CONFIG).modules()
    assert {module.p for module in modules if isinstance(module, torch.nn.Dropout)} == {0.3}
