"""Text to WordPiece ids, on the `tokenizers` library.

The vocabulary, the added tokens and the rules for normalising come from the encoder's folder. A
literal `[SEP]` in a text is text, not a special token (as in `transformers` with
`split_special_tokens=True`).
"""

import json
from pathlib import Path

import numpy as np
from tokenizers import AddedToken, Tokenizer
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing

from config import UserError

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
# A longer text is cut before it is tokenised, for speed: 512 tokens are some 3,000 characters.
MAX_CHARACTERS = 100_000
# `transformers` builds BERT_CLASSES from the vocabulary and `tokenizer_config.json`; for
# COMPLETE_CLASSES it takes `tokenizer.json` as it is.
BERT_CLASSES = ("BertTokenizer", "BertTokenizerFast")
COMPLETE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


def wordpiece(vocab, lowercase=True, strip_accents=None, split_chinese=True):
    """BERT's own pipeline, a `tokenizers.Tokenizer`.

    `vocab` maps word pieces to ids. `strip_accents` None: as `lowercase`. `split_chinese`: each
    Chinese character becomes a word.
    """
    pipeline = Tokenizer(WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=100))
    pipeline.normalizer = BertNormalizer(
        lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_chinese
    )
    pipeline.pre_tokenizer = BertPreTokenizer()
    return pipeline


class BertTokenizer:
    """WordPiece tokenizer of one encoder (Devlin et al. 2019; Wu et al. 2016).

    `pipeline` is a `tokenizers.Tokenizer`; `name` is the class by which `transformers` loads it.
    """

    def __init__(self, pipeline, model_max_length=512, name="BertTokenizer"):
        self._pipeline, self.model_max_length, self.name = pipeline, model_max_length, name
        ids = pipeline.get_vocab()
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise UserError(f"vocabulary: no {' '.join(missing)} among {len(ids)} word pieces")
        # If a vocabulary lists a piece twice, the last id has it and the other has "".
        self.vocab = [pipeline.id_to_token(i) or "" for i in range(max(ids.values()) + 1)]
        special = (ids[token] for token in SPECIAL_TOKENS)
        self.pad_id, self.unk_id, self.cls_id, self.sep_id, self.mask_id = special

    @classmethod
    def from_pretrained(cls, folder):
        """Read the tokenizer of a local folder: the same ids as `transformers`, or `UserError`."""
        folder = Path(folder)
        try:
            settings, complete, added = (
                json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}")
                for path in map(folder.joinpath, SETTINGS_FILES)
            )
            name = settings.get("tokenizer_class") or BERT_CLASSES[0]
            pipeline = _read_pipeline(folder, name, settings, complete)
            _add_tokens(pipeline, _added_tokens(settings, complete, added))
            length = settings.get("model_max_length", 512)
            length = length if length < 10**6 else 512  # 10^30 stands for no limit
        except UserError as error:
            raise UserError(f"{folder}: {error}") from error
        except Exception as error:  # the library's own errors have no other base
            raise UserError(f"{folder}: no readable vocabulary: {error}") from error
        return cls(pipeline, length, name.removesuffix("Fast") if name in BERT_CLASSES else name)

    def __len__(self):
        return len(self.vocab)

    def __call__(self, texts, max_length=None):
        """Ids of each text as an int32 array `[CLS] … [SEP]` of at most `max_length` tokens."""
        room = (max_length or self.model_max_length) - 2
        texts = [text[:MAX_CHARACTERS] for text in texts]
        encodings = self._pipeline.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array([self.cls_id, *encoding.ids[:room], self.sep_id], dtype=np.int32)
            for encoding in encodings
        ]

    def describe(self):
        """Everything that the ids of a text depend on, as JSON."""
        return json.dumps([self.model_max_length, self._pipeline.to_str()])

    def save_pretrained(self, folder):
        """Write the files by which `transformers` and other tools load this same tokenizer."""
        folder = Path(folder)
        special = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
        settings = {
            "tokenizer_class": self.name,
            "model_max_length": self.model_max_length,
            "model_input_names": ["input_ids", "token_type_ids", "attention_mask"],
            "split_special_tokens": True,  # a literal [SEP] in a text is text for them too
            **special,
        }
        if self.name in BERT_CLASSES:
            rules = self._pipeline.normalizer
            settings |= {
                "do_lower_case": rules.lowercase,
                "strip_accents": rules.strip_accents,
                "tokenize_chinese_chars": rules.handle_chinese_chars,
            }
        size = max(self._pipeline.get_vocab(with_added_tokens=False).values()) + 1
        (folder / "vocab.txt").write_text("\n".join(self.vocab[:size]) + "\n", encoding="utf-8")
        contents = {"tokenizer_config.json": settings, "special_tokens_map.json": special}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        complete = Tokenizer.from_str(self._pipeline.to_str())
        complete.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
        complete.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )
        complete.save(str(folder / "tokenizer.json"))


