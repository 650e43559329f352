"""The encoder by itself: padding, rows, dropout, attention, gradients."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from bert import (
    ROW_TOKENS,
    ROWS_MULTIPLE,
    BertModel,
    BertSelfAttention,
    FastDropout,
    Rows,
    dropout_mask,
    fill_rows,
    narrower,
    pack,
)


@pytest.fixture
def bert(tiny_config):
    """A tiny encoder in eval mode, with weights so large that each part shows in the output."""
    torch.manual_seed(3)
    return BertModel(replace(tiny_config, initializer_range=0.2)).eval()


@pytest.fixture
def long_bert(tiny_config):
    """The same for sentences of up to 300 tokens, whose rows are wider."""
    torch.manual_seed(3)
    sizes = replace(tiny_config, initializer_range=0.2, max_position_embeddings=300)
    return BertModel(sizes).eval()


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


# -------------------------------------------------------------------------------- filling rows


def fewest_rows(lengths, width):
    """The optimum, by every way to fill them; `rooms`: what tokens of the rows can be free."""
    rooms = {()}
    for n in lengths:
        fitting = [(r, i) for r in rooms for i, free in enumerate(r) if free >= n]
        filled = {tuple(sorted((*r[:i], r[i] - n, *r[i + 1 :]))) for r, i in fitting}
        rooms = filled | {tuple(sorted((*r, width - n))) for r in rooms}
    return min(map(len, rooms))


# Half, up to a multiple of 64.
NARROWER = {64: 0, 128: 64, 192: 128, 256: 128, 320: 192, 384: 192, 448: 256, 512: 256}


@pytest.mark.parametrize("width", NARROWER)
def test_narrower_rows(width):
    assert narrower(width) == NARROWER[width]


def best_fit(lengths, width):
    """By the definition: longest first, each into the fullest row it fits, else into a new one.

    A row is begun by a sentence that the next narrower ones cannot hold. Returns the tokens of the
    rows and the lengths that are left, both in ascending order.
    """
    filled, left = [], []
    for n in sorted(lengths, reverse=True):
        fitting = [row for row in filled if row + n <= width]
        if fitting:
            filled.remove(max(fitting))
        elif n <= NARROWER[width]:
            left.append(n)
            continue
        filled.append(max(fitting, default=0) + n)
    return sorted(filled), sorted(left)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(NARROWER)), st.data())
def test_filled_rows_hold_every_sentence_once_and_none_is_too_full(width, data):
    """Among other sentences, which stay out of it; what is left has found no room."""
    lengths = np.array(data.draw(st.lists(st.integers(1, width), min_size=1, max_size=50)))
    numbers = np.array(data.draw(st.permutations(range(len(lengths)))))
    numbers = numbers[: data.draw(st.integers(0, len(lengths)))]
    rows, left = fill_rows(lengths, numbers, width)
    placed = [number for row in rows for number in row]
    assert sorted([*placed, *left]) == sorted(numbers)
    assert all(rows), "a row without a sentence is computed for nothing"
    loads = sorted(int(lengths[row].sum()) for row in rows)
    assert not loads or loads[-1] <= width
    assert len(loads) < 2 or loads[0] + loads[1] > width  # no two could be one
    assert left.dtype == np.int64
    assert width > ROW_TOKENS or not len(left)
    for length in lengths[left]:
        assert length <= NARROWER[width]
        assert all(load + length > width for load in loads)
    assert (loads, sorted(lengths[left].tolist())) == best_fit(lengths[numbers].tolist(), width)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(5, 64), min_size=1, max_size=9))
def test_filled_rows_are_few_against_every_way_to_fill_them(lengths):
    """11/9 of the optimum + 6/9, the bound of first and best fit with the longest first."""
    rows, _ = fill_rows(np.array(lengths), np.arange(len(lengths)), 64)
    fewest = fewest_rows(lengths, 64)
    assert fewest <= len(rows) <= min(len(lengths), (11 * fewest + 6) / 9)


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_sentences_such_as_the_tasks_are_nearly_full(seed):
    """Half of a padded batch is padding; here it may be a twentieth, and one row."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(2.9, 0.5, generator.integers(30, 200)).astype(int).clip(3, 64)
    rows, _ = fill_rows(lengths, np.arange(len(lengths)), 64)
    assert len(rows) <= math.ceil(1.05 * lengths.sum() / 64) + 1


