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
    additive_mask,
    dropout_mask,
    fill_rows,
    pack,
)

VOCAB = 50


@pytest.fixture
def bert(tiny_config):
    """A tiny encoder in eval mode, with weights so large that each part shows in the output."""
    torch.manual_seed(3)
    sizes = replace(tiny_config, initializer_range=0.2, max_position_embeddings=300)
    return BertModel(sizes).eval()


def random_sequences(lengths):
    """Token ids of sentences of these lengths, int32 arrays."""
    generator = np.random.default_rng(0)
    return [generator.integers(5, VOCAB, n, dtype=np.int32) for n in lengths]


def padded(sequences, width=None, pad_id=0):
    """The usual batch: ids (batch, width) and mask, 1 = real token."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    ids = torch.full((len(sequences), width or int(lengths.max())), pad_id)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.from_numpy(sequence)
    return ids, (torch.arange(ids.size(1)) < lengths[:, None]).long()


# ------------------------------------------------------------------------------ the standard call


def test_padding_changes_nothing(bert):
    """A sentence's hidden states are the same alone, in a batch, and whatever the padding holds."""
    sequences = random_sequences([7, 3, 5])
    for batch in (bert(*padded(sequences, 11)), bert(*padded(sequences, 11, pad_id=9))):
        assert batch["last_hidden_state"].shape == (3, 11, 32)
        assert batch["pooler_output"].shape == (3, 32)
        for row, sequence in enumerate(sequences):
            alone = bert(*padded([sequence]))
            found = batch["last_hidden_state"][row, : len(sequence)]
            torch.testing.assert_close(found, alone["last_hidden_state"][0])
            torch.testing.assert_close(batch["pooler_output"][row], alone["pooler_output"][0])
    ids, mask = padded(sequences)
    blind = bert(ids, torch.ones_like(mask))["last_hidden_state"]  # the twin: a mask left out shows
    assert (blind[2, :5] - alone["last_hidden_state"][0]).abs().max() > 1e-2


def test_masks_of_any_type_and_segments_by_default(bert):
    ids, mask = padded(random_sequences([7, 3]))
    right = bert(ids, mask)["pooler_output"]
    assert torch.equal(bert(ids, mask.float())["pooler_output"], right)
    assert torch.equal(bert(ids, mask.bool())["pooler_output"], right)
    assert torch.equal(bert(ids, mask, torch.zeros_like(ids))["pooler_output"], right)


def test_more_tokens_than_positions_is_an_error(bert):
    bert(*padded(random_sequences([300])))
    with pytest.raises(ValueError, match="sequence of 301 tokens; this encoder has 300 positions"):
        bert(*padded(random_sequences([301])))


# ------------------------------------------------------------------------------------- packing


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_sentences_such_as_the_tasks_are_nearly_full(seed):
    """Half of a padded batch is padding; here at most a twentieth is, and one row."""
    generator = np.random.default_rng(seed)
    lengths = generator.lognormal(2.9, 0.5, generator.integers(30, 200)).astype(int).clip(3, 64)
    rows, _ = fill_rows(lengths, np.arange(len(lengths)), 64)
    assert len(rows) <= math.ceil(1.05 * lengths.sum() / 64) + 1


NARROWER = {64: 0, 128: 64, 192: 128, 256: 128, 320: 192}  # half, up to a multiple of 64
LENGTHS = st.one_of(
    st.integers(1, 40), st.integers(1, 300), st.sampled_from([63, 64, 65, 127, 128, 129, 256, 257])
)


