"""The shipped sample: the generator's bytes, the course's formats, no sentence in two splits, and
labels that can be learnt, but not by counting words alone."""

import csv
import re
from collections import Counter

import numpy as np
import pytest
from conftest import REPOSITORY, SAMPLE, load_script
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression

make_sample = load_script(REPOSITORY / "data" / "make_sample.py")


def read(stem, split):
    """The rows of a file as dicts, split as the course's reader splits them."""
    with open(SAMPLE / f"{stem}-{split}.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def sentences(stem, *splits):
    """Every sentence of the splits."""
    rows = [row for split in splits for row in read(stem, split)]
    return [row[name] for row in rows for name in row if name.startswith("sentence")]


def test_generator_writes_the_committed_bytes_again_and_others_from_another_seed(tmp_path):
    committed = {path.name: path.read_bytes() for path in SAMPLE.iterdir()}
    make_sample.main(["--out", str(tmp_path)])
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == committed
    make_sample.main(["--out", str(tmp_path), "--seed", "1"])
    assert all((tmp_path / name).read_bytes() != committed[name] for name in committed)


@pytest.mark.parametrize(
    "stem, text, label, pattern, sizes",
    [
        ("ids-sst", ["sentence"], "sentiment", "[0-4]", (520, 160, 120)),
        ("quora", ["sentence1", "sentence2"], "is_duplicate", r"[01]\.0", (440, 150, 110)),
        ("sts", ["sentence1", "sentence2"], "similarity", r"[0-4]\.\d\d?|5\.0", (440, 150, 110)),
        ("ids-cfimdb", ["sentence"], "sentiment", "[01]", (80, 40, 40)),
    ],
)
def test_files_are_as_the_course_writes_them(stem, text, label, pattern, sizes):
    train, dev, test = (read(stem, split) for split in make_sample.SPLITS)
    assert (len(train), len(dev), len(test)) == sizes
    assert not any(None in row or None in row.values() for row in train + dev + test)
    ids = [row["id"] for row in train + dev + test]
    assert len(set(ids)) == len(ids) and all(re.fullmatch("[0-9a-f]{25}", row) for row in ids)
    assert list(train[0]) == list(dev[0]) == ["", "id", *text, label]
    assert all(re.fullmatch(pattern, row[label]) for row in train + dev)
    if not stem.startswith("ids-"):
        assert list(test[0]) == ["", "id", *text]
        return
    for rows in (train, dev):
        assert [row[""] for row in rows] == [str(i) for i in range(len(rows))]
    assert list(test[0]) == ["0", "", "id", *text]  # the course's odd header
    counted = [(str(i + 1), f"{i}.0") for i in range(len(test))]
    assert [(row["0"], row[""]) for row in test] == counted


@pytest.mark.parametrize("stem", make_sample.TASKS)
def test_sentences_are_whole_and_no_two_are_the_same(stem):
    texts = sentences(stem, *make_sample.SPLITS)
    assert len(set(texts)) == len(texts)
    # Sentiment text begins with a space, as in the course's files.
    lead = " " if stem.startswith("ids-") else ""
    assert all(re.fullmatch(rf"{lead}\S(.*\S)?", text) for text in texts)
    wrong_article = re.compile(r"\b([Aa] [aeiouéAEIOU]|[Aa]n [^aeiouéAEIOU])")
    assert not any(re.search(r"[{}]", text) or wrong_article.search(text) for text in texts)
    assert any(not text.isascii() for text in sentences(stem, "dev"))


def test_files_exercise_quoting_end_lines_in_lf_and_are_small():
    contents = {path.stem: path.read_bytes() for path in SAMPLE.iterdir()}
    assert all(b'""' in contents[name] for name in ("quora-train", "sts-train", "ids-cfimdb-train"))
    assert not any(b"\r" in content for content in contents.values())
    assert sum(map(len, contents.values())) < 410_000


def test_reviews_are_long_and_some_are_longer_than_bert_reads():
    lengths = [len(text.split()) for text in sentences("ids-cfimdb", *make_sample.SPLITS)]
    assert min(lengths) >= 60
    # Words and punctuation marks are at least one token each, so these pass 512 tokens.
    assert 3 <= sum(length > 510 for length in lengths) <= 20
    assert any(len(text.split()) > 510 for text in sentences("ids-cfimdb", "train"))


@pytest.mark.parametrize("split", ["train", "dev"])
def test_labels_cover_their_range_and_none_is_most(split):
    grades = Counter(row["sentiment"] for row in read("ids-sst", split))
    assert set(grades) == set("01234")
    # A constant guess must not look like learning.
    assert max(grades.values()) < 0.35 * grades.total()
    assert min(grades.values()) > 0.07 * grades.total()
    pairs = Counter(row["is_duplicate"] for row in read("quora", split))
    assert 0.25 < pairs["1.0"] / pairs.total() < 0.5
    scores = [float(row["similarity"]) for row in read("sts", split)]
    for low in range(5):
        share = sum(low <= score < low + 1 + (low == 4) for score in scores) / len(scores)
        assert 0.05 < share < 0.5, low


def overlaps(stem, split, label):
    """Shared words over all words (Jaccard) of each pair, and its label as a number."""
    words = [set(re.findall(r"\w+", text.lower())) for text in sentences(stem, split)]
    pairs = zip(words[::2], words[1::2], strict=True)
    shared = np.array([len(first & second) / len(first | second) for first, second in pairs])
    return shared, np.array([float(row[label]) for row in read(stem, split)])


def test_labels_of_pairs_are_not_told_by_shared_words():
    """Near misses share most words, rewordings few: no threshold tells duplicates well."""
    shared, labels = overlaps("quora", "train", "is_duplicate")
    majority = max(labels.mean(), 1 - labels.mean())
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        assert ((shared > threshold) == labels).mean() < majority + 0.1, threshold
    assert any((shared > 0.6) & (labels == 0))
    assert 0.4 < np.corrcoef(overlaps("sts", "dev", "similarity"))[0, 1] < 0.85


def test_sentiment_can_be_learnt_but_not_perfectly():
    """By a logistic regression on word counts."""
    texts, dev_texts = sentences("ids-sst", "train"), sentences("ids-sst", "dev")
    grades, dev_grades = (
        [row["sentiment"] for row in read("ids-sst", split)] for split in ("train", "dev")
    )
    counter = CountVectorizer(token_pattern=r"\S+").fit(texts)

    def accuracy(labels):
        model = LogisticRegression(max_iter=2000).fit(counter.transform(texts), labels)
        return model.score(counter.transform(dev_texts), dev_grades)

    assert 0.6 < accuracy(grades) < 0.97
    # The same check on labels that say nothing must come out near chance, or it proves nothing.
    assert accuracy(grades[7:] + grades[:7]) < 0.4