def filled(lengths, width):
    """The rows that all sentences of these lengths fill, and the numbers that are left."""
    rows, left = fill_rows(np.array(lengths), np.arange(len(lengths)), width)
    return rows, left.tolist()


def test_filling_by_hand():
    """42 and 28 do not fit in 64 tokens, 28 and 26 do; the 10 then goes where it leaves 0."""
    assert filled([26, 10, 42, 28], 64) == ([[2], [3, 0, 1]], [])
    rows, _ = fill_rows(np.array([26, 10, 42, 28]), np.array([1, 3]), 64)
    assert rows == [[3, 1]]


def test_filling_wide_rows_by_hand():
    """100 and 70 begin rows of 128; beside them there is room for 20 and 58, not for 60 and 30."""
    assert filled([70, 60, 30, 100, 58, 20], 128) == ([[3, 5], [0, 4]], [1, 2])
    assert filled([64, 64], 128) == ([], [0, 1])
    assert filled([65, 64], 128) == ([[0]], [1])


def test_extremes_of_filling():
    assert filled([64, 64, 64], 64) == ([[0], [1], [2]], [])  # each fills a row: a padded batch
    assert filled([33, 33, 33], 64) == ([[0], [1], [2]], [])  # no two fit
    assert filled([10, 10, 12, 32], 64) == ([[3, 2, 0, 1]], [])  # all fit
    assert filled([7], 64) == ([[0]], [])
    assert filled([], 64) == ([], [])


# ------------------------------------------------------------------------------------- packing

LENGTHS = st.one_of(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 256, 257])
)


def one_each(packed, part):
    """A part of all rows, one value for each of the N tokens."""
    return torch.cat([getattr(rows, part).flatten() for rows in packed.rows])


@settings(max_examples=100, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=25), st.data())
def test_packed_rows_hold_every_sentence_where_first_says(lengths, data):
    """Its tokens in one piece, positions from 0, its segments; all else is padding."""
    sequences = random_sequences(lengths, 100)
    starts = [data.draw(st.integers(1, n)) for n in lengths]
    packed = pack(sequences, starts, 3, "cpu")
    ids, positions, segments = (
        one_each(packed, part) for part in ("input_ids", "position_ids", "token_type_ids")
    )
    assert packed.lengths.tolist() == lengths
    assert len(ids) == len(packed.sentence)
    padding = torch.ones(len(ids), dtype=torch.bool)
    for number, (sequence, first) in enumerate(zip(sequences, packed.first.tolist(), strict=True)):
        here = slice(first, first + len(sequence))
        assert ids[here].tolist() == sequence.tolist()
        assert positions[here].tolist() == list(range(len(sequence)))
        expected = [0] * starts[number] + [1] * (len(sequence) - starts[number])
        assert segments[here].tolist() == expected
        assert (packed.sentence[here] == number).all()
        assert padding[here].all(), "two sentences in one place"
        padding[here] = False
    assert (packed.sentence[padding] == len(lengths)).all()
    assert (ids[padding] == 3).all()
    assert not segments[padding].any()
    assert not positions[padding].any()
    tensors = [ids, positions, segments, packed.sentence, packed.first, packed.lengths]
    assert {t.dtype for t in tensors} == {torch.int64}


