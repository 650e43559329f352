"""The shipped sample: the generator's bytes, the course's formats, no leak between splits, and
labels that can be learnt but not by counting words alone."""

import csv
import re
from collections import Counter
from pathlib import Path

import pytest
from conftest import load_script

DATA = Path(__file__).resolve().parents[1] / "data"
SAMPLE = DATA / "sample"
STEMS = {"sst": "ids-sst", "quora": "quora", "sts": "sts", "cfimdb": "ids-cfimdb"}
SPLITS = ("train", "dev", "test-student")

make_sample = load_script(DATA / "make_sample.py")


def read_rows(task: str, split: str) -> list[list[str]]:
    """All rows of a file, header first, as the course's reader splits them."""
    path = SAMPLE / f"{STEMS[task]}-{split}.csv"
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file, delimiter="\t"))


def columns(task: str, split: str, *names: str) -> list[tuple[str, ...]]:
    """The named columns of a file, row by row."""
    header, *rows = read_rows(task, split)
    places = [header.index(name) for name in names]
    return [tuple(row[place] for place in places) for row in rows]


def sentences(task: str, split: str) -> list[str]:
    """Every sentence of a file."""
    names = [name for name in read_rows(task, split)[0] if name.startswith("sentence")]
    return [text for row in columns(task, split, *names) for text in row]


# ----------------------------------------------------------------------------------------------
# The generator


def test_generator_writes_the_committed_bytes_again(tmp_path):
    assert make_sample.main(["--out", str(tmp_path)]) == 0
    made = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert made == {path.name: path.read_bytes() for path in SAMPLE.iterdir()}


def test_another_seed_writes_other_files(tmp_path):
    make_sample.main(["--out", str(tmp_path), "--seed", "1"])
    for path in tmp_path.iterdir():
        assert path.read_bytes() != (SAMPLE / path.name).read_bytes(), path.name


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a old dog", "an old dog"),
        ("What a honest a uniform a university", "What an honest a uniform a university"),
        ("a unforgettable a European", "an unforgettable a European"),
        ("a one-note a hour", "a one-note an hour"),
        ("a éclair, A ending", "an éclair, An ending"),
    ],
)
def test_articles_follow_the_sound(text, expected):
    assert make_sample.with_articles(text) == expected


def test_no_slot_is_left_unfilled_and_no_article_is_wrong():
    for task in STEMS:
        for split in SPLITS:
            text = "\n".join(sentences(task, split))
            assert "{" not in text and "}" not in text
            assert not re.search(r"\b(a [aeio]\w{3}|an [bcdfgjklmnpqrstvwxz])", text)


# ----------------------------------------------------------------------------------------------
# Formats


@pytest.mark.parametrize(
    "task, text, label",
    [
        ("sst", ["sentence"], "sentiment"),
        ("cfimdb", ["sentence"], "sentiment"),
        ("quora", ["sentence1", "sentence2"], "is_duplicate"),
        ("sts", ["sentence1", "sentence2"], "similarity"),
    ],
)
def test_headers_are_the_courses(task, text, label):
    for split in ("train", "dev"):
        assert read_rows(task, split)[0] == ["", "id", *text, label]
    odd = ["0", "", "id", *text] if STEMS[task].startswith("ids-") else ["", "id", *text]
    assert read_rows(task, "test-student")[0] == odd


@pytest.mark.parametrize("task", ["sst", "cfimdb"])
def test_index_columns_of_ids_files_count_as_the_courses_do(task):
    for split in ("train", "dev"):
        rows = read_rows(task, split)[1:]
        assert [row[0] for row in rows] == [str(i) for i in range(len(rows))]
    rows = read_rows(task, "test-student")[1:]
    assert [row[:2] for row in rows] == [[str(i + 1), f"{i}.0"] for i in range(len(rows))]


@pytest.mark.parametrize("task", STEMS)
def test_rows_are_whole_and_ids_are_unique_hex(task):
    ids = []
    for split, size in zip(SPLITS, make_sample.SIZES[task], strict=True):
        header, *rows = read_rows(task, split)
        assert len(rows) == size and {len(row) for row in rows} == {len(header)}
        ids += [row_id for (row_id,) in columns(task, split, "id")]
    assert all(re.fullmatch("[0-9a-f]{25}", row_id) for row_id in ids)
    assert len(set(ids)) == len(ids)


@pytest.mark.parametrize(
    "task, label, pattern",
    [
        ("sst", "sentiment", r"[0-4]"),
        ("cfimdb", "sentiment", r"[01]"),
        ("quora", "is_duplicate", r"[01]\.0"),
        ("sts", "similarity", r"[0-4]\.\d\d?|5\.0"),
    ],
)
def test_labels_are_written_as_the_course_writes_them(task, label, pattern):
    for split in ("train", "dev"):
        for (text,) in columns(task, split, label):
            assert re.fullmatch(pattern, text), text


