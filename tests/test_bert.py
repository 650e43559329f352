"""The encoder by itself: padding, rectangles, dropout, attention, gradients."""

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bert import (
    BertModel,
    BertSelfAttention,
    FastDropout,
    Rectangle,
    dropout_mask,
    group_by_length,
    make_rectangles,
)


@pytest.fixture
def bert(tiny_config):
    """A tiny encoder in eval mode, with weights so large that each part shows in the output."""
    torch.manual_seed(3)
    return BertModel(replace(tiny_config, initializer_range=0.2)).eval()


def random_sequences(lengths, vocab_size, seed=0):
    """Token ids of sentences of these lengths, int32 arrays."""
    generator = np.random.default_rng(seed)
    return [generator.integers(5, vocab_size, n, dtype=np.int32) for n in lengths]


def padded(sequences, width, pad_id=0):
    """The usual batch: ids (batch, width) and mask, 1 = real token."""
    ids = torch.full((len(sequences), width), pad_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    return ids, (torch.arange(width) < lengths[:, None]).long()


# ------------------------------------------------------------------------------ the standard call


def test_the_standard_calls_shapes(bert):
    ids, mask = padded(random_sequences([7, 4, 5], bert.config.vocab_size), 7)
    outputs = bert(ids, mask)
    assert outputs["last_hidden_state"].shape == (3, 7, 32)
    assert outputs["pooler_output"].shape == (3, 32)


def test_padding_changes_nothing(bert):
    """A sentence's hidden states are the same alone, in a batch, and whatever the padding holds."""
    sequences = random_sequences([7, 3, 5], bert.config.vocab_size)
    with torch.no_grad():
        whole = bert(*padded(sequences, 11))
        other_padding = bert(*padded(sequences, 11, pad_id=9))
        for row, sequence in enumerate(sequences):
            alone = bert(*padded([sequence], len(sequence)))
            n = len(sequence)
            for batch in (whole, other_padding):
                found = batch["last_hidden_state"][row, :n]
                torch.testing.assert_close(found, alone["last_hidden_state"][0])
                torch.testing.assert_close(batch["pooler_output"][row], alone["pooler_output"][0])


def test_a_mask_left_out_would_show(bert):
    """The twin of the test above: attention to the padding changes every vector."""
    sequences = random_sequences([7, 3], bert.config.vocab_size)
    ids, mask = padded(sequences, 7)
    right = bert(ids, mask)["last_hidden_state"][1, :3]
    wrong = bert(ids, torch.ones_like(mask))["last_hidden_state"][1, :3]
    assert (right - wrong).abs().max() > 1e-2


def test_a_mask_of_floats_or_truth_values_is_the_same(bert):
    ids, mask = padded(random_sequences([7, 3], bert.config.vocab_size), 7)
    right = bert(ids, mask)["pooler_output"]
    assert torch.equal(bert(ids, mask.float())["pooler_output"], right)
    assert torch.equal(bert(ids, mask.bool())["pooler_output"], right)


def test_segments_and_positions_and_order_matter(bert):
    ids, mask = padded(random_sequences([6], bert.config.vocab_size), 6)
    plain = bert(ids, mask)["pooler_output"]
    segments = torch.tensor([[0, 0, 0, 1, 1, 1]])
    assert torch.equal(bert(ids, mask, torch.zeros_like(ids))["pooler_output"], plain)
    assert (bert(ids, mask, segments)["pooler_output"] - plain).abs().max() > 1e-2
    swapped = ids[:, [0, 2, 1, 3, 4, 5]]
    assert (bert(swapped, mask)["pooler_output"] - plain).abs().max() > 1e-2


def test_more_tokens_than_positions_is_an_error(bert):
    limit = bert.config.max_position_embeddings
    bert(*padded(random_sequences([limit], bert.config.vocab_size), limit))
    with pytest.raises(ValueError, match="sequence of 41 tokens; this encoder has 40 positions"):
        bert(*padded(random_sequences([limit + 1], bert.config.vocab_size), limit + 1))


# --------------------------------------------------------------------------------- rectangles


def vectors(bert, sequences, starts, groups):
    """Last hidden states of each sequence where `groups` of them share a rectangle."""
    rectangles = []
    for group in groups:
        ids, mask = padded([sequences[i] for i in group], max(len(sequences[i]) for i in group))
        columns = torch.arange(ids.size(1))
        segments = (columns >= torch.tensor([starts[i] for i in group])[:, None]) & mask.bool()
        rectangles.append(Rectangle(ids, mask.bool(), segments.long()))
    states = bert.encode(rectangles)
    rows = {i: (g, r) for g, group in enumerate(groups) for r, i in enumerate(group)}
    return [states[rows[i][0]][rows[i][1], : len(s)] for i, s in enumerate(sequences)]


def test_any_grouping_gives_the_same_hidden_states(bert):
    lengths = [9, 2, 7, 7, 4]
    sequences = random_sequences(lengths, bert.config.vocab_size)
    starts = [5, 2, 7, 3, 4]
    groupings = (
        [[0, 1, 2, 3, 4]], [[4, 3], [2, 1, 0]], [[i] for i in range(5)], [[2, 3], [0], [1, 4]],
    )  # fmt: skip
    with torch.no_grad():
        expected = vectors(bert, sequences, starts, groupings[0])
        for groups in groupings[1:]:
            for found, right in zip(
                vectors(bert, sequences, starts, groups), expected, strict=True
            ):
                torch.testing.assert_close(found, right, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_the_grouping_either(bert):
    sequences = random_sequences([9, 2, 7, 4], bert.config.vocab_size)
    found = []
    for groups in ([[0, 1, 2, 3]], [[0], [1, 3], [2]]):
        bert.zero_grad()
        states = vectors(bert, sequences, [99] * 4, groups)
        sum((s.square() * (1 + i)).mean() for i, s in enumerate(states)).backward()
        found.append({n: p.grad for n, p in bert.named_parameters() if p.grad is not None})
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-3, atol=2e-6, msg=name)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(2, 30), min_size=1, max_size=25), st.data())
def test_rectangles_hold_every_sequence_where_place_says(lengths, data):
    sequences = random_sequences(lengths, 100)
    starts = [data.draw(st.integers(1, n)) for n in lengths]
    rectangles, place = make_rectangles(sequences, starts, 0, "cpu")
    rows = []
    for ids, mask, segments in rectangles:
        mask = torch.ones_like(ids, dtype=torch.bool) if mask is None else mask
        segments = torch.zeros_like(ids) if segments is None else segments
        assert not ids[~mask].any()
        assert not segments[~mask].any()
        rows += [(i[m], s[m]) for i, m, s in zip(ids, mask, segments, strict=True)]
    assert sorted(place.tolist()) == list(range(len(sequences)))
    for number, sequence in enumerate(sequences):
        ids, segments = rows[place[number]]
        assert ids.tolist() == sequence.tolist()
        expected = [0] * starts[number] + [1] * (len(sequence) - starts[number])
        assert segments.tolist() == expected