@settings(max_examples=60, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=25))
def test_packed_tokens_meet_those_of_their_own_sentence(lengths):
    """The mask is true for pairs of tokens of one sentence, and of padding, and for no others."""
    packed = pack(random_sequences(lengths, 100), lengths, 0, "cpu")
    owner = np.full(len(packed.sentence), -1)
    for number, (first, n) in enumerate(zip(packed.first.tolist(), lengths, strict=True)):
        owner[first : first + n] = number
    for rows in packed.rows:
        B, T = rows.input_ids.shape
        here, owner = owner[: B * T].reshape(B, T), owner[B * T :]
        expected = np.array([np.equal.outer(row, row) for row in here])
        assert rows.attention_mask.dtype == torch.bool
        assert rows.attention_mask.shape == (B, 1, T, T)
        assert np.array_equal(rows.attention_mask[:, 0].numpy(), expected)
    assert not len(owner)


@settings(max_examples=100, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=40))
def test_packed_rows_are_as_wide_as_their_sentences_need(lengths):
    """Rows for the longest and, by halves, narrower ones; shorter sentences beside the long ones.

    Empty rows come last, as many as it takes to have a multiple of ROWS_MULTIPLE in all.
    """
    packed = pack(random_sequences(lengths, 100), lengths, 0, "cpu")
    shapes = [rows.input_ids.shape for rows in packed.rows]
    found, width = {}, math.ceil(max(lengths) / 64) * 64
    while width:
        found[width], width = (), NARROWER[width]
    for (B, T), sentences in zip(
        shapes, packed.sentence.split([B * T for B, T in shapes]), strict=True
    ):
        found[T] = (sentences.view(B, T) < len(lengths)).sum(1).tolist()
    left, units = lengths, 0
    for width, loads in found.items():
        expected, left = best_fit(left, width)
        units += len(loads) * width // ROW_TOKENS
        used = loads[: len(expected)]
        assert sorted(used) == expected
        padding = -(units - len(loads) + len(used)) % ROWS_MULTIPLE if width == ROW_TOKENS else 0
        assert loads[len(used) :] == [0] * padding if loads else not padding
    assert not left
    assert units % ROWS_MULTIPLE == 0
    assert [T for _, T in shapes] == [width for width, loads in found.items() if loads]
    assert all(tensor.shape == rows.input_ids.shape for rows in packed.rows for tensor in rows[:3])


def test_sentences_of_one_length_fill_their_rows_without_padding():
    packed = pack(random_sequences([16] * 8, 50), [16] * 8, 0, "cpu")
    assert [rows.input_ids.shape for rows in packed.rows] == [(2, 64)]
    assert sorted(packed.first.tolist()) == list(range(0, 128, 16))
    assert packed.sentence.bincount().tolist() == [16] * 8
    assert not one_each(packed, "token_type_ids").any()


def test_packing_by_hand():
    """70 tokens in a row of 128 with the 4 and the 3; 60 alone, and an empty row after it."""
    sequences = [np.array([2, 9, 3]), np.arange(70) + 5, np.array([2, 8, 7, 3]), np.arange(60) + 9]
    packed = pack([s.astype(np.int32) for s in sequences], [3, 40, 2, 60], 1, "cpu")
    wide, narrow = packed.rows
    assert wide.input_ids.tolist() == [[*range(5, 75), 2, 8, 7, 3, 2, 9, 3, *[1] * 51]]
    assert wide.position_ids.tolist() == [[*range(70), 0, 1, 2, 3, 0, 1, 2, *[0] * 51]]
    assert wide.token_type_ids.tolist() == [[*[0] * 40, *[1] * 30, 0, 0, 1, 1, *[0] * 54]]
    blocks = torch.block_diag(*(torch.ones(n, n) for n in (70, 4, 3, 51))).bool()
    assert torch.equal(wide.attention_mask[0, 0], blocks)
    assert narrow.input_ids.tolist() == [[*range(9, 69), *[1] * 4], [1] * 64]
    assert narrow.position_ids.tolist() == [[*range(60), *[0] * 4], [0] * 64]
    assert not narrow.token_type_ids.any()
    assert torch.equal(narrow.attention_mask[0, 0],
                       torch.block_diag(torch.ones(60, 60), torch.ones(4, 4)).bool())  # fmt: skip
    assert narrow.attention_mask[1].all()
    assert packed.first.tolist() == [74, 0, 70, 128]
    assert packed.lengths.tolist() == [3, 70, 4, 60]
    where = [*[1] * 70, *[2] * 4, *[0] * 3, *[4] * 51, *[3] * 60, *[4] * 68]
    assert packed.sentence.tolist() == where