def test_sentiment_text_begins_with_a_space_and_the_rest_does_not():
    for split in SPLITS:
        for task in ("sst", "cfimdb"):
            assert all(re.match(r" \S", text) for text in sentences(task, split))
        for task in ("quora", "sts"):
            assert all(text == text.strip() != "" for text in sentences(task, split))


def test_quoting_and_letters_beyond_ascii_are_exercised():
    for name in ("quora-train", "sts-train", "ids-cfimdb-train"):
        assert '""' in (SAMPLE / f"{name}.csv").read_text(encoding="utf-8"), name
    for task in STEMS:
        assert any(not text.isascii() for text in sentences(task, "dev")), task


def test_files_are_lf_only_and_the_folder_is_small():
    contents = [path.read_bytes() for path in SAMPLE.iterdir()]
    assert not any(b"\r" in content for content in contents)
    assert sum(map(len, contents)) < 410_000


def test_reviews_are_long_and_some_are_longer_than_bert_reads():
    lengths = [len(text.split()) for split in SPLITS for text in sentences("cfimdb", split)]
    assert min(lengths) >= 60
    # Words and punctuation marks are at least one token each, so these pass 512 tokens.
    assert 3 <= sum(length > 510 for length in lengths) <= 20
    assert any(len(text.split()) > 510 for text in sentences("cfimdb", "train"))


# ----------------------------------------------------------------------------------------------
# Splits and labels


@pytest.mark.parametrize("task", STEMS)
def test_no_sentence_is_in_two_splits_or_twice(task):
    counts = Counter(text for split in SPLITS for text in sentences(task, split))
    assert max(counts.values()) == 1, counts.most_common(3)


def test_every_sentiment_grade_is_in_every_labelled_split():
    for split in ("train", "dev"):
        grades = Counter(label for (label,) in columns("sst", split, "sentiment"))
        assert set(grades) == set("01234")
        # A constant guess must not look like learning.
        assert max(grades.values()) < 0.35 * sum(grades.values())
        assert min(grades.values()) > 0.07 * sum(grades.values())


def test_pair_labels_cover_their_range():
    for split in ("train", "dev"):
        pairs = Counter(label for (label,) in columns("quora", split, "is_duplicate"))
        assert 0.25 < pairs["1.0"] / sum(pairs.values()) < 0.5
        scores = [float(label) for (label,) in columns("sts", split, "similarity")]
        for low in range(5):
            share = sum(low <= score < low + 1 + (low == 4) for score in scores) / len(scores)
            assert 0.05 < share < 0.5, (split, low, share)


def word_overlap(first: str, second: str) -> float:
    """Shared words over all words (Jaccard)."""
    words = [set(re.findall(r"\w+", text.lower())) for text in (first, second)]
    return len(words[0] & words[1]) / len(words[0] | words[1])


def test_paraphrases_are_not_told_by_shared_words():
    """Near misses share most words, rewordings few: no overlap threshold does well."""
    rows = columns("quora", "train", "sentence1", "sentence2", "is_duplicate")
    scored = [(word_overlap(a, b), label == "1.0") for a, b, label in rows]
    majority = max(Counter(label for _, label in scored).values()) / len(scored)
    for threshold in (0.2, 0.3, 0.4, 0.5, 0.6, 0.7):
        accuracy = sum((o > threshold) == label for o, label in scored) / len(scored)
        assert accuracy < majority + 0.1, threshold
    assert any(overlap > 0.6 and not label for overlap, label in scored)


def test_similarity_follows_overlap_but_is_not_it():
    np = pytest.importorskip("numpy")
    rows = columns("sts", "dev", "sentence1", "sentence2", "similarity")
    overlaps = [word_overlap(a, b) for a, b, _ in rows]
    r = np.corrcoef(overlaps, [float(label) for *_, label in rows])[0, 1]
    assert 0.4 < r < 0.85


def word_count_accuracy(train: list, dev: list) -> float:
    """Dev accuracy of a logistic regression on word counts."""
    linear_model = pytest.importorskip("sklearn.linear_model")
    text = pytest.importorskip("sklearn.feature_extraction.text")
    counter = text.CountVectorizer(token_pattern=r"\S+")
    features = counter.fit_transform([sentence for sentence, _ in train])
    model = linear_model.LogisticRegression(max_iter=2000).fit(features, [y for _, y in train])
    return model.score(counter.transform([s for s, _ in dev]), [y for _, y in dev])


def test_sentiment_can_be_learnt_but_not_perfectly():
    train, dev = (columns("sst", split, "sentence", "sentiment") for split in ("train", "dev"))
    assert 0.6 < word_count_accuracy(train, dev) < 0.97
    # The same check on labels that say nothing must come out near chance, or it proves nothing.
    turned = [(s, other) for (s, _), (_, other) in zip(train, train[7:] + train[:7], strict=True)]
    assert word_count_accuracy(turned, dev) < 0.4
