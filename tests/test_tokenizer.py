"""The tokenizer: its markers, limits, files and the joining of pairs."""

import json
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from tokenizer import SPECIAL_TOKENS, BertTokenizer, join_pair


@pytest.fixture(scope="module")
def tokenizer(toy_vocab_folder):
    """The toy vocabulary's tokenizer; 40 tokens at most."""
    return BertTokenizer.from_pretrained(toy_vocab_folder)


def pieces(tokenizer, text, **limits):
    """The word pieces of one text."""
    return [tokenizer.vocab[i] for i in tokenizer([text], **limits)[0]]


# ---------------------------------------------------------------------------------- text to ids


def test_words_are_cut_into_the_longest_pieces_between_the_markers(tokenizer):
    assert pieces(tokenizer, "The movie, unable PLAYING box") == [
        "[CLS]", "the", "movie", ",", "un", "##able", "playing", "b", "##o", "##x", "[SEP]",
    ]  # fmt: skip


def test_accents_go_with_the_capitals_and_stay_without_lowercasing(toy_vocab):
    assert pieces(BertTokenizer(toy_vocab), "Thé") == ["[CLS]", "the", "[SEP]"]
    assert pieces(BertTokenizer(toy_vocab, lowercase=False), "Thé") == ["[CLS]", "[UNK]", "[SEP]"]


def test_a_literal_marker_in_a_text_is_text(tokenizer):
    """As a marker it would end the sentence, or let a text mask itself."""
    ids = tokenizer(["good [SEP] bad [PAD] [MASK] [CLS]"])[0]
    assert ids[0] == tokenizer.cls_id
    assert ids[-1] == tokenizer.sep_id
    markers = {tokenizer.vocab.index(token) for token in SPECIAL_TOKENS} - {tokenizer.unk_id}
    assert not markers & set(ids[1:-1].tolist())


@pytest.mark.parametrize("text", ["", " ", "\t \n", "​"])
def test_an_empty_text_is_two_markers(tokenizer, text):
    assert pieces(tokenizer, text) == ["[CLS]", "[SEP]"]


def test_a_word_of_more_than_100_letters_is_unknown(tokenizer):
    assert pieces(tokenizer, "x" * 100, max_length=200).count("##x") == 99
    assert pieces(tokenizer, "x" * 101) == ["[CLS]", "[UNK]", "[SEP]"]


def test_emoji_and_foreign_letters_are_unknown_tokens_not_errors(tokenizer):
    ids = tokenizer(["good 🎬 movie", "映画 good", "\ud83d"[:0] + "e\u0301"])
    assert all(len(sequence) >= 3 for sequence in ids)
    assert tokenizer.unk_id in ids[0]
    assert (ids[1] == tokenizer.unk_id).sum() == 2  # each Chinese character is a word


def test_a_text_is_cut_to_the_limit_with_its_markers(tokenizer):
    ids = tokenizer(["good " * 50, "bad"])
    assert [len(sequence) for sequence in ids] == [40, 3]
    assert (ids[0][0], ids[0][-1]) == (tokenizer.cls_id, tokenizer.sep_id)
    assert pieces(tokenizer, "good movie bad", max_length=4) == ["[CLS]", "good", "movie", "[SEP]"]
    assert all(sequence.dtype == np.int32 for sequence in ids)


def test_a_text_of_10_mb_takes_no_longer_than_a_page(tokenizer):
    text = "good movie " * 1_000_000
    began = time.perf_counter()
    assert len(tokenizer([text])[0]) == 40
    assert time.perf_counter() - began < 2


# ---------------------------------------------------------------------------------------- files


def test_saved_files_give_the_same_tokenizer_from_either_vocabulary(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    again = BertTokenizer.from_pretrained(tmp_path)
    assert (again.vocab, again.lowercase) == (tokenizer.vocab, tokenizer.lowercase)
    assert again.model_max_length == tokenizer.model_max_length == 40
    (tmp_path / "vocab.txt").unlink()  # tokenizer.json alone has to do as well
    again = BertTokenizer.from_pretrained(tmp_path)
    assert (again.vocab, again.lowercase) == (tokenizer.vocab, tokenizer.lowercase)


def test_lowercasing_survives_saving(toy_vocab, tmp_path):
    BertTokenizer(toy_vocab, lowercase=False).save_pretrained(tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path).lowercase is False


RULES = [
    # tokenizer_config.json, normalizer of tokenizer.json, what becomes of "Ün"
    ({"do_lower_case": True}, {}, ["un"]),
    ({"do_lower_case": True, "strip_accents": False}, {}, ["[UNK]"]),
    ({"do_lower_case": False}, {}, ["[UNK]"]),
    ({"do_lower_case": None}, {}, ["un"]),
    ({}, {"lowercase": False}, ["un"]),  # as `transformers`: no settings are a `BertTokenizer`'s
    ({"tokenizer_class": "BertTokenizer"}, {"lowercase": False}, ["un"]),
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"lowercase": False}, ["[UNK]"]),
    ({"tokenizer_class": "TokenizersBackend"}, {"strip_accents": False}, ["[UNK]"]),
    ({"tokenizer_class": "TokenizersBackend"}, {}, ["un"]),
]