# ------------------------------------------------------------------------ rows in the encoder


def lay_out(sequences, starts, rows):
    """Sentences side by side as `rows` says, each row a list of their numbers, as a `Rows`."""
    width = max(sum(len(sequences[i]) for i in row) for row in rows)
    ids, positions, segments = torch.zeros(3, len(rows), width, dtype=torch.int64)
    mask = torch.zeros(len(rows), 1, width, width, dtype=torch.bool)
    for r, row in enumerate(rows):
        first = 0
        for i in row:
            end = first + len(sequences[i])
            ids[r, first:end] = torch.from_numpy(sequences[i])
            positions[r, first:end] = torch.arange(end - first)
            segments[r, first + starts[i] : end] = 1
            mask[r, 0, first:end, first:end] = True
            first = end
        mask[r, 0, first:, first:] = True
    return Rows(ids, positions, segments, mask)


def vectors(bert, sequences, starts, layout):
    """Last hidden states of each sequence in a layout: lists of rows, one of each width."""
    all_rows = [lay_out(sequences, starts, rows) for rows in layout]
    states, found, begin = bert.encode(all_rows), {}, 0
    for rows, laid_out in zip(layout, all_rows, strict=True):
        for row in rows:
            first = begin
            for i in row:
                found[i] = states[first : first + len(sequences[i])]
                first += len(sequences[i])
            begin += laid_out.input_ids.size(1)
    return [found[i] for i in range(len(sequences))]


def packed_vectors(bert, sequences, starts):
    """Last hidden states of each sequence in the rows that `pack` makes."""
    packed = pack(sequences, starts, 0, "cpu")
    states = bert.encode(packed.rows)
    return [
        states[first : first + len(sequence)]
        for first, sequence in zip(packed.first.tolist(), sequences, strict=True)
    ]


def padded_vectors(bert, sequences, starts):
    """Last hidden states of each sequence by the standard call on the padded batch."""
    ids, mask = padded(sequences, max(map(len, sequences)))
    segments = (torch.arange(ids.size(1)) >= torch.tensor(starts)[:, None]) & mask.bool()
    states = bert(ids, mask, segments.long())["last_hidden_state"]
    return [s[: len(sequence)] for s, sequence in zip(states, sequences, strict=True)]


def gradients_of(bert, states):
    """Of a random weighted mean of each sentence's states (their squares' mean is always 1)."""
    bert.zero_grad()
    generator = torch.Generator().manual_seed(7)
    sum((s * torch.randn(s.shape, generator=generator)).mean() for s in states).backward()
    return {n: p.grad for n, p in bert.named_parameters() if p.grad is not None}


def test_any_layout_gives_the_same_hidden_states(bert):
    lengths = [9, 2, 7, 7, 4]
    sequences = random_sequences(lengths, bert.config.vocab_size)
    starts = [5, 2, 7, 3, 4]
    layouts = (
        [[[0, 1, 2, 3, 4]]], [[[4, 3], [2]], [[1, 0]]], [[[i]] for i in range(5)],
        [[[2, 3], [0]], [[1], [4]]],
    )  # fmt: skip
    with torch.no_grad():
        expected = vectors(bert, sequences, starts, [[[i] for i in range(5)]])
        for found in (
            *(vectors(bert, sequences, starts, layout) for layout in layouts),
            packed_vectors(bert, sequences, starts),
            padded_vectors(bert, sequences, starts),
        ):
            for states, right in zip(found, expected, strict=True):
                torch.testing.assert_close(states, right, rtol=1e-4, atol=1e-5)


