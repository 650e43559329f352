"""Text to WordPiece ids, on the `tokenizers` library.

The vocabulary and the lower-casing rule come from the encoder's folder. A literal `[SEP]` in a text
is text, not a marker (as in `transformers` with `split_special_tokens=True`).
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
# Classes that normalise a text as `tokenizer.json` says; the others follow `tokenizer_config.json`.
COMPLETE_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")


class BertTokenizer:
    """WordPiece tokenizer of one encoder (Devlin et al. 2019; Wu et al. 2016).

    `vocab` lists the word pieces in the order of their ids. `strip_accents` None: as `lowercase`.
    `split_chinese`: each Chinese character becomes a word.
    """

    def __init__(
        self, vocab, lowercase=True, model_max_length=512, strip_accents=None, split_chinese=True
    ):
        ids = {piece: number for number, piece in enumerate(vocab)}
        missing = [token for token in SPECIAL_TOKENS if token not in ids]
        if missing:
            raise UserError(f"vocabulary: no {' '.join(missing)} among {len(vocab)} word pieces")
        self.vocab, self.lowercase, self.model_max_length = list(vocab), lowercase, model_max_length
        self.pad_id, self.unk_id, self.cls_id, self.sep_id = (ids[t] for t in SPECIAL_TOKENS[:4])
        self._tokenizer = Tokenizer(WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100))
        self.strip_accents, self.split_chinese = strip_accents, split_chinese
        self._tokenizer.normalizer = BertNormalizer(
            lowercase=lowercase, strip_accents=strip_accents, handle_chinese_chars=split_chinese
        )
        self._tokenizer.pre_tokenizer = BertPreTokenizer()

    @classmethod
    def from_pretrained(cls, folder):
        """Read `vocab.txt` (else `tokenizer.json`) and `tokenizer_config.json` of a local folder.

        Normalises as `transformers` does. Raises `UserError` where no vocabulary can be read.
        """
        folder = Path(folder)
        try:
            settings, complete = (
                json.loads(path.read_text(encoding="utf-8") if path.is_file() else "{}")
                for path in (folder / "tokenizer_config.json", folder / "tokenizer.json")
            )
            if complete and not (folder / "vocab.txt").is_file():
                ids = complete["model"]["vocab"]
                vocab = sorted(ids, key=ids.get)
            else:
                text = (folder / "vocab.txt").read_text(encoding="utf-8")
                vocab = text.removesuffix("\n").split("\n")
            if settings.get("tokenizer_class") in COMPLETE_CLASSES:
                rules = complete.get("normalizer") or {}
                names = ("lowercase", "strip_accents", "handle_chinese_chars")
            else:
                rules = settings
                names = ("do_lower_case", "strip_accents", "tokenize_chinese_chars")
            lowercase, strip_accents, split_chinese = map(rules.get, names)
            length = settings.get("model_max_length", 512)
            length = length if length < 10**6 else 512  # 10^30 stands for no limit
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{folder}: no readable vocabulary: {error}") from error
        return cls(vocab, lowercase is not False, length, strip_accents, split_chinese is not False)

    def __len__(self):
        return len(self.vocab)

    def __call__(self, texts, max_length=None):
        """Ids of each text as an int32 array `[CLS] … [SEP]` of at most `max_length` tokens."""
        room = (max_length or self.model_max_length) - 2
        texts = [text[:MAX_CHARACTERS] for text in texts]
        encodings = self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        return [
            np.array([self.cls_id, *encoding.ids[:room], self.sep_id], dtype=np.int32)
            for encoding in encodings
        ]

    def settings(self):
        """How a text is normalised and cut, under `transformers`' names."""
        return {
            "do_lower_case": self.lowercase,
            "model_max_length": self.model_max_length,
            "strip_accents": self.strip_accents,
            "tokenize_chinese_chars": self.split_chinese,
        }

    def save_pretrained(self, folder):
        """Write the files by which `transformers` and other tools load this same tokenizer."""
        folder = Path(folder)
        special = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
        settings = {
            "tokenizer_class": "BertTokenizer",
            **self.settings(),
            "split_special_tokens": True,  # a literal [SEP] in a text is text for them too
            **special,
        }
        (folder / "vocab.txt").write_text("\n".join(self.vocab) + "\n", encoding="utf-8")
        contents = {"tokenizer_config.json": settings, "special_tokens_map.json": special}
        for name, content in contents.items():
            (folder / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        complete = Tokenizer.from_str(self._tokenizer.to_str())
        complete.add_special_tokens([AddedToken(t, special=True) for t in SPECIAL_TOKENS])
        complete.post_processor = TemplateProcessing(
            single="[CLS] $A [SEP]",
            pair="[CLS] $A [SEP] $B:1 [SEP]:1",
            special_tokens=[("[CLS]", self.cls_id), ("[SEP]", self.sep_id)],
        )
        complete.save(str(folder / "tokenizer.json"))


def join_pair(first, second, max_length):
    """One sequence `[CLS] a [SEP] b [SEP]` from two of `[CLS] … [SEP]`, the longer cut first.

    Returns at most `max_length` ids, and how many of them, from the first, are segment 0.
    """
    room = max_length - 3
    a, b = len(first) - 2, len(second) - 2
    if a + b > room:
        a, b = min(a, max(room - b, (room + 1) // 2)), min(b, max(room - a, room // 2))
    return np.concatenate([first[: a + 1], first[-1:], second[1 : b + 1], second[-1:]]), a + 2