@settings(max_examples=100, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=25), st.data())
def test_packed_rows_hold_every_sentence_where_first_says(lengths, data):
    """In one piece, with its positions and segments; the rest is padding. A token attends to those
    of its own sentence, a padding token to the padding of its row."""
    sequences = random_sequences(lengths)
    starts = [data.draw(st.integers(1, n)) for n in lengths]
    packed = pack(sequences, starts, 3, "cpu")
    names = ("input_ids", "position_ids", "token_type_ids")
    parts = [torch.cat([getattr(r, name).flatten() for r in packed.rows]) for name in names]
    assert (packed.lengths.tolist(), packed.tokens) == (lengths, sum(lengths))
    assert {t.dtype for t in (*parts, *packed[1:4])} == {torch.int64}
    count = len(lengths)
    expected = torch.tensor([3, 0, 0, count])[:, None].repeat(1, len(packed.owners))
    for number, (sequence, first) in enumerate(zip(sequences, packed.starts.tolist(), strict=True)):
        here = slice(first, first + len(sequence))
        assert (expected[3, here] == count).all(), "two sentences in one place"
        positions = np.arange(len(sequence))
        columns = (sequence, positions, positions >= starts[number], positions * 0 + number)
        expected[:, here] = torch.from_numpy(np.stack(columns))
    assert torch.equal(torch.stack([*parts, packed.owners]), expected)
    sizes = [rows.input_ids.numel() for rows in packed.rows]
    for rows, sentence in zip(packed.rows, packed.owners.split(sizes), strict=True):
        of_rows = sentence.view(rows.input_ids.shape).numpy()
        same = np.array([np.equal.outer(row, row) for row in of_rows])
        assert torch.equal(rows.attention_mask, torch.from_numpy(same)[:, None])


@settings(max_examples=100, deadline=None)
@given(st.lists(LENGTHS, min_size=1, max_size=40))
def test_packed_rows_are_few_and_as_wide_as_their_sentences_need(lengths):
    """A row is begun by a sentence that fits in no narrower row and into no earlier row. What lies
    in narrower rows fits into no wider one. The widest rows come first. Empty rows come last, as
    few as ROWS_MULTIPLE needs."""
    packed = pack(random_sequences(lengths), lengths, 0, "cpu")
    widths = [rows.input_ids.size(1) for rows in packed.rows for _ in rows.input_ids]
    assert widths[0] == math.ceil(max(lengths) / 64) * 64
    assert widths == sorted(widths, reverse=True)
    assert len(set(widths)) == len(packed.rows)
    assert sum(widths) // ROW_TOKENS % ROWS_MULTIPLE == 0
    row_of = np.searchsorted(np.cumsum(widths), packed.starts.numpy(), side="right")
    rows = [np.array(lengths)[row_of == row] for row in range(len(widths))]
    filled = [(row, width) for row, width in zip(rows, widths, strict=True) if len(row)]
    assert widths[len(filled) :] == [ROW_TOKENS] * (len(rows) - len(filled))
    assert len(rows) - len(filled) < ROWS_MULTIPLE
    for number, (row, width) in enumerate(filled):
        assert NARROWER[width] < max(row)
        for later, later_width in filled[number + 1 :]:
            assert sum(row) + (max(later) if width == later_width else min(later)) > width


def test_packing_by_hand():
    """Longest first, each where it leaves the least room; an empty row makes their number even.

    120 tokens share a row of 128 with the 4; 60 are alone; the 10 fills the row of 28 and 26.
    """
    lengths = [26, 10, 42, 28, 120, 4, 60]
    packed = pack(random_sequences(lengths), lengths, 1, "cpu")
    where = [*[4] * 120, *[5] * 4, *[7] * 4, *[6] * 60, *[7] * 4, *[2] * 42, *[7] * 22]
    where += [*[3] * 28, *[0] * 26, *[1] * 10, *[7] * 64]
    assert packed.owners.tolist() == where
    assert packed.starts.tolist() == [284, 310, 192, 256, 0, 120, 128]


# ------------------------------------------------------------------------ rows in the encoder