# ------------------------------------------------------------------------------ a folder's files

SETTINGS_FILES = ("tokenizer_config.json", "tokenizer.json", "added_tokens.json")


def _read_pipeline(folder, name, settings, complete):
    """The pipeline of a folder without its added tokens; `complete` is its `tokenizer.json`.

    Raises `UserError` for a tokenizer that is not BERT's.
    """
    kind = complete.get("model", {}).get("type") or "WordPiece"  # old files leave it out
    if name not in BERT_CLASSES + COMPLETE_CLASSES or kind != "WordPiece":
        raise UserError(f"tokenizer: {name}, {kind}; expected {BERT_CLASSES[0]}, WordPiece")
    for token in SPECIAL_TOKENS:
        found = settings.get(f"{token[1:-1].lower()}_token") or token
        found = found["content"] if isinstance(found, dict) else found
        if found != token:
            raise UserError(f"tokenizer_config.json: {found!r} in place of {token}")
    vocab, path = complete.get("model", {}).get("vocab"), folder / "vocab.txt"
    if vocab is None or path.is_file():
        lines = path.read_text(encoding="utf-8").removesuffix("\n").split("\n")
        listed = {piece: number for number, piece in enumerate(lines)}
        pieces = {piece: number for piece, number in listed.items() if piece}  # "": see `vocab`
        if vocab not in (None, listed, pieces):
            raise UserError("the vocabularies of vocab.txt and tokenizer.json differ")
        vocab = vocab or listed
    if name in COMPLETE_CLASSES:
        parts = dict.fromkeys(("truncation", "padding", "post_processor"))
        return Tokenizer.from_str(json.dumps(complete | parts | {"added_tokens": []}))
    rules = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
    lowercase, strip_accents, split_chinese = map(settings.get, rules)
    return wordpiece(vocab, lowercase is not False, strip_accents, split_chinese is not False)


def _added_tokens(settings, complete, added):
    """The added tokens of a folder's files: text -> (id or None for the next one, `AddedToken`).

    `complete` is `tokenizer.json`, `added` is `added_tokens.json`.
    """
    special = settings.get("additional_special_tokens") or []
    ids = dict.fromkeys(special) | added
    entries = [
        {"content": text, "id": number, "normalized": text not in special}
        for text, number in ids.items()
    ]
    decoder = settings.get("added_tokens_decoder", {})
    entries += [{**entry, "id": int(number)} for number, entry in decoder.items()]
    entries += complete.get("added_tokens", [])
    how = ("single_word", "lstrip", "rstrip", "normalized")
    return {
        entry["content"]: (
            entry["id"],
            AddedToken(entry["content"], **{key: entry[key] for key in how if key in entry}),
        )
        for entry in entries
        if entry["content"] not in SPECIAL_TOKENS
    }


def _add_tokens(pipeline, tokens):
    """Add tokens by text to a pipeline, in the order of their ids. Raises `UserError`.

    All are found in texts, special ones too; only BERT's own five are not.
    """
    last = pipeline.get_vocab_size() + len(tokens)
    for text, (number, token) in sorted(tokens.items(), key=lambda item: item[1][0] or last):
        pipeline.add_tokens([token])
        if number not in (None, pipeline.token_to_id(text)):
            raise UserError(f"added token {text!r}: its id is {number}, which does not follow")


def join_pair(first, second, max_length):
    """One sequence `[CLS] a [SEP] b [SEP]` from two of `[CLS] … [SEP]`, the longer cut first.

    Returns at most `max_length` ids, and the number of leading ids that are segment 0.
    """
    room = max_length - 3
    a, b = len(first) - 2, len(second) - 2
    if a + b > room:
        a, b = min(a, max(room - b, (room + 1) // 2)), min(b, max(room - a, room // 2))
    return np.concatenate([first[: a + 1], first[-1:], second[1 : b + 1], second[-1:]]), a + 2
