"""The tokenizer: its markers, limits, files and the joining of pairs."""

import json

import numpy as np
import pytest
from conftest import pipeline_of
from hypothesis import given, settings
from hypothesis import strategies as st

from config import UserError
from tokenizer import BertTokenizer, join_pair


def pieces(tokenizer, text, **limits):
    """The word pieces of one text, separated by spaces, without [CLS] and [SEP]."""
    ids = tokenizer([text], **limits)[0]
    assert (ids[0], ids[-1], ids.dtype) == (tokenizer.cls_id, tokenizer.sep_id, np.int32)
    return " ".join(tokenizer.vocab[i] for i in ids[1:-1])


# ---------------------------------------------------------------------------------- text to ids


def test_a_text_is_cut_to_the_limit_with_its_markers(tokenizer):
    assert pieces(tokenizer, "good " * 50).split() == ["good"] * 38
    assert pieces(tokenizer, "good movie bad", max_length=4) == "good movie"
    assert pieces(tokenizer, "x" * 100, max_length=200).count("##x") == 99


# ---------------------------------------------------------------------------------------- files

RULES = [
    # tokenizer_config.json, normalizer of tokenizer.json, pieces of "Ün 中国"
    ({"do_lower_case": True}, {}, "un [UNK] [UNK]"),
    ({"do_lower_case": True, "strip_accents": False}, {}, "[UNK] [UNK] [UNK]"),
    ({"do_lower_case": False}, {}, "[UNK] [UNK] [UNK]"),
    ({"do_lower_case": None}, {}, "un [UNK] [UNK]"),
    ({"tokenize_chinese_chars": False}, {}, "un [UNK]"),
    ({}, {"lowercase": False}, "un [UNK] [UNK]"),  # as `transformers`: these are `BertTokenizer`'s
    ({"tokenizer_class": "PreTrainedTokenizerFast"}, {"lowercase": False}, "[UNK] [UNK] [UNK]"),
    ({"tokenizer_class": "TokenizersBackend"}, {"strip_accents": False}, "[UNK] [UNK] [UNK]"),
]


@pytest.mark.parametrize(("settings", "normalizer", "expected"), RULES)
def test_the_rules_of_a_folder_are_kept_when_it_is_saved(
    toy_vocab, tmp_path, settings, normalizer, expected
):
    """Also where `tokenizer.json` is the only vocabulary that is left."""
    BertTokenizer(pipeline_of(toy_vocab)).save_pretrained(tmp_path)
    complete = json.loads((tmp_path / "tokenizer.json").read_text())
    complete["normalizer"] |= normalizer
    (tmp_path / "tokenizer.json").write_text(json.dumps(complete))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = BertTokenizer.from_pretrained(tmp_path)
    assert pieces(read, "Ün 中国") == expected
    read.model_max_length = 40
    read.save_pretrained(tmp_path)
    for absent in (None, "vocab.txt"):
        if absent:
            (tmp_path / absent).unlink()
        again = BertTokenizer.from_pretrained(tmp_path)
        assert (again.vocab, again.describe()) == (toy_vocab, read.describe())
        assert pieces(again, "Ün 中国") == expected


def test_a_vocabulary_with_crlf_and_without_a_limit_is_read(toy_vocab, tmp_path):
    """Published files write 10**30 where nobody set a limit; it becomes 512."""
    (tmp_path / "vocab.txt").write_bytes("".join(f"{p}\r\n" for p in toy_vocab).encode())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"model_max_length": 10**30}))
    tokenizer = BertTokenizer.from_pretrained(tmp_path)
    assert (tokenizer.vocab, tokenizer.model_max_length) == (toy_vocab, 512)


def test_a_vocabulary_without_the_markers_is_refused(toy_vocab):
    with pytest.raises(UserError, match=r"no \[SEP\] \[MASK\]"):
        BertTokenizer(pipeline_of([p for p in toy_vocab if p not in ("[SEP]", "[MASK]")]))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("tokenizer.json", "{"),
        ("tokenizer.json", "[]"),
        ("tokenizer_config.json", '{"model_max_length": "long"}'),
        ("tokenizer_config.json", "{}"),  # and no vocabulary
        ("vocab.txt", "\xff\xfe"),
    ],
)
def test_a_damaged_or_missing_file_is_the_users_mistake(tmp_path, toy_vocab, name, content):
    if name == "tokenizer_config.json" and content != "{}":
        (tmp_path / "vocab.txt").write_text("\n".join(toy_vocab) + "\n")
    (tmp_path / name).write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError, match=f"{tmp_path}: no readable vocab"):
        BertTokenizer.from_pretrained(tmp_path)


ENTRY = {"id": 999, "content": "covid19", "normalized": True}


@pytest.mark.parametrize(
    ("settings", "complete", "message"),
    [
        ({"tokenizer_class": "BertJapaneseTokenizer"}, {}, "BertJapaneseTokenizer, WordPiece; exp"),
        ({"tokenizer_class": "TokenizersBackend"}, {"model": {"type": "BPE"}}, "Backend, BPE"),
        ({"cls_token": "<s>"}, {}, r"'<s>' in place of \[CLS\]"),
        ({"sep_token": {"content": "</s>"}}, {}, r"'</s>' in place of \[SEP\]"),
        ({}, {"added_tokens": [ENTRY]}, "'covid19': its id is 999, which does not follow"),
    ],
)
def test_row_50_a_tokenizer_that_transformers_reads_otherwise_is_refused(
    toy_vocab, tmp_path, settings, complete, message
):
    BertTokenizer(pipeline_of(toy_vocab)).save_pretrained(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text()) | complete
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=f"{tmp_path}: .*{message}"):
        BertTokenizer.from_pretrained(tmp_path)


def test_a_vocabulary_that_lists_a_piece_twice_is_saved_and_read_again(toy_vocab, tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join([*toy_vocab, toy_vocab[9]]) + "\n")
    first = BertTokenizer.from_pretrained(tmp_path)
    first.save_pretrained(tmp_path)
    assert BertTokenizer.from_pretrained(tmp_path).describe() == first.describe()


def test_two_vocabularies_that_differ_are_refused(toy_vocab, tmp_path):
    BertTokenizer(pipeline_of(toy_vocab)).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join([*toy_vocab, "new"]) + "\n")
    with pytest.raises(UserError, match=r"of vocab.txt and tokenizer.json differ"):
        BertTokenizer.from_pretrained(tmp_path)


# ---------------------------------------------------------------------------------------- pairs


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 30), st.integers(0, 30), st.integers(3, 40))
def test_the_longer_sentence_is_cut_first_token_by_token(a, b, max_length):
    """As `transformers` with `longest_first`: one token after the other off the longer one."""
    first, second = np.arange(100, 100 + a), np.arange(200, 200 + b)
    joined, start = join_pair(np.array([2, *first, 3]), np.array([2, *second, 3]), max_length)
    while a + b + 3 > max_length:
        a, b = (a - 1, b) if a > b else (a, b - 1)
    assert joined.tolist() == [2, *first[:a], 3, *second[:b], 3]
    assert start == a + 2  # [CLS] a [SEP] is segment 0
