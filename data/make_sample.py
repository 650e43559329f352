"""Write data/sample: small files in the course's formats, for a first run and for the tests.

    python data/make_sample.py              # writes the committed files again, byte for byte
    python data/make_sample.py --out DIR    # writes them elsewhere, to compare

All text is made from the words and templates in `sample_words.toml`; nothing is taken from the
course's files. Each task keeps what makes the real one hard. Standard library only.
"""

import argparse
import csv
import random
import re
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
SEED = 2718
SPLITS = ("train", "dev", "test-student")

# ----------------------------------------------------------------------------------------------
# Words and templates


def split_choices(node):
    """The same tables and arrays, with every text split at its bars into a list of choices."""
    if isinstance(node, dict):
        return {name: split_choices(value) for name, value in node.items()}
    if isinstance(node, list):
        return [split_choices(value) for value in node]
    return [" ".join(choice.split()) for choice in node.split("|")]


WORDS = split_choices(tomllib.loads((HERE / "sample_words.toml").read_text(encoding="utf-8")))
SLOT = re.compile(r"\{(\w+)\}")


def fill(template, rng):
    """Fill the slots from the left, each with a choice that the sentence does not hold yet."""
    used = set()
    while slot := SLOT.search(template):
        choice = rng.choice([text for text in WORDS["film"][slot[1]] if text not in used])
        used.add(choice)
        template = template.replace(slot[0], choice, 1)
    return template


def polish(text):
    """The text with a capital first letter, and with `an` for `a` before a vowel letter.

    Our words have no exceptions such as `university` or `hour`.
    """
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    return text[:1].upper() + text[1:]


# ----------------------------------------------------------------------------------------------
# Sentiment: one sentence of a film review, grades 0 (worst) to 4 (best)

GRADE_SHARES = (13, 26, 19, 27, 15)  # per cent, close to the treebank's
MOVED_GRADES = 0.08  # share of grades moved to a neighbour, since raters disagree


def review_sentence(grade, rng):
    """One sentence of a grade, with spaces between its tokens as in the treebank."""
    template = rng.choice(WORDS["sentiment"][grade])
    if rng.random() < 0.3:
        template = f"{rng.choice(WORDS['asides'])} {template}"
    return polish(fill(template, rng))


def sentiment_example(rng):
    """A sentence and its grade. The leading space is the course's."""
    grade = rng.choices(range(5), weights=GRADE_SHARES)[0]
    sentence = f" {review_sentence(grade, rng)}"
    if rng.random() < MOVED_GRADES:
        grade = min(4, max(0, grade + rng.choice((-1, 1))))
    return [sentence, str(grade)]


# ----------------------------------------------------------------------------------------------
# Long reviews, label 0 or 1: mostly one opinion, with concessions and facts in between


def review_example(rng):
    """A review and its label; one review in 25 is longer than BERT's 512 tokens."""
    label = rng.randrange(2)
    words = rng.randint(470, 560) if rng.random() < 0.04 else rng.randint(60, 130)
    return [f" {long_review(label, words, rng)}", str(label)]