def test_gradients_do_not_depend_on_the_layout_either(bert):
    sequences = random_sequences([9, 2, 7, 4], bert.config.vocab_size)
    found = []
    for layout in ([[[0], [1], [2], [3]]], [[[0]], [[1, 3]], [[2]]], [[[3, 0], [2, 1]]]):
        found.append(gradients_of(bert, vectors(bert, sequences, [99] * 4, layout)))
    assert all(g.abs().max() > 1e-2 for n, g in found[0].items() if not n.endswith("key.bias"))
    for name, gradient in found[0].items():
        for other in found[1:]:
            torch.testing.assert_close(other[name], gradient, rtol=1e-3, atol=2e-6, msg=name)


@pytest.mark.parametrize("lengths", [[9, 2, 7, 7, 4], [70, 5, 130, 64, 65, 11, 200, 3]])
@pytest.mark.parametrize("path", ["fused", "written out"])
def test_packed_equals_the_standard_call(long_bert, lengths, path):
    """Outputs and gradients; the written-out path is that of training on a CPU, at a rate of 0."""
    if path == "written out":
        long_bert.train().set_dropout(1e-9)
    else:
        long_bert.set_dropout(0.0)
    sequences = random_sequences(lengths, long_bert.config.vocab_size)
    starts = [max(1, n // 2 + n % 3) for n in lengths]
    found = []
    for way in (packed_vectors, padded_vectors):
        states = way(long_bert, sequences, starts)
        found.append((states, gradients_of(long_bert, states)))
    (states, gradients), (right, right_gradients) = found
    for ours, theirs in zip(states, right, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)
    assert gradients.keys() == right_gradients.keys()
    for name, gradient in right_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


@pytest.fixture(params=["fused", "written out"])
def neighbours(request, bert):
    """Two sentences in one row: what the first one's states and gradients are, as a function."""
    if request.param == "written out":
        bert.train().set_dropout(1e-9)
    first, second, other = random_sequences([6, 5, 5], bert.config.vocab_size)

    def measure(change, blind=False):
        """With the second sentence as it is or changed; `blind`: with a mask that is all true."""
        packed = pack([first, other if change else second], [4, 3], 0, "cpu")
        (rows,) = packed.rows
        assert packed.first.max() < ROW_TOKENS, "they are not in the same row"
        if blind:
            rows = rows._replace(attention_mask=torch.ones_like(rows.attention_mask))
        begin = int(packed.first[0])
        states = bert.encode([rows])[begin : begin + 6]
        return states.detach(), gradients_of(bert, [states])

    return measure


def test_sentences_of_one_row_do_not_see_each_other(neighbours):
    """Whatever stands beside a sentence, its states and gradients are the same to the last bit."""
    states, gradients = neighbours(change=False)
    changed_states, changed_gradients = neighbours(change=True)
    assert torch.equal(changed_states, states)
    for name, gradient in gradients.items():
        assert torch.equal(changed_gradients[name], gradient), name
    assert gradients["embeddings.word_embeddings.weight"].any(1).sum() <= 6


def test_sentences_of_one_row_would_see_each_other_without_the_mask(neighbours):
    """The twin of the test above."""
    states, gradients = neighbours(change=False, blind=True)
    changed_states, changed_gradients = neighbours(change=True, blind=True)
    assert (changed_states - states).abs().max() > 1e-2
    for name, gradient in gradients.items():
        # Zero but for rounding; the same whatever the states are.
        if not name.endswith(("key.bias", "layer.1.output.LayerNorm.bias")):
            assert (changed_gradients[name] - gradient).abs().max() > 1e-4, name
    assert gradients["embeddings.word_embeddings.weight"].any(1).sum() > 6


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
    """Self-attention alone, in float64, attention dropout 0.5, and the rows it works on."""
    torch.manual_seed(4)
    sizes = replace(tiny_config, hidden_size=8, num_attention_heads=2)
    module = BertSelfAttention(replace(sizes, attention_probs_dropout_prob=0.5)).double()
    ids, mask = padded(random_sequences([4, 2], 50), 4)
    positions = torch.arange(4).expand_as(ids)
    return module, Rows(ids, positions, torch.zeros_like(ids), mask.bool()[:, None, None, :])


def test_attention_by_hand(attention):
    """softmax(q k / √d) v head by head and token by token, over the real tokens."""
    module, rows = attention
    hidden = torch.randn(8, 8, dtype=torch.float64)
    found = module.eval()(hidden, [rows]).view(2, 4, 8)
    q, k, v = (linear(hidden).view(2, 4, 2, 4) for linear in (module.query, module.key,
                                                             module.value))  # fmt: skip
    for b, length in enumerate((4, 2)):
        for t in range(4):
            for h in range(2):
                scores = k[b, :length, h] @ q[b, t, h] / math.sqrt(4)
                expected = scores.softmax(0) @ v[b, :length, h]
                torch.testing.assert_close(found[b, t, 4 * h : 4 * h + 4], expected)


def test_attention_in_shared_rows_by_hand(attention):
    """The same over the tokens of a token's own sentence, or over a row's padding."""
    module, _ = attention
    packed = pack(random_sequences([3, 2, 6], 50), [3, 2, 6], 0, "cpu")
    assert [r.input_ids.shape for r in packed.rows] == [(2, 64)]
    hidden = torch.randn(128, 8, dtype=torch.float64)
    row = torch.arange(128) // 64
    found = module.eval()(hidden, packed.rows)
    q, k, v = (linear(hidden).view(128, 2, 4) for linear in (module.query, module.key,
                                                            module.value))  # fmt: skip
    for t in (*range(14), 63, 64, 127):
        own = (packed.sentence == packed.sentence[t]) & (row == row[t])
        for h in range(2):
            scores = k[own, h] @ q[t, h] / math.sqrt(4)
            expected = scores.softmax(0) @ v[own, h]
            torch.testing.assert_close(found[t, 4 * h : 4 * h + 4], expected)


def test_attention_gradcheck(attention):
    module, rows = attention
    module.eval()
    hidden = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: module(x, [rows]), (hidden,))


def test_attention_gradcheck_with_dropout(attention):
    """The written-out path with its mask, the same mask on every evaluation."""
    module, rows = attention
    module.train()

    def fixed(x):
        torch.manual_seed(8)
        return module(x, [rows])

    hidden = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(fixed, (hidden,))


def test_the_written_out_path_equals_the_fused_one(attention):
    module, rows = attention
    module.eval()  # its dropout does nothing then
    q, k, v = torch.randn(3, 2, 2, 4, 4, dtype=torch.float64)
    owner = torch.tensor([[0, 0, 0, 1], [2, 3, 3, 4]])
    block_diagonal = (owner[:, :, None] == owner[:, None, :])[:, None]
    for mask in (torch.ones(2, 1, 1, 4, dtype=torch.bool), rows.attention_mask, block_diagonal):
        fused = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        torch.testing.assert_close(module.attend_with_dropout(q, k, v, mask), fused)


def test_attention_dropout_keeps_the_mean(attention):
    """Attention is linear in its probabilities, so many draws average to the plain result."""
    module, rows = attention
    hidden = torch.randn(8, 8, dtype=torch.float64)
    with torch.no_grad():
        plain = module.eval()(hidden, [rows])
        module.train()
        draws = torch.stack([module(hidden, [rows]) for _ in range(400)])
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