@pytest.mark.parametrize(("settings", "normalizer", "pieces"), RULES)
def test_how_a_text_is_normalised_is_read_and_written(
    toy_vocab, tmp_path, settings, normalizer, pieces
):
    read, written = tmp_path / "read", tmp_path / "written"
    for folder in (read, written):
        folder.mkdir()
    BertTokenizer(toy_vocab).save_pretrained(read)
    complete = json.loads((read / "tokenizer.json").read_text())
    complete["normalizer"] |= normalizer
    (read / "tokenizer.json").write_text(json.dumps(complete))
    (read / "tokenizer_config.json").write_text(json.dumps(settings))
    first = BertTokenizer.from_pretrained(read)
    first.save_pretrained(written)
    for tokenizer in (first, BertTokenizer.from_pretrained(written)):
        (ids,) = tokenizer(["Ün"])
        assert [tokenizer.vocab[i] for i in ids[1:-1]] == pieces


def test_chinese_characters_are_words_of_their_own_unless_told_otherwise(toy_vocab, tmp_path):
    for split in (True, False):
        tokenizer = BertTokenizer(toy_vocab, split_chinese=split)
        tokenizer.save_pretrained(tmp_path)
        for own in (tokenizer, BertTokenizer.from_pretrained(tmp_path)):
            assert len(own(["中国"])[0]) == (4 if split else 3)


def test_a_length_that_stands_for_none_becomes_512(toy_vocab_folder, tmp_path):
    """Published files write 10**30 where nobody set a limit."""
    (tmp_path / "vocab.txt").write_bytes((toy_vocab_folder / "vocab.txt").read_bytes())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    assert BertTokenizer.from_pretrained(tmp_path).model_max_length == 512


def test_a_vocabulary_with_crlf_is_the_same(toy_vocab_folder, tmp_path):
    content = (toy_vocab_folder / "vocab.txt").read_bytes().replace(b"\n", b"\r\n")
    (tmp_path / "vocab.txt").write_bytes(content)
    plain = BertTokenizer.from_pretrained(toy_vocab_folder)
    assert BertTokenizer.from_pretrained(tmp_path).vocab == plain.vocab


def test_a_vocabulary_without_the_markers_is_refused(toy_vocab):
    with pytest.raises(UserError, match=r"no \[SEP\] \[MASK\]"):
        BertTokenizer([piece for piece in toy_vocab if piece not in ("[SEP]", "[MASK]")])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "{}"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", "{"),
        ("tokenizer_config.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("vocab.txt", b"\xff\xfe"),
    ],
)
def test_damaged_files_are_the_users_mistake(tmp_path, toy_vocab, name, content):
    if name == "tokenizer_config.json":
        (tmp_path / "vocab.txt").write_text("\n".join(toy_vocab) + "\n")
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=str(tmp_path)):
        BertTokenizer.from_pretrained(tmp_path)


def test_no_vocabulary_at_all_is_the_users_mistake(tmp_path):
    with pytest.raises(UserError, match=f"{tmp_path}: no readable vocab"):
        BertTokenizer.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------- pairs


def test_a_pair_that_fits_is_joined_whole():
    joined, start = join_pair(np.array([2, 10, 11, 3]), np.array([2, 20, 3]), 8)
    assert joined.tolist() == [2, 10, 11, 3, 20, 3]
    assert start == 4  # [CLS] a [SEP] is segment 0


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(3, 40))
def test_the_longer_sentence_is_cut_first_token_by_token(a, b, max_length):
    """As `transformers` with `longest_first`: one token after the other off the longer one."""
    first, second = np.arange(100, 100 + a), np.arange(200, 200 + b)
    joined, start = join_pair(np.array([2, *first, 3]), np.array([2, *second, 3]), max_length)
    while a + b + 3 > max_length:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert joined.tolist() == [2, *first[:a], 3, *second[:b], 3]
    assert start == a + 2