@pytest.mark.parametrize("blind", [False, True], ids=["masked", "twin without the mask"])
@pytest.mark.parametrize("path", ["fused", "written out"])
def test_sentences_of_one_row_do_not_see_each_other(bert, path, blind):
    """Whatever stands beside a sentence, its states and gradients are the same to the last bit.

    On either path of attention: the written-out one is that of training on a CPU. Twin: with a mask
    that is all true, they differ. That rows are the standard call is in test_parity.py.
    """
    if path == "written out":
        bert.train().set_dropout(1e-9)  # which rounds to no dropout
    sentence, *others = random_sequences([6, 5, 5])
    weights = torch.randn(6, 32)

    def beside(other):
        packed = pack([sentence, other], [4, 3], 0, "cpu")
        rows = packed.rows[0]
        assert packed.starts.max() < ROW_TOKENS, "they are not in the same row"
        if blind:
            rows = rows._replace(attention_mask=torch.ones_like(rows.attention_mask))
        begin = int(packed.starts[0])
        states = bert.encode([rows])[begin : begin + 6]
        bert.zero_grad()
        (states * weights).mean().backward()
        gradients = {n: p.grad for n, p in bert.named_parameters() if p.grad is not None}
        return {"states": states.detach()} | gradients

    found, right = map(beside, others)
    assert found.keys() == right.keys()
    for name, tensor in right.items():
        if not blind:
            assert torch.equal(found[name], tensor), name
        # These are zero but for rounding, or the same whatever the states are.
        elif not name.endswith(("key.bias", "layer.1.output.LayerNorm.bias")):
            assert (found[name] - tensor).abs().max() > (1e-2 if name == "states" else 1e-4), name
    trained_words = right["embeddings.word_embeddings.weight"].any(1).sum()
    assert (trained_words > 6) == blind


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


def test_every_place_is_dropped_as_often_and_independently():
    """Four elements share a random word: each of the four has to see the rate, and alone."""
    mask, other = (dropout_mask((250_000, 4), 0.3, torch.float32) == 0 for _ in range(2))
    assert (mask == other).float().mean().item() == pytest.approx(0.3**2 + 0.7**2, abs=0.003)
    assert mask.float().mean(0).tolist() == pytest.approx([0.3] * 4, abs=0.005)
    correlation = torch.corrcoef(mask.float().T) - torch.eye(4)
    assert correlation.abs().max() < 0.01  # of 250,000: five standard deviations
    shifted = torch.corrcoef(torch.stack([mask[1:, 0], mask[:-1, 3]]).float())[0, 1]
    assert shifted.abs() < 0.01


@pytest.mark.parametrize("shape", [(1,), (3,), (5, 7), (2, 3, 4, 5), (0, 4)])
def test_dropout_of_any_shape_and_none_in_eval_mode_or_at_rate_zero(shape):
    x = torch.ones(shape, dtype=torch.bfloat16)
    dropped = FastDropout(0.4).train()(x)
    assert (dropped.shape, dropped.dtype) == (shape, x.dtype)
    assert FastDropout(0.4).eval()(x) is x
    assert FastDropout(0.0).train()(x) is x


PLACES = ["embeddings", "layer.1.attention.self", "layer.1.attention.output", "layer.1.output"]


@pytest.mark.parametrize("place", PLACES)
def test_each_dropout_is_set_and_used(bert, place):
    """With all of them off, training computes what evaluation does. Each alone follows the seed."""
    batch = padded(random_sequences([7, 5]))
    dropouts = {n: m for n, m in bert.named_modules() if isinstance(m, FastDropout)}

    def states(seed):
        torch.manual_seed(seed)
        return bert(*batch)["last_hidden_state"]

    still = states(1)
    assert torch.equal(states(2), still)
    bert.train().set_dropout(0.0)
    assert [m.p for m in dropouts.values()] == [0.0] * (1 + 3 * bert.config.num_hidden_layers)
    torch.testing.assert_close(states(1), still)
    (name,) = (name for name in dropouts if name.endswith(f"{place}.dropout"))
    dropouts[name].p = 0.5
    assert torch.equal(states(1), states(1))
    assert not torch.allclose(states(1), states(2), atol=1e-3)


# ----------------------------------------------------------------------------------- attention


@pytest.fixture
def attention(tiny_config):
    """Self-attention alone, in float64, attention dropout 0.5, and the rows it works on."""
    sizes = replace(tiny_config, hidden_size=8, num_attention_heads=2)
    module = BertSelfAttention(replace(sizes, attention_probs_dropout_prob=0.5)).double()
    ids, mask = padded(random_sequences([4, 2]))
    positions = torch.arange(4).expand_as(ids)
    bias = additive_mask(mask.bool()[:, None, None, :], torch.float64)  # as `encode` makes it
    return module, Rows(ids, positions, torch.zeros_like(ids), bias)