def test_sentences_of_one_length_are_one_rectangle_without_a_mask():
    rectangles, place = make_rectangles(random_sequences([6] * 4, 50), [6] * 4, 0, "cpu")
    assert [r.input_ids.shape for r in rectangles] == [(4, 6)]
    assert rectangles[0].attention_mask is None
    assert rectangles[0].token_type_ids is None
    assert place.tolist() == [0, 1, 2, 3]


def cost(lengths, runs, rectangle_cost):
    """Tokens with padding plus the cost of the rectangles."""
    return sum((end - start) * lengths[end - 1] + rectangle_cost for start, end in runs)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=9), st.sampled_from([0, 1, 3, 8, 400]))
def test_grouping_is_the_cheapest_of_all(lengths, rectangle_cost):
    """Against every way to cut the sorted sentences into runs."""
    lengths = sorted(lengths)
    runs = group_by_length(np.array(lengths), rectangle_cost)
    n = len(lengths)
    assert [i for start, end in runs for i in range(start, end)] == list(range(n))
    cheapest = min(
        cost(lengths, itertools.pairwise([0, *cuts, n]), rectangle_cost)
        for count in range(n)
        for cuts in itertools.combinations(range(1, n), count)
    )
    assert cost(lengths, runs, rectangle_cost) == cheapest