def long_review(label, words, rng):
    """A review of about the given number of words."""
    own = "good" if label else "bad"
    opinions, concessions = ((4, 4, 3), (1, 2)) if label else ((0, 0, 1), (3, 2))
    review = WORDS["review"]
    sentences = [rng.choice(review["openings"][rng.choice(("neutral", own))])]
    facts = rng.sample(review["facts"], len(review["facts"]))  # each at most once in a review
    while sum(len(sentence.split()) for sentence in sentences) < words:
        kind = rng.choices(("fact", "opinion", "concession"), weights=(28, 60, 12))[0]
        if kind == "fact" and facts:
            sentences.append(facts.pop())
        else:
            grade = rng.choice(concessions if kind == "concession" else opinions)
            sentences.append(review_sentence(grade, rng))
    sentences.append(rng.choice(review["verdicts"][rng.choice(("neutral", own))]))
    if words > 120:
        sentences.insert(len(sentences) // 2, "<br /><br />")
    return " ".join(polish(fill(sentence, rng)) for sentence in sentences)


# ----------------------------------------------------------------------------------------------
# Question pairs: rewordings, against near misses that share most words

DUPLICATES = 0.37  # share of pairs that ask the same, as in the course's file


def draw_values(group, rng):
    """Slot name -> value, for every slot in a group of intents."""
    slots = sorted(set(SLOT.findall(str(group))))
    return {slot: rng.choice(WORDS["question"][slot]) for slot in slots}


def question_pair(rng):
    """Two questions, and `1.0` where they ask the same, else `0.0`."""
    groups = WORDS["intent_groups"]
    group = rng.choice(groups)
    values = draw_values(group, rng)
    intent = rng.choice(group)
    first, second = rng.sample(intent, 2)
    label, second_values = "1.0", values
    if rng.random() >= DUPLICATES:
        label = "0.0"
        kind = rng.choices(("value", "intent", "unrelated"), weights=(40, 45, 15))[0]
        if kind == "intent":  # another question about the same things
            second = rng.choice(rng.choice([other for other in group if other is not intent]))
        elif kind == "value":  # the same question about another thing
            slot = rng.choice(SLOT.findall(first))
            others = [value for value in WORDS["question"][slot] if value != values[slot]]
            second_values = values | {slot: rng.choice(others)}
            second = rng.choice((first, second))
        else:
            group = rng.choice([other for other in groups if other is not group])
            second = rng.choice(group[0])
            second_values = draw_values(group, rng)
    return [polish(first.format_map(values)), polish(second.format_map(second_values)), label]


# ----------------------------------------------------------------------------------------------
# Similarity: two captions or headlines; the score says how much of an event they share

POINTS = {"who": 1.5, "does": 2.1, "where": 0.9, "when": 0.5}  # for a shared part; 5 in all


def tell(domain, event, parts, rng):
    """One sentence that tells the given parts of an event."""
    *start, last = (rng.choice(event[part]) for part in parts)
    start = " ".join(start)
    if domain == "headline":
        return f"{start} {last}"
    last_first = len(parts) > 2 and rng.random() < 0.5
    return polish(f"{last}, a {start}." if last_first else f"a {start} {last}.")


def rate(score, rng):
    """The mean of five raters' whole points (now and then of four), as in the benchmark."""
    raters = 5 if rng.random() < 0.9 else 4
    points = [min(5, max(0, round(score + rng.gauss(0, 0.45)))) for _ in range(raters)]
    return str(round(sum(points) / raters, 2))


def similarity_pair(rng):
    """Two sentences and their similarity, 0.0 to 5.0."""
    domain = rng.choice(sorted(WORDS["event"]))
    parts = WORDS["event"][domain]
    event, other = ({part: rng.choice(parts[part]) for part in parts} for _ in range(2))
    told = ["who", "does", "where"] + (["when"] if rng.random() < 0.5 else [])
    keep = rng.choices((1.0, 0.7, 0.45, 0.0), weights=(14, 32, 36, 18))[0]
    second = {part: event[part] if rng.random() < keep else other[part] for part in told}
    told_second = told[:-1] if rng.random() < 0.2 else told
    shared = sum(POINTS[part] for part in told_second if second[part] is event[part])
    # A part that only one sentence tells counts half: the other does not contradict it.
    shared += sum(POINTS[part] / 2 for part in told if part not in told_second)
    score = 5 * shared / sum(POINTS[part] for part in told)
    sentences = [tell(domain, event, told, rng), tell(domain, second, told_second, rng)]
    if domain == "headline" and rng.random() < 0.08:
        speaker = rng.choice(("mayor", "minister", "spokesperson"))
        sentences = [f'"{text}", says {speaker}' for text in sentences]
    return [*sentences, rate(score, rng)]


# ----------------------------------------------------------------------------------------------
# Files

TASKS = {  # file stem -> maker of one example, its columns, rows of train, dev and test
    "ids-sst": (sentiment_example, ["sentence", "sentiment"], (520, 160, 120)),
    "quora": (question_pair, ["sentence1", "sentence2", "is_duplicate"], (440, 150, 110)),
    "sts": (similarity_pair, ["sentence1", "sentence2", "similarity"], (440, 150, 110)),
    "ids-cfimdb": (review_example, ["sentence", "sentiment"], (80, 40, 40)),
}


def make_examples(make, count, rng):
    """Distinct examples: no sentence occurs twice in a task, so none is in two splits."""
    examples, seen = [], set()
    while len(examples) < count:
        *sentences, label = make(rng)
        if len(set(sentences)) == len(sentences) and seen.isdisjoint(sentences):
            seen.update(sentences)
            examples.append([f"{rng.getrandbits(100):025x}", *sentences, label])
    return examples


def make_rows(name, columns, examples, indices):
    """The rows of one file, header first, with the course's index columns."""
    if name.endswith("test-student.csv"):  # has no labels
        columns, examples = columns[:-1], [example[:-1] for example in examples]
        if name.startswith("ids-"):  # the course wrote these twice: the first index became data
            rows = [[str(i + 1), f"{i}.0", *example] for i, example in enumerate(examples)]
            return [["0", "", "id", *columns], *rows]
    if name.startswith("ids-"):
        indices = range(len(examples))
    rows = [[str(i), *example] for i, example in zip(indices, examples, strict=True)]
    return [["", "id", *columns], *rows]


def write_task(out, stem, rng):
    """Write the three files of one task."""
    make, columns, sizes = TASKS[stem]
    examples = make_examples(make, sum(sizes), rng)
    indices = rng.sample(range(len(examples)), len(examples))
    end = 0
    for split, size in zip(SPLITS, sizes, strict=True):
        name, part, end = f"{stem}-{split}.csv", slice(end, end + size), end + size
        with open(out / name, "w", encoding="utf-8", newline="") as file:
            rows = make_rows(name, columns, examples[part], indices[part])
            csv.writer(file, delimiter="\t", lineterminator="\n").writerows(rows)


def main(argv=None):
    """Write all files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--out", type=Path, default=HERE / "sample", help="folder (default: data/sample)")
    add("--seed", type=int, default=SEED, help="default: %(default)s")
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    for stem in TASKS:
        # A generator per task: a word added to one task leaves the files of the others as they are.
        write_task(args.out, stem, random.Random(f"{args.seed} {stem.removeprefix('ids-')}"))


if __name__ == "__main__":
    main()