def test_attention_gradcheck(attention):
    """In training with dropout: what the forward pass drops has no gradient, and nothing else."""
    module, rows = attention

    def attend(x):
        torch.manual_seed(8)  # the same mask on every evaluation
        return module(x, [rows])

    hidden = torch.randn(8, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(attend, (hidden,))


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.cuda)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_size", [17, 32, 64])
def test_fused_attention_is_the_written_out_one(tiny_config, device, dtype, head_size):
    """Output and gradient, in rows of three widths, in which some blocks are masked whole."""
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU")
    torch.manual_seed(0)
    sizes = replace(tiny_config, hidden_size=3 * head_size, num_attention_heads=3)
    module = BertSelfAttention(sizes).to(device, dtype).eval()
    sequences = random_sequences([190, 120, 110, 60, 50, 40, 30])
    rows = pack(sequences, list(map(len, sequences)), 0, device).rows
    rows = [r._replace(attention_mask=additive_mask(r.attention_mask, dtype)) for r in rows]
    assert len(rows) == 3
    hidden = torch.randn(sum(r.input_ids.numel() for r in rows), 3 * head_size)
    found = []
    for path in (F.scaled_dot_product_attention, written_out):
        inputs = hidden.to(device, dtype).requires_grad_()
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", path)
            outputs = module(inputs, rows)
        outputs.square().sum().backward()
        found.append((outputs.detach(), inputs.grad))
    tolerance = 1e-4 if dtype == torch.float32 else 0.1
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


def written_out(q, k, v, attn_mask, dropout_p, scale):
    """What `F.scaled_dot_product_attention` computes."""
    scores = q @ k.transpose(-2, -1) * scale + attn_mask
    return scores.softmax(-1) @ v


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


# --------------------------------------------------------------------------- once, not per layer


def test_query_key_and_value_share_one_bf16_copy_where_layer_norm_is_fp32(bert, monkeypatch):
    """As under CUDA's autocast. Each linear layer would cast, and keep, a copy of its own."""
    layer_norm, seen, sums = torch.nn.LayerNorm.forward, {}, []

    def in_fp32(module, x):
        sums.append(x.dtype)
        return layer_norm(module, x.float())

    monkeypatch.setattr(torch.nn.LayerNorm, "forward", in_fp32)
    for name, module in bert.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(lambda _, x, name=name: seen.update({name: x[0]}))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        bert(*padded(random_sequences([7, 5])))
    assert {x.dtype for name, x in seen.items() if "pooler" not in name} == {torch.bfloat16}
    for layer in range(bert.config.num_hidden_layers):
        place = f"encoder.layer.{layer}.attention.self"
        assert seen[f"{place}.query"] is seen[f"{place}.key"] is seen[f"{place}.value"]
    assert sums == [torch.float32] + [torch.bfloat16] * 2 * bert.config.num_hidden_layers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_mask_is_converted_once_for_all_layers(bert, monkeypatch, dtype):
    """Once for each width of rows; attention gets it in the dtype that it computes in."""
    made = []
    monkeypatch.setattr(
        "bert.additive_mask", lambda *args: made.append(additive_mask(*args)) or made[-1]
    )
    packed = pack(random_sequences([120, 20]), [120, 20], 0, "cpu")
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        bert.encode(packed.rows)
    assert [mask.dtype for mask in made] == [dtype] * len(packed.rows) == [dtype] * 2
    for mask, rows in zip(made, packed.rows, strict=True):
        assert torch.equal(mask == 0, rows.attention_mask)


# ------------------------------------------------------------------------------ frozen layers


def test_cast_frozen_linears_casts_frozen_linear_layers_alone_as_autocast_would(bert):
    batch = padded(random_sequences([7, 5]))
    bert.requires_grad_(False)
    bert.encoder["layer"][1].output.requires_grad_(True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        before = bert(*batch)["last_hidden_state"]
        bert.cast_frozen_linears(torch.bfloat16)
        assert torch.equal(bert(*batch)["last_hidden_state"], before)
    cast = {name for name, parameter in bert.named_parameters() if parameter.dtype != torch.float32}
    linear = {n for n, m in bert.named_modules() if isinstance(m, torch.nn.Linear)}
    linear.remove("encoder.layer.1.output.dense")
    assert cast == {f"{name}.{part}" for name in linear for part in ("weight", "bias")}