def test_extremes_of_the_rectangles_cost():
    lengths = np.array([3, 3, 5, 9])
    assert group_by_length(lengths, 0) == [(0, 2), (2, 3), (3, 4)]  # free: no padding at all
    assert group_by_length(lengths, 10**6) == [(0, 4)]  # dear: the usual padded batch
    assert group_by_length(np.array([7]), 8) == [(0, 1)]


# ------------------------------------------------------------------------------------- dropout


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_dropout_rate_and_scale(p):
    """About p of a million elements is zero, the rest 1 / (1 - p), so that the mean stays 1."""
    n = 1_000_000
    mask = dropout_mask((n,), p, torch.float32)
    assert mask.unique().tolist() == pytest.approx([0, 1 / (1 - p)], rel=1e-3)
    deviation = math.sqrt(p * (1 - p) / n)
    assert (mask == 0).float().mean().item() == pytest.approx(p, abs=5 * deviation + 2**-16)
    assert mask.mean().item() == pytest.approx(1, abs=5 * deviation / (1 - p))


def test_every_place_is_dropped_as_often():
    """Four elements share a random word: each of the four has to see the rate, and alone."""
    mask = dropout_mask((4, 250_000), 0.3, torch.float32).flatten().view(-1, 4) == 0
    assert mask.float().mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.005)
    correlation = torch.corrcoef(mask.float().T) - torch.eye(4)
    assert correlation.abs().max() < 0.01  # of 250,000: five standard deviations
    shifted = torch.corrcoef(torch.stack([mask[1:, 0], mask[:-1, 3]]).float())[0, 1]
    assert shifted.abs() < 0.01


def test_draws_are_independent_and_reproducible():
    draws = [dropout_mask((200_000,), 0.5, torch.float32) == 0 for _ in range(2)]
    agree = (draws[0] == draws[1]).float().mean().item()
    assert agree == pytest.approx(0.5, abs=0.006)
    torch.manual_seed(11711)  # the fixture's seed: the very same two masks again
    for draw in draws:
        assert torch.equal(dropout_mask((200_000,), 0.5, torch.float32) == 0, draw)
    torch.manual_seed(11712)
    assert not torch.equal(dropout_mask((200_000,), 0.5, torch.float32) == 0, draws[0])


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 4, 5), (0, 4)])
def test_a_mask_of_any_shape(shape):
    assert dropout_mask(shape, 0.4, torch.bfloat16).shape == shape


def test_the_gradient_passes_where_the_value_passed():
    """Another mask in the backward pass would train something else than was computed."""
    dropout = FastDropout(0.3).train()
    x = torch.randn(50, 40, requires_grad=True)
    y = dropout(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad * x.detach(), y.detach())
    assert 0 < (x.grad == 0).float().mean() < 1


def test_no_dropout_in_eval_mode_or_at_rate_zero():
    x = torch.randn(4, 5)
    assert FastDropout(0.5).eval()(x) is x
    assert FastDropout(0.0).train()(x) is x


def test_the_encoders_dropout_follows_the_seed_and_the_mode(bert):
    ids, mask = padded(random_sequences([7, 5], bert.config.vocab_size), 7)
    still = bert(ids, mask)["pooler_output"]
    assert torch.equal(bert(ids, mask)["pooler_output"], still)
    bert.train()
    draws = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        draws.append(bert(ids, mask)["pooler_output"])
    assert torch.equal(draws[0], draws[1])
    assert not torch.equal(draws[0], draws[2])
    bert.set_dropout(0.0)
    torch.testing.assert_close(bert(ids, mask)["pooler_output"], still)


def test_set_dropout_reaches_hidden_states_and_attention(bert):
    bert.set_dropout(0.25)
    rates = [m.p for m in bert.modules() if isinstance(m, FastDropout)]
    assert rates == [0.25] * (1 + 3 * bert.config.num_hidden_layers)


@pytest.mark.parametrize("place", ["embeddings", "attention", "attention_output", "output"])
def test_each_dropout_of_a_layer_is_in_use(bert, place):
    """With every other one off, that one alone must make two passes differ."""
    layer = bert.encoder["layer"][1]
    dropout = {
        "embeddings": bert.embeddings.dropout,
        "attention": layer.attention["self"].dropout,
        "attention_output": layer.attention["output"].dropout,
        "output": layer.output.dropout,
    }[place]
    bert.set_dropout(0.0)
    dropout.p = 0.5
    ids, mask = padded(random_sequences([7, 5], bert.config.vocab_size), 7)
    bert.train()
    states = [bert(ids, mask)["last_hidden_state"] for _ in range(2)]
    assert not torch.allclose(*states, atol=1e-3)


# ----------------------------------------------------------------------------------- attention


@pytest.fixture
def attention(tiny_config):
    """Self-attention alone, in float64, attention dropout 0.5, and the rectangle it works on."""
    torch.manual_seed(4)
    sizes = replace(tiny_config, hidden_size=8, num_attention_heads=2)
    module = BertSelfAttention(replace(sizes, attention_probs_dropout_prob=0.5)).double()
    ids, mask = padded(random_sequences([4, 2], 50), 4)
    return module, Rectangle(ids, mask.bool(), None)


def test_attention_by_hand(attention):
    """softmax(q k / √d) v head by head and token by token, over the real tokens."""
    module, rectangle = attention
    hidden = torch.randn(8, 8, dtype=torch.float64)
    found = module.eval()(hidden, [rectangle]).view(2, 4, 8)
    q, k, v = (linear(hidden).view(2, 4, 2, 4) for linear in (module.query, module.key,
                                                             module.value))  # fmt: skip
    for b, length in enumerate((4, 2)):
        for t in range(4):
            for h in range(2):
                scores = k[b, :length, h] @ q[b, t, h] / math.sqrt(4)
                expected = scores.softmax(0) @ v[b, :length, h]
                torch.testing.assert_close(found[b, t, 4 * h : 4 * h + 4], expected)


def test_attention_gradcheck(attention):
    module, rectangle = attention
    module.eval()
    hidden = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, [rectangle]), (hidden,))


def test_attention_gradcheck_with_dropout(attention):
    """The written-out path with its mask, the same mask on every evaluation."""
    module, rectangle = attention
    module.train()

    def fixed(x):
        torch.manual_seed(8)
        return module(x, [rectangle])

    hidden = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed, (hidden,))


def test_the_written_out_path_equals_the_fused_one(attention):
    module, rectangle = attention
    module.eval()  # its dropout does nothing then
    q, k, v = torch.randn(3, 2, 2, 4, 4, dtype=torch.float64)
    for mask in (None, rectangle.attention_mask[:, None, None, :]):
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(module.attend_with_dropout(q, k, v, mask), fused)


def test_attention_dropout_keeps_the_mean(attention):
    """Attention is linear in its probabilities, so many draws average to the plain result."""
    module, rectangle = attention
    hidden = torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = module.eval()(hidden, [rectangle])
        module.train()
        draws = torch.stack([module(hidden, [rectangle]) for _ in range(400)])
    error = (draws.mean(0) - plain).abs()
    assert (draws.std(0) > 0.05).all()
    assert (error < 5 * draws.std(0) / math.sqrt(400)).all()


# ------------------------------------------------------------------------------ what is frozen


def test_keep_frozen_in_converts_frozen_linear_layers_alone(bert):
    bert.requires_grad_(False)
    trained = bert.encoder["layer"][1].output.dense
    trained.requires_grad_(True)
    bert.keep_frozen_in(torch.bfloat16)
    assert trained.weight.dtype == torch.float32
    assert bert.encoder["layer"][0].output.dense.weight.dtype == torch.bfloat16
    assert bert.embeddings.word_embeddings.weight.dtype == torch.float32
    assert bert.embeddings.LayerNorm.weight.dtype == torch.float32


def test_keep_frozen_in_computes_what_autocast_would(bert):
    ids, mask = padded(random_sequences([7, 5], bert.config.vocab_size), 7)
    bert.requires_grad_(False)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = bert(ids, mask)["last_hidden_state"]
        bert.keep_frozen_in(torch.bfloat16)
        assert torch.equal(bert(ids, mask)["last_hidden_state"], before)
